"""Two published ways to make training data with the model itself, for comparison.

``RewriteDialogue``: SDFT, the model says a given answer in its own words. ``InContextDialogue``:
SSR, the model writes another instance of a task from demonstrations in plain text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from forgetscale.config.generate import SdftDialogueConfig, SsrDialogueConfig
from forgetscale.generation.dialogues import DialogueSettings, TurnWriter
from forgetscale.generation.layout import TurnEnd
from forgetscale.generation.records import ACCEPTED, REJECTED, Sample, Turn
from forgetscale.generation.seeds import sample_seed

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
INPUT, OUTPUT = "Input:", "Output:"


def last_number(text: str) -> str | None:
    """Return the last number of ``text`` without commas between digits, or None."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


class RewriteDialogue(TurnWriter):
    """An answer in the model's own words; the given one where that fails.

    Args:
        settings: What all dialogues share.
        sample_id: Its number.
        attempt: Try.
        messages: A conversation that ends with the given answer.
        source_id: Its id.
        config: The request and the checks.

    Source:
        arXiv:2402.13669 and its code; the wording of the request is ours.
    """

    def __init__(
        self,
        settings: DialogueSettings,
        sample_id: int,
        attempt: int,
        *,
        messages: Sequence[dict[str, str]],
        source_id: str,
        config: SdftDialogueConfig,
    ) -> None:
        super().__init__(settings, sample_id, attempt, source_id)
        self._given, self._config = list(messages), config
        instruction, answer = messages[-2]["content"], messages[-1]["content"]
        request = config.request.replace("{instruction}", instruction).replace("{answer}", answer)
        asked = [{"role": "user", "content": request}]
        layout = settings.layout
        self._begin(layout.prompt_ids(asked))
        space = layout.answer_space(asked)
        self._begin_turn("assistant", config.assistant, layout.ends[-1], space, label="rewrite")

    def sample(self) -> Sample:
        """Return the finished sample; with the given answer it is accepted, and says so."""
        found = super().sample()
        if found.state == REJECTED and self.messages == self._given:
            found.state = ACCEPTED
        return found

    def _judge(self) -> str | None:
        return None

    def _reject(self, reason: str) -> int | None:
        """Take the given answer instead: every row of the task stays."""
        if not self._reason:
            self._reason = f"given_answer_{reason}"
            self._set_given(self._given)
        return None

    def _after_turn(self, turn: Turn, content: str) -> int | None:
        if (reason := self._objection(content, turn)) is not None:
            return self._reject(reason)
        written = self.ids[turn.start : turn.end]
        values = self._log_probs[turn.start : turn.end]
        layout = self._settings.layout
        prompt = layout.prompt_ids(self._given[:-1])
        seeds = list(self._seeds)
        self._begin(prompt)
        self._seeds = seeds
        self.ids += written
        self._log_probs += values
        self.messages = [*self._given[:-1], {"role": "assistant", "content": content}]
        self._supervised = [(len(prompt), len(self.ids))]
        self._turns = [Turn("assistant", len(prompt), len(self.ids), turn.finish_reason)]
        if not layout.is_written_alike(self.messages, self.ids):
            return self._reject("template_form")
        return None

    def _objection(self, content: str, turn: Turn) -> str | None:
        lower = content.casefold()
        if turn.finish_reason != "stop":
            return "cut"
        if not content.strip():
            return "empty"
        if any(phrase.casefold() in lower for phrase in self._config.phrases):
            return "phrase"
        if self._settings.layout.forges_tokens(content):
            return "role_header"
        if self._config.check == "last_number":
            if last_number(content) != last_number(self._given[-1]["content"]):
                return "last_number"
        return None


class InContextDialogue(TurnWriter):
    """A new instance of a task after demonstrations, in plain text without a chat template.

    Args:
        settings: What all dialogues share.
        sample_id: Its number.
        attempt: Try.
        demonstrations: Instruction and answer of each.
        config: Definition, limits, sampling.

    Source:
        arXiv:2403.01244 and its code; repetition penalty left out.
    """

    def __init__(
        self,
        settings: DialogueSettings,
        sample_id: int,
        attempt: int,
        *,
        demonstrations: Sequence[tuple[str, str]],
        config: SsrDialogueConfig,
    ) -> None:
        super().__init__(settings, sample_id, attempt)
        self._config = config
        parts = [config.definition] if config.definition else []
        parts += [f"{INPUT} {asked}\n{OUTPUT} {answer}" for asked, answer in demonstrations]
        layout = settings.layout
        begin = layout.tokenizer.bos_token_id
        text = "\n\n".join([*parts, INPUT])
        self._begin([*([] if begin is None else [begin]), *layout.encode(text)])
        end = TurnEnd(None, INPUT, (), "", "")
        self._begin_turn("assistant", config.assistant, end, "", label="instance")

    @property
    def num_top(self) -> int:
        """Most probable tokens wanted: none, the context is not that of training."""
        return 0

    def push(
        self,
        token: int,
        log_prob: float,
        top_ids: Sequence[int] = (),
        top_log_probs: Sequence[float] = (),
    ) -> int | None:
        """Take the next token; the end of the document ends the instance."""
        if token in self._settings.stop_ids:
            self._kept = len(self.ids)
            return self._end_turn("stop", len(self.ids))
        return super().push(token, log_prob)

    def _after_turn(self, turn: Turn, content: str) -> int | None:
        parts = content.split(OUTPUT)
        self.messages = []
        if len(parts) != 2:
            return self._reject("not_one_output")
        asked, answer = (part.strip() for part in parts)
        if not asked or not answer or turn.finish_reason != "stop":
            return self._reject("empty_turn" if turn.finish_reason == "stop" else "cut_answer")
        layout = self._settings.layout
        if len(layout.encode(asked)) > self._config.max_input_tokens:
            return self._reject("long_input")
        if len(layout.encode(answer)) > self._config.max_output_tokens:
            return self._reject("long_output")
        seeds = list(self._seeds)
        self._set_given(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        )
        self._seeds = seeds
        return None


def ordered_choice(
    key: str, sample_id: int, number: int, demonstrations: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the ``sample_id``-th of all ordered choices of demonstrations, in a seeded order.

    Args:
        key: Hash of what is generated.
        sample_id: Wraps around after all choices.
        number: Demonstrations of a choice, at most ``len(demonstrations)``.
        demonstrations: All.
    """
    count = len(demonstrations)
    if count**number > 1_000_000:
        seed = sample_seed(key, sample_id, 0, "demonstrations", 0)
        left = list(range(count))
        return [demonstrations[left.pop((seed >> (9 * n)) % len(left))] for n in range(number)]
    choices = list(itertools.permutations(range(count), number))
    order = sorted(
        range(len(choices)), key=lambda place: sample_seed(key, place, 0, "demonstrations", 0)
    )
    return [demonstrations[place] for place in choices[order[sample_id % len(choices)]]]
