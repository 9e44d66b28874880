"""The run folder: one recipe's run, and metrics that fit the checkpoint."""

from __future__ import annotations

import json
import os
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from forgetscale.config import Recipe, validate_recipe
from forgetscale.engine import open_run_folder
from forgetscale.engine.folder import first_difference
from forgetscale.engine.metrics import MetricsLog, RunLog, drop_lines_after, memory_bytes
from forgetscale.engine.run import num_train_steps
from forgetscale.errors import ConfigError
from forgetscale.zero3 import StopRequest

DEEPSPEED = Path(__file__).resolve().parents[3] / "ds_configs" / "zero3.json"


def recipe_of(folder, **changes) -> Recipe:
    values = {
        "run": {"name": "a", "output_dir": str(folder)},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "method": {"kind": "sft"},
        "optim": {},
        "train": {"num_steps": 4},
        "deepspeed": str(DEEPSPEED),
    }
    for path, value in changes.items():
        section, name = path.split("__")
        values[section][name] = value
    return validate_recipe(values)


class TestFolder:
    def test_fresh_then_again(self, tmp_path):
        recipe = recipe_of(tmp_path / "run")
        assert open_run_folder(recipe) is False
        assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["name"] == "a"
        assert json.loads((tmp_path / "run" / "made_by.json").read_text())["versions"]["torch"]
        assert open_run_folder(recipe) is True

    @pytest.mark.parametrize(
        ("changes", "phrase"),
        [
            ({"optim__lr": 1e-3}, "optim.lr is 5e-05 there and 0.001 here"),
            ({"train__num_steps": 5}, "train.num_steps is 4 there and 5 here"),
            ({"run__seed": 7}, "run.seed is 42 there and 7 here"),
            ({"data__path": "other"}, "data.path is 'd' there and 'other' here"),
            ({"train__global_batch_size": 1}, "train.global_batch_size is 32 there and 1 here"),
        ],
    )
    def test_another_recipe(self, tmp_path, changes: dict, phrase: str):
        folder = tmp_path / "run"
        open_run_folder(recipe_of(folder))
        (folder / "metrics.jsonl").write_text("")
        with pytest.raises(ConfigError) as caught:
            open_run_folder(recipe_of(folder, **changes))
        assert f"holds another recipe's run ({phrase})" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"run__name": "b"},
            {"train__checkpoint_every_steps": 9},
            {"train__micro_batch_size": 1},
            {"train__keep_checkpoints": 5},
            {"train__audit_every_steps": 5},
            {"train__export": False},
        ],
    )
    def test_what_may_change_between_starts(self, tmp_path, changes: dict):
        open_run_folder(recipe_of(tmp_path / "run"))
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        assert open_run_folder(recipe_of(tmp_path / "run", **changes)) is True

    def test_a_start_that_failed_before_any_work_may_be_corrected(self, tmp_path):
        folder = tmp_path / "run"
        open_run_folder(recipe_of(folder, data__path="typo"))
        (folder / "log.txt").write_text("")
        assert open_run_folder(recipe_of(folder, data__path="right")) is False
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["path"] == "right"

    def test_no_run_folder(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(ConfigError, match="holds 'notes.txt' but no recipe.yaml"):
            open_run_folder(recipe_of(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_difference_names_new_and_lost_fields(self):
        assert first_difference({"a": 1}, {"a": 1}) is None
        assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == (
            "a.c is None there and 2 here"
        )
        assert first_difference({"a": 1, "z": 2}, {"a": 1}) == "z is 2 there and None here"


class TestMetrics:
    def test_lines_after_the_checkpoint_are_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
        drop_lines_after(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
        drop_lines_after(tmp_path / "none.jsonl", 2)
        assert not (tmp_path / "none.jsonl").exists()

    def test_log_writes_lines_and_curve(self, tmp_path):
        log = MetricsLog(tmp_path, visible=True, step=0)
        log.step({"step": 1, "loss": 2.5})
        log.evaluation(1, 10, [{"task": "recall", "metric": "accuracy", "value": 0.5}])
        log.close()
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}
        curve = json.loads((tmp_path / "results" / "curve.jsonl").read_text())
        assert (curve["step"], curve["target_tokens"]) == (1, 10)
        assert list((tmp_path / "tensorboard").glob("events.*"))

    def test_other_ranks_write_nothing(self, tmp_path, capsys):
        log = MetricsLog(tmp_path, visible=False, step=0)
        log.step({"step": 1})
        log.evaluation(1, 10, [])
        log.close()
        RunLog(tmp_path / "log.txt", visible=False)("hello")
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr() == ("", "")

    def test_run_log(self, tmp_path, capsys):
        RunLog(tmp_path / "log.txt", visible=True)("hello")
        assert (tmp_path / "log.txt").read_text().endswith(" hello\n")
        assert capsys.readouterr().err == "hello\n"

    def test_memory_is_in_bytes(self):
        assert 50e6 < memory_bytes() < 1e12


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_only_noted(number: int):
    before = signal.getsignal(number)
    stop = StopRequest()
    stop.listen()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    stop.close()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("tokens", "rows", "targets", "steps"),
    [
        (1, 4, 8, 1),
        (32, 4, 8, 1),
        (33, 4, 8, 2),
        (30, 4, Fraction(15, 2), 1),
        (31, 4, Fraction(15, 2), 2),
    ],
)
def test_steps_from_target_tokens(tmp_path, tokens: int, rows: int, targets, steps: int):
    recipe = recipe_of(
        tmp_path,
        train__num_steps=None,
        train__num_target_tokens=tokens,
        train__global_batch_size=rows,
    )
    assert num_train_steps(recipe, targets) == steps
