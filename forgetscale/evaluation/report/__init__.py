"""Pages of results: retention of runs, and evaluated models side by side."""

from forgetscale.evaluation.report.build import build_models_report, build_report

__all__ = ["build_models_report", "build_report"]
