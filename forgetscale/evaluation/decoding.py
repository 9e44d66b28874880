"""How answers are decoded, for a whole evaluation or for one task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from forgetscale.config.yaml_files import parse_yaml
from forgetscale.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        temperature: 0 decodes greedily; above 0 samples.
        top_p: Share of probability sampled from, in (0, 1].
        top_k: Most tokens sampled from; 0 for all.
        repetition_penalty: Above 1 makes seen tokens less likely, also when greedy.
        beams: Texts followed side by side, >= 1; the most likely is the answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    beams: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "decoding needs temperature >= 0, top_p in (0, 1] and top_k >= 0, got"
                f" {self.temperature}, {self.top_p} and {self.top_k}"
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        if self.beams < 1:
            raise ValueError(f"beams must be >= 1, got {self.beams}")


@dataclass(frozen=True, slots=True)
class TaskDecoding:
    """What the file ``NAME.yaml`` beside a chat task says about its answers.

    Attributes:
        decoding: How they are decoded.
        max_new_tokens: Longest answer in tokens; None leaves it to the evaluation.
    """

    decoding: Decoding
    max_new_tokens: int | None = None


_KINDS: Mapping[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "repetition_penalty": (int, float),
    "beams": (int,),
    "max_new_tokens": (int,),
}


def read_task_decoding(path: Path) -> tuple[TaskDecoding, dict[str, Any]]:
    """Read the decoding of a chat task; return it and what the file says.

    Args:
        path: YAML file with any of the fields of ``Decoding`` and ``max_new_tokens``.

    Raises:
        DataError: It is no safe YAML, names something else, or a value is not possible.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not safe YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path} holds {values!r}, expected fields such as max_new_tokens.")
    for name, value in values.items():
        if name not in _KINDS:
            near = difflib.get_close_matches(str(name), _KINDS, n=1, cutoff=0.0)[0]
            raise DataError(f"{path}: unknown key {name!r}; nearest valid key: {near!r}.")
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            raise DataError(f"{path}: {name} is {value!r}, expected a number.")
    limit = values.get("max_new_tokens")
    if limit is not None and limit < 1:
        raise DataError(f"{path}: max_new_tokens must be > 0, got {limit}.")
    known = {field.name for field in fields(Decoding)}
    try:
        decoding = Decoding(**{name: values[name] for name in known if name in values})
    except ValueError as error:
        raise DataError(f"{path}: {error}.") from error
    return TaskDecoding(decoding, limit), dict(values)
