"""Study ``knowledge`` of the quick start: what tuning on facts does, and what restoration undoes.

Per seed: a world of facts met more or less often, a source model, a mastery probe that sorts the
facts into groups 0 to 4, tuning on 240 or 1,920 conversations about facts of one group, and a sweep
of restorations with all controls. Every stage is a command a user could type.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetscale.artifact import read_manifest
from forgetscale.cli.stages import Terminal, forgetscale_command
from forgetscale.cli.world_folder import BATCH_SIZE, WorldFolder, exists
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
class KnowledgeWorld(WorldFolder):
    """One world, its source model and its tuned models below one folder."""

    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed."""
        return self.output / f"knowledge-seed-{self.seed}"

    def generate(self) -> None:
        """Build the world, or find it; one after another, since torch's seed is global.

        Raises:
            ConfigError: The folder was made from another world.
        """
        self.take_world(ensure_graded(self.output / "worlds", self.seed))

    def prepare(self) -> None:
        """Train the source model, probe what it knows, draw conversations and questions."""
        self.require_ds_config()
        self.build("tokens/source", [self.world / "chat" / "train.jsonl"], "--chat")
        blocks = read_manifest(self.folder / "tokens" / "source", "token_set")["payload"]
        steps = int(blocks["num_rows"]) // BATCH_SIZE
        self._train("source", self.source_recipe(steps))
        self._probe()
        self._draw()

    # ---- stages -------------------------------------------------------------------------

    def _tuning_recipe(self, name: str, steps: int) -> Row:
        path = self.folder / "tokens" / name.partition("-steps")[0]
        return self.recipe(name, steps, TUNING_LR, TUNING_BATCH) | {
            "model": {"path": str(self.source_model), "dtype": "float32"},
            "data": {"kind": "sft", "path": str(path), "shuffle_seed": self.seed},
            "method": {"kind": "sft"},
        }

    def _train(self, name: str, recipe: Row) -> None:
        if not exists(self.folder / name / "export", "model_export"):
            self.train_as(name, recipe)

    def _probe(self) -> None:
        output = self.folder / "mastery"
        if exists(output, "mastery"):
            return
        facts = self._facts()
        inside = sorted({fact["relation"] for fact in facts if fact["domain"] == "in"})
        arguments = [
            "analyze",
            "--mastery",
            "--model",
            str(self.source_model),
            "--output",
            str(output),
        ]
        arguments += ["--facts", str(self.world / "facts.jsonl")]
        arguments += ["--templates", str(self.world / "openings.json"), "--in-domain", *inside]
        arguments += ["--samples", str(SAMPLES), "--sample-tokens", "6", "--sample-batch", "80"]
        arguments += ["--match-case", "--sample-seed", str(self.seed), "--rank-candidates", "0"]
        self.run("probe mastery", forgetscale_command(arguments, 1))

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
            flags = ("--sft", "--packing", "none")
            self.build(f"tokens/{data}", [path], *flags, block_size=ROW_TOKENS)
        self._train(name, self._tuning_recipe(name, steps))
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
        arguments = ["restore", "--source", str(self.source_model)]
        arguments += ["--tuned", str(self.folder / name / "export"), "--output", str(output)]
        arguments += ["--fraction", *FRACTIONS, "--controls", "--also-score", "absolute", "base"]
        arguments += ["--seed", str(self.seed), "--task-dir", str(tasks), "--dev-tasks", *of(DEV)]
        arguments += ["--test-tasks", *of(TEST), *of(PLAIN), *of(OTHER), f"{TRAINED}-{data}"]
        arguments += ["--batch-size", "64", "--workers", "1", "--keep", "chosen"]
        self.run(f"restore {name}", forgetscale_command(arguments, 1))


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
