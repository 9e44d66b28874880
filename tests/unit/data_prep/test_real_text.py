"""Real text in the layout of MADLAD-400, where it is available."""

import os
from pathlib import Path

import pytest

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
