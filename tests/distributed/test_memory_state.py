"""Bytes of weights, masters, moments and gradients: predicted from shapes, held by engines."""

from __future__ import annotations

import pytest

from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs

PRECISIONS = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
METHODS = {
    "full": {"kind": "sft"},
    "masked": {"kind": "ssu", "layout": "masked", "score": "rand"},
    "compact": {"kind": "ssu", "score": "rand", "frozen_fraction": 0.3},
    "rows": {"kind": "ssu", "score": "rand", "axis": "row", "shield_token_ids": [1, 5]},
    "hft": {"kind": "hft"},
}


def recipes(runs: Runs) -> dict[str, dict]:
    found = {}
    for dtype, accumulation in PRECISIONS:
        changes = {"model.dtype": dtype, "train.accumulation_dtype": accumulation}
        for method, section in METHODS.items():
            name = f"{method}-{dtype}-{accumulation}"
            found[name] = runs.recipe(f"memory-{name}", section, changes)
    world = runs.world()
    for method in ("masked", "compact"):
        changes = {"deepspeed": str(world / "zero3_offload.json")}
        found[f"{method}-offload"] = runs.recipe("memory-offload", METHODS[method], changes)
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_state_is_predicted_to_the_byte(ranks: RankServer, runs: Runs, size: int):
    made = recipes(runs)
    outcome = ranks.must("memory:states", size, recipes=made)
    for value in outcome.values:
        assert set(value) == set(made)
        for name, found in value.items():
            assert found["predicted"] == found["measured"], name
            assert found["offloaded"] == (name.endswith("-offload"),) * 2, name
            # Padding is not copied; the first rank owns none.
            assert 0 < found["copies"] <= found["predicted_copies"], name
            assert (found["cut"] > 0) == name.startswith(("compact", "rows")), name
    for name, found in outcome.value.items():
        assert found["copies"] == found["predicted_copies"], name
