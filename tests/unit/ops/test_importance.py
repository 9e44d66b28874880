"""Column scores and selection: the paper's worked numbers, and properties of the choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.ops.importance import (
    MATRIX_RULES,
    VECTOR_RULES,
    column_scores,
    conditional_curvature,
    num_frozen,
    recent_block_weights,
    select_frozen,
    select_jointly,
)

FIGURE_WEIGHT = torch.tensor([[0.0, 2, 7, 3, 4], [5, 1, 9, 8, 1], [1, 3, 2, 0, 6]])
FIGURE_NORM = torch.tensor([8.0, 5, 10, 7, 2])
RULES_WEIGHT = torch.tensor([[1.0, 3, 0, 2], [1, 0, 2, 2], [1, 0, 0, 2], [1, 0, 0, 2]])
RULES_INPUT = torch.tensor([[3.0, 1, 2, 1], [4, 2, 2, 1], [0, 2, 1, 1]])
RULES_NORM = {"paper": RULES_INPUT.norm(dim=0), "official": RULES_INPUT.square().mean(0)}
RULES = ("paper", "official", "mag_l1", "mag_l2")


class TestSelectJointly:
    def test_worked(self):
        # Per element 4, 1 | 3, 2.5, 0; the first matrix is 2 high, the second 4.
        scores = [torch.tensor([8.0, 2]), torch.tensor([12.0, 10, 0])]
        for fraction, expected in {
            0.0: ([], []),
            0.125: ([0], []),
            0.3: ([0], []),
            0.375: ([0], [0]),
            0.625: ([0], [0, 1]),
            0.75: ([0, 1], [0, 1]),
            1.0: ([0, 1], [0, 1, 2]),
        }.items():
            found = select_jointly(scores, [2, 4], fraction)
            assert tuple(index.tolist() for index in found) == expected, fraction

    def test_ties_go_to_the_earlier_matrix_and_column(self):
        found = select_jointly([torch.ones(3), torch.ones(3)], [1, 1], 0.7)
        assert [index.tolist() for index in found] == [[0, 1, 2], [0]]

    def test_one_matrix_is_select_frozen(self):
        scores = torch.rand(17)
        for fraction in (0.0, 0.2, 0.5, 0.93, 1.0):
            (found,) = select_jointly([scores], [5], fraction)
            assert torch.equal(found, select_frozen(scores, fraction))

    def test_nan(self):
        with pytest.raises(ValueError, match="NaN"):
            select_jointly([torch.tensor([1.0, float("nan")])], [2], 0.5)


class TestFigureOne:
    def test_scores(self):
        scores = column_scores(FIGURE_WEIGHT, FIGURE_NORM, "paper")
        assert scores.tolist() == [48, 30, 180, 77, 22]
        assert scores.dtype == torch.float32
        # The same as summing the paper's score of every weight.
        assert torch.equal(scores, (FIGURE_WEIGHT.abs() * FIGURE_NORM).sum(0))

    @pytest.mark.parametrize(
        ("fraction", "frozen"),
        [
            (0.0, []),
            (0.125, []),
            (0.25, [2]),
            (0.375, [2]),
            (0.5, [2, 3]),
            (0.6, [0, 2, 3]),
            (0.75, [0, 2, 3]),
            (0.875, [0, 1, 2, 3]),
            (1.0, [0, 1, 2, 3, 4]),
        ],
    )
    def test_frozen_columns_by_fraction(self, fraction: float, frozen: list[int]):
        scores = column_scores(FIGURE_WEIGHT, FIGURE_NORM, "paper")
        found = select_frozen(scores, fraction)
        assert found.tolist() == frozen
        assert found.dtype == torch.int64

    def test_frozen_share(self):
        frozen = select_frozen(column_scores(FIGURE_WEIGHT, FIGURE_NORM, "paper"), 0.5)
        mask = torch.zeros_like(FIGURE_WEIGHT)
        mask[:, frozen] = 1
        assert mask.mean().item() == pytest.approx(0.4)

    def test_updated_matrix_of_the_figure_differs_outside_frozen_columns_only(self):
        updated = torch.tensor([[1.0, 0, 7, 3, 3], [6, 4, 9, 8, 1], [0, 5, 2, 0, 5]])
        changed = (updated != FIGURE_WEIGHT).any(0).nonzero().flatten().tolist()
        assert set(changed).isdisjoint({2, 3})

    def test_official_scores(self):
        scores = column_scores(FIGURE_WEIGHT, FIGURE_NORM.square(), "official")
        expected = torch.tensor([326.337, 93.541, 1157.584, 418.656, 29.120])
        assert torch.allclose(scores, expected, rtol=0, atol=6e-4)
        assert select_frozen(scores, 0.5).tolist() == [2, 3]


class TestRulesThatDisagree:
    @pytest.mark.parametrize(
        ("rule", "scores", "frozen"),
        [
            ("paper", [20, 9, 6, 13.8564], [0, 3]),
            ("official", [16.6667, 9, 6, 4], [0, 1]),
            ("mag_l2", [2, 3, 2, 4], [1, 3]),
            ("mag_l1", [4, 3, 2, 8], [0, 3]),
        ],
    )
    def test_scores_and_choice(self, rule: str, scores: list[float], frozen: list[int]):
        found = column_scores(RULES_WEIGHT, RULES_NORM.get(rule), rule)
        assert found.tolist() == pytest.approx(scores, abs=1e-4)
        assert select_frozen(found, 0.5).tolist() == frozen

    @pytest.mark.parametrize("seed", range(5))
    def test_official_choice_is_the_published_codes(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(33, 20, generator=generator)
        inputs = torch.randn(4, 11, 20, generator=generator) * torch.rand(20, generator=generator)
        # gucci-j/ssu: mean over sequences of token means, L2 norm of columns, topk of int(d * r).
        activation = inputs.square().mean(1).mean(0)
        published = torch.topk(weight.norm(dim=0) * activation, int(20 * 0.3)).indices
        scores = column_scores(weight, inputs.square().mean((0, 1)), "official")
        assert select_frozen(scores, 0.3).tolist() == sorted(published.tolist())


class TestScale:
    @pytest.mark.parametrize("rule", ["paper", "official"])
    @pytest.mark.parametrize("factor", [1e-3, 0.37, 11**-0.5, 4096.0])
    def test_any_positive_factor_leaves_the_choice(self, rule: str, factor: float):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(9, 40, generator=generator)
        norm = torch.rand(40, generator=generator) + 0.1
        before = select_frozen(column_scores(weight, norm, rule), 0.5)
        assert torch.equal(select_frozen(column_scores(weight, norm * factor, rule), 0.5), before)

    def test_root_mean_square_and_repeated_data(self):
        inputs = torch.randn(30, 12, generator=torch.Generator().manual_seed(5))
        weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(6))
        norm = inputs.norm(dim=0)
        twice = torch.cat([inputs, inputs]).norm(dim=0)
        rms = inputs.square().mean(0).sqrt()
        chosen = [
            select_frozen(column_scores(weight, value, "paper"), 0.5).tolist()
            for value in (norm, twice, rms)
        ]
        assert chosen[0] == chosen[1] == chosen[2]


class TestSelect:
    def test_ties_go_to_the_lower_index(self):
        scores = torch.tensor([1.0, 2, 1, 2, 1, 1])
        assert select_frozen(scores, 0.5).tolist() == [0, 1, 3]
        assert select_frozen(torch.zeros(8), 0.5).tolist() == [0, 1, 2, 3]

    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=60),
        st.fractions(0, 1, max_denominator=200),
    )
    def test_count_exact_and_no_higher_score_left_out(self, values: list[int], fraction):
        scores = torch.tensor(values, dtype=torch.float32)
        found = select_frozen(scores, float(fraction)).tolist()
        assert found == sorted(set(found))
        assert len(found) == num_frozen(len(values), float(fraction))
        rest = sorted(set(range(len(values))) - set(found))
        for inside in found:
            for outside in rest:
                better = values[inside] > values[outside]
                tie = values[inside] == values[outside] and inside < outside
                assert better or tie

    @pytest.mark.parametrize(
        ("size", "fraction", "count"),
        [
            (100, 0.29, 29),
            (10, 0.7, 7),
            (5, 0.5, 2),
            (4096, 0.125, 512),
            (3, 1.0, 3),
            (1000, 0.001, 1),
        ],
    )
    def test_count_uses_the_decimal_number_the_user_wrote(self, size, fraction, count):
        assert num_frozen(size, fraction) == count

    @pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
    def test_fraction_outside_is_refused(self, fraction: float):
        with pytest.raises(ValueError, match=r"frozen_fraction must lie in \[0, 1\]"):
            select_frozen(torch.ones(3), fraction)

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="scores contain NaN"):
            select_frozen(torch.tensor([1.0, float("nan")]), 0.5)


class TestColumnScores:
    @pytest.mark.parametrize("rule", RULES)
    def test_result_is_fp32_whatever_the_weight(self, rule: str):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            norm = RULES_NORM.get(rule)
            scores = column_scores(RULES_WEIGHT.to(dtype), norm, rule)
            assert scores.dtype == torch.float32
            assert torch.equal(scores, column_scores(RULES_WEIGHT, norm, rule))

    def test_bf16_weights_are_not_summed_in_bf16(self):
        weight = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
        weight[0, 1] = 2.0
        assert column_scores(weight, None, "mag_l1").tolist() == [4096, 4097]

    def test_unknown_rule(self, unchecked):
        with pytest.raises(
            ValueError, match="rule must be one of paper, mag_l1, official, .*, got 'wanda'"
        ):
            column_scores(RULES_WEIGHT, None, "wanda")

    def test_missing_or_misshapen_statistic(self, unchecked):
        with pytest.raises(ValueError, match="needs the statistic l2_norm"):
            column_scores(RULES_WEIGHT, None, "paper")
        with pytest.raises(ValueError, match="one value per input feature"):
            column_scores(RULES_WEIGHT, torch.ones(3), "paper")

    def test_non_finite_statistic_is_an_error_never_a_fallback(self):
        norm = RULES_NORM["paper"].clone()
        norm[1] = float("inf")
        with pytest.raises(ValueError, match="not finite"):
            column_scores(RULES_WEIGHT, norm, "paper")


def literal_saliency(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """SparseGPT as its code has it: damp, invert, factorise the inverse; per weight."""
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diag().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight**2 / factor.diag() ** 2


class TestSparseGpt:
    @pytest.mark.parametrize("tokens", [1, 5, 40])
    def test_one_factorisation_equals_invert_and_factorise(self, tokens: int):
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, 9, generator=generator).double()
        weight = torch.randn(4, 9, generator=generator).double()
        hessian = inputs.T @ inputs
        before = hessian.clone()
        curvature = conditional_curvature(hessian)
        assert torch.equal(hessian, before)
        scores = column_scores(weight, curvature, "sgpt_true")
        exact = literal_saliency(weight, inputs).sum(0)
        assert torch.allclose(scores.double(), exact, rtol=1e-6)

    def test_orthogonal_inputs_give_the_damped_diagonal(self):
        hessian = torch.tensor([1.0, 4.0, 7.0]).double().diag()
        expected = torch.tensor([1.04, 4.04, 7.04], dtype=torch.float64)
        assert torch.allclose(conditional_curvature(hessian), expected, rtol=1e-12)

    def test_a_feature_that_later_ones_repeat_is_worth_little(self):
        column = torch.randn(50, 1, generator=torch.Generator().manual_seed(1)).double()
        inputs = torch.cat([column, column], 1)
        first, last = conditional_curvature(inputs.T @ inputs).tolist()
        assert first < 0.03 * last

    def test_dead_inputs_are_an_error(self):
        with pytest.raises(ValueError, match="singular"):
            conditional_curvature(torch.zeros(3, 3, dtype=torch.float64))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float):
        hessian = torch.eye(3, dtype=torch.float64)
        hessian[0, 1] = value
        with pytest.raises(ValueError, match="not finite"):
            conditional_curvature(hessian)


class TestRecentAverage:
    def test_worked_number(self):
        weights = recent_block_weights(torch.arange(4), 4)
        assert weights.tolist() == [0.125, 0.125, 0.25, 0.5]
        assert float(weights @ torch.tensor([1.0, 2, 4, 8]).double()) == 5.375

    @pytest.mark.parametrize("count", [1, 2, 30, 500, 3000])
    def test_equals_the_running_average(self, count: int):
        values = torch.rand(count, generator=torch.Generator().manual_seed(1)).double()
        average = float(values[0])
        for value in values[1:].tolist():
            average = (average + value) / 2
        weights = recent_block_weights(torch.arange(count), count)
        assert float(weights.sum()) == pytest.approx(1.0, rel=1e-14)
        assert float(weights @ values) == pytest.approx(average, rel=1e-12)


def test_every_rule_has_a_score_for_vectors():
    assert set(VECTOR_RULES) == set(MATRIX_RULES)
