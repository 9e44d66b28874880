"""Everything a recipe names is opened and checked before any work starts."""

from __future__ import annotations

from typing import Any

from forgetscale.config import Recipe
from forgetscale.data import TokenSet, open_data, require_same_tokenizer, require_vocabulary
from forgetscale.engine.data_state import read_run_skips
from forgetscale.engine.extras import check_reference
from forgetscale.errors import ConfigError
from forgetscale.evaluation.alignment_sets import require_refusals
from forgetscale.evaluation.harness import is_harness, read_harness_file
from forgetscale.evaluation.prompt_files import REFUSALS
from forgetscale.evaluation.reuse import is_live_task
from forgetscale.evaluation.tasks import check_task_names
from forgetscale.masks import load_plan
from forgetscale.models import (
    SafetensorsFolder,
    build_skeleton,
    load_tokenizer,
    parameter_shapes,
    read_model_config,
)


def check_inputs(recipe: Recipe) -> None:
    """Open the recipe's model, token sets, plan and tasks. Call on one process; reads headers.

    Raises:
        ConfigError: The loss looks at more logits than there are, a task cannot be measured as
            asked, or the plan does not fit the model.
        DataError: A folder is missing, damaged or made with another tokenizer, holds ids beyond
            the model's vocabulary, or a skip list is wrong.
    """
    config = read_model_config(recipe.model.path, recipe.model.attn_implementation)
    shapes = parameter_shapes(build_skeleton(config))
    SafetensorsFolder(recipe.model.path).check_shapes(shapes)
    top_k = getattr(recipe.method.loss, "top_k", 0)
    if top_k > config.vocab_size:
        raise ConfigError(
            f"method.loss.top_k is {top_k}, but {recipe.model.path} has a vocabulary of"
            f" {config.vocab_size}; lower it."
        )
    data = open_data(recipe.data, recipe.model.path)
    for part in data.parts:
        require_vocabulary(part.token_set, config.vocab_size, recipe.model.path)
    read_run_skips(recipe, data)
    check_reference(recipe, data, config.vocab_size)
    calibration = getattr(recipe.method, "calibration", None)
    if calibration is not None:
        require_same_tokenizer(TokenSet(calibration.path), recipe.model.path)
    check_alignment_data(recipe)
    plan = getattr(recipe.method, "plan", None)
    if plan is not None:
        load_plan(plan).check_model(shapes)
    evaluate = recipe.evaluate
    if evaluate.refusal_probe is not None and evaluate.task_dir is not None:
        check_task_names(evaluate.refusal_probe.tasks, evaluate.task_dir)
    if evaluate.tasks and evaluate.task_dir is not None:
        check_task_names(evaluate.tasks, evaluate.task_dir)
        for name in filter(is_harness, evaluate.tasks):
            read_harness_file(evaluate.task_dir, name, allow_code=evaluate.allow_code)
        for name in evaluate.live_tasks or ():
            # Those of the harness are generated in lock-step where they are named.
            if not is_harness(name) and not is_live_task(name, evaluate.task_dir):
                raise ConfigError(
                    f"evaluate.live_tasks: {name!r} needs generated answers and cannot be measured"
                    " during training; name it in evaluate.tasks alone."
                )
    _check_retention(recipe)


def check_alignment_data(recipe: Recipe) -> None:
    """Look for refusals in alignment data that a basis will be measured on; decodes its rows.

    Raises:
        DataError: The data hold none, or were made with another tokenizer.
    """
    method: Any = recipe.method
    openings = getattr(method, "refusals", ())
    if openings is None:
        openings = REFUSALS
    sources = {}
    if openings and method.basis is None:
        sources["method.calibration"] = method.calibration
    if openings and method.refresh is not None:
        sources["method.refresh.calibration"] = method.refresh.calibration
    tokenizer = None
    for field, source in sources.items():
        if source is not None:
            token_set = TokenSet(source.path)
            require_same_tokenizer(token_set, recipe.model.path)
            path = recipe.model.path
            tokenizer = tokenizer or load_tokenizer(path)
            require_refusals(field, source, token_set, tokenizer, openings)


def _check_retention(recipe: Recipe) -> None:
    """Check that the tasks of the retention gate are there and need no generated text."""
    config = recipe.retention
    task_dir = None if config is None else config.task_dir or recipe.evaluate.task_dir
    if config is None or task_dir is None:
        return
    check_task_names(config.tasks, task_dir)
    for name in config.tasks:
        if is_harness(name):
            read_harness_file(task_dir, name, allow_code=recipe.evaluate.allow_code)
        elif not is_live_task(name, task_dir):
            raise ConfigError(
                f"retention.budgets: {name!r} needs generated answers and cannot be measured during"
                " training; name perplexity, exact or lm_eval tasks."
            )
