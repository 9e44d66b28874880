"""The tokenizer: a SentencePiece byte-pair model with byte fall-back, saved for ``AutoTokenizer``.

It is trained on mostly source text, as the vocabularies of English-centred models are, so that a
target word is cut into more pieces than a source word. No space is added in front of a text, so
that decoding gives back exactly what was encoded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, END, PAD, UNK = "<s>", "<|end|>", "<pad>", "<unk>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNK, BOS, END, USER, ASSISTANT)
"""Special tokens, in the order of their ids from 0."""
PUNCTUATION = (".", ",", "?", ":", "\n")
_SPACE = "▁"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant']"
    " or (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('chat turns must alternate user, assistant, user, ...') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""``<s><|user|> question<|end|><|assistant|> answer<|end|>``"""


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-pair model on ``texts``; single-threaded, so the same texts give the same bytes.

    Args:
        texts: Training sentences.
        vocab_size: Number of pieces in all.

    Returns:
        The serialised SentencePiece model.

    Raises:
        ValueError: The texts do not hold enough different pieces for ``vocab_size``.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            shuffle_input_sentence=False,
            num_threads=1,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=END,
            control_symbols=[USER, ASSISTANT],
            user_defined_symbols=list(PUNCTUATION),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make {vocab_size} pieces ({error}); change WorldSize.vocab_size"
        ) from error
    return model.getvalue()


def _merges(
    processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a learnt piece, best piece first."""
    merges = []
    for piece, number in vocabulary.items():
        if processor.IsByte(number) or processor.IsControl(number) or processor.IsUnknown(number):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        rank = -processor.GetScore(number)
        merges += [(rank, vocabulary[a], vocabulary[b], a, b) for a, b in known]
    return [(a, b) for *_, a, b in sorted(merges)]


def to_fast_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """Return the Hugging Face tokenizer that cuts text as the SentencePiece ``model`` does."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    pieces = [processor.IdToPiece(number) for number in range(processor.GetPieceSize())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, _merges(processor, vocabulary), unk_token=UNK, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    marks = Regex("[" + "".join(PUNCTUATION) + "]")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(marks, "isolated"),
            pre_tokenizers.Split(_SPACE, "merged_with_next"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(model: bytes, directory: Path) -> None:
    """Write ``tokenizer.json``, its settings, and ``tokenizer.model`` (SentencePiece) beside."""
    directory.mkdir(parents=True, exist_ok=True)
    to_fast_tokenizer(model).save_pretrained(str(directory))
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(model)
