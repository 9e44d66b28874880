"""Tokens drawn with counter-based noise: exact distributions, no dependence on other rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from forgetscale.generation.sampling import RowSampling, draw_tokens, gumbel_noise
from forgetscale.generation.seeds import engine_seed, sample_seed


def rows(seeds, *, positions=None, temperature=1.0, top_p=1.0, top_k=0):
    count = len(seeds)
    full = torch.full((count,), 1.0, dtype=torch.float64)
    return RowSampling(
        torch.as_tensor(seeds, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64) if positions is None else positions,
        full * temperature,
        full * top_p,
        torch.full((count,), top_k, dtype=torch.int64),
    )


def exact(logits, temperature, top_p, top_k):
    """The distribution written from its definition, token by token."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    whole = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / whole
        if mass >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


LOGITS = [0.3, -1.2, 2.0, 1.1, 1.1, -3.0, 0.0, 0.9]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.9, 0), (0.7, 0.9, 0), (2.0, 0.5, 0), (1.0, 0.8, 3)]
    + [(1.0, 1.0, 4), (1.3, 1e-9, 0)],
)
def test_frequencies_are_the_exact_distribution(temperature, top_p, top_k):
    count = 40_000
    seeds = [sample_seed("run", n, 0, "user", 0) for n in range(count)]
    logits = torch.tensor(LOGITS).expand(count, -1)
    how = rows(seeds, temperature=temperature, top_p=top_p, top_k=top_k)
    tokens, log_probs = draw_tokens(logits, how)
    wanted = exact(LOGITS, temperature, top_p, top_k)
    found = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    assert all(number == 0 for number, chance in zip(found, wanted, strict=True) if chance == 0)
    possible = [n for n, chance in enumerate(wanted) if chance > 0]
    square = sum((found[n] - count * wanted[n]) ** 2 / (count * wanted[n]) for n in possible)
    freedom = len(possible) - 1
    # Wilson-Hilferty: a chi-square above this has p < 1e-3.
    limit = (
        freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
        if (freedom)
        else 0.0
    )
    assert square <= limit
    expected = torch.log_softmax(torch.tensor(LOGITS, dtype=torch.float64), 0)
    torch.testing.assert_close(log_probs[0], expected, rtol=0, atol=1e-6)


def test_greedy_and_the_limit_of_low_temperature():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(1)
    for temperature in (0.0, 1e-6):
        tokens, _ = draw_tokens(logits, rows(range(64), temperature=temperature))
        assert torch.equal(tokens, best)


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 3000, generator=generator)
    positions = torch.arange(12)
    how = rows(range(100, 112), positions=positions, temperature=0.8)
    mixed = RowSampling(
        how.seeds,
        how.positions,
        torch.tensor([0.0, 0.7, 1.0] * 4, dtype=torch.float64),
        torch.tensor([1.0, 0.9, 1.0, 0.999] * 3, dtype=torch.float64),
        torch.tensor([0, 0, 40] * 4),
    )
    tokens, _ = draw_tokens(logits, mixed)
    order = torch.randperm(12, generator=generator)
    fields = ("seeds", "positions", "temperature", "top_p", "top_k")
    shuffled = RowSampling(*(getattr(mixed, name)[order] for name in fields))
    assert torch.equal(draw_tokens(logits[order], shuffled)[0], tokens[order])
    for row in range(12):
        alone = RowSampling(*(getattr(mixed, name)[row : row + 1] for name in fields))
        assert draw_tokens(logits[row : row + 1], alone)[0] == tokens[row]


def test_flat_distributions_need_more_than_the_first_candidates():
    """0.9 of 3,000 equally probable tokens: the lowest 2,700 ids, all of them possible."""
    logits = torch.zeros(1500, 3000)
    tokens, _ = draw_tokens(logits, rows(range(1500), top_p=0.9))
    assert int(tokens.max()) < 2701
    assert int(tokens.max()) > 2600 and len(tokens.unique()) > 900


def test_noise_is_gumbel_and_differs_by_each_key():
    seeds = torch.arange(200, dtype=torch.int64)
    tokens = torch.arange(1000).expand(200, -1)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), tokens)
    assert abs(float(noise.mean()) - 0.5772156649) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert noise.unique().numel() == noise.numel()
    later = gumbel_noise(seeds, torch.ones_like(seeds), tokens)
    pairs = torch.stack([noise.flatten(), later.flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01
    assert not bool((noise == later).any())


def test_seeds_differ_for_every_sample_turn_role_and_attempt():
    seeds = {
        sample_seed("run", sample, turn, role, attempt)
        for sample in range(2000)
        for turn in range(3)
        for role in ("user", "assistant")
        for attempt in range(3)
    }
    assert len(seeds) == 2000 * 3 * 2 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed("other run", 0, 0, "user", 0) not in seeds
    assert sample_seed("run", 12, 0, "user", 0) != sample_seed("run", 1, 20, "user", 0)
    engine = [engine_seed(sample_seed("run", n, 0, "user", 0)) for n in range(10_000)]
    assert all(0 <= seed < 2**31 for seed in engine)
    assert len(set(engine)) > 10_000 - 4  # expected collisions: C(10^4, 2) / 2^31 = 0.02


def test_the_mean_surprise_is_the_entropy_and_less_when_sharpened():
    count = 40_000
    seeds = [sample_seed("entropy", n, 0, "user", 0) for n in range(count)]
    logits = torch.tensor(LOGITS).expand(count, -1)
    p = torch.softmax(torch.tensor(LOGITS, dtype=torch.float64), 0)
    entropy = float(-(p * p.log()).sum())
    deviation = float(((p * p.log().square()).sum() - entropy**2).sqrt())

    def surprise(**how):
        tokens, log_probs = draw_tokens(logits, rows(seeds, **how))
        return -float(log_probs.gather(1, tokens[:, None]).mean())

    assert abs(surprise() - entropy) < 4 * deviation / math.sqrt(count)
    assert surprise(temperature=0.7) < entropy - 0.05
    assert surprise(top_p=0.9) < entropy - 0.02


def test_rejection_draws_what_sorting_draws():
    """Rows too flat for a few candidates: the same tokens as with the whole order."""
    logits = 0.5 * torch.randn(200, 900, generator=torch.Generator().manual_seed(2))
    for top_p in (0.3, 0.9, 0.999):
        how = rows(range(200), top_p=top_p)
        scaled = torch.log_softmax(logits.double(), 1)
        values, ids = torch.sort(scaled, dim=1, descending=True, stable=True)
        keep = values.exp().cumsum(1) - values.exp() < top_p
        noise = gumbel_noise(how.seeds, how.positions, ids)
        best = torch.where(keep, values + noise, -torch.inf).argmax(1, keepdim=True)
        assert torch.equal(draw_tokens(logits, how)[0], ids.gather(1, best)[:, 0])
        limited = rows(range(200), top_p=top_p, top_k=300)
        ranks = torch.arange(900)
        mass = values[:, :300].exp().sum(1, keepdim=True)
        keep = (values.exp().cumsum(1) - values.exp() < top_p * mass) & (ranks < 300)
        best = torch.where(keep, values + noise, -torch.inf).argmax(1, keepdim=True)
        assert torch.equal(draw_tokens(logits, limited)[0], ids.gather(1, best)[:, 0])
