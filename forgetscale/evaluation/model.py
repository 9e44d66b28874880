"""Full evaluation of a Hugging Face folder: every kind of task, on any number of processes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from forgetscale.artifact import canonical_json, hash_bytes, hash_file
from forgetscale.errors import DataError
from forgetscale.evaluation.answers import GeneratedAnswers
from forgetscale.evaluation.bootstrap import NUM_RESAMPLES
from forgetscale.evaluation.collective import Collective, SingleProcess, publish_on_rank_zero
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.forced import (
    ForcedRecall,
    Measured,
    MeasureSettings,
    TokenPerplexity,
)
from forgetscale.evaluation.generate import plain_generation_config
from forgetscale.evaluation.harness.backends import FolderBackend
from forgetscale.evaluation.harness.files import is_harness
from forgetscale.evaluation.harness.task import HarnessTask, load_harness, log_name
from forgetscale.evaluation.likelihood import HuggingFaceLikelihood
from forgetscale.evaluation.loading import load_tasks
from forgetscale.evaluation.plan import num_calls
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.results import Result, SampleRecord, write_results
from forgetscale.evaluation.tasks import ChatTask, check_task_names
from forgetscale.evaluation.text_measures import chrf_signature
from forgetscale.models import is_trusted, load_tokenizer
from forgetscale.progress import Progress

DEFAULT_NEW_TOKENS = 64
DTYPES = ("auto", "float32", "bfloat16")
PreparedTask = TokenPerplexity | ForcedRecall | GeneratedAnswers | HarnessTask
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(slots=True)
class LoadedModel:
    """A model folder ready to be asked.

    Attributes:
        model: Causal language model in evaluation mode, without generation defaults of its own.
        tokenizer: Its tokenizer.
        stop_ids: End-of-sequence ids of the folder's generation settings.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]


def load_model(model_dir: Path, *, dtype: str = "auto", device: str | None = None) -> LoadedModel:
    """Load a Hugging Face folder with plain transformers; its own code runs only if trusted.

    Args:
        model_dir: Folder with ``config.json``, safetensors and tokenizer files.
        dtype: ``auto`` (as stored), ``float32`` or ``bfloat16``.
        device: Torch device; None takes the GPU that ``torch.cuda`` selects, else the CPU.

    Raises:
        DataError: The folder, its weights or its tokenizer are missing.
        ValueError: ``dtype`` is none of the three.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    model_dir = Path(model_dir)
    if not (model_dir / "config.json").is_file():
        raise DataError(f"{model_dir} holds no config.json; expected a Hugging Face model folder.")
    if not any(model_dir.glob("*.safetensors")):
        raise DataError(
            f"{model_dir} holds no .safetensors file; other weight formats can run code when they"
            " are read and are refused; convert the model to safetensors."
        )
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"{model_dir} holds no tokenizer; copy the model's tokenizer files there.")
    tokenizer = load_tokenizer(model_dir)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=is_trusted(model_dir),
    )
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    eos = model.generation_config.eos_token_id
    model.generation_config = plain_generation_config()
    stop_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return LoadedModel(model, tokenizer, stop_ids)


def model_length(config: Any) -> int:
    """Return the tokens a model can look at, 2048 where its configuration does not say."""
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def hash_model(model_dir: Path) -> str:
    """Return the SHA-256 over the configuration and every safetensors file of a model folder."""
    files = [Path(model_dir) / "config.json", *sorted(Path(model_dir).glob("*.safetensors"))]
    return hash_bytes(canonical_json({path.name: hash_file(path) for path in files}))


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Less common choices of a full evaluation.

    Attributes:
        dtype: ``auto`` (as stored), ``float32`` or ``bfloat16``.
        device: Torch device; None takes the selected GPU, else the CPU.
        decoding: Greedy, beams or sampling, for tasks that do not say so themselves.
        generate_exact: Generate answers of exact tasks too, instead of teacher forcing.
        max_rows: Rows used of each token set; None for all.
        num_resamples: Bootstrap resamples, >= 1000.
        allow_code: Tasks of lm-evaluation-harness that may import Python.
    """

    dtype: str = "auto"
    device: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    generate_exact: bool = False
    max_rows: int | None = None
    num_resamples: int = NUM_RESAMPLES
    allow_code: tuple[str, ...] = ()


class ModelEvaluator:
    """Tasks prepared for one loaded model.

    Args:
        loaded: Model and tokenizer.
        tasks: Task names.
        task_dir: Folder of tasks.
        max_new_tokens: Longest answer in tokens, for all tasks or by task name (others: 64).
        options: Decoding and how much is measured.
        asked_dir: Folder in which answers are kept until all is measured; None keeps none.
        log: Receives a line for each Python file that a task runs.

    Raises:
        ConfigError: A task imports code and is not allowed to.
        DataError: A task is missing or malformed, or does not fit the tokenizer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[str],
        task_dir: Path,
        *,
        max_new_tokens: int | Mapping[str, int] = DEFAULT_NEW_TOKENS,
        options: EvaluationOptions | None = None,
        asked_dir: Path | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_task_names(tasks, task_dir)
        self._loaded = loaded
        self._task_dir = task_dir
        self._asked_dir = asked_dir
        self._log = log
        self._max_new_tokens = max_new_tokens
        self._options = options or EvaluationOptions()
        self._likelihood = HuggingFaceLikelihood(loaded.model)
        self._prompts: ChatPrompts | None = None
        self._scores_chrf = False
        self._decodings: dict[str, Any] = {}
        plain = [name for name in tasks if not is_harness(name)]
        loads = load_tasks(
            plain, task_dir, tokenizer=loaded.tokenizer, max_rows=self._options.max_rows
        )
        prepared: dict[str, PreparedTask] = {task.name: self._prepare(task) for task in loads}
        self._tasks = [
            prepared[name] if name in prepared else self._prepare_harness(name) for name in tasks
        ]

    def _prepare_harness(self, name: str) -> HarnessTask:
        loaded = self._loaded
        task = load_harness(
            self._task_dir,
            name,
            loaded.tokenizer,
            max_length=model_length(loaded.model.config),
            stop_ids=loaded.stop_ids or [loaded.tokenizer.eos_token_id],
            allow_code=self._options.allow_code,
            log_dir=self._log_dir(name),
            log=self._log,
        )
        self._scores_chrf |= task.scores_chrf
        return task

    def _prepare(self, task: ChatTask | TokenPerplexity) -> PreparedTask:
        if isinstance(task, TokenPerplexity):
            return task
        prompts = self._prompts = self._prompts or ChatPrompts(self._loaded.tokenizer)
        self._scores_chrf |= task.kind == "chrf"
        if task.decoding is not None:
            self._decodings[task.name] = asdict(task.decoding)
        if task.kind == "exact" and not self._options.generate_exact:
            return ForcedRecall(task, prompts)
        limit = self._max_new_tokens
        return GeneratedAnswers(
            task,
            prompts,
            stop_ids=sorted({*prompts.stop_ids(), *self._loaded.stop_ids}),
            max_new_tokens=limit
            if isinstance(limit, int)
            else limit.get(task.name, DEFAULT_NEW_TOKENS),
            decoding=self._options.decoding,
            log_dir=self._log_dir(task.name),
        )

    def _log_dir(self, name: str) -> Path | None:
        """Return where answers to a task are kept; names of the harness's tasks hold a slash."""
        return None if self._asked_dir is None else self._asked_dir / name

    def use(self, model: Any) -> None:
        """Ask another model of the same tokenizer from now on, such as an edit of the first."""
        self._loaded.model = model
        self._likelihood = HuggingFaceLikelihood(model)

    @property
    def input_hashes(self) -> dict[str, str]:
        """Task name -> SHA-256 of its content; of a token set, whatever rows of it are used."""
        return {task.name: task.input_hash for task in self._tasks}

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded beside the results: limits, decoding, precision."""
        limit = self._max_new_tokens
        return {
            "max_new_tokens": limit if isinstance(limit, int) else dict(limit),
            **asdict(self._options),
            **({"chrf": chrf_signature()} if self._scores_chrf else {}),
            **({"decoding_of_tasks": self._decodings} if self._decodings else {}),
            "dtype": str(self._loaded.model.dtype).removeprefix("torch."),
        }

    def evaluate(
        self,
        collective: Collective,
        settings: MeasureSettings,
        *,
        log_path: Path | None = None,
        before_call: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Measure all tasks.

        Collective: every rank must call it.

        Args:
            collective: The processes that evaluate together.
            settings: Batch size, seed and bootstrap.
            log_path: Text file for plain progress lines.
            before_call: Called on every rank before each next forward call; may raise on all.

        Returns:
            Results in the order of the tasks, and one record per question or row.
        """
        results: list[Result] = []
        samples: list[SampleRecord] = []
        total = sum(
            num_calls(task.num_items, settings.batch_size, collective.world_size)
            for task in self._tasks
        )
        finished = 0
        with Progress(
            total, "evaluate", unit="batch", log_path=log_path, visible=collective.rank == 0
        ) as progress:

            def advance(name: str) -> None:
                nonlocal finished
                finished += 1
                progress.update(finished, name)
                before_call()

            for task in self._tasks:
                start = finished
                # How many calls the requests of the harness make is not known beforehand.
                counted = not isinstance(task, HarnessTask)
                measured = task.measure(
                    self._target(task),
                    collective,
                    settings,
                    functools.partial(advance, task.name) if counted else before_call,
                )
                finished = start + num_calls(
                    task.num_items, settings.batch_size, collective.world_size
                )
                progress.update(finished, task.name)
                results += measured[0]
                samples += measured[1]
        return results, samples

    def _target(self, task: PreparedTask) -> Any:
        """Return what a task is measured on: the model, its likelihoods, or both."""
        loaded = self._loaded
        if isinstance(task, HarnessTask):
            return lambda _: FolderBackend(loaded.model, loaded.tokenizer)
        return loaded.model if isinstance(task, GeneratedAnswers) else self._likelihood


def evaluate_model(
    model_dir: Path,
    tasks: Sequence[str],
    task_dir: Path,
    output_dir: Path,
    *,
    collective: Collective | None = None,
    batch_size: int = 32,
    max_new_tokens: int | Mapping[str, int] = DEFAULT_NEW_TOKENS,
    seed: int = 0,
    options: EvaluationOptions | None = None,
    recipe: Mapping[str, Any] | None = None,
    replace: bool = False,
    log_path: Path | None = None,
    before_call: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Evaluate a model folder on tasks and publish ``results.json`` and ``samples.parquet``.

    Collective: every rank must call it. Each rank loads the whole model.

    Args:
        model_dir: Hugging Face folder.
        tasks: Task names, such as ``recall`` or ``perplexity/target``.
        task_dir: Folder of tasks.
        output_dir: Result folder to make, by rank 0.
        collective: The processes that evaluate together; None for this one alone.
        batch_size: Samples in a forward call, or prompts decoded together, >= 1.
        max_new_tokens: Longest answer in tokens, for all tasks or by task name (others: 64).
        seed: Seed of bootstrap and sampling.
        options: Precision, device, decoding and how much is measured.
        recipe: Resolved recipe to record.
        replace: Swap an existing result folder.
        log_path: Text file for plain progress lines.
        before_call: Called on every rank before each next forward call; may raise on all.
        log: Receives a line for each Python file that a task runs.

    Returns:
        The results, on all ranks.

    Raises:
        DataError: Model folder, task or output folder is not as it must be.
    """
    collective = collective or SingleProcess()
    options = options or EvaluationOptions()
    if Path(output_dir).exists() and not replace:
        raise DataError(f"{output_dir} exists already; name another output folder or remove it.")
    check_task_names(tasks, task_dir)
    loaded = load_model(model_dir, dtype=options.dtype, device=options.device)
    digest = collective.gather_objects(hash_model(model_dir) if collective.rank == 0 else "")[0]
    kept = {"batch_size": batch_size, "seed": seed, "dtype": options.dtype}
    asked = Path(output_dir).with_name(f".{Path(output_dir).name}.asked")
    evaluator = ModelEvaluator(
        loaded,
        tasks,
        task_dir,
        max_new_tokens=max_new_tokens,
        options=options,
        asked_dir=asked / log_name(digest, kept),
        log=log if collective.rank == 0 else lambda line: None,
    )
    settings = MeasureSettings(batch_size, seed, options.num_resamples)
    results, samples = evaluator.evaluate(
        collective, settings, log_path=log_path, before_call=before_call
    )
    write = functools.partial(write_results, output_dir, results, samples, recipe=recipe)

    def publish() -> None:
        recorded = {"model": Path(model_dir).name, "batch_size": batch_size, "seed": seed}
        inputs = {**evaluator.input_hashes, "model": digest}
        write(settings=recorded | evaluator.settings, inputs=inputs, replace=replace)
        shutil.rmtree(asked, ignore_errors=True)

    publish_on_rank_zero(collective, publish)
    return results
