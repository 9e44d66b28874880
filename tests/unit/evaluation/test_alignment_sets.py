"""Which rows of an alignment set refuse, and what is said of a set without any."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forgetscale.config import CalibrationConfig
from forgetscale.data import TokenSet, tokenizer_hash, write_token_set
from forgetscale.errors import DataError
from forgetscale.evaluation.alignment_sets import count_refusals, require_refusals

WORDS = "<pad> <end> <unk> <user> <bot> i cannot help sure here how to do it Sorry no".split()
ID = {word: number for number, word in enumerate(WORDS)}
OPENINGS = ["I cannot", "sorry"]


@pytest.fixture
def folder(tmp_path):
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path, tokenizer


def make(folder, name: str, texts: list[str], supervised: bool) -> TokenSet:
    """Write one conversation a row; answers stand after ``<bot>``."""
    path, _ = folder
    width = max(len(text.split()) for text in texts)
    ids = np.full((len(texts), width), ID["<end>"], dtype=np.int64)
    mask = np.zeros_like(ids, dtype=bool)
    for row, text in enumerate(texts):
        words = text.split()
        ids[row, : len(words)] = [ID[word] for word in words]
        mask[row, words.index("<bot>") + 1 : len(words)] = True
    more = {"supervised": mask, "doc_lens": np.full(len(texts), width)} if supervised else {}
    write_token_set(
        path / name,
        ids,
        vocab_size=len(WORDS),
        tokenizer_sha256=tokenizer_hash(path / "model"),
        **more,
    )
    return TokenSet(path / name)


REFUSES = "<user> how to do it <bot> i cannot help <end>"
OTHERWISE = "<user> i cannot do it <bot> sure here to help <end>"
IN_THE_MIDDLE = "<user> how to do it <bot> no i cannot help <end>"


@pytest.mark.parametrize(
    ("supervised", "texts", "expected"),
    [
        (True, [REFUSES, OTHERWISE, IN_THE_MIDDLE], 1),
        (True, ["<user> no <bot> Sorry no <end>"] * 2, 2),
        # Without supervision the user's words start a stretch as well.
        (False, [REFUSES, OTHERWISE, IN_THE_MIDDLE], 2),
        (False, [IN_THE_MIDDLE], 0),
    ],
)
def test_an_answer_that_opens_with_one(folder, supervised: bool, texts, expected: int):
    found = count_refusals(make(folder, "set", texts, supervised), 500, folder[1], OPENINGS)
    assert found == (len(texts), expected)


def test_only_rows_that_are_used_count(folder):
    token_set = make(folder, "set", [OTHERWISE, REFUSES, OTHERWISE, REFUSES], True)
    assert count_refusals(token_set, 2, folder[1], OPENINGS) == (2, 0)


def test_none_is_turned_down_with_counts(folder):
    token_set = make(folder, "set", [OTHERWISE, IN_THE_MIDDLE], True)
    source = CalibrationConfig(path=folder[0] / "set", num_blocks=2)
    sentence = re.escape(f"x.path: 0 of the 2 rows used of {folder[0] / 'set'} hold an answer that")
    with pytest.raises(DataError, match=sentence + ".*2 openings looked for, such as 'I cannot'"):
        require_refusals("x", source, token_set, folder[1], OPENINGS)
    found = require_refusals("x", source, token_set, folder[1], ["no"])
    assert found.refusing == 1
