"""Counts kept between passes, for the lists of tensors of real models."""

from __future__ import annotations

from forgetscale.knowledge.counting import histogram_bytes


def test_a_70b_model_needs_less_than_a_fifth_of_a_gigabyte():
    layers, matrices, norms, ends = 80, 7, 2, 3  # Llama 3: q k v o gate up down; embed, head, norm
    assert histogram_bytes(1) == 262_144
    assert histogram_bytes(layers * matrices) < 0.15e9
    assert histogram_bytes(layers * (matrices + norms) + ends) < 0.2e9
