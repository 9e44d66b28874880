"""Rate of `data_prep build` against its tokenizer alone, datatrove and `datasets.map`.

The limit is (processes x the rate of one process that does nothing but encode the same text, held
in memory). Each contestant reads the same gzip JSON lines with the same tokenizer and processes,
writes token files, and starts from a fresh interpreter; all take turns. Wall time includes start
and publishing. The rate without start-up is measured as the difference between the whole input and
a quarter of it. Contestants that are not installed are left out, with the reason. Budget: 0.90 of
the limit.

    python launch/bench/preparation.py --input ../shared/data/madlad_sample/data --megabytes 64
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import keep, spread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.records import undo_escapes

FILES = 16
LIMIT = """
import gzip, json, sys, time
from pathlib import Path
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
tokenizer.encode_special_tokens = True
texts = [json.loads(line)["text"].replace("\\\\n", "\\n")
         for path in sorted(Path(sys.argv[2]).iterdir()) for line in gzip.open(path)]
start, used = time.perf_counter(), time.process_time()
for first in range(0, len(texts), 64):
    [one.ids for one in tokenizer.encode_batch_fast(texts[first:first + 64])]
print(time.perf_counter() - start, time.process_time() - used)
"""
DATASETS = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
folder, text, output, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
data = load_dataset("json", data_files=text + "/*.gz", split="train", cache_dir=output + "/cache")
def encode(rows):
    texts = [row.replace("\\\\n", "\\n") for row in rows["text"]]
    return tokenizer(texts, return_attention_mask=False)
data = data.map(encode, batched=True, num_proc=int(processes), remove_columns=["text"])
data.save_to_disk(output + "/tokens")
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
def main():
    folder, text, output, processes = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(text),
            DocumentTokenizer(output + "/tokens", tokenizer_name_or_path=folder + "/tokenizer.json",
                              eos_token="</s>", shuffle_documents=False),
        ],
        tasks=16, workers=int(processes), logging_dir=output + "/logs",
    ).run()
if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with .jsonl.gz below it")
    parser.add_argument("--megabytes", type=int, default=64, help="of JSON; the text is repeated")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["datasets", "datatrove"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = [line for path in sorted(options.input.rglob("*.gz")) for line in gzip.open(path)]
        make_tokenizer(lines, folder / "tokenizer", options.vocab)
        whole = write_text(lines, folder / "whole", options.megabytes << 20)
        part = write_text(lines, folder / "part", options.megabytes << 18)
        result = measure(folder, options)
    num_bytes, part_bytes = whole, part
    limit = [options.processes * num_bytes / wall for wall in result["tokenizer"]["wall"]]
    limit_cpu = [num_bytes / used for used in result["tokenizer"]["cpu"]]
    found: dict[str, object] = {
        "settings": {
            "megabytes": options.megabytes,
            "text_bytes": num_bytes,
            "processes": options.processes,
            "vocab": options.vocab,
            "rounds": options.rounds,
        },
        "tokenizer_bytes_per_second_and_process": spread(
            [rate / options.processes for rate in limit]
        ),
        "budget": 0.9,
    }
    for name in ("data_prep", *options.peers):
        if "missing" in result[name]:
            found[name] = result[name]
            continue
        walls, parts = result[name]["wall"], result[name]["part_wall"]
        steady = [
            (num_bytes - part_bytes) / max(wall - less, 1e-9)
            for wall, less in zip(walls, parts, strict=True)
        ]
        cpu = [
            (num_bytes - part_bytes) / max(used - less, 1e-9)
            for used, less in zip(result[name]["cpu"], result[name]["part_cpu"], strict=True)
        ]
        found[name] = {
            "seconds": spread(walls),
            "ratio_with_start": spread(
                [num_bytes / w / r for w, r in zip(walls, limit, strict=True)]
            ),
            "ratio_without_start": spread([s / r for s, r in zip(steady, limit, strict=True)]),
            "ratio_of_processor_time": spread([c / r for c, r in zip(cpu, limit_cpu, strict=True)]),
        }
    keep("preparation", found)


def make_tokenizer(lines: Sequence[bytes], folder: Path, vocab: int) -> None:
    """Train a byte-level BPE on the text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_text(lines: Sequence[bytes], folder: Path, size: int) -> int:
    """Repeat the lines, each time with another beginning, up to ``size``; return bytes of text."""
    folder.mkdir()
    files = [
        gzip.open(folder / f"{index:02d}.jsonl.gz", "wb", compresslevel=1) for index in range(FILES)
    ]
    written = total = number = 0
    while written < size:
        text = json.loads(lines[number % len(lines)])["text"]
        text = f"{number} {text}"
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        files[number % FILES].write(line)
        written += len(line)
        total += len(undo_escapes(text)[0].encode())
        number += 1
    for file in files:
        file.close()
    return total


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Let all take turns; return wall and processor seconds by name."""
    python, tokenizer = sys.executable, str(folder / "tokenizer")
    processes = str(options.processes)
    found: dict[str, dict[str, list[float]]] = {"tokenizer": {"wall": [], "cpu": []}}
    known = {"datasets": DATASETS, "datatrove": DATATROVE}
    scripts = {name: known[name] for name in options.peers}
    for name in ("data_prep", *scripts):
        if importlib.util.find_spec(name) is None:
            found[name] = {"missing": [f"{name} is not installed"]}  # type: ignore[list-item]
        else:
            found[name] = {"wall": [], "cpu": [], "part_wall": [], "part_cpu": []}
            if name in scripts:
                (folder / f"{name}_run.py").write_text(scripts[name])
    (folder / "limit.py").write_text(LIMIT)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for turn in range(options.rounds):
        done = subprocess.run(
            [python, str(folder / "limit.py"), tokenizer, str(folder / "whole")],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        wall, used = map(float, done.stdout.split())
        found["tokenizer"]["wall"].append(wall)
        found["tokenizer"]["cpu"].append(used)
        for name, times in found.items():
            if name == "tokenizer" or "missing" in times:
                continue
            for text, prefix in (("whole", ""), ("part", "part_")):
                output = folder / f"{name}-{text}-{turn}"
                command = [python, str(folder / f"{name}_run.py"), tokenizer, str(folder / text)]
                command += [str(output), processes]
                if name == "data_prep":
                    command = [python, "-m", "data_prep", "build", "--input", str(folder / text)]
                    command += ["--tokenizer", tokenizer, "--block-size", "512"]
                    command += ["--output", str(output), "--num-processes", processes]
                before, start = os.times(), time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env=environment)
                times[f"{prefix}wall"].append(time.perf_counter() - start)
                after = os.times()
                times[f"{prefix}cpu"].append(
                    after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system
                )
    return found


if __name__ == "__main__":
    main()
