"""Evaluation: in the loop on the live model, in full on a model folder, and the report."""

from forgetscale.evaluation.collective import Collective, ProcessGroupCollective, SingleProcess
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.likelihood import (
    HuggingFaceLikelihood,
    LikelihoodModel,
    nll_and_argmax,
)
from forgetscale.evaluation.live import LiveEvaluator, evaluate_live
from forgetscale.evaluation.model import EvaluationOptions, evaluate_model
from forgetscale.evaluation.results import Result, SampleRecord, read_results, write_results
from forgetscale.evaluation.tasks import ChatTask, available_tasks, load_chat_task

__all__ = [
    "ChatTask",
    "Collective",
    "Decoding",
    "EvaluationOptions",
    "HuggingFaceLikelihood",
    "LikelihoodModel",
    "LiveEvaluator",
    "ProcessGroupCollective",
    "Result",
    "SampleRecord",
    "SingleProcess",
    "available_tasks",
    "evaluate_live",
    "evaluate_model",
    "load_chat_task",
    "nll_and_argmax",
    "read_results",
    "write_results",
]
