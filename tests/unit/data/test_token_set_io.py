"""Writing and reading of token sets, and what happens when a byte changes."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from forgetscale.artifact import read_manifest
from forgetscale.data import TokenSet, content_hash, pack_doc_id, unpack_doc_id, write_token_set
from forgetscale.errors import DataError


def flip_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_rows_come_back(set_path, rows):
    token_set = TokenSet(set_path)
    assert (len(token_set), token_set.block_size, token_set.num_tokens) == (23, 6, 138)
    order = [22, 0, 9, 9, 17, 3]
    for row_ids in (order, np.array(order), torch.tensor(order)):
        got = token_set.read(row_ids)
        assert got.dtype == torch.int64
        assert got.tolist() == rows[order].tolist()
    assert token_set.read([]).shape == (0, 6)


def test_shards_are_plain_arrow(set_path, rows):
    files = sorted(path.name for path in set_path.glob("*.arrow"))
    assert files == [f"shard-0000{i}-of-00003.arrow" for i in range(3)]
    tables = [pa.ipc.open_file(pa.memory_map(str(set_path / name))).read_all() for name in files]
    table = pa.concat_tables(tables)
    assert table.schema.field("input_ids").type == pa.list_(pa.uint16(), 6)
    assert table.schema.field("doc_lens").type == pa.list_(pa.uint32())
    assert table.schema.field("doc_id").type == pa.list_(pa.uint64())
    assert table["input_ids"].to_pylist() == rows.tolist()
    assert all(sum(lens) == 6 for lens in table["doc_lens"].to_pylist())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_token_width_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    rows = np.array([[0, vocab_size - 1]])
    write_token_set(tmp_path / "set", rows, vocab_size=vocab_size, tokenizer_sha256="")
    token_set = TokenSet(tmp_path / "set")
    assert token_set.dtype == dtype
    assert token_set.read([0]).tolist() == rows.tolist()


def test_document_pieces(set_path):
    token_set = TokenSet(set_path)
    assert [(p.line, p.num_tokens) for p in token_set.document_pieces(0)] == [(1, 6)]
    assert [(p.line, p.num_tokens) for p in token_set.document_pieces(1)] == [(1, 4), (2, 2)]
    assert [(p.line, p.num_tokens) for p in token_set.document_pieces(2)] == [(2, 2), (3, 4)]
    assert token_set.document_lengths().sum() == 138


def test_doc_id_holds_file_and_line():
    for file_index, line in ((0, 1), (3, 2**40 - 1), (2**24 - 1, 0)):
        assert unpack_doc_id(pack_doc_id(file_index, line)) == (file_index, line)
    for file_index, line in ((2**24, 1), (0, 2**40), (-1, 1)):
        with pytest.raises(ValueError, match="must be below"):
            pack_doc_id(file_index, line)


def test_manifest_names_every_batch(set_path):
    payload = read_manifest(set_path, "token_set")["payload"]
    assert [shard["num_rows"] for shard in payload["shards"]] == [9, 9, 5]
    assert [batch["num_rows"] for batch in payload["shards"][2]["batches"]] == [3, 2]
    assert payload["dtype"] == "uint16"


def test_content_hash_ignores_place_and_time(set_path, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(set_path, moved)
    assert TokenSet(moved).content_hash == TokenSet(set_path).content_hash
    payload = TokenSet(set_path).payload
    changed = json.loads(json.dumps(payload))
    changed["sources"] = [{"path": "/other"}]
    assert content_hash(changed) == content_hash(payload)
    changed["tokenizer_sha256"] = "cd" * 32
    assert content_hash(changed) != content_hash(payload)


def test_flipped_bit_raises_on_first_touch_of_its_batch(set_path, rows):
    token_set = TokenSet(set_path)
    batch = token_set.payload["shards"][1]["batches"][2]
    flip_bit(set_path / "shard-00001-of-00003.arrow", batch["offset"] + batch["size"] - 40)
    token_set = TokenSet(set_path)
    intact = [0, 14, 18, 22]
    assert token_set.read(intact).tolist() == rows[intact].tolist()
    place = r"shard-00001-of-00003\.arrow is damaged in record batch 2, rows 15 to 17 "
    for _ in range(2):
        with pytest.raises(DataError, match=place):
            token_set.read([0, 16])
    assert len(list(token_set.damages())) == 1


def test_every_single_bit_matters(set_path):
    name = "shard-00002-of-00003.arrow"
    clean = (set_path / name).read_bytes()
    for offset in range(0, len(clean), 7):
        flip_bit(set_path / name, offset)
        assert list(TokenSet(set_path).damages()), f"byte {offset} changed unnoticed"
        (set_path / name).write_bytes(clean)
    assert not list(TokenSet(set_path).damages())


def test_damaged_start_and_footer_raise(set_path):
    name = "shard-00000-of-00003.arrow"
    clean = (set_path / name).read_bytes()
    for offset, place in ((3, "record batch 0"), (-30, "footer"), (-3, "footer")):
        flip_bit(set_path / name, offset)
        with pytest.raises(DataError, match=place):
            TokenSet(set_path).read([0])
        (set_path / name).write_bytes(clean)


def test_missing_and_short_shards_are_refused_at_opening(set_path):
    shard = set_path / "shard-00001-of-00003.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    with pytest.raises(DataError, match=f"has {len(data) - 8} bytes, expected {len(data)}"):
        TokenSet(set_path)
    shard.unlink()
    with pytest.raises(DataError, match="00001-of-00003.arrow is missing"):
        TokenSet(set_path)


def test_rows_outside_the_set(set_path):
    for row in (-1, 23):
        with pytest.raises(ValueError, match="has rows 0 to 22"):
            TokenSet(set_path).read([0, row])


def test_impossible_rows_are_not_written(tmp_path):
    for rows in (np.zeros((0, 3), int), np.array([[1, 10]]), np.array([[-1, 0]])):
        with pytest.raises(ValueError, match="ids in 0..9"):
            write_token_set(tmp_path / "set", rows, vocab_size=10, tokenizer_sha256="")
    assert not list(tmp_path.iterdir())
