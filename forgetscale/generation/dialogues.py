"""Dialogues in progress: which token ends a turn, what is forced between turns, what is kept.

Everything here is a function of the tokens that come in, so it serves any engine and is tested
without a model. Both roles are written in one pass on one key-value cache: when the user's turn
ends, the tokens up to the assistant's turn are forced and sampling goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from forgetscale.config.generate import SamplingConfig
from forgetscale.generation.engines.base import TurnSampling
from forgetscale.generation.filters import DialogueFilter
from forgetscale.generation.layout import ChatLayout, TurnEnd
from forgetscale.generation.records import ACCEPTED, FAILED, REJECTED, Sample, Turn
from forgetscale.generation.seeds import sample_seed

_TAIL = 8
"""Tokens looked at beyond those of a stop text."""


@dataclass(frozen=True, slots=True)
class DialogueSettings:
    """What all dialogues of a run share.

    Attributes:
        layout: Of the chat template.
        filters: Judge finished dialogues.
        run_key: Hash of what is generated; seeds come from it.
        stop_ids: Tokens beside the template's that end a turn.
        max_tokens: Longest dialogue, > 0.
        num_top: Most probable tokens kept at supervised positions.
    """

    layout: ChatLayout
    filters: DialogueFilter
    run_key: str
    stop_ids: tuple[int, ...]
    max_tokens: int
    num_top: int = 0


class TurnWriter(ABC):
    """Tokens to turns: the part that is alike for all ways of writing a dialogue.

    Args:
        settings: What all dialogues share.
        sample_id: Its number.
        attempt: Try, first = 0.
        source_id: Id of what it is made from, or "".
    """

    def __init__(
        self, settings: DialogueSettings, sample_id: int, attempt: int, source_id: str = ""
    ) -> None:
        self.sample_id = sample_id
        self.attempt = attempt
        self.source_id = source_id
        self.ids: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.num_given = 0
        self._settings = settings
        self._log_probs: list[float | None] = []
        self._tops: dict[int, tuple[list[int], list[float]]] = {}
        self._turns: list[Turn] = []
        self._supervised: list[tuple[int, int]] = []
        self._seeds: list[int] = []
        self._reason = ""
        self._failure = ""
        self._is_cut = False
        self._kept = 0
        self._sampling = SamplingConfig()
        self._end = TurnEnd(None, "", (), "", "")
        self._role = ""
        self._space = ""
        self._start = 0

    @property
    def num_top(self) -> int:
        """Most probable tokens wanted with each token of this turn."""
        return self._settings.num_top if self._role == "assistant" else 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to write, because the context leaves no room."""
        return bool(self._reason)

    @property
    def sampling(self) -> TurnSampling:
        """How the next token is drawn."""
        config, end = self._sampling, self._end
        stops = () if end.stop_id is None else (end.stop_id,)
        return TurnSampling(
            config.temperature,
            config.top_p,
            config.top_k,
            self._seeds[-1],
            self._num_left(),
            (*stops, *(item for item in self._settings.stop_ids if item not in stops)),
            end.stop_text,
        )

    def push(
        self,
        token: int,
        log_prob: float,
        top_ids: Sequence[int] = (),
        top_log_probs: Sequence[float] = (),
    ) -> int | None:
        """Take the next token; see ``Dialogue``."""
        self._kept = len(self.ids)
        if self.num_top:
            self._tops[len(self.ids)] = (list(top_ids), list(top_log_probs))
        self.ids.append(token)
        self._log_probs.append(log_prob)
        layout = self._settings.layout
        if token == self._end.stop_id:
            return self._end_turn("stop", len(self.ids) - 1)
        if token in self._settings.stop_ids:
            if self._role != "user":
                return self._reject("other_end_of_turn")
            self._cut(len(self.ids) - 1)
            return self._end_turn("stop", len(self.ids), forces_stop=True)
        if token in layout.special_ids:
            return self._reject("special_token")
        if self._end.stop_text and self._holds_stop_text():
            return self._end_at_text()
        if self._num_left() == 0:
            return self._end_turn("length", len(self.ids))
        return self._kept

    def fail(self, reason: str) -> None:
        """End the dialogue because no token could be drawn."""
        self._failure = reason

    def sample(self) -> Sample:
        """Return the finished sample, judged."""
        state, reason = ACCEPTED, ""
        if self._failure:
            state, reason = FAILED, self._failure
        else:
            reason = self._reason or self._judge() or ""
            state = REJECTED if reason else ACCEPTED
        places = [place for start, end in self._supervised for place in range(start, end)]
        tops = [self._tops[place] for place in places if place in self._tops]
        return Sample(
            self.sample_id,
            self.attempt,
            state,
            reason,
            self.source_id,
            list(self.messages),
            list(self.ids),
            list(self._supervised),
            list(self._turns),
            list(self._log_probs),
            list(self._seeds),
            [number for ids, _ in tops for number in ids],
            [value for _, values in tops for value in values],
        )

    def _judge(self) -> str | None:
        """Return why the finished dialogue is rejected, or None."""
        for turn in self.messages[self.num_given :]:
            if self._settings.layout.forges_tokens(turn["content"]):
                return "role_header"
        reason = self._settings.filters.reason_to_reject(
            self.messages, is_cut=self._is_cut, given=self.num_given
        )
        if reason is not None:
            return reason
        if not self._settings.layout.is_written_alike(self.messages, self.ids):
            return "template_form"
        return None

    @abstractmethod
    def _after_turn(self, turn: Turn, content: str) -> int | None:
        """Go on after a turn, or return None: the dialogue is over."""

    def _begin(self, ids: Sequence[int]) -> None:
        """Set the context in which sampling begins."""
        self._kept = 0
        self.ids = list(ids)
        self._log_probs = [None] * len(self.ids)
        self._tops.clear()
        self._turns, self._supervised, self._seeds = [], [], []

    def _begin_turn(
        self, role: str, sampling: SamplingConfig, end: TurnEnd, space: str, *, label: str = ""
    ) -> int | None:
        """Begin a turn at the end of ``ids``; see ``push`` for what it returns.

        Args:
            role: Who writes it.
            sampling: How.
            end: How it ends.
            space: What it has to begin with.
            label: Role in the seed, where it differs.
        """
        self._role, self._sampling, self._end, self._space = role, sampling, end, space
        self._start = len(self.ids)
        self._seeds.append(
            sample_seed(
                self._settings.run_key,
                self.sample_id,
                len(self._turns),
                label or role,
                self.attempt,
            )
        )
        return self._kept if self._num_left() > 0 else self._reject("no_room")

    def _num_left(self) -> int:
        used = len(self.ids) - self._start
        left = self._settings.max_tokens - len(self.ids)
        return max(0, min(self._sampling.max_new_tokens - used, left))

    def _force(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self._log_probs.extend([None] * len(ids))

    def _cut(self, length: int) -> None:
        del self.ids[length:], self._log_probs[length:]
        for place in [place for place in self._tops if place >= length]:
            del self._tops[place]
        self._kept = min(self._kept, length)

    def _reject(self, reason: str) -> int | None:
        self._reason = self._reason or reason
        return None

    def _set_given(self, messages: Sequence[dict[str, str]]) -> None:
        """Take a conversation that was not written token by token: its template's tokens."""
        layout = self._settings.layout
        prompt = layout.prompt_ids(messages[:-1])
        ids = layout.encode(layout.render(messages))
        stop = layout.ends[-1].stop_id
        end = len(prompt)
        while end < len(ids) and ids[end] != stop:
            end += 1
        if ids[: len(prompt)] != prompt or end == len(ids):
            self._reject("template_form")
            return
        self._begin(ids[: end + 1])
        self.messages = list(messages)
        self._supervised = [(len(prompt), end + 1)]
        self._turns = [Turn("assistant", len(prompt), end + 1, "given")]

    def _text(self, end: int) -> str:
        """Return the text of this turn up to token ``end``.

        Some decoders change the first token of what they are given, so a few tokens before the
        turn are decoded with it.
        """
        layout = self._settings.layout
        first = max(0, self._start - 4)
        before = layout.decode(self.ids[first : self._start])
        whole = layout.decode(self.ids[first:end])
        return whole[len(before) :] if whole.startswith(before) else ""

    def _holds_stop_text(self) -> bool:
        size = len(self._settings.layout.encode(self._end.stop_text)) + _TAIL
        tail = self.ids[max(self._start, len(self.ids) - size) :]
        return self._end.stop_text in self._settings.layout.decode(tail)

    def _end_at_text(self) -> int | None:
        """End the turn where its stop text begins; the text itself is forced in its own tokens."""
        text = self._text(len(self.ids))
        place = text.find(self._end.stop_text)
        length = len(self.ids)
        while length > self._start and len(self._text(length)) > place:
            length -= 1
        if place < 0 or self._text(length) != text[:place]:
            return self._reject("merged_end_of_turn")
        self._cut(length)
        return self._end_turn("stop", length)

    def _end_turn(self, finish: str, content_end: int, *, forces_stop: bool = False) -> int | None:
        text = self._text(content_end)
        if not text.startswith(self._space):
            return self._reject("template_form")
        content = text[len(self._space) :]
        before = self._end.before if finish == "stop" else ""
        if not content.endswith(before):
            return self._reject("template_form")
        content = content[: len(content) - len(before)]
        if forces_stop and self._end.stop_id is not None:
            self._force([self._end.stop_id])
        turn = Turn(self._role, self._start, len(self.ids), finish)
        self._turns.append(turn)
        self.messages.append({"role": self._role, "content": content})
        if self._role == "assistant":
            self._supervised.append((turn.start, turn.end))
            self._is_cut = finish == "length"
        elif finish == "length":
            return self._reject("cut_user_turn")
        return self._after_turn(turn, content)


class SelfDialogue(TurnWriter):
    """The model writes the user's turns too, after nothing but the user's header.

    Args:
        settings: What all dialogues share; the layout has as many turns as wanted.
        sample_id: Its number.
        attempt: Try.
        user: Sampling of user turns.
        assistant: Sampling of assistant turns.
    """

    def __init__(
        self,
        settings: DialogueSettings,
        sample_id: int,
        attempt: int,
        *,
        user: SamplingConfig,
        assistant: SamplingConfig,
    ) -> None:
        super().__init__(settings, sample_id, attempt)
        self._user, self._assistant = user, assistant
        layout = settings.layout
        if layout.system is not None:
            self.messages.append({"role": "system", "content": layout.system})
            self.num_given = 1
        self._begin(layout.opening.ids)
        self._begin_turn("user", user, layout.ends[0], layout.opening.after)

    def _after_turn(self, turn: Turn, content: str) -> int | None:
        ends = self._settings.layout.ends
        number = len(self._turns)
        if number == len(ends) or self._is_cut:
            return None
        self._force(self._end.forced)
        role = "assistant" if number % 2 else "user"
        sampling = self._assistant if number % 2 else self._user
        return self._begin_turn(role, sampling, ends[number], self._end.after)


class OwnInstructionDialogue(SelfDialogue):
    """The model is asked for an instruction in one chat and answers it in another.

    Args:
        settings: As for ``SelfDialogue``.
        sample_id: Its number.
        attempt: Try.
        request: What the model is asked.
        source_id: The topic, or "".
        user: Sampling of the instruction, and of later user turns.
        assistant: Sampling of assistant turns.
    """

    def __init__(
        self,
        settings: DialogueSettings,
        sample_id: int,
        attempt: int,
        *,
        request: str,
        source_id: str,
        user: SamplingConfig,
        assistant: SamplingConfig,
    ) -> None:
        super().__init__(settings, sample_id, attempt, user=user, assistant=assistant)
        self.source_id = source_id
        self._asks = True
        asked = [{"role": "user", "content": request}]
        self._begin(settings.layout.prompt_ids(asked))
        end = settings.layout.ends[1]
        space = settings.layout.answer_space(asked)
        self._begin_turn("assistant", user, end, space, label="instruction")

    @property
    def num_top(self) -> int:
        """Most probable tokens wanted; none of the instruction."""
        return 0 if self._asks else super().num_top

    def _after_turn(self, turn: Turn, content: str) -> int | None:
        if not self._asks:
            return super()._after_turn(turn, content)
        self._asks = False
        seed = self._seeds[0]
        self.messages.pop()
        if self._is_cut:
            return self._reject("cut_user_turn")
        content = content.strip()
        if self._settings.layout.forges_tokens(content):
            return self._reject("role_header")
        if not content:
            return self._reject("empty_turn")
        self.messages.append({"role": "user", "content": content})
        layout = self._settings.layout
        self._begin(layout.prompt_ids(self.messages))
        self._seeds.append(seed)
        self._turns.append(Turn("user", 0, len(self.ids), "given"))
        space = layout.answer_space(self.messages)
        return self._begin_turn("assistant", self._assistant, layout.ends[1], space)


class AnswerDialogue(TurnWriter):
    """An answer to given messages.

    Args:
        settings: What all dialogues share.
        sample_id: Its number.
        attempt: Try.
        messages: The prompt; its last turn is the user's.
        source_id: Its id.
        assistant: Sampling.
    """

    def __init__(
        self,
        settings: DialogueSettings,
        sample_id: int,
        attempt: int,
        *,
        messages: Sequence[dict[str, str]],
        source_id: str,
        assistant: SamplingConfig,
    ) -> None:
        super().__init__(settings, sample_id, attempt, source_id)
        layout = settings.layout
        self.messages = list(messages)
        self.num_given = len(self.messages)
        self._begin(layout.prompt_ids(messages))
        space = layout.answer_space(messages)
        self._begin_turn("assistant", assistant, layout.ends[-1], space)

    def _after_turn(self, turn: Turn, content: str) -> int | None:
        return None
