"""New pieces for a tokenizer: learnt on target text by SentencePiece, added below the old merges.

Why merges and not added tokens. An added token is cut out of the text before anything else,
wherever its letters stand, so a piece of a target language in Latin letters would also cut English
words and change what the source model reads. New merges come after all old ones: a text is first
merged as before, and only what still stands side by side is merged further.

Method: pieces are learnt inside the units that the tokenizer's own pre-tokenizer makes, in its own
alphabet (bytes, for byte-level vocabularies), so that each can occur. In SentencePiece's order,
each piece is spelled with the tokenizer as it is so far and its parts are joined from the left;
what arises on the way (halves of characters at first) is a new entry too.

Source:
    New merges after the old ones: arXiv:2512.03989 (continued BPE training), which learns them by
    training on from the old merges; here SentencePiece learns the pieces alone.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from data_prep.fertility import is_byte_level
from forgetscale.errors import ConfigError, DataError

MAX_PIECE_CHARACTERS = 16
MAX_PIECE_BYTES = 48
_UNIT = re.compile(r"\u2581*[^\u2581]+|\u2581+")

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class NewToken:
    """An entry to be added."""

    piece: str
    constituents: tuple[int, ...]
    """Ids that the old tokenizer spells it with."""


@dataclass(frozen=True, slots=True)
class Extension:
    """What is added to a tokenizer; ids follow from ``first_id`` on."""

    first_id: int
    tokens: tuple[NewToken, ...]
    merges: tuple[Pair, ...]


def join_pairs(symbols: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Return the symbols after byte-pair merging: lowest rank first, left before right."""
    parts = list(symbols)
    while len(parts) > 1:
        pairs = zip(parts, parts[1:], strict=False)
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def pretoken_counts(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    """Return the units inside which the tokenizer merges, spelled in its alphabet, with counts.

    Args:
        tokenizer: A transformers tokenizer with a backend of ``tokenizers``.
        texts: Target text.
    """
    backend = tokenizer.backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is not None:
            counts.update(unit for unit, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        else:
            counts.update(_UNIT.findall(text))
    return counts


def learn_pieces(counts: Mapping[str, int], num_pieces: int, *, byte_level: bool) -> Iterator[str]:
    """Yield SentencePiece's pieces of two characters and more, best first.

    Single-threaded, so the same counts give the same pieces.

    Args:
        counts: Units and how often they occur.
        num_pieces: Pieces wanted; about as many are learnt.
        byte_level: Units are spelled in bytes.

    Raises:
        DataError: The text holds too little to learn from.
    """
    usable = sorted((unit, count) for unit, count in counts.items() if not set(unit) & set("\t\n"))
    if not usable:
        raise DataError("the target text is empty; check --input.")
    model = io.BytesIO()
    alphabet = len({character for unit, _ in usable for character in unit})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{unit}\t{count}" for unit, count in usable),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces + alphabet + 1,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            max_sentencepiece_length=MAX_PIECE_BYTES if byte_level else MAX_PIECE_CHARACTERS,
            shuffle_input_sentence=False,
            num_threads=1,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"SentencePiece cannot learn {num_pieces} pieces from the target text ({reason}); give"
            " more text or lower --num-pieces."
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for number in range(processor.get_piece_size()):
        piece = processor.id_to_piece(number)
        if len(piece) > 1 and not processor.is_unknown(number):
            yield piece


def read_bpe(tokenizer: Any) -> dict[str, Any]:
    """Return the description of a tokenizer, as ``tokenizer.json`` holds it.

    Raises:
        ConfigError: It is no byte-pair tokenizer of the ``tokenizers`` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = {} if backend is None else json.loads(backend.to_str())
    kind = description.get("model", {}).get("type")
    if kind != "BPE":
        raise ConfigError(
            f"extend-vocabulary: the tokenizer is of type {kind or type(tokenizer).__name__},"
            " expected BPE in tokenizer.json; other types have no merges to add to."
        )
    return dict(description)


def plan_extension(
    description: Mapping[str, Any], pieces: Iterable[str], num_pieces: int, *, byte_level: bool
) -> Extension:
    """Choose new entries and merges.

    Args:
        description: Content of ``tokenizer.json``.
        pieces: Wanted pieces, best first.
        num_pieces: Most new entries.
        byte_level: Pieces are spelled in bytes.
    """
    model = description["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    old_ranks: dict[Pair, int] = {pair: rank for rank, pair in enumerate(merges)}  # type: ignore[misc]
    ranks = dict(old_ranks)
    added = [entry["id"] for entry in description.get("added_tokens", ())]
    first_id = max([*vocabulary.values(), *added]) + 1
    known = set(vocabulary)
    tokens: list[NewToken] = []
    new_merges: list[Pair] = []
    for piece in pieces:
        letters = [] if byte_level else [c for c in dict.fromkeys(piece) if c not in known]
        parts = join_pairs(list(piece), ranks)
        joins: list[Pair] = []
        left = parts[0]
        for right in parts[1:]:
            joins.append((left, right))
            left += right
        fresh = letters + [a + b for a, b in joins if a + b not in known]
        if len(tokens) + len(fresh) > num_pieces:
            break
        for entry in fresh:
            spelled = join_pairs(list(entry), old_ranks)
            ids = [number for part in spelled for number in _old_ids(part, vocabulary)]
            tokens.append(NewToken(entry, tuple(ids)))
        known.update(fresh)
        for pair in joins:
            ranks[pair] = len(ranks)
            new_merges.append(pair)
    return Extension(first_id, tuple(tokens), tuple(new_merges))


def _old_ids(part: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Return the id of a part, or those of its bytes where the vocabulary lacks it."""
    if part in vocabulary:
        return [vocabulary[part]]
    pieces = [f"<0x{byte:02X}>" for byte in part.encode("utf-8")]
    missing = [piece for piece in pieces if piece not in vocabulary]
    if missing:
        raise ConfigError(
            f"extend-vocabulary: the tokenizer knows neither {part!r} nor its bytes, so the new"
            " entry has no constituents; use a tokenizer with bytes (byte-level or byte_fallback)."
        )
    return [vocabulary[piece] for piece in pieces]


def extended_description(description: Mapping[str, Any], extension: Extension) -> dict[str, Any]:
    """Return the content of the new ``tokenizer.json``."""
    model = dict(description["model"])
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["vocab"] = model["vocab"] | {
        token.piece: extension.first_id + place for place, token in enumerate(extension.tokens)
    }
    model["merges"] = list(model["merges"]) + [
        " ".join(pair) if as_text else list(pair) for pair in extension.merges
    ]
    return dict(description) | {"model": model}


def check_round_trip(old: Any, description: Mapping[str, Any], texts: Iterable[str]) -> None:
    """Check that the new tokenizer decodes text to what the old one decodes it to.

    Raises:
        ConfigError: A text comes back changed.
    """
    before = old.backend_tokenizer
    after = Tokenizer.from_str(json.dumps(description))
    for text in texts:
        found = [
            backend.decode(backend.encode(text, add_special_tokens=False).ids)
            for backend in (before, after)
        ]
        if found[0] != found[1]:
            raise ConfigError(
                f"extend-vocabulary: the extended tokenizer decodes {text[:40]!r} to"
                f" {found[1][:40]!r}, the old one to {found[0][:40]!r}; this tokenizer cannot be"
                " extended."
            )


def make_extension(
    tokenizer: Any, texts: Sequence[str], num_pieces: int
) -> tuple[Extension, dict[str, Any]]:
    """Learn and choose new entries; return them and the new ``tokenizer.json``.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Target text.
        num_pieces: Most new entries, >= 1.

    Raises:
        ConfigError: The tokenizer cannot be extended.
        DataError: The text is too small.
    """
    description = read_bpe(tokenizer)
    byte_level = is_byte_level(tokenizer)
    pieces = learn_pieces(pretoken_counts(tokenizer, texts), num_pieces, byte_level=byte_level)
    extension = plan_extension(description, pieces, num_pieces, byte_level=byte_level)
    if not extension.tokens:
        raise DataError(
            "the target text gives no piece that the tokenizer lacks; give more text, or train with"
            " the tokenizer as it is."
        )
    changed = extended_description(description, extension)
    check_round_trip(tokenizer, changed, texts)
    return extension, changed
