"""Largest logits and their entropy: worked numbers, bounds, vocabularies cut over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.ops.entropy import BLOCK, merge_topk, topk_entropy, topk_logits

EXAMPLE = torch.tensor(
    [[4, 1, 0, -2], [1, 1, 0, -1], [3, 3, 3, 3], [6, 0, 0, 0]], dtype=torch.float64
)


def draw(rows: int, size: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


class TestWorkedNumbers:
    def test_top_2(self):
        found = topk_entropy(EXAMPLE, 2)[:3]
        assert found.tolist() == pytest.approx(
            [0.1908649711, 0.6931471806, 0.6931471806], abs=5e-11
        )
        assert float(found[0] / math.log(2)) == pytest.approx(0.27535995, abs=5e-9)

    def test_top_3(self):
        found = topk_entropy(EXAMPLE, 3)[:3] / math.log(3)
        assert found.tolist() == pytest.approx([0.24969052, 0.92603844, 1.0], abs=5e-9)

    def test_whole_vocabulary(self):
        found = topk_entropy(EXAMPLE, 4)[:3].tolist()
        assert found == pytest.approx([0.2900405037, 1.1726677785, 1.3862943611], abs=5e-11)

    def test_published_constants(self):
        confident, uncertain = torch.zeros(2, 50, dtype=torch.float64)
        confident[0] = 12
        found = topk_entropy(torch.stack([confident, uncertain]), 20)
        assert found.tolist() == pytest.approx([1.5174501e-3, 2.99573227], rel=5e-8)
        assert (found / 3.0).tolist() == pytest.approx([5.05816706e-4, 0.998577425], rel=1e-9)
        assert (found / 3.0).square().tolist() == pytest.approx([2.5585e-7, 0.99715687], rel=1e-5)
        whole = topk_entropy(torch.stack([confident, uncertain]), 50)
        assert whole.tolist() == pytest.approx([3.91273e-3, 3.91202301], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [20, 41, 20 * BLOCK, 50 * BLOCK + 7, 5000])
def test_largest_are_exact_in_blocks_too(size: int, dtype: torch.dtype):
    logits = draw(9, size, seed=size).to(dtype)
    assert torch.equal(topk_logits(logits, 20), logits.topk(20, -1).values)


def test_largest_in_one_block_and_equal_ones():
    logits = torch.zeros(2, 100 * BLOCK)
    logits[0, 5 * BLOCK : 5 * BLOCK + 20] = torch.arange(1.0, 21)
    assert topk_logits(logits, 20)[0].tolist() == list(range(20, 0, -1))
    assert topk_logits(logits, 20)[1].tolist() == [0.0] * 20


@given(st.integers(2, 60), st.integers(0, 10_000), st.floats(0.1, 30))
def test_bounds_and_shift(k: int, seed: int, scale: float):
    logits = draw(5, 60, seed, scale).double()
    found = topk_entropy(logits, k)
    assert (found >= 0).all() and (found <= math.log(k) + 1e-12).all()
    assert torch.allclose(topk_entropy(logits + 7.5, k), found, atol=1e-12)
    # The whole is at least the entropy of its best-known token against the rest.
    p = logits.softmax(-1)
    binary = torch.special.entr(p) + torch.special.entr(1 - p)
    whole = topk_entropy(logits, 60)
    assert (whole[:, None] >= binary - 1e-9).all()
    assert (whole[:, None] <= binary + (1 - p) * math.log(59) + 1e-9).all()


def test_mass_identity():
    logits = draw(6, 90, 3).double()
    p = logits.softmax(-1)
    top = p.topk(20, -1).values
    mass = top.sum(-1)
    partial = torch.special.entr(top).sum(-1)
    assert torch.allclose(partial, mass * topk_entropy(logits, 20) - mass * mass.log(), atol=1e-13)


def test_impossible_tokens_count_nothing():
    logits = torch.full((1, 40), -torch.inf)
    logits[0, :3] = torch.tensor([0.0, 1.0, -2.0])
    assert float(topk_entropy(logits, 20)) == pytest.approx(
        float(topk_entropy(logits[:, :3], 3)), rel=1e-6
    )


def test_computed_in_fp32_at_least():
    logits = draw(50, 400, 5, 6.0).bfloat16()
    assert topk_entropy(logits, 20).dtype == torch.float32
    exact = topk_entropy(logits.double(), 20)
    assert torch.allclose(topk_entropy(logits, 20).double(), exact, atol=1e-6)


class TestCutVocabulary:
    @pytest.mark.parametrize("cuts", [(400,), (200, 200), (7, 150, 243), (390, 10)])
    def test_merging_the_largest_of_each_share_is_exact(self, cuts: tuple[int, ...]):
        logits = draw(30, 400, 2)
        shares = logits.split(list(cuts), 1)
        merged = merge_topk([topk_logits(x, min(20, x.shape[1])) for x in shares], 20)
        assert torch.equal(merged, topk_logits(logits, 20))

    def test_one_share_alone_would_be_wrong(self):
        logits = draw(30, 400, 2)
        alone = topk_entropy(logits[:, :200], 20)
        assert (alone - topk_entropy(logits, 20)).abs().max() > 0.3

    def test_too_few(self):
        with pytest.raises(ValueError, match=r"k must lie in 1\.\.6, the values given, got 7"):
            merge_topk([torch.zeros(2, 3), torch.zeros(2, 3)], 7)


@pytest.mark.parametrize("k", [1, 0, -3, 41])
def test_k_outside_the_vocabulary(k: int):
    with pytest.raises(ValueError, match=rf"top_k must lie in 2\.\.vocab \(40\), got {k}"):
        topk_entropy(torch.zeros(2, 40), k)
