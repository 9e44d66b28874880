"""Generated dialogues as SFT rows: what is trained on is what the model wrote, token by token."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main
from forgetscale.data import TokenSet, tokenizer_hash
from tests.unit.data_prep.families import FAMILIES, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokens") / "chatml", FAMILIES["chatml"])


def dialogue(tokenizer, number, ids, supervised, state="accepted"):
    return {
        "sample_id": number,
        "state": state,
        "reason": "" if state == "accepted" else "empty_turn",
        "messages": [
            {"role": "user", "content": f"Who is {number}?"},
            {"role": "assistant", "content": "ok"},
        ]
        * len(supervised),
        "input_ids": ids,
        "supervised": [{"start": start, "end": end} for start, end in supervised],
        "log_probs": [None, -0.5],
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }


def build(tokenizer, source, output, *more):
    return main(
        ["build", "--sft", "--input", str(source), "--tokenizer", str(tokenizer)]
        + ["--block-size", "16", "--packing", "none", "--output", str(output), *more]
    )


def rows_of(folder):
    rows = TokenSet(folder)
    ids, mask = rows.read(range(rows.num_rows)), rows.loss_mask(range(rows.num_rows))
    lens = rows.document_lens(range(rows.num_rows))[:, 0].tolist()
    return [
        (ids[n, :size].tolist(), mask[n, :size].nonzero().flatten().tolist())
        for n, size in enumerate(lens)
    ]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_tokens_are_taken_as_they_were_generated(tokenizer, tmp_path):
    """Not even the template's own tokens would be these: nothing is rendered or tokenised."""
    folder = tmp_path / "dialogues"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    kept = [([5, 9, 9, 40, 41, 7], [(3, 6)]), ([5, 8, 7, 6, 50, 7, 9, 60], [(2, 3), (4, 6)])]
    rows = [dialogue(tokenizer, n, *item) for n, item in enumerate(kept)]
    rows.append(dialogue(tokenizer, 2, [5, 6, 7], [(1, 2)], state="rejected"))
    write(folder / "dialogues-00000-of-00001.parquet", rows)
    assert build(tokenizer, folder, tmp_path / "rows") == 0
    wanted = [(ids, [n for start, end in spans for n in range(start, end)]) for ids, spans in kept]
    assert rows_of(tmp_path / "rows") == wanted
    payload = TokenSet(tmp_path / "rows").manifest["payload"]
    assert payload["dropped"]["by_reason"] == {"not_accepted": 1}
    assert payload["supervision"]["num_answers"] == 3


def test_long_dialogues_lose_whole_turns(tokenizer, tmp_path):
    source = tmp_path / "long.parquet"
    ids = [*range(10, 30)]
    write(source, [dialogue(tokenizer, 0, ids, [(3, 6), (10, 18)])])
    assert build(tokenizer, source, tmp_path / "rows", "--long", "truncate") == 0
    assert rows_of(tmp_path / "rows") == [(ids[:6], [3, 4, 5])]


def test_another_tokenizer(tokenizer, tmp_path, capsys):
    source = tmp_path / "other.parquet"
    row = dialogue(tokenizer, 0, [5, 6, 7], [(1, 2)]) | {"tokenizer_sha256": "0" * 64}
    write(source, [row])
    assert build(tokenizer, source, tmp_path / "rows") == 2
    assert "generated with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "supervised", [[], [(0, 2)], [(2, 9)], [(2, 1)]], ids=["none", "first", "beyond", "backwards"]
)
def test_ranges_that_cannot_be(supervised, tokenizer, tmp_path, capsys):
    source = tmp_path / "bad.jsonl"
    row = dialogue(tokenizer, 0, [5, 6, 7], [(1, 2)])
    row["supervised"] = [{"start": start, "end": end} for start, end in supervised]
    source.write_text(json.dumps(row))
    assert build(tokenizer, source, tmp_path / "rows") == 2
    assert "no list of ranges inside" in capsys.readouterr().err
