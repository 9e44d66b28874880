"""The interface: hooks a method does not use cost nothing and change nothing."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch

from forgetscale.api import (
    EDITS_GRADIENTS,
    EDITS_PARAMS,
    EDITS_START,
    Unprotected,
    overrides,
)
from forgetscale.config import (
    AdaloraMethodConfig,
    AlignguardLoraMethodConfig,
    AlignguardMethodConfig,
    AsftLoraMethodConfig,
    CalibrationConfig,
    CloraMethodConfig,
    EaftLossConfig,
    EwcLoraMethodConfig,
    EwcMethodConfig,
    FreezeLayersMethodConfig,
    GmtMethodConfig,
    HftMethodConfig,
    L2SpLoraMethodConfig,
    L2SpMethodConfig,
    LoraNullMethodConfig,
    LossConfig,
    LotaMethodConfig,
    MofoMethodConfig,
    OloraMethodConfig,
    OploraMethodConfig,
    OsfMethodConfig,
    S2ftMethodConfig,
    SaloraMethodConfig,
    SftMethodConfig,
    SpdMethodConfig,
    SsuMethodConfig,
)
from forgetscale.methods import METHODS
from forgetscale.ops.losses import LOSSES, cross_entropy, entropy_weighted_loss, loss_needs

CONFIGS = {
    "sft": SftMethodConfig(),
    "ssu": SsuMethodConfig(kind="ssu", score="mag_l1"),
    "hft": HftMethodConfig(kind="hft"),
    "gmt": GmtMethodConfig(kind="gmt"),
    "gmt_official": GmtMethodConfig(kind="gmt_official"),
    "lota": LotaMethodConfig(kind="lota"),
    "s2ft": S2ftMethodConfig(kind="s2ft"),
    "l2_sp": L2SpMethodConfig(kind="l2_sp"),
    "ewc": EwcMethodConfig(kind="ewc", basis="fisher"),
    "online_ewc": EwcMethodConfig(kind="online_ewc", basis="fisher"),
    "alignguard": AlignguardMethodConfig(kind="alignguard", basis="fisher"),
    "osf": OsfMethodConfig(kind="osf"),
    "alignguard_lora": AlignguardLoraMethodConfig(kind="alignguard_lora", basis="fisher"),
    "ewc_lora": EwcLoraMethodConfig(kind="ewc_lora", basis="fisher"),
    "l2_sp_lora": L2SpLoraMethodConfig(kind="l2_sp_lora"),
    "olora": OloraMethodConfig(kind="olora"),
    "clora": CloraMethodConfig(kind="clora"),
    "oplora": OploraMethodConfig(kind="oplora"),
    "asft_lora": AsftLoraMethodConfig(kind="asft_lora", base="base"),
    "salora": SaloraMethodConfig(kind="salora", calibration=CalibrationConfig(path="x")),
    "lora_null": LoraNullMethodConfig(kind="lora_null", calibration=CalibrationConfig(path="x")),
    "freeze_layers": FreezeLayersMethodConfig(kind="freeze_layers"),
    "adalora": AdaloraMethodConfig(kind="adalora", target_rank=2, shrink_until_step=9),
    "spd": SpdMethodConfig(kind="spd"),
    "mofo": MofoMethodConfig(kind="mofo"),
}
ANCHORED = {"l2_sp", "ewc", "online_ewc", "alignguard", "osf"}
ANCHORED |= {"alignguard_lora", "ewc_lora", "l2_sp_lora"}
"""Methods that hold weights near their source; their state names what they hold."""
DIRECTIONS = {"asft_lora", "salora", "lora_null"}
"""Methods that know directions; their state names them."""
OWN_STATE = ANCHORED | DIRECTIONS | {"adalora"}
HOOKS = {"gmt": {EDITS_GRADIENTS, EDITS_PARAMS}, "gmt_official": {EDITS_GRADIENTS}}
HOOKS |= dict.fromkeys(OWN_STATE | {"olora", "clora"}, {EDITS_GRADIENTS, EDITS_PARAMS})
HOOKS["oplora"] = HOOKS["salora"] = {EDITS_PARAMS}
HOOKS["spd"] = HOOKS["mofo"] = {EDITS_GRADIENTS, EDITS_PARAMS}
HOOKS["lora_null"] = {EDITS_START, EDITS_PARAMS}
"""Hooks a method uses; static plans use none."""


def test_every_method_has_a_config_here():
    assert set(CONFIGS) == set(METHODS), "add the new method to the tests"


@pytest.mark.parametrize("kind", METHODS)
def test_plain_loss_and_no_state(kind: str):
    method = METHODS[kind](CONFIGS[kind])
    logits, labels = torch.randn(5, 9), torch.tensor([1, 2, -100, 4, 0])
    assert torch.equal(method.loss(logits, labels), cross_entropy(logits, labels))
    if kind not in OWN_STATE:
        assert method.state_dict() == {}
        method.load_state_dict({})
        with pytest.raises(ValueError, match="has no state, got"):
            method.load_state_dict({"x": 1})
    hooks = EDITS_GRADIENTS, EDITS_PARAMS, EDITS_START
    used = {hook for hook in hooks if overrides(method, hook)}
    assert used == HOOKS.get(kind, set())


@pytest.mark.parametrize("kind", METHODS)
def test_any_loss_goes_with_any_protection(kind: str):
    loss = EaftLossConfig(kind="eaft", alpha=2.0, top_k=4, normalize="weights")
    method = METHODS[kind](dataclasses.replace(CONFIGS[kind], loss=loss))
    logits, labels = torch.randn(5, 9), torch.tensor([1, 2, -100, 4, 0])
    expected = entropy_weighted_loss(logits, labels, alpha=2.0, top_k=4)
    assert torch.equal(method.loss(logits, labels), expected)
    assert method.loss.normalize == "weights"
    assert METHODS[kind](CONFIGS[kind]).loss.normalize == "tokens"


REQUIRED = {"talr": {"tau": 2.0}, "constant_gate": {"mean_gate": 0.3}}
"""Options of losses that have no default."""


def test_every_loss_of_a_recipe_is_made_with_its_defaults():
    logits, labels = torch.randn(5, 30), torch.tensor([1, 2, -100, 4, 0])
    compared = set()
    for config in get_args(get_args(LossConfig)[0]):
        kind = get_args(get_type_hints(config)["kind"])[0]
        if loss_needs(kind):
            continue  # a source model or noise: tests/distributed/test_logit_cache.py
        options = REQUIRED.get(kind, {})
        method = METHODS["sft"](SftMethodConfig(loss=config(kind=kind, **options)))
        assert torch.equal(method.loss(logits, labels), LOSSES[kind](logits, labels, **options))
        compared.add(kind)
    assert compared == {kind for kind in LOSSES if not loss_needs(kind)}


def test_sft_protects_nothing():
    assert METHODS["sft"](CONFIGS["sft"]).prepare(None) is None


def test_overrides_sees_a_hook_that_does_something():
    class Editing(Unprotected):
        def after_step(self, shards, step):
            return {"x": 1.0}

    assert overrides(Editing(), EDITS_PARAMS)
    assert not overrides(Editing(), EDITS_GRADIENTS)
