"""One tiny world, built once for all tests of this folder."""

import json

import pytest

from forgetscale.testbed import TINY, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("testbed") / "world", seed=7, size=TINY)


@pytest.fixture(scope="session")
def read_lines():
    def read(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture(scope="session")
def tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "tokenizer", local_files_only=True)
