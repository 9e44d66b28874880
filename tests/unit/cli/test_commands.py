"""Help with examples for every command; wrong options end with 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forgetscale.cli import main
from tests.distributed.harness import ROOT

COMMANDS = ("quickstart", "check", "calibrate", "train", "evaluate", "export", "report")


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples(capsys, command: str):
    text = help_of(capsys, command)
    assert f"usage: forgetscale {command}" in text
    examples = text.split("examples:\n", 1)[1]
    assert f"forgetscale {command}" in examples
    description = text.split("\n\n")[1].strip()
    assert len(description) > 20


def test_help_lists_every_command_with_exit_codes(capsys):
    text = help_of(capsys)
    assert all(f"\n    {command}" in text for command in COMMANDS)
    assert "exit codes: 0 done; 2 recipe or input wrong; 75 stopped early" in text
    assert "examples:" in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "--confg", "x"], ["calibrate", "--config", "x.yaml"]],
)
def test_wrong_command_lines(capsys, arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: forgetscale" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check", "export"])
def test_missing_recipe(capsys, command: str, tmp_path):
    assert main([command, "--config", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("forgetscale: error: recipe ") and error.count("\n") == 1


def test_only_one_rank_reports_a_wrong_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == ""


def test_the_launchers_option_is_accepted(capsys, tmp_path):
    for option in ("--local_rank=0", "--local-rank=0"):
        assert main([option, "train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["forgetscale", "data_prep"])
def test_module_entry(name: str):
    done = subprocess.run(
        [sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "usage:" in done.stdout and "--help" in done.stdout
