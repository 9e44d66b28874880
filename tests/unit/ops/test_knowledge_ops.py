"""Mastery groups, divergences and relative change against numbers worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.ops.delta import relative_change
from forgetscale.ops.knowledge import kl_divergence, mastery_group, top_ids, top_mass, topk_kl

TUNED = torch.tensor([2.0, 5, 1, 4, 0, 3], dtype=torch.float64)
SOURCE = torch.tensor([6.0, 4, 0.5, 2, 1, 3.5], dtype=torch.float64)
BEFORE = [0.5, -0.02, 0.1, 0.0, 1.0, -0.25, 0.004, 0.2, -0.08, 0.3]
AFTER = [0.51, -0.03, 0.09, 0.001, 1.02, -0.25, 0.002, 0.21, -0.07, 0.33]


def test_the_groups_of_210_samples():
    members = [mastery_group(hits, 210) for hits in range(211)]
    assert [members.count(group) for group in range(5)] == [1, 52, 53, 52, 53]
    assert [members[hits] for hits in (0, 1, 52, 53, 105, 106, 157, 158, 210)] == [
        0, 1, 1, 2, 2, 3, 3, 4, 4,
    ]  # fmt: skip


def test_the_worked_fact():
    assert mastery_group(6, 12) == 2 and mastery_group(5, 12) == 2


@given(st.integers(1, 500), st.data())
def test_groups_are_the_quarters_of_the_rate(total: int, data: st.DataObject):
    hits = data.draw(st.integers(0, total))
    rate = Fraction(hits, total)
    expected = 0 if hits == 0 else next(g for g in (1, 2, 3, 4) if rate <= Fraction(g, 4))
    assert mastery_group(hits, total) == expected


@pytest.mark.parametrize("hits, total", [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts(hits: int, total: int):
    with pytest.raises(ValueError, match="hits must be"):
        mastery_group(hits, total)


def test_the_worked_divergence():
    assert top_ids(TUNED, 3).tolist() == [1, 3, 5]
    assert float(topk_kl(TUNED, SOURCE, 3)) == pytest.approx(0.257034, abs=1e-6)
    backward = topk_kl(TUNED, SOURCE, 3, direction="source_from_tuned")
    assert float(backward) == pytest.approx(0.297265, abs=1e-6)
    assert float(topk_kl(TUNED, SOURCE, 6)) == pytest.approx(1.696585, abs=1e-6)
    assert float(kl_divergence(TUNED, SOURCE)) == pytest.approx(1.696585, abs=1e-6)
    assert float(top_mass(TUNED, top_ids(TUNED, 3))) == pytest.approx(0.952574, abs=1e-6)
    assert float(top_mass(SOURCE, top_ids(TUNED, 3))) == pytest.approx(0.189109, abs=1e-6)


def test_the_other_models_candidates():
    ids = top_ids(SOURCE, 2).tolist()
    assert ids == [0, 1]
    p, q = (math.exp(2) / (math.exp(2) + math.exp(5)), math.exp(6) / (math.exp(6) + math.exp(4)))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(topk_kl(TUNED, SOURCE, 2, top_of="source")) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_equal_logits_go_by_id(values: list[int], data: st.DataObject):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert top_ids(torch.tensor([values, values]).bfloat16(), k).tolist() == [expected] * 2


def test_divergence_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="same positions and vocabulary"):
        topk_kl(TUNED, SOURCE[:5], 2)
    with pytest.raises(ValueError, match="k must be in 1..6"):
        topk_kl(TUNED, SOURCE, 7)


def test_the_worked_changes():
    before, after = (torch.tensor(x, dtype=torch.float64) for x in (BEFORE, AFTER))
    r = relative_change(before, after)
    expected = [0.02, 0.49999975, 0.0999999, 100000, 0.02, 0, 0.49999875, 0.05, 0.125, 0.1]
    assert r.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(r.sum()) == pytest.approx(100001.41500, abs=1e-5)
    order = sorted(range(10), key=lambda i: -float(r[i]))
    assert order[:7] == [3, 1, 6, 8, 9, 2, 7] and order[9] == 5
    change = (after - before).abs()
    shares = {k: [float(x[order[:k]].sum() / x.sum()) for x in (r, change, change**2)]
              for k in (1, 2, 3, 5)}  # fmt: skip
    assert shares[1] == pytest.approx([0.999986, 0.0097, 0.0006], abs=5e-5)
    assert shares[2] == pytest.approx([0.999991, 0.1068, 0.0560], abs=5e-5)
    assert shares[3] == pytest.approx([0.999996, 0.1262, 0.0582], abs=5e-5)
    assert shares[5] == pytest.approx([0.999998, 0.5146, 0.6122], abs=5e-5)
    nine = [i for i in order if i != 3]
    assert float(r[nine[:3]].sum() / r[nine].sum()) == pytest.approx(0.795, abs=5e-4)
    assert float(change[nine[:3]].sum() / change[nine].sum()) == pytest.approx(0.216, abs=5e-4)


def test_narrow_types():
    before, after = (torch.tensor(x, dtype=torch.float64) for x in (BEFORE, AFTER))
    assert relative_change(before.float(), after.float()).dtype == torch.float32
    r = relative_change(before, after).float()
    assert float(r[2]) == pytest.approx(0.099999987, abs=1e-9)
    assert float(r[9]) == pytest.approx(0.099999994, abs=1e-9)
    narrow = relative_change(torch.tensor(BEFORE).bfloat16(), torch.tensor(AFTER).bfloat16())
    assert narrow.dtype == torch.float32
    assert narrow.bfloat16()[[2, 9]].tolist() == pytest.approx([0.102539, 0.097168], abs=1e-6)
    assert float(narrow.bfloat16().sum()) == 99840


def test_change_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        relative_change(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="eps must be > 0"):
        relative_change(torch.zeros(2), torch.zeros(2), eps=0.0)
