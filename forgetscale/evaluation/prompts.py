"""From chat turns to token ids, as the tokenizer's own chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgetscale.errors import DataError
from forgetscale.evaluation.tasks import Question


class ChatPrompts:
    """Renders questions and gold answers with the model's chat template.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.

    Raises:
        DataError: There is no chat template, or it closes the assistant's turn with no special
            token, so that nobody could tell where an answer ends.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, so chat tasks"
                " cannot be asked; evaluate perplexity tasks only, or add a template."
            )
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.end_of_turn = self.answer_ids([{"role": "user", "content": "a"}], "a")[-1]

    @property
    def pad_id(self) -> int:
        """Id for padding; the mask hides it, so any id serves where none is set."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.end_of_turn

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids up to where the assistant's answer starts."""
        return self._encode(messages, add_generation_prompt=True)

    def answer_ids(self, messages: Sequence[Mapping[str, str]], answer: str) -> list[int]:
        """Return the ids of ``answer`` and of the token that ends the turn.

        The whole conversation is rendered and tokenized at once, as in training, so that tokens
        are cut where the model saw them cut.

        Raises:
            DataError: The template changes the prompt when an answer follows, or does not end
                the turn with a special token.
        """
        prompt = self.prompt_ids(messages)
        whole = self._encode(
            [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )
        if whole[: len(prompt)] != prompt:
            raise DataError(
                "the chat template renders the prompt differently once an answer follows"
                f" (question {messages[-1]['content']!r}, answer {answer!r}); answers cannot be"
                " scored with this template."
            )
        answer_part = whole[len(prompt) :]
        for position, token_id in enumerate(answer_part):
            if token_id in self._special and position > 0:
                return answer_part[: position + 1]
        raise DataError(
            "the chat template ends the assistant's turn with no special token (answer"
            f" {answer!r}); add an end-of-turn token to the template."
        )

    def question_ids(self, question: Question) -> list[int]:
        """Return the ids in front of the answer: the chat's, or those of a raw prompt."""
        if question.raw_prompt is None:
            return self.prompt_ids(question.messages)
        return list(self.tokenizer(question.raw_prompt, add_special_tokens=False)["input_ids"])

    def gold_ids(self, question: Question, answer: str) -> list[int]:
        """Return the ids of ``answer`` and of the token that ends it, as training would show them.

        After a raw prompt the answer runs to the end of the document.

        Raises:
            DataError: The tokenizer cuts the prompt differently once the answer follows.
        """
        if question.raw_prompt is None:
            return self.answer_ids(question.messages, answer)
        prompt = self.question_ids(question)
        text = question.raw_prompt + answer
        whole = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if whole[: len(prompt)] != prompt or self.tokenizer.eos_token_id is None:
            raise DataError(
                f"question {question.id}: the tokenizer cuts meta.raw_prompt differently once the"
                " answer follows, or has no end-of-document token; end the prompt at a word border."
            )
        return [*whole[len(prompt) :], int(self.tokenizer.eos_token_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stop_ids(self, generation_config: Any = None) -> list[int]:
        """Return the ids that end an answer: the template's, the tokenizer's and the model's."""
        found = {self.end_of_turn}
        for source in (self.tokenizer, generation_config):
            value = getattr(source, "eos_token_id", None)
            if value is not None:
                found.update([value] if isinstance(value, int) else value)
        return sorted(found)

    def _encode(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
