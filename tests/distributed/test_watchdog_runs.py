"""A run in which a rank hangs ends by itself and names it; a slow rank is in the metrics."""

from __future__ import annotations

from forgetscale.watchdog import EXIT_CODE, stacks_file
from tests.distributed.fault_cases import difference
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs, read_lines
from tests.distributed.test_checkpoint_resume import folder_of


def test_a_rank_that_hangs_is_named_and_the_run_ends(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("hang", SSU, {"train.watchdog_s": 4.0})
    outcome = ranks.run("crash:hang", 2, recipe=recipe, step=4, rank=1)
    assert outcome.codes == [EXIT_CODE] * 2 and not outcome.late
    folder = folder_of(recipe)
    (text,) = [log for log in outcome.logs if "no progress for" in log]
    assert "the others wait for rank 1, which stands in 'rows' of step 4" in text
    lines = [line for line in text.splitlines() if line.startswith("  rank ")]
    assert len(lines) == 2 and "forward and backward" in lines[0] and "rows" in lines[1]
    assert " in stuck" in stacks_file(folder, 1).read_text()
    assert " in stuck" not in stacks_file(folder, 0).read_text()
    assert (
        text[text.index("forgetscale: error: no progress") :].strip()
        in (folder / "log.txt").read_text()
    )
    ranks.must("training:command", 2, recipe=recipe)
    assert difference(folder, runs.get("ssu", 2)) is None
    assert list((folder / "heartbeat").iterdir()) == []


def test_a_rank_that_lags_is_named(ranks: RankServer, runs: Runs):
    changes = {"train.num_steps": 30, "train.checkpoint_every_steps": 100, "train.export": False}
    recipe = runs.recipe("lag", {"kind": "sft"}, changes)
    outcome = ranks.must("crash:lag", 2, recipe=recipe, seconds=0.2, rank=1)
    lines = read_lines(folder_of(recipe) / "metrics.jsonl")
    reports = [line for line in lines if "pace/slowest_rank" in line]
    assert [line["step"] for line in reports] == [10, 20, 30]
    assert all(line["pace/rows_slowest_rank"] == 1 for line in reports)
    assert all(line["pace/rows_ratio"] > 2 for line in reports)
    assert "straggler: rank 1 took" in outcome.logs[0]
