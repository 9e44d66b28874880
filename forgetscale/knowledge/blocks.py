"""One block of two or more models: its bits, its scores, and what each variant drops of it.

Shape letters: S elements of a block, W elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetscale.errors import DataError
from forgetscale.knowledge.edits import Drop, Ranking
from forgetscale.knowledge.pairs import Entry
from forgetscale.knowledge.setup import Setup
from forgetscale.masks.radix import RunningCut
from forgetscale.ops.noise import element_keys

_DRAW_BITS = 31


def wide_type(*types: torch.dtype) -> torch.dtype:
    """Return the type an edit is computed in: fp32 for 16-bit weights, else fp64."""
    return torch.float64 if {torch.float32, torch.float64} & set(types) else torch.float32


class Block:
    """A range of one tensor in all models; values are computed when they are first asked for.

    Args:
        setup: Opened inputs.
        number: Which entry.
        start: First element.
        length: Elements.
    """

    def __init__(self, setup: Setup, number: int, start: int, length: int) -> None:
        self.setup = setup
        self.entry: Entry = setup.entries[number]
        self.number, self.start, self.length = number, start, length
        self.source: Tensor = setup.source.read(self.entry.source_name, start, length)
        self._tuned: dict[int, Tensor] = {}
        self._keys: dict[Ranking, Tensor] = {}

    def tuned(self, model: int) -> Tensor:
        """Return the stored values of a tuned model."""
        if model not in self._tuned:
            name = self.setup.tuned_names[model][self.entry.key]
            self._tuned[model] = self.setup.tuned[model].read(name, self.start, self.length)
        return self._tuned[model]

    def delta(self, model: int) -> Tensor:
        """Return tuned minus source, in the type an edit is computed in."""
        wide = wide_type(self.source.dtype, self.tuned(model).dtype)
        return self.tuned(model).to(wide) - self.source.to(wide)

    def keys(self, ranking: Ranking) -> Tensor:
        """Return ``[S]`` int32 keys >= 0 in the order of the scores."""
        if ranking not in self._keys:
            self._keys[ranking] = self._score(ranking)
        return self._keys[ranking]

    def _score(self, ranking: Ranking) -> Tensor:
        if ranking.score == "random":
            return element_keys(ranking.seed, self.entry.key, self.start, self.length)
        # Copies, so that the rest works in place: fewer temporaries pass through the cache.
        kind = torch.bfloat16 if ranking.narrow else torch.float32
        before = self.source.to(kind, copy=True)
        change = self.tuned(ranking.model).to(kind, copy=True).sub_(before).abs_()
        if ranking.score == "relative":
            score = change.div_(before.abs_().add_(ranking.eps))
        elif ranking.score == "absolute":
            score = change
        elif ranking.score == "base":
            score = before.abs_()
        else:
            fisher, names = self.setup.fisher, self.setup.fisher_names
            assert fisher is not None
            weight = fisher.read(names[self.entry.key], self.start, self.length)
            score = change.square_().mul_(weight.float())
        return score.float().view(torch.int32)

    def require_finite(self) -> None:
        """Check all models' values.

        Raises:
            DataError: A value is NaN or infinite; the message names model, tensor and place.
        """
        folders = [self.setup.source.directory]
        values = [self.source]
        for model, weights in enumerate(self.setup.tuned):
            folders.append(weights.directory)
            values.append(self.tuned(model))
        for folder, part in zip(folders, values, strict=True):
            bad = (~torch.isfinite(part)).nonzero()
            if bad.numel():
                raise DataError(
                    f"{folder}: element {self.start + int(bad[0])} of {self.entry.name} is"
                    f" {float(part[bad[0]])}; the model is damaged, nothing was written."
                )


@dataclass(slots=True)
class Cutter:
    """The cuts of a part of work, applied block by block in canonical order.

    Args:
        setup: Opened inputs.
        running: (cut, group) -> its threshold and what is left of equal elements.
    """

    setup: Setup
    running: Mapping[tuple[int, str], RunningCut]

    def taken(self, block: Block) -> dict[int, Tensor]:
        """Return, for every cut, which elements of the block it takes."""
        plan = self.setup.plan
        found = {}
        for number, cut in enumerate(plan.cuts):
            ranking = plan.rankings[cut.ranking]
            group = block.entry.group(ranking.scope)
            found[number] = self.running[number, group].take(block.keys(ranking))
        return found


def probabilities(drop: Drop, block: Block, model: int) -> Tensor | float:
    """Return the probability of dropping each element: one number, or ``[S]``."""
    if drop.kind != "draw_ranked":
        return float(drop.rate)
    rows = block.delta(model).abs().view(-1, block.entry.width)
    # Rank 0 is the smallest change of a row; of equal ones the earlier element.
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).double().view(-1)
    low = float(drop.rate - drop.spread)
    return low + 2 * float(drop.spread) * (1 - ranks / max(block.entry.width - 1, 1))


def dropped(drop: Drop, block: Block, model: int, taken: Mapping[int, Tensor]) -> Tensor | None:
    """Return which elements of a block a variant drops of one model; None for none."""
    if drop.kind == "none":
        return None
    if drop.kind == "cut":
        return taken[drop.cuts[0]]
    if drop.kind == "outside":
        return ~taken[drop.cuts[0]]
    if drop.kind == "outside_band":
        return taken[drop.cuts[0]] | ~taken[drop.cuts[1]]
    draws = element_keys(drop.seed, block.entry.key, block.start, block.length)
    if drop.kind == "draw":
        limit = math.floor(drop.rate * (1 << _DRAW_BITS))
        return draws.to(torch.int64) < limit
    chance = probabilities(drop, block, model)
    return draws.double() < chance * float(1 << _DRAW_BITS)
