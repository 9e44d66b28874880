"""Tokens per second of continuous batching, and of one and two workers.

Two ways to write the same answers take turns: same model, prompts, sampling and lengths.

- ``plain``: ``model.generate`` on batches of ``--slots`` prompts in their order, left-padded, with
  a dynamic cache; a batch ends with its longest answer.
- ``slots``: ``SlotEngine``, which refills a slot as soon as its answer ends.

Weights are random, so lengths are given: log-normal, cut at ``--longest``. Both are told where an
answer ends by the row, as an end-of-turn token would tell them. Ratios are medians over turns, of
processor seconds (which count what a busy machine gives to others least) and of wall seconds.
Budget: slots / plain >= 1.5.

The scaling table starts whole workers (``forgetscale generate``) on one folder and adds up what
their logs say of tokens and seconds, start and loading left out.

    python launch/bench/generation.py
    python launch/bench/generation.py --scaling MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import keep, spread
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from forgetscale.generation.engines.base import TurnSampling
from forgetscale.generation.engines.slots import SlotEngine
from forgetscale.generation.seeds import sample_seed

TEMPERATURE, TOP_P = 0.7, 0.9


class Answer:
    """A dialogue that ends at a given length."""

    num_top = 0
    is_over = False

    def __init__(self, number: int, prompt: list[int], length: int) -> None:
        self.sample_id, self.attempt = number, 0
        self.ids = list(prompt)
        self._end = len(prompt) + length
        self._seed = sample_seed("bench", number, 0, "assistant", 0)

    @property
    def sampling(self) -> TurnSampling:
        """How the next token is drawn."""
        return TurnSampling(TEMPERATURE, TOP_P, 0, self._seed, self._end - len(self.ids), ())

    def push(self, token: int, log_prob: float, *rest: Any) -> int | None:
        """Take a token."""
        self.ids.append(token)
        return None if len(self.ids) == self._end else len(self.ids) - 1


class AtLength(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, ends: torch.Tensor) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        """Return which rows have ended."""
        return input_ids.shape[1] >= self._ends


def run_plain(model: Any, prompts: list[list[int]], lengths: list[int], slots: int) -> None:
    """Answer batch by batch with ``model.generate``."""
    torch.manual_seed(0)
    for start in range(0, len(prompts), slots):
        rows = prompts[start : start + slots]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ends = torch.tensor(lengths[start : start + slots]) + width
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([AtLength(ends)]),
        )


def run_slots(
    model: Any, prompts: list[list[int]], lengths: list[int], slots: int, longest: int
) -> None:
    """Answer with slots that are refilled."""
    engine = SlotEngine(model, num_slots=slots, max_tokens=longest)
    waiting = [
        Answer(number, prompt, length)
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ][::-1]
    while waiting or engine.num_busy:
        while waiting and engine.num_free:
            engine.submit(waiting.pop())
        engine.step()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Let both ways take turns."""
    torch.manual_seed(0)
    model: Any = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=int(2.6875 * options.hidden),
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 64),
            max_position_embeddings=4096,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    rng = np.random.default_rng(0)
    count = options.prompts
    prompts = [rng.integers(3, options.vocab, rng.integers(8, 33)).tolist() for _ in range(count)]
    drawn = rng.lognormal(np.log(options.median), options.sigma, count)
    lengths = np.clip(drawn.round(), 1, options.longest).astype(int).tolist()
    room = max(map(len, prompts)) + options.longest
    ways = {
        "plain": lambda: run_plain(model, prompts, lengths, options.slots),
        "slots": lambda: run_slots(model, prompts, lengths, options.slots, room),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time(), time.perf_counter()
            ways[name]()
            used = time.process_time() - start[0], time.perf_counter() - start[1]
            seconds[name].append(used)
            print(f"turn {turn}: {name} {used[0]:.1f} s of processor, {used[1]:.1f} s", flush=True)
    total = sum(lengths)
    ratios = [
        [plain[kind] / slots[kind] for plain, slots in zip(*seconds.values(), strict=True)]
        for kind in (0, 1)
    ]
    return {
        "settings": {k: v for k, v in vars(options).items() if k not in ("scaling", "workers")},
        "tokens": total,
        "mean_length": total / count,
        "tokens_per_processor_second": {
            name: spread([total / used[0] for used in found]) for name, found in seconds.items()
        },
        "slots_over_plain_processor": spread(ratios[0]),
        "slots_over_plain_wall": spread(ratios[1]),
        "budget": 1.5,
        "met": statistics.median(ratios[0]) >= 1.5,
    }


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Run one and two workers on folders of their own."""
    table = {}
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            generate = {
                "output_dir": f"{folder}/run",
                "num_dialogues": options.prompts * 4,
                "max_tokens": 128,
                "shard_size": 16,
                "filters": {"duplicates": "none"},
                "engine": {"num_slots": options.slots},
                "dialogue": {
                    "kind": "pre_query",
                    "user": {"max_new_tokens": 40},
                    "assistant": {"max_new_tokens": 60},
                },
            }
            model = {"path": str(options.scaling), "dtype": "float32"}
            recipe = Path(folder) / "self.yaml"
            recipe.write_text(yaml.safe_dump({"model": model, "generate": generate}))
            command = [sys.executable, "-m", "forgetscale", "generate", "--config", str(recipe)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            running = [subprocess.Popen(command, env=environment) for _ in range(workers)]
            if any(process.wait() for process in running):
                raise SystemExit("a worker failed")
            rates = []
            for path in Path(folder).glob("run/workers/*.jsonl"):
                last = json.loads(path.read_text().splitlines()[-1])
                rates.append(last["tokens"] / last["seconds"])
            table[str(workers)] = {
                "tokens_per_second": sum(rates),
                "workers_that_wrote": len(rates),
            }
    return {"model": options.scaling.name, "workers": table, "slots": options.slots}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--median", type=float, default=40.0)
    parser.add_argument("--sigma", type=float, default=0.8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scaling", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.scaling is None:
        keep("generation", compare(options))
    else:
        keep("generation_scaling", scale(options))


if __name__ == "__main__":
    main()
