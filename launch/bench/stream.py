"""Random rows of one corpus into int64 batches: our stream, a flat memory map, and three loaders.

Each loader runs in its own process with one thread and no worker processes; all hold the same rows
and take turns, so that a busy machine slows all of them. Measured: tokens a second, time from
opening to the first batch at step 0 and at the last step of an epoch, and memory that is neither
page cache nor there before opening (``Pss_Anon`` and ``Pss_Shmem``) once rounds are done, for ours
after a whole epoch. The limit is fancy indexing into a flat ``numpy.memmap``.

What each peer is asked for is what it offers for random order: ``datasets`` a shuffled list of row
numbers on the memory-mapped table in its fastest form (Arrow), and its iterable form with a shuffle
buffer (which is not a random order, and loses rows on resume); MosaicML Streaming its shuffle
``py1e``; LitData its shuffle of chunks and tokens inside them. A loader that does not import is
named in the result. Rates are given by the clock and by processor time; the second is what one core
does, also where other jobs share it.

    python launch/bench/stream.py --tokens 200_000_000 --batch 32
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgetscale.artifact import ArtifactWriter
from forgetscale.data import open_stream
from forgetscale.data.format import PackedRows, rows_per_batch
from forgetscale.data.writer import ShardWriter, token_set_payload

VOCAB = 100_352
LOADERS = ("stream", "memmap", "datasets", "datasets_iterable", "mosaicml", "litdata")
PACKAGES = {"datasets": "datasets", "mosaicml": "mosaicml-streaming", "litdata": "litdata"}
LAST_STEP = ("stream", "memmap", "datasets", "mosaicml")
SHARD_BYTES = 1 << 26
BUFFER_ROWS = 1000

Batches = Iterator[torch.Tensor]


def make_rows(tokens: int, block: int) -> Iterator[np.ndarray]:
    """Yield the corpus, a thousand rows or so at a time; always the same."""
    random = np.random.default_rng(0)
    rows, step = tokens // block, rows_per_batch(block)
    for first in range(0, rows, step):
        shape = (min(step, rows - first), block)
        yield random.integers(0, VOCAB, shape, dtype=np.uint32)


def write_stream(folder: Path, tokens: int, block: int) -> None:
    """Write our token set."""
    with ArtifactWriter(folder, "token_set") as artifact:
        writer = ShardWriter(artifact.path, block_size=block, vocab_size=VOCAB)
        for ids in make_rows(tokens, block):
            count = np.arange(len(ids), dtype=np.uint64) + np.uint64(writer.num_rows + 1)
            lens = np.full(len(ids), block, np.uint32)
            offsets = np.arange(len(ids) + 1, dtype=np.int32)
            writer.append(PackedRows(ids, lens, count, offsets))
        shards = writer.close()
        artifact.payload = token_set_payload(
            block_size=block,
            vocab_size=VOCAB,
            num_rows=writer.num_rows,
            num_documents=writer.num_rows,
            num_text_bytes=0,
            tokenizer_sha256="0" * 64,
            shards=shards,
        )


def write_memmap(folder: Path, tokens: int, block: int) -> None:
    """Write one flat file."""
    folder.mkdir()
    with (folder / "flat.bin").open("wb") as file:
        for ids in make_rows(tokens, block):
            ids.tofile(file)


def write_datasets(folder: Path, tokens: int, block: int) -> None:
    """Write an Arrow data set as ``save_to_disk`` does."""
    import datasets

    def generate() -> Iterator[dict[str, Any]]:
        for ids in make_rows(tokens, block):
            for row in ids:
                yield {"input_ids": row}

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint32"), block)})
    found = datasets.Dataset.from_generator(
        generate, features=features, cache_dir=str(folder.with_name("datasets-cache"))
    )
    found.save_to_disk(str(folder))


def write_mosaicml(folder: Path, tokens: int, block: int) -> None:
    """Write MDS shards."""
    from streaming import MDSWriter

    columns = {"input_ids": f"ndarray:uint32:{block}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for ids in make_rows(tokens, block):
            for row in ids:
                writer.write({"input_ids": row})


def write_litdata(folder: Path, tokens: int, block: int) -> None:
    """Write chunks of tokens, as for pre-training of language models."""
    from litdata import TokensLoader
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES, item_loader=TokensLoader(block))
    index = 0
    for ids in make_rows(tokens, block):
        for row in torch.from_numpy(ids.astype(np.int32)):
            cache[index] = row
            index += 1
    cache.done()
    cache.merge()


def open_ours(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """Our stream."""
    stream = open_stream(folder, seed=1, global_batch_size=batch, cursor=first)
    return (item.input_ids for item in stream)


def open_memmap(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """Fancy indexing into a flat file, row numbers drawn with repetition."""
    flat = np.memmap(folder / "flat.bin", np.uint32, "r", shape=(rows, block))
    random = np.random.default_rng(1)
    while True:
        yield torch.from_numpy(flat[random.integers(0, rows, batch)].astype(np.int64))


def open_datasets(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """Rows of a memory-mapped table by a shuffled list of numbers."""
    import datasets

    table = datasets.load_from_disk(str(folder)).with_format("arrow")
    order = np.random.default_rng(1).permutation(rows)
    while True:
        for start in range(first, rows - batch + 1, batch):
            column = table[order[start : start + batch].tolist()]["input_ids"]
            values = column.combine_chunks().flatten().to_numpy()
            yield torch.from_numpy(values.reshape(batch, block).astype(np.int64))
        first = 0


def open_datasets_iterable(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """The iterable form with a shuffle buffer."""
    import datasets

    table = datasets.load_from_disk(str(folder)).to_iterable_dataset(num_shards=16)
    shuffled = table.shuffle(seed=1, buffer_size=BUFFER_ROWS).with_format("torch")
    for epoch in range(1 << 30):
        shuffled.set_epoch(epoch)
        for item in shuffled.batch(batch, drop_last_batch=True):
            yield item["input_ids"].to(torch.int64)


def open_mosaicml(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """MosaicML Streaming with a loader without workers."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    found = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=1, batch_size=batch)
    if first:
        found.load_state_dict(found.state_dict(first, from_beginning=True))
    loader = StreamingDataLoader(found, batch_size=batch, num_workers=0)
    while True:
        for item in loader:
            yield item["input_ids"].to(torch.int64)


def open_litdata(folder: Path, batch: int, block: int, rows: int, first: int) -> Batches:
    """LitData with a loader without workers."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    found = StreamingDataset(
        str(folder), item_loader=TokensLoader(block), shuffle=True, seed=1, drop_last=True
    )
    loader = StreamingDataLoader(found, batch_size=batch, num_workers=0)
    while True:
        for item in loader:
            yield item.to(torch.int64)


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "stream": write_stream,
    "memmap": write_memmap,
    "datasets": write_datasets,
    "datasets_iterable": write_datasets,
    "mosaicml": write_mosaicml,
    "litdata": write_litdata,
}
OPENERS: dict[str, Callable[[Path, int, int, int, int], Batches]] = {
    "stream": open_ours,
    "memmap": open_memmap,
    "datasets": open_datasets,
    "datasets_iterable": open_datasets_iterable,
    "mosaicml": open_mosaicml,
    "litdata": open_litdata,
}
IMPORTS = {
    "datasets": "datasets",
    "datasets_iterable": "datasets",
    "mosaicml": "streaming",
    "litdata": "litdata",
}


def private_bytes() -> int:
    """Return memory of this process that is not page cache."""
    found = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("Pss_Anon", "Pss_Shmem"):
            found += int(value.split()[0]) * 1024
    return found


def work(options: argparse.Namespace) -> None:
    """Be one loader: open it, then time batches whenever the driver asks."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what loaders print is no answer
    torch.set_num_threads(1)
    sys.path += options.peers
    if options.worker in IMPORTS:
        __import__(IMPORTS[options.worker])
    rows = options.tokens // options.block
    first = (rows // options.batch - 1) * options.batch if options.at_end else 0
    before = private_bytes()
    start = time.perf_counter()
    batches = OPENERS[options.worker](options.folder, options.batch, options.block, rows, first)
    batch = next(batches)
    seconds = time.perf_counter() - start
    assert batch.shape == (options.batch, options.block) and batch.dtype == torch.int64
    print(json.dumps(seconds), file=answer)
    for line in sys.stdin:
        command, _, count = line.partition(" ")
        if command == "rate":
            start, busy = time.perf_counter(), time.process_time()
            for _ in islice(batches, int(count)):
                pass
            num_tokens = int(count) * options.batch * options.block
            rates = [
                num_tokens / (time.perf_counter() - start),
                num_tokens / (time.process_time() - busy),
            ]
            print(json.dumps(rates), file=answer)
        else:
            print(json.dumps(private_bytes() - before), file=answer)


class Worker:
    """A loader in its own process."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path, at_end: bool) -> None:
        arguments = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        for key in ("tokens", "block", "batch"):
            arguments += [f"--{key}", str(getattr(options, key))]
        for path in options.peers:
            arguments += ["--peers", path]
        self.log = folder.with_name(f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [*arguments, *(["--at-end"] if at_end else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.first_seconds: float = self._read()

    def ask(self, command: str) -> Any:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the loader ended: {self.log.read()[-800:]}")
        return json.loads(line)


def prepare(scratch: Path, options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the corpus for every loader that is there; say why others are not."""
    folders: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in options.loaders:
        folder = scratch / name.removesuffix("_iterable")
        try:
            if name in IMPORTS:
                __import__(IMPORTS[name])
        except (ImportError, RuntimeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        if not folder.exists():
            WRITERS[name](folder, options.tokens, options.block)
        folders[name] = folder
    return folders, missing


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="rows per batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=300, help="batches per round")
    parser.add_argument("--opens", type=int, default=3, help="fresh processes for times to start")
    parser.add_argument("--loaders", nargs="+", default=LOADERS, choices=LOADERS)
    parser.add_argument(
        "--peers",
        action="append",
        default=[],
        metavar="DIR",
        help="folder with packages that peers need beyond this environment",
    )
    parser.add_argument("--note", default="", help="anything about this machine worth keeping")
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at-end", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    from measure import keep, spread  # it loads transformers, which the loaders must not

    sys.path += options.peers
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        folders, missing = prepare(Path(scratch), options)
        starts = measure_starts(folders, options)
        rates, memory = measure_rates(folders, options)
    clock = {name: [rate for rate, _ in pairs] for name, pairs in rates.items()}
    core = {name: [rate for _, rate in pairs] for name, pairs in rates.items()}
    keep(
        "stream",
        {
            "settings": {
                key: getattr(options, key)
                for key in ("tokens", "block", "batch", "rounds", "batches", "opens", "note")
            },
            "tokens_per_second": {name: spread(values) for name, values in clock.items()},
            "tokens_per_core_second": {name: spread(values) for name, values in core.items()},
            "times_faster_than": {
                name: spread([a / b for a, b in zip(core["stream"], core[name], strict=True)])
                for name in core
                if name != "stream"
            },
            "seconds_to_first_batch": starts,
            "bytes_beyond_page_cache": memory,
            "budget": {
                "tokens_per_core_second": 3e8,
                "seconds_to_first_batch": 1.0,
                "bytes_beyond_page_cache": 50e6,
            },
            "above_rate_budget": statistics.median(core["stream"]) >= 3e8,
            "not_measured": missing,
            "peers": {name: _version(package) for name, package in PACKAGES.items()},
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "worker_processes": 0,
        },
    )


def measure_starts(
    folders: dict[str, Path], options: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Open each loader in fresh processes, at step 0 and at the last step, in turns."""
    from measure import spread

    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.opens):
        for name, folder in folders.items():
            for place in ("step_0", "last_step") if name in LAST_STEP else ("step_0",):
                worker = Worker(name, options, folder, place == "last_step")
                found.setdefault(name, {}).setdefault(place, []).append(worker.first_seconds)
                worker.close()
    return {
        name: {place: spread(values) for place, values in places.items()}
        for name, places in found.items()
    }


def measure_rates(
    folders: dict[str, Path], options: argparse.Namespace
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Let all loaders take turns; return the two rates of each turn, and memory at the end."""
    workers = {name: Worker(name, options, folder, False) for name, folder in folders.items()}
    # One epoch of what is memory-mapped first: pages are mapped and ours has verified every record
    # batch, as in all but the first minutes of a run. The others read whole files.
    for name in {"stream", "memmap", "datasets"} & set(workers):
        workers[name].ask(f"rate {options.tokens // options.block // options.batch}")
    rates: dict[str, list[list[float]]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            rates[name].append(worker.ask(f"rate {options.batches}"))
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return rates, memory


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
