"""Options of quickstart and the recipes it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetscale.cli.main import main
from forgetscale.cli.quickstart import seed_list
from forgetscale.cli.stages import StageError, Terminal, forgetscale_command, run_stage
from forgetscale.cli.studies import STUDIES, Inputs
from forgetscale.config import recipe_dict, validate_recipe
from forgetscale.errors import ConfigError
from forgetscale.evaluation.report.runs import method_label


def test_one_small_number_counts_seeds_and_a_list_names_them() -> None:
    assert seed_list([3]) == [1, 2, 3]
    assert seed_list([10]) == list(range(1, 11))
    assert seed_list([4, 2, 4]) == [4, 2]
    with pytest.raises(ConfigError, match="must be >= 1, got 0"):
        seed_list([0])


@pytest.mark.parametrize(
    ("study", "name"), [(study, name) for study in STUDIES for name in STUDIES[study].methods]
)
def test_every_offered_method_makes_a_valid_recipe(study: str, name: str) -> None:
    inputs = Inputs(
        *map(Path, ("c", "a", "r", "t", "f")),
        seed=1,
        task_share=lambda data: 0.3,
        mean_gate=lambda: 0.4,
    )
    sections = STUDIES[study].sections(name, inputs)
    recipe = validate_recipe(
        {
            "run": {"name": "x", "output_dir": "runs/x"},
            "model": {"path": "m"},
            "data": {"path": "d"},
            "train": {"num_steps": 1},
            "deepspeed": "ds.json",
        }
        | sections
        | {"evaluate": {"tasks": ["recall"], "task_dir": "t"} | sections.get("evaluate", {})}
    )
    if study == "language":
        # A run without a label is called by its method section, as the quick start calls it.
        assert method_label(recipe_dict(recipe)["method"]) == name


def test_a_wrong_method_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    code = main(["quickstart", "--methods", "sft", "ssu/papr", "--output", str(output)])
    assert code == 2
    assert "'ssu/papr' is not one of" in capsys.readouterr().err
    assert not output.exists()


def test_a_failed_stage_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "stage.txt"
    command = ["bash", "-c", "echo first; echo the reason >&2; exit 3"]
    with pytest.raises(StageError, match=r"work failed with exit code 3;[^$]*the reason"):
        run_stage("work", command, log, Terminal.open(), threads=1)
    assert log.read_text().splitlines() == ["first", "the reason"]


def test_several_ranks_go_through_the_deepspeed_launcher() -> None:
    assert forgetscale_command(["train"], 1)[1:] == ["-m", "forgetscale", "train"]
    command = forgetscale_command(["train", "--config", "a.yaml"], 2)
    assert command[1].endswith("/deepspeed")
    assert command[2:4] == ["--num_accelerators", "2"]
    assert command[-5:] == ["--module", "forgetscale", "train", "--config", "a.yaml"]
