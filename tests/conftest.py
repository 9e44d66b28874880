"""Checks of tensor shapes in the pure packages, and the server that runs ranks."""

from __future__ import annotations

import os
import threading

from jaxtyping import install_import_hook

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports them: every call of a pure function checks shapes and types.
install_import_hook(["forgetscale.ops", "forgetscale.masks"], "beartype.beartype")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.distributed.harness import RankServer  # noqa: E402
from tests.distributed.runs import Runs  # noqa: E402

torch.set_num_threads(1)
# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def one_model_at_a_time():
    """Tests of evaluation run ranks as threads, and ``transformers`` patches itself while it loads.

    Two loads at once leave ``tie_weights`` patched away for good, in this process and all tests
    after.
    """
    from transformers import AutoModelForCausalLM

    lock = threading.Lock()
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        with lock:
            return load(*args, **kwargs)

    AutoModelForCausalLM.from_pretrained = from_pretrained
    yield
    AutoModelForCausalLM.from_pretrained = load


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """Run jobs on real processes."""
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def runs(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs of the tiny world."""
    return Runs(ranks, tmp_path_factory.mktemp("worlds"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/losses.txt")
