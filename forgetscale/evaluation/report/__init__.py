"""The retention report: what runs gained and what they forgot, as a page and as JSON."""

from forgetscale.evaluation.report.build import build_report

__all__ = ["build_report"]
