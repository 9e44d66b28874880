"""The retention gate: abilities of the source model against budgets, at a fixed rhythm.

Every measurement and what followed is a line of the ledger, and the gate's state is nothing but
what those lines say. So a run that is killed and started again stands where it stood: lines of
steps that a restart takes again are overwritten by the new ones, those before a roll-back stay.

A run may have this gate and the ladder of bad steps (``forgetscale.engine.ladder``). The ladder
comes first: it judges the numbers of a step before the weights change, the gate the weights between
two steps, so what a bad step would have done is never measured, and a step that sends the run back
is not judged. When the ladder goes back, later decisions of the gate are taken again with the
weights that never saw the rows: a rate that was lowered meanwhile is what it was at that
checkpoint. When the gate goes back, rows stay in quarantine; its roll-backs and the rate they left
are never undone. Each counts its own actions against its own limit (``guard.max_rollbacks``,
``retention.max_actions``), so the two together end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from forgetscale.config import ACTIONS, BudgetConfig, RetentionConfig
from forgetscale.engine.ledger import Ledger
from forgetscale.errors import ConfigError, RetentionError

SOURCE_EVENT = "retention_source"
DECISION_EVENT = "retention"
NONE = "none"
_STARTS = ("started", "resumed")


@dataclass(frozen=True, slots=True)
class Measure:
    """One ability, before and now.

    Attributes:
        task: Task name.
        metric: Metric of the task.
        source: Value of the source model.
        value: Value now.
        drop: How much worse it is, in the unit of the budget; negative: better.
        max_drop: The budget.
        kind: ``relative`` or ``absolute``.
        exceeded: Whether ``drop`` is above the budget.
        action: What the budget asks for.
    """

    task: str
    metric: str
    source: float
    value: float
    drop: float
    max_drop: float
    kind: str
    exceeded: bool
    action: str

    def describe(self) -> str:
        """Return the measure as words."""
        drop, limit = self.drop, self.max_drop
        shown = (
            f"{drop:.1%} of it (budget {limit:.1%})"
            if self.kind == "relative"
            else f"{drop:.4g} (budget {limit:.4g})"
        )
        return (
            f"{self.task} {self.metric} is {self.value:.4g}, the source model's {self.source:.4g}:"
            f" worse by {shown}"
        )


def find_result(
    results: Sequence[Mapping[str, Any]], budget: BudgetConfig
) -> Mapping[str, Any] | None:
    """Return the result a budget is about, or None."""
    for item in results:
        if item["task"] == budget.task and budget.metric in (None, item["metric"]):
            return item
    return None


def measure_of(budget: BudgetConfig, source: Mapping[str, Any], now: Mapping[str, Any]) -> Measure:
    """Compare one ability with the source model's.

    Args:
        budget: What may be lost.
        source: Result of the source model.
        now: Result of the same task and metric now.

    Raises:
        ConfigError: The task has other content than when the source model was measured, or a share
            of 0 is asked for.
    """
    if source["task_hash"] != now["task_hash"]:
        raise ConfigError(
            f"retention: task {budget.task!r} has other content than when the source model was"
            " measured; put the old one back or start a new run.output_dir."
        )
    before, value = float(source["value"]), float(now["value"])
    drop = before - value if now["higher_is_better"] else value - before
    if budget.kind == "relative":
        if before == 0:
            raise ConfigError(
                f"retention: the source model's {budget.task} {now['metric']} is 0, of which no"
                " share can be lost; set kind of this budget to absolute, or remove it."
            )
        drop /= abs(before)
    return Measure(
        task=budget.task,
        metric=str(now["metric"]),
        source=before,
        value=value,
        drop=drop,
        max_drop=budget.max_drop,
        kind=budget.kind,
        exceeded=not drop <= budget.max_drop,
        action=budget.action,
    )


@dataclass(slots=True)
class GateState:
    """What the ledger says about the gate.

    Attributes:
        source: Results of the source model; empty before they are measured.
        lr_factor: What the learning rate is multiplied by.
        num_actions: Times the rate was lowered or the run rolled back.
        decisions: Step -> last decision that counts, in order.
        good_steps: Steps at which nothing stronger than a warning was due; what a run goes back to.
        undone_to: Step of a roll-back that was announced and not carried out, or None.
        last: The newest decision, or None.
    """

    source: list[dict[str, Any]] = field(default_factory=list)
    lr_factor: float = 1.0
    num_actions: int = 0
    decisions: dict[int, dict[str, Any]] = field(default_factory=dict)
    good_steps: list[int] = field(default_factory=list)
    undone_to: int | None = None
    last: dict[str, Any] | None = None


def read_state(events: Iterable[Mapping[str, Any]]) -> GateState:
    """Return what a ledger says about the gate.

    A start at step ``s`` takes every later step again, so decisions about them do not count any
    more. A roll-back does: it and what was decided before it are why the run is where it is.

    Args:
        events: Lines of the ledger, in order.
    """
    state = GateState()
    before: Mapping[str, Any] | None = None
    line: list[tuple[Mapping[str, Any], bool]] = []  # with whether it came after the roll-back
    for event in events:
        if event["event"] == SOURCE_EVENT:
            state.source = list(event["results"])
        elif event["event"] in _STARTS:
            line = [item for item in line if item[0]["step"] <= event["step"]]
            state.undone_to = None
        elif event["event"] == DECISION_EVENT and event["action"] == "roll_back":
            state.undone_to = int(event["to_step"])
            line = [(item, False) for item, _ in line if item["step"] <= state.undone_to]
            before = event
        elif event["event"] == DECISION_EVENT:
            line.append((event, True))
    if before is not None:
        _follow(state, before)
    for item, after in line:
        state.decisions[int(item["step"])] = dict(item)
        if after:
            _follow(state, item)
    state.good_steps = [
        step for step, item in state.decisions.items() if item["action"] in (NONE, "warn")
    ]
    return state


def _follow(state: GateState, decision: Mapping[str, Any]) -> None:
    state.last = dict(decision)
    state.lr_factor = float(decision["lr_factor"])
    state.num_actions = int(decision["num_actions"])


class RetentionGate:
    """Judges measurements and remembers what followed.

    Args:
        config: Budgets; None lets everything pass.
        ledger: Ledger of the run.

    Collective: every rank must make it at the same place.
    """

    def __init__(self, config: RetentionConfig | None, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self.state = GateState() if config is None else read_state(ledger.events())

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by, in (0, 1]."""
        return self.state.lr_factor

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether a step is measured: at the start, every so often, and at the end."""
        if self._config is None:
            return False
        return step % self._config.every_steps == 0 or step == num_steps

    def lacks(self, step: int, num_steps: int) -> bool:
        """Return whether a step is due and was not judged."""
        if self._config is None or not self.is_due(step, num_steps):
            return False
        return not self.state.source if step == 0 else step not in self.state.decisions

    @property
    def keeps_good(self) -> bool:
        """Whether checkpoints within the budgets are kept to go back to."""
        return self._config is not None and self._config.rolls_back

    def newest_good(self, steps: Iterable[int]) -> int | None:
        """Return the newest of the checkpoints that was within the budgets; the source counts."""
        good = {0, *self.state.good_steps}
        return max((step for step in steps if step in good), default=None)

    def judge(
        self, step: int, results: Sequence[Mapping[str, Any]], checkpoints: Iterable[int]
    ) -> str:
        """Compare a measurement with the source model, decide, and write it down.

        Args:
            step: Step that was measured; 0 is the source model itself.
            results: Results of the budgets' tasks.
            checkpoints: Steps of the checkpoints there are.

        Returns:
            ``none`` or the strongest action due; a second action too many becomes ``stop``.

        Raises:
            ConfigError: A task has no such metric, or the source model was never measured.

        Collective: every rank must call it with the same results.
        """
        assert self._config is not None
        if step == 0:
            self._keep_source(results)
            return NONE
        measures = self._measures(results)
        action = self._action(measures)
        fields: dict[str, Any] = {}
        factor, count = self.state.lr_factor, self.state.num_actions
        if action == "roll_back":
            target = self.newest_good(checkpoints)
            if target is None:
                action = "stop"  # nothing within the budgets is left on the disk
            else:
                fields["to_step"] = target
                fields["then"] = self._config.after_roll_back
        if action in ("lower_lr", "roll_back"):
            factor, count = factor * self._config.lr_factor, count + 1
        self._ledger.note(
            DECISION_EVENT,
            step=step,
            action=action,
            lr_factor=factor,
            num_actions=count,
            measures=[asdict(item) for item in measures],
            **fields,
        )
        self.state = read_state(self._ledger.events())
        return action

    def require_open(self, step: int) -> None:
        """Check that no earlier start ended the run at this step for good.

        The kept measures are judged by the budgets of now: who raises a budget may go on.

        Raises:
            RetentionError: The last decision was to stop, and still is.
        """
        last = self.state.last
        if self._config is None or last is None or not self._ends(last, step):
            return
        measures = [self._again(item) for item in last["measures"]]
        exceeded = [item for item in measures if item is not None and item.exceeded]
        strong = [item for item in exceeded if item.action != "warn"]
        if strong and (last["action"] == "stop" or self._config.after_roll_back == "stop"):
            raise self.ended(step)

    def ended(self, step: int) -> RetentionError:
        """Return the error that ends a run, with what was lost and what to do."""
        last = self.state.last
        assert last is not None
        lost = [Measure(**item) for item in last["measures"] if item["exceeded"]]
        words = "; ".join(item.describe() for item in lost)
        back = ""
        if last["action"] == "roll_back":
            back = f", and the run is back at step {last['to_step']}"
        return RetentionError(
            f"retention: at step {last['step']} {words}{back}; the run stops here, with the"
            f" checkpoint of step {step}: export it with forgetscale export, or raise the budget"
            " and start the same command again, or start a new run with a lower optim.lr."
        )

    # ---- inside --------------------------------------------------------------------------

    def _keep_source(self, results: Sequence[Mapping[str, Any]]) -> None:
        assert self._config is not None
        kept = []
        for budget in self._config.budgets:
            found = self._result(results, budget)
            measure_of(budget, found, found)  # a share of 0 is refused before any training
            if found not in kept:
                kept.append(found)
        self._ledger.note(SOURCE_EVENT, step=0, results=[dict(item) for item in kept])
        self.state = read_state(self._ledger.events())

    def _result(
        self, results: Sequence[Mapping[str, Any]], budget: BudgetConfig
    ) -> Mapping[str, Any]:
        found = find_result(results, budget)
        if found is None:
            known = sorted({str(item["metric"]) for item in results if item["task"] == budget.task})
            raise ConfigError(
                f"retention.budgets: task {budget.task!r} has no metric {budget.metric!r}; it has"
                f" {', '.join(known) or 'none'}."
            )
        return found

    def _measures(self, results: Sequence[Mapping[str, Any]]) -> list[Measure]:
        assert self._config is not None
        found = []
        for budget in self._config.budgets:
            source = find_result(self.state.source, budget)
            if source is None:
                raise ConfigError(
                    f"retention.budgets: {budget.task!r} was not measured on the source model when"
                    " this run started, and the source model is gone from its engine; start a new"
                    " run.output_dir, or take the budget out."
                )
            found.append(measure_of(budget, source, self._result(results, budget)))
        return found

    def _action(self, measures: Sequence[Measure]) -> str:
        assert self._config is not None
        due = [ACTIONS.index(item.action) for item in measures if item.exceeded]
        if not due:
            return NONE
        action = ACTIONS[max(due)]
        spent = self.state.num_actions >= self._config.max_actions
        return "stop" if spent and action in ("lower_lr", "roll_back") else action

    def _ends(self, last: Mapping[str, Any], step: int) -> bool:
        if last["action"] == "stop":
            return int(last["step"]) == step
        return last["action"] == "roll_back" and int(last["to_step"]) == step

    def _again(self, item: Mapping[str, Any]) -> Measure | None:
        """Return a kept measure under the budget of now, or None if there is none any more."""
        assert self._config is not None
        for budget in self._config.budgets:
            if budget.task == item["task"] and budget.metric in (None, item["metric"]):
                if budget.kind == item["kind"] and budget.action == item["action"]:
                    new = dict(item) | {"max_drop": budget.max_drop}
                    return Measure(**new | {"exceeded": not item["drop"] <= budget.max_drop})
        return None
