"""The retention gate as a function of the ledger: what is judged, what a restart makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.config import BudgetConfig, RetentionConfig
from forgetscale.engine.retention import RetentionGate, measure_of, read_state
from forgetscale.errors import ConfigError, RetentionError


class ListLedger:
    """A ledger in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def note(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})

    def events(self) -> list[dict[str, Any]]:
        return list(self.lines)


def result(value: float, task: str = "recall", metric: str = "accuracy", **more: Any) -> dict:
    base = {"task": task, "metric": metric, "value": value, "task_hash": "h"}
    return base | {"higher_is_better": metric == "accuracy"} | more


def gate_of(*budgets: BudgetConfig, ledger: ListLedger | None = None, **more: Any) -> RetentionGate:
    config = RetentionConfig(every_steps=10, budgets=budgets, **more)
    return RetentionGate(config, ledger or ListLedger())  # type: ignore[arg-type]


def budget(max_drop: float, action: str = "warn", **more: Any) -> BudgetConfig:
    return BudgetConfig(task="recall", max_drop=max_drop, action=action, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "kind", "before", "now", "drop"),
    [
        ("accuracy", "absolute", 0.8, 0.6, 0.2),
        ("accuracy", "relative", 0.8, 0.6, 0.25),
        ("accuracy", "relative", 0.8, 0.9, -0.125),
        ("perplexity", "absolute", 10.0, 12.0, 2.0),
        ("perplexity", "relative", 10.0, 12.0, 0.2),
        ("perplexity", "relative", 10.0, 8.0, -0.2),
    ],
)
def test_a_drop_is_positive_where_it_got_worse(metric, kind, before, now, drop):
    given_budget = BudgetConfig(task="recall", max_drop=0.1, kind=kind)
    found = measure_of(given_budget, result(before, metric=metric), result(now, metric=metric))
    assert found.drop == pytest.approx(drop)
    assert found.exceeded == (drop > 0.1)


def test_exactly_the_budget_is_allowed_and_a_share_of_nothing_is_refused():
    half = budget(0.5, kind="absolute")
    assert not measure_of(half, result(1.0), result(0.5)).exceeded
    with pytest.raises(ConfigError, match="of which no share can be lost"):
        gate_of(budget(0.5)).judge(0, [result(0.0)], [])
    with pytest.raises(ConfigError, match="other content than when the source model"):
        measure_of(half, result(1.0), result(1.0, task_hash="other"))


def test_the_strongest_action_of_those_exceeded_is_taken():
    gate = gate_of(budget(0.1, "warn"), budget(0.2, "lower_lr"), budget(0.4, "stop"))
    assert gate.judge(0, [result(1.0)], []) == "none"
    assert [gate.judge(10 * n, [result(v)], []) for n, v in ((1, 0.95), (2, 0.85))] == [
        "none",
        "warn",
    ]
    assert gate.lr_factor == 1.0
    assert gate.judge(30, [result(0.7)], []) == "lower_lr"
    assert gate.lr_factor == 0.5
    assert gate.judge(40, [result(0.5)], []) == "stop"
    error = gate.ended(40)
    assert isinstance(error, RetentionError) and error.exit_code == 1
    assert "recall accuracy is 0.5, the source model's 1" in str(error)


def test_what_happened_too_often_becomes_a_stop():
    gate = gate_of(budget(0.1, "lower_lr"), max_actions=2, lr_factor=0.1)
    gate.judge(0, [result(1.0)], [])
    taken = [gate.judge(10 * n, [result(0.5)], []) for n in (1, 2, 3)]
    assert taken == ["lower_lr", "lower_lr", "stop"]
    assert gate.lr_factor == pytest.approx(0.01)


def test_a_run_goes_back_to_the_newest_checkpoint_within_the_budgets():
    gate = gate_of(budget(0.1, "roll_back"), budget(0.01, "warn"))
    gate.judge(0, [result(1.0)], [])
    gate.judge(10, [result(1.0)], [0])
    gate.judge(20, [result(0.95)], [0, 10])  # a warning only
    assert gate.judge(30, [result(0.5)], [0, 10, 20, 25]) == "roll_back"
    assert gate.state.undone_to == 20 and gate.lr_factor == 0.5
    assert sorted(gate.state.decisions) == [10, 20], "what came after it will be taken again"


def test_without_any_good_checkpoint_the_run_stops():
    gate = gate_of(budget(0.1, "roll_back"))
    gate.judge(0, [result(1.0)], [])
    assert gate.judge(10, [result(0.5)], [7]) == "stop"


def test_a_second_roll_back_goes_to_what_was_good_in_the_new_attempt():
    ledger = ListLedger()
    gate = gate_of(budget(0.1, "roll_back"), ledger=ledger)
    gate.judge(0, [result(1.0)], [])
    gate.judge(10, [result(1.0)], [0])
    gate.judge(20, [result(0.5)], [0, 10])
    ledger.note("resumed", step=10)
    gate = gate_of(budget(0.1, "roll_back"), ledger=ledger)
    gate.judge(20, [result(0.95)], [0, 10])
    assert gate.judge(30, [result(0.5)], [0, 10, 20]) == "roll_back"
    assert gate.state.undone_to == 20
    assert gate.state.num_actions == 2 and gate.lr_factor == 0.25


def test_a_restart_forgets_the_steps_it_takes_again_but_no_roll_back():
    ledger = ListLedger()
    gate = gate_of(budget(0.1, "lower_lr"), ledger=ledger)
    gate.judge(0, [result(1.0)], [])
    gate.judge(10, [result(0.5)], [])
    assert gate.lr_factor == 0.5
    ledger.note("resumed", step=9)
    again = gate_of(budget(0.1, "lower_lr"), ledger=ledger)
    assert again.lr_factor == 1.0 and again.lacks(10, 100) and not again.lacks(9, 100)
    again.judge(10, [result(0.5)], [])
    ledger.note("resumed", step=10)
    again = gate_of(budget(0.1, "lower_lr"), ledger=ledger)
    assert again.lr_factor == 0.5 and not again.lacks(10, 100)


def test_an_announced_roll_back_is_finished_by_the_next_start():
    ledger = ListLedger()
    gate = gate_of(budget(0.1, "roll_back"), ledger=ledger)
    gate.judge(0, [result(1.0)], [])
    gate.judge(10, [result(0.5)], [0])
    assert gate_of(budget(0.1, "roll_back"), ledger=ledger).state.undone_to == 0
    ledger.note("started", step=0)
    after = gate_of(budget(0.1, "roll_back"), ledger=ledger)
    assert after.state.undone_to is None
    assert (after.lr_factor, after.state.num_actions) == (0.5, 1)


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_a_stopped_run_stays_stopped_until_its_budget_is_raised(action: str):
    ledger = ListLedger()
    gate = gate_of(budget(0.1, action), ledger=ledger, after_roll_back="stop")
    gate.judge(0, [result(1.0)], [])
    gate.judge(10, [result(0.5)], [0])
    step = 10 if action == "stop" else 0
    ledger.note("resumed", step=step)
    for limit, stopped in ((0.1, True), (0.6, False)):
        again = gate_of(budget(limit, action), ledger=ledger, after_roll_back="stop")
        if stopped:
            with pytest.raises(RetentionError, match="retention: at step 10 recall"):
                again.require_open(step)
        else:
            again.require_open(step)
    on = gate_of(budget(0.1, action), ledger=ledger, after_roll_back="lower_lr")
    if action == "roll_back":
        on.require_open(step)


def test_a_budget_that_came_later_has_no_source_to_compare_with():
    ledger = ListLedger()
    gate_of(budget(0.1), ledger=ledger).judge(0, [result(1.0)], [])
    other = BudgetConfig(task="other", max_drop=0.1)
    with pytest.raises(ConfigError, match="'other' was not measured on the source model"):
        gate_of(other, ledger=ledger).judge(10, [result(1.0, task="other")], [])
    with pytest.raises(ConfigError, match="has no metric 'rate'; it has accuracy"):
        gate_of(budget(0.1, metric="rate")).judge(0, [result(1.0)], [])


def test_impossible_sections_are_refused():
    for more, sentence in (
        ({"budgets": ()}, "budgets must name at least one task"),
        ({"every_steps": 0}, "every_steps must be > 0"),
        ({"lr_factor": 1.0}, "lr_factor must lie in"),
        ({"budgets": (budget(0.1), budget(0.2))}, "twice"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RetentionConfig(**{"every_steps": 1, "budgets": (budget(0.1),)} | more)
    with pytest.raises(ValueError, match="max_drop must be >= 0"):
        budget(-0.1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_kills_at_any_moment_end_in_the_same_state(data: st.DataObject):
    """A run that is killed between decisions stands where the one without kills stands."""
    drops = data.draw(st.lists(st.sampled_from([1.0, 0.95, 0.5]), min_size=1, max_size=8))
    kills = data.draw(st.sets(st.integers(0, 30), max_size=4))

    def run(killed: set[int]) -> Any:
        ledger, ticks = ListLedger(), 0
        ledger.note("started", step=0)
        checkpoints, step, budgets = {0}, 0, (budget(0.1, "roll_back"),)
        gate = gate_of(*budgets, ledger=ledger, max_actions=3)
        gate.judge(0, [result(1.0)], [])
        while step < 10 * len(drops):
            ticks += 1
            step += 10
            # Worse at full rate only, so that a run that was sent back may pass.
            value = drops[step // 10 - 1] if gate.lr_factor > 0.3 else 1.0
            action = gate.judge(step, [result(value)], sorted(checkpoints))
            if action == "stop":
                break
            if action == "roll_back":
                step = gate.state.undone_to
                checkpoints = {item for item in checkpoints if item <= step}
                ledger.note("resumed", step=step)
            elif ticks in killed:  # before the checkpoint of this step is written
                step = max(checkpoints)
                ledger.note("resumed", step=step)
            else:
                checkpoints.add(step)
            gate = gate_of(*budgets, ledger=ledger, max_actions=3)
        state = read_state(ledger.events())
        return step, state.lr_factor, state.num_actions, state.good_steps

    assert run(set(kills)) == run(set())
