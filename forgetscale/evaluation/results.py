"""What an evaluation returns, and the result artefact it is stored in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetscale.artifact import ArtifactWriter, verify_artifact, write_json
from forgetscale.errors import DataError

RESULT_KIND = "result"
RESULTS_NAME = "results.json"
SAMPLES_NAME = "samples.parquet"


@dataclass(frozen=True, slots=True)
class Result:
    """One measured number.

    Attributes:
        task: Name, such as ``recall`` or ``perplexity/target``.
        metric: ``accuracy``, ``rate``, ``perplexity`` or ``bits_per_byte``.
        value: The number; accuracies and rates lie in 0..1.
        n: Questions or rows behind it.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end of the interval.
        task_hash: SHA-256 of what was asked; only equal hashes may be compared.
        higher_is_better: False for perplexity, bits per byte, over-refusal and code-mixing.
        kind: How rows were judged: ``exact``, ``check``, ``refusal``, ``no_refusal``,
            ``code_mixing`` or ``perplexity``.
    """

    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    task_hash: str
    higher_is_better: bool
    kind: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Result:
        """Read a result.

        Args:
            value: JSON object.
            where: File and line, for the message.

        Raises:
            DataError: A field is missing.
        """
        names = {field.name for field in fields(cls)}
        missing = names - {"kind"} - set(value)
        if missing:
            raise DataError(
                f"{where}: a result lacks {', '.join(sorted(missing))}; expected the fields"
                f" {', '.join(sorted(names))}; evaluate again."
            )
        return cls(**{name: value[name] for name in names if name in value})


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """What happened on one question or row, kept so that a number can be looked into.

    Attributes:
        task: Task name.
        id: Id of the row within the task.
        value: 1 or 0 for judged answers (1: the metric counts it); nats for a token row.
        weight: 1 for an answer, predicted tokens for a token row.
        prompt: Last user turn; empty for token rows.
        answer: What the model said; None where nothing was generated.
        expected: Accepted answers, one a line; empty where none are.
        finish: ``stop`` or ``length`` for a generated answer, else None.
    """

    task: str
    id: str
    value: float
    weight: float
    prompt: str
    answer: str | None
    expected: str
    finish: str | None


_SAMPLE_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("expected", pa.string()),
        ("finish", pa.string()),
    ]
)


def write_results(
    output_dir: Path,
    results: Sequence[Result],
    samples: Sequence[SampleRecord],
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Publish ``results.json`` and ``samples.parquet`` as a result artefact. Rank 0 only.

    Args:
        output_dir: Folder to make.
        results: Measured numbers.
        samples: One record per question or row behind them.
        settings: How it was measured (model, batch size, decoding, seed).
        inputs: Name -> content hash of what was evaluated on.
        recipe: Resolved recipe of the run, if there is one.
        replace: Swap an existing result artefact.

    Returns:
        ``output_dir``.

    Raises:
        DataError: ``output_dir`` exists (without ``replace``).
    """
    writer = ArtifactWriter(Path(output_dir), RESULT_KIND, recipe=recipe, replace=replace)
    with writer:
        writer.inputs = dict(inputs or {})
        writer.payload = {"settings": dict(settings), "num_results": len(results)}
        write_json(
            writer.path / RESULTS_NAME,
            {"results": [result.to_json() for result in results], "settings": dict(settings)},
        )
        columns = {
            name: [getattr(sample, name) for sample in samples] for name in _SAMPLE_SCHEMA.names
        }
        pq.write_table(pa.table(columns, schema=_SAMPLE_SCHEMA), writer.path / SAMPLES_NAME)
    return Path(output_dir)


def read_samples(directory: Path) -> list[SampleRecord]:
    """Read and verify the records of a result artefact.

    Raises:
        DataError: The folder is no valid result artefact or holds something else.
    """
    directory = Path(directory)
    verify_artifact(directory, RESULT_KIND, only=[SAMPLES_NAME])
    rows = pq.read_table(directory / SAMPLES_NAME, schema=_SAMPLE_SCHEMA).to_pylist()
    return [SampleRecord(**row) for row in rows]


def read_results(directory: Path) -> list[Result]:
    """Read and verify a result artefact.

    Raises:
        DataError: The folder is no valid result artefact or holds something else.
    """
    directory = Path(directory)
    verify_artifact(directory, RESULT_KIND, only=[RESULTS_NAME])
    path = directory / RESULTS_NAME
    content = json.loads(path.read_bytes())
    return [Result.from_json(value, str(path)) for value in content["results"]]
