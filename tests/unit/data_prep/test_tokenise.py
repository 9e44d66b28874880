"""The direct path to the Rust tokenizer gives the ids of the Python class."""

import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.readers import Line
from data_prep.records import undo_escapes
from data_prep.tokenise import TokenizeOptions, Unit, UnitTokenizer, load_tokenizer, plain_backend

TEXTS = ["", " ", "In year 3 the river rose.", "</s> a <|user|>", "ሰላም नमस्ते\n\t🙂", "a" * 5000]


@pytest.mark.parametrize("special_as_text", [True, False])
def test_same_ids_with_and_without_the_direct_path(tokenizer_dir, special_as_text):
    options = TokenizeOptions(tokenizer_dir, False, None, True, None)
    worker = UnitTokenizer(options)
    assert worker._backend is not None
    numbered = list(enumerate(TEXTS))
    direct = worker._encode(numbered, special_as_text=special_as_text)
    worker._backend = None
    assert worker._encode(numbered, special_as_text=special_as_text) == direct
    assert (4 in direct[3]) is not special_as_text, "<|user|> has id 4"


def test_classes_with_their_own_encoding_are_called(tokenizer_dir):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    assert plain_backend(load_tokenizer(tokenizer_dir)) is not None
    assert plain_backend(Own.from_pretrained(tokenizer_dir)) is None


def test_counts_of_a_unit(tokenizer_dir):
    worker = UnitTokenizer(TokenizeOptions(tokenizer_dir, False, 1, True, 4))
    lines = [b'{"text": "one\\\\ntwo three four five"}', b'{"text": ""}', b"{", b'{"text": "x"}']
    result = worker(Unit(2, [Line(number, data) for number, data in enumerate(lines, start=7)]))
    assert result.file_index == 2
    assert result.doc_lines.tolist() == [7, 10]
    assert result.doc_lens.tolist() == [5, 2]
    assert result.tokens[[4, 6]].tolist() == [1, 1]
    assert [line for line, _ in result.rejects] == [9]
    assert result.escapes == undo_escapes(r"\n")[1]
    assert result.counts == {"chat_documents": 0, "truncated_documents": 1, "empty_documents": 1}
    assert result.doc_bytes[1] == 1
