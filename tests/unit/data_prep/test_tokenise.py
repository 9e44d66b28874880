"""Units to tokens: the direct path to the Rust tokenizer, counts, long documents in parts."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.encoding import Encoder, TokenizerSpec, load_tokenizer, plain_backend, spec_of
from data_prep.filters import FilterOptions
from data_prep.readers import Line
from data_prep.records import undo_escapes
from data_prep.tokenise import DocumentOptions, TokenizeOptions, UnitTokenizer
from data_prep.units import Unit, cut_text, load_result, save_result

TEXTS = ["", " ", "In year 3 the river rose.", "</s> a <|user|>", "ሰላም नमस्ते\n\t🙂", "a" * 5000]
PLAIN = DocumentOptions(chat=False, undo_escapes=True)


@pytest.mark.parametrize("special_as_text", [True, False])
def test_same_ids_with_and_without_the_direct_path(tokenizer_dir, special_as_text):
    encoder = Encoder(TokenizerSpec(tokenizer_dir))
    assert encoder.backend is not None
    direct = encoder(TEXTS, special_as_text=special_as_text)
    alone = Encoder(spec_of(load_tokenizer(tokenizer_dir), tokenizer_dir, chat=False))
    assert alone.tokenizer is None
    assert alone(TEXTS, special_as_text=special_as_text) == direct
    encoder.backend = None
    assert encoder(TEXTS, special_as_text=special_as_text) == direct
    assert (4 in direct[3]) is not special_as_text, "<|user|> has id 4"


def test_classes_with_their_own_encoding_are_called(tokenizer_dir):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    assert plain_backend(load_tokenizer(tokenizer_dir)) is not None
    assert plain_backend(Own.from_pretrained(tokenizer_dir)) is None


def make_worker(tokenizer_dir, documents=PLAIN, **options):
    return UnitTokenizer(documents, TokenizeOptions(TokenizerSpec(tokenizer_dir), 1, **options))


LINES = [
    Line(7, b'{"text": "one\\\\ntwo three four five"}'),
    Line(8, b'{"text": ""}'),
    Line(9, b"{"),
    Line(10, b'{"text": "x"}'),
    Line(11, b"", "too long (9 bytes)"),
]


def test_counts_of_a_unit(tokenizer_dir):
    result = make_worker(tokenizer_dir, max_document_tokens=4)(Unit(2, LINES, stored_bytes=5))
    assert result.arrays["doc_lines"].tolist() == [7, 10]
    assert result.arrays["doc_lens"].tolist() == [5, 2]
    assert result.arrays["tokens"][[4, 6]].tolist() == [1, 1]
    assert [line for line, _ in result.rejects] == [9, 11]
    assert result.escapes == undo_escapes(r"\n")[1]
    assert result.counts == {"truncated_documents": 1, "empty_documents": 1}
    assert result.arrays["doc_bytes"][1] == 1
    assert (result.num_lines, result.stored_bytes) == (5, 5)


def test_dropped_documents_are_counted(tokenizer_dir):
    documents = DocumentOptions(False, True, filters=FilterOptions(min_words=1, max_words=4))
    result = make_worker(tokenizer_dir, documents, min_document_tokens=2)(Unit(0, LINES))
    assert result.dropped == {"too_many_words": 1, "too_few_tokens": 1}
    assert len(result.arrays["doc_lines"]) == 0


def test_a_document_in_parts_has_the_tokens_of_the_whole(tokenizer_dir, monkeypatch):
    monkeypatch.setattr("data_prep.tokenise.UNIT_BYTES", 3000)
    monkeypatch.setattr("data_prep.tokenise.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("data_prep.tokenise.cut_text", lambda text: cut_text(text, 1000))
    text = " ".join(f"word{number}" for number in range(2000)).replace("9 ", "9\\\\n")
    line = Line(3, b'{"text": "%s"}' % text.encode())
    worker = make_worker(tokenizer_dir)
    assert worker.splits and not make_worker(tokenizer_dir, max_document_tokens=5).splits
    whole = worker(Unit(0, [line]))
    units = worker.reader.split(line, 4, plain_text=False)
    assert [unit.number for unit in units] == list(range(4, 4 + len(units))) and len(units) > 3
    parts = [worker(Unit.from_bytes(unit.to_bytes())) for unit in units]
    joined = np.concatenate([part.arrays["tokens"] for part in parts])
    assert joined.tolist() == whole.arrays["tokens"].tolist()
    assert sum(part.arrays["doc_bytes"][0] for part in parts) == whole.arrays["doc_bytes"][0]
    assert parts[0].escapes == whole.escapes and not parts[1].escapes
    assert {int(part.arrays["doc_hash"][0]) for part in parts} == set(
        whole.arrays["doc_hash"].tolist()
    )
    bad = Line(3, b"{" * 9000)
    assert worker.reader.split(bad, 0, plain_text=False) == [Unit(0, [bad])]


def test_cuts_of_a_text():
    assert list(cut_text("abcdef", 10)) == ["abcdef"]
    assert list(cut_text("aaaa\nbbbb cccc", 8)) == ["aaaa\n", "bbbb cccc"[:4], " cccc"]
    assert list(cut_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    text = "one two\nthree four five six " * 50
    assert "".join(cut_text(text, 64)) == text
    assert max(map(len, cut_text(text, 64))) <= 64


def test_results_survive_the_disk_and_damage_is_seen(tokenizer_dir, tmp_path):
    result = make_worker(tokenizer_dir)(Unit(2, LINES))
    path = tmp_path / "0000002"
    assert load_result(path) is None
    save_result(path, result, "a")
    loaded = load_result(path)
    for name, array in result.arrays.items():
        assert (
            np.array_equal(loaded.arrays[name], array) and loaded.arrays[name].dtype == array.dtype
        )
    assert (loaded.rejects, loaded.escapes, loaded.counts) == (
        result.rejects,
        result.escapes,
        result.counts,
    )
    data = path.read_bytes()
    for bad in (b"", data[:10], data[:-1], data[:30] + b"\0" + data[31:]):
        path.write_bytes(bad)
        assert load_result(path) is None
    assert list(tmp_path.iterdir()) == [path]
