"""The training loop and what surrounds it: run folder, calibration, audit, metrics."""

from forgetscale.engine.folder import check_run_folder, open_run_folder
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.plans import make_plan, write_plan
from forgetscale.engine.run import export_checkpoint, train
from forgetscale.engine.start import open_source

__all__ = [
    "check_run_folder",
    "RunLog",
    "export_checkpoint",
    "make_plan",
    "open_run_folder",
    "open_source",
    "train",
    "write_plan",
]
