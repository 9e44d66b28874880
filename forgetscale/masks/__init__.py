"""Freeze plans and their effect on flat slices. Pure: no process group, no DeepSpeed."""

from forgetscale.masks.adapters import AdapterPair, factor_shapes
from forgetscale.masks.bits import ElementMask, count_bits, pack_slice, unpack_bits
from forgetscale.masks.compact import CompactLayout, Piece, compact_layout
from forgetscale.masks.flat import (
    SliceMask,
    by_column,
    column_power_sums,
    row_power_sums,
    split_rows,
)
from forgetscale.masks.plan import FreezePlan, Mask, load_plan, save_plan
from forgetscale.masks.threshold import Cut, Segment, find_cuts, order_keys

__all__ = [
    "AdapterPair",
    "CompactLayout",
    "Cut",
    "ElementMask",
    "FreezePlan",
    "Mask",
    "Piece",
    "Segment",
    "SliceMask",
    "by_column",
    "column_power_sums",
    "compact_layout",
    "count_bits",
    "factor_shapes",
    "find_cuts",
    "load_plan",
    "order_keys",
    "pack_slice",
    "row_power_sums",
    "save_plan",
    "split_rows",
    "unpack_bits",
]
