"""A tiny chat model that knows half of what it is asked, with its tokenizer and task folder."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from forgetscale.data import tokenizer_hash, write_token_set
from forgetscale.errors import StoppedEarly
from forgetscale.evaluation import EvaluationOptions, Result, evaluate_model, write_results

SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "<|end|>{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FACTS = {
    "lo?": "mika",
    "where is ro?": "ta ne",
    "ve?": "su",
    "what is fi then?": "sorry no",
    "gu?": "pelo pelo pelo",
    "ab ab?": "kk",
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(number: int, question: str, kind: str, **rest: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"id": f"{kind}-{number}", "messages": messages, "kind": kind, **rest}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that every text has one cut."""
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyz ?."))
    vocabulary = {token: index for index, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def train(model: Olmo2ForCausalLM, tokenizer: Any, steps: int) -> None:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
        )
        for q, a in FACTS.items()
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("chat-model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    train(model, tokenizer, steps=60)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def task_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    exact = [
        row(number, question, "exact", answers=["zz", answer] if number % 2 else [answer])
        for number, (question, answer) in enumerate(FACTS.items())
    ]
    exact += [
        row(20, "lo?", "exact", answers=["mik"]),
        row(21, "ve?", "exact", answers=["sun", "s"]),
        row(22, "unseen words?", "exact", answers=["mika"]),
    ]
    write_rows(directory / "recall.jsonl", exact)
    starts = [{"kind": "starts_with", "text": "ta"}]
    write_rows(
        directory / "compliance.jsonl",
        [row(n, question, "check", checks=starts) for n, question in enumerate(FACTS)],
    )
    meta = {"refusals": ["Sorry", "i cannot"]}
    for kind in ("refusal", "no_refusal"):
        rows = [row(n, question, kind, meta=meta) for n, question in enumerate(FACTS)]
        write_rows(directory / f"{kind}.jsonl", rows)
    write_rows(
        directory / "code_mixing.jsonl",
        [row(n, question, "code_mixing") for n, question in enumerate(FACTS)],
    )
    (directory / "vocabulary.json").write_text(
        json.dumps({"source_words": ["su", "mika"], "target_words": ["Pelo", "su"]})
    )
    for name, rows, seed in (("source", 7, 1), ("target", 5, 2)):
        ids = np.random.default_rng(seed).integers(7, len(make_tokenizer()), size=(rows, 12))
        write_token_set(
            directory / "perplexity" / name,
            ids,
            vocab_size=len(make_tokenizer()),
            tokenizer_sha256=tokenizer_hash(model_dir),
            num_text_bytes=ids.size,
        )
    return directory


class ThreadCollective:
    """One rank of several threads of this process."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        self.rank = rank
        self.world_size = world_size
        self._shared = shared

    def gather_objects(self, value: Any) -> list[Any]:
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait()
        gathered = list(self._shared["values"])
        self._shared["barrier"].wait()
        return gathered


Ranks = Callable[[int, Callable[[ThreadCollective], Any]], list[Any]]


@pytest.fixture(scope="session")
def run_ranks() -> Ranks:
    return _run_ranks


def _run_ranks(world_size: int, work: Callable[[ThreadCollective], Any]) -> list[Any]:
    """Run ``work`` on every rank at once and return what the ranks returned."""
    shared = {"values": [None] * world_size, "barrier": threading.Barrier(world_size, timeout=60)}
    outcomes: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def target(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadCollective(rank, world_size, shared))
        except BaseException as error:
            failures.append(error)
            shared["barrier"].abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return outcomes


class RunMaker:
    """Writes run folders whose numbers follow simple curves."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def result(
        self, task: str, value: float, metric: str = "accuracy", *, n: int = 200, seed: int = 0
    ) -> Result:
        spread = (
            1.96 * math.sqrt(max(value * (1 - value), 0.0) / n) if metric != "perplexity" else 0
        )
        kind = {"perplexity": "perplexity", "bits_per_byte": "perplexity"}.get(metric, "exact")
        lower = metric in ("perplexity", "bits_per_byte") or task in ("over_refusal", "code_mixing")
        return Result(
            task=task,
            metric=metric,
            value=value,
            n=n,
            low=value - (spread or 0.01 * value),
            high=value + (spread or 0.01 * value),
            task_hash=f"{task}-{seed}",
            higher_is_better=not lower,
            kind="code_mixing" if task == "code_mixing" else kind,
        )

    def perplexities(self, source: float, target: float, seed: int) -> list[Result]:
        pairs = (("source", source), ("target", target))
        return [
            self.result(f"perplexity/{name}", value, metric, seed=seed)
            for name, perplexity in pairs
            for metric, value in (
                ("perplexity", perplexity),
                ("bits_per_byte", 0.4 * math.log2(perplexity)),
            )
        ]

    def __call__(
        self,
        method: str,
        seed: int,
        recalls: Sequence[float],
        perplexities: Sequence[float],
        *,
        abilities: Mapping[str, tuple[float, float]] | None = None,
        final: bool = True,
        step_seconds: float = 1.0,
        name: str | None = None,
        recall: bool = True,
    ) -> Path:
        """Make a run: ``recalls`` and ``perplexities`` at steps 0, 50, 100 and so on."""
        kind, _, score = method.partition("/")
        path = self.root / (name or f"{method.replace('/', '-')}-seed{seed}")
        (path / "results").mkdir(parents=True)
        section: dict[str, Any] = {"kind": kind} | ({"score": score} if score else {})
        recipe = {
            "run": {"name": path.name, "seed": seed},
            "model": {"path": "/somewhere/world/init"},
            "method": section,
            "optim": {"lr": 3e-4},
            "train": {"global_batch_size": 16},
        }
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        points = []
        for kept, perplexity in zip(recalls, perplexities, strict=True):
            results = self.perplexities(6.0 + 4 * (1 - kept), perplexity, seed)
            if recall:
                results.append(self.result("recall", kept, seed=seed))
            points.append(results)
        with (path / "results" / "curve.jsonl").open("w") as file:
            for index, results in enumerate(points):
                row = {
                    "step": 50 * index,
                    "target_tokens": 50 * index * 1024,
                    "results": [result.to_json() for result in results],
                }
                file.write(json.dumps(row) + "\n")
        with (path / "metrics.jsonl").open("w") as file:
            last = 50 * (len(points) - 1)
            for step in range(1, last + 1, 5):
                loss = math.log(np.interp(step, range(0, last + 1, 50), perplexities))
                loss += 0.05 * math.sin(step * (1 + seed))
                row = {"step": step, "loss": loss, "step_seconds": step_seconds}
                file.write(json.dumps(row) + "\n")
        for folder, index, which in (("source", 0, 0), ("final", -1, 1)):
            if folder == "final" and not final:
                continue
            results = list(points[index])
            for task, values in (abilities or {}).items():
                metric = "rate" if "refusal" in task or task == "code_mixing" else "accuracy"
                results.append(self.result(task, values[which], metric, seed=seed))
            write_results(path / "results" / folder, results, [], settings={"seed": seed})
        return path


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    return RunMaker(tmp_path / "runs")


class Stop:
    """Asks to stop after some calls, on every rank alike."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedEarly("stopped")


@pytest.fixture
def evaluate_until(model_dir: Path, tmp_path: Path, run_ranks: Any) -> Any:
    """Evaluate into ``out``, two questions a batch, until a request to stop."""

    def start(
        tasks: Sequence[str], folder: Path, calls: int, *, ranks: int = 1, **more: Any
    ) -> list[Any]:
        return run_ranks(
            ranks,
            lambda collective: evaluate_model(
                model_dir,
                tasks,
                folder,
                tmp_path / "out",
                collective=collective,
                batch_size=2,
                options=EvaluationOptions(dtype="float32", device="cpu"),
                before_call=Stop(calls),
                **more,
            ),
        )

    return start
