"""Forks ranks from a process that has everything imported, so that starting them costs nothing.

Reads one JSON request a line on standard input, answers with one JSON line on standard output.
Each rank is a process of its own with a gloo group over a file store: no ports. A time limit kills
all ranks of a request; nothing hangs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

POLL_SECONDS = 0.005
PR_SET_PDEATHSIG = 1
PRELOAD = (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.ops.adam",
    "torch.utils.tensorboard",
    "transformers.models.olmo2.modeling_olmo2",
    "forgetscale.cli.train",
    "forgetscale.cli.calibrate",
    "forgetscale.cli.export",
    "tests.distributed.tiny",
)


def become_rank(request: dict, rank: int, store: str) -> None:
    """Turn a forked process into one rank, run its job, never return."""
    import torch.distributed as dist

    from forgetscale.errors import ForgetScaleError

    out = Path(request["out"])
    os.setsid()
    if sys.platform == "linux":
        # A rank never outlives the server, however that ends.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(request["world"]), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(request["world"])}
    os.environ |= request.get("env", {})
    code = 1
    try:
        if request.get("join", True):
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=request["world"]
            )
        module, _, name = request["job"].partition(":")
        job = getattr(importlib.import_module(f"tests.distributed.jobs.{module}"), name)
        save(out, rank, {"result": job(**request["args"])})
        code = 0
    except ForgetScaleError as error:
        save(out, rank, {"error": str(error), "kind": type(error).__name__})
        print(traceback.format_exc(), file=sys.stderr)
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        print(traceback.format_exc(), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def save(out: Path, rank: int, value: dict) -> None:
    """Write what a rank found."""
    import torch

    torch.save(value, out / f"rank-{rank}.pt")


def wait_for(pids: list[int], limit: float) -> tuple[list[int], bool]:
    """Return exit codes (negative: signal) and whether the time limit had to end them."""
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    late = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if not late and time.monotonic() > end:
            late = True
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return [codes[pid] for pid in pids], late


def serve() -> None:
    """Answer requests until standard input ends."""
    import torch

    from forgetscale.artifact import provenance
    from forgetscale.zero3.world import import_deepspeed

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="forgetscale-ranks-"))
    try:
        import_deepspeed(folder / "deepspeed.log")
        for name in PRELOAD:
            importlib.import_module(name)
        provenance()  # remembers versions and commit for all ranks
        gc.collect()
        gc.freeze()  # ranks need not look through what was imported here
        print(json.dumps({"ready": True}), file=answers)
        for number, line in enumerate(sys.stdin):
            requests = json.loads(line)
            pids = []
            owners = []
            for index, request in enumerate(requests):
                Path(request["out"]).mkdir(parents=True, exist_ok=True)
                for rank in range(request["world"]):
                    pid = os.fork()
                    if pid == 0:
                        become_rank(request, rank, str(folder / f"store-{number}-{index}"))
                    pids.append(pid)
                    owners.append(index)
            codes, late = wait_for(pids, max(request["limit"] for request in requests))
            answer = [
                {"codes": [c for c, o in zip(codes, owners, strict=True) if o == i], "late": late}
                for i in range(len(requests))
            ]
            print(json.dumps(answer), file=answers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve()
    os._exit(0)
