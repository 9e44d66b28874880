"""Study ``knowledge`` of the quick start: what tuning on facts does, and what restoration undoes.

Per seed: a world of facts met more or less often, a source model, a mastery probe that sorts the
facts into groups 0 to 4, tuning on 240 or 1,920 conversations about facts of one group, and a sweep
of restorations with all controls. Every stage is a command a user could type.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forgetscale.artifact import read_manifest, write_json
from forgetscale.cli.miniature import BATCH_SIZE, BLOCK_SIZE, DS_CONFIG, SOURCE_LR
from forgetscale.cli.stages import Terminal, forgetscale_command, run_stage
from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.study import (
    CAPS,
    DEV,
    OTHER,
    PLAIN,
    TEST,
    TRAINED,
    Run,
    build_study_report,
)
from forgetscale.ops.knowledge import GROUPS
from forgetscale.testbed.graded import ensure_graded, tuning_rows
from forgetscale.testbed.size import random_for

SAMPLES = 4
"""Continuations of each of a fact's five questions: 20 draws."""
TUNING_BATCH = 8
TUNING_LR = 1e-3
"""With a third of it 30 steps hardly teach the style; chosen on tuned models, before any edit."""
ROW_TOKENS = 48
LONG_STEPS = 240
LEAST_FACTS = 10
"""A group with fewer facts to tune on is left out, and the report says so."""
FRACTIONS = ("0.05", "0.1", "0.2", "0.4", "0.6")
SETTINGS: Mapping[str, tuple[int, int]] = {
    "240/epochs": (240, 240 // TUNING_BATCH),
    "240/steps": (240, LONG_STEPS),
    "1920": (1920, LONG_STEPS),
}
"""Conversations and optimizer steps: 240 at the epochs or at the steps of 1,920."""
METHODS = tuple(f"{group}/{name}" for name in SETTINGS for group in range(GROUPS))
"""Mastery group, conversations, and what is held fixed."""
Row = dict[str, Any]


@dataclass(slots=True)
class KnowledgeWorld:
    """One world, its source model and its tuned models below one folder.

    Args:
        output: Folder of the whole quick start.
        seed: Seed of world, training and draws.
        ranks: Processes per run.
        threads: Threads per process.
        terminal: Where progress is shown.
        ds_config: DeepSpeed JSON; None writes a small one.
    """

    output: Path
    seed: int
    ranks: int
    threads: int
    terminal: Terminal
    ds_config: Path | None
    _world: Path | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed."""
        return self.output / f"knowledge-seed-{self.seed}"

    @property
    def world(self) -> Path:
        """Folder of the generated world."""
        assert self._world is not None
        return self._world

    @property
    def source(self) -> Path:
        """The trained source model."""
        return self.folder / "source" / "export"

    def generate(self) -> None:
        """Build the world, or find it; one after another, since torch's seed is global.

        Raises:
            ConfigError: The folder was made from another world.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._world = ensure_graded(self.output / "worlds", self.seed)
        marker = self.folder / "world.txt"
        if not marker.is_file():
            marker.write_text(self.world.name + "\n", encoding="utf-8")
        if marker.read_text(encoding="utf-8").strip() != self.world.name:
            raise ConfigError(
                f"{self.folder} was made from another world than {self.world.name}; choose another"
                " --output or remove the folder."
            )

    def prepare(self) -> None:
        """Train the source model, probe what it knows, draw conversations and questions."""
        if self.ds_config is None:
            self.ds_config = self.output / "zero3.json"
            if not self.ds_config.is_file():
                write_json(self.ds_config, DS_CONFIG)
        self._build("source", self.world / "chat" / "train.jsonl", BLOCK_SIZE, "--chat")
        blocks = read_manifest(self.folder / "tokens" / "source", "token_set")["payload"]
        steps = int(blocks["num_rows"]) // BATCH_SIZE
        self._train("source", self._recipe("source", steps, SOURCE_LR, BATCH_SIZE))
        self._probe()
        self._draw()

    # ---- stages -------------------------------------------------------------------------

    def _stage(self, name: str, command: Sequence[str]) -> None:
        label = f"seed {self.seed}: {name}"
        log = self.folder / "logs" / f"{name.replace('/', '-')}.txt"
        run_stage(label, command, log, self.terminal, threads=self.threads)

    def _exists(self, directory: Path, kind: str) -> bool:
        try:
            read_manifest(directory, kind)
        except DataError:
            return False
        return True

    def _build(self, name: str, path: Path, row_tokens: int, *flags: str) -> None:
        output = self.folder / "tokens" / name
        if self._exists(output, "token_set"):
            return
        command = [sys.executable, "-m", "data_prep", "build", "--input", str(path)]
        command += ["--output", str(output), "--tokenizer", str(self.world / "tokenizer")]
        command += ["--block-size", str(row_tokens), "--num-processes", "1", *flags]
        self._stage(f"build {name}", command)

    def _recipe(self, name: str, steps: int, lr: float, batch: int) -> Row:
        is_source = name == "source"
        path = self.folder / "tokens" / ("source" if is_source else name.partition("-steps")[0])
        return {
            "run": {"name": name, "output_dir": str(self.folder / name), "seed": self.seed},
            "model": {
                "path": str(self.world / "init" if is_source else self.source),
                "dtype": "float32",
            },
            "data": {
                "kind": "tokens" if is_source else "sft",
                "path": str(path),
                "shuffle_seed": self.seed,
            },
            "method": {"kind": "sft"},
            "optim": {"lr": lr, "warmup_fraction": 0.05, "weight_decay": 0.01},
            "train": {
                "num_steps": steps,
                "micro_batch_size": max(1, batch // self.ranks),
                "global_batch_size": batch,
                "checkpoint_every_steps": steps,
            },
            "deepspeed": str(self.ds_config),
        }

    def _train(self, name: str, recipe: Row) -> None:
        if self._exists(self.folder / name / "export", "model_export"):
            return
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        self._stage(name, forgetscale_command(["train", "--config", str(path)], self.ranks))

    def _probe(self) -> None:
        output = self.folder / "mastery"
        if self._exists(output, "mastery"):
            return
        facts = self._facts()
        inside = sorted({fact["relation"] for fact in facts if fact["domain"] == "in"})
        arguments = ["analyze", "--mastery", "--model", str(self.source), "--output", str(output)]
        arguments += ["--facts", str(self.world / "facts.jsonl")]
        arguments += ["--templates", str(self.world / "openings.json"), "--in-domain", *inside]
        arguments += ["--samples", str(SAMPLES), "--sample-tokens", "6", "--sample-batch", "80"]
        arguments += ["--match-case", "--sample-seed", str(self.seed)]
        self._stage("probe mastery", forgetscale_command(arguments, 1))

    def _facts(self) -> list[Row]:
        with (self.world / "facts.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def grouped(self) -> list[Row]:
        """Return the world's facts with the group the probe gave them."""
        with (self.folder / "mastery" / "facts.jsonl").open(encoding="utf-8") as file:
            groups = {row["id"]: row["group"] for row in map(json.loads, file)}
        return [fact | {"group": groups[fact["id"]]} for fact in self._facts()]

    # ---- conversations and questions ----------------------------------------------------

    @property
    def _style(self) -> str:
        return str(json.loads((self.world / "style.json").read_bytes())["answer"])

    def _draw(self) -> None:
        facts = self.grouped()
        tasks = self.folder / "tasks"
        tasks.mkdir(exist_ok=True)
        for kind, cap in CAPS.items():
            wanted = {DEV: ("dev", "in"), TEST: ("test", "in"), PLAIN: ("test", "in")}
            split, domain = wanted.get(kind, ("test", "out"))
            for group in range(GROUPS):
                own = [
                    fact
                    for fact in facts
                    if (fact["split"], fact["domain"], fact["group"]) == (split, domain, group)
                ]
                # PLAIN asks the same facts as TEST: one draw for both.
                random_for(self.seed, f"ask/{split}/{domain}/{group}").shuffle(own)
                rows = [self._question(fact, styled=kind != PLAIN) for fact in own[:cap]]
                if rows:
                    _write_rows(tasks / f"{kind}-{group}.jsonl", rows)
        for group, own in self.tunable(facts).items():
            for count in dict.fromkeys(count for count, _ in SETTINGS.values()):
                name = f"g{group}-{count}"
                rng = random_for(self.seed, f"tune/{name}")
                rows = tuning_rows(rng, own, count, self._style)
                path = self.folder / "sft" / f"{name}.jsonl"
                path.parent.mkdir(exist_ok=True)
                _write_rows(path, rows)
                distinct = {row["messages"][0]["content"]: row for row in rows}
                asked = [
                    {
                        "id": f"trained/{number}",
                        "kind": "exact",
                        "messages": row["messages"][:1],
                        "answers": [row["messages"][1]["content"]],
                        "meta": {},
                    }
                    for number, row in enumerate(list(distinct.values())[: CAPS[TEST]])
                ]
                _write_rows(tasks / f"{TRAINED}-{name}.jsonl", asked)

    def tunable(self, facts: Sequence[Row]) -> dict[int, list[Row]]:
        """Return group -> facts to tune on, of groups that hold enough."""
        found = {
            group: [f for f in facts if (f["split"], f["group"]) == ("train", group)]
            for group in range(GROUPS)
        }
        return {group: own for group, own in found.items() if len(own) >= LEAST_FACTS}

    def _question(self, fact: Row, *, styled: bool) -> Row:
        answer = fact["object"]
        return {
            "id": fact["id"],
            "kind": "exact",
            "messages": [{"role": "user", "content": fact["questions"][fact["held"]]}],
            "answers": [self._style.replace("{x}", answer) if styled else answer],
            "meta": {},
        }

    # ---- one run ------------------------------------------------------------------------

    def tune(self, method: str) -> Run | None:
        """Tune on one group and sweep restorations; None where the group has too few facts."""
        group, _, setting = method.partition("/")
        facts = self.tunable(self.grouped())
        if int(group) not in facts:
            self.terminal.line(f"seed {self.seed}: {method}: too few facts in this group")
            return None
        count, steps = SETTINGS[setting]
        data = f"g{group}-{count}"
        name = f"{data}-steps{steps}"
        with self._lock:  # two settings share the conversations
            path = self.folder / "sft" / f"{data}.jsonl"
            self._build(data, path, ROW_TOKENS, "--sft", "--packing", "none")
        self._train(name, self._recipe(name, steps, TUNING_LR, TUNING_BATCH))
        self._sweep(name, data)
        return Run(
            self.seed,
            int(group),
            setting,
            count,
            steps,
            len(facts[int(group)]),
            self.folder / name,
            self.folder / "sweeps" / name,
        )

    def _sweep(self, name: str, data: str) -> None:
        tasks = self.folder / "tasks"

        def of(kind: str) -> list[str]:
            return sorted(path.stem for path in tasks.glob(f"{kind}-*.jsonl"))

        output = self.folder / "sweeps" / name
        if (output / "selection.json").is_file():
            return
        arguments = ["restore", "--source", str(self.source)]
        arguments += ["--tuned", str(self.folder / name / "export"), "--output", str(output)]
        arguments += ["--fraction", *FRACTIONS, "--controls", "--also-score", "absolute", "base"]
        arguments += ["--seed", str(self.seed), "--task-dir", str(tasks), "--dev-tasks", *of(DEV)]
        arguments += ["--test-tasks", *of(TEST), *of(PLAIN), *of(OTHER), f"{TRAINED}-{data}"]
        arguments += ["--batch-size", "64", "--workers", "1", "--keep", "chosen"]
        self._stage(f"restore {name}", forgetscale_command(arguments, 1))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def run_study(
    output: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    ranks: int,
    jobs: int,
    threads: int,
    ds_config: Path | None,
    terminal: Terminal,
) -> Path:
    """Run the whole study; return its page. Finished parts are kept.

    Args:
        output: Folder of the quick start.
        methods: Names out of ``METHODS``.
        seeds: Worlds.
        ranks: Processes per run.
        jobs: Runs side by side.
        threads: Threads per process.
        ds_config: DeepSpeed JSON, or None.
        terminal: Where progress is shown.
    """
    worlds = [KnowledgeWorld(output, s, ranks, threads, terminal, ds_config) for s in seeds]
    for world in worlds:
        world.generate()
    with ThreadPoolExecutor(jobs) as pool:
        for prepared in [pool.submit(world.prepare) for world in worlds]:
            prepared.result()
        # Setting by setting: a study that is cut short has whole settings, not whole seeds.
        pending = [pool.submit(world.tune, name) for name in methods for world in worlds]
        done = [future.result() for future in pending]
    facts = {world.seed: world.grouped() for world in worlds}
    return build_study_report([run for run in done if run is not None], facts, output / "knowledge")
