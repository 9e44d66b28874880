from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cluster.long_runs import NUM_STEPS, write_recipe
from tests.cluster.slurm import Cluster, why_not
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import load_weights


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes on this machine."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no SLURM: {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory):
    """A model, data and DeepSpeed JSON to train on."""
    return tiny.make_world(tmp_path_factory.mktemp("cluster-world"))


@pytest.fixture(scope="session")
def undisturbed(ranks: RankServer, tiny_world: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Processes, steps -> final weights of the same recipe when nobody disturbs it."""

    @cache
    def weights(size: int, steps: int = NUM_STEPS) -> dict[str, torch.Tensor]:
        changes = {"train.num_steps": steps}
        path, folder = write_recipe(tiny_world, f"undisturbed-{size}-{steps}", changes)
        ranks.must("cli:run", size, arguments=["train", "--config", str(path)])
        return load_weights(folder / "export")

    return weights
