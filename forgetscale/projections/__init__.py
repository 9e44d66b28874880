"""Anchors, metrics and projectors of weight changes, on slices; pure, sums over ranks are given."""

from forgetscale.projections.frames import (
    AllReduce,
    Communication,
    Frame,
    LeftFrame,
    MaskFrame,
    Place,
    RightFrame,
    TwoSidedFrame,
    VectorFrame,
    find_cut_rows,
)
from forgetscale.projections.guards import (
    Anchor,
    Guard,
    Report,
    add_penalty_,
    floats_per_step,
    look,
    measure,
    project_,
    shrink_,
)
from forgetscale.projections.metrics import DiagonalMetric, FrameMetric, IdentityMetric, Metric
from forgetscale.projections.projectors import Complement, Onto, Projector, TwoSidedComplement

__all__ = [
    "AllReduce",
    "Anchor",
    "Communication",
    "Complement",
    "DiagonalMetric",
    "Frame",
    "FrameMetric",
    "Guard",
    "IdentityMetric",
    "LeftFrame",
    "MaskFrame",
    "Metric",
    "Onto",
    "Place",
    "Projector",
    "Report",
    "RightFrame",
    "TwoSidedComplement",
    "TwoSidedFrame",
    "VectorFrame",
    "add_penalty_",
    "find_cut_rows",
    "floats_per_step",
    "look",
    "measure",
    "project_",
    "shrink_",
]
