"""What a build counts while results go by, and what the manifest says about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.engine import Source
from data_prep.records import ESCAPES
from data_prep.units import UnitResult
from forgetscale.errors import DataError


class Ledger:
    """Counts of the whole input: lines, rejects, documents left out.

    Args:
        sources: Input files in order.
        fatal: Lines whose reason begins with this are not accepted; None: all are.
    """

    def __init__(self, sources: Sequence[Source], fatal: str | None = None) -> None:
        self._fatal = fatal
        self.sources: list[dict[str, Any]] = [
            {
                "path": str(source.path),
                "size": source.path.stat().st_size,
                "sha256": None,
                "num_lines": 0,
                "num_documents": 0,
                "num_rejected": 0,
                "num_escapes": dict.fromkeys(ESCAPES, 0),
            }
            for source in sources
        ]
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._rejects: list[tuple[int, int, str]] = []

    @property
    def num_rejects(self) -> int:
        """Lines that are no documents."""
        return len(self._rejects)

    def add(self, source: Source, result: UnitResult) -> None:
        """Count what was left out of a unit.

        Raises:
            DataError: A line has a reason that is not accepted.
        """
        entry = self.sources[source.index]
        entry["num_rejected"] += len(result.rejects)
        for escape, count in result.escapes.items():
            entry["num_escapes"][escape] += count
        for line, reason in result.rejects:
            if self._fatal is not None and reason.startswith(self._fatal):
                raise DataError(
                    f"{source.path} line {line} is {reason}; raise --block-size, or let --long drop"
                    " or truncate such conversations."
                )
            self._rejects.append((source.index, line, reason))
            self._reasons[reason.partition(" (")[0]] += 1
        self.counts += result.counts
        self.dropped += result.dropped

    def finish_source(self, source: Source, description: dict[str, Any]) -> None:
        """Note size, hash and lines of a file that was read to its end."""
        found = {name: description[name] for name in ("size", "sha256", "num_lines")}
        self.sources[source.index].update(found)

    def write_rejects(self, path: Path) -> None:
        """Write one JSON object for each line that is no document."""
        with path.open("w", encoding="utf-8") as file:
            for index, line, reason in sorted(self._rejects):
                entry = {"file": self.sources[index]["path"], "line": line, "reason": reason}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def check(self, max_reject_fraction: float, num_documents: int) -> None:
        """Refuse input that gave nothing or too many rejects.

        Raises:
            DataError: Too many rejected lines, or no document is left.
        """
        num_lines = sum(source["num_lines"] for source in self.sources)
        if self.num_rejects > max_reject_fraction * num_lines:
            index, line, reason = min(self._rejects)
            raise DataError(
                f"{self.num_rejects} of {num_lines} lines are no documents"
                f" ({self.num_rejects / num_lines:.1%}, --max-reject-fraction is"
                f" {max_reject_fraction:g}), the first is {self.sources[index]['path']} line"
                f" {line}: {reason}; repair the input or raise --max-reject-fraction."
            )
        if num_documents == 0 and self.dropped:
            reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.dropped.items()))
            raise DataError(
                f"no document of the {len(self.sources)} input file(s) is left ({reasons}); look"
                " at the options that leave documents out."
            )
        if num_documents == 0:
            raise DataError(
                f"the {len(self.sources)} input file(s) hold no documents, the first is"
                f" {self.sources[0]['path']}; check --input."
            )

    def rejects_payload(self, max_reject_fraction: float) -> dict[str, Any]:
        """Return the manifest entry about rejected lines."""
        return {
            "num_rejects": self.num_rejects,
            "max_reject_fraction": max_reject_fraction,
            "by_reason": dict(sorted(self._reasons.items())),
        }

    def dropped_payload(self) -> dict[str, Any]:
        """Return the manifest entry about documents that were left out on purpose."""
        return {
            "num_dropped": sum(self.dropped.values()),
            "by_reason": dict(sorted(self.dropped.items())),
        }
