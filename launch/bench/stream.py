"""Rate of the training stream against the same rows copied from a flat memory map.

One thread, no worker processes. The limit is ``numpy.memmap`` fancy indexing into int64, the
fastest plain way to fetch random rows. Both take turns; each pair gives one ratio. Budget: 300 M
tokens/s/core.

    python launch/bench/stream.py --tokens 50_000_000 --batch 32
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import keep, spread

from forgetscale.data import open_stream, write_token_set

VOCAB = 100_352


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="rows per batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=200, help="batches per round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = options.tokens // options.block
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ids = np.random.default_rng(0).integers(0, VOCAB, (rows, options.block), dtype=np.uint32)
        write_token_set(folder / "set", ids, vocab_size=VOCAB, tokenizer_sha256="0" * 64)
        ids.tofile(folder / "flat.bin")
        flat = np.memmap(folder / "flat.bin", np.uint32, "r", shape=(rows, options.block))
        start = time.perf_counter()
        stream = open_stream(folder / "set", seed=1, global_batch_size=options.batch)
        next(stream)
        first_seconds = time.perf_counter() - start
        for _ in range(rows // options.batch):
            next(stream)  # every record batch is verified once; later touches are what is timed
        generator = np.random.default_rng(1)
        rates: dict[str, list[float]] = {"stream": [], "memmap": []}
        per_round = options.batches * options.batch * options.block
        for _ in range(options.rounds):
            start = time.perf_counter()
            for _ in range(options.batches):
                next(stream)
            rates["stream"].append(per_round / (time.perf_counter() - start))
            wanted = generator.integers(0, rows, (options.batches, options.batch))
            start = time.perf_counter()
            for chosen in wanted:
                torch.from_numpy(flat[chosen].astype(np.int64))
            rates["memmap"].append(per_round / (time.perf_counter() - start))
        start = time.perf_counter()
        next(open_stream(folder / "set", seed=1, global_batch_size=32, cursor=rows * 7 + 5))
        resume_seconds = time.perf_counter() - start
    ratios = [a / b for a, b in zip(rates["stream"], rates["memmap"], strict=True)]
    keep(
        "stream",
        {
            "settings": vars(options),
            "tokens_per_second": {name: spread(values) for name, values in rates.items()},
            "ratio_to_memmap": spread(ratios),
            "budget_tokens_per_second": 3e8,
            "first_batch_seconds": first_seconds,
            "resume_in_epoch_7_seconds": resume_seconds,
            "worker_processes": 0,
        },
    )


if __name__ == "__main__":
    main()
