"""A harness task, prepared once and measured like any other."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetscale.artifact import canonical_json, hash_bytes, hash_file
from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.asked import NothingKept, RequestLog
from forgetscale.evaluation.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    interval_seed,
)
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.forced import Measured, MeasureSettings
from forgetscale.evaluation.harness.backends import Backend
from forgetscale.evaluation.harness.files import HarnessFile, read_harness_file
from forgetscale.evaluation.harness.metrics import CORPUS, SENTENCE, register_metrics
from forgetscale.evaluation.harness.rows import choose_rows
from forgetscale.evaluation.results import Result, SampleRecord
from forgetscale.evaluation.text_measures import chrf_metric, corpus_interval

FEWSHOT_SEED = 1234
"""The harness's own default seed of few-shot examples."""
_OPTIONS = {"chat_template", "system_instruction", "sample", "shortest"}
_RATIOS: Mapping[str, Callable[[float], float]] = {
    "word_perplexity": math.exp,
    "byte_perplexity": math.exp,
    "bits_per_byte": lambda nats: nats / math.log(2.0),
}
MakeBackend = Callable[[Collective], Backend]


@functools.cache
def require_harness() -> None:
    """Check that the harness is there, and take the claws off its templates.

    Its templates are rendered by a plain Jinja environment, in which a task file can reach any
    Python object; transformers renders chat templates in a sandbox for the same reason.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks of lm-evaluation-harness need the package lm-eval, which is not installed; run"
            " pip install 'forgetscale[eval]'."
        )
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True
    )
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox
    register_metrics()


class HarnessTask:
    """One task of lm-evaluation-harness.

    Args:
        file: The checked task file.
        tokenizer: Tokenizer of the model.
        max_length: Tokens the model can look at.
        stop_ids: Tokens that end an answer.
        log_dir: Folder in which answers are kept until the end of an evaluation; None keeps none.
        log: Receives a line for each Python file that is run.

    Raises:
        ConfigError: The harness is not installed, or a metric or filter of the task is unknown.
        DataError: The task cannot be made from its file.
    """

    def __init__(
        self,
        file: HarnessFile,
        tokenizer: Any,
        *,
        max_length: int,
        stop_ids: Sequence[int],
        log_dir: Path | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        require_harness()
        self.name = file.name
        self.input_hash = file.content_hash
        self.generates = file.generates
        metrics = {item.get("metric") for item in file.config.get("metric_list") or ()}
        self.scores_chrf = bool(metrics & {CORPUS, SENTENCE})
        self.num_beams = (file.config.get("generation_kwargs") or {}).get("num_beams", 1)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._stop_ids = tuple(stop_ids)
        self._log_dir = None if log_dir is None else log_dir / file.content_hash[:20]
        self._chat, self._system = _chat_options(file)
        for code in file.code:
            source = code.source
            digest = "" if source is None else f" (SHA-256 {hash_file(source)[:16]})"
            log(f"task {file.name} runs {code.name} from {source or 'an installed module'}{digest}")
        self._task = _make_task(file)
        self._keep_chosen(file)
        self.num_items = len(self._task.eval_docs)
        if not self.num_items:
            raise DataError(f"{file.path}: the data hold no documents.")

    def _keep_chosen(self, file: HarnessFile) -> None:
        """Leave out the rows that the task's file does not choose."""
        options = (file.config.get("metadata") or {}).get("forgetscale") or {}
        rows = choose_rows(self._task.eval_docs, options, self._tokenizer, str(file.path))
        if rows is not None:
            split = self._task.config.test_split or self._task.config.validation_split
            self._task.dataset[split] = self._task.dataset[split].select(rows)

    def measure(
        self,
        make_backend: MakeBackend,
        collective: Collective,
        settings: MeasureSettings,
        on_call: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Ask and judge all documents.

        Collective: every rank must call it.

        Args:
            make_backend: Makes the model's side for the processes that evaluate.
            collective: The processes that evaluate together.
            settings: Batch size, seed and bootstrap.
            on_call: Called on every rank after each batch, equally often.

        Returns:
            One result per metric and filter and one record per document, on all ranks.
        """
        from lm_eval.evaluator import evaluate

        from forgetscale.evaluation.harness.language_model import GlobalRankLM

        log = NothingKept() if self._log_dir is None else RequestLog(self._log_dir, collective)
        model = GlobalRankLM(
            make_backend(collective),
            self._tokenizer,
            collective,
            batch_size=settings.batch_size,
            max_length=self._max_length,
            stop_ids=self._stop_ids,
            seed=settings.seed,
            log=log,
            on_call=on_call,
        )
        name = self.name.rpartition("/")[2]
        self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = evaluate(
            lm=model,
            task_dict={"tasks": {name: self._task}},
            bootstrap_iters=0,
            apply_chat_template=self._chat,
            fewshot_as_multiturn=self._chat,
            system_instruction=self._system,
        )
        # Judged on every rank alike; rank 0's word counts, should a metric of a task draw lots.
        common: Any = collective.gather_objects(found if collective.rank == 0 else None)[0]
        return self._results(common, name, settings), self._samples(common, name)

    def _results(
        self, found: Mapping[str, Any], name: str, settings: MeasureSettings
    ) -> list[Result]:
        results = []
        directions = found["higher_is_better"].get(name, {})
        for key, value in found["results"][name].items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rows = [row for row in found["samples"][name] if row["filter"] == rule]
            values = [row[metric] for row in rows if metric in row]
            spread = _interval(metric, float(value), values, self.name, settings)
            results.append(
                Result(
                    task=self.name,
                    metric=metric if rule == "none" else f"{metric},{rule}",
                    value=float(value),
                    n=len(rows),
                    low=spread.low,
                    high=spread.high,
                    task_hash=self.input_hash,
                    higher_is_better=bool(directions.get(metric, True)),
                    kind="lm_eval",
                )
            )
        return results

    def _samples(self, found: Mapping[str, Any], name: str) -> list[SampleRecord]:
        rows = found["samples"][name]
        return [_record(self.name, row) for row in rows if row["filter"] == rows[0]["filter"]]


def _record(task: str, row: Mapping[str, Any]) -> SampleRecord:
    value = row[row["metrics"][0]] if row["metrics"] else 0.0
    first = row["filtered_resps"][0]
    return SampleRecord(
        task,
        str(row["doc_id"]),
        float(value) if isinstance(value, int | float | np.number) else float("nan"),
        1.0,
        str(row["arguments"][0][0]),
        first if isinstance(first, str) else None,
        str(row["target"]),
        None,
    )


def _interval(
    metric: str, value: float, values: Sequence[Any], name: str, settings: MeasureSettings
) -> Interval:
    """Return the bootstrap interval of a mean or of a ratio of sums; others get one of no width."""
    generator = interval_seed(settings.seed, f"{name}/{metric}")
    if metric in _RATIOS and values:
        pairs = np.array(values, dtype=np.float64)
        drawn = bootstrap_ratio(
            -pairs[:, 0], pairs[:, 1], generator, num_resamples=settings.num_resamples
        )
        turn = _RATIOS[metric]
        return Interval(value, turn(drawn.low), turn(drawn.high))
    if metric == CORPUS and values:
        low, high = corpus_interval(
            chrf_metric(), [(answer, [reference]) for reference, answer in values], generator
        )
        return Interval(value, low, high)
    if values and all(isinstance(item, int | float | np.number) for item in values):
        numbers = np.array(values, dtype=np.float64)
        if np.isclose(numbers.mean(), value):
            return bootstrap_mean(numbers, generator, num_resamples=settings.num_resamples)
    return Interval(value, value, value)


def _chat_options(file: HarnessFile) -> tuple[bool, str | None]:
    """Return whether prompts go through the chat template, and the system turn."""
    metadata = file.config.get("metadata") or {}
    options = metadata.get("forgetscale") or {}
    if unknown := sorted(set(options) - _OPTIONS):
        raise DataError(
            f"{file.path}: metadata.forgetscale names {unknown[0]!r}, expected"
            f" {', '.join(sorted(_OPTIONS))}."
        )
    return bool(options.get("chat_template", False)), options.get("system_instruction")


def _make_task(file: HarnessFile) -> Any:
    from lm_eval.api.registry import filter_registry, metric_registry
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    import lm_eval.api.metrics  # noqa: F401  isort: skip  (fills the registries)
    import lm_eval.filters  # noqa: F401  isort: skip

    for item in file.config.get("metric_list") or ():
        _require_known(file, "metric", item.get("metric"), metric_registry, item)
    for item in file.config.get("filter_list") or ():
        for step in item.get("filter") or ():
            _require_known(file, "filter", step.get("function"), filter_registry, {})
    config = dict(file.config)
    if file.code:
        resolved = load_yaml(file.path, resolve_func=True)
        config = resolved | {key: config[key] for key in ("task", "dataset_kwargs")}
    config.setdefault("num_fewshot", 0)
    try:
        loaded = TaskManager(include_defaults=False).load([config])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file.path} is not a task the harness can make: {error}.") from error
    (task,) = loaded["tasks"].values()
    return task


def _require_known(
    file: HarnessFile, what: str, name: Any, registry: Any, item: Mapping[str, Any]
) -> None:
    """Refuse a name the harness would look for on the hub."""
    if isinstance(name, str) and (name not in registry or item.get("hf_evaluate")):
        raise ConfigError(
            f"{file.path}: {what} {name!r} is not one of the harness's own; others are scripts from"
            " a network and are not run."
        )


def load_harness(
    task_dir: Path,
    name: str,
    tokenizer: Any,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    allow_code: Collection[str] = (),
    log_dir: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> HarnessTask:
    """Read ``task_dir/lm_eval/NAME.yaml`` and make the task; see ``HarnessTask``."""
    file = read_harness_file(task_dir, name, allow_code=allow_code)
    return HarnessTask(
        file, tokenizer, max_length=max_length, stop_ids=stop_ids, log_dir=log_dir, log=log
    )


def log_name(model_hash: str, settings: Mapping[str, Any]) -> str:
    """Return the name of the folder that keeps the answers of one model under some settings."""
    return hash_bytes(canonical_json({"model": model_hash, "settings": dict(settings)}))[:20]
