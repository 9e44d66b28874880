"""``method.loss``: accepted forms, the shorthand, and one sentence for each mistake."""

from __future__ import annotations

import pytest

from forgetscale.config import (
    CrossEntropyLossConfig,
    EaftLossConfig,
    dump_recipe,
    load_recipe,
    recipe_dict,
    validate_recipe,
)
from forgetscale.errors import ConfigError

BASE = {
    "run": {"name": "a", "output_dir": "runs/a"},
    "model": {"path": "models/m"},
    "data": {"path": "data/d"},
    "train": {"num_steps": 10},
    "deepspeed": "ds_configs/zero3.json",
}
PROTECTIONS = [
    {"kind": "sft"},
    {"kind": "ssu", "score": "mag_l2"},
    {"kind": "hft"},
    {"kind": "gmt"},
    {"kind": "gmt_official"},
    {"kind": "lota"},
    {"kind": "s2ft"},
]


def recipe(method: object):
    # One of the methods is only defined without clipping.
    return validate_recipe({**BASE, "method": method, "optim": {"max_grad_norm": 1e6}})


@pytest.mark.parametrize("method", PROTECTIONS, ids=lambda m: m["kind"])
def test_every_protection_takes_a_loss(method: dict):
    assert recipe(method).method.loss == CrossEntropyLossConfig()
    loss = {"kind": "eaft", "alpha": 2, "divisor": 3.0}
    found = recipe({**method, "loss": loss}).method
    assert found.kind == method["kind"]
    assert found.loss == EaftLossConfig(kind="eaft", alpha=2.0, divisor=3.0)


class TestShorthand:
    def test_is_sft_with_that_loss(self, tmp_path):
        found = recipe({"kind": "eaft", "alpha": 3, "top_k": 10})
        assert found == recipe({"kind": "sft", "loss": {"kind": "eaft", "alpha": 3, "top_k": 10}})
        shown = recipe_dict(found)["method"]
        assert shown["kind"] == "sft"
        assert shown["loss"]["kind"] == "eaft" and shown["loss"]["gate"] == "power"
        path = tmp_path / "run.yaml"
        path.write_text(dump_recipe(found))
        assert load_recipe(path) == found

    def test_two_losses_at_once(self):
        with pytest.raises(ConfigError, match="eaft is sft with that loss, but method.loss is"):
            recipe({"kind": "eaft", "loss": {"kind": "dft"}})

    def test_override(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(dump_recipe(recipe({"kind": "ssu", "score": "mag_l2"})))
        found = load_recipe(path, ["method.loss={kind: eaft}", "method.loss.alpha=2"])
        assert found.method.loss == EaftLossConfig(kind="eaft", alpha=2.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"kind": "eaf"}, "method.kind is 'eaf', expected one of sft, ssu, "),
        ({"kind": "eaf"}, "eaft; nearest: eaft."),
        (
            {"kind": "eaft", "frozen_fraction": 0.5},
            "method.loss.frozen_fraction is not a recipe field (value 0.5;",
        ),
        (
            {"kind": "eaft", "topk": 5},
            "method.loss.topk is not a recipe field (value 5; nearest valid name: top_k).",
        ),
        (
            {"kind": "ssu", "score": "mag_l2", "loss": {"kind": "eaft", "alfa": 5}},
            "method.loss.alfa is not a recipe field (value 5; nearest valid name: alpha).",
        ),
        (
            {"kind": "sft", "loss": {"kind": "dtf"}},
            "method.loss.kind is 'dtf', expected one of cross_entropy, eaft, dft, ",
        ),
        ({"kind": "sft", "loss": {"kind": "dtf"}}, "; nearest: dft."),
        (
            {"kind": "sft", "loss": {"alpha": 2}},
            "method.loss.kind is missing; expected one of asft, constant_gate, cross_entropy,",
        ),
        ({"kind": "sft", "loss": ["eaft", "dft"]}, "method.loss is ['eaft', 'dft']: "),
        ({"kind": "sft", "loss": "eaft"}, "method.loss is 'eaft': "),
        ({"kind": "sft", "loss": {"kind": "talr"}}, "method.loss.tau is missing; add it to the"),
        ({"kind": "sft", "loss": {"kind": "talr", "tau": 0}}, "method.loss: tau must be > 0, got"),
        (
            {"kind": "sft", "loss": {"kind": "constant_gate"}},
            "method.loss.mean_gate is missing; add it to the",
        ),
        (
            {"kind": "sft", "loss": {"kind": "constant_gate", "mean_gate": 0}},
            "method.loss: mean_gate must lie in (0, 1], got 0",
        ),
        (
            {"kind": "sft", "loss": {"kind": "random_gate", "mean_gate": 1.5}},
            "method.loss: mean_gate must lie in (0, 1], got 1.5",
        ),
        (
            {"kind": "sft", "loss": {"kind": "random_gate", "mean_gate": 0.5, "form": "gauss"}},
            "method.loss.form is 'gauss', expected one of power, drop",
        ),
        (
            {"kind": "sft", "loss": {"kind": "sft_kl"}},
            "method.loss.reference is missing; add it to the",
        ),
        (
            {"kind": "sft", "loss": {"kind": "psft", "reference": {}}},
            "method.loss.reference: give exactly one of cache and model",
        ),
        (
            {
                "kind": "sft",
                "loss": {"kind": "asft", "reference": {"cache": "c", "model": "source"}},
            },
            "method.loss.reference: give exactly one of cache and model",
        ),
        (
            {"kind": "sft", "loss": {"kind": "asft", "reference": {"cache": "c", "top_k": 3}}},
            "method.loss.reference: top_k is for model: source; a cache has the number",
        ),
        (
            {"kind": "sft", "loss": {"kind": "flow", "reference": {"model": "source"}}},
            "method.loss: flow weighs whole texts before training, so it needs reference.cache",
        ),
        (
            {"kind": "sft", "loss": {"kind": "asft", "reference": {"model": "teacher"}}},
            "method.loss.reference.model is 'teacher', expected one of source",
        ),
        (
            {
                "kind": "sft",
                "loss": {"kind": "iw_sft", "low": 2, "high": 1, "reference": {"cache": "c"}},
            },
            "low and high must satisfy 0 <= low <= high, got 2.0 and 1.0",
        ),
        ({"kind": "eaft", "alpha": -1}, "method.loss: alpha must be >= 0, got -1.0."),
        ({"kind": "eaft", "top_k": 1}, "method.loss: top_k must be >= 2, got 1."),
        ({"kind": "eaft", "top_k": 2.5}, "method.loss.top_k is 2.5: input should be a valid int"),
        (
            {"kind": "eaft", "divisor": "ln20"},
            "method.loss: divisor must be ln_k or a number > 0, got 'ln20'.",
        ),
        ({"kind": "eaft", "divisor": 0}, "divisor must be ln_k or a number > 0, got 0"),
        ({"kind": "eaft", "gate": "hard", "alpha": 2}, "alpha is for gate power, but gate is hard"),
        ({"kind": "eaft", "slope": 5}, "slope is for gate sigmoid, but gate is power"),
        ({"kind": "eaft", "threshold": 0.3}, "threshold is for gate sigmoid or hard, but gate is"),
        ({"kind": "eaft", "gate": "sigmoid", "slope": 0}, "slope must be > 0, got 0"),
        ({"kind": "eaft", "gate": "soft"}, "method.loss.gate is 'soft', expected one of power,"),
        ({"kind": "eaft", "normalize": "no"}, "method.loss.normalize is 'no', expected one of tok"),
        ({"kind": "sft", "loss": {"kind": "focal", "gamma": -1}}, "gamma must be >= 0, got -1"),
        ({"kind": "sft", "loss": {"kind": "mile", "sigma": -1}}, "sigma must be >= 0, got -1"),
        ({"kind": "sft", "loss": {"kind": "q_log", "q": 0}}, "q must be > 0, got 0"),
        (
            {"kind": "sft", "loss": {"kind": "cross_entropy", "label_smoothing": 1}},
            "label_smoothing must lie in [0, 1), got 1",
        ),
    ],
)
def test_one_sentence_for_a_mistake(method: dict, expected: str):
    with pytest.raises(ConfigError) as caught:
        recipe(method)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message and message.endswith(".")
