"""The main job in miniature: a model learns a language, and you see what it forgets.

Builds a small world from a seed (two made-up languages, facts, instructions, refusals), trains a
tiny instruct model on the source side, adapts it once per method through DeepSpeed ZeRO-3, and
writes report.html. Needs no network and no GPU. Finished parts are kept: the same command goes on
where it stopped.

Other studies of the same world: --study conflicts fine-tunes on a task whose data contradict facts
the model knows, --study safety on one that undoes refusals, --study dialogues mixes text of the
model's own into the task. --study knowledge, in a world of its own, tunes on facts the model knows
well or not at all and undoes part of it.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forgetscale.cli import knowledge_study
from forgetscale.cli.miniature import Miniature
from forgetscale.cli.stages import Terminal
from forgetscale.cli.studies import STUDIES
from forgetscale.errors import ConfigError
from forgetscale.evaluation.report import build_report

KNOWLEDGE = "knowledge"
EXAMPLES = """examples:
  forgetscale quickstart
  forgetscale quickstart --methods sft ssu/paper hft --seeds 3 --output runs/three-seeds
  forgetscale quickstart --seeds 7 8 9 --ranks 1 --jobs 2       two runs side by side
  forgetscale quickstart --study conflicts --methods sft eaft dft --seeds 3

--seeds 3 means the seeds 1, 2 and 3; a list of several numbers names them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="where to write"
    )
    parser.add_argument(
        "--study",
        choices=(*STUDIES, KNOWLEDGE),
        default="language",
        help="what is learned (default: language)",
    )
    listed = "; ".join(
        f"{study.name}: {', '.join(study.methods)} (default: {' '.join(study.default_methods)})"
        for study in STUDIES.values()
    )
    listed += f"; {KNOWLEDGE}: mastery group/conversations, such as 0/240/epochs (default: all)"
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"by study; {listed}")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N", help="how many, or a list"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes per run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side")
    parser.add_argument(
        "--ds-config", type=Path, default=None, metavar="FILE", help="DeepSpeed JSON of the runs"
    )


def seed_list(given: list[int]) -> list[int]:
    """Return the seeds: 1..N for one number, else the numbers themselves."""
    if any(seed < 1 for seed in given):
        raise ConfigError(f"--seeds must be >= 1, got {min(given)}.")
    if len(given) == 1:
        return list(range(1, given[0] + 1))
    return list(dict.fromkeys(given))


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    is_knowledge = options.study == KNOWLEDGE
    known = knowledge_study.METHODS if is_knowledge else STUDIES[options.study].methods
    for name in options.methods or ():
        if name not in known:
            raise ConfigError(
                f"--methods: {name!r} is not one of {', '.join(known)}; choose from these."
            )
    for name in ("ranks", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be >= 1, got {getattr(options, name)}.")
    terminal = Terminal.open()
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // (options.ranks * options.jobs))
    if is_knowledge:
        report = knowledge_study.run_study(
            options.output,
            options.methods or known,
            seed_list(options.seeds),
            ranks=options.ranks,
            jobs=options.jobs,
            threads=threads,
            ds_config=options.ds_config,
            terminal=terminal,
        )
        terminal.line(f"report: {report}")
        print(report)
        return
    study = STUDIES[options.study]
    methods = options.methods or study.default_methods
    worlds = [
        Miniature(options.output, seed, options.ranks, threads, terminal, options.ds_config, study)
        for seed in seed_list(options.seeds)
    ]
    for world in worlds:
        world.generate()
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(world.prepare) for world in worlds]:
            done.result()
        # Method by method: a study that is cut short has whole methods, not whole seeds.
        pending = [pool.submit(world.adapt, name) for name in methods for world in worlds]
        run_dirs = [done.result() for done in pending]
    folder = options.output / study.prefix.removesuffix("-")
    report = build_report(run_dirs, folder, title=study.title)
    terminal.line(f"report: {report}")
    print(report)
