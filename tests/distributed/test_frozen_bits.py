"""Frozen elements keep the source's bits, everything else moves: all sizes, types and offload."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.compare import assert_same_weights
from tests.distributed.runs import MASKED, SSU, Run, Runs
from tests.distributed.tiny import VOCAB_SIZE, set_rows

NORMS = ("norm.weight", "layernorm.weight")
# ranks, working type, offload
SETTINGS = [
    (1, "float32", False),
    (2, "float32", False),
    (3, "float32", False),
    (2, "float32", True),
    (2, "bfloat16", False),
    (2, "bfloat16", True),
    (3, "bfloat16", False),
]
# Plans of other axes: one setting of each kind.
FEWER = [SETTINGS[3], SETTINGS[6]]
METHODS = {
    "ssu": SSU,
    "masked": MASKED,
    "hft": {"kind": "hft"},
    "row": {**SSU, "axis": "row"},
    "row-masked": {**MASKED, "axis": "row"},
    "element": {**SSU, "axis": "element"},
    "lota": {"kind": "lota", "num_trial_steps": 2, "trial_lr": 1e-3},
    "s2ft": {"kind": "s2ft", "trainable_fraction": 0.3, "ends": "freeze"},
    "element-global": {"kind": "ssu", "axis": "element", "scope": "global", "score": "rand"},
}
CASES = [
    (method, *setting) for method in METHODS for setting in (SETTINGS if method == "ssu" else FEWER)
]


def run_of(runs: Runs, method: dict | str, size: int, dtype: str, offload: bool) -> Run:
    if dtype == "float32":
        return runs.get(method, size, offload=offload)
    world = runs.world("bf16", dtype=torch.bfloat16)
    return runs.get(method, size, offload=offload, world=world, model__dtype=dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bytes(a.contiguous().view(torch.uint8).flatten().tolist()) == (
        bytes(b.contiguous().view(torch.uint8).flatten().tolist())
    )


@pytest.mark.parametrize(("method", "size", "dtype", "offload"), CASES)
def test_frozen_bits_are_the_sources(runs: Runs, method, size, dtype, offload):
    run = run_of(runs, METHODS[method], size, dtype, offload)
    assert run.recipe["optim"]["weight_decay"] > 0
    count = 0
    for name, frozen in run.frozen.items():
        source = run.source[name]
        assert same_bits(run.export[name][frozen], source[frozen]), name
        assert same_bits(run.outcome.value["working"][name][frozen], source[frozen]), name
        assert same_bits(run.masters[name][frozen], source[frozen].float()), name
        count += int(frozen.sum())
    assert count > 0.3 * sum(w.numel() for w in run.source.values())


@pytest.mark.parametrize(("method", "size", "dtype", "offload"), CASES)
def test_everything_else_moves(runs: Runs, method, size, dtype, offload):
    run = run_of(runs, METHODS[method], size, dtype, offload)
    for name, frozen in run.frozen.items():
        if bool(frozen.all()):
            continue
        moved = run.masters[name] != run.source[name].float()
        # Rows of tokens that never occur have no gradient, but they decay.
        # A single one may come back to its old value by chance.
        assert moved[~frozen].float().mean() > 0.999, name


@pytest.mark.parametrize("method", ["ssu", "masked", "hft", "sft"])
def test_offload_changes_nothing_but_rounding(runs: Runs, method: str):
    with_, without = runs.get(method, 2, offload=True), runs.get(method, 2)
    assert with_.losses == pytest.approx(without.losses, rel=1e-6)
    norms = [[line["grad_norm"] for line in run.metrics] for run in (with_, without)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert_same_weights(with_.masters, without.masters)


class TestNeutralSettings:
    @pytest.mark.parametrize("size", [1, 2])
    def test_fraction_0_is_sft_exactly(self, runs: Runs, size: int):
        ssu = runs.get({"kind": "ssu", "frozen_fraction": 0.0}, size)
        sft = runs.get("sft", size)
        assert ssu.losses == sft.losses
        for name, weight in sft.masters.items():
            assert same_bits(ssu.masters[name], weight), name

    def test_fraction_1_freezes_the_body(self, runs: Runs):
        run = runs.get({"kind": "ssu", "frozen_fraction": 1.0}, 2)
        for name, source in run.source.items():
            if "embed_tokens" in name or "lm_head" in name:
                assert (run.masters[name] != source).float().mean() > 0.999
            else:
                assert same_bits(run.export[name], source), name

    def test_layout_of_ranks_does_not_matter_for_frozen_bits(self, runs: Runs):
        plans = [runs.get("ssu", size).plan for size in (1, 2, 3)]
        for plan in plans[1:]:
            assert set(plan) == set(plans[0])
            assert all(torch.equal(plan[key], plans[0][key]) for key in plan)


class TestVectors:
    def test_elementwise_freezes_half_of_each_vector(self, runs: Runs):
        run = runs.get("ssu", 2)
        vectors = [name for name, w in run.source.items() if w.dim() == 1]
        assert len(vectors) == 2 * 4 + 1
        for name in vectors:
            assert int(run.frozen[name].sum()) == run.source[name].numel() // 2

    def test_train_moves_every_element(self, runs: Runs):
        run = runs.get({**SSU, "vectors": "train"}, 2)
        for name, source in run.source.items():
            if source.dim() == 1:
                assert f"columns/{name}" not in run.plan
                assert (run.masters[name] != source).all(), name

    def test_freeze_takes_them_out_of_the_optimizer(self, runs: Runs):
        run = runs.get({**SSU, "vectors": "freeze"}, 2)
        vectors = {name for name, w in run.source.items() if w.dim() == 1}
        assert set(run.whole) == vectors
        assert vectors.isdisjoint(run.outcome.value["trained"])
        assert all(same_bits(run.export[name], run.source[name]) for name in vectors)


def test_one_ranking_over_all_matrices_trains_in_the_compact_layout(runs: Runs):
    # Matrices are frozen at different shares here, some of them whole.
    run = runs.get({**SSU, "score": "forgetscale", "frozen_fraction": 0.7}, 2)
    shares = set()
    for name, frozen in run.frozen.items():
        assert same_bits(run.export[name][frozen], run.source[name][frozen]), name
        if not bool(frozen.all()):
            assert (run.masters[name] != run.source[name])[~frozen].float().mean() > 0.999, name
        if "_proj" in name:
            shares.add(round(float(frozen.float().mean()), 3))
    assert len(shares) > 5


class TestRows:
    @pytest.mark.parametrize("layout", ["ssu", "masked"])
    def test_shielded_rows_stay_and_their_neighbours_move(self, runs: Runs, layout: str):
        run = runs.get(layout, 3)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            changed = (run.masters[name] != run.source[name]).any(1)
            assert changed.nonzero().flatten().tolist() == [
                row for row in range(changed.numel()) if row not in SSU["shield_token_ids"]
            ]

    @pytest.mark.parametrize(
        ("size", "dtype", "offload"), [(1, "float32", False), (3, "float32", False)] + SETTINGS[-2:]
    )
    def test_rows_the_target_text_does_not_use_stay(self, runs: Runs, size, dtype, offload):
        shield = {"rule": "unused_in_target", "min_count": 9}
        run = run_of(runs, {**SSU, "shield_rows": shield}, size, dtype, offload)
        text = set_rows()
        shielded = {t for t in range(VOCAB_SIZE) if int((text == t).sum()) < 9}
        shielded |= set(SSU["shield_token_ids"])
        assert 10 < len(shielded) < VOCAB_SIZE - 10
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            changed = (run.masters[name] != run.source[name].float()).any(1)
            assert set(changed.nonzero().flatten().tolist()) == set(range(VOCAB_SIZE)) - shielded
            frozen = run.frozen[name]
            assert same_bits(run.export[name][frozen], run.source[name][frozen]), name

    @pytest.mark.parametrize("layout", ["ssu", "masked"])
    def test_tied_head_is_shielded_once(self, runs: Runs, layout: str):
        world = runs.world("tied", tied=True)
        run = runs.get(layout, 2, world=world)
        assert "lm_head.weight" not in run.source
        assert [key for key in run.plan if key.startswith("rows/")] == [
            "rows/model.embed_tokens.weight"
        ]
        frozen = run.frozen["model.embed_tokens.weight"]
        assert same_bits(
            run.export["model.embed_tokens.weight"][frozen],
            run.source["model.embed_tokens.weight"][frozen],
        )


class TestHalfFineTuning:
    def test_whole_parameters_have_no_optimizer_state(self, runs: Runs):
        run = runs.get("hft", 2)
        trained = set(run.outcome.value["trained"])
        assert trained == set(run.source) - set(run.whole)

    def test_half_of_each_layer(self, runs: Runs):
        run = runs.get("hft", 1)
        feed_forward = []
        for layer in range(2):
            names = [n for n in run.whole if n.startswith(f"model.layers.{layer}.")]
            attention = [n for n in names if "self_attn" in n]
            assert len(attention) == 2 and all("_proj" in n for n in attention)
            feed_forward.append(len([n for n in names if ".mlp." in n]))
            assert len([n for n in names if n.endswith("layernorm.weight")]) == 1
        assert sorted(feed_forward) == [1, 2]
        assert not any(
            "embed" in n or "lm_head" in n or n == "model.norm.weight" for n in run.whole
        )


def test_same_bits_looks_at_bits():
    zero = torch.tensor([0.0])
    assert not same_bits(zero, -zero)
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
