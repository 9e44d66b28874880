"""Killed at any point, a run goes on bit-equal; damaged checkpoints are set aside."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch

from forgetscale.artifact import canonical_json, hash_bytes, hash_file, verify_artifact
from forgetscale.masks import FreezePlan, load_plan, save_plan
from tests.distributed.compare import assert_same_weights
from tests.distributed.fault_cases import difference
from tests.distributed.harness import Outcome, RankServer
from tests.distributed.jobs import flip_bit
from tests.distributed.runs import SSU, Run, Runs, change


def assert_equal_runs(folder: Path, expected: Run) -> None:
    """Same metrics and the same exported bits, nothing half-written left."""
    assert difference(folder, expected) is None


def folder_of(recipe: dict) -> Path:
    return Path(recipe["run"]["output_dir"])


def steps_of(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("dtype", "offload"),
    [("bfloat16", False), pytest.param("bfloat16", True, marks=pytest.mark.long)],
)
def test_resume_in_bf16_and_with_offload(ranks: RankServer, runs: Runs, dtype, offload):
    world = runs.world("bf16", dtype=torch.bfloat16)
    recipe = runs.recipe(f"kill-bf16-{offload}", SSU, {"model.dtype": dtype}, world)
    if offload:
        recipe["deepspeed"] = str(world / "zero3_offload.json")
    point = "in a step, before the optimizer"
    crash = ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=6)
    assert crash.codes == [-signal.SIGKILL] * 2
    ranks.must("training:command", 2, recipe=recipe)
    expected = runs.get("ssu", 2, world=world, offload=offload, model__dtype=dtype)
    assert_equal_runs(folder_of(recipe), expected)


# ---- damaged checkpoints ----------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(ranks: RankServer, runs: Runs) -> dict:
    """A run of two ranks killed in step 5: checkpoints of steps 2 and 4 are there."""
    # Saved in step: it is known which checkpoints a run that is killed has published.
    recipe = runs.recipe("stopped", SSU, {"train.checkpoint_mode": "sync"})
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=5)
    assert steps_of(folder_of(recipe)) == ["step-00000002", "step-00000004"]
    return recipe


def copy_of(stopped: dict, name: str) -> dict:
    folder = folder_of(stopped).with_name(name)
    shutil.copytree(folder_of(stopped), folder)
    return change(stopped, {"run.output_dir": str(folder)})


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def damage(how: str, checkpoint: Path) -> None:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    optimizer = [p for p in files if p.name.startswith("states-")]
    assert len(optimizer) == 2
    if how == "one bit of the last file":
        flip_bit(optimizer[-1])
    elif how == "a file that no manifest names":
        (checkpoint / "states-99999-of-00002.safetensors").write_bytes(b"not ours")
    elif how == "one bit of the manifest":
        flip_bit(checkpoint / "manifest.json")
    elif how == "a file is missing":
        optimizer[0].unlink()
    elif how == "the manifest is missing":
        (checkpoint / "manifest.json").unlink()
    elif how == "a file is cut short":
        optimizer[0].write_bytes(optimizer[0].read_bytes()[:-10])
    elif how == "a foreign pickle":
        data = pickle.dumps(Bomb(checkpoint.parent / "exploded"))
        size = optimizer[0].stat().st_size
        optimizer[0].write_bytes(data + b"\0" * (size - len(data)))
    elif how == "a file that nobody wrote":
        (checkpoint / "extra.pt").write_bytes(pickle.dumps(Bomb(checkpoint.parent / "exploded")))
    else:
        raise AssertionError(how)


DAMAGES = [
    "one bit of the last file",
    "a file that no manifest names",
    "one bit of the manifest",
    "a file is missing",
    "the manifest is missing",
    "a file is cut short",
    "a foreign pickle",
    "a file that nobody wrote",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(ranks: RankServer, runs: Runs, stopped, how: str):
    recipe = copy_of(stopped, "damaged " + how)
    checkpoints = folder_of(recipe) / "checkpoints"
    damage(how, checkpoints / "step-00000004")
    outcome = ranks.must("training:command", 2, recipe=recipe)
    assert "checkpoint: step 4 is damaged and set aside" in outcome.logs[0]
    assert f"resumed from {checkpoints}/step-00000002" in outcome.logs[0]
    assert [p.name[:17] for p in checkpoints.glob("*.bad*")] == ["step-00000004.bad"]
    assert not (checkpoints / "exploded").exists(), "an unverified pickle was loaded"
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 2))


def test_a_pickle_with_a_forged_manifest_does_not_run(ranks: RankServer, stopped):
    """Who can forge every hash still cannot make the one file of torch's format run code."""
    recipe = copy_of(stopped, "forged")
    checkpoint = folder_of(recipe) / "checkpoints" / "step-00000004"
    mark = checkpoint.parent / "exploded"
    path = checkpoint / "method.pt"
    torch.save({"bomb": Bomb(mark)}, path)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"]["method.pt"] |= {"size": path.stat().st_size, "sha256": hash_file(path)}
    del manifest["self_hash"]
    manifest["self_hash"] = hash_bytes(canonical_json(manifest))
    (checkpoint / "manifest.json").write_bytes(canonical_json(manifest))
    verify_artifact(checkpoint, "checkpoint")
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert all(code not in (0, None) for code in outcome.codes), outcome.logs
    assert "weights_only" in "".join(outcome.logs)
    assert not mark.exists()


def test_all_checkpoints_damaged_is_an_error(ranks: RankServer, stopped):
    recipe = copy_of(stopped, "all-damaged")
    checkpoints = folder_of(recipe) / "checkpoints"
    for name in ("step-00000002", "step-00000004"):
        damage("one bit of the last file", checkpoints / name)
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "all 2 checkpoints in", 1)
    assert sorted(p.name[:17] for p in checkpoints.glob("step-*")) == [
        "step-00000002.bad",
        "step-00000004.bad",
    ]


def test_latest_is_only_a_hint(ranks: RankServer, runs: Runs, stopped):
    recipe = copy_of(stopped, "wrong-latest")
    (folder_of(recipe) / "checkpoints" / "latest").write_text("not json")
    ranks.must("training:command", 2, recipe=recipe)
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 2))


# ---- full disk --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "rank"),
    [("limit", None), pytest.param("limit", 0, marks=pytest.mark.long), ("limit", 1)],
)
def test_disk_full_while_saving(ranks: RankServer, runs: Runs, how: str, rank: int | None):
    recipe = runs.recipe(f"full-{how}-{rank}", SSU)
    outcome = ranks.run(
        "crash:train_with_full_disk", 2, recipe=recipe, number=2, rank=rank, how=how
    )
    assert not outcome.late, "a rank hung"
    assert outcome.codes == [1, 1]
    assert outcome.kinds == ["CheckpointError"] * 2
    for message in outcome.errors:
        assert "cannot write the checkpoint in" in message
        assert "the checkpoint before it is intact" in message
        assert "\n" not in message
    checkpoints = folder_of(recipe) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000002"]
    ranks.must("training:command", 2, recipe=recipe)
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 2))


def test_too_little_space_is_noticed_before_writing(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("full-free", SSU)
    outcome = ranks.run(
        "crash:train_with_full_disk", 2, recipe=recipe, number=2, rank=0, how="free"
    )
    assert outcome.codes == [1, 1]
    assert all("0.00 GB free, a checkpoint needs" in message for message in outcome.errors)
    assert steps_of(folder_of(recipe)) == ["step-00000002"]


# ---- refusals ---------------------------------------------------------------------------


def refused(outcome: Outcome, sentence: str, code: int) -> None:
    assert not outcome.late
    assert set(outcome.codes) == {code}, outcome.logs[0][-2000:]
    assert all(sentence in message for message in outcome.errors), outcome.errors
    assert all("\n" not in message for message in outcome.errors)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_goes_on(ranks: RankServer, runs: Runs, stopped, size: int):
    """Stopped on 2 ranks after step 4; 1 or 3 ranks do the rest on the same rows."""
    recipe = copy_of(stopped, f"other-world-{size}")
    outcome = ranks.must("training:train", size, recipe=recipe)
    assert "resumed from" in outcome.logs[0]
    whole = runs.get("ssu", 2)
    resumed = Run(folder_of(recipe), runs.world(), recipe, outcome)
    assert resumed.losses == pytest.approx(whole.losses, rel=2e-6)
    assert_same_weights(resumed.masters, whole.masters)
    for name, frozen in whole.frozen.items():
        assert torch.equal(resumed.export[name][frozen], whole.source[name][frozen]), name


LAYOUTS = [("compact", "masked"), ("masked", "compact")]


@pytest.mark.parametrize(("first", "second"), LAYOUTS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 2),
        pytest.param(3, 1, marks=pytest.mark.long),
        pytest.param(1, 2, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_resumes_under_the_other_layout(
    ranks: RankServer, runs: Runs, first: str, second: str, before: int, after: int
):
    name = f"layout-{first}-{before}-{after}"
    recipe = runs.recipe(name, {**SSU, "layout": first})
    options = {"step": 3, "rank": 0, "number": int(signal.SIGUSR1)}
    stopped = ranks.run("crash:train_and_signal", before, recipe=recipe, **options)
    assert stopped.codes == [75] * before
    other = change(recipe, {"method.layout": second})
    outcome = ranks.must("training:train", after, recipe=other)
    assert "resumed from" in outcome.logs[0]
    resumed, whole = Run(folder_of(recipe), runs.world(), other, outcome), runs.get("ssu", 1)
    assert resumed.losses == pytest.approx(whole.losses, rel=2e-6)
    assert_same_weights(resumed.masters, whole.masters)
    for name, frozen in whole.frozen.items():
        assert torch.equal(resumed.export[name][frozen], whole.source[name][frozen]), name


def test_elastic_schedule_gives_the_same_batches_and_losses(ranks: RankServer, runs: Runs):
    """1, 2, 3 and again 1 ranks in turn; ``step`` counts from each start."""
    recipe = runs.recipe("elastic", SSU)
    for step, size in ((1, 1), (2, 2), (1, 3)):
        options = {"step": step, "rank": 0, "number": int(signal.SIGUSR1)}
        stopped = ranks.run("crash:train_and_signal", size, recipe=recipe, **options)
        assert stopped.codes == [75] * size, stopped.logs[0][-2000:]
    outcome = ranks.must("training:train", 1, recipe=recipe)
    rows = outcome.value["rows"]
    whole = runs.get("ssu", 1)
    assert rows == whole.outcome.value["rows"][-len(rows) :]
    resumed = Run(folder_of(recipe), runs.world(), recipe, outcome)
    assert resumed.losses == pytest.approx(whole.losses, rel=2e-6)
    assert_same_weights(resumed.masters, whole.masters)


def test_another_recipe_in_the_folder_is_refused(ranks: RankServer, stopped):
    recipe = change(copy_of(stopped, "other-recipe"), {"optim.lr": 2e-2})
    before = sorted(p.name for p in folder_of(recipe).iterdir())
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "holds another recipe's run (optim.lr is 0.01 there and 0.02 here)", 2)
    assert sorted(p.name for p in folder_of(recipe).iterdir()) == before


def test_a_folder_that_is_no_run_is_refused(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("foreign", SSU)
    folder_of(recipe).mkdir()
    (folder_of(recipe) / "thesis.tex").write_text("x")
    outcome = ranks.run("training:command", 1, recipe=recipe)
    refused(outcome, "holds 'thesis.tex' but no recipe.yaml", 2)


def test_changed_data_are_refused(ranks: RankServer, runs: Runs, stopped):
    from tests.distributed import tiny

    recipe = copy_of(stopped, "other-data")
    data = folder_of(recipe).with_name("data-2")
    tiny.make_set(data, runs.world() / "model", rows=33, seed=77)
    path = folder_of(recipe) / "recipe.yaml"
    # The same recipe, but the folder it names holds something else now.
    path.write_text(path.read_text().replace(recipe["data"]["path"], str(data)))
    recipe["data"]["path"] = str(data)
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "was made with other training data", 2)
    for words in (f"({data}: ", "num_rows was 40, is 33", "put the old data back"):
        assert words in outcome.errors[0]


def test_another_plan_is_refused(ranks: RankServer, stopped):
    recipe = copy_of(stopped, "other-plan")
    folder = folder_of(recipe) / "plan"
    plan = load_plan(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    columns = {**plan.columns, name: plan.columns[name][1:]}
    save_plan(folder, FreezePlan(columns, plan.rows, plan.whole, plan.provenance))
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "was made with another freeze plan", 2)


def test_a_plan_of_other_settings_is_refused(ranks: RankServer, runs: Runs, stopped):
    recipe = copy_of(stopped, "other-settings")
    other = runs.get({**SSU, "score": "mag_l2"}, 2)
    shutil.rmtree(folder_of(recipe) / "plan")
    shutil.copytree(other.folder / "plan", folder_of(recipe) / "plan")
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "was made with method.score 'mag_l2', the recipe says 'paper'", 2)


def test_a_plan_of_another_model_is_refused(ranks: RankServer, runs: Runs):
    other = runs.world("other-seed", seed=11)
    plan = str(runs.get("ssu", 1).folder / "plan")
    recipe = runs.recipe("foreign-plan", {**SSU, "plan": plan}, world=other)
    outcome = ranks.run("training:command", 2, recipe=recipe)
    refused(outcome, "was made for another model", 2)


def test_a_given_plan_is_used_and_kept(ranks: RankServer, runs: Runs):
    made = runs.get("ssu", 1)
    run = runs.get({**SSU, "plan": str(made.folder / "plan")}, 1)
    assert run.losses == made.losses
    assert all(torch.equal(run.plan[key], index) for key, index in made.plan.items())


# ---- stopping on request ----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_stops_all_ranks_with_a_checkpoint(ranks: RankServer, runs: Runs, number: int):
    recipe = runs.recipe(f"signal-{number}", SSU)
    outcome = ranks.run(
        "crash:train_and_signal", 2, recipe=recipe, step=3, rank=1, number=int(number)
    )
    refused(outcome, "stopped on request after step 3 of 6", 75)
    assert steps_of(folder_of(recipe)) == ["step-00000002", "step-00000003"]
    ranks.must("training:command", 2, recipe=recipe)
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 2))


def test_signal_in_the_last_step_leaves_the_export_to_the_next_start(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("signal-last", SSU)
    outcome = ranks.run(
        "crash:train_and_signal", 1, recipe=recipe, step=6, rank=0, number=int(signal.SIGUSR1)
    )
    assert outcome.codes == [75] and "during the export" in outcome.logs[0]
    assert not (folder_of(recipe) / "export").exists()
    ranks.must("training:command", 1, recipe=recipe)
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 1))


# ---- finished runs ----------------------------------------------------------------------


def test_a_finished_run_started_again_changes_nothing(ranks: RankServer, runs: Runs):
    run = runs.get("ssu", 1)
    before = (run.folder / "metrics.jsonl").read_bytes()
    copy = run.folder.with_name("finished")
    shutil.copytree(run.folder, copy)
    ranks.must("training:command", 1, recipe=change(run.recipe, {"run.output_dir": str(copy)}))
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert_equal_runs(copy, run)


def test_metrics_written_after_the_checkpoint_are_dropped(ranks: RankServer, runs: Runs, stopped):
    recipe = copy_of(stopped, "half-line")
    path = folder_of(recipe) / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1}) + '\n{"step": 6, "lo')
    ranks.must("training:command", 2, recipe=recipe)
    assert_equal_runs(folder_of(recipe), runs.get("ssu", 2))
