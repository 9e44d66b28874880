"""Training data of a run: one token set or a mixture, as one thing with one content hash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.config.data import (
    MAX_PERIOD,
    DataConfig,
    MixtureDataConfig,
    whole_shares,
)
from forgetscale.data.mixture import MixedOrder
from forgetscale.data.order import RowOrder
from forgetscale.data.token_set import TokenSet
from forgetscale.data.tokenizer import require_same_tokenizer
from forgetscale.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DataPart:
    """One token set of the training data."""

    name: str
    """Name in metrics and messages."""
    token_set: TokenSet
    share: int
    """Rows in one period of the mixture, >= 1."""
    seed: int | None
    """Seed of its row order; None takes the stream's."""


class TrainingData:
    """Token sets with their shares; what a stream reads.

    Attributes:
        parts: The token sets. ``set_ids`` of batches are positions in it.
        content_hash: Of one set its own; of several a hash over theirs and the shares.
        block_size: Tokens a row.
        num_rows: Rows of all sets together.
        num_tokens: Tokens of all sets together.

    Args:
        parts: At least one.

    Raises:
        ConfigError: Rows of the sets differ in length.
    """

    def __init__(self, parts: Sequence[DataPart]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0].token_set
        self.block_size = first.block_size
        self.num_rows = sum(part.token_set.num_rows for part in self.parts)
        self.num_tokens = sum(part.token_set.num_tokens for part in self.parts)
        for part in self.parts:
            if part.token_set.block_size != self.block_size:
                raise ConfigError(
                    f"data.sets: rows of {part.token_set.path} have"
                    f" {part.token_set.block_size} tokens, those of {first.path}"
                    f" {self.block_size}; build one of them again with the same --block-size."
                )
        self.content_hash = first.content_hash
        if len(self.parts) > 1:
            described = [[part.token_set.content_hash, part.share] for part in self.parts]
            self.content_hash = hash_bytes(canonical_json({"mixture": described}))

    def order(self, seed: int) -> MixedOrder:
        """Return the order of rows; ``seed`` is for sets without a seed of their own."""
        orders = [
            RowOrder(
                part.token_set.num_rows,
                part.token_set.content_hash,
                seed if part.seed is None else part.seed,
            )
            for part in self.parts
        ]
        return MixedOrder(orders, [part.share for part in self.parts])

    def read(
        self, set_ids: Int64[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"]
    ) -> Int64[Tensor, "rows block"]:
        """Return the ids of chosen rows of chosen sets, in the order asked for.

        Raises:
            DataError: A record batch changed since it was written.
        """
        if len(self.parts) == 1:
            return self.parts[0].token_set.read(rows)
        out = torch.empty((len(rows), self.block_size), dtype=torch.int64)
        for index, part in enumerate(self.parts):
            chosen = np.flatnonzero(set_ids == index)
            if len(chosen):
                out[torch.from_numpy(chosen)] = part.token_set.read(rows[chosen])
        return out

    @property
    def has_padding(self) -> bool:
        """Whether rows of any set end in padding."""
        return any(part.token_set.num_padding_tokens > 0 for part in self.parts)

    @property
    def is_supervised(self) -> bool:
        """Whether rows of any set say which of their tokens are targets."""
        return any(part.token_set.is_supervised for part in self.parts)

    def targets_per_row(self, *, document_mask: bool) -> Fraction:
        """Return the mean number of target tokens of a row, sets weighted by their shares.

        Args:
            document_mask: Each document piece is a text of its own; else each row is one.
        """
        whole = sum(
            part.share * part.token_set.targets_per_row(document_mask=document_mask)
            for part in self.parts
        )
        return Fraction(whole) / sum(part.share for part in self.parts)

    def document_lens(
        self, set_ids: Int64[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"]
    ) -> Int64[Tensor, "rows pieces"]:
        """Return the tokens of each document piece of chosen rows, zeros after the last one.

        Raises:
            DataError: A record batch changed since it was written.
        """
        if len(self.parts) == 1:
            return self.parts[0].token_set.document_lens(rows)
        chosen = [np.flatnonzero(set_ids == index) for index in range(len(self.parts))]
        found = [
            part.token_set.document_lens(rows[places])
            for part, places in zip(self.parts, chosen, strict=True)
        ]
        width = max(lens.shape[1] for lens in found)
        out = torch.zeros((len(rows), width), dtype=torch.int64)
        for places, lens in zip(chosen, found, strict=True):
            out[torch.from_numpy(places), : lens.shape[1]] = lens
        return out

    def loss_mask(
        self, set_ids: Int64[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"]
    ) -> Bool[Tensor, "rows block"]:
        """Return which tokens of chosen rows may be targets: in rows of plain text all of them.

        Raises:
            DataError: A record batch changed since it was written.
        """
        out = torch.ones((len(rows), self.block_size), dtype=torch.bool)
        for index, part in enumerate(self.parts):
            chosen = np.flatnonzero(set_ids == index)
            if len(chosen) and part.token_set.is_supervised:
                out[torch.from_numpy(chosen)] = part.token_set.loss_mask(rows[chosen])
        return out

    def shares(self, counts: Int64[np.ndarray, " sets"]) -> dict[str, float]:
        """Return the share of rows and of tokens that each set has had, for the metrics.

        Args:
            counts: Rows of each set so far. Tokens are counted with the set's mean tokens a row.

        Returns:
            ``data/row_share/NAME``, ``data/token_share/NAME`` and, with SFT rows,
            ``data/target_share/NAME`` and ``data/sequence_share/NAME``: the share of target tokens
            and of conversations.
        """
        if len(self.parts) == 1:
            return {}
        tokens = [
            int(count) * part.token_set.num_tokens / part.token_set.num_rows
            for count, part in zip(counts, self.parts, strict=True)
        ]
        kinds = {"row": [float(count) for count in counts], "token": tokens}
        if self.is_supervised:
            for kind, unit in (("target", "targets"), ("sequence", "sequences")):
                kinds[kind] = [
                    int(count) * float(units_per_row(part.token_set, unit))
                    for count, part in zip(counts, self.parts, strict=True)
                ]
        found = {}
        for kind, sizes in kinds.items():
            whole = max(1.0, math.fsum(sizes))
            for part, size in zip(self.parts, sizes, strict=True):
                found[f"data/{kind}_share/{part.name}"] = size / whole
        return found

    def record(self) -> dict[str, Any]:
        """Return what describes this data; kept in the run folder and compared on resume."""
        sets = []
        for part in self.parts:
            manifest = part.token_set.manifest
            payload = dict(manifest["payload"])
            payload["shards"] = {
                shard["file"]: {"num_rows": shard["num_rows"], "sha256": shard["sha256"]}
                for shard in payload["shards"]
            }
            sets.append(
                {
                    "name": part.name,
                    "path": str(part.token_set.path),
                    "content_hash": part.token_set.content_hash,
                    "share": part.share,
                    "inputs": manifest["inputs"],
                    "manifest": payload,
                }
            )
        return {"content_hash": self.content_hash, "sets": sets}


def open_data(config: DataConfig, tokenizer_dir: Path | None = None) -> TrainingData:
    """Open the training data that a recipe names.

    Args:
        config: The recipe's ``data`` section.
        tokenizer_dir: Folder of the model's tokenizer; None does not compare.

    Raises:
        DataError: A token set is missing or damaged, or was made with another tokenizer.
        ConfigError: The sets of a mixture do not go together, or a set is of another kind than the
            recipe says.
    """
    if isinstance(config, MixtureDataConfig):
        sets = [TokenSet(part.path) for part in config.sets]
        shares = mixture_shares(
            [part.weight for part in config.sets],
            [units_per_row(item, config.unit) for item in sets],
        )
        parts = [
            DataPart(part.shown_name, token_set, share, part.shuffle_seed)
            for part, token_set, share in zip(config.sets, sets, shares, strict=True)
        ]
        kinds = [(f"data.sets[{index}].kind", part.kind) for index, part in enumerate(config.sets)]
    else:
        parts = [DataPart(config.path.name, TokenSet(config.path), 1, None)]
        kinds = [("data.kind", config.kind)]
    for part, (field, kind) in zip(parts, kinds, strict=True):
        _require_kind(part.token_set, field, kind)
    if tokenizer_dir is not None:
        for part in parts:
            require_same_tokenizer(part.token_set, tokenizer_dir)
    return TrainingData(parts)


def _require_kind(token_set: TokenSet, field: str, kind: str) -> None:
    """Refuse SFT rows that would be trained as text, and text as SFT rows."""
    found = "sft" if token_set.is_supervised else "tokens"
    if found != kind:
        holds = {"sft": "SFT rows (build --sft)", "tokens": "plain tokens"}[found]
        raise ConfigError(
            f"{field} is {kind}, but {token_set.path} holds {holds}; set {field} to {found} or name"
            " another folder."
        )


def units_per_row(token_set: TokenSet, unit: str) -> Fraction:
    """Return how much of a unit a row of a set holds on average.

    Args:
        token_set: The set.
        unit: ``rows``, ``tokens``, ``targets`` (each document on its own) or ``sequences``.

    Raises:
        ConfigError: The set holds nothing of it.
    """
    if unit == "rows":
        return Fraction(1)
    if unit == "targets":
        found = Fraction(token_set.targets_per_row(document_mask=True))
    else:
        count = token_set.num_tokens if unit == "tokens" else token_set.num_documents
        found = Fraction(count, token_set.num_rows)
    if found <= 0:
        raise ConfigError(
            f"data.unit is {unit}, but {token_set.path} holds none; choose another unit."
        )
    return found


def mixture_shares(weights: Sequence[float], units: Sequence[Fraction]) -> tuple[int, ...]:
    """Return how many rows of each set one period of the mixture holds.

    Args:
        weights: Each > 0.
        units: What a row of each set holds on average of the unit of the weights, each > 0.

    Returns:
        Whole numbers. Where rows of all sets hold the same, exactly in the proportion of the
        weights; else to within one part in 65,536 of the period.
    """
    exact = [Fraction(str(weight)) / mean for weight, mean in zip(weights, units, strict=True)]
    shares = whole_shares(exact)
    if sum(shares) <= MAX_PERIOD:
        return shares
    return _nearest_shares(exact, MAX_PERIOD)


def _nearest_shares(exact: Sequence[Fraction], period: int) -> tuple[int, ...]:
    """Return whole numbers >= 1 that sum to ``period``, nearest to ``exact`` (largest rest)."""
    total = sum(exact)
    ideal = [item * period / total for item in exact]
    shares = [max(1, math.floor(item)) for item in ideal]
    order = sorted(range(len(ideal)), key=lambda index: (shares[index] - ideal[index], index))
    for index in order[: max(0, period - sum(shares))]:
        shares[index] += 1
    return tuple(shares)


def data_difference(before: Mapping[str, Any], now: Mapping[str, Any], *, most: int = 6) -> str:
    """Return a phrase that says how training data differ.

    Args:
        before: ``TrainingData.record()`` of the run's start.
        now: ``TrainingData.record()`` of today.
        most: Fields named for each set, >= 1.
    """
    old = {part["name"]: part for part in before["sets"]}
    new = {part["name"]: part for part in now["sets"]}
    if len(old) == len(new) == 1:
        new = dict(zip(old, new.values(), strict=True))  # the one set may lie elsewhere now
    phrases = [f"set {name} is gone" for name in old if name not in new]
    phrases += [f"set {name} is new" for name in new if name not in old]
    for name in (name for name in new if name in old):
        was, found = old[name], new[name]
        differing = list(_differences(was, found))
        if was["content_hash"] != found["content_hash"] or was["share"] != found["share"]:
            shown = differing[:most]
            if len(differing) > most:
                shown.append(f"{len(differing) - most} fields more")
            phrases.append(f"{found['path']}: {', '.join(shown)}")
    if not phrases:
        phrases.append("the order of the sets")
    return "; ".join(phrases)


_SAID_ALREADY = {"content_hash", "name", "path"}


def _differences(was: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    old, new = dict(_leaves(was)), dict(_leaves(found))
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name.removeprefix('manifest.')} was {_short(old.get(name))}, is {_short(new.get(name))}"
        for name in names
        if name not in _SAID_ALREADY and old.get(name) != new.get(name)
    ]


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return [(path, value)]
    return [leaf for name, inner in items for leaf in _leaves(inner, name)]


def _short(value: Any) -> str:
    if value is None:
        return "absent"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
