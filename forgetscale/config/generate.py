"""Recipe of ``forgetscale generate``: which model writes what, how much, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from forgetscale.config.ranges import STRICT, require, require_fraction
from forgetscale.config.recipe import ModelConfig

OWN_INSTRUCTION = (
    "Write one question or request that a user could send to an assistant. Write only the message"
    " itself."
)
"""What the model is asked in order to write an instruction of its own."""
TOPIC_INSTRUCTION = (
    "Write one question or request about {topic} that a user could send to an assistant. Write only"
    " the message itself."
)
"""The same with a topic."""
SDFT_INSTRUCTION = (
    "Below are an instruction and a reference answer. Write the answer again in your own words,"
    " keeping what it says.\n\nInstruction:\n{instruction}\n\nReference answer:\n{answer}"
)
"""What the model is asked in order to say a given answer in its own words."""
SDFT_PHRASES = ("reference answer", "your response", "my response", "your answer", "my answer")
"""Phrases that give away that an answer was rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How one role's tokens are drawn."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    temperature: float = 0.7
    """Divides the logits, >= 0; 0 takes the most probable token."""
    top_p: float = 0.9
    """Tokens are drawn from the smallest set with at least this probability, in (0, 1]."""
    top_k: int = 0
    """At most this many tokens are drawn from; 0: no limit."""
    max_new_tokens: int = 256
    """Longest turn in tokens, its end included, > 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}")
        require(self.max_new_tokens > 0, f"max_new_tokens must be > 0, got {self.max_new_tokens}")


def _assistant_sampling() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreQueryDialogueConfig:
    """The model goes on from the user's header: it writes both sides (Magpie's way)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["pre_query"] = "pre_query"
    """Nothing is given but the chat template."""
    turns: int = 1
    """Pairs of user and assistant turns, 1..3, in one pass on one key-value cache."""
    system: str | None = None
    """System message in front; None: whatever the template writes without one."""
    user: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the user's turns."""
    assistant: SamplingConfig = field(default_factory=_assistant_sampling)
    """Sampling of the assistant's turns."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(1 <= self.turns <= 3, f"turns must lie in 1..3, got {self.turns}")


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionDialogueConfig:
    """The model is asked for an instruction, then answers it in a chat of its own."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["own_instruction", "seed_topic"]
    """``seed_topic`` needs ``topics``, ``own_instruction`` takes none."""
    request: str | None = None
    """What the model is asked; ``{topic}`` stands for the topic. None: the built-in sentence."""
    topics: Path | None = None
    """Text file with one topic a line; sample i takes line i modulo their number."""
    turns: int = 1
    """Pairs of turns of the kept dialogue, 1..3; the second user turn on is pre-query."""
    system: str | None = None
    """System message of the kept dialogue."""
    user: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of instructions."""
    assistant: SamplingConfig = field(default_factory=_assistant_sampling)
    """Sampling of the assistant's turns."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(1 <= self.turns <= 3, f"turns must lie in 1..3, got {self.turns}")
        require(
            (self.kind == "seed_topic") == (self.topics is not None),
            "topics, a text file with one topic a line, goes with kind seed_topic",
        )
        require(
            self.request is None or (self.kind == "seed_topic") == ("{topic}" in self.request),
            "request must hold {topic} with kind seed_topic and only then",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsDialogueConfig:
    """Answers to given prompts: for evaluation, or to answer instructions again."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["prompts"]
    """Given prompts; every one of them is answered, nothing is left out."""
    path: Path
    """JSON lines with ``messages`` (a last assistant turn is ignored) or ``prompt``; ``id`` is
    copied. Or the result folder of another generation, whose prompts are answered again."""
    samples_per_prompt: int = 1
    """Answers to each prompt, > 0."""
    assistant: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=1024)
    )
    """Sampling of answers."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.samples_per_prompt > 0, "samples_per_prompt must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SdftDialogueConfig:
    """Self-distillation: the model says the answers of a task in its own words.

    Source: arXiv:2402.13669. An answer that fails the checks is replaced by the given one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["sdft"]
    """Rewrites given answers."""
    path: Path
    """JSON lines with ``messages`` whose last turn is the answer."""
    request: str = SDFT_INSTRUCTION
    """What the model is asked; ``{instruction}`` and ``{answer}`` stand for the row's."""
    check: Literal["none", "last_number"] = "none"
    """``last_number``: the last number of both answers must be equal."""
    phrases: tuple[str, ...] = SDFT_PHRASES
    """Answers that hold one of these, in any case, are replaced."""
    assistant: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(
            temperature=0.95, top_p=0.7, top_k=50, max_new_tokens=1024
        )
    )
    """Sampling of answers."""

    def __post_init__(self) -> None:
        """Check the request."""
        require(
            "{instruction}" in self.request and "{answer}" in self.request,
            "request must hold {instruction} and {answer}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SsrDialogueConfig:
    """Self-synthesised rehearsal: new instances of a task by in-context learning.

    Source: arXiv:2403.01244, first stage: a plain text prompt of two demonstrations and an open
    input label. ``forgetscale generate --keep-central`` then keeps a diverse part, and a run of
    kind ``prompts`` on that folder answers it again with the latest model.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["ssr"]
    """In-context synthesis from demonstrations."""
    path: Path
    """JSON lines with ``messages``: the demonstrations, at least two."""
    definition: str = ""
    """What the task is; stands before the demonstrations."""
    num_demonstrations: int = 2
    """Demonstrations in a prompt, > 1; sample i takes the i-th ordered choice of a seeded order."""
    max_input_tokens: int = 800
    """Longer instructions are rejected, > 0."""
    max_output_tokens: int = 128
    """Longer answers are rejected, > 0."""
    assistant: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.9, top_p=0.6, max_new_tokens=1024)
    )
    """Sampling; the published repetition penalty of 1.2 is not applied."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.num_demonstrations > 1, "num_demonstrations must be > 1")
        for name in ("max_input_tokens", "max_output_tokens"):
            require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")


def _kind(value: Any) -> str | None:
    kind = value.get("kind", "pre_query") if isinstance(value, dict) else value.kind
    return None if kind is None else str(kind)


DialogueConfig = Annotated[
    Annotated[PreQueryDialogueConfig, Tag("pre_query")]
    | Annotated[InstructionDialogueConfig, Tag("own_instruction")]
    | Annotated[InstructionDialogueConfig, Tag("seed_topic")]
    | Annotated[PromptsDialogueConfig, Tag("prompts")]
    | Annotated[SdftDialogueConfig, Tag("sdft")]
    | Annotated[SsrDialogueConfig, Tag("ssr")],
    Discriminator(_kind),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DialogueFilterConfig:
    """Which dialogues are rejected; each rule is a function of one dialogue alone.

    Always rejected: an empty turn, a user turn without end, a role header or special token inside
    a turn, text that the chat template would write otherwise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    min_user_characters: int = 4
    """Shortest first user turn, >= 0."""
    min_answer_characters: int = 1
    """Shortest assistant turn, >= 0."""
    max_repeated_fraction: float = 0.5
    """Share of a turn's 3-word sequences that may repeat earlier ones, 0..1; turns of at least 30
    words."""
    script: str | None = None
    """Unicode script that letters must mostly belong to, such as ``Latin``; None: any."""
    min_script_fraction: float = 0.5
    """Least share of letters in ``script``, 0..1."""
    keep_cut_answers: bool = True
    """Keep dialogues whose last answer was cut at the length limit; its end is not supervised."""
    duplicates: Literal["none", "exact", "near"] = "exact"
    """Compare first user turns; of equal ones the lowest id stays."""
    near_threshold: float = 0.8
    """Estimated Jaccard similarity of 5-word sequences, (0, 1]."""
    contamination: tuple[Path, ...] = ()
    """JSON lines or text files; dialogues that share 13 words in a row with them are rejected."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("min_user_characters", "min_answer_characters"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require_fraction("max_repeated_fraction", self.max_repeated_fraction)
        require_fraction("min_script_fraction", self.min_script_fraction)
        require(0 < self.near_threshold <= 1, "near_threshold must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What runs the model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["transformers", "vllm", "zero3"] = "transformers"
    """``transformers``: one whole copy a worker; ``vllm``: needs forgetscale[vllm], and spreads a
    copy over several GPUs with ``tensor_parallel_size``; ``zero3``: all ranks of a launcher are one
    worker with one copy between them, slow, for models that fit no other way."""
    num_slots: int = 32
    """Dialogues decoded together by a worker, >= 4; every forward pass has this many rows. With
    ``zero3`` on each rank."""
    tensor_parallel_size: int = 1
    """GPUs of one ``vllm`` worker, > 0."""
    offload: Literal["none", "cpu"] = "none"
    """Where ``zero3`` keeps the slices of a rank: on its device or in the memory of the host."""
    late_seconds: float = 300.0
    """``zero3``: a rank that comes this much later than others to a pass they all take part in is
    named, and the job ends, > 0."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(self.num_slots >= 4, f"num_slots must be >= 4, got {self.num_slots}")
        require(self.tensor_parallel_size > 0, "tensor_parallel_size must be > 0")
        require(
            self.tensor_parallel_size == 1 or self.kind == "vllm",
            "tensor_parallel_size goes with kind vllm",
        )
        require(self.offload == "none" or self.kind == "zero3", "offload goes with kind zero3")
        require(self.late_seconds > 0, f"late_seconds must be > 0, got {self.late_seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How much is generated, where it goes and how work is shared."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    output_dir: Path
    """Folder that all workers share; ``dialogues/`` in it is the result."""
    num_dialogues: int | None = None
    """Accepted dialogues wanted, > 0: the first ones by id. Not given for ``prompts`` and ``sdft``,
    which answer every row."""
    seed: int = 42
    """Seed of all sampling, >= 0."""
    dialogue: DialogueConfig = field(default_factory=PreQueryDialogueConfig)
    """What is written."""
    max_tokens: int = 2048
    """Longest dialogue in tokens, template included, > 0."""
    filters: DialogueFilterConfig = field(default_factory=DialogueFilterConfig)
    """What is rejected."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What runs the model."""
    shard_size: int = 64
    """Ids of one shard, the piece of work a worker takes, > 0."""
    over_generation: float = 1.15
    """Ids started with for each dialogue wanted, >= 1; more shards follow if too few are kept."""
    min_accepted_fraction: float = 0.05
    """Stop with an error if less of the first 256 or more finished ids is accepted, 0..1."""
    max_attempts: int = 3
    """Tries of an id whose logits are not finite, each with its own seed, > 0."""
    lease_seconds: float = 60.0
    """A worker that shows no sign of life for this long loses its shards, > 0. Measured on the
    observer's own monotonic clock."""
    copy_after_seconds: float | None = 60.0
    """A worker that finds no free shard for this long begins an unfinished one again beside its
    owner, >= 0; whoever has all of it first seals it. None: workers wait instead."""
    journal_rows: int = 8
    """Finished dialogues written to the journal at a time, > 0: what a kill can cost."""
    soft_targets: int = 0
    """Most probable tokens whose log-probabilities are kept at every supervised position, for
    training with a KL loss to this model; 0: none."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        every_row = self.dialogue.kind in ("prompts", "sdft")
        require(
            (self.num_dialogues is None) == every_row,
            "num_dialogues is needed, except with dialogue.kind prompts and sdft, where every row"
            " is answered",
        )
        require(self.num_dialogues is None or self.num_dialogues > 0, "num_dialogues must be > 0")
        require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        for name in ("max_tokens", "shard_size", "max_attempts", "lease_seconds", "journal_rows"):
            require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")
        copy = self.copy_after_seconds
        require(copy is None or copy >= 0, f"copy_after_seconds must be >= 0, got {copy}")
        require(self.over_generation >= 1, "over_generation must be >= 1")
        require_fraction("min_accepted_fraction", self.min_accepted_fraction)
        require(self.soft_targets >= 0, f"soft_targets must be >= 0, got {self.soft_targets}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRecipe:
    """One complete generation."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: ModelConfig
    """The model that writes."""
    generate: GenerateConfig
    """What it writes."""
