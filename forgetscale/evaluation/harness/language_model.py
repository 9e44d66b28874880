"""A model of lm-evaluation-harness whose requests are shared by all processes of all nodes.

The harness can split documents itself, by ``LM.rank`` and ``LM.world_size``. That way hangs when
there are fewer documents than ranks, counts wrongly where the rank is the local one, and equal
numbers of requests are not equal numbers of forward calls, which a ZeRO-3 model needs. Its other
way is used here ("model methods receive all requests and can handle distribution internally"):
every rank builds all requests, and the calls of all ranks are agreed before the first one is made.
To the harness this is one process; the global rank is in ``collective``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import DataError, ForgetScaleError
from forgetscale.evaluation.asked import Asked, Log, NothingKept, answer_each_once
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.forced import pad_right
from forgetscale.evaluation.harness.backends import Backend, Generation, decoding_of
from forgetscale.evaluation.plan import PlannedBatch

DEFAULT_MAX_GEN_TOKS = 256


@dataclass(frozen=True, slots=True)
class _Text:
    """Token ids of one forward call and how many at the end are scored."""

    ids: list[int]
    num_scored: int


class GlobalRankLM(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests on any number of processes, each exactly once.

    Args:
        backend: The model.
        tokenizer: Its tokenizer.
        collective: The processes that evaluate together.
        batch_size: Requests in a forward call, >= 1.
        max_length: Tokens the model can look at.
        stop_ids: Tokens that end an answer.
        seed: Seed of sampling.
        log: What was answered before.
        on_call: Called on every rank after each batch, equally often; may raise on all.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        collective: Collective,
        *,
        batch_size: int,
        max_length: int,
        stop_ids: Sequence[int],
        seed: int,
        log: Log | None = None,
        on_call: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.collective = collective
        self._backend = backend
        self._batch_size = batch_size
        self._max_length = max_length
        self._stop_ids = tuple(stop_ids)
        self._seed = seed
        self._log = NothingKept() if log is None else log
        self._on_call = on_call

    # ---- what the harness asks about the tokenizer ---------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, without a second beginning-of-text token."""
        options: dict[str, Any] = {}
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, by the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # ---- requests ------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation, in order, on all ranks.

        Collective: every rank must call it with the same requests.
        """
        asked = name_requests(requests)
        texts = {}
        for item, request in zip(asked, requests, strict=True):
            context, continuation = request.args
            before, after = self._pair(context, continuation, item.key)
            texts[item.key] = _Text(self._fit(before + after), len(after))
        scored = self._score(asked, texts)
        return [(float(scored[item.key][0]), bool(scored[item.key][1])) for item in asked]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in order, on all ranks.

        Collective: every rank must call it with the same requests.
        """
        parts: list[Asked] = []
        texts: dict[str, _Text] = {}
        windows: list[list[str]] = []
        for item, request in zip(name_requests(requests), requests, strict=True):
            ids = self.tok_encode(request.args[0])
            cut = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    token_list=ids,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._max_length,
                    context_len=1,
                )
            ]
            keys = [f"{item.key}/window-{number}" for number in range(len(cut))]
            for key, (before, after) in zip(keys, cut, strict=True):
                texts[key] = _Text(self._fit(before + after), len(after))
                parts.append(replace(item, key=key))
            windows.append(keys)
        scored = self._score(parts, texts)
        return [float(sum(scored[key][0] for key in keys)) for keys in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each prompt, in order, on all ranks.

        Collective: every rank must call it with the same requests.
        """
        asked = name_requests(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(canonical_json(request.args[1]).decode(), []).append(place)
        answers: dict[str, str] = {}
        for places in groups.values():
            answers |= self._generate(
                [asked[place] for place in places],
                [requests[place].args[0] for place in places],
                requests[places[0]],
            )
        return [answers[item.key] for item in asked]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Refuse: requests without the names of their documents cannot be counted."""
        raise ForgetScaleError("_loglikelihood_tokens is not used; call loglikelihood.")

    # ---- how they are answered -----------------------------------------------------------

    def _fit(self, ids: list[int]) -> list[int]:
        """Cut a text on the left, as the harness's own model does; the last token is a target."""
        return ids[-(self._max_length + 1) :]

    def _pair(self, context: str, continuation: str, key: str) -> tuple[list[int], list[int]]:
        if context == "":
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
            if after and after[0] == self.prefix_token_id:
                before, after = after[:1], after[1:]
        else:
            before, after = self._encode_pair(context, continuation)
        if not 0 < len(after) <= self._max_length:
            raise DataError(
                f"request {key}: the text to be scored has {len(after)} tokens, expected 1 to"
                f" {self._max_length}; correct the row of the task."
            )
        return before, after

    def _score(
        self, asked: Sequence[Asked], texts: Mapping[str, _Text]
    ) -> dict[str, tuple[float, bool]]:
        def answer(batch: PlannedBatch) -> list[tuple[float, bool]]:
            rows = [texts[asked[item].key] for item in batch.items]
            # The last token is predicted, never looked at, so it does not count as a position.
            nll, best = self._backend.score(*pad_right([row.ids for row in rows], self._pad_id))
            found = []
            for index, row in enumerate(rows):
                here = slice(len(row.ids) - 1 - row.num_scored, len(row.ids) - 1)
                nats = float(nll[index, here].double().sum())
                found.append((-nats, bool(best[index, here].all())))
            return found

        return self._share(asked, [len(texts[item.key].ids) for item in asked], answer)

    def _generate(
        self, asked: Sequence[Asked], contexts: Sequence[str], first: Instance
    ) -> dict[str, str]:
        kwargs = normalize_gen_kwargs(first.args[1], DEFAULT_MAX_GEN_TOKS)
        until = [str(end) for end in kwargs.pop("until")]
        max_new_tokens = int(kwargs.pop("max_gen_toks"))
        decoding = decoding_of(dict(kwargs), str(first.task_name))
        room = self._max_length - max_new_tokens
        if room < 1:
            raise DataError(
                f"task {first.task_name!r} asks for answers of {max_new_tokens} tokens, but the"
                f" model can look at {self._max_length}; lower max_gen_toks."
            )
        eos = self.tokenizer.decode([self.eot_token_id])
        ends = (*until, eos) if eos not in until else tuple(until)
        rows = [self.tok_encode(context)[-room:] for context in contexts]
        settings = Generation(
            decoding=decoding,
            max_new_tokens=max_new_tokens,
            until=ends,
            stop_ids=self._stop_ids,
            pad_id=self._pad_id,
            seed=self._seed,
            number=0,
        )

        def answer(batch: PlannedBatch) -> list[str]:
            made = self._backend.decode(
                [rows[item] for item in batch.items],
                replace(settings, number=batch.number),
                dummy=batch.dummy,
            )
            return [self._text(ids, ends) for ids in made]

        return self._share(asked, [len(row) for row in rows], answer)

    def _text(self, ids: Sequence[int], ends: Sequence[str]) -> str:
        """Return the answer up to the first text that ends it.

        What ends it may be a special token, which the text of the answer no longer shows; rows of a
        batch run on until all have ended, so what follows must be cut off as tokens.
        """
        low, high = 0, len(ids)
        if any(end and end in self.tokenizer.decode(list(ids)) for end in ends):
            while low < high:
                middle = (low + high) // 2
                text = self.tokenizer.decode(list(ids[:middle]))
                if any(end and end in text for end in ends):
                    high = middle
                else:
                    low = middle + 1
        answer = str(self.tokenizer.decode(list(ids[:high]), skip_special_tokens=True))
        return str(postprocess_generated_text(answer, list(ends), None))

    def _share(
        self,
        asked: Sequence[Asked],
        lengths: Sequence[int],
        answer: Callable[[PlannedBatch], Sequence[Any]],
    ) -> dict[str, Any]:
        return answer_each_once(
            asked,
            lengths,
            answer,
            collective=self.collective,
            batch_size=self._batch_size,
            log=self._log,
            on_call=self._on_call,
        )

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eot_token_id if pad is None else int(pad)


def name_requests(requests: Sequence[Instance]) -> list[Asked]:
    """Name each request ``task/document/choice/repeat``, so that it can be counted.

    Args:
        requests: From the harness; a request that is repeated stands several times.

    Raises:
        ForgetScaleError: A request carries no document.
    """
    seen: Counter[str] = Counter()
    named = []
    for request in requests:
        if request.task_name is None or request.doc_id is None:
            raise ForgetScaleError(
                f"a request of kind {request.request_type} carries no document id; this version of"
                " lm-evaluation-harness differs from the tested one (0.4.13)."
            )
        key = f"{request.task_name}/{request.doc_id}/{request.idx}"
        digest = hash_bytes(canonical_json([request.request_type, list(request.args)]))
        named.append(Asked(f"{key}/{seen[key]}", digest))
        seen[key] += 1
    return named
