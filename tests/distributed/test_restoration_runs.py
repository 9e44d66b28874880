"""Restoration while training: the offline choice, every copy, resumption, refusals."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from forgetscale.cli import main
from forgetscale.config import validate_recipe
from forgetscale.errors import ConfigError
from tests.distributed.harness import RankServer
from tests.distributed.runs import MASKED, SSU, Run, Runs, load_weights, read_lines

LAST = {"every_steps": 6, "fraction": 0.3}


def offline(run: Run, output: Path, *options: str) -> dict[str, torch.Tensor]:
    source, tuned = run.world_folder / "model", run.folder / "export"
    given = ["--source", str(source), "--tuned", str(tuned), "--output", str(output)]
    assert main(["restore", *given, "--fraction", "0.3", "--workers", "1", *options]) == 0
    return load_weights(output)


@pytest.mark.parametrize(
    ("size", "more", "options"),
    [
        (1, {}, ()),
        (3, {}, ()),
        (2, {"score": "absolute", "scope": "tensor"}, ("--score", "absolute", "--scope", "tensor")),
        (2, {"score": "base", "side": "bottom", "include": "mlp"},
         ("--score", "base", "--side", "bottom", "--include", "mlp")),
    ],
)  # fmt: skip
def test_after_the_last_step_it_is_the_offline_command(
    runs: Runs, tmp_path: Path, size: int, more: dict, options: tuple
):
    """The same bits as restoring the export of the run without it."""
    wanted = offline(runs.get("sft", size), tmp_path / "out", *options)
    run = runs.get("sft", size, restore=LAST | more)
    assert wanted.keys() == run.export.keys()
    assert all(torch.equal(run.export[name], value) for name, value in wanted.items())
    last = run.metrics[-1]
    assert last["method/restore/distance_after"] < last["method/restore/distance_before"]
    assert "method/restore/restored" not in run.metrics[0]


@pytest.mark.parametrize("method", [SSU, {"kind": "gmt"}])
def test_it_goes_with_any_protection(runs: Runs, method: dict):
    one, two = (
        runs.get(method, size, restore={"every_steps": 2, "fraction": 0.3}) for size in (1, 2)
    )
    assert one.losses == pytest.approx(two.losses, rel=2e-6)
    for name, frozen in one.frozen.items():
        assert torch.equal(one.export[name][frozen], one.source[name][frozen])
    last, trained = one.metrics[-1], 0
    for name, source in one.source.items():
        if "layers" in name and "norm" not in name:
            trained += int((~one.frozen[name]).sum())
            assert bool((one.export[name] == source).any())
    assert last["method/restore/restored"] == int(0.3 * trained + 1e-9)


def test_masks_and_cut_matrices_restore_the_same(runs: Runs):
    section = {"every_steps": 2, "fraction": 0.3}
    cut, masked = (runs.get(method, 2, restore=section) for method in (SSU, MASKED))
    assert cut.losses == pytest.approx(masked.losses, rel=2e-6)
    for name, value in cut.export.items():
        assert torch.allclose(value, masked.export[name], atol=2e-5), name


@pytest.mark.parametrize("offload", [False, True])
def test_all_copies_hold_the_source_value_in_bf16(runs: Runs, ranks: RankServer, offload: bool):
    world = runs.world("bf16", dtype=torch.bfloat16)
    changes = {"model.dtype": "bfloat16", "restore": {"every_steps": 1, "fraction": 0.4}}
    if offload:
        changes["deepspeed"] = str(world / "zero3_offload.json")
    recipe = runs.recipe(f"copies-{offload}", {"kind": "sft"}, changes, world)
    both = ranks.must("moving:watch_restoration", 2, recipe=recipe).values
    assert [found["steps"] for found in both] == [6, 6]
    found = {name: sum(rank[name] for rank in both) for name in both[0]}
    assert found["restored"] >= 0.4 * found["elements"] - 6
    assert found["wrong_working"] == found["wrong_gathered"] == found["wrong_moment"] == 0


def test_stop_and_resume_is_bit_equal(runs: Runs, ranks: RankServer):
    section = {"every_steps": 2, "fraction": 0.3}
    whole = runs.get("sft", 2, restore=section)
    recipe = runs.recipe("resumed-restore", {"kind": "sft"}, {"restore": section})
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    ranks.must("training:command", 2, recipe=recipe)
    folder = runs.world() / "resumed-restore"
    assert [x["loss"] for x in read_lines(folder / "metrics.jsonl")] == whole.losses
    found = load_weights(folder / "export")
    assert all(torch.equal(found[name], value) for name, value in whole.export.items())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"every_steps": 0, "fraction": 0.1}, "every_steps must be > 0"),
        ({"every_steps": 1, "fraction": 1.0}, r"fraction must lie in \(0, 1\)"),
        ({"every_steps": 1, "fraction": 0.1, "eps": 0.0}, "eps must be finite"),
    ],
)
def test_impossible_sections_are_refused(runs: Runs, section: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        validate_recipe(runs.recipe("x", {"kind": "sft"}, {"restore": section}))


def test_an_adapter_is_refused(runs: Runs):
    changes = {"restore": LAST, "adapter": {"kind": "lora", "rank": 4, "alpha": 16}}
    with pytest.raises(ConfigError, match="never move"):
        validate_recipe(runs.recipe("x", {"kind": "sft"}, changes))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"include": "nothing"}, "no trained tensor"), ({"fraction": 1e-9}, "less than one element")],
)
def test_an_empty_choice_is_refused(runs: Runs, ranks: RankServer, more: dict, said: str):
    recipe = runs.recipe(f"empty-{len(said)}", {"kind": "sft"}, {"restore": LAST | more})
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    assert said in outcome.errors[0]
