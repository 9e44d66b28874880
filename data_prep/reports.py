"""Looking at a finished token set: damage, one row, statistics."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.encoding import load_tokenizer
from forgetscale.data import TokenSet, require_same_tokenizer
from forgetscale.errors import ConfigError, DataError

_OPEN, _CLOSE = "⟦", "⟧"


class RowReader:
    """Rows of a token set as people read them.

    Args:
        token_set: The set.
        tokenizer_dir: Tokenizer to decode with; None: the one the set was built with.

    Raises:
        ConfigError: The set does not say which tokenizer made it.
        DataError: The tokenizer is gone or another one.
    """

    def __init__(self, token_set: TokenSet, tokenizer_dir: Path | None) -> None:
        folder = tokenizer_dir or token_set.payload.get("tokenizer_path")
        if folder is None:
            raise ConfigError(
                f"{token_set.path} does not say which tokenizer made it; pass --tokenizer."
            )
        if not Path(folder).exists():
            raise DataError(f"tokenizer {folder} is gone; pass its new place with --tokenizer.")
        require_same_tokenizer(token_set, Path(folder))
        self._token_set = token_set
        self._tokenizer = load_tokenizer(Path(folder))

    def describe(self, row: int, note: str = "") -> str:
        """Return the documents of a row as text: file, line, tokens, decoded piece.

        Args:
            row: Row number, first = 0.
            note: Added to the first line.

        Raises:
            ConfigError: There is no such row.
            DataError: The set is damaged there.
        """
        token_set = self._token_set
        if not 0 <= row < token_set.num_rows:
            raise ConfigError(
                f"{token_set.path} has rows 0 to {token_set.num_rows - 1}, --row asks for {row}."
            )
        ids = token_set.read([row])[0]
        lines = [f"row {row} of {token_set.path}: {token_set.block_size} tokens{note}"]
        mask = None
        if token_set.is_supervised:
            mask = token_set.loss_mask([row])[0]
            lines.append(f"{int(mask.sum())} tokens are supervised: {_OPEN}these{_CLOSE}")
        start = 0
        for number, piece in enumerate(token_set.document_pieces(row), start=1):
            text = self._decode(ids, mask, start, start + piece.num_tokens)
            lines.append(
                f"\n[{number}] {piece.file} line {piece.line}, tokens {start} to"
                f" {start + piece.num_tokens - 1}"
            )
            lines.append(text)
            start += piece.num_tokens
        if start < token_set.block_size:
            lines.append(f"\npadding, tokens {start} to {token_set.block_size - 1}")
        return "\n".join(lines)

    def _decode(self, ids: Tensor, mask: Tensor | None, start: int, end: int) -> str:
        """Return tokens as text; supervised ones between marks."""
        if mask is None:
            text: str = self._tokenizer.decode(ids[start:end].tolist())
            return text
        parts = []
        runs = groupby(range(start, end), key=lambda place: bool(mask[place]))
        for supervised, places in runs:
            text = self._tokenizer.decode(ids[list(places)].tolist())
            parts.append(f"{_OPEN}{text}{_CLOSE}" if supervised else text)
        return "".join(parts)


def collect_stats(directory: Path) -> dict[str, Any]:
    """Return counts and shares of a token set, ready for printing or JSON."""
    token_set = TokenSet(directory)
    payload = token_set.payload
    lengths = token_set.document_lengths()
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 1]).astype(int).tolist()
    return {
        "rows": token_set.num_rows,
        "block_size": token_set.block_size,
        "tokens": token_set.num_tokens,
        "documents": token_set.num_documents,
        "documents_detail": payload.get("documents", {}),
        "text_bytes": token_set.num_text_bytes,
        "text_bytes_per_token": token_set.num_text_bytes / token_set.num_tokens,
        "pieces_per_row": len(lengths) / token_set.num_rows,
        "piece_tokens": dict(zip(("min", "median", "p90", "max"), quantiles, strict=True)),
        "packing": payload["packing"]["method"],
        "row_shares": payload.get("row_shares", {}),
        **_supervision(token_set),
        "token_type": payload["dtype"],
        "vocab_size": token_set.vocab_size,
        "shards": len(payload["shards"]),
        "bytes_on_disk": sum(shard["size"] for shard in payload["shards"]),
        "dropped_tail_tokens": payload["packing"]["dropped_tail_tokens"],
        "document_end": payload["document_end"],
        "chat": payload["chat"],
        "rejects": payload["rejects"],
        "dropped": payload.get("dropped", {}).get("by_reason", {}),
        "holdout": payload.get("holdout"),
        "escapes_undone": _sum_escapes(payload["sources"]),
        "tokenizer_sha256": token_set.tokenizer_sha256,
        "content_hash": token_set.content_hash,
        "sources": [
            {key: source[key] for key in ("path", "num_documents", "num_rejected")}
            for source in payload["sources"]
        ],
    }


def _supervision(token_set: TokenSet) -> dict[str, Any]:
    """Return counts that only SFT rows have."""
    if not token_set.is_supervised:
        return {}
    found = dict(token_set.payload["supervision"])
    num_supervised = found.pop("num_supervised_tokens")
    counts = {
        "supervised_tokens": num_supervised,
        "supervised_share": num_supervised / token_set.num_tokens,
        "supervised_tokens_per_row": num_supervised / token_set.num_rows,
    }
    long = found.pop("long", None)
    if long is not None:
        counts["long_conversations"] = long
    return counts | ({"supervision": found} if found else {})


def _sum_escapes(sources: list[dict[str, Any]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for source in sources:
        for escape, count in source["num_escapes"].items():
            totals[escape] = totals.get(escape, 0) + count
    return totals


def stat_lines(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (what, value) of all but the sources, for reading."""
    lines = []
    for key, value in stats.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_number(part)}" for name, part in value.items())
        if key != "sources":
            lines.append((key.replace("_", " "), _number(value)))
    return lines


def format_stats(stats: dict[str, Any]) -> str:
    """Return ``stats`` as aligned lines for reading."""
    lines = [f"{name:22}{value}" for name, value in stat_lines(stats)]
    lines.append("sources")
    lines += [
        f"  {source['path']}: {source['num_documents']:,} documents,"
        f" {source['num_rejected']:,} rejected"
        for source in stats["sources"]
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
