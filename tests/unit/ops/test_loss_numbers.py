"""Every form of loss: the worked numbers of its note."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forgetscale.ops.losses import (
    LOSSES,
    cross_entropy,
    entropy_weighted_loss,
    make_loss,
    topk_kl_to_source,
)

IGNORED = -100
LN2 = math.log(2)


def example_a() -> tuple[Tensor, Tensor]:
    logits = [[4.0, 1, 0, -2], [1, 1, 0, -1], [3, 3, 3, 3], [6, 0, 0, 0]]
    return torch.tensor(logits, dtype=torch.float64), torch.tensor([1, 0, 2, IGNORED])


def example_b() -> tuple[Tensor, Tensor]:
    logits = torch.zeros(3, 50, dtype=torch.float64)
    logits[0, 0] = logits[2, 0] = 12
    return logits, torch.tensor([7, 7, 0])


def gradient(kind: str, logits: Tensor, labels: Tensor, extra=None, **options) -> Tensor:
    leaf = logits.clone().requires_grad_()
    LOSSES[kind](leaf, labels, extra, **options).backward()
    return leaf.grad


class TestWorkedNumbers:
    """Example A: three positions, so sums are three times the means of the note."""

    @pytest.mark.parametrize(
        ("kind", "options", "mean"),
        [
            ("cross_entropy", {}, 1.79069069),
            ("eaft", {"top_k": 2}, 1.04957669),
            ("eaft", {"top_k": 2, "divisor": LN2}, 1.04957669),
            ("eaft", {"top_k": 2, "alpha": 0.0}, 1.79069069),
            ("eaft", {"top_k": 2, "alpha": 2.0}, 0.84550358),
            ("eaft", {"top_k": 2, "alpha": 3.0}, 0.78931002),
            ("eaft", {"top_k": 2, "gate": "sigmoid"}, 1.74909826),
            ("eaft", {"top_k": 2, "gate": "hard", "threshold": 0.27}, 1.79069069),
            (
                "eaft",
                {"top_k": 2, "gate": "hard", "threshold": 0.28},
                (0.9175757956 + 1.3862943611) / 3,
            ),
            ("dft", {}, 0.28527279),
            ("focal", {}, 1.30004987),
            ("focal", {"detached": True}, 1.30004987),
            ("deft", {}, 1.00781869),
            ("talr", {"tau": 1.3862943611}, 0.43961284),
            ("talr", {"tau": 1.0}, 0.28527279),
        ],
    )
    def test_means(self, kind: str, options: dict, mean: float):
        assert float(LOSSES[kind](*example_a(), **options)) / 3 == pytest.approx(mean, rel=1e-7)

    def test_tokens(self):
        logits, labels = example_a()
        for row, expected in enumerate([3.0682019209, 0.9175757956, 1.3862943611]):
            part = slice(row, row + 1)
            found = float(cross_entropy(logits[part], labels[part]))
            assert found == pytest.approx(expected, rel=1e-7)
            assert math.exp(-found) == pytest.approx([0.0465046989, 0.3994863047, 0.25][row])

    def test_mile_is_divided_by_its_weights(self):
        sums = make_loss("mile", normalize="weights").sums(*example_a())
        assert sums.value / sums.weight == pytest.approx(1.58314145, rel=1e-8)

    def test_eaft_gradient(self):
        found = gradient("eaft", *example_a(), top_k=2) / 3
        expected = [
            [0.08573532, -0.08751814, 0.00157030, 0.00021252],
            [-0.20017123, 0.13316210, 0.04898760, 0.01802153],
            [0.08333333, 0.08333333, -0.25, 0.08333333],
            [0, 0, 0, 0],
        ]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=6e-9)

    def test_weights_carry_no_gradient(self):
        # With a gradient through the weight, row 0 would raise the confident wrong token.
        found = gradient("eaft", *example_a(), top_k=2)[0] / 3
        assert found[0] > 0 > found[1]
        assert abs(float(found[0]) - -0.11423824) > 0.1

    def test_gradient_norms(self):
        logits, labels = example_a()
        found = gradient("cross_entropy", logits, labels).norm(dim=1)
        expected = torch.tensor([1.33489384, 0.73805626, 0.86602540, 0], dtype=torch.float64)
        assert torch.allclose(found, expected, atol=6e-9)
        p = logits.softmax(-1)[:3]
        squares = p.square().sum(-1)
        assert squares.tolist() == pytest.approx([0.87495095, 0.34369966, 0.25], abs=6e-9)
        label = p.gather(1, labels[:3, None])[:, 0]
        assert torch.allclose(found[:3].square(), 1 - 2 * label + squares)

    @pytest.mark.parametrize(
        ("direction", "expected"),
        [("forward", [1.93190756, 0.28128143, 0.0]), ("reverse", [1.09625386, 0.21362658, 0.0])],
    )
    def test_divergence_from_uniform(self, direction: str, expected: list[float]):
        logits, labels = example_a()
        ids = torch.arange(4)[None]
        log_probs = torch.full((1, 4), -math.log(4), dtype=torch.float64)
        for row, value in enumerate(expected):
            part = slice(row, row + 1)
            found = topk_kl_to_source(
                logits[part], labels[part], ids, log_probs, direction=direction
            )
            assert float(found) == pytest.approx(value, abs=1e-7)

    def test_psft(self):
        logits = torch.tensor([[0.0, 0.0]] * 3, dtype=torch.float64)
        labels = torch.zeros(3, dtype=torch.int64)
        old = math.log(0.5) - torch.tensor([1.1, 1.4, 0.7], dtype=torch.float64).log()
        values = [
            float(LOSSES["psft"](logits[i : i + 1], labels[:1], {"old_log_prob": old[i : i + 1]}))
            for i in range(3)
        ]
        assert values == pytest.approx([-1.1, -1.28, -0.7], rel=1e-6)
        found = gradient("psft", logits, labels, {"old_log_prob": old})
        # P - e_y is (-0.5, 0.5).
        assert (found[:, 1] / 0.5).tolist() == pytest.approx([1.1, 0.0, 0.7])

    def test_published_constants(self):
        logits, labels = example_b()
        each = [
            float(entropy_weighted_loss(logits[i : i + 1], labels[i : i + 1], divisor=3.0))
            for i in range(3)
        ]
        assert each == pytest.approx([6.06995e-3, 3.90645786, 1.5226e-7], rel=2e-5)
        total = float(entropy_weighted_loss(logits, labels, divisor=3.0))
        assert total / 3 == pytest.approx(1.30417599, rel=1e-7)
        assert total / 6 == pytest.approx(0.65208799, rel=1e-7)
        assert float(entropy_weighted_loss(logits, labels)) / 3 == pytest.approx(1.30603392)
        plain = [float(cross_entropy(logits[i : i + 1], labels[i : i + 1])) for i in range(3)]
        assert plain == pytest.approx([12.000301, 3.912023, 3.0102e-4], rel=2e-5)
        norms = {
            kind: gradient(kind, logits, labels, **options).norm(dim=1).tolist()
            for kind, options in (("cross_entropy", {}), ("eaft", {"divisor": 3.0}))
        }
        assert norms["cross_entropy"] == pytest.approx([1.41400, 0.98995, 3.04e-4], rel=2e-3)
        assert norms["eaft"] == pytest.approx([7.152e-4, 0.98854, 1.54e-7], rel=2e-3)
