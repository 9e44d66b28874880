from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, why_not
from tests.distributed import tiny


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
