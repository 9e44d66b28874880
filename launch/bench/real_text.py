"""Real text end to end: a small English model learns Swahili, with and without protection.

Reads a folder in MADLAD-400's layout (``data/<lang>/<lang>_clean_NNNN.jsonl.gz``), holds out every
tenth document, trains a SentencePiece tokenizer and a small OLMo 2 on the source language, adapts
it to the target language with ``sft`` and ``ssu`` through ``forgetscale train``, and prints bits
per byte before and after. Text, tokens and models stay below ``--output``.

    python launch/bench/real_text.py --data ../shared/data/madlad_sample --output runs/real-text
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from measure import keep
from transformers import AutoTokenizer

from forgetscale.artifact import read_manifest, write_json
from forgetscale.cli.stages import Terminal, forgetscale_command, run_stage
from forgetscale.errors import DataError
from forgetscale.evaluation import read_results
from forgetscale.evaluation.report import build_report
from forgetscale.testbed import WorldSize
from forgetscale.testbed.model import save_initial_model
from forgetscale.testbed.tokenizer import save_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 128
VOCAB_SIZE = 4000
HOLD_OUT_EVERY = 10
SIZE = WorldSize(
    hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_key_value_heads=6
)
TASKS = ["perplexity/source", "perplexity/target"]


def documents(data: Path, language: str) -> list[str]:
    """Return the texts of a language, escapes as they stand."""
    files = sorted((data / "data" / language).glob(f"{language}_clean_*.jsonl.gz"))
    if not files:
        raise DataError(f"{data}/data/{language} holds no clean shard; check --data.")
    texts = []
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts


def split(data: Path, language: str, output: Path) -> None:
    """Write ``LANG.train.jsonl`` and ``LANG.heldout.jsonl``: every tenth document is held out."""
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for number, text in enumerate(documents(data, language)):
        parts["heldout" if number % HOLD_OUT_EVERY == 0 else "train"].append(text)
    for name, texts in parts.items():
        with (output / f"{language}.{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


class RealText:
    """The stages, each skipped when its result is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output
        self.terminal = Terminal.open()

    def stage(self, label: str, command: list[str]) -> None:
        """Run one command with its log below the output folder."""
        log = self.output / "logs" / f"{label.replace(' ', '-')}.txt"
        run_stage(label, command, log, self.terminal, threads=self.options.threads)

    def is_there(self, directory: Path, kind: str) -> bool:
        """Return whether an artefact was finished before."""
        try:
            read_manifest(directory, kind)
        except DataError:
            return False
        return True

    def prepare(self) -> None:
        """Make tokenizer, initial model and token sets."""
        text = self.output / "text"
        text.mkdir(parents=True, exist_ok=True)
        for language in (self.options.source, self.options.target):
            split(self.options.data, language, text)
        init = self.output / "init"
        if not (init / "model.safetensors").is_file():
            init.mkdir(exist_ok=True)
            rows = (text / f"{self.options.source}.train.jsonl").read_text().splitlines()
            lines = [part for row in rows for part in json.loads(row)["text"].split("\\n")]
            save_tokenizer(train_sentencepiece(lines, VOCAB_SIZE), init)
            size = len(AutoTokenizer.from_pretrained(init))
            save_initial_model(init, seed=self.options.seed, size=SIZE, vocab_size=size)
        for role in ("source", "target"):
            language = getattr(self.options, role)
            for part, folder in (("train", "tokens"), ("heldout", "tasks/perplexity")):
                directory = self.output / folder / role
                if self.is_there(directory, "token_set"):
                    continue
                command = [sys.executable, "-m", "data_prep", "build", "--output", str(directory)]
                command += ["--input", str(text / f"{language}.{part}.jsonl")]
                command += ["--tokenizer", str(init), "--block-size", str(BLOCK_SIZE)]
                self.stage(f"tokens of {language} {part}", command)

    def train(self, name: str, model: Path, role: str, steps: int, lr: float, method: Any) -> Path:
        """Run one recipe."""
        run = self.output / name
        ds_config = self.output / "zero3.json"
        if not ds_config.is_file():
            write_json(ds_config, {"zero_optimization": {"stage": 3}})
        recipe = {
            "run": {"name": name, "output_dir": str(run), "seed": self.options.seed},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"path": str(self.output / "tokens" / role)},
            "method": method,
            "optim": {"lr": lr},
            "train": {
                "num_steps": steps,
                "micro_batch_size": max(1, 16 // self.options.ranks),
                "global_batch_size": 16,
                "checkpoint_every_steps": 500,
            },
            "deepspeed": str(ds_config),
            "evaluate": {
                "tasks": TASKS,
                "task_dir": str(self.output / "tasks"),
                "every_steps": max(1, steps // 10),
                "batch_size": 16,
            },
        }
        path = self.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        if not self.is_there(run / "results" / "final", "result"):
            command = forgetscale_command(["train", "--config", str(path)], self.options.ranks)
            self.stage(name, command)
        return run


def values(directory: Path) -> dict[str, float]:
    """Return ``task/metric`` -> value of a result folder."""
    return {f"{r.task}/{r.metric}": r.value for r in read_results(directory)}


def main() -> None:
    """Run all stages, print and keep the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder in MADLAD-400's layout")
    parser.add_argument("--source", default="en", help="language of the source model")
    parser.add_argument("--target", default="sw", help="language to learn")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--source-steps", type=int, default=1200)
    parser.add_argument("--target-steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2, help="processes per run")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    job = RealText(options)
    job.prepare()
    source = job.train(
        "source", options.output / "init", "source", options.source_steps, 2e-3, {"kind": "sft"}
    )
    calibration = {"path": str(options.output / "tokens" / "source"), "num_blocks": 500}
    methods = {
        "sft": {"kind": "sft"},
        "ssu-paper": {
            "kind": "ssu",
            "score": "paper",
            "calibration": {**calibration, "micro_batch_size": 4},
        },
    }
    model = source / "export"
    runs = {
        name: job.train(name, model, "target", options.target_steps, 5e-4, method)
        for name, method in methods.items()
    }
    report = build_report(
        list(runs.values()), options.output, title=f"{options.source} learns {options.target}"
    )
    rows = {"before": values(runs["sft"] / "results" / "source")}
    rows |= {name: values(run / "results" / "final") for name, run in runs.items()}
    settings = {
        "source": options.source,
        "target": options.target,
        "source_steps": options.source_steps,
        "target_steps": options.target_steps,
        "ranks": options.ranks,
        "seed": options.seed,
        "block_size": BLOCK_SIZE,
    }
    keep("real_text", {"settings": settings, "results": rows})
    job.terminal.line(f"report: {report}")


if __name__ == "__main__":
    main()
