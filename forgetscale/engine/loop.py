"""The training loop. It never asks which method runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forgetscale.api import EDITS_GRADIENTS, EDITS_PARAMS, Method, overrides
from forgetscale.checkpoint import CheckpointStore, RunState
from forgetscale.config import Recipe
from forgetscale.data import StreamBatch, TokenStream
from forgetscale.engine.audit import FreezeAudit
from forgetscale.engine.extras import LossExtras
from forgetscale.engine.guard import Guard
from forgetscale.engine.ladder import RolledBack, climb
from forgetscale.engine.ledger import Ledger
from forgetscale.engine.metrics import MetricsLog, memory_bytes
from forgetscale.engine.micro_batches import MicroBatch, batches_of
from forgetscale.engine.overshoot import OvershootWatch
from forgetscale.engine.pace import AGREEMENT, COMPUTE, OPTIMIZER, ROWS, Pace
from forgetscale.engine.restoration import Restoration
from forgetscale.engine.retention import RetentionGate
from forgetscale.engine.step_loss import divide_by_weights, summarize_loss
from forgetscale.errors import DataError, StoppedEarly
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import LossFunction, LossRecord, LossSums
from forgetscale.ops.schedule import learning_rate
from forgetscale.progress import Progress
from forgetscale.zero3 import World, ZeroEngine

Evaluate = Callable[[ZeroEngine], list[dict[str, Any]]]
"""Measures the live model. Collective: every rank must call it."""

Probe = Callable[[ZeroEngine], Mapping[str, float]]
"""Looks at the live model between steps. Collective: every rank must call it."""


@dataclass(slots=True)
class Training:
    """Everything a run needs, put together by ``forgetscale.engine.run``."""

    recipe: Recipe
    world: World
    engine: ZeroEngine
    method: Method
    stream: TokenStream
    extras: LossExtras
    store: CheckpointStore
    metrics: MetricsLog
    ledger: Ledger
    log: Callable[[str], None]
    guard: Guard
    audit: FreezeAudit
    pace: Pace
    progress: Progress
    num_steps: int
    num_micro_batches: int
    evaluate: Evaluate | None
    probe: Probe | None
    refresh: Callable[[int], None]
    """Lets the method measure again after so many steps. Collective."""
    gate: RetentionGate
    measure_retention: Evaluate | None
    state: RunState
    restoration: Restoration | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step tells."""

    loss: float
    """Mean over the step's target tokens of all ranks, in nats."""
    grad_norm: float
    num_target_tokens: int
    stop: bool
    """True if any rank was asked to stop."""
    method_metrics: Mapping[str, float]
    bad: str | None = None
    """Why the step was not done; None if it was."""


def rate_of(job: Training, step: int) -> float:
    """Return the learning rate of a step: the schedule's, times what the gate left of it."""
    optim = job.recipe.optim
    scheduled = learning_rate(
        step,
        num_steps=job.num_steps,
        peak=optim.lr,
        schedule=optim.schedule,
        warmup_fraction=optim.warmup_fraction,
    )
    return scheduled * job.gate.lr_factor


def count_targets(batches: Sequence[MicroBatch], world: World) -> int:
    """Return the target tokens of a step over all ranks. Collective: every rank must call it.

    Raises:
        DataError: There are none, so the step has no loss.
    """
    mine = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    found = int(world.sum(torch.tensor([mine])))
    if not found:
        raise DataError(
            "no token of this step is a target (documents of one token, or skipped rows); look at"
            " its rows with python -m data_prep inspect, or raise train.global_batch_size."
        )
    return found


def accumulate(
    engine: ZeroEngine,
    loss_function: LossFunction,
    batches: Sequence[MicroBatch],
    num_targets: int,
    record: LossRecord | None = None,
    extras: LossExtras | None = None,
) -> Tensor:
    """Run forward and backward over a step's micro-batches.

    The loss of a micro-batch is a sum; dividing by the step's global count makes the mean over
    ranks and micro-batches exact however unevenly targets are spread.

    Args:
        engine: The model.
        loss_function: Sum over positions.
        batches: This rank's micro-batches, as many as every other rank has.
        num_targets: Target tokens of the step over all ranks.
        record: Adds up what lies beside the loss.
        extras: Where tensors come from that the loss needs beside logits and labels.

    Returns:
        This rank's summed loss, fp32. Collective: every rank must call it.
    """
    world = engine.world
    loss_sum = torch.zeros((), dtype=torch.float32, device=world.device)
    for number, batch in enumerate(batches):
        world.watchdog.beat(COMPUTE)
        here = batch.to(world.device)
        extra = here.extra if extras is None else {**here.extra, **extras.of_micro_batch(here)}
        loss = engine(
            here.input_ids,
            here.labels,
            loss_function,
            position_ids=here.position_ids,
            record=record,
            extra=extra,
        )
        loss_sum += loss.detach()
        engine.backward(loss * (world.size / num_targets), last=number == len(batches) - 1)
    return loss_sum


def _batches(job: Training, batch: StreamBatch) -> list[MicroBatch]:
    return batches_of(
        batch,
        size=job.recipe.train.micro_batch_size,
        count=job.num_micro_batches,
        document_mask=job.recipe.data.document_mask,
        extra=job.extras.of_rows(batch),
    )


def train_step(job: Training, batch: StreamBatch, step: int) -> StepResult:
    """Do one optimizer step, or none if its numbers cannot be right.

    Args:
        job: The run.
        batch: This rank's rows of the global batch.
        step: Step number, 1 for the first.

    Collective: every rank must call it.
    """
    recipe, engine, world = job.recipe, job.engine, job.world
    optim = recipe.optim
    batches = _batches(job, batch)
    world.watchdog.beat(COMPUTE)
    num_targets = count_targets(batches, world)

    record = LossRecord()
    loss_sum = accumulate(engine, job.method.loss, batches, num_targets, record, job.extras)
    shards = engine.shards
    world.watchdog.beat(AGREEMENT)
    divide_by_weights(engine, job.method.loss, record, num_targets)
    agreed = _agree(job, loss_sum, record)
    mean_loss, method_metrics = summarize_loss(job.method.loss, agreed.sums, num_targets)
    bad = agreed.bad or job.guard.spike(mean_loss, agreed.norm)
    world.watchdog.beat(OPTIMIZER)
    if bad is not None:
        engine.pass_over()
        return StepResult(mean_loss, agreed.norm, 0, agreed.stop, {}, bad)
    job.guard.accept(mean_loss, agreed.norm)
    lr = shards.lr = rate_of(job, step)
    if overrides(job.method, EDITS_GRADIENTS):
        job.method.transform_gradients(shards, step)
        shards.write_gradients()
    shards.freeze(decay=lr * optim.weight_decay)
    grad_norm = engine.step(lr)
    if overrides(job.method, EDITS_PARAMS):
        method_metrics |= job.method.after_step(shards, step)
        shards.write_params()
    if job.restoration is not None:
        method_metrics |= job.restoration.after_step(step)
    return StepResult(mean_loss, grad_norm, num_targets, agreed.stop, method_metrics)


class _Agreed(NamedTuple):
    """What all ranks know of a step before it is done."""

    sums: LossSums
    stop: bool
    bad: str | None
    """Which number is not finite, and where."""
    norm: float
    """Of the whole gradient; 0 where the guard does not ask for it."""


def _agree(job: Training, loss_sum: Tensor, record: LossRecord) -> _Agreed:
    """Share the step's sums, who asks to stop and what is not finite."""
    shards = job.engine.shards
    bad = None if bool(torch.isfinite(loss_sum)) else "the loss"
    if bad is None and (name := shards.non_finite()) is not None:
        bad = f"the gradient of {job.engine.layout.matrix_of(name)}"
    squared = shards.norm_squared() if job.guard.watches_spikes else 0.0
    mine = [float(bad is not None), float(job.world.stop.requested), squared, float(loss_sum)]
    together = torch.cat([torch.tensor(mine, dtype=torch.float64), record.sums().cpu()])
    num_bad, num_stop, squared, total_loss, *sums = job.world.sum(together).tolist()
    where = None
    if num_bad:
        found = job.world.gather_objects(bad)
        # A bad loss spoils the gradients of all ranks; the rank it came from is the one to name.
        named = [rank for rank, text in enumerate(found) if text is not None]
        rank = next((rank for rank in named if found[rank] == "the loss"), named[0])
        where = f"{found[rank]} is not finite on rank {rank}"
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    return _Agreed(LossSums(*sums)._replace(value=total_loss), bool(num_stop), where, norm)


def _evaluate(job: Training) -> None:
    if job.evaluate is None:
        return
    job.engine.set_training(False)
    results = job.evaluate(job.engine)
    job.engine.set_training(True)
    job.metrics.evaluation(job.state.step, job.state.target_tokens, results)


def _lacks_evaluation(job: Training) -> bool:
    """Return whether a resumed run stopped in the measurement of the step it stands at."""
    every = job.recipe.evaluate.every_steps
    step = job.state.step
    due = every is not None and (step % every == 0 or step == job.num_steps)
    return due and not job.world.broadcast(job.metrics.has_evaluation(step))


def _or_save(job: Training, measure: Callable[[Training], None], *, saved_next: bool) -> None:
    """Measure; if that is interrupted, save the step first. The next start measures it again.

    Args:
        job: The run.
        measure: What measures.
        saved_next: Whether the frozen elements of this step were audited already.
    """
    try:
        measure(job)
    except StoppedEarly:
        if not saved_next:
            job.audit.check(job.state.step)
        _save(job)
        job.store.advance(wait=True)
        raise


def pass_gate(job: Training) -> None:
    """Measure what the source model could do, and act on what is lost.

    Collective: every rank must call it.

    Raises:
        RolledBack: The run starts again from an earlier checkpoint.
        RetentionError: The run ends here; its checkpoint is written.
        StoppedEarly: A rank was asked to stop; the next start measures again.
    """
    assert job.measure_retention is not None
    step = job.state.step
    job.engine.set_training(False)
    results = job.measure_retention(job.engine)
    job.engine.set_training(True)
    if job.gate.keeps_good:
        job.store.advance(wait=True)
    action = job.gate.judge(step, results, job.world.broadcast(job.store.steps()))
    if step > 0:
        assert job.gate.state.last is not None
        job.metrics.retention(step, job.gate.state.last)
    if action == "roll_back":
        target = job.gate.state.undone_to
        assert target is not None
        job.store.remove_after(target)
        raise RolledBack(target)
    pin_good(job)
    if action == "stop":
        _save(job)
        job.store.advance(wait=True)
        raise job.gate.ended(step)


def pin_good(job: Training) -> None:
    """Keep the checkpoint that a roll-back would take, and the one of this step if it is good."""
    if not job.gate.keeps_good:
        return
    steps = job.world.broadcast(job.store.steps())
    good = {job.gate.newest_good(steps), job.gate.newest_good([job.state.step])}
    job.store.pinned = frozenset(step for step in good if step is not None)


def _open_gate(job: Training) -> None:
    """Before the first step: measure the source model, or what a start before left unjudged."""
    if job.measure_retention is None:
        return
    pin_good(job)
    if job.gate.lacks(job.state.step, job.num_steps):
        pass_gate(job)
    job.gate.require_open(job.state.step)
    if job.gate.keeps_good and not job.world.broadcast(job.store.steps()):
        _save(job)  # the source model itself is what the first measurement may go back to


def _save(job: Training) -> None:
    job.store.save(job.state, job.engine, job.method.state_dict())


def _refresh_if_due(job: Training) -> None:
    """Let the method measure again before a step; a checkpoint made in between repeats it."""
    every, done = job.method.refresh_steps, job.state.step
    if every is not None and done > 0 and done % every == 0:
        job.refresh(done)
        job.engine.set_training(True)


def train_loop(job: Training) -> RunState:
    """Train to the last step, from wherever ``job.state`` stands.

    Collective: every rank must call it.

    Raises:
        NonFiniteError: Skipping bad steps and going back did not help.
        AuditError: A frozen element changed.
        ConfigError: A penalty is so strong that steps overshoot it.
        StoppedEarly: A rank was asked to stop; a checkpoint was written first.
    """
    train = job.recipe.train
    every = job.recipe.evaluate.every_steps
    job.engine.set_training(True)
    if job.state.step == 0 or _lacks_evaluation(job):
        _evaluate(job)
    _open_gate(job)
    watch = OvershootWatch(job.recipe.method, job.world.broadcast(job.metrics.first_loss()))
    with job.progress as progress:
        while job.state.step < job.num_steps:
            step = job.state.step + 1
            _refresh_if_due(job)
            start = time.perf_counter()
            job.world.watchdog.begin_step(step, ROWS)
            batch = next(job.stream)
            job.world.watchdog.batch(batch.row_ids)
            result = train_step(job, batch, step)
            seconds = time.perf_counter() - start

            if result.bad is not None and climb(job, batch, _batches(job, batch), step, result.bad):
                progress.update(job.state.step, "went back")
                continue
            job.state = replace(
                job.state,
                step=step,
                cursor=batch.cursor,
                target_tokens=job.state.target_tokens + result.num_target_tokens,
                guard=job.guard.state(),
            )
            job.world.watchdog.beat("between steps", slow=True)
            more = {**job.pace.measure(step), **_probe_if_due(job)}
            _log_step(job, result, batch, seconds, more)
            progress.update(step, f"loss {result.loss:.4f}" if result.bad is None else "skipped")
            if result.bad is None:
                watch.look(step, result.loss, result.method_metrics)
            last = step == job.num_steps
            saves = last or step % train.checkpoint_every_steps == 0 or result.stop
            judged = job.gate.is_due(step, job.num_steps)
            saves = saves or (judged and job.gate.keeps_good)
            if saves or step % train.audit_every_steps == 0:
                job.audit.check(step)
            # Measured before it is saved: a run killed in between measures this step again.
            if last or (every is not None and step % every == 0):
                _or_save(job, _evaluate, saved_next=saves)
            if judged:
                _or_save(job, pass_gate, saved_next=saves)
            if saves:
                _save(job)
            job.store.advance(wait=last or result.stop)
            if result.stop and not last:
                raise StoppedEarly(
                    f"stopped on request after step {step} of {job.num_steps}; the checkpoint is"
                    " written, start the same command again to go on."
                )
    return job.state


def _probe_if_due(job: Training) -> Mapping[str, float]:
    """Return what the probe finds after the first, the last and every few steps, else nothing."""
    section, step = job.recipe.evaluate.refusal_probe, job.state.step
    if job.probe is None or section is None:
        return {}
    if step not in (1, job.num_steps) and step % section.every_steps:
        return {}
    job.engine.set_training(False)
    found = job.probe(job.engine)
    job.engine.set_training(True)
    return found


def _log_step(
    job: Training,
    result: StepResult,
    batch: StreamBatch,
    seconds: float,
    more: Mapping[str, float],
) -> None:
    lr = rate_of(job, job.state.step)
    kept = {} if job.measure_retention is None else {"retention/lr_factor": job.gate.lr_factor}
    # A skipped step has no loss that a curve could show.
    measured = {"loss": result.loss, "grad_norm": result.grad_norm} if result.bad is None else {}
    job.metrics.step(
        {
            "step": job.state.step,
            **measured,
            "lr": lr,
            "target_tokens": job.state.target_tokens,
            "step_seconds": seconds,
            "tokens_per_second": result.num_target_tokens / seconds,
            "memory_bytes": memory_bytes(),
            "skipped_steps": job.guard.num_skipped,
            **kept,
            **_checkpoint_metrics(job.store),
            **batch.metrics,
            **{f"method/{name}": value for name, value in result.method_metrics.items()},
            **more,
        }
    )


def _checkpoint_metrics(store: CheckpointStore) -> dict[str, float]:
    """Return what the checkpoint cost that was published since the last step, if one was."""
    return {
        f"checkpoint/{name}": value
        for report in store.take_reports()
        for name, value in (
            ("stall_seconds", report.stall_seconds),
            ("total_seconds", report.total_seconds),
            ("waited_seconds", report.waited_seconds),
            ("num_waits", store.num_waits),
        )
    }
