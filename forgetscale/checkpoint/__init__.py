"""Checkpoints that survive any crash, and export to Hugging Face folders."""

from forgetscale.checkpoint.adapter import export_adapter
from forgetscale.checkpoint.export import export_model
from forgetscale.checkpoint.store import CheckpointStore, RunState

__all__ = ["CheckpointStore", "RunState", "export_adapter", "export_model"]
