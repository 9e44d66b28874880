"""The interface between dialogues and whatever runs the model.

A dialogue knows its tokens and what happens after each new one; an engine knows how to get the next
token. An engine never looks into a dialogue beyond these members, a dialogue never touches a model,
so either can be exchanged alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from forgetscale.generation.records import Sample


@dataclass(frozen=True, slots=True)
class TurnSampling:
    """How the tokens of the turn in progress are drawn.

    Attributes:
        temperature: >= 0; 0 takes the most probable token.
        top_p: In (0, 1].
        top_k: >= 0; 0: no limit.
        seed: Seed of this turn, 0..2^63 - 1.
        num_left: Tokens the turn may still have, > 0.
        stop_ids: Tokens that end it.
        stop_text: Text that ends it where no token does, or "".
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    num_left: int
    stop_ids: tuple[int, ...]
    stop_text: str = ""


class Dialogue(Protocol):
    """A sample that is being written."""

    sample_id: int
    attempt: int
    ids: list[int]
    """Tokens of the context so far, forced ones too; the engine feeds those it has not fed."""

    @property
    def num_top(self) -> int:
        """Most probable tokens wanted with each token of this turn; 0: none."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to write; such a dialogue is not submitted."""
        ...

    @property
    def sampling(self) -> TurnSampling:
        """How the next token is drawn."""
        ...

    def push(
        self,
        token: int,
        log_prob: float,
        top_ids: Sequence[int] = (),
        top_log_probs: Sequence[float] = (),
    ) -> int | None:
        """Take the next token; extend, cut or replace ``ids``.

        Returns:
            How many leading tokens of ``ids`` are as before the call, or None: the dialogue is
            over.
        """
        ...

    def fail(self, reason: str) -> None:
        """End the dialogue because no token could be drawn."""
        ...

    def sample(self) -> Sample:
        """Return the finished sample, judged."""
        ...


class Engine(Protocol):
    """Runs a model for several dialogues at once."""

    @property
    def num_free(self) -> int:
        """Dialogues that could be submitted now."""
        ...

    @property
    def num_busy(self) -> int:
        """Dialogues in progress."""
        ...

    def submit(self, dialogue: Dialogue) -> None:
        """Begin a dialogue; only while ``num_free`` is not 0."""
        ...

    def step(self) -> list[Dialogue]:
        """Work for a moment; return the dialogues that ended in it."""
        ...


class EngineStopped(Exception):
    """The engine can do no more; what is in progress is lost, what is finished is not."""
