"""Which tasks run on a live model, and whether a measurement is already there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forgetscale.artifact import read_manifest
from forgetscale.data import TokenSet
from forgetscale.errors import DataError
from forgetscale.evaluation.harness.files import is_harness, read_harness_file
from forgetscale.evaluation.model import hash_model
from forgetscale.evaluation.results import RESULT_KIND
from forgetscale.evaluation.tasks import is_perplexity, load_chat_task


def is_live_task(name: str, task_dir: Path) -> bool:
    """Return whether a task needs no generated text, so that the training loop can measure it."""
    if is_harness(name):
        # What it may import is checked where it is loaded; here it is only read.
        return not read_harness_file(task_dir, name, allow_code=[name]).generates
    return is_perplexity(name) or load_chat_task(task_dir, name).kind == "exact"


def results_match(
    output_dir: Path,
    model_dir: Path,
    tasks: Sequence[str],
    task_dir: Path,
    max_new_tokens: int,
    seed: int,
) -> bool:
    """Return whether ``output_dir`` holds the results of these tasks on this model.

    Batch size and number of ranks do not change results and are not compared (what is sampled does
    depend on the batch size, by no more than on the seed).

    Args:
        output_dir: Result folder; it need not exist.
        model_dir: Model folder.
        tasks: Task names.
        task_dir: Folder of tasks.
        max_new_tokens: Longest answer.
        seed: Seed of sampling and intervals.
    """
    try:
        manifest = read_manifest(output_dir, RESULT_KIND)
    except DataError:
        return False
    inputs = dict(manifest["inputs"])
    settings = manifest["payload"]["settings"]
    if (settings.get("max_new_tokens"), settings.get("seed")) != (max_new_tokens, seed):
        return False
    expected = {name: task_input_hash(name, task_dir) for name in tasks}
    if set(inputs) != {*expected, "model"}:
        return False
    return all(inputs[name] == digest for name, digest in expected.items()) and (
        inputs["model"] == hash_model(model_dir)
    )


def task_input_hash(name: str, task_dir: Path) -> str:
    """Return the hash of a task's content, without a model."""
    if is_perplexity(name):
        return TokenSet(task_dir / name).content_hash
    if is_harness(name):
        return read_harness_file(task_dir, name, allow_code=[name]).content_hash
    return load_chat_task(task_dir, name).task_hash
