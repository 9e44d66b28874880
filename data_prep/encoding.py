"""Loading of tokenizers: Hugging Face folders and raw SentencePiece models.

What workers get is a ``TokenizerSpec``: where the Rust tokenizer alone gives what the Python class
gives, they load that and start without importing transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetscale.errors import ConfigError, DataError

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """How a worker gets its tokenizer.

    Attributes:
        path: Folder that ``AutoTokenizer`` loads, or a SentencePiece model file.
        backend: Rust tokenizer as JSON, where it is all that is needed.
    """

    path: Path
    backend: str | None = None


class SentencePieceTokenizer:
    """A raw SentencePiece model with the few methods of a tokenizer that are needed here.

    Control symbols such as ``</s>`` spelled out in text are text; user-defined symbols are found in
    any text, as their model asks for. There is no chat template.

    Args:
        path: File such as ``tokenizer.model`` or ``spiece.model``.

    Raises:
        DataError: The file is no SentencePiece model.
    """

    chat_template: str | None = None

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{path} is no SentencePiece model ({reason}); give the file tokenizer.model of"
                " the model, or a folder that AutoTokenizer.from_pretrained loads."
            ) from error

    def __len__(self) -> int:
        """Return the number of pieces."""
        return int(self._model.get_piece_size())

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence piece, if the model has one."""
        return self._piece(self._model.eos_id())

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding piece, if the model has one."""
        return self._piece(self._model.pad_id())

    def _piece(self, number: int) -> int | None:
        return None if number < 0 else int(number)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, no special piece added."""
        found: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        text: str = self._model.decode([int(token) for token in ids])
        return text


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer from the disk, without network and without code from the folder.

    Args:
        path: Folder that ``AutoTokenizer`` loads, or a SentencePiece ``.model`` file.

    Raises:
        DataError: It does not load.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    from transformers import AutoTokenizer
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    description = path / "tokenizer.json"
    try:
        if description.is_file():
            json.loads(description.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the tokenizer in {path} does not load ({reason}); give a folder that"
            " AutoTokenizer.from_pretrained loads, or a SentencePiece .model file."
        ) from error
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


def end_token_id(tokenizer: Any, policy: str | None, path: Path) -> int | None:
    """Return the id that ends a document under ``policy`` (``eos`` or ``none``).

    Raises:
        ConfigError: The policy is ``eos`` and the tokenizer has no such token.
    """
    if policy == "none":
        return None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {path} has no end-of-sequence token; set eos_token in its"
            " tokenizer_config.json or pass --document-end none."
        )
    return int(tokenizer.eos_token_id)


def padding_token_id(tokenizer: Any) -> int:
    """Return the id for padding: the pad token, else the end-of-sequence token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def vocabulary_size(tokenizer: Any) -> int:
    """Return a number that every id is below."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return len(tokenizer)
    return int(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))


def template_hash(tokenizer: Any) -> str:
    """Return a hash of the chat template, which decides how chats are rendered."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()


def plain_backend(tokenizer: Any) -> Any | None:
    """Return the Rust tokenizer if calling it directly gives what the Python class gives.

    It does where the class changes nothing on the way (truncation and padding switched off): the
    same ids without offsets, 1.3 times as fast. None for slow tokenizers and for classes with
    their own encoding.
    """
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain):
        return None
    if kind.__call__ is not plain.__call__ or kind._encode_plus is not plain._encode_plus:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def spec_of(tokenizer: Any, path: Path, *, chat: bool) -> TokenizerSpec:
    """Return what workers need to encode like ``tokenizer``."""
    if chat or isinstance(tokenizer, SentencePieceTokenizer):
        return TokenizerSpec(path)
    backend = plain_backend(tokenizer)
    return TokenizerSpec(path, None if backend is None else backend.to_str())


class Encoder:
    """Texts to ids, by the fastest way that gives the ids of the tokenizer.

    Args:
        spec: Which tokenizer.

    Attributes:
        tokenizer: The whole tokenizer, or None where the Rust one is enough.
        backend: The Rust tokenizer, or None.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.tokenizer: Any = None
        self.backend: Any = None
        if spec.backend is not None:
            from tokenizers import Tokenizer

            self.backend = Tokenizer.from_str(spec.backend)
            return
        self.tokenizer = load_tokenizer(spec.path)
        if not isinstance(self.tokenizer, SentencePieceTokenizer):
            self.backend = plain_backend(self.tokenizer)

    def __call__(self, texts: Sequence[str], *, special_as_text: bool) -> list[list[int]]:
        """Return ids of each text, no special token added.

        A special token spelled out in plain text is encoded as ordinary text, so that raw text
        cannot forge document ends or chat turns; in rendered chats it is the token.
        """
        if not texts:
            return []
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            return self.tokenizer.encode_texts(texts)
        if self.backend is not None:
            self.backend.encode_special_tokens = special_as_text
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        encoded: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=special_as_text,
        )["input_ids"]
        return encoded

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return a chat rendered by the template, all turns, no generation prompt."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=False
        )
        return text
