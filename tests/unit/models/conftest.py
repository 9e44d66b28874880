"""Tiny model folders."""

import pytest
import torch

from tests.distributed import tiny


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("models") / "half", dtype=torch.bfloat16)
