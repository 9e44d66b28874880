"""AlignGuard-LoRA, EWC-LoRA and L2-SP on the update of an adapter.

The penalty is a function of the update that is applied, ``s B A``. Its gradient is added to the
factors' reduced gradients once a step, in closed form: autograd through gathered factors would keep
copies that ZeRO-3 has taken away before backward. Communication a step: the factors, ``r (O + I)``
numbers a matrix; for ``vector`` m coefficients and, as for a diagonal, the factors' gradients.

``prox`` and ``project_update`` of a one-sided basis act on one factor: ``dW - U f(U^T dW)`` is
``(B - U f(U^T B)) A``, so the exact step on the update is the same step on ``B``, on slices, and
the update keeps its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from forgetscale.api import Calibration, ParamShard, ShardSet, Unprotected
from forgetscale.config import (
    STRUCTURES_OF,
    AlignguardLoraMethodConfig,
    EwcLoraMethodConfig,
    L2SpLoraMethodConfig,
)
from forgetscale.errors import ConfigError
from forgetscale.masks import AdapterPair
from forgetscale.methods.adapter_forms import (
    DiagonalForm,
    Factors,
    Form,
    LeftForm,
    NoDirections,
    RightForm,
    TwoSidedForm,
    VectorForm,
    norm_pull,
)
from forgetscale.methods.anchored import require_same_state
from forgetscale.methods.fisher.refresh import KnownFisher
from forgetscale.methods.fisher.targets import match_targets, matches
from forgetscale.ops.collisions import Collision, collision_pull
from forgetscale.projections import (
    Anchor,
    FrameMetric,
    Guard,
    LeftFrame,
    Onto,
    Place,
    RightFrame,
    find_cut_rows,
    project_,
    shrink_,
)

Config = AlignguardLoraMethodConfig | EwcLoraMethodConfig | L2SpLoraMethodConfig


class AdapterAnchor(Unprotected):
    """Hold the update of every adapted matrix near zero, as a form of it says.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._action = getattr(config, "action", "penalty")
        self._fisher = KnownFisher(config, self._needed) if self._needed else None
        self._forms: dict[str, Form] | None = None
        self._guards: list[Guard] = []
        self._found: dict[str, float] = {}

    # ---- what is held -------------------------------------------------------------------

    @property
    def _needed(self) -> list[str]:
        config = self._config
        if isinstance(config, L2SpLoraMethodConfig):
            return []
        if isinstance(config, EwcLoraMethodConfig):
            return ["diagonal"]
        wanted = set(STRUCTURES_OF[config.reading])
        if config.collision is not None and config.collision.metric == "diagonal":
            wanted.add("diagonal")
        return sorted(wanted)

    def prepare(self, calibration: Calibration) -> None:
        """Settle the Fisher basis; there is no freeze plan. Collective."""
        match_targets(calibration.structure, self._config.target_modules)
        if self._fisher is not None:
            self._fisher.prepare(calibration)

    @property
    def refresh_steps(self) -> int | None:
        """Return the steps between two estimates."""
        return None if self._fisher is None else self._fisher.every

    def refresh(self, calibration: Calibration, step: int) -> None:
        """Measure again; forms are made anew at the next step."""
        assert self._fisher is not None
        self._fisher.refresh(calibration, step)
        self._forms = None

    def _held(self, shards: ShardSet) -> list[AdapterPair]:
        names = self._config.target_modules
        found = [
            pair
            for pair in shards.adapters.values()
            if names is None or matches(pair.module, names)
        ]
        if not found:
            raise ConfigError(
                f"method.target_modules {list(names or ())} names no adapted layer (adapter has"
                f" {len(shards.adapters)}); name layers of adapter.target_modules."
            )
        return found

    def _settle(self, shards: ShardSet) -> dict[str, Form]:
        """Return the forms by matrix, made when slices are first seen. Collective."""
        if self._forms is None:
            self._forms = {pair.matrix: self._form(pair, shards) for pair in self._held(shards)}
            if self._action != "penalty":
                mine = {shard.name: shard for shard in shards}
                pairs = self._held(shards)
                self._guards = [self._guard(pair, mine, shards) for pair in pairs]
        return self._forms

    def _form(self, pair: AdapterPair, shards: ShardSet) -> Form:
        config, name = self._config, pair.matrix
        if isinstance(config, L2SpLoraMethodConfig):
            return NoDirections(config.strength / 2)
        assert self._fisher is not None
        basis = self._fisher.basis
        height, width = pair.shape
        rows = slice(height * shards.rank // shards.size, height * (shards.rank + 1) // shards.size)
        first, count = rows.start * width, (rows.stop - rows.start) * width
        if isinstance(config, EwcLoraMethodConfig):
            diagonal = basis.read("diagonal", name, first, count).view(-1, width)
            return DiagonalForm(diagonal, rows, config.strength / 2)
        strengths = config.strength, config.task_strength
        if config.reading == "left":
            return LeftForm(basis.side("left", name), basis.values("left", name), *strengths)
        if config.reading == "right":
            return RightForm(basis.side("right", name), basis.values("right", name), *strengths)
        if config.reading == "two_sided":
            left, right = basis.side("left", name), basis.side("right", name)
            return TwoSidedForm(left, right, basis.grid(name), *strengths)
        directions = basis.read("vector", name, first, count)
        return VectorForm(directions, rows, basis.values("vector", name), *strengths)

    def _guard(self, pair: AdapterPair, mine: Mapping[str, ParamShard], shards: ShardSet) -> Guard:
        """Return the guard of the one factor that a one-sided form acts on."""
        assert self._forms is not None
        form = self._forms[pair.matrix]
        left = isinstance(form, LeftForm)
        shard = mine[pair.lora_B if left else pair.lora_A]
        place = Place(shard.shape, shard.start, shard.param.numel())
        assert isinstance(form, LeftForm | RightForm)
        basis = form.basis.to(shard.param)
        if left:
            frame: LeftFrame | RightFrame = LeftFrame(place, basis)
        else:
            frame = RightFrame(place, basis, find_cut_rows(place, shards.all_reduce_sum))
        metric = FrameMetric(frame, form.strength * form.values, form.outside)
        return Guard(shard.name, place, Anchor(), metric, Onto(frame))

    # ---- the step -----------------------------------------------------------------------

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Add the penalty's gradient (action ``penalty``). Collective."""
        if self._action == "penalty":
            self._look(shards, add=True)

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Shrink or project the update; return what was found. Collective."""
        self._settle(shards)
        if self._action != "penalty":
            wanted = {guard.name for guard in self._guards}
            params = {shard.name: shard.param for shard in shards if shard.name in wanted}
            # Measured on the update before it is shrunk or projected.
            self._look(shards, add=False)
            if self._action == "prox":
                shrink_(self._guards, params, shards.all_reduce_sum, shards.lr)
            else:
                project_(self._guards, params, shards.all_reduce_sum)
        return self._found

    def _look(self, shards: ShardSet, *, add: bool) -> None:
        """Measure the form of every matrix; add its gradients if asked to."""
        forms = self._settle(shards)
        pairs = self._held(shards)
        whole = {pair.matrix: _gather(pair, shards) for pair in pairs}
        for name, form in forms.items():
            form.move(whole[name].a.device)
        totals = _sum_sketches(forms, whole, shards)
        square, value, inside = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        pulls: dict[str, Tensor] = {}
        for pair in pairs:
            form, factors = forms[pair.matrix], whole[pair.matrix]
            energies = form.energies(factors, totals[pair.matrix])
            norm, of_a, of_b = norm_pull(factors, form.outside)
            square += norm.double().cpu()
            value += form.value(energies, norm).double().cpu()
            inside += energies.sum().double().cpu()
            if add:
                found = form.pull(factors, totals[pair.matrix])
                if form.shared:
                    found = _sum_pair(*found, shards)
                pulls[pair.lora_A], pulls[pair.lora_B] = found[0] + of_a, found[1] + of_b
        self._found = {"penalty": float(value), "change_norm": float(square.sqrt())}
        if self._leaks:
            self._found["leak"] = float((inside / square).sqrt()) if square > 0 else 0.0
        if add:
            self._add_collisions(pairs, whole, pulls)
            self._inject(shards, pulls)

    @property
    def _leaks(self) -> bool:
        return isinstance(self._config, AlignguardLoraMethodConfig)

    def _add_collisions(
        self,
        pairs: list[AdapterPair],
        whole: Mapping[str, Factors],
        pulls: dict[str, Tensor],
    ) -> None:
        section = getattr(self._config, "collision", None)
        if section is None:
            return
        options = Collision(section.alpha, section.beta, section.tau, section.temperature)
        share = section.strength / len(pairs)
        total = 0.0
        for pair in pairs:
            form = (self._forms or {})[pair.matrix]
            assert isinstance(form, LeftForm | RightForm)
            side: Literal["left", "right"] = "left" if isinstance(form, LeftForm) else "right"
            metric = partial(self._metric_rows, pair, side) if section.metric != "none" else None
            factors = whole[pair.matrix]
            found = collision_pull(side, form.basis, *factors, options, metric)
            total += share * float(found.value)
            pulls[pair.lora_A] = pulls[pair.lora_A] + share * found.lora_a
            pulls[pair.lora_B] = pulls[pair.lora_B] + share * found.lora_b
        self._found["collision"] = total

    def _metric_rows(self, pair: AdapterPair, side: str, rows: slice) -> Tensor:
        """Return rows (columns for ``right``, turned) of the diagonal Fisher information."""
        assert self._fisher is not None and self._forms is not None
        basis = self._fisher.basis
        height, width = pair.shape
        device = self._forms[pair.matrix].values.device
        if side == "left":
            count = (rows.stop - rows.start) * width
            part = basis.read("diagonal", pair.matrix, rows.start * width, count)
            return part.view(-1, width).to(device)
        whole = basis.read("diagonal", pair.matrix, 0, height * width)
        return whole.view(height, width)[:, rows].t().to(device)

    def _inject(self, shards: ShardSet, pulls: Mapping[str, Tensor]) -> None:
        squares = torch.zeros(2, dtype=torch.float64)
        for shard in shards:
            if shard.name not in pulls or shard.grad is None:
                continue
            part = pulls[shard.name].reshape(-1)[shard.start : shard.start + shard.grad.numel()]
            part = part.to(shard.grad.device)
            both = torch.stack([part.square().sum(), shard.grad.square().sum()])
            squares += both.double().cpu()
            shard.grad.add_(part)
        pull, task = shards.all_reduce_sum(squares).sqrt().tolist()
        self._found |= {"penalty_grad_norm": pull, "task_grad_norm": task}

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the protection, and which estimate is in use."""
        refreshed = {} if self._fisher is None else self._fisher.state()
        return {**self._identity(), **refreshed}

    def _identity(self) -> dict[str, Any]:
        basis = "" if self._fisher is None else self._fisher.first_hash
        return {"fisher basis": basis, "held": list(self._config.target_modules or ())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint was made under the same protection; open its estimate."""
        rest = dict(state) if self._fisher is None else self._fisher.load(state)
        require_same_state(rest, self._identity())
        self._forms = None


def _gather(pair: AdapterPair, shards: ShardSet) -> Factors:
    found = shards.gather([pair.lora_A, pair.lora_B])
    return Factors(found[pair.lora_A], found[pair.lora_B], pair.scale)


def _sum_sketches(
    forms: Mapping[str, Form], whole: Mapping[str, Factors], shards: ShardSet
) -> dict[str, Tensor]:
    """Sum the sketches of all matrices over ranks in one call, where there are any."""
    parts = {name: form.sketch(whole[name]) for name, form in forms.items()}
    flat = torch.cat(list(parts.values()))
    if flat.numel():
        flat = shards.all_reduce_sum(flat)
    shares = torch.split(flat, [part.numel() for part in parts.values()])
    return dict(zip(parts, shares, strict=True))


def _sum_pair(of_a: Tensor, of_b: Tensor, shards: ShardSet) -> tuple[Tensor, Tensor]:
    flat = shards.all_reduce_sum(torch.cat([of_a.reshape(-1), of_b.reshape(-1)]))
    return flat[: of_a.numel()].view_as(of_a), flat[of_a.numel() :].view_as(of_b)
