"""What a run writes while it trains: ``metrics.jsonl``, TensorBoard events, ``log.txt``."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "results/curve.jsonl"
RETENTION_FILE = "results/retention.jsonl"
LOG_FILE = "log.txt"


class RunLog:
    """Plain lines with a time, into ``log.txt`` and to the terminal.

    Args:
        path: Log file.
        visible: True on the rank that talks; other ranks stay silent.
    """

    def __init__(self, path: Path, visible: bool) -> None:
        self.path = path
        self.visible = visible

    def __call__(self, line: str) -> None:
        """Write one line."""
        if not self.visible:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        print(line, file=sys.stderr, flush=True)


def memory_bytes() -> int:
    """Return the peak memory of this process: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a ``.jsonl`` file whose ``step`` is at most ``step``.

    After a crash the file may be ahead of the checkpoint, or end in half a line; a resumed run
    then writes those steps again.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if value["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class MetricsLog:
    """Append one object per step; mirror the numbers to TensorBoard where it is installed.

    Args:
        directory: Run folder.
        visible: True on the rank that writes.
        step: Last step that is done; later lines of an earlier start are dropped.
    """

    def __init__(self, directory: Path, *, visible: bool, step: int) -> None:
        self._visible = visible
        self._resumed = step > 0
        self._path = directory / METRICS_FILE
        self._curve = directory / CURVE_FILE
        self._board: Any = None
        if not visible:
            return
        self._curve.parent.mkdir(parents=True, exist_ok=True)
        drop_lines_after(self._path, step)
        # A fresh start measures the source model again, as step 0.
        drop_lines_after(self._curve, step if step > 0 else -1)
        self._retention = directory / RETENTION_FILE
        drop_lines_after(self._retention, step)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def step(self, values: Mapping[str, Any]) -> None:
        """Write the numbers of one step; ``values`` holds ``step``."""
        if not self._visible:
            return
        self._append(self._path, values)
        self._scalars(values["step"], {k: v for k, v in values.items() if k != "step"})

    def first_loss(self) -> float | None:
        """Return the loss of the first step that was done; None if there is none, or elsewhere.

        Infinite for a resumed run whose lines are gone: what it began with is not known any more.
        """
        if not self._visible:
            return None
        if self._path.is_file():
            with self._path.open(encoding="utf-8") as file:
                for line in file:
                    if "loss" in (found := json.loads(line)):
                        return float(found["loss"])
        return math.inf if self._resumed else None

    def evaluation(self, step: int, target_tokens: int, results: list[dict[str, Any]]) -> None:
        """Write one in-loop evaluation."""
        if not self._visible:
            return
        row = {"step": step, "target_tokens": target_tokens, "results": results}
        self._append(self._curve, row)
        self._scalars(
            step, {f"{result['task']}/{result['metric']}": result["value"] for result in results}
        )

    def retention(self, step: int, decision: Mapping[str, Any]) -> None:
        """Write one decision of the retention gate: measures, drops, and what followed."""
        if not self._visible:
            return
        self._append(self._retention, {"step": step, **decision})
        drops = {
            f"retention/{item['task']}/{item['metric']}": item["drop"]
            for item in decision["measures"]
        }
        self._scalars(step, drops | {"retention/lr_factor": decision["lr_factor"]})

    def has_evaluation(self, step: int) -> bool:
        """Return whether the curve holds a step; False on ranks that do not write."""
        if not self._visible or not self._curve.is_file():
            return False
        lines = self._curve.read_text(encoding="utf-8").splitlines()
        return any(json.loads(line)["step"] == step for line in lines)

    def _append(self, path: Path, value: Mapping[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()
