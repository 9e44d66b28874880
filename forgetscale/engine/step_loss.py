"""What a step's loss is divided by, and what its weights did."""

from __future__ import annotations

from forgetscale.ops.losses import LossFunction, LossRecord, LossSums, TokenLoss
from forgetscale.zero3 import ZeroEngine


def divide_by_weights(
    engine: ZeroEngine, loss: LossFunction, record: LossRecord, num_targets: int
) -> None:
    """Turn gradients of a mean over target tokens into those of a mean over their weights.

    Does nothing unless the loss asks for it.

    The sum of weights over all ranks is known after the last micro-batch only. Weights carry no
    gradient, so the right gradient is the one already there times one number, and no second pass
    over the data is needed. Without any weight the gradient is zero and stays so.

    Args:
        engine: The model, after the step's last backward.
        loss: The step's loss.
        record: This rank's sums.
        num_targets: What the loss was divided by.

    Collective: every rank must call it.
    """
    if not isinstance(loss, TokenLoss) or loss.normalize == "tokens":
        return
    weight = LossSums(*engine.world.sum(record.sums().cpu()).tolist()).weight
    if weight > 0:
        for shard in engine.shards:
            if shard.grad is not None:
                shard.grad.mul_(num_targets / weight)
        engine.shards.write_gradients()


def summarize_loss(
    loss: LossFunction, sums: LossSums, num_targets: int
) -> tuple[float, dict[str, float]]:
    """Return a step's mean loss in nats, and for losses that weigh tokens what the weights did.

    Args:
        loss: The step's loss.
        sums: Over all ranks.
        num_targets: Target tokens of the step over all ranks, > 0.
    """
    mean = sums.value / num_targets
    if not isinstance(loss, TokenLoss) or not loss.gates:
        return mean, {}
    if loss.normalize == "weights":
        mean = sums.value / sums.weight if sums.weight > 0 else 0.0
    return mean, {
        "mean_gate": sums.weight / num_targets,
        "gated_fraction": sums.num_gated / num_targets,
        "cross_entropy": sums.nll / num_targets,
    }
