"""Time and peak memory of the entropy-weighted loss over a large vocabulary.

Computations of the same positions take turns, each turn the loss and the gradients of hidden states
and output head:

- ``dense``: the published formula on whole fp32 logits, through autograd.
- ``gated``: the chunked entropy-weighted loss.
- ``plain``: the chunked cross-entropy, to which the gate is added.
- ``autograd``: chunked cross-entropy with a graph for each chunk, what a closed gradient replaces.

Budgets: gated / dense <= 0.10 in memory and <= 1.0 in time, gated / plain <= 1.1 in time. Ratios
are medians over turns, of processor seconds, which count what a busy machine gives to others least.
Memory is measured in a
process for each, as the largest growth over what stands before the call. Both the whole growth and
the growth without the gradients that every formulation has to return are kept: at width 1,024 the
fp32 gradient of the head alone is 0.58 GiB, a sixth of what the dense formula takes
(``memory_floor``): with a trained head no computation that returns this gradient can be below. All
computations are linear in positions, so ``--time-tokens`` may be smaller on a slow machine.

    python launch/bench/gated_loss.py
    python launch/bench/gated_loss.py --width 256 --frozen-head
    python launch/bench/gated_loss.py --dtype bfloat16 --turns 0 --name gated_loss_bfloat16
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import keep, spread
from torch import Tensor

from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import LossFunction, chunked_loss, cross_entropy, make_loss

NAMES = ("dense", "gated", "plain", "autograd")
CHECK_TOKENS = 64
Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(options: argparse.Namespace) -> Inputs:
    """Return hidden states, head and labels; some positions have no target."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width, generator=generator).to(dtype)
    head = torch.randn(options.vocab, options.width, generator=generator)
    head = (head * (3.0 / math.sqrt(options.width))).to(dtype)
    labels = torch.randint(0, options.vocab, (options.tokens,), generator=generator)
    labels[torch.rand(options.tokens, generator=generator) < options.ignored] = IGNORE_INDEX
    hidden.requires_grad_()
    head.requires_grad_(not options.frozen_head)
    return hidden, head, labels


def dense(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the published loss, summed: fp32 logits, gate of the 20 largest, ``ln 20``."""
    logits = torch.nn.functional.linear(hidden, head).float()
    nll = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    keep_rows = labels != IGNORE_INDEX
    with torch.no_grad():
        largest = logits[keep_rows].topk(20, -1).values
        log_q = largest - largest.logsumexp(-1, keepdim=True)
        weight = -(log_q.exp() * log_q).sum(-1) / math.log(20)
    return (nll[keep_rows] * weight).sum()


def computations(chunk_size: int) -> dict[str, Callable[..., Tensor]]:
    """Return the computations by name."""

    def chunked(loss: LossFunction) -> Callable[..., Tensor]:
        return lambda hidden, head, labels: chunked_loss(
            hidden, head, labels, loss, chunk_size=chunk_size
        )

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )

    return {
        "dense": dense,
        "gated": chunked(make_loss("eaft")),
        "plain": chunked(cross_entropy),
        "autograd": chunked(plain),
    }


def gradients(compute: Callable[..., Tensor], inputs: Inputs) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradients."""
    wanted = [x for x in inputs[:2] if x.requires_grad]
    loss = compute(*inputs)
    found = torch.autograd.grad(loss / inputs[2].numel(), wanted)
    return float(loss.detach()), list(found)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _memory_of(name: str, options: argparse.Namespace, result: multiprocessing.SimpleQueue) -> None:
    """Put growth of the resident set over the inputs: at its peak, and what is returned of it."""
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**{**vars(options), "tokens": 8, "vocab": 4096})
    compute = computations(options.chunk_size)[name]
    gradients(compute, make_inputs(small))
    inputs = make_inputs(options)
    before = _resident()
    # Forgets the peak of making the inputs.
    Path("/proc/self/clear_refs").write_text("5")
    found = gradients(compute, inputs)[1]
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    result.put((peak - before, sum(grad.nbytes for grad in found)))


def measure_memory(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Return bytes of each computation, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    measured = {}
    for name in NAMES:
        result = context.SimpleQueue()
        process = context.Process(target=_memory_of, args=(name, options, result))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} ended with code {process.exitcode}")
        peak, returned = result.get()
        measured[name] = {"peak_bytes": peak, "returned_bytes": returned}
        print(name, measured[name], flush=True)
    return measured


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Return how far the chunked loss is from the dense one on a few positions."""
    inputs = make_inputs(argparse.Namespace(**{**vars(options), "tokens": CHECK_TOKENS}))
    compute = computations(options.chunk_size)
    (loss, found), (expected, exact) = (gradients(compute[n], inputs) for n in ("gated", "dense"))
    return {
        "relative_difference_of_loss": abs(loss / expected - 1),
        "relative_difference_of_gradients": max(
            float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
        ),
    }


def measure_time(options: argparse.Namespace) -> dict[str, object]:
    """Let the computations take turns; return processor seconds and their ratios."""
    tokens = options.time_tokens or options.tokens
    inputs = make_inputs(argparse.Namespace(**{**vars(options), "tokens": tokens}))
    compute = computations(options.chunk_size)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.turns):
        for name in NAMES if turn % 2 else NAMES[::-1]:
            start = time.process_time()
            gradients(compute[name], inputs)
            seconds[name].append(time.process_time() - start)
        print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)

    def ratio(name: str, other: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])

    return {
        "processor_seconds": {name: spread(values) for name, values in seconds.items()},
        "gated/dense": ratio("gated", "dense"),
        "gated/plain": ratio("gated", "plain"),
        "plain/autograd": ratio("plain", "autograd"),
    }


def main() -> None:
    """Run the comparison and keep its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--ignored", type=float, default=0.0, help="share of positions, 0 to 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frozen-head", action="store_true", help="no gradient of the head")
    parser.add_argument("--time-tokens", type=int, help="positions timed (default: --tokens)")
    parser.add_argument("--turns", type=int, default=5, help="0 measures memory alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="gated_loss", help="file below results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory = measure_memory(options)
    gated, whole = memory["gated"], memory["dense"]
    result = {
        "settings": vars(options),
        "memory": memory,
        "memory_floor_returned_gradients/dense": whole["returned_bytes"] / whole["peak_bytes"],
        "memory_gated/dense": gated["peak_bytes"] / whole["peak_bytes"],
        "memory_gated/dense_without_returned_gradients": (
            (gated["peak_bytes"] - gated["returned_bytes"])
            / (whole["peak_bytes"] - whole["returned_bytes"])
        ),
        **compare(options),
        **(measure_time(options) if options.turns else {}),
    }
    keep(options.name, result)


if __name__ == "__main__":
    main()
