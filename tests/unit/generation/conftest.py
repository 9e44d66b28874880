"""A model that learnt to talk a little, and the tokenizers of eight families."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data_prep.families import FAMILIES, make_tokenizer
from tests.unit.generation.talk import make_talker


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_tokenizer(root / name, family) for name, family in FAMILIES.items()}


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")
