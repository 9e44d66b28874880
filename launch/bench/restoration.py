"""Reading passes of `forgetscale restore` against `cp`, its memory, and mergekit on the same edit.

Two synthetic models (bf16, sharded) are made in a temporary folder and removed afterwards. `cp` of
both and a restore take turns; files leave the page cache before each, as far as the system lets
them. Budgets: passes (without the start of worker processes) at 0.70 of the bytes a second of cp in
the same turn (beside its best turn: how fast cp is depends on what the disk still has to write),
peak memory (proportional set size of all processes) below 1 GB, joined histograms below 0.2 GB for
real 70B models (by their lists of tensors). mergekit, where its interpreter is named, does a
scaling (lambda 0.5) that both do.

    python launch/bench/restoration.py --gigabytes 4.4 --rounds 2 --mergekit VENV/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import keep, spread
from safetensors.torch import save_file
from transformers import LlamaConfig, Olmo2Config, PretrainedConfig

from forgetscale.knowledge.counting import (
    count_part,
    histogram_bytes,
    join_counts,
    refine_part,
)
from forgetscale.knowledge.edits import EditOptions
from forgetscale.knowledge.setup import Request, open_setup
from forgetscale.models import build_skeleton, parameter_shapes

MODELS: dict[str, PretrainedConfig] = {
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8),
    "Llama-2-13B": LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8),
    "OLMo-2-7B": Olmo2Config(
        vocab_size=100352, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32),
    "OLMo-2-13B": Olmo2Config(
        vocab_size=100352, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40),
    "OLMo-2-32B": Olmo2Config(
        vocab_size=100352, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8),
}  # fmt: skip
"""Shapes of published models, from their configurations."""


POOL = 1 << 24
"""Weights that are different; the models repeat them at other places."""


def tensor_list(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter of a model, without its weights."""
    return parameter_shapes(build_skeleton(config))


def histograms() -> dict[str, dict[str, Any]]:
    """Return bytes of the joined first-pass counts for published models."""
    found = {}
    for name, config in MODELS.items():
        shapes = tensor_list(config)
        region = [n for n in shapes if "layers" in n and "norm" not in n]
        elements = sum(torch.Size(shapes[n]).numel() for n in region)
        found[name] = {
            "tensors": len(shapes),
            "region_tensors": len(region),
            "region_elements": elements,
            "global_bytes": histogram_bytes(1),
            "by_tensor_bytes": histogram_bytes(len(region)),
            "all_tensors_bytes": histogram_bytes(len(shapes)),
        }
    return found


def make_pair(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Write two models of Llama shapes, together of at least ``gigabytes``."""
    layer = 2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192
    layers = max(1, round(gigabytes * 1e9 / 4 / layer + 0.5))
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16",
        architectures=["LlamaForCausalLM"])  # fmt: skip
    torch.manual_seed(0)
    before = (0.013 * torch.randn(POOL)).bfloat16()
    after = (before.float() + 8e-5 * torch.randn(POOL)).bfloat16()
    made = []
    for kind, pool in (("source", before), ("tuned", after)):
        target = folder / kind
        target.mkdir()
        config.save_pretrained(target)
        index: dict[str, str] = {}
        items = list(tensor_list(config).items())
        for number in range(0, len(items), 60):
            file = f"model-{number // 60 + 1:05d}-of-{-(-len(items) // 60):05d}.safetensors"
            tensors = {}
            for place, (name, shape) in enumerate(items[number : number + 60], number):
                start, size = place * 7919 % (1 << 20), torch.Size(shape).numel()
                piece = pool[start:].repeat(-(-size // (POOL - start)))
                tensors[name] = piece[:size].view(shape).clone()
            save_file(tensors, target / file, {"format": "pt"})
            index |= dict.fromkeys(tensors, file)
        content = {"metadata": {}, "weight_map": index}
        (target / "model.safetensors.index.json").write_text(json.dumps(content))
        made.append(target)
    return made[0], made[1]


def processor_rates(pair: tuple[Path, Path], size: int) -> dict[str, float]:
    """Return bytes of the pair per second of one processor, for each reading pass.

    Wall time on a shared machine says how busy others are; this does not.
    """
    torch.set_num_threads(1)
    options = EditOptions(fractions=(Fraction(1, 5),))
    setup = open_setup(Request(pair[0], (pair[1],), options, include="."))
    found = {}
    start = time.process_time()
    counted = [count_part(setup, part) for part in range(len(setup.parts))]
    found["count"] = size / (time.process_time() - start)
    places = join_counts(setup, counted)
    start = time.process_time()
    for part in range(len(setup.parts)):
        refine_part(setup, part, places)
    found["refine"] = size / (time.process_time() - start)
    return found


def copy_rate(pair: tuple[Path, Path], target: Path, size: int) -> float:
    """Return bytes that `cp` copies per second of one processor."""
    before = os.times()
    for one in pair:
        subprocess.run(["cp", "-r", str(one), str(target)], check=True)
        shutil.rmtree(target)
    after = os.times()
    used = after.children_user + after.children_system
    return size / (used - before.children_user - before.children_system)


def forget_pages(*folders: Path) -> None:
    """Ask the system to drop the folders' files from its cache."""
    os.sync()
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def watched(command: list[str], **given: Any) -> tuple[float, int, str]:
    """Run a command; return its seconds, the peak memory of all its processes, its output."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **given)
    peak = 0

    def look() -> None:
        nonlocal peak
        while process.poll() is None:
            total = 0
            try:
                tree = psutil.Process(process.pid)
                for one in (tree, *tree.children(recursive=True)):
                    total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            peak = max(peak, total)
            time.sleep(0.25)

    thread = threading.Thread(target=look)
    thread.start()
    out, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak, out


def stage_seconds(out: str) -> dict[str, float]:
    """Return the seconds of each stage, from the lines restore prints."""
    found = {}
    for line in out.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "s":
            found[words[0].rstrip(":")] = float(words[1])
    return found


def merge_recipe(source: Path, tuned: Path) -> str:
    """Return mergekit's file for source + 0.5 (tuned - source)."""
    return (
        f"merge_method: task_arithmetic\nbase_model: {source}\ndtype: bfloat16\nmodels:\n"
        f"  - model: {tuned}\n    parameters:\n      weight: 0.5\n"
    )


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on one pair."""
    pair = make_pair(folder, options.gigabytes)
    size = sum(path.stat().st_size for one in pair for path in one.glob("*.safetensors"))
    found: dict[str, list[Any]] = {name: [] for name in ("cp", "restore", "stages", "memory")}
    result: dict[str, Any] = {
        "bytes_of_the_pair": size,
        "pass_bytes_per_processor_second": processor_rates(pair, size),
        "cp_bytes_per_processor_second": copy_rate(pair, folder / "copy", size),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
    }
    if options.rounds == 0:
        return result | {"wall": "not measured: --rounds 0, for a machine that others keep busy"}
    base = [sys.executable, "-m", "forgetscale", "restore", "--source", str(pair[0]), "--tuned"]
    base += [str(pair[1]), "--workers", str(options.workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def fresh(work: Callable[[], None]) -> None:
        forget_pages(*pair)
        work()

    def copy() -> None:
        seconds = 0.0
        for one in pair:
            start = time.perf_counter()
            subprocess.run(["cp", "-r", str(one), str(folder / "copy")], check=True)
            seconds += time.perf_counter() - start
            shutil.rmtree(folder / "copy")
        found["cp"].append(seconds)

    def restore() -> None:
        output = folder / "restored"
        command = [*base, "--output", str(output), "--fraction", "0.2", "--include", "."]
        seconds, peak, out = watched(command, env=environment)
        found["restore"].append(seconds)
        found["memory"].append(peak)
        found["stages"].append(stage_seconds(out))
        shutil.rmtree(output)

    for turn in range(options.rounds):
        for work in (copy, restore) if turn % 2 == 0 else (restore, copy):
            fresh(work)
    passes, best = {}, {}
    for name in ("count", "refine"):
        seconds = [stages[name] for stages in found["stages"]]
        pairs = zip(found["cp"], seconds, strict=True)
        passes[name] = spread([cp / ours for cp, ours in pairs])
        best[name] = spread([min(found["cp"]) / ours for ours in seconds])
    result |= {
        "workers": options.workers,
        "cp_bytes_per_second": spread([size / seconds for seconds in found["cp"]]),
        "pass_over_cp": passes,
        "pass_over_best_cp": best,
        "restore_seconds": spread(found["restore"]),
        "stages": found["stages"],
        "peak_memory_bytes": max(found["memory"]),
    }
    if options.mergekit:
        result["mergekit"] = _mergekit(folder, pair, options, base, environment)
    else:
        result["mergekit"] = {"missing": "no interpreter given with --mergekit"}
    return result


def _mergekit(
    folder: Path,
    pair: tuple[Path, Path],
    options: argparse.Namespace,
    base: list[str],
    environment: dict[str, str],
) -> dict[str, Any]:
    recipe = folder / "merge.yaml"
    recipe.write_text(merge_recipe(*pair))
    forget_pages(*pair)
    ours = watched(
        [*base, "--output", str(folder / "half"), "--method", "task-arithmetic", "--lambda", "0.5"],
        env=environment,
    )
    forget_pages(*pair)
    script = str(Path(options.mergekit).parent / "mergekit-yaml")
    command = [options.mergekit, script, str(recipe), str(folder / "merged"), "--no-copy-tokenizer"]
    with (folder / "mergekit.log").open("w+") as log:
        try:
            theirs = watched(command, stderr=log, env=environment)
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}:\n{log.read()[-2000:]}") from error
    names = ("seconds", "peak_memory_bytes")
    return {
        "operation": "source + 0.5 (tuned - source), all tensors",
        "forgetscale": dict(zip(names, ours[:2], strict=True)),
        "mergekit": dict(zip(names, theirs[:2], strict=True)),
        "identical_values": _same(folder / "half", folder / "merged"),
    }


def _same(one: Path, other: Path) -> float:
    """Return the share of equal values of two model folders."""
    from forgetscale.models import SafetensorsFolder

    a, b = SafetensorsFolder(one), SafetensorsFolder(other)
    equal = total = 0
    for name in a.names():
        same = a.mapped(name) == b.mapped(name)
        equal, total = equal + int(same.sum()), total + same.numel()
    return equal / total


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.4, help="of both models together")
    parser.add_argument("--rounds", type=int, default=2, help="0: rates per processor alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mergekit", help="Python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where to work (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = compare(Path(folder), options)
    keep("restoration", result | {"histograms": histograms()})


if __name__ == "__main__":
    main()
