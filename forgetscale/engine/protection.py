"""What of the source model moves in a run: a freeze plan, or factors beside weights that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from forgetscale.api import Method
from forgetscale.config import Recipe
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.plans import settle_plan
from forgetscale.engine.start import SourceModel
from forgetscale.errors import ConfigError
from forgetscale.masks import AdapterPair, FreezePlan, factor_shapes
from forgetscale.zero3 import World


@dataclass(frozen=True, slots=True)
class Protection:
    """What stays and what is trained.

    Args:
        plan: What may not change, in names of the source model; None where everything is trained.
            With an adapter it holds every parameter whole.
        adapters: Adapted matrix -> its factors; empty without an adapter.
    """

    plan: FreezePlan | None
    adapters: Mapping[str, AdapterPair] = field(default_factory=dict)

    def plan_hash(self) -> str | None:
        """Return the hash of what may not change."""
        return None if self.plan is None else self.plan.content_hash()

    def unmerged(self) -> FreezePlan | None:
        """Return what an export must hold bit by bit: the plan without matrices it changes."""
        if self.plan is None or not self.adapters:
            return self.plan
        return FreezePlan(whole=self.plan.whole - set(self.adapters))

    def describe(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Return a line for the log."""
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        if self.adapters:
            trained = sum(torch.Size(s).numel() for s in factor_shapes(self.adapters).values())
            return (
                f"model: {total:,} parameters, all frozen; adapter: {trained:,} trained"
                f" ({trained / total:.2%}) beside {len(self.adapters)} matrices"
            )
        if self.plan is None:
            return f"model: {total:,} parameters, all trained"
        frozen = self.plan.num_frozen(shapes)
        return f"model: {total:,} parameters, {frozen:,} frozen ({frozen / total:.1%})"


def adapted(
    plan: FreezePlan | None,
    adapters: Mapping[str, AdapterPair],
    shapes: Mapping[str, tuple[int, ...]],
) -> Protection:
    """Return the protection of a method's plan and the recipe's adapter.

    Args:
        plan: Plan of the method, or None.
        adapters: From ``find_adapters``.
        shapes: Parameter shapes of the source model.

    Raises:
        ConfigError: There are both.
    """
    if not adapters:
        return Protection(plan)
    if plan is not None:
        raise ConfigError(
            "adapter: the method made a freeze plan, but an adapter leaves every weight as it is;"
            " remove adapter or choose a method without a plan."
        )
    return Protection(FreezePlan(whole=frozenset(shapes)), adapters)


def settle_protection(
    recipe: Recipe, world: World, source: SourceModel, method: Method, log: RunLog
) -> Protection:
    """Return what the run trains; the plan is made, read or taken from before.

    Collective: every rank must call it.

    Raises:
        ConfigError: Plan or adapter do not fit the model.
    """
    adapters = find_adapters(recipe, source.skeleton)
    plan = settle_plan(recipe, world, source, method, log)
    return adapted(plan, adapters, source.shapes)
