"""Generation over two SLURM nodes: independent workers, and one model between the nodes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from forgetscale.cli.main import main
from tests.cluster.slurm import Cluster
from tests.unit.generation.fake import sealed_bytes
from tests.unit.generation.talk import make_talker


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster-generation")
    make_talker(root / "model")
    return root


def write_recipe(folder: Path, name: str, kind: str) -> Path:
    sampling = {"temperature": 1.1, "top_p": 0.98, "max_new_tokens": 16}
    generate = {
        "output_dir": str(folder / name),
        "num_dialogues": 24,
        "max_tokens": 64,
        "shard_size": 4,
        "over_generation": 1.5,
        "min_accepted_fraction": 0.0,
        "filters": {"duplicates": "none"},
        "engine": {"kind": kind, "num_slots": 4},
        "dialogue": {"kind": "pre_query", "user": sampling, "assistant": sampling},
    }
    values = {"model": {"path": str(folder / "model"), "dtype": "float32"}, "generate": generate}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Run folder of one process without SLURM."""
    assert main(["generate", "--config", str(write_recipe(folder, "alone", "transformers"))]) == 0
    return folder / "alone"


def rows(folder: Path) -> list[dict]:
    files = sorted((folder / "shards").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.timeout(300)
def test_workers_on_two_nodes_write_the_bytes_of_one_process(
    cluster: Cluster, folder: Path, alone: Path
) -> None:
    path = write_recipe(folder, "workers", "transformers")
    (job,) = cluster.submit(folder, "--nodes=2", "generate", "--config", str(path))
    state = cluster.wait(job)
    log = (folder / f"slurm-{job}.out").read_text()
    assert (state.name, state.exit_code) == ("COMPLETED", 0), log
    assert log.count("loads") == 2  # one worker on each node
    assert sealed_bytes(folder / "workers") == sealed_bytes(alone)
    (found,) = (folder / "workers/dialogues").glob("*.parquet")
    (expected,) = (alone / "dialogues").glob("*.parquet")
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.timeout(300)
@pytest.mark.long
def test_one_model_between_two_nodes_writes_the_same_text(
    cluster: Cluster, folder: Path, alone: Path
) -> None:
    path = write_recipe(folder, "together", "zero3")
    options = ("--nodes=2", "--no-preflight")
    (job,) = cluster.submit(folder, *options, "generate", "--config", str(path))
    state = cluster.wait(job)
    log = (folder / f"slurm-{job}.out").read_text()
    assert (state.name, state.exit_code) == ("COMPLETED", 0), log
    assert rows(folder / "together") == rows(alone)
    assert len(list((folder / "together/workers").glob("*.jsonl"))) == 1
