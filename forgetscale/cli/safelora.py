"""SafeLoRA: after tuning, project an adapter onto what alignment changed (arXiv:2405.16833)."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.errors import ConfigError
from forgetscale.knowledge.safelora import (
    choose_matrices,
    merge_adapter,
    project_adapter,
    read_adapter,
    write_adapter,
)
from forgetscale.models import SafetensorsFolder
from forgetscale.progress import Progress

EXAMPLES = """examples:
  forgetscale safelora --adapter runs/a/export-adapter --aligned models/instruct \\
      --base models/base --output runs/a-safe             the published default: ten matrices
  forgetscale safelora ... --threshold 0.5 --form exact --rank 64 --no-merge

The output folder holds adapter/ (PEFT) and model/ (merged, plain transformers).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--adapter", type=Path, required=True, metavar="DIR", help="LoRA adapter, PEFT's format")
    add("--aligned", type=Path, required=True, metavar="DIR", help="model it was trained on")
    add("--base", type=Path, required=True, metavar="DIR", help="that model before alignment")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    add(
        "--form",
        choices=["published", "exact"],
        default="published",
        help="published: V V^T / |V|, no projector; exact: a projector (default: %(default)s)",
    )
    add("--rank", type=int, metavar="K", help="directions of the exact projector (default: all)")
    add("--matrices", type=int, metavar="N", help="matrices with the smallest cosine (default: 10)")
    add("--threshold", type=float, metavar="T", help="instead: matrices with a cosine up to T")
    add("--no-merge", action="store_true", help="write the adapter alone")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.rank is not None and (options.form != "exact" or options.rank <= 0):
        raise ConfigError(f"--rank {options.rank} is for --form exact and must be > 0.")
    adapter = read_adapter(options.adapter)
    aligned, base = SafetensorsFolder(options.aligned), SafetensorsFolder(options.base)
    count = options.matrices
    if count is None and options.threshold is None:
        count = min(10, len(adapter.factors))
    with Progress(len(adapter.factors), "project", unit="matrix") as progress:
        done = 0

        def step(name: str) -> None:
            nonlocal done
            done += 1
            progress.update(done, name)

        found = project_adapter(
            adapter, aligned, base, form=options.form, rank=options.rank, progress=step
        )
    chosen = choose_matrices(found, threshold=options.threshold, count=count)
    factors = {item.name: item.lora_b for item in found if item.name in chosen}
    payload = {
        "form": options.form,
        "rank": options.rank,
        "cosines": {item.name: item.cosine for item in found},
        "projected": chosen,
    }
    made = write_adapter(options.output / "adapter", adapter, factors, payload)
    for item in sorted(found, key=lambda item: item.cosine):
        print(f"{item.cosine:8.4f}  {'projected' if item.name in factors else '':9s}  {item.name}")
    if not options.no_merge:
        merge_adapter(options.output / "model", made, aligned)
    print(options.output)
