"""Client of the rank server: run a job on N real processes and get what each rank found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended on all ranks."""

    codes: list[int]
    """Exit code of each rank; negative for a signal."""
    values: list[Any]
    """What each rank returned, None where it returned nothing."""
    errors: list[str | None]
    """Message of the ForgetScaleError each rank raised."""
    kinds: list[str | None]
    logs: list[str]
    late: bool
    """True if the time limit ended the ranks."""

    @property
    def value(self) -> Any:
        """Result of rank 0."""
        return self.values[0]


@dataclass(frozen=True)
class Job:
    """One job: ``module:function`` below ``tests/distributed/jobs``, its arguments and ranks."""

    name: str
    args: dict[str, Any]
    world: int = 1
    env: dict[str, str] | None = None
    join: bool = True
    """Make the process group before the job; False leaves it to the job."""
    limit: float = LIMIT_SECONDS


class RankServer:
    """Starts ``server.py`` on first use and sends it jobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._process: subprocess.Popen[str] | None = None

    def _server(self) -> subprocess.Popen[str]:
        if self._process is None:
            env = os.environ | {
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            if sys.platform == "linux":
                env["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of this machine resolves to
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                env.pop(name, None)
            self._log = tempfile.TemporaryFile("w+")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.server"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            self._answer()
        return self._process

    def _answer(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the rank server ended:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def run_all(self, jobs: list[Job]) -> list[Outcome]:
        """Run jobs side by side, each with its own process group."""
        requests = []
        for job in jobs:
            self._number += 1
            requests.append(
                {
                    "job": job.name,
                    "args": job.args,
                    "world": job.world,
                    "env": job.env or {},
                    "join": job.join,
                    "limit": job.limit,
                    "out": str(self._folder / f"job-{self._number:04d}"),
                }
            )
        server = self._server()
        assert server.stdin is not None
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        answers = self._answer()
        return [
            self._outcome(request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _outcome(self, request: dict[str, Any], answer: dict[str, Any]) -> Outcome:
        out = Path(request["out"])
        ranks = range(request["world"])
        found = []
        for rank in ranks:
            path = out / f"rank-{rank}.pt"
            found.append(torch.load(path, weights_only=False) if path.is_file() else {})
        logs = [(out / f"rank-{rank}.log").read_text(errors="replace") for rank in ranks]
        return Outcome(
            codes=answer["codes"],
            values=[item.get("result") for item in found],
            errors=[item.get("error") for item in found],
            kinds=[item.get("kind") for item in found],
            logs=logs,
            late=answer["late"],
        )

    def run(self, name: str, world: int = 1, **options: Any) -> Outcome:
        """Run one job; ``options`` are fields of ``Job``, everything else its arguments."""
        fields = {key: options.pop(key) for key in ("env", "join", "limit") if key in options}
        return self.run_all([Job(name, options, world, **fields)])[0]

    def must(self, name: str, world: int = 1, **options: Any) -> Outcome:
        """Run one job that must succeed on every rank."""
        outcome = self.run(name, world, **options)
        if any(outcome.codes) or outcome.late:
            tails = "\n".join(f"rank {i}: {t[-3000:]}" for i, t in enumerate(outcome.logs))
            raise AssertionError(f"{name} on {world} ranks ended with {outcome.codes}\n{tails}")
        return outcome

    def close(self) -> None:
        """End the server."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                # Interrupted in the middle of a job; its ranks end with the server.
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
            self._log.close()
            self._process = None
