"""Whole runs on mixtures and with skipped rows: any rank count, any interruption, same result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetscale.data import TokenSet
from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs, change, read_lines

STEPS, BATCH = 6, 7
SYNC = {"train.checkpoint_mode": "sync"}
"""For runs that are killed: it is known which checkpoint was published."""


@pytest.fixture(scope="module")
def sets(runs: Runs) -> dict:
    """A ``data`` section that mixes two sets three to one."""
    world = runs.world()
    path = tiny.make_set(world / "dialogues", world / "model", rows=5, seed=9)
    return {
        "kind": "mixture",
        "shuffle_seed": 5,
        "sets": [
            {"path": str(world / "data"), "weight": 0.75},
            {"path": str(path), "weight": 0.25},
        ],
    }


def targets(run: Run | Path) -> list[int]:
    """Target tokens of each step."""
    lines = run.metrics if isinstance(run, Run) else read_lines(run / "metrics.jsonl")
    seen = [line["target_tokens"] for line in lines]
    return [after - before for before, after in zip([0, *seen], seen, strict=False)]


def test_a_mixture_is_the_same_run_on_any_ranks(runs: Runs, sets: dict):
    one, two = (runs.get("sft", size, data=sets) for size in (1, 2))
    assert one.rows == two.rows
    assert one.losses == pytest.approx(two.losses, rel=2e-6)
    assert_same_weights(one.masters, two.masters)
    for step, line in enumerate(one.metrics, start=1):
        drawn = line["data/row_share/dialogues"] * step * BATCH
        assert abs(drawn - 0.25 * step * BATCH) < 1
        assert line["data/token_share/dialogues"] == line["data/row_share/dialogues"]
    assert runs.get("sft", 1).losses != one.losses


def test_a_mixture_goes_on_bit_equal_after_a_kill(ranks: RankServer, runs: Runs, sets: dict):
    recipe = runs.recipe("mixture-killed", changes={"data": sets})
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=4)
    ranks.must("training:train", 2, recipe=recipe)
    losses = [
        line["loss"] for line in read_lines(Path(recipe["run"]["output_dir"], "metrics.jsonl"))
    ]
    assert losses == runs.get("sft", 2, data=sets).losses


def test_a_changed_part_of_a_mixture_is_named(ranks: RankServer, runs: Runs, sets: dict):
    recipe = runs.recipe("mixture-changed", changes={"data": sets})
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 1, recipe=recipe, point=point, number=4)
    path = Path(sets["sets"][1]["path"])
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        tiny.make_set(path, runs.world() / "model", rows=6, seed=9)
        outcome = ranks.run("training:command", 1, recipe=recipe)
    finally:
        path.rename(path.with_name("changed"))
        aside.rename(path)
    assert set(outcome.codes) == {2}
    assert f"({path}: " in outcome.errors[0], outcome.errors[0]
    assert "num_rows was 5, is 6" in outcome.errors[0]
    assert "\n" not in outcome.errors[0]


@pytest.mark.parametrize("size", [1, 2])
def test_skipped_rows_keep_their_place(runs: Runs, tmp_path_factory, size: int):
    plain = runs.get("sft", 1)
    bad = plain.rows[1][2:4]
    path = tmp_path_factory.mktemp("skips") / "bad.jsonl"
    path.write_text("".join(json.dumps({"row": row}) + "\n" for row in bad))
    run = runs.get("sft", size, data__skip_rows=str(path))
    assert run.rows == plain.rows
    expected = [(BATCH - len(set(rows) & set(bad))) * (tiny.BLOCK_SIZE - 1) for rows in plain.rows]
    assert targets(run) == expected
    assert [line["data/skipped_rows"] for line in run.metrics] == [
        len(set(rows) & set(bad)) for rows in plain.rows
    ]
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=2e-6)
    assert run.losses[1] != pytest.approx(plain.losses[1], rel=1e-4)


def test_rows_named_in_the_middle_are_skipped_from_there_on(ranks: RankServer, runs: Runs):
    plain = runs.get("sft", 2)
    recipe = runs.recipe("skips-later", changes=SYNC)
    folder = Path(recipe["run"]["output_dir"])
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=5)
    old, new = plain.rows[0][0], plain.rows[5][3]
    given = folder.with_name("bad-later.jsonl")
    given.write_text(f'{{"row": {old}}}\n{{"row": {new}, "reason": "loss"}}\n')
    ranks.must("training:train", 2, recipe=change(recipe, {"data.skip_rows": str(given)}))
    whole = BATCH * (tiny.BLOCK_SIZE - 1)
    found = targets(folder)
    assert found[:5] == [whole] * 5
    assert found[5] == whole - (tiny.BLOCK_SIZE - 1)
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses[:5] == plain.losses[:5]
    kept = read_lines(folder / "skip_list.jsonl")
    assert [(e["row"], e["reason"], e["step"], e["first_position"]) for e in kept] == [
        (old, "", 4, 4 * BATCH),
        (new, "loss", 4, 4 * BATCH),
    ]
    assert {e["set"] for e in kept} == {TokenSet(recipe["data"]["path"]).content_hash}


def test_the_micro_batch_size_may_change_at_a_resume(ranks: RankServer, runs: Runs):
    """Same global batches, so the same run up to the order of sums."""
    recipe = runs.recipe("micro-later", changes=SYNC)
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=5)
    outcome = ranks.must("training:train", 2, recipe=change(recipe, {"train.micro_batch_size": 3}))
    plain = runs.get("sft", 2)
    rows = [sum(step, []) for step in zip(*(v["rows"] for v in outcome.values), strict=True)]
    assert rows == plain.rows[4:]
    lines = read_lines(Path(recipe["run"]["output_dir"], "metrics.jsonl"))
    assert [line["loss"] for line in lines] == pytest.approx(plain.losses, rel=2e-6)
