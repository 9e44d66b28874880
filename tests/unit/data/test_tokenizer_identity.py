"""Hash of the tokenizer-defining files, and refusal of another tokenizer."""

import hashlib

import numpy as np
import pytest

from forgetscale.data import TokenSet, require_same_tokenizer, tokenizer_hash, write_token_set
from forgetscale.errors import DataError


def make(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_hash_is_that_of_the_first_defining_file(tmp_path):
    folder = make(tmp_path / "t", tokenizer__json="{}", tokenizer__model="m", chat__jinja="x")
    assert tokenizer_hash(folder) == hashlib.sha256(b"{}").hexdigest()
    assert tokenizer_hash(make(tmp_path / "u", tokenizer__model="m")) == (
        hashlib.sha256(b"m").hexdigest()
    )
    assert tokenizer_hash(make(tmp_path / "v", vocab__json="a", merges__txt="b")) == (
        hashlib.sha256(b"ab").hexdigest()
    )


def test_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        tokenizer_hash(tmp_path / "none")
    with pytest.raises(DataError, match="holds no tokenizer: expected tokenizer.json"):
        tokenizer_hash(make(tmp_path / "t", vocab__json="a"))


def test_other_tokenizer_is_refused(tmp_path):
    mine = make(tmp_path / "mine", tokenizer__json="{}")
    other = make(tmp_path / "other", tokenizer__json="{ }")
    write_token_set(
        tmp_path / "set",
        np.zeros((1, 2), int),
        vocab_size=2,
        tokenizer_sha256=tokenizer_hash(mine),
    )
    token_set = TokenSet(tmp_path / "set")
    require_same_tokenizer(token_set, mine)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        require_same_tokenizer(token_set, other)
