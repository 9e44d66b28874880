"""The build: content of rows, determinism, rejects, sampling."""

import json

import pytest
import torch

from data_prep.records import undo_escapes
from forgetscale.artifact import hash_file, verify_artifact
from forgetscale.data import TokenSet, open_stream, require_same_tokenizer, tokenizer_hash
from forgetscale.errors import ConfigError, DataError


def flat_tokens(token_set):
    return token_set.read(range(len(token_set))).reshape(-1).tolist()


def expected_tokens(tokenizer, texts, end):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [token for document in ids for token in [*document, *end]]


def shard_hashes(path):
    return [hash_file(shard) for shard in sorted(path.glob("*.arrow"))]


@pytest.mark.parametrize("document_end", ["eos", "none"])
def test_rows_are_documents_and_end_tokens_in_order(
    corpus, make, tokenizer, sentence, document_end
):
    token_set = TokenSet(make(corpus, document_end=document_end))
    end = [tokenizer.eos_token_id] if document_end == "eos" else []
    texts = [undo_escapes(sentence(number))[0] for number in range(100)]
    expected = expected_tokens(tokenizer, texts, end)
    dropped = token_set.payload["packing"]["dropped_tail_tokens"]
    assert flat_tokens(token_set) == expected[: len(expected) - dropped]
    assert len(expected) - dropped == token_set.num_tokens == token_set.num_rows * 16
    assert dropped < 16
    assert token_set.payload["document_end"] == {
        "policy": document_end,
        "token_id": end[0] if end else None,
    }
    for row in (0, token_set.num_rows - 1):
        assert sum(piece.num_tokens for piece in token_set.document_pieces(row)) == 16


def test_documents_are_traced_to_file_and_line(corpus, make, tokenizer, sentence):
    token_set = TokenSet(make(corpus))
    last = token_set.document_pieces(token_set.num_rows - 1)[-1]
    assert last.file.endswith("xx_clean_0001.jsonl.gz")
    assert 35 <= last.line <= 40
    first = token_set.document_pieces(0)[0]
    assert (first.file.endswith("xx_clean_0000.jsonl.gz"), first.line) == (True, 1)


def test_manifest_says_what_went_in(corpus, make, tokenizer_dir, sentence):
    path = make(corpus)
    verify_artifact(path, "token_set")
    token_set = TokenSet(path)
    sources = token_set.payload["sources"]
    assert [source["num_documents"] for source in sources] == [60, 40]
    assert [source["num_escapes"][r"\n"] for source in sources] == [60, 40]
    for source in sources:
        shard = corpus / source["path"].rpartition("/")[2]
        assert source["sha256"] == hash_file(shard)
        assert source["size"] == shard.stat().st_size
    assert token_set.payload["dtype"] == "uint16"
    assert token_set.tokenizer_sha256 == tokenizer_hash(tokenizer_dir)
    require_same_tokenizer(token_set, tokenizer_dir)
    whole = sum(len(sentence(number)) - 1 for number in range(100))
    last = len(sentence(99)) - 1
    assert whole - last < token_set.num_text_bytes <= whole


def test_bytes_are_equal_for_any_number_of_processes(corpus, make, monkeypatch):
    one = make(corpus, name="one", num_processes=1)
    auto = make(corpus, name="auto")
    monkeypatch.setattr("data_prep.build._UNIT_BYTES", 700)
    two = make(corpus, name="two", num_processes=2)
    assert shard_hashes(one) == shard_hashes(two) == shard_hashes(auto)
    payloads = [TokenSet(path).payload for path in (one, two, auto)]
    assert payloads[0] == payloads[1] == payloads[2]


def test_bad_lines_are_set_aside(make, tmp_path, sentence, write_lines):
    lines = [{"text": sentence(number)} for number in range(100)]
    lines[10], lines[20], lines[30] = b"{broken", {"body": "no text"}, b'{"text": "\xff"}'
    lines[40] = b""
    source = write_lines(tmp_path / "in.jsonl", lines)
    path = make(source)
    rejects = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejects] == [
        (str(source), 11),
        (str(source), 21),
        (str(source), 31),
    ]
    assert [entry["reason"].partition(" (")[0] for entry in rejects] == [
        "not JSON",
        "no field 'text'",
        "not UTF-8",
    ]
    payload = TokenSet(path).payload
    assert payload["rejects"]["num_rejects"] == payload["sources"][0]["num_rejected"] == 3
    assert payload["num_documents"] == 96
    with pytest.raises(DataError, match=r"3 of 99 lines .* first is .*in.jsonl line 11: not JSON"):
        make(source, name="strict", max_reject_fraction=0.03)
    assert not (tmp_path / "strict").exists()


def leftovers(folder):
    """Return what is left beside finished units, which are kept for the next start."""
    return [
        path.name for path in folder.iterdir() if "set" in path.name and path.name != ".set.work"
    ]


def test_failures_leave_nothing(make, corpus, tmp_path, write_lines, tokenizer_dir):
    shard = corpus / "xx_clean_0001.jsonl.gz"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(DataError, match="xx_clean_0001.jsonl.gz is a truncated gzip file"):
        make(corpus)
    blank = write_lines(tmp_path / "blank.jsonl", [b"", b" "])
    with pytest.raises(DataError, match="hold no documents"):
        make(blank)
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="hold no documents"):
        make(empty)
    short = write_lines(tmp_path / "short.jsonl", [{"text": "hi"}])
    with pytest.raises(DataError, match="less than one row of 16"):
        make(short)
    with pytest.raises(DataError, match="no_tokenizer does not exist"):
        make(short, tokenizer=tmp_path / "no_tokenizer")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not load"):
        make(short, tokenizer=tmp_path / "odd")
    assert leftovers(tmp_path) == []


def test_existing_output_is_kept(make, corpus):
    path = make(corpus)
    before = shard_hashes(path)
    with pytest.raises(DataError, match="exists already"):
        make(corpus, block_size=8)
    assert shard_hashes(path) == before


def test_empty_gzip_of_release_v1p5(make, corpus, tmp_path, sentence, write_lines):
    folder = tmp_path / "v1p5" / "data-v1p5" / "xx"
    for number, lines in ((0, range(60)), (3, range(0)), (7, range(60, 100))):
        name = f"clean_docs_v2-{number:05d}-of-00009.jsonl.gz"
        write_lines(folder / name, [{"text": sentence(line)} for line in lines])
    assert (folder / "clean_docs_v2-00003-of-00009.jsonl.gz").stat().st_size == 20
    new = TokenSet(make(tmp_path / "v1p5", language="xx", name="new"))
    old = TokenSet(make(corpus, name="old"))
    assert flat_tokens(new) == flat_tokens(old)
    assert [source["num_documents"] for source in new.payload["sources"]] == [60, 0, 40]


def test_sample_is_seeded_exact_and_in_order(make, corpus):
    def lines(path):
        token_set = TokenSet(path)
        found = [
            (piece.file, piece.line)
            for row in range(len(token_set))
            for piece in token_set.document_pieces(row)
        ]
        return list(dict.fromkeys(found))

    first = make(corpus, max_documents=30, seed=1, name="a", num_processes=1)
    again = make(corpus, max_documents=30, seed=1, name="b")
    other = make(corpus, max_documents=30, seed=2, name="c")
    assert shard_hashes(first) == shard_hashes(again)
    chosen = lines(first)
    assert chosen == sorted(chosen)
    assert len(set(chosen) & set(lines(other))) < 25
    payload = TokenSet(first).payload
    assert payload["num_documents"] == 30
    assert payload["sampling"] == {"max_documents": 30, "seed": 1, "num_candidates": 100}
    assert shard_hashes(make(corpus, max_documents=500, name="d")) == (
        shard_hashes(make(corpus, max_documents=0, name="e"))
    )


def test_sample_skips_bad_lines_but_keeps_its_size(make, tmp_path, sentence, write_lines):
    lines = [{"text": sentence(number)} for number in range(40)] + [b"{", {"text": ""}]
    path = make(write_lines(tmp_path / "in.jsonl", lines), max_documents=39)
    payload = TokenSet(path).payload
    assert payload["num_documents"] == 39
    assert payload["sampling"]["num_candidates"] == 40
    assert payload["rejects"]["num_rejects"] == 1


def test_special_tokens_in_raw_text_stay_text(make, tmp_path, tokenizer, write_lines):
    text = "He wrote </s> and <|user|> on the wall, twenty times over."
    token_set = TokenSet(make(write_lines(tmp_path / "in.jsonl", [{"text": text}] * 3)))
    flat = flat_tokens(token_set)
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in flat
    assert flat.count(tokenizer.eos_token_id) <= 3
    assert text in tokenizer.decode(flat)


def test_escapes_can_be_kept(make, tmp_path, tokenizer, write_lines):
    source = write_lines(tmp_path / "in.jsonl", [{"text": r"print('a\n') " * 10}])
    kept = TokenSet(make(source, escapes="keep", name="kept"))
    assert r"'a\n'" in tokenizer.decode(flat_tokens(kept))
    assert kept.payload["sources"][0]["num_escapes"][r"\n"] == 0
    undone = TokenSet(make(source, name="undone"))
    assert "'a\n'" in tokenizer.decode(flat_tokens(undone))


def test_impossible_options(make, corpus):
    for options, sentence in (
        ({"block_size": 0}, "--block-size must be >= 1"),
        ({"num_processes": 0}, "--num-processes must be >= 1"),
        ({"max_documents": -1}, "--max-documents must be >= 0"),
        ({"max_reject_fraction": 1.5}, "must be in 0..1"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make(corpus, **options)


def test_best_fit_cuts_only_long_documents_and_says_what_it_measured(make, corpus, tokenizer):
    cut = TokenSet(make(corpus, name="cut", block_size=64))
    fit = TokenSet(make(corpus, name="fit", block_size=64, packing="best-fit"))
    assert not list(fit.damages()) and not list(cut.damages())
    assert fit.payload["packing"]["method"] == "best_fit"
    shares = fit.payload["row_shares"]
    lens = fit.document_lens(range(len(fit)))
    assert int(lens.sum()) == fit.num_tokens
    assert shares["num_padding_tokens"] == fit.num_padding_tokens > 0
    assert shares["padding_share"] == fit.num_padding_tokens / (len(fit) * 64)
    assert shares["num_cut_documents"] == 0 and shares["num_pieces"] == 100
    assert cut.payload["row_shares"]["cut_share"] > 0.2
    assert cut.payload["row_shares"]["padding_share"] == 0 == cut.num_padding_tokens
    for row in (0, len(fit) - 1):
        ids = fit.read([row])[0]
        place = 0
        for piece in fit.document_pieces(row):
            text = tokenizer.decode(ids[place : place + piece.num_tokens])
            number = piece.line - 1 + 60 * piece.file.endswith("0001.jsonl.gz")
            assert text.startswith(f"In year {number} the river") and text.endswith("</s>")
            place += piece.num_tokens
        assert set(ids[place:].tolist()) <= {tokenizer.pad_token_id}
    batch = next(open_stream(fit, seed=1, global_batch_size=4))
    assert torch.equal(batch.doc_lens, fit.document_lens(batch.row_ids))
    assert next(open_stream(cut, seed=1, global_batch_size=4)).doc_lens is None
    asked = next(open_stream(cut, seed=1, global_batch_size=4, documents=True))
    assert asked.doc_lens.sum(1).tolist() == [64] * 4
