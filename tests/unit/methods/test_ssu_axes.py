"""SSU along rows and elements: worked numbers, plans against dense scores, controls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from forgetscale.api import ParamShard
from forgetscale.config import SsuMethodConfig, validate_recipe
from forgetscale.errors import ConfigError
from forgetscale.masks import unpack_bits
from forgetscale.methods import METHODS
from forgetscale.methods.ssu.elements import choose_elements, element_scores, random_keys
from forgetscale.methods.ssu.rows import row_scores
from forgetscale.methods.ssu.targets import Target, find_targets
from forgetscale.ops.importance import select_frozen

WEIGHT = torch.tensor([[1.0, 3, 0, 2], [1, 0, 2, 2], [1, 0, 0, 2], [1, 0, 0, 2]])
TOKENS = torch.tensor([[3.0, 1, 2, 1], [4, 2, 2, 1], [0, 2, 1, 1]]).double()
TARGET = Target("w.weight", "w", (4, 4), False)


class TwoSlices:
    """A tensor in two slices that a row border does not separate, and sums over one rank."""

    def __init__(self, name: str, weight: torch.Tensor, cut: int) -> None:
        self._name, self._shape, self._flat, self._cut = name, weight.shape, weight.flatten(), cut

    def __iter__(self):
        for start, end in ((0, self._cut), (self._cut, self._flat.numel())):
            part = self._flat[start:end]
            yield ParamShard(self._name, tuple(self._shape), start, None, part)

    def all_reduce_sum(self, value):
        return value


def config(**settings) -> SsuMethodConfig:
    recipe = {
        "run": {"name": "a", "output_dir": "o"},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "method": {"kind": "ssu", "calibration": {"path": "unused"}, **settings},
        "train": {"num_steps": 1},
        "deepspeed": "x",
    }
    method = validate_recipe(recipe).method
    assert isinstance(method, SsuMethodConfig)
    return method


def plan_of(calibration, **settings):
    return METHODS["ssu"](config(**settings)).prepare(calibration)


def inputs_of(model, ids) -> dict[str, torch.Tensor]:
    """Return each linear layer's real inputs, ``[tokens, in]`` in fp64."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: found.__setitem__(name, args[0].double().flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("paper", [17.4641, 14.4641, 8.4641, 8.4641]),
        ("official", [3.7417, 3, 2.2361, 2.2361]),
        ("mag_l2", [3.7417, 3, 2.2361, 2.2361]),
        ("mag_l1", [6, 5, 3, 3]),
    ],
)
def test_worked_rows(rule: str, expected: list[float]):
    norm = TOKENS.square().sum(0).sqrt()
    calibration = SimpleNamespace(shards=lambda: SoloShards())
    scores = row_scores(calibration, [TARGET], {"w.weight": norm}, rule)["w.weight"]
    assert scores.tolist() == pytest.approx(expected, abs=5e-5)
    # The third and fourth row are equal: the lower one is frozen.
    assert select_frozen(scores, 0.75).tolist() == [0, 1, 2]


class SoloShards:
    """The worked matrix on one rank."""

    def __iter__(self):
        yield ParamShard("w.weight", (4, 4), 0, None, WEIGHT.flatten())

    def all_reduce_sum(self, value):
        return value


def test_worked_elements():
    norm, mean_square = TOKENS.square().sum(0).sqrt(), TOKENS.square().mean(0)
    paper = element_scores(WEIGHT.flatten(), 0, norm, "paper")
    assert torch.allclose(paper.view(4, 4), WEIGHT * norm.float())
    official = element_scores(WEIGHT.flatten(), 0, mean_square, "official")
    assert torch.allclose(official.view(4, 4), WEIGHT * (1 + mean_square.float()))
    assert torch.equal(element_scores(-WEIGHT.flatten(), 0, None, "mag_l1"), WEIGHT.flatten())
    part = element_scores(WEIGHT.flatten()[5:11], 5, norm, "paper")
    assert torch.equal(part, paper[5:11])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_elements_over_slices_equal_a_full_sort(scope: str):
    weight = torch.randint(-3, 4, (7, 5)).float()
    bits = choose_elements(
        TwoSlices("w", weight, 13),
        {"w": 35},
        lambda size: size // 2,
        lambda shard: shard.param.abs(),
        scope=scope,
    )
    order = torch.argsort(weight.abs().flatten(), descending=True, stable=True)[:17]
    found = sum(unpack_bits(part, 0, 35) for part in bits.values())
    # The two slices are two ranks' parts here: the second replaces the first in the dict.
    assert found.nonzero().flatten().tolist() == sorted(p for p in order.tolist() if p >= 13)


class TestPlans:
    def test_rows_of_the_paper(self, calibration, body, ids):
        plan = plan_of(calibration, axis="row")
        inputs = inputs_of(body, ids)
        for name in ("left", "right", "extra"):
            weight = body.get_submodule(name).weight.detach().double()
            scores = weight.abs() @ inputs[name].square().sum(0).sqrt()
            assert torch.equal(plan.rows[f"{name}.weight"], select_frozen(scores.float(), 0.5))
        assert not plan.elements and plan.provenance["axis"] == "row"

    def test_official_rows_look_at_no_activations(self, calibration, body):
        plan = plan_of(calibration, axis="row", score="official", vectors="train")
        assert calibration.passes == 0 and not plan.columns
        for name, rows in plan.rows.items():
            scores = body.get_parameter(name).detach().norm(dim=1)
            assert torch.equal(rows, select_frozen(scores, 0.5))

    @pytest.mark.parametrize("rule", ["paper", "official", "mag_l1"])
    def test_elements(self, calibration, body, ids, rule: str):
        plan = plan_of(calibration, axis="element", score=rule, frozen_fraction=0.3)
        inputs = inputs_of(body, ids)
        for name in ("left", "right", "extra"):
            weight = body.get_submodule(name).weight.detach().double().abs()
            x = inputs[name]
            factor = {
                "paper": x.square().sum(0).sqrt(),
                "official": 1 + x.square().mean(0),
                "mag_l1": torch.ones(x.shape[1]).double(),
            }[rule]
            expected = select_frozen((weight * factor).float().flatten(), 0.3)
            found = unpack_bits(plan.elements[f"{name}.weight"], 0, weight.numel())
            assert torch.equal(found.nonzero().flatten(), expected)
        assert not plan.rows

    def test_global_elements_freeze_the_fraction_of_all_matrices(self, calibration, body):
        plan = plan_of(calibration, axis="element", score="mag_l2", scope="global")
        names = [t.name for t in find_targets(body) if not t.is_vector]
        assert list(plan.elements) == names
        weights = torch.cat([body.get_parameter(n).detach().flatten() for n in names])
        found = torch.cat(
            [unpack_bits(plan.elements[n], 0, body.get_parameter(n).numel()) for n in names]
        )
        expected = select_frozen(weights.abs(), 0.5)
        assert torch.equal(found.nonzero().flatten(), expected)

    @pytest.mark.parametrize("axis", ["row", "element"])
    def test_vectors_and_shields_are_those_of_columns(self, calibration, axis: str):
        settings = {"score": "paper", "shield_token_ids": [2]}
        plan, columns = (plan_of(calibration, axis=a, **settings) for a in (axis, "column"))
        vectors = {"left.bias", "norm.weight"}
        assert set(plan.columns) == vectors
        assert all(torch.equal(plan.columns[n], columns.columns[n]) for n in vectors)
        assert plan.rows["embed.weight"].tolist() == plan.rows["lm_head.weight"].tolist() == [2]

    @pytest.mark.parametrize("axis", ["row", "element"])
    def test_random_draws_need_no_data_and_depend_on_the_seed(self, calibration, axis: str):
        plans = []
        for seed in (3, 3, 4):
            calibration.seed = seed
            plans.append(plan_of(calibration, axis=axis, score="rand").content_hash())
        assert calibration.passes == 0
        assert plans[0] == plans[1] != plans[2]

    @pytest.mark.parametrize("axis", ["row", "element"])
    def test_nothing_and_everything(self, calibration, body, axis: str):
        shapes = {n: tuple(p.shape) for n, p in body.named_parameters()}
        planned = sum(torch.Size(t.shape).numel() for t in find_targets(body))
        for fraction, expected in ((0.0, 0), (1.0, planned)):
            plan = plan_of(calibration, axis=axis, score="mag_l2", frozen_fraction=fraction)
            plan.check_model(shapes)
            assert plan.num_frozen(shapes) == expected


def test_random_keys_do_not_depend_on_the_cut():
    whole = random_keys("w", 0, 5000, 1, torch.device("cpu"))
    parts = [random_keys("w", s, 500, 1, torch.device("cpu")) for s in range(0, 5000, 500)]
    assert torch.equal(torch.cat(parts), whole)
    assert int(whole.min()) >= 0 and whole.dtype == torch.int32
    assert whole.unique().numel() > 4990
    # Uniform: each eighth of the range holds an eighth of the keys, within five deviations.
    counts = torch.bincount(whole >> 28, minlength=8)
    assert int((counts - 625).abs().max()) < 5 * (5000 / 8 * 7 / 8) ** 0.5
    for other in (random_keys("v", 0, 5000, 1, whole.device), random_keys("w", 0, 5000, 2, "cpu")):
        assert int((other == whole).sum()) < 5


@pytest.mark.parametrize("axis", ["column", "row"])
def test_only_elements_are_ranked_over_all_matrices(axis: str):
    with pytest.raises(ConfigError, match=f"scope global .* axis must be element, got {axis}"):
        config(axis=axis, scope="global")
