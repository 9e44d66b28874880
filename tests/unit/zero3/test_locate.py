"""Where a rank's slice lies: every element on one rank, padding on none."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.zero3.shards import locate
from tests.distributed.harness import ROOT


def partitioned(shape: tuple[int, ...], size: int) -> SimpleNamespace:
    """A parameter as ``zero.Init`` leaves it: a padded part, and its true size."""
    numel = math.prod(shape)
    part = torch.empty(-(-numel // size))
    return SimpleNamespace(ds_tensor=part, ds_numel=numel, ds_shape=torch.Size(shape))


@given(
    st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9))),
    st.integers(1, 12),
)
def test_slices_cover_the_parameter_once(shape: tuple[int, ...], size: int):
    param = partitioned(shape, size)
    found = [locate("w", param, rank, size) for rank in range(size)]
    elements = [i for item in found for i in range(item.start, item.start + item.length)]
    assert elements == list(range(math.prod(shape)))
    for item in found:
        assert item.shape == shape
        assert item.working.numel() == item.length <= param.ds_tensor.numel()


def test_a_rank_may_own_nothing_but_padding():
    found = [locate("w", partitioned((4,), 3), rank, 3) for rank in range(3)]
    assert [(item.start, item.length) for item in found] == [(0, 2), (2, 2), (4, 0)]


def test_the_package_loads_deepspeed_only_when_a_run_starts():
    code = "import forgetscale.zero3, sys; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0
