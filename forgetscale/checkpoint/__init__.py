"""Checkpoints that survive any crash, and export to Hugging Face folders."""

from forgetscale.checkpoint.adapter import export_adapter
from forgetscale.checkpoint.export import export_model
from forgetscale.checkpoint.records import RunState, SaveReport
from forgetscale.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "RunState", "SaveReport", "export_adapter", "export_model"]
