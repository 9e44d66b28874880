"""The default engine: continuous batching over a plain transformers model, one token a pass.

Every forward pass has the same number of rows. A slot whose dialogue ends is refilled at once. A
dialogue's first tokens go through the model alone, in one pass whose shape depends on nothing but
the dialogue; forced tokens between turns ride along with the other slots' new tokens. So a row's
numbers depend on its own tokens, and on how matrix products treat the rows beside it: in fp32 on
CPU from 4 rows on they do not (measured, a test repeats it), in bf16 and on GPUs nothing is
promised. Tokens are drawn with noise keyed by seed, position and token (see ``sampling.py``).

The cache holds ``num_slots x max_tokens`` tokens; where that does not fit, the slots are halved and
their dialogues go on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetscale.errors import ConfigError
from forgetscale.generation.engines.base import Dialogue
from forgetscale.generation.engines.slot_cache import SlotCache
from forgetscale.generation.sampling import RowSampling, draw_tokens

MIN_SLOTS = 4
_KEPT_PROMPTS = 4


@dataclass(slots=True)
class _Slot:
    """A dialogue and how many of its tokens the cache holds."""

    dialogue: Dialogue
    num_fed: int = 0


class SlotEngine:
    """Continuous batching over a causal language model of ``transformers``.

    Args:
        model: In evaluation mode, on its device; full attention in every layer.
        num_slots: Rows of every pass, >= 4.
        max_tokens: Longest dialogue, > 0.
        agree: Told how many passes over beginnings this engine has to make before its next step;
            returns how many it must make, the rest without effect. For a model whose passes other
            processes must take part in. None: as many as it has to.

    Raises:
        ConfigError: The model cannot be run this way.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        max_tokens: int,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        check_model(model.config, max_tokens)
        self._model = model
        self._agree = agree
        self._max_tokens = max_tokens
        self._num_layers = int(model.config.num_hidden_layers)
        self._waiting: deque[_Slot] = deque()
        self._prompts: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._set_slots(max(MIN_SLOTS, num_slots))

    def _set_slots(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: list[_Slot | None] = [None] * num_slots
        self._prompts.clear()
        self._cache = SlotCache(
            self._num_layers, num_slots, self._max_tokens, self._model.device, self._model.dtype
        )

    @property
    def num_busy(self) -> int:
        """Dialogues in progress."""
        return sum(slot is not None for slot in self._slots) + len(self._waiting)

    @property
    def num_free(self) -> int:
        """Dialogues that could be submitted now."""
        return max(0, self.num_slots - self.num_busy)

    def submit(self, dialogue: Dialogue) -> None:
        """Begin a dialogue in a free slot."""
        assert self.num_free, "submit() needs a free slot"
        self._waiting.append(_Slot(dialogue))

    def step(self) -> list[Dialogue]:
        """Feed one token to every slot; return the dialogues that ended.

        Raises:
            ConfigError: Memory does not suffice.
        """
        try:
            return self._step()
        except torch.OutOfMemoryError as error:
            if self._agree is not None:
                # The others wait in the middle of the pass: it cannot be tried again.
                raise self._too_large(error) from error
            self._halve(error)
            return []

    @torch.no_grad()
    def _step(self) -> list[Dialogue]:
        begun: list[tuple[int, _Slot]] = []
        for number, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                slot = self._slots[number] = self._waiting.popleft()
            if slot is not None and slot.num_fed == 0:
                begun.append((number, slot))
        if self._agree is not None:
            own = self._num_passes([slot for _, slot in begun])
            for _ in range(self._agree(own) - own):
                self._pass_without_effect()
        for number, slot in begun:
            self._prefill(number, slot)
        positions = [0 if slot is None else slot.num_fed for slot in self._slots]
        ids = [0 if slot is None else slot.dialogue.ids[slot.num_fed] for slot in self._slots]
        position_ids, mask = self._cache.begin_step(positions)
        logits = self._forward(torch.tensor(ids)[:, None], position_ids, mask)[:, 0]
        ready = []
        for number, slot in enumerate(self._slots):
            if slot is not None:
                slot.num_fed += 1
                if slot.num_fed == len(slot.dialogue.ids):
                    ready.append(number)
        return self._draw(logits, ready) if ready else []

    def _forward(self, ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids.to(self._model.device),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits

    def _num_passes(self, begun: list[_Slot]) -> int:
        """Return how many forward passes the beginnings of these dialogues take."""
        known, count = list(self._prompts), 0
        for slot in begun:
            prompt = tuple(slot.dialogue.ids[:-1])
            if not prompt:
                continue
            if prompt in known:
                known.remove(prompt)
            else:
                count += 1
            known = [*known, prompt][-_KEPT_PROMPTS:]
        return count

    def _pass_without_effect(self) -> None:
        self._model(
            input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self._model.device),
            use_cache=False,
            logits_to_keep=1,
        )

    def _prefill(self, number: int, slot: _Slot) -> None:
        """Put all tokens of a dialogue but the last one into the cache."""
        prompt = tuple(slot.dialogue.ids[:-1])
        if not prompt:
            return
        known = self._prompts.get(prompt)
        if known is None:
            position_ids, mask = self._cache.begin_prefill(number, len(prompt))
            self._forward(torch.tensor([prompt]), position_ids, mask)
            self._prompts[prompt] = self._cache.copy_out(number, len(prompt))
            while len(self._prompts) > _KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        else:
            self._prompts.move_to_end(prompt)
            self._cache.copy_in(number, known)
        slot.num_fed = len(prompt)

    def _draw(self, logits: Tensor, ready: list[int]) -> list[Dialogue]:
        """Draw the next token of the slots that are ready; all rows take part, for one shape."""
        dialogues = {number: self._at(number).dialogue for number in ready}
        finite = torch.isfinite(logits).all(1)
        how = self._sampling(dialogues, logits.device)
        tokens, log_probs = draw_tokens(torch.where(finite[:, None], logits, 0.0), how)
        values = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        num_top = min(max(item.num_top for item in dialogues.values()), log_probs.shape[1])
        top = log_probs.topk(num_top, dim=1)
        top_ids, top_values = top.indices.tolist(), top.values.tolist()
        drawn, is_finite = tokens.tolist(), finite.tolist()
        ended = []
        for number, dialogue in dialogues.items():
            kept: int | None = None
            if is_finite[number]:
                count = dialogue.num_top
                kept = dialogue.push(
                    drawn[number],
                    values[number],
                    top_ids[number][:count],
                    top_values[number][:count],
                )
            else:
                dialogue.fail("not_finite")
            if kept is None:
                self._slots[number] = None
                ended.append(dialogue)
            else:
                slot = self._at(number)
                slot.num_fed = min(slot.num_fed, kept)
        return ended

    def _sampling(self, dialogues: dict[int, Dialogue], device: torch.device) -> RowSampling:
        """Return how every row is drawn; rows that are not ready take their best token."""
        rows: list[tuple[int, int, float, float, int]] = [(0, 0, 0.0, 1.0, 0)] * self.num_slots
        for number, item in dialogues.items():
            turn = item.sampling
            rows[number] = (turn.seed, len(item.ids), turn.temperature, turn.top_p, turn.top_k)
        seeds, positions, temperature, top_p, top_k = zip(*rows, strict=True)
        return RowSampling(
            torch.tensor(seeds, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(temperature, dtype=torch.float64, device=device),
            torch.tensor(top_p, dtype=torch.float64, device=device),
            torch.tensor(top_k, device=device),
        )

    def _at(self, number: int) -> _Slot:
        slot = self._slots[number]
        assert slot is not None
        return slot

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Go on with half as many slots; what was written so far is fed again."""
        if self.num_slots // 2 < MIN_SLOTS:
            raise self._too_large(error) from error
        running = [slot.dialogue for slot in self._slots if slot is not None]
        waiting = [slot.dialogue for slot in self._waiting]
        self._waiting = deque(_Slot(dialogue) for dialogue in [*running, *waiting])
        self._set_slots(self.num_slots // 2)
        torch.cuda.empty_cache()

    def _too_large(self, error: torch.OutOfMemoryError) -> ConfigError:
        return ConfigError(
            f"the model runs out of memory with {self.num_slots} dialogues of up to"
            f" {self._max_tokens} tokens at a time ({str(error)[:80]}); lower generate.max_tokens"
            " or generate.engine.num_slots, or use another generate.engine."
        )


def check_model(config: Any, max_tokens: int) -> None:
    """Refuse models whose attention this engine does not reproduce.

    Args:
        config: The model's configuration.
        max_tokens: Longest dialogue.

    Raises:
        ConfigError: A layer has no full attention over so many tokens, or positions end before.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_tokens > limit:
        raise ConfigError(
            f"generate.max_tokens is {max_tokens}, but the model has {limit} positions; lower it."
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"the model has layers of the kinds {', '.join(sorted(kinds))}; the transformers engine"
            " runs full attention only, use generate.engine.kind vllm."
        )
    is_sliding = "sliding_attention" in kinds or (
        window is not None and getattr(config, "use_sliding_window", True)
    )
    if is_sliding and window is not None and max_tokens > window:
        raise ConfigError(
            f"the model attends to {window} tokens back, generate.max_tokens is {max_tokens}; lower"
            " it, or use generate.engine.kind vllm."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings", limit)
        if original is not None and max_tokens > original:
            raise ConfigError(
                f"the model's rotary positions change beyond {original} tokens with the longest row"
                f" of a batch; lower generate.max_tokens ({max_tokens}) to that."
            )
