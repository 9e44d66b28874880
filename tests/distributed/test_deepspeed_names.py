"""Canary: every name of DeepSpeed's inside that ``forgetscale/zero3`` leans on.

When a new DeepSpeed release renames one, this fails first and says which.
"""

from __future__ import annotations

import ast

import pytest
from torch import Tensor, nn

from tests.distributed.harness import ROOT, RankServer
from tests.distributed.runs import Runs

NAMES = {
    "engine": [
        "backward",
        "destroy",
        "get_global_grad_norm",
        "module",
        "optimizer",
        "set_gradient_accumulation_boundary",
        "skipped_steps",
        "step",
        "train",
        "was_step_applied",
    ],
    "optimizer": [
        "_constant_buffered_norm2",
        "_unflatten_partitioned_parameters",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_partitions_flat_buffer",
        "grad_position",
        "norm_for_param_grads",
        "offload_optimizer",
        "optimizer",
        "persistent_parameters",
    ],
    "forward_only": ["release_backward_leftovers"],
    "param": ["all_gather", "ds_numel", "ds_shape", "ds_status", "ds_tensor", "partition"]
    + ["partition_numel"],
    "comm": ["build_shm_op"],
}
OWNERS = {
    "self._engine": "engine",
    "engine": "engine",
    "optimizer": "optimizer",
    "self._optimizer": "optimizer",
    "self._engine.optimizer": "optimizer",
    "forward_only": "forward_only",
    "param": "param",
    "item.param": "param",
    "persistent[0]": "param",
    "torch_comm": "comm",
}


@pytest.mark.parametrize("offload", [False, True])
def test_every_name_exists(ranks: RankServer, runs: Runs, offload: bool):
    changes = {"deepspeed": str(runs.world() / "zero3_offload.json")} if offload else {}
    recipe = runs.recipe("names", changes=changes)
    found = ranks.must("names:present", 1, recipe=recipe, names=NAMES).value
    # Only the offloading optimizer keeps norms.
    expected = [] if offload else ["norm_for_param_grads"]
    assert found["missing"] == {**{name: [] for name in NAMES}, "optimizer": expected}


def test_the_list_is_complete():
    used = set()
    for path in sorted((ROOT / "forgetscale" / "zero3").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = OWNERS.get(ast.unparse(node.value))
                if owner is not None:
                    used.add((owner, node.attr))
    ordinary = {"param": set(dir(Tensor)), "engine": set(dir(nn.Module)), "optimizer": set()}
    unlisted = {
        (owner, name)
        for owner, name in used
        if name not in NAMES[owner] and name not in ordinary.get(owner, set())
    }
    assert unlisted == {("engine", "shards")} & unlisted, "add these to NAMES"
    listed = {(owner, name) for owner, names in NAMES.items() for name in names}
    gone = {
        item for item in listed - used if item[1] not in ("fp16_groups", "persistent_parameters")
    }
    assert not gone, "no longer used: remove these from NAMES"
