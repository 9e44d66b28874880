"""Checkpoints that survive any crash, and export to Hugging Face folders."""

from forgetscale.checkpoint.export import export_model
from forgetscale.checkpoint.store import CheckpointStore, RunState

__all__ = ["CheckpointStore", "RunState", "export_model"]
