"""Real text in the layout of MADLAD-400, where it is available."""

import os
from pathlib import Path

import pytest

from data_prep.texts import read_texts
from forgetscale.data import TokenSet, open_stream

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = Path(os.environ.get("FORGETSCALE_REAL_DATA", ROOT / "../shared/data/madlad_sample"))

pytestmark = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason=f"no real text at {SAMPLE}; set FORGETSCALE_REAL_DATA"
)


@pytest.mark.parametrize(
    ("language", "release", "documents"),
    [("sw", None, 256), ("gu", None, 260), ("am", None, None), ("ne", "v1p5", None)],
)
def test_builds(make, tokenizer, language, release, documents):
    path = make(SAMPLE, language=language, release=release, block_size=64)
    token_set = TokenSet(path)
    assert documents is None or token_set.num_documents == documents
    assert token_set.payload["rejects"]["num_rejects"] == 0
    assert sum(source["num_escapes"][r"\n"] for source in token_set.payload["sources"]) > 0
    assert not list(token_set.damages())
    text = tokenizer.decode(next(open_stream(path, seed=0, global_batch_size=1)).input_ids[0])
    assert text
    first = tokenizer.decode(token_set.read([0])[0])
    assert r"\n" not in first


@pytest.mark.parametrize(
    "language",
    ["am", "en", pytest.param("gu", marks=pytest.mark.long), "ha", "ig", "ky", "ne", "sw"],
)
def test_every_document_of_every_language_comes_back_from_the_stream(make, tokenizer, language):
    """Best-fit rows, streamed by three ranks, put together again by file and line."""
    release = "v1" if language == "ne" else None
    path = make(SAMPLE, language=language, release=release, block_size=512, packing="best-fit")
    token_set = TokenSet(path)
    seen: dict[tuple[str, int], list[tuple[int, list[int]]]] = {}
    for rank in range(3):
        stream = open_stream(
            path, seed=1, global_batch_size=len(token_set), rank=rank, world_size=3
        )
        batch = next(stream)
        for row, ids, lens in zip(
            batch.row_ids.tolist(), batch.input_ids, batch.doc_lens, strict=True
        ):
            pieces = token_set.document_pieces(row)
            assert [piece.num_tokens for piece in pieces] == lens[lens > 0].tolist()
            parts = ids[: int(lens.sum())].split(lens[lens > 0].tolist())
            for piece, part in zip(pieces, parts, strict=True):
                seen.setdefault((piece.file, piece.line), []).append((row, part.tolist()))
    texts = {}
    for source in token_set.payload["sources"]:
        for number, text in enumerate(read_texts([Path(source["path"])]), start=1):
            texts[source["path"], number] = text
    assert set(seen) == set(texts)
    whole = [key for key in texts if len(seen[key]) == 1]
    for key in whole:
        ((_, ids),) = seen[key]
        assert tokenizer.decode(ids) == texts[key] + tokenizer.eos_token
    cut = sum(len(parts) > 1 for parts in seen.values())
    assert cut == token_set.payload["row_shares"]["num_cut_documents"]
    for key, parts in seen.items():
        num_tokens = sum(len(ids) for _, ids in parts)
        assert num_tokens == len(tokenizer(texts[key])["input_ids"]) + 1
