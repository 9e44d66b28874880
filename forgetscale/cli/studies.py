"""What the small world is asked: a study is training data, methods and what is measured.

Every study starts from the same source model. Its target is measured as ``perplexity/target``:
held-out text of the language, or supervised tokens of held-out conversations of the task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetscale.cli import dialogue_study
from forgetscale.config import DATA_SCORES

Section = dict[str, Any]

LANGUAGE_LR = 3e-4
TASK_LR = 3e-4
LORA_LR = 1e-3
CHAT_TASKS = ("recall", "compliance", "refusal", "over_refusal")
_STRENGTHS = {"l2_sp_lora": 0.01, "ewc_lora": 1.0, "alignguard_lora": 0.25}
"""Defaults of the recipe, which ``@FACTOR`` multiplies."""
_GATE_CONTROLS = {"equal-gate": "constant_gate", "random-gate": "random_gate"}
PERPLEXITIES = ("perplexity/source", "perplexity/target")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a method's recipe may need of its world.

    Attributes:
        calibration: Token set of source chat.
        alignment: Token set of unsafe requests with refusals and harmless ones with answers.
        replay: The same as SFT rows.
        target: Token set that is trained on.
        folder: Folder of this seed.
        seed: Seed of the world and of the order of rows.
        task_share: Returns the share of rows that a ``data`` section with a mixture takes of its
            first set.
        mean_gate: Returns the mean weight that ``eaft`` gave its tokens in this world; trains
            ``eaft`` first where it has not run.
        refusals: Returns how refusals open in this world's language.
    """

    calibration: Path
    alignment: Path
    replay: Path
    target: Path
    folder: Path
    seed: int
    task_share: Callable[[Section], float]
    mean_gate: Callable[[], float]
    refusals: Callable[[], list[str]] = list


@dataclass(frozen=True, slots=True)
class Study:
    """One question to the small world.

    Attributes:
        name: Word after ``--study``.
        title: Heading of the report.
        methods: Names of methods it knows.
        default_methods: Methods of a run that names none.
        sections: Recipe sections of a method, by name.
        data: Folder of the world with the training conversations; None: the target language.
        tasks: What is measured before and after.
        live_tasks: What is measured during training.
        num_steps: Optimizer steps.
        lr: Peak learning rate.
        curve_steps: Steps between measurements.
        make: Makes what its methods need from the source model; None: nothing.
        style: Recipe under which drift and style of each finished run are measured, by the folder
            of the seed; None: not at all.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    default_methods: tuple[str, ...]
    sections: Callable[[str, Inputs], Section]
    data: str | None
    tasks: tuple[str, ...]
    live_tasks: tuple[str, ...]
    num_steps: int
    lr: float
    curve_steps: int
    make: Callable[[dialogue_study.Workshop], None] | None = None
    style: Callable[[Path], Path] | None = None

    @property
    def prefix(self) -> str:
        """What run folders of this study begin with."""
        return "" if self.name == "language" else f"{self.name}-"


def plan_section(name: str, inputs: Inputs) -> Section:
    """Return the recipe sections of a name such as ``ssu/paper`` or ``ssu/paper+shield``.

    ``ssu/paper/row`` names another axis than columns, ``element-global`` one ranking of all
    matrices; ``@0.7`` freezes that share of columns instead of one half; ``+shield`` also freezes
    the embedding and head rows of tokens the target text never uses.
    """
    kind, _, rule = name.partition("/")
    if kind == "lota":
        return {"method": {"kind": kind, "trial_lr": LANGUAGE_LR}}
    if kind != "ssu":
        return {"method": {"kind": kind}}
    rule, _, shield = rule.partition("+")
    rule, _, fraction = rule.partition("@")
    score, _, direction = rule.partition("/")
    axis, _, scope = direction.partition("-")
    section: Section = {"kind": "ssu", "frozen_fraction": float(fraction or 0.5), "score": score}
    if axis:
        section |= {"axis": axis, "scope": scope or "tensor"}
    if score in DATA_SCORES:
        section["calibration"] = {
            "path": str(inputs.calibration),
            "num_blocks": 500,
            "micro_batch_size": 4,
        }
    if shield:
        section["shield_rows"] = {"rule": "unused_in_target", "min_count": 1}
    return {"method": section}


def loss_section(name: str, inputs: Inputs) -> Section:
    """Return the recipe sections of a token-weighted loss or of one of its controls.

    ``sft/low-lr`` learns at a third of the rate, ``sft/equal-gate`` and ``sft/random-gate`` give
    tokens the mean weight that ``eaft`` gave them: one and the same, or at random.
    ``eaft/weights`` divides by the sum of weights.
    """
    kind, _, variant = name.partition("/")
    if variant == "low-lr":
        return {"method": {"kind": kind}, "optim": {"lr": TASK_LR / 3}}
    if variant in _GATE_CONTROLS:
        loss = {"kind": _GATE_CONTROLS[variant], "mean_gate": inputs.mean_gate()}
        return {"method": {"kind": "sft", "loss": loss}}
    if kind == "sft":
        return {"method": {"kind": kind}}
    loss = {"kind": kind}
    if variant == "weights":
        loss["normalize"] = "weights"
    return {"method": {"kind": "sft", "loss": loss}}


def anchor_section(name: str, inputs: Inputs) -> Section:
    """Return the recipe sections of a method that holds weights near the source model.

    ``NAME_lora`` and ``lora`` train factors instead of all weights; ``/replay`` mixes in one
    alignment row in fifty and protects nothing; ``@10`` multiplies the default strength;
    ``/collision`` adds the collision terms, ``/no-ridge`` leaves out the penalty on the rest of the
    update, ``/project`` takes protected directions out of steps.
    """
    name, _, factor = name.partition("@")
    kind, _, variant = name.partition("/")
    sections: Section = {}
    if kind.endswith("lora"):
        sections["adapter"] = {"kind": "lora", "rank": 8, "alpha": 16.0}
        sections["optim"] = {"lr": LORA_LR}
    if variant == "replay":
        sets = [(inputs.target, 49.0), (inputs.replay, 1.0)]
        sections["data"] = {
            "kind": "mixture",
            "sets": [{"kind": "sft", "path": str(path), "weight": share} for path, share in sets],
        }
    method: Section = {"kind": "sft" if kind == "lora" else kind}
    if kind.partition("_lora")[0] in ("ewc", "alignguard"):
        method["calibration"] = {
            "path": str(inputs.alignment),
            "num_blocks": 200,
            "micro_batch_size": 4,
        }
    if kind.partition("_lora")[0] == "alignguard":
        method["refusals"] = inputs.refusals()
    if factor:
        method["strength"] = _STRENGTHS[kind] * float(factor)
    if variant == "collision":
        method["collision"] = {}
    if variant == "no-ridge":
        method["task_strength"] = 0.0
    if variant == "project":
        method["action"] = "project_update"
    return sections | {"method": method}


LANGUAGE = Study(
    name="language",
    title="A model learns a language and keeps what it knew",
    methods=(
        "sft",
        "hft",
        "ssu/paper",
        "ssu/paper+shield",
        "ssu/paper@0.7",
        "ssu/paper@0.7+shield",
        "ssu/forgetscale",
        "ssu/forgetscale+shield",
        "ssu/official",
        "ssu/mag_l1",
        "ssu/mag_l2",
        "ssu/mag_l2+shield",
        "ssu/rand",
        "ssu/fisher",
        "ssu/sgpt_true",
        "ssu/sgpt_official",
        "ssu/paper/row",
        "ssu/paper/element",
        "ssu/paper/element-global",
        "ssu/official/row",
        "ssu/official/element",
        "ssu/rand/row",
        "ssu/rand/element",
        "gmt",
        "lota",
        "s2ft",
    ),
    default_methods=("sft", "ssu/rand", "ssu/paper"),
    sections=plan_section,
    data=None,
    tasks=(*PERPLEXITIES, *CHAT_TASKS, "target_recall", "code_mixing"),
    live_tasks=(*PERPLEXITIES, "recall"),
    num_steps=600,
    lr=LANGUAGE_LR,
    curve_steps=40,
)
CONFLICTS = Study(
    name="conflicts",
    title="A model learns a task from data that contradict what it knows",
    methods=(
        "sft",
        "sft/low-lr",
        "sft/equal-gate",
        "sft/random-gate",
        "eaft",
        "eaft/weights",
        "dft",
        "focal",
        "ssu/paper",
    ),
    default_methods=("sft", "sft/equal-gate", "sft/random-gate", "eaft"),
    sections=lambda name, inputs: (plan_section if name.startswith("ssu") else loss_section)(
        name, inputs
    ),
    data="conflicts",
    tasks=(*PERPLEXITIES, "recall_planted", *CHAT_TASKS),
    live_tasks=(*PERPLEXITIES, "recall", "recall_planted"),
    num_steps=160,
    lr=TASK_LR,
    curve_steps=8,
)
SAFETY = Study(
    name="safety",
    title="A model learns a harmless task and stops refusing what is not",
    methods=(
        "sft",
        "sft/replay",
        "l2_sp",
        "ewc",
        "alignguard",
        "osf",
        "lora",
        "lora/replay",
        "l2_sp_lora",
        "l2_sp_lora@100",
        "ewc_lora",
        "ewc_lora@10",
        "alignguard_lora",
        "alignguard_lora@10",
        "alignguard_lora/no-ridge",
        "alignguard_lora/collision",
        "alignguard_lora/project",
    ),
    default_methods=("lora", "l2_sp_lora", "ewc_lora", "alignguard_lora"),
    sections=anchor_section,
    data="harmless",
    tasks=(*PERPLEXITIES, "refused", *CHAT_TASKS),
    live_tasks=(*PERPLEXITIES, "refused", "recall"),
    num_steps=160,
    lr=TASK_LR,
    curve_steps=8,
)
DIALOGUES = Study(
    name="dialogues",
    title="A model learns a harmful task beside text of its own",
    methods=dialogue_study.METHODS,
    default_methods=("sft", "selfdialogue/hard@0.5", "selfdialogue/soft@0.5", "external@0.5"),
    sections=dialogue_study.dialogue_section,
    data=dialogue_study.TASK,
    tasks=(*PERPLEXITIES, "refused", "recall_planted", *CHAT_TASKS),
    live_tasks=(*PERPLEXITIES, "refused", "recall"),
    num_steps=dialogue_study.TASK_STEPS,
    lr=TASK_LR,
    curve_steps=-(-dialogue_study.TASK_STEPS // dialogue_study.CURVE_POINTS),
    make=dialogue_study.make_dialogues,
    style=dialogue_study.measuring_recipe,
)
STUDIES = {study.name: study for study in (LANGUAGE, CONFLICTS, SAFETY, DIALOGUES)}
