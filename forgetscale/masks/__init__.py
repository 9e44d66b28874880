"""Freeze plans and their effect on flat slices. Pure: no process group, no DeepSpeed."""

from forgetscale.masks.flat import SliceMask, column_power_sums, split_rows
from forgetscale.masks.plan import FreezePlan, load_plan, save_plan

__all__ = [
    "FreezePlan",
    "SliceMask",
    "column_power_sums",
    "load_plan",
    "save_plan",
    "split_rows",
]
