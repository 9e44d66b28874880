"""One model between all ranks writes what a whole copy writes; ranks that do not come are named."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from forgetscale.cli.main import main
from forgetscale.cli.stages import free_port
from forgetscale.generation.status import read_status
from tests.distributed.harness import Outcome, RankServer
from tests.unit.generation.talk import make_talker

NUM_IDS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    make_talker(root / "model")
    return root


def write_recipe(folder: Path, name: str, kind: str, **engine: object) -> Path:
    dialogue = {
        "kind": "pre_query",
        "turns": 2,
        "user": {"temperature": 1.2, "top_p": 0.98, "max_new_tokens": 12},
        "assistant": {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 12},
    }
    generate = {
        "output_dir": str(folder / name),
        "num_dialogues": NUM_IDS // 2,
        "max_tokens": 80,
        "shard_size": 8,
        "over_generation": 2.0,
        "journal_rows": 1,
        "soft_targets": 3,
        "min_accepted_fraction": 0.0,
        "engine": {"kind": kind, "num_slots": 4} | engine,
        "filters": {"duplicates": "none"},
        "dialogue": dialogue,
    }
    values = {"model": {"path": str(folder / "model"), "dtype": "float32"}, "generate": generate}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows_of(folder: Path) -> list[dict]:
    files = sorted((folder / "shards").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict]:
    """Rows of the engine that holds a whole copy."""
    assert main(["generate", "--config", str(write_recipe(folder, "whole", "transformers"))]) == 0
    return rows_of(folder / "whole")


def generate(ranks: RankServer, path: Path, size: int, **options: object) -> Outcome:
    return ranks.run(
        "cli:run", size, arguments=["generate", "--config", str(path)], join=False, **options
    )


def launcher() -> dict[str, str]:
    """Return what a launcher says of the meeting point."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.mark.parametrize("size", [1, 2])
def test_the_text_is_that_of_a_whole_copy(
    size: int, whole: list[dict], folder: Path, ranks: RankServer
) -> None:
    path = write_recipe(folder, f"ranks-{size}", "zero3")
    outcome = generate(ranks, path, size, env=launcher())
    assert outcome.codes == [0] * size, outcome.logs
    assert len(whole) == NUM_IDS and rows_of(folder / f"ranks-{size}") == whole
    assert read_status(folder / f"ranks-{size}").is_published
    assert all("error" not in log for log in outcome.logs[1:])


def test_a_rank_that_does_not_come_is_named_and_nothing_is_lost(
    whole: list[dict], folder: Path, ranks: RankServer
) -> None:
    path = write_recipe(folder, "late", "zero3", late_seconds=2.0)
    outcome = ranks.run(
        "generating:late",
        2,
        config=str(path),
        steps=30,
        seconds=20.0,
        join=False,
        env=launcher(),
    )
    assert all(outcome.codes), outcome.logs
    assert "rank 0 waits in call" in outcome.logs[0]
    assert "rank 1 did not arrive" in outcome.logs[0]
    before = {path.name: path.read_bytes() for path in (folder / "late/shards").iterdir()}
    again = generate(ranks, path, 2, env=launcher())
    assert again.codes == [0, 0], again.logs
    assert rows_of(folder / "late") == whole
    for name, data in before.items():
        assert (folder / "late/shards" / name).read_bytes() == data


def test_a_request_to_stop_on_any_rank_ends_all_and_another_number_goes_on(
    whole: list[dict], folder: Path, ranks: RankServer
) -> None:
    path = write_recipe(folder, "stopping", "zero3")
    outcome = ranks.run(
        "generating:stopping",
        2,
        config=str(path),
        steps=40,
        join=False,
        env=launcher(),
    )
    assert outcome.codes == [75, 75], outcome.logs
    assert not (folder / "stopping/dialogues").exists()
    assert generate(ranks, path, 1, env=launcher()).codes == [0]
    assert rows_of(folder / "stopping") == whole


def test_it_needs_a_launcher(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    path = write_recipe(folder, "alone", "zero3")
    assert main(["generate", "--config", str(path)]) == 2
    assert "RANK is not set; start it with deepspeed" in capsys.readouterr().err
    assert not (folder / "alone").exists()
    assert main(["generate", "--config", str(path), "--print-engine"]) == 0
    assert capsys.readouterr().out == "zero3\n"
