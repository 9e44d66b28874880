"""Identity of a tokenizer, so that tokens made with one are never read with another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from forgetscale.data.token_set import TokenSet
from forgetscale.errors import DataError

_ROWS_AT_ONCE = 1024
_DEFINING_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """Return the files that define the tokenizer in ``directory``, or that it is.

    A file is taken as it is: a raw SentencePiece model.

    The first of these that is there complete: ``tokenizer.json``, ``tokenizer.model``,
    ``spiece.model``, ``sentencepiece.bpe.model``, ``vocab.json`` with ``merges.txt``,
    ``vocab.txt``. Chat template and other settings do not count.

    Raises:
        DataError: The folder is missing or holds none of them.
    """
    directory = Path(directory)
    if directory.is_file():
        return (directory,)
    if not directory.is_dir():
        raise DataError(
            f"tokenizer folder {directory} does not exist; give a folder with tokenizer.json,"
            " such as a model folder from Hugging Face."
        )
    for names in _DEFINING_FILES:
        paths = tuple(directory / name for name in names)
        if all(path.is_file() for path in paths):
            return paths
    raise DataError(
        f"{directory} holds no tokenizer: expected tokenizer.json, tokenizer.model or"
        " spiece.model; give the folder that AutoTokenizer loads."
    )


def tokenizer_hash(directory: Path) -> str:
    """Return the SHA-256 over the bytes of the tokenizer-defining files, in hexadecimal.

    For ``tokenizer.json`` it equals what ``sha256sum`` prints.

    Raises:
        DataError: There is no tokenizer in ``directory``.
    """
    digest = hashlib.sha256()
    for path in tokenizer_files(directory):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def require_same_tokenizer(token_set: TokenSet, tokenizer_dir: Path) -> None:
    """Refuse a token set that was made with another tokenizer than ``tokenizer_dir``.

    Raises:
        DataError: The hashes differ, or there is no tokenizer in the folder.
    """
    found = tokenizer_hash(tokenizer_dir)
    if found != token_set.tokenizer_sha256:
        raise DataError(
            f"{token_set.path} was made with another tokenizer (SHA-256"
            f" {token_set.tokenizer_sha256[:12]}...) than {tokenizer_dir} ({found[:12]}...); build"
            " the token set again with the tokenizer of the model."
        )


def require_vocabulary(token_set: TokenSet, num_embeddings: int, model: Path) -> None:
    """Refuse a token set with ids that the model has no embedding for.

    A tokenizer may know more ids than the model as long as the set does not use them; only then is
    the whole set read.

    Args:
        token_set: The set.
        num_embeddings: Ids the model embeds.
        model: Named in the error.

    Raises:
        DataError: An id is not below ``num_embeddings``, or the set is damaged.
    """
    if token_set.vocab_size <= num_embeddings:
        return
    for first in range(0, token_set.num_rows, _ROWS_AT_ONCE):
        rows = range(first, min(first + _ROWS_AT_ONCE, token_set.num_rows))
        ids = token_set.read(rows)
        highest = int(ids.max())
        if highest >= num_embeddings:
            row = rows[int((ids == highest).any(1).nonzero()[0])]
            raise DataError(
                f"{token_set.path} holds id {highest} in row {row}, but {model} embeds ids below"
                f" {num_embeddings}; build it with the tokenizer of the model."
            )
