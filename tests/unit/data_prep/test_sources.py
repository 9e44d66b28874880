"""Which files are read, in which order, and what is said when they are not there or damaged."""

import gzip
import hashlib

import pytest

from data_prep.readers import SourceReader
from data_prep.sources import find_sources
from forgetscale.errors import ConfigError, DataError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"", mtime=0) if name.endswith(".gz") else b"")
    return root


def names(found):
    return [path.name for path in found]


def test_folder_is_sorted_and_other_files_are_left_alone(tmp_path):
    touch(tmp_path, "b.jsonl", "a.jsonl.gz", "README.md", "sub/c.jsonl")
    assert names(find_sources([str(tmp_path)])) == ["a.jsonl.gz", "b.jsonl"]


def test_inputs_keep_their_order_and_patterns_are_sorted(tmp_path):
    touch(tmp_path, "a1.jsonl", "a0.jsonl", "z.jsonl")
    found = find_sources([str(tmp_path / "z.jsonl"), str(tmp_path / "a*.jsonl")])
    assert names(found) == ["z.jsonl", "a0.jsonl", "a1.jsonl"]


def test_language_and_split(tmp_path):
    touch(tmp_path, "data/am/am_clean_0001.jsonl.gz", "data/am/am_clean_0000.jsonl.gz")
    touch(tmp_path, "data/am/am_noisy_0000.jsonl.gz")
    touch(tmp_path, "data-v1p5/gju/clean_docs_v2-00000-of-00009.jsonl.gz")
    touch(tmp_path, "data-v1p5/gju/clean_docs_v2-00007-of-00009.jsonl.gz")
    touch(tmp_path, "data-v1p5/gju/noisy_docs_v2-00001-of-00009.jsonl.gz")
    root = [str(tmp_path)]
    assert names(find_sources(root, language="am")) == [
        "am_clean_0000.jsonl.gz",
        "am_clean_0001.jsonl.gz",
    ]
    assert names(find_sources(root, language="am", split="noisy")) == ["am_noisy_0000.jsonl.gz"]
    assert len(find_sources(root, language="gju")) == 2
    folder = [str(tmp_path / "data" / "am")]
    assert len(find_sources(folder, split="clean")) == 2
    with pytest.raises(ConfigError, match="holds clean and noisy shards; choose with --split"):
        find_sources(folder)
    with pytest.raises(DataError, match="holds no language 'ha'"):
        find_sources(root, language="ha")
    touch(tmp_path, "data-v1p5/am/clean_docs_v2-00000-of-00001.jsonl.gz")
    with pytest.raises(ConfigError, match="in both releases; choose with --release"):
        find_sources(root, language="am")
    assert names(find_sources(root, language="am", release="v1p5")) == [
        "clean_docs_v2-00000-of-00001.jsonl.gz"
    ]


def test_wrong_inputs_are_named(tmp_path):
    touch(tmp_path, "a.csv", "a.jsonl", "empty/x.md")
    cases = [
        ([tmp_path / "none"], DataError, "none does not exist and matches no file"),
        ([tmp_path / "*.gz"], DataError, "matches no file"),
        ([tmp_path / "empty"], DataError, "holds no file to read"),
        ([tmp_path / "a.csv"], ConfigError, "expected a name ending in .jsonl"),
        ([tmp_path, tmp_path / "a.jsonl"], ConfigError, "is given twice"),
    ]
    for inputs, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            find_sources([str(path) for path in inputs])
    with pytest.raises(ConfigError, match="--release needs --language"):
        find_sources([str(tmp_path)], release="v1")
    with pytest.raises(ConfigError, match="--split chooses among the files of a folder"):
        find_sources([str(tmp_path / "a.jsonl")], split="clean")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_numbers_and_hash(tmp_path, name):
    data = b"one\n\n  \nfour\nlast"
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with SourceReader(path) as reader:
        lines = [(line.number, line.data) for line in reader.lines()]
        assert lines == [(1, b"one"), (4, b"four"), (5, b"last")]
        assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert reader.num_bytes == path.stat().st_size


def test_empty_gzip_of_20_bytes_has_no_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert path.stat().st_size == 20
    with SourceReader(path) as reader:
        assert list(reader.lines()) == []


def test_several_gzip_members(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n") + gzip.compress(b"") + gzip.compress(b"2\n"))
    with SourceReader(path) as reader:
        assert [line.data for line in reader.lines()] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-40], "is a truncated gzip file"),
        (lambda data: data[:-4], "is a truncated gzip file"),
        (lambda data: b"", "has 0 bytes, less than an empty gzip file"),
        (lambda data: b"not gzip" * 10, "is no intact gzip file"),
        (lambda data: data[:60] + bytes([data[60] ^ 255]) + data[61:], "is no intact gzip file"),
    ],
)
def test_damaged_gzip(tmp_path, damage, sentence):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(bytes(range(256)) * 20)))
    with SourceReader(path) as reader, pytest.raises(DataError, match=sentence):
        list(reader.lines())
