"""Every form of loss: values and gradients against dense fp64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forgetscale.ops import anchors, chunked
from forgetscale.ops.losses import (
    FORMS,
    LOSSES,
    chunked_loss,
    cross_entropy,
    entropy_weighted_loss,
    make_loss,
    topk_kl_to_source,
)

IGNORED = -100
LN2 = math.log(2)


def gradient(kind: str, logits: Tensor, labels: Tensor, extra=None, **options) -> Tensor:
    leaf = logits.clone().requires_grad_()
    LOSSES[kind](leaf, labels, extra, **options).backward()
    return leaf.grad


N, V, K = 40, 37, 6


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    logits = (3 * torch.randn(N, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.3] = IGNORED
    source = (logits.double() + torch.randn(N, V, generator=generator)).log_softmax(-1)
    largest = source.topk(K, -1)
    near = logits.double().log_softmax(-1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    extra = {
        "noise": torch.rand(N, generator=generator),
        "sequence_weight": torch.rand(N, generator=generator),
        "reference_log_prob": near + 0.5 * torch.randn(N, generator=generator),
        "old_log_prob": near + 0.3 * torch.randn(N, generator=generator),
        "source_ids": largest.indices,
        "source_log_probs": largest.values,
    }
    return logits, labels, extra


def dense(kind: str, logits: Tensor, labels: Tensor, extra: dict, **o) -> Tensor:
    """Return the loss from its formula, by autograd, over positions with a target."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    rows = torch.arange(len(labels))
    ll = log_p[rows, labels]
    pl = ll.exp()
    fixed = pl.detach()

    def divergence() -> Tensor:
        ids, log_q = extra["source_ids"], extra["source_log_probs"]
        q = torch.cat([log_q.exp(), 1 - log_q.exp().sum(-1, keepdim=True)], 1)
        inside = p.gather(1, ids)
        mine = torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], 1)
        first, second = (q, mine) if o.get("direction", "forward") == "forward" else (mine, q)
        return (first * (first / second).log()).sum(-1)

    if kind == "cross_entropy":
        e = o.get("label_smoothing", 0.0)
        value = -(1 - e) * ll - e * log_p.mean(-1)
    elif kind == "eaft":
        k = o.get("top_k", 20)
        top = log_p.detach().topk(k, -1).values
        q = top.softmax(-1)
        share = -(q * q.log()).sum(-1) / (math.log(k) if o.get("divisor", "ln_k") == "ln_k" else 3)
        form = o.get("gate", "power")
        if form == "power":
            gate = share ** o.get("alpha", 1.0)
        elif form == "sigmoid":
            gate = 1 / (1 + (-o.get("slope", 30) * (share - o.get("threshold", 0.17))).exp())
        else:
            gate = (share > o.get("threshold", 0.17)).double()
        value = -gate * ll
    elif kind == "dft":
        value = -fixed * ll
    elif kind == "q_log":
        q = o.get("q", 1.0)
        value = (1 - pl**q) / q
    elif kind == "deft":
        c = p.detach().square().sum(-1)
        value = (1 - pl**c) / c
    elif kind == "focal":
        factor = (1 - (fixed if o.get("detached") else pl)) ** o.get("gamma", 2.0)
        value = -factor * ll
    elif kind == "mile":
        entropy = -(p * log_p).sum(-1).detach()
        value = -((o.get("sigma", 1.0) + entropy) ** o.get("gamma", 1.0)) * ll
    elif kind == "talr":
        value = -(fixed.clamp_min(1e-6) ** (1 / o["tau"])).clamp_min(o.get("floor", 0.01)) * ll
    elif kind == "constant_gate":
        value = -o["mean_gate"] * ll
    elif kind == "random_gate":
        noise, mean = extra["noise"].double(), o["mean_gate"]
        gate = (noise < mean).double() if o.get("form") == "drop" else noise ** (1 / mean - 1)
        value = -gate * ll
    elif kind == "flow":
        value = -extra["sequence_weight"].double() * ll
    elif kind == "iw_sft":
        value = -(fixed / extra["reference_log_prob"].exp()).clamp(0.2, 1.8) * ll
    elif kind == "psft":
        ratio = (ll - extra["old_log_prob"]).exp()
        value = -torch.minimum(ratio, ratio.clamp(0.8, 1.28))
    elif kind == "kl":
        value = divergence()
    elif kind == "sft_kl":
        value = -ll + o["factor"] * divergence()
    else:
        assert kind == "asft"
        value = -fixed * ll + o.get("factor", 0.05) * divergence()
    return value.sum()


SETTINGS = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("eaft", {}),
    ("eaft", {"alpha": 2.5, "top_k": 7, "divisor": 3.0}),
    ("eaft", {"gate": "sigmoid", "slope": 11.0, "threshold": 0.4}),
    ("eaft", {"gate": "hard", "threshold": 0.4}),
    ("dft", {}),
    ("q_log", {}),
    ("q_log", {"q": 0.3}),
    ("deft", {}),
    ("focal", {}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 3.0, "detached": True}),
    ("mile", {"sigma": 0.5, "gamma": 1.5}),
    ("talr", {"tau": 2.0}),
    ("constant_gate", {"mean_gate": 0.35}),
    ("random_gate", {"mean_gate": 0.35}),
    ("random_gate", {"mean_gate": 0.6, "form": "drop"}),
    ("flow", {}),
    ("iw_sft", {}),
    ("psft", {}),
    ("kl", {}),
    ("kl", {"direction": "reverse"}),
    ("sft_kl", {"factor": 0.7}),
    ("asft", {}),
    ("asft", {"factor": 0.4, "direction": "reverse"}),
]


def exact(kind: str, options: dict, logits: Tensor, labels: Tensor, extra) -> tuple[Tensor, Tensor]:
    keep = labels != IGNORED
    leaf = logits.double().clone().requires_grad_()
    kept = {name: value[keep] for name, value in extra.items()}
    loss = dense(kind, leaf[keep], labels[keep], kept, **options)
    loss.backward()
    return loss.detach(), leaf.grad


class TestSourceKnownByItsMostLikelyTokens:
    """The divergence over K + 1 outcomes against dense fp64 sums, by autograd."""

    @staticmethod
    def buckets(log_p: Tensor, ids: Tensor) -> Tensor:
        p = log_p.exp()
        inside = p.gather(1, ids)
        rest = p.scatter(1, ids, 0.0).sum(-1, keepdim=True)
        return torch.cat([inside, rest], 1)

    def expected(self, logits: Tensor, source: Tensor, ids: Tensor, direction: str):
        leaf = logits.clone().requires_grad_()
        mine, theirs = self.buckets(leaf.log_softmax(-1), ids), self.buckets(source, ids)
        first, second = (theirs, mine) if direction == "forward" else (mine, theirs)
        value = torch.where(first > 0, first * (first / second).log(), 0.0).sum()
        value.backward()
        return value.detach(), leaf.grad

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    @pytest.mark.parametrize("sure", [1.0, 6.0])
    @pytest.mark.parametrize("count", [1, K, V - 1])
    def test_with_the_rest_summed_over_itself(self, direction: str, sure: float, count: int):
        logits, _, _ = case()
        labels = torch.zeros(N, dtype=torch.int64)
        generator = torch.Generator().manual_seed(4)
        source = (sure * logits + torch.randn(N, V, generator=generator)).log_softmax(-1)
        values, ids = source.topk(count, -1)
        extra = {
            "source_ids": ids.to(torch.int32),
            "source_log_probs": values,
            "source_log_rest": source.scatter(1, ids, -torch.inf).logsumexp(-1),
        }
        value, grad = self.expected(logits, source, ids, direction)
        found = LOSSES["kl"](logits, labels, extra, direction=direction)
        assert float(found) == pytest.approx(float(value), rel=1e-6)
        assert torch.allclose(gradient("kl", logits, labels, extra, direction=direction), grad)

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_whole_vocabulary_is_the_divergence_proper(self, direction: str):
        logits, _, _ = case()
        labels = torch.zeros(N, dtype=torch.int64)
        source = (logits + 0.5 * logits.roll(1, 1)).log_softmax(-1)
        values, ids = source.topk(V, -1)
        extra = {"source_ids": ids, "source_log_probs": values}
        extra["source_log_rest"] = torch.full((N,), -torch.inf, dtype=torch.float64)
        leaf = logits.clone().requires_grad_()
        log_p = leaf.log_softmax(-1)
        a, b = (source, log_p) if direction == "forward" else (log_p, source)
        value = (a.exp() * (a - b)).sum()
        value.backward()
        found = LOSSES["kl"](logits, labels, extra, direction=direction)
        assert float(found) == pytest.approx(float(value.detach()), rel=1e-6)
        assert torch.allclose(
            gradient("kl", logits, labels, extra, direction=direction), leaf.grad, atol=1e-12
        )

    def test_fewer_tokens_never_raise_it(self):
        logits, _, _ = case()
        labels = torch.zeros(N, dtype=torch.int64)
        source = (logits + logits.roll(3, 1)).log_softmax(-1)
        values = []
        for count in (1, 3, 9, V):
            largest = source.topk(count, -1)
            rest = source.scatter(1, largest.indices, -torch.inf).logsumexp(-1)
            extra = dict(zip(anchors.NEEDS, (largest.indices, largest.values, rest), strict=True))
            values.append(float(LOSSES["kl"](logits, labels, extra)))
        assert values == sorted(values) and values[0] > 0

    def test_rounding_of_what_was_stored_is_divided_out(self):
        """Half precision: the outcomes sum to 1.001, but a model that is the source has no pull."""
        logits, _, _ = case()
        labels = torch.zeros(N, dtype=torch.int64)
        source = logits.log_softmax(-1)
        largest = source.topk(K, -1)
        rest = source.scatter(1, largest.indices, -torch.inf).logsumexp(-1)
        stored = largest.values.half().double()
        extra = dict(zip(anchors.NEEDS, (largest.indices, stored, rest), strict=True))
        found = gradient("kl", logits, labels, extra)
        assert float(found.sum(-1).abs().max()) < 1e-12
        assert 0 < float(found.abs().max()) < 1e-3


def test_every_form_is_compared():
    assert {kind for kind, _ in SETTINGS} == set(FORMS) == set(LOSSES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_value_and_gradient(kind: str, options: dict, dtype: torch.dtype):
    logits, labels, extra = case(dtype)
    value, grad = exact(kind, options, logits, labels, extra)
    leaf = logits.clone().requires_grad_()
    loss = LOSSES[kind](leaf, labels, extra, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-6)
    (loss * 0.5).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    assert leaf.grad.dtype == dtype
    assert torch.allclose(2 * leaf.grad.double(), grad, rtol=tolerance, atol=tolerance)
    assert (leaf.grad[labels == IGNORED] == 0).all()


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_through_the_head(kind: str, options: dict):
    generator = torch.Generator().manual_seed(1)
    _, labels, extra = case()
    hidden = torch.randn(N, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, 11, generator=generator, dtype=torch.float64)
    value, grad = exact(kind, options, hidden @ weight.t(), labels, extra)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = chunked_loss(*inputs, labels, make_loss(kind, **options), extra=extra, chunk_size=9)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-6)
    assert torch.allclose(inputs[0].grad, grad @ weight, rtol=1e-9, atol=1e-11)
    assert torch.allclose(inputs[1].grad, grad.t() @ hidden, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0.0, "divisor": 3.0, "top_k": 3}])
def test_power_0_is_cross_entropy_bit_for_bit(options: dict, dtype: torch.dtype):
    logits, labels, _ = case(dtype)
    assert torch.equal(
        entropy_weighted_loss(logits, labels, **options), cross_entropy(logits, labels)
    )
    found = gradient("eaft", logits, labels, **options)
    assert torch.equal(found, gradient("cross_entropy", logits, labels))


def test_gradient_of_cross_entropy_is_that_of_torch():
    logits, labels, _ = case(torch.float32)
    leaf = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    # Not bit for bit: torch has two exponential functions on processors, one rounding apart.
    assert torch.allclose(
        gradient("cross_entropy", logits, labels), leaf.grad, rtol=3e-7, atol=6e-8
    )


def test_other_neutral_settings():
    logits, labels, extra = case(torch.float32)
    plain = float(cross_entropy(logits, labels))
    extra["sequence_weight"] = torch.ones(N)
    for kind, options in [
        ("focal", {"gamma": 0.0}),
        ("talr", {"tau": 1e9}),
        ("constant_gate", {"mean_gate": 1.0}),
        ("random_gate", {"mean_gate": 1.0}),
        ("random_gate", {"mean_gate": 1.0, "form": "drop"}),
        ("flow", {}),
        ("sft_kl", {"factor": 0.0}),
        ("mile", {"gamma": 0.0}),
    ]:
        assert float(LOSSES[kind](logits, labels, extra, **options)) == pytest.approx(plain), kind


@pytest.mark.parametrize("tile", [1, 2 * V, 7 * V + 3, 2**22])
def test_tiles_do_not_matter(monkeypatch, tile: int):
    logits, labels, extra = case(torch.float32)
    for kind, options in SETTINGS:
        expected = gradient(kind, logits, labels, extra, **options)
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "TILE_ELEMENTS", tile)
            found = gradient(kind, logits, labels, extra, **options)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), kind


def test_a_tail_that_the_source_gives_nothing_pulls_nowhere():
    """A prediction equal to the source's has no gradient, with all or some of its tokens known."""
    logits = case()[0]
    log_p = logits.log_softmax(-1)
    labels = torch.zeros(N, dtype=torch.int64)
    for k in (1, 5, V - 1, V):
        top = log_p.topk(k, -1)
        for direction in ("forward", "reverse"):
            extra = {"source_ids": top.indices, "source_log_probs": top.values}
            found = gradient("kl", logits, labels, extra, direction=direction)
            # With all but a millionth known, the rest counts as rounding.
            assert found.abs().max() < 2e-6, (k, direction)


def test_divergence_over_the_whole_vocabulary_pulls_to_the_source():
    logits, labels, _ = case()
    source = case()[0].roll(1, 0).log_softmax(-1)
    extra = {"source_ids": torch.arange(V).expand(N, V), "source_log_probs": source}
    found = gradient("kl", logits, torch.zeros_like(labels), extra)
    assert torch.allclose(found, logits.softmax(-1) - source.exp(), atol=1e-12)


class TestEdges:
    @pytest.mark.parametrize(("kind", "options"), SETTINGS)
    def test_no_target(self, kind: str, options: dict):
        logits, labels, extra = case(torch.float32)
        leaf = logits.clone().requires_grad_()
        loss = LOSSES[kind](leaf, torch.full_like(labels, IGNORED), extra, **options)
        loss.backward()
        assert float(loss.detach()) == 0 and (leaf.grad == 0).all()

    @pytest.mark.parametrize(("kind", "options"), SETTINGS)
    def test_certain_predictions_stay_finite(self, kind: str, options: dict):
        logits, _, extra = case(torch.float32)
        labels = torch.arange(N) % V
        sure = torch.full((N, V), -80.0)
        sure[torch.arange(N // 2), labels[: N // 2]] = 80.0
        sure[torch.arange(N // 2, N), (labels[N // 2 :] + 1) % V] = 80.0
        near = torch.where(torch.arange(N) < N // 2, 0.0, -160.0)
        extra |= {"old_log_prob": near, "reference_log_prob": near}
        found = gradient(kind, sure, labels, extra, **options)
        assert torch.isfinite(found).all()
        assert math.isfinite(float(LOSSES[kind](sure, labels, extra, **options)))

    def test_impossible_tokens(self):
        logits, labels, _ = case(torch.float32)
        logits[:, 30:] = -torch.inf
        labels = labels.clamp_max(29)
        for kind, options in SETTINGS[:15]:
            if options.get("label_smoothing"):
                continue
            found = gradient(kind, logits, labels, **options)
            assert torch.isfinite(found).all(), kind
            assert (found[:, 30:] == 0).all()

    def test_without_gradient_nothing_is_kept(self):
        logits, labels, _ = case(torch.float32)
        before = logits.clone()
        assert not cross_entropy(logits, labels).requires_grad
        with torch.no_grad():
            assert not cross_entropy(logits.requires_grad_(), labels).requires_grad
        assert torch.equal(before, logits)


class TestBadInput:
    @pytest.mark.parametrize("label", [V, V + 50, -1, -99])
    @pytest.mark.parametrize("kind", ["cross_entropy", "eaft"])
    def test_label_outside_the_vocabulary(self, kind: str, label: int):
        logits, labels, _ = case(torch.float32)
        labels[5] = label
        with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary \(0\.\.36"):
            LOSSES[kind](logits, labels)
        with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary"):
            chunked_loss(torch.zeros(N, 3), torch.zeros(V, 3), labels, make_loss(kind))

    @pytest.mark.parametrize(
        ("kind", "options", "words"),
        [
            ("eaft", {"alpha": -0.1}, "alpha must be >= 0, got -0.1; use 0 for plain"),
            ("eaft", {"top_k": 1}, "top_k must be >= 2, got 1"),
            ("eaft", {"top_k": V + 1}, rf"top_k must lie in 2\.\.vocab \({V}\), got {V + 1}"),
            ("eaft", {"divisor": 0.0}, "divisor must be ln_k or > 0, got 0.0"),
            ("eaft", {"slope": 0.0}, "slope must be > 0, got 0.0"),
            ("cross_entropy", {"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
            ("focal", {"gamma": -1.0}, "gamma must be >= 0"),
            ("mile", {"sigma": -1.0}, "sigma must be >= 0"),
            ("talr", {"tau": 0.0}, "tau must be > 0"),
            ("talr", {"tau": 1.0, "floor": 2.0}, r"floor must lie in \[0, 1\]"),
            ("q_log", {"q": 0.0}, "q must be > 0"),
            ("iw_sft", {"low": 2.0, "high": 1.0}, "low and high must satisfy"),
            ("psft", {"clip_low": -1.0}, "clips must be >= 0"),
            ("asft", {"factor": -1.0}, "factor must be >= 0"),
            ("sft_kl", {"factor": -1.0}, "factor must be >= 0"),
        ],
    )
    def test_option_out_of_range(self, kind: str, options: dict, words: str):
        logits, labels, extra = case(torch.float32)
        with pytest.raises(ValueError, match=words):
            LOSSES[kind](logits, labels, extra, **options)

    @pytest.mark.parametrize("kind", ["flow", "iw_sft", "psft", "kl"])
    def test_missing_tensor_per_position(self, kind: str):
        logits, labels, _ = case(torch.float32)
        with pytest.raises(ValueError, match="for every position, got none"):
            LOSSES[kind](logits, labels)

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="loss must be one of cross_entropy, eaft, .*'eatf'"):
            make_loss("eatf")

    def test_source_ids(self):
        with pytest.raises(ValueError, match=r"source ids must lie in 0\.\.4, got 0\.\.5"):
            topk_kl_to_source(
                torch.zeros(1, 5), torch.zeros(1).long(), torch.tensor([[0, 5]]), torch.zeros(1, 2)
            )
