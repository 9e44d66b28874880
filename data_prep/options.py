"""What to build: the options of ``python -m data_prep build``, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.conversations import COLUMNS
from data_prep.filters import FilterOptions
from data_prep.readers import ReadOptions
from forgetscale.data.text import script_pattern
from forgetscale.errors import ConfigError

_NOT_RECORDED = ("num_processes", "log")
_LEAST = {
    "block_size": 1,
    "max_documents": 0,
    "seed": 0,
    "max_document_tokens": 1,
    "min_document_tokens": 1,
    "num_processes": 1,
    "max_line_bytes": 1,
    "max_ratio": 1,
    "max_file_bytes": 1,
    "max_tokens": 1,
    "min_characters": 0,
    "max_characters": 1,
    "min_words": 0,
    "max_words": 1,
    "decontaminate_ngram": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What to build; the fields are those of ``python -m data_prep build``."""

    inputs: tuple[str, ...] = ()
    tokenizer: Path
    block_size: int
    output: Path
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    language: str | None = None
    split: str | None = None
    release: str | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    holdout_fraction: float = 0.0
    holdout_output: Path | None = None
    chat: bool = False
    sft: bool = False
    format: str = "auto"
    long: str = "drop"
    packing: str | None = None
    document_end: str | None = None
    escapes: str = "undo"
    max_document_tokens: int | None = None
    min_document_tokens: int | None = None
    deduplicate: str = "none"
    near_threshold: float = 0.8
    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    script: str | None = None
    min_script_fraction: float = 0.5
    decontaminate: tuple[str, ...] = ()
    decontaminate_ngram: int = 13
    max_reject_fraction: float = 0.05
    text_field: str = "text"
    text_documents: str = "line"
    max_line_bytes: int = 256 << 20
    max_ratio: float = 200.0
    max_file_bytes: int = 1 << 40
    num_processes: int | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        """Fill in what depends on ``sft``, refuse impossible values."""
        if self.packing is None:
            object.__setattr__(self, "packing", "best-fit" if self.sft else "concat")
        if self.document_end is None:
            object.__setattr__(self, "document_end", "none" if self.sft else "eos")
        self._check_sft()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_option(name)} must be >= {least}, got {value}.")
        for name in ("max_reject_fraction", "min_script_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{_option(name)} must be in 0..1, got {getattr(self, name)}.")
        if not 0 < self.near_threshold <= 1:
            raise ConfigError(
                f"--near-threshold must be above 0 and at most 1, got {self.near_threshold}."
            )
        if not 0 <= self.holdout_fraction < 1:
            raise ConfigError(
                f"--holdout-fraction must be at least 0 and below 1, got {self.holdout_fraction}."
            )
        for low, high in (("min_characters", "max_characters"), ("min_words", "max_words")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ConfigError(
                    f"{_option(low)} {least} is above {_option(high)} {most}; no document fits."
                )
        if bool(self.inputs) == (self.dataset is not None):
            raise ConfigError("give either --input or --dataset.")
        if self.holdout_output is not None and not self.holdout_fraction:
            raise ConfigError("--holdout-output needs --holdout-fraction above 0.")
        if self.holdout_output is not None and self.holdout_output == self.output:
            raise ConfigError("--holdout-output must be another folder than --output.")
        if self.script is not None:
            script_pattern(self.script, "--script")

    def _check_sft(self) -> None:
        if not self.sft:
            if self.format != "auto" or self.long != "drop" or self.packing == "none":
                raise ConfigError("--format, --long and --packing none are for --sft; add it.")
            return
        if self.chat:
            raise ConfigError(
                "--chat makes every token of a chat a target, --sft only the assistant's; give one."
            )
        if self.document_end != "none":
            raise ConfigError(
                "--document-end eos is not for --sft: the chat template ends each turn; leave it"
                " out."
            )
        if self.max_document_tokens is not None:
            raise ConfigError(
                "--max-document-tokens would cut answers, which --sft never does; use --block-size"
                " and --long."
            )

    @property
    def read(self) -> ReadOptions:
        """How files are read."""
        return ReadOptions(
            max_line_bytes=self.max_line_bytes,
            max_ratio=self.max_ratio,
            max_file_bytes=self.max_file_bytes,
            text_field=self.text_field,
            chat=self.chat,
            text_documents=self.text_documents,
            columns=COLUMNS if self.sft else (),
        )

    @property
    def filters(self) -> FilterOptions:
        """Which documents are left out."""
        return FilterOptions(
            min_characters=self.min_characters,
            max_characters=self.max_characters,
            min_words=self.min_words,
            max_words=self.max_words,
            script=self.script,
            min_script_fraction=self.min_script_fraction,
            ngram=self.decontaminate_ngram,
        )

    @property
    def needs_survey(self) -> bool:
        """Whether documents are chosen in a first pass."""
        return bool(self.max_documents) or self.deduplicate != "none"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Folders to make: the token set and, if asked for, the held-out one."""
        if not self.holdout_fraction:
            return (self.output,)
        beside = self.output.with_name(f"{self.output.name}-holdout")
        return (self.output, self.holdout_output or beside)

    def recorded(self) -> dict[str, Any]:
        """Return what decides the output, for the manifest."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name not in _NOT_RECORDED
        }


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
