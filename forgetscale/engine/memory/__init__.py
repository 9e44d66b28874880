"""The memory model: what lasts, what ZeRO-3 gathers, and what a micro-batch needs."""

from forgetscale.engine.memory.gather import Event, GatherSettings, gathered_elements
from forgetscale.engine.memory.state import StateBytes, built_shapes, copy_bytes, state_bytes
from forgetscale.engine.memory.trace import Setting, Trace, trace_micro_batch

__all__ = [
    "Event",
    "GatherSettings",
    "Setting",
    "StateBytes",
    "Trace",
    "built_shapes",
    "copy_bytes",
    "gathered_elements",
    "state_bytes",
    "trace_micro_batch",
]
