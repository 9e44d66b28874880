"""Commands as users run them: exit codes, one sentence, a quiet terminal, nothing half-written."""

from __future__ import annotations

import os
import shutil
import socket

import pytest

from forgetscale.zero3.preflight import find_free_port
from tests.distributed import tiny
from tests.distributed.harness import Outcome, RankServer
from tests.distributed.runs import SSU, Runs, change, load_weights, read_lines


def write(runs: Runs, name: str, changes: dict | None = None, method: dict | None = None):
    recipe = runs.recipe(name, method or {"kind": "sft"}, changes)
    return tiny.write_recipe(runs.world() / f"{name}.yaml", recipe), runs.world() / name


def errors(outcome: Outcome) -> list[str]:
    lines = [line for log in outcome.logs for line in log.splitlines()]
    return [line for line in lines if line.startswith("forgetscale: error")]


def run(ranks: RankServer, *arguments: object, size: int = 1) -> Outcome:
    return ranks.run("cli:run", size, arguments=[str(part) for part in arguments])


@pytest.mark.parametrize("size", [1, 2])
def test_train_says_what_it_does_and_nothing_else(ranks: RankServer, runs: Runs, size: int):
    path, folder = write(runs, f"quiet-{size}", method=SSU)
    outcome = run(ranks, "train", "--config", path, size=size)
    assert outcome.codes == [0] * size
    lines = outcome.logs[0].splitlines()
    assert lines[0] == f"run quiet-{size}: ssu on {size} ranks -> {folder}"
    assert lines[-1] == "done"
    known = ("run ", "calibrate ", "model: ", "train ", "exported ", "done")
    assert all(line.startswith(known) for line in lines), lines
    assert outcome.logs[1:] == [""] * (size - 1), "only rank 0 talks"
    log = (folder / "log.txt").read_text()
    warnings = [line for line in log.splitlines() if "Warning: " in line]
    assert len(warnings) == len(set(warnings)), "a warning is logged at every step"
    for name in ("recipe.yaml", "metrics.jsonl", "plan/plan.safetensors", "export/config.json"):
        assert (folder / name).is_file(), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim.lr": -1}, "optim: lr must be > 0, got -1"),
        ({"model.pth": "x"}, "model.pth is not a recipe field"),
        ({"deepspeed": "none.json"}, "deepspeed: none.json cannot be read"),
        ({"method": {"kind": "ssu"}}, "score paper needs source data"),
    ],
)
def test_a_wrong_recipe(ranks: RankServer, runs: Runs, size: int, changes: dict, sentence: str):
    path, folder = write(runs, f"wrong-{size}-{len(sentence)}", changes)
    outcome = run(ranks, "train", "--config", path, size=size)
    assert outcome.codes == [2] * size
    (message,) = errors(outcome)
    assert sentence in message
    assert not folder.exists()
    assert "Traceback" not in "".join(outcome.logs)


def damaged_world(runs: Runs, tmp_path, how: str) -> dict:
    """Return changes of a recipe whose input is bad in some way."""
    if how == "no model folder":
        return {"model.path": str(tmp_path / "none")}
    if how == "no data folder":
        return {"data.path": str(tmp_path / "none")}
    if how == "empty data folder":
        (tmp_path / "empty").mkdir()
        return {"data.path": str(tmp_path / "empty")}
    if how == "a plan folder as data":
        return {"data.path": str(runs.get("ssu", 1).folder / "plan")}
    source = "model" if "model" in how or "weights" in how else "data"
    copy = tmp_path / source
    shutil.copytree(runs.world() / source, copy)
    if how == "model without safetensors":
        (copy / "model.safetensors").unlink()
    elif how == "cut weights":
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "model without config":
        (copy / "config.json").unlink()
    elif how == "model of another shape":
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace('"vocab_size": 67', '"vocab_size": 68'))
    elif how == "data without manifest":
        (copy / "manifest.json").unlink()
    elif how == "changed data":
        path = next(copy.glob("*.arrow"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(bytes(data))
    elif how == "data of another tokenizer":
        shutil.rmtree(copy)
        other = tiny.make_model(tmp_path / "other")
        text = (other / "tokenizer.json").read_text().replace('"w9"', '"other"')
        (other / "tokenizer.json").write_text(text)
        tiny.make_set(copy, other)
    return {f"{source}.path": str(copy)}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no model folder", "none"),
        ("model without safetensors", "holds neither model.safetensors nor"),
        ("cut weights", "model.safetensors"),
        ("model without config", "has no config.json"),
        ("model of another shape", "but config.json asks for"),
        ("no data folder", "none does not exist"),
        ("empty data folder", "has no manifest.json"),
        ("data without manifest", "has no manifest.json"),
        ("a plan folder as data", "is a freeze_plan artefact, expected token_set"),
        ("changed data", ".arrow"),
        ("data of another tokenizer", "tokenizer"),
    ],
)
def test_bad_input(ranks: RankServer, runs: Runs, tmp_path, how: str, sentence: str):
    path, folder = write(runs, f"bad-{how.replace(' ', '-')}", damaged_world(runs, tmp_path, how))
    outcome = run(ranks, "train", "--config", path, size=2)
    assert outcome.codes == [2, 2], outcome.logs[0][-2000:]
    assert not outcome.late
    found = errors(outcome)
    assert 1 <= len(found) <= 2 and all(sentence in line for line in found), found
    assert "Traceback" not in "".join(outcome.logs)
    for name in ("checkpoints", "export", "plan"):
        assert not (folder / name).exists(), name


class TestCalibrate:
    def test_plan_on_its_own(self, ranks: RankServer, runs: Runs, tmp_path):
        path, folder = write(runs, "calibrate", method=SSU)
        outcome = run(ranks, "calibrate", "--config", path, "--output", tmp_path / "p", size=2)
        assert outcome.codes == [0, 0], outcome.logs[0]
        expected = (runs.get("ssu", 1).folder / "plan" / "plan.safetensors").read_bytes()
        assert (tmp_path / "p" / "plan.safetensors").read_bytes() == expected
        assert not folder.exists()

    def test_nothing_to_plan(self, ranks: RankServer, runs: Runs, tmp_path):
        path, _ = write(runs, "calibrate-sft")
        outcome = run(ranks, "calibrate", "--config", path, "--output", tmp_path / "p")
        assert outcome.codes == [2]
        assert "sft freezes nothing for good" in errors(outcome)[0]
        assert not (tmp_path / "p").exists()


class TestCheck:
    @pytest.mark.parametrize("size", [1, 2])
    def test_mock_step_writes_nothing(self, ranks: RankServer, runs: Runs, size: int):
        path, folder = write(runs, f"check-{size}", method=SSU)
        before = sorted(os.listdir(runs.world()))
        outcome = run(ranks, "check", "--config", path, size=size)
        assert outcome.codes == [0] * size, outcome.logs[0]
        for part in ("frozen_fraction: 0.5", "memory per rank", "mock step", "target tokens/s"):
            assert part in outcome.logs[0]
        assert not folder.exists()
        assert sorted(os.listdir(runs.world())) == before

    def test_a_wrong_recipe(self, ranks: RankServer, runs: Runs):
        path, _ = write(runs, "check-wrong", {"method": {"kind": "ssu", "frozen_fraction": 2}})
        outcome = run(ranks, "check", "--config", path)
        assert outcome.codes == [2]


class TestPreflight:
    """The nodes of a job look at each other before it starts."""

    def look(self, ranks: RankServer, shared: list, processes: list[int]) -> Outcome:
        arguments = {
            "shared": [str(folder) for folder in shared],
            "processes": processes,
            "port": find_free_port(23000),
        }
        return ranks.run("cli:look_at_nodes", 2, join=False, **arguments)

    def test_a_folder_that_is_not_shared(self, ranks: RankServer, tmp_path):
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        outcome = self.look(ranks, folders, [1, 1])
        assert outcome.codes == [2, 2], outcome.logs
        (message,) = errors(outcome)
        assert f"n2: {folders[1]} is not the same folder as on the first node" in message
        assert message.endswith("mend or exclude these nodes.")

    def test_uneven_slots(self, ranks: RankServer, tmp_path):
        outcome = self.look(ranks, [tmp_path, tmp_path], [8, 4])
        assert outcome.codes == [2, 2], outcome.logs
        assert "n2 starts 4 processes, n1 8; mend or exclude" in errors(outcome)[0]


def test_a_port_that_is_taken(ranks: RankServer, runs: Runs):
    path, folder = write(runs, "port-taken")
    with socket.create_server(("", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        arguments = ["train", "--config", str(path)]
        outcome = ranks.run("cli:run", 1, join=False, env=place, arguments=arguments)
    assert outcome.codes == [1], outcome.logs
    (message,) = errors(outcome)
    assert f"cannot join the 1 ranks of the run at 127.0.0.1:{place['MASTER_PORT']} (" in message
    assert "address already in use" in message and "--master_port" in message
    assert "Traceback" not in outcome.logs[0]
    assert not (folder / "recipe.yaml").exists()


def test_other_failures_give_1(ranks: RankServer, runs: Runs, tmp_path):
    path, folder = write(runs, "no-checkpoint")
    outcome = run(ranks, "export", "--config", path, "--output", tmp_path / "x")
    assert outcome.codes == [1]
    assert "holds no good checkpoint" in errors(outcome)[0]


def test_export_command(ranks: RankServer, runs: Runs, tmp_path):
    made = runs.get("ssu", 1)
    outcome = run(
        ranks, "export", "--config", made.folder / "recipe.yaml", "--output", tmp_path / "x"
    )
    assert outcome.codes == [0], outcome.logs[0]
    found = load_weights(tmp_path / "x")
    assert all(bool((found[name] == weight).all()) for name, weight in made.export.items())


def test_stopped_early_gives_75_and_again_0(ranks: RankServer, runs: Runs):
    path, folder = write(runs, "early", method=SSU)
    arguments = ["train", "--config", str(path)]
    outcome = ranks.run("crash:train_for_and_signal", 2, arguments=arguments, step=3)
    assert outcome.codes == [75, 75]
    (message,) = [line for log in outcome.logs for line in log.splitlines() if "stopped" in line]
    assert "stopped on request after step 3 of 6" in message
    assert (folder / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    assert run(ranks, *arguments, size=2).codes == [0, 0]
    assert (folder / "export" / "manifest.json").is_file()


def test_disk_full_while_logging_stops_all_ranks(ranks: RankServer, runs: Runs):
    path, folder = write(runs, "full-metrics", method=SSU)
    arguments = ["train", "--config", str(path)]
    outcome = ranks.run("crash:full_disk_for_metrics", 2, arguments=arguments, step=3)
    assert outcome.codes[0] == 1 and outcome.codes[1] not in (0, 75)
    assert not outcome.late
    assert "forgetscale: error: metrics.jsonl: No space left on device" in outcome.logs[0]
    assert "Traceback" not in "".join(outcome.logs)
    assert run(ranks, *arguments, size=2).codes == [0, 0]
    assert [line["loss"] for line in read_lines(folder / "metrics.jsonl")] == (
        runs.get("ssu", 2).losses
    )


def test_overrides_reach_the_run(ranks: RankServer, runs: Runs, tmp_path):
    path, folder = write(runs, "override")
    other = runs.world() / "override-2"
    recipe = change({}, {"run.output_dir": str(other), "train.num_steps": 1})
    sets = ["--set", f"run.output_dir={other}", "--set", "train.num_steps=1"]
    outcome = run(ranks, "train", "--config", path, *sets)
    assert outcome.codes == [0] and recipe["train"]["num_steps"] == 1
    assert len((other / "metrics.jsonl").read_text().splitlines()) == 1
    assert not folder.exists()
