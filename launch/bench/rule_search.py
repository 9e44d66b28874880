"""What should never move? A search over freeze rules on generated worlds.

Every setting adapts the source model of every world in the same order of data; recall and source
perplexity are read where all runs of a world know the target language equally well, by the rule of
``forgetscale/evaluation/report/matched.py``. Development worlds choose, fresh ones are looked at
once. The adaptation is harsher than quickstart's (ten times its peak rate): at quickstart's own
rate ``paper`` kept nine tenths of the recall (``results/testbed_3seeds.json``), which leaves little
to tell rules apart by.

Found on worlds 101 to 103: Fisher information ranks better than the paper's score in each matrix
(one world), and one ranking over all matrices better still. That ranking freezes the values and
output projections of all layers and the queries and keys of early layers nearly whole, and leaves
late queries, keys and up-projections free. Freezing 0.7 by ``paper`` keeps as much, but learns the
target text slower.

    python launch/bench/rule_search.py --seeds 101 102 103 --output runs/rules
    python launch/bench/rule_search.py --seeds 201 202 203 204 205 --output runs/rules --settings
        paper forgetscale forgetscale+shield paper+shield mag_l2 sft --keep rule_fresh

A finished run is one line of ``OUTPUT/runs.jsonl`` and is not made again. ``--keep NAME`` writes
the table to ``launch/bench/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import keep
from rule_world import EMBEDDING, HEAD, Adaptation, World
from torch import Tensor

from forgetscale.cli.miniature import Miniature
from forgetscale.cli.stages import Terminal
from forgetscale.cli.studies import LANGUAGE
from forgetscale.evaluation.report.matched import LEVELS, value_at
from forgetscale.evaluation.report.seeds import paired_difference, seed_mean
from forgetscale.ops.importance import select_frozen, select_jointly

HARSH = Adaptation(lr=3e-3, num_steps=240)
CONTROL = "paper"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A freeze rule with all its knobs."""

    score: str = "none"
    """``none`` freezes no column; else a score of ``scores``."""
    fraction: float = 0.5
    """Share of columns (or elements) frozen in each matrix."""
    axis: str = "column"
    """``column`` or ``element``."""
    scope: str = "matrix"
    """Columns are ranked in each ``matrix`` or over ``all``."""
    vectors: str = "elementwise"
    """Gains of norms: half of them (``elementwise``), all (``freeze``) or none (``train``)."""
    shield: bool = False
    """Freeze the rows of embedding and head whose token the target text never uses."""
    whole: tuple[str, ...] = ()
    """Parameters whose name holds one of these words are frozen whole."""


def matrix_scores(world: World, setting: Setting) -> dict[str, Tensor]:
    """Return a score per column, or per element (``[O, I]``), of every matrix.

    ``activation`` is ``||X_j||``; ``contrast`` the mean square of an input on the source over its
    root mean square on the target text; ``fisher`` the squared gradient of a block's loss, meaned
    over a column; ``fisher_ratio`` that on the source over that on the target text.
    """
    rule = setting.score
    fisher = {
        side: world.squared_gradients(side)
        for side in {"fisher": ("source",), "fisher_ratio": ("source", "target")}.get(rule, ())
    }
    source = world.input_norms("source")
    target = world.input_norms("target") if rule == "contrast" else {}
    found = {}
    for name in world.matrices:
        weight, x = world.weights[name].detach().double(), source[name]
        # The mean over a column is its sum but for the global scope, where heights differ.
        squares = {
            side: values[name] if setting.axis == "element" else values[name].mean(0)
            for side, values in fisher.items()
        }
        if rule == "paper":
            score = weight.abs().sum(0) * x
        elif rule == "mag_l2":
            score = weight.norm(dim=0)
        elif rule == "activation":
            score = x
        elif rule == "contrast":
            score = x.square() / target[name]
        elif rule == "fisher":
            score = squares["source"]
        elif rule == "fisher_ratio":
            score = squares["source"] / squares["target"].clamp_min(1e-30)
        else:
            raise ValueError(f"unknown score {rule!r}")
        found[name] = score
    return found


def freeze_matrices(world: World, setting: Setting) -> dict[str, Tensor]:
    """Return the masks of the body's matrices."""
    found = matrix_scores(world, setting)
    masks = {name: torch.zeros(world.weights[name].shape, dtype=torch.bool) for name in found}
    if setting.scope == "all":
        heights = [len(mask) for mask in masks.values()]
        sums = [score * height for score, height in zip(found.values(), heights, strict=True)]
        chosen = select_jointly(sums, heights, setting.fraction)
        for mask, columns in zip(masks.values(), chosen, strict=True):
            mask[:, columns] = True
        return masks
    for name, score in found.items():
        frozen = select_frozen(score.flatten(), setting.fraction)
        if setting.axis == "element":
            masks[name].view(-1)[frozen] = True
        else:
            masks[name][:, frozen] = True
    return masks


def freeze(world: World, setting: Setting) -> dict[str, Tensor]:
    """Return all masks of a setting: parameter name -> True where nothing may move."""
    masks = {} if setting.score == "none" else freeze_matrices(world, setting)
    inputs = world.input_norms("source") if setting.score == "paper" else {}
    for name in [] if setting.vectors == "train" else world.vectors:
        gain = world.weights[name].detach().double().abs()
        fraction = 1.0 if setting.vectors == "freeze" else 0.5
        masks[name] = torch.zeros(gain.shape, dtype=torch.bool)
        masks[name][select_frozen(gain * inputs.get(name, 1.0), fraction)] = True
    if setting.shield:
        counts = torch.bincount(
            world.target.read(range(world.target.num_rows)).flatten(),
            minlength=world.config.vocab_size,
        )
        for name in (EMBEDDING, HEAD):
            masks[name] = (counts == 0)[:, None].expand(world.weights[name].shape)
    for name, weight in world.weights.items():
        if any(word in name for word in setting.whole):
            masks[name] = torch.ones(weight.shape, dtype=torch.bool)
    return masks


SETTINGS: Mapping[str, Setting] = {
    "paper": Setting(score="paper"),
    "forgetscale": Setting(score="fisher", scope="all"),
    "forgetscale+shield": Setting(score="fisher", scope="all", shield=True),
    "paper+shield": Setting(score="paper", shield=True),
    "mag_l2": Setting(score="mag_l2"),
    "sft": Setting(vectors="train"),
    "fisher": Setting(score="fisher"),
    "paper, norms frozen": Setting(score="paper", vectors="freeze"),
    "contrast": Setting(score="contrast"),
    "contrast+shield": Setting(score="contrast", shield=True),
    "fisher_ratio": Setting(score="fisher_ratio"),
    "fisher_ratio, elements": Setting(score="fisher_ratio", axis="element"),
    "paper 0.7": Setting(score="paper", fraction=0.7),
    "paper 0.7+shield": Setting(score="paper", fraction=0.7, shield=True),
    "contrast 0.7": Setting(score="contrast", fraction=0.7),
    "activation 0.7": Setting(score="activation", fraction=0.7),
    "paper 0.85": Setting(score="paper", fraction=0.85),
}
"""Everything that was tried, by name."""


def matched(curves: Sequence[list[dict[str, float]]]) -> list[float]:
    """Return the target perplexities at which the runs of one world are compared.

    Deep is the lowest that all of them reached, middle and mild the usual factors above it.
    """
    deep = max(min(point["target"] for point in curve[1:]) for curve in curves)
    return [deep * factor for _, factor, _ in LEVELS]


def read_off(curve: list[dict[str, float]], field: str, perplexity: float) -> float | None:
    """Return a value of a run where it first reached a target perplexity."""
    return value_at([(point["target"], point[field]) for point in curve[1:]], perplexity)


Runs = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Seed -> setting -> run."""


def by_seed(runs: Sequence[Mapping[str, Any]]) -> Runs:
    """Sort runs by world and setting."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["seed"], {})[run["setting"]] = run
    return found


def world_levels(worlds: Runs) -> dict[int, list[float]]:
    """Return the matched target perplexities of each world.

    Settings that were tried in every world decide, all alike; one that froze too much to get there
    has no value at that point.
    """
    common = set.intersection(*(set(world) for world in worlds.values()))
    return {
        seed: matched([world[name]["curve"] for name in sorted(common)])
        for seed, world in worlds.items()
    }


def compare(
    worlds: Runs, levels: Mapping[int, list[float]], name: str, index: int
) -> dict[str, Any]:
    """Compare a setting with ``paper`` at one matched point, over the worlds that have both."""
    result: dict[str, Any] = {}
    for field in ("recall", "source"):
        values: dict[str, dict[int, float]] = {name: {}, CONTROL: {}}
        for seed, world in worlds.items():
            for setting in (name, CONTROL):
                run = world.get(setting)
                value = run and read_off(run["curve"], field, levels[seed][index])
                if value is not None:
                    values[setting][seed] = value
        mean, pair = (
            seed_mean(list(values[name].values())),
            paired_difference(values[name], values[CONTROL]),
        )
        both = [seed for seed in values[name] if seed in values[CONTROL]]
        control = math.fsum(values[CONTROL][seed] for seed in both)
        result[field] = None if mean is None else mean.to_json()
        result[f"{field} minus {CONTROL}"] = None if pair is None else pair.to_json()
        result[f"{field} over {CONTROL}"] = (
            math.fsum(values[name][seed] for seed in both) / control if control else None
        )
    return result


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per setting: means over worlds at matched points, paired with ``paper``."""
    worlds = by_seed(runs)
    levels = world_levels(worlds)
    rows = []
    for name in dict.fromkeys(run["setting"] for run in runs):
        own = [world[name] for world in worlds.values() if name in world]
        last = [run["curve"][-1]["target"] for run in own]
        row: dict[str, Any] = {
            "setting": name,
            "seeds": sorted(run["seed"] for run in own),
            "frozen_share": math.fsum(run["frozen_share"] for run in own) / len(own),
            "final_target_perplexity": math.fsum(last) / len(own),
        }
        for index, (level, _, _) in enumerate(LEVELS):
            row[level] = compare(worlds, levels, name, index)
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103], metavar="N")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("runs/rules"))
    parser.add_argument("--only-table", action="store_true", help="make no run, take what is there")
    parser.add_argument("--keep", default=None, metavar="NAME", help="write results/NAME.json")
    return parser.parse_args()


def main() -> None:
    """Make the worlds and the missing runs, then print and keep the table."""
    options = parse()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    terminal = Terminal.open()
    for seed in dict.fromkeys(options.seeds):
        made = {run["setting"] for run in runs if run["seed"] == seed}
        missing = [name for name in options.settings if name not in made]
        if options.only_table or not missing:
            continue
        miniature = Miniature(options.output, seed, 1, 1, terminal, None, LANGUAGE)
        miniature.generate()
        miniature.prepare()
        world = World(miniature.folder)
        for name in missing:
            masks = freeze(world, SETTINGS[name])
            run = {
                "seed": seed,
                "setting": name,
                "frozen_share": sum(int(m.sum()) for m in masks.values()) / world.flat.numel(),
                "curve": world.adapt(masks, HARSH),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            runs.append(run)
            terminal.line(f"seed {seed}: {name}: {run['curve'][-1]}")
    chosen = [r for r in runs if r["seed"] in options.seeds and r["setting"] in options.settings]
    result = {
        "seeds": options.seeds,
        "adaptation": asdict(HARSH),
        "settings": {name: asdict(SETTINGS[name]) for name in options.settings},
        "matched_levels": world_levels(by_seed(chosen)),
        "table": table(chosen),
        "runs": chosen,
    }
    if options.keep is None:
        print(json.dumps(result["table"], indent=1))
    else:
        keep(options.keep, result)


if __name__ == "__main__":
    main()
