"""What a build counts while documents go by, and what the manifest says about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.readers import SourceReader
from data_prep.records import ESCAPES
from data_prep.tokenise import TokenizedUnit
from forgetscale.errors import DataError


class Ledger:
    """Counts per source, rejected lines and text bytes; a context manager.

    Args:
        paths: Input files in order.
        rejects_path: File that receives one JSON object for each rejected line.
        block_size: Tokens a row.
    """

    def __init__(self, paths: Sequence[Path], rejects_path: Path, block_size: int) -> None:
        self.sources: list[dict[str, Any]] = [
            {
                "path": str(path),
                "size": path.stat().st_size,
                "sha256": None,
                "num_lines": 0,
                "num_documents": 0,
                "num_rejected": 0,
                "num_escapes": dict.fromkeys(ESCAPES, 0),
            }
            for path in paths
        ]
        self.counts: Counter[str] = Counter()
        self.num_rejects = 0
        self._reasons: Counter[str] = Counter()
        self._first_reject = ""
        self._file = rejects_path.open("w", encoding="utf-8")
        self._block_size = block_size
        self._num_text_bytes = 0
        self._tail: list[tuple[int, int]] = []

    def __enter__(self) -> Ledger:
        """Return the ledger."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the rejects file."""
        self._file.close()

    @property
    def num_documents(self) -> int:
        """Documents that were tokenised."""
        return sum(source["num_documents"] for source in self.sources)

    def reject(self, file_index: int, line: int, reason: str) -> None:
        """Note a line that is no document."""
        source = self.sources[file_index]
        source["num_rejected"] += 1
        entry = {"file": source["path"], "line": line, "reason": reason}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._reasons[reason.partition(" (")[0]] += 1
        self._first_reject = self._first_reject or f"{source['path']} line {line}: {reason}"
        self.num_rejects += 1

    def add(self, unit: TokenizedUnit) -> None:
        """Count the documents of a unit."""
        source = self.sources[unit.file_index]
        source["num_documents"] += len(unit.doc_lens)
        for escape, count in unit.escapes.items():
            source["num_escapes"][escape] += count
        for line, reason in unit.rejects:
            self.reject(unit.file_index, line, reason)
        self.counts += unit.counts
        self._num_text_bytes += int(unit.doc_bytes.sum())
        self._tail += zip(unit.doc_lens.tolist(), unit.doc_bytes.tolist(), strict=True)
        covered = 0
        for index in range(len(self._tail) - 1, -1, -1):
            covered += self._tail[index][0]
            if covered >= self._block_size:
                del self._tail[:index]
                break

    def finish_source(self, file_index: int, reader: SourceReader, num_lines: int) -> None:
        """Note size and hash of a file that was read to its end."""
        self.sources[file_index].update(
            size=reader.num_bytes, sha256=reader.sha256, num_lines=num_lines
        )

    def check(self, max_reject_fraction: float, num_rows: int, num_tokens: int) -> None:
        """Refuse input that gave nothing or too many rejects.

        Raises:
            DataError: Too many rejected lines, no document, or too little for one row.
        """
        num_lines = sum(source["num_lines"] for source in self.sources)
        if self.num_rejects > max_reject_fraction * num_lines:
            raise DataError(
                f"{self.num_rejects} of {num_lines} lines are no documents"
                f" ({self.num_rejects / num_lines:.1%}, --max-reject-fraction is"
                f" {max_reject_fraction:g}), the first is {self._first_reject}; repair the input"
                " or raise --max-reject-fraction."
            )
        if self.num_documents == 0:
            raise DataError(
                f"the {len(self.sources)} input file(s) hold no documents, the first is"
                f" {self.sources[0]['path']}; check --input."
            )
        if num_rows == 0:
            raise DataError(
                f"the input gives {num_tokens} tokens, less than one row of {self._block_size};"
                " lower --block-size or add input."
            )

    def kept_text(self, dropped_tokens: int) -> tuple[int, int]:
        """Return text bytes of what stands in rows, and documents that are wholly dropped.

        The document that is cut by the end of the last row counts in proportion to its tokens.
        """
        num_bytes, num_dropped = self._num_text_bytes, 0
        for tokens, size in reversed(self._tail):
            if dropped_tokens <= 0:
                break
            part = min(tokens, dropped_tokens)
            num_bytes -= size * part // tokens
            num_dropped += part == tokens
            dropped_tokens -= part
        return num_bytes, num_dropped

    def rejects_payload(self, max_reject_fraction: float) -> dict[str, Any]:
        """Return the manifest entry about rejected lines."""
        return {
            "num_rejects": self.num_rejects,
            "max_reject_fraction": max_reject_fraction,
            "by_reason": dict(sorted(self._reasons.items())),
        }
