import dataclasses
import gzip
import json

import pytest

from forgetscale.artifact import read_manifest, verify_artifact
from forgetscale.errors import DataError
from forgetscale.testbed import TINY, WorldSize, build_world, ensure_world, world_path

LAYOUT = {
    "chat/calibration.jsonl",
    "chat/train.jsonl",
    "init/config.json",
    "init/generation_config.json",
    "init/model.safetensors",
    "init/tokenizer.json",
    "tasks/code_mixing.jsonl",
    "tasks/compliance.jsonl",
    "tasks/over_refusal.jsonl",
    "tasks/recall.jsonl",
    "tasks/refusal.jsonl",
    "tasks/target_recall.jsonl",
    "text/data/src/src_clean_0000.jsonl.gz",
    "text/data/tgt/tgt_clean_0000.jsonl.gz",
    "text/heldout/src.jsonl",
    "text/heldout/tgt.jsonl",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "vocabulary.json",
    "world.json",
}


def test_a_second_build_gives_the_same_bytes_and_another_seed_other_ones(world, tmp_path):
    again = build_world(tmp_path / "again", seed=7, size=TINY)
    other = build_world(tmp_path / "other", seed=8, size=TINY)
    files = read_manifest(world, "world")["files"]
    assert read_manifest(again, "world")["files"] == files
    other_files = read_manifest(other, "world")["files"]
    changed = {name for name in files if files[name] != other_files[name]}
    assert {"chat/train.jsonl", "world.json", "init/model.safetensors"} <= changed


def test_layout_and_hashes(world):
    manifest = verify_artifact(world, "world")
    assert set(manifest["files"]) >= LAYOUT
    assert manifest["payload"]["seed"] == 7
    assert manifest["payload"]["languages"] == {"source": "src", "target": "tgt"}


def test_raw_text_has_the_layout_of_madlad(world, read_lines):
    for code in ("src", "tgt"):
        data = (world / f"text/data/{code}/{code}_clean_0000.jsonl.gz").read_bytes()
        rows = [json.loads(line) for line in gzip.decompress(data).decode().splitlines()]
        pages = [row["text"] for row in rows]
        assert all(set(row) == {"text"} for row in rows)
        assert all("\\n" in page and "\n" not in page for page in pages)
        assert len(set(pages)) == len(pages)
        held = {row["text"] for row in read_lines(world / f"text/heldout/{code}.jsonl")}
        assert len(held) == TINY.num_heldout_documents
        assert not held & set(pages)
        curriculum = {
            row["text"].replace("\n", "\\n")
            for row in read_lines(world / "chat/train.jsonl")
            if "text" in row
        }
        assert not held & curriculum


def test_the_cache_keeps_a_good_world_and_replaces_a_damaged_one(tmp_path):
    path = ensure_world(tmp_path, 3, TINY)
    assert path == world_path(tmp_path, 3, TINY)
    stamp = (path / "manifest.json").stat().st_mtime_ns
    assert ensure_world(tmp_path, 3, TINY) == path
    assert (path / "manifest.json").stat().st_mtime_ns == stamp
    (path / "vocabulary.json").write_text("{}")
    ensure_world(tmp_path, 3, TINY)
    verify_artifact(path, "world")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_cache_name_depends_on_seed_and_size(tmp_path):
    larger = dataclasses.replace(TINY, num_persons=7)
    names = {world_path(tmp_path, 1, TINY), world_path(tmp_path, 2, TINY)}
    names |= {world_path(tmp_path, 1, larger), world_path(tmp_path, 1)}
    assert len(names) == 4


def test_impossible_requests_are_refused_with_nothing_left(tmp_path):
    with pytest.raises(ValueError, match="num_persons must be >= 1"):
        WorldSize(num_persons=0)
    with pytest.raises(ValueError, match="do not split"):
        WorldSize(num_heads=3)
    with pytest.raises(ValueError, match=r"change WorldSize\.vocab_size"):
        build_world(tmp_path / "w", seed=1, size=dataclasses.replace(TINY, vocab_size=50_000))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "w").mkdir()
    with pytest.raises(DataError, match="exists already"):
        build_world(tmp_path / "w", seed=1, size=TINY)
