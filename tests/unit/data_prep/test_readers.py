"""Every input format gives the same lines; limits hold without filling memory."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import Line, ReadOptions, SourceReader
from data_prep.records import BadRecordError, parse_record, parse_text
from data_prep.sources import find_sources
from forgetscale.artifact import hash_file
from forgetscale.errors import ConfigError, DataError

TEXTS = [f"text {number} ሰላም" for number in range(40)]


def read(path, **options):
    with SourceReader(path, ReadOptions(**options)) as reader:
        lines = list(reader.lines())
        assert reader.sha256 == hash_file(path)
        assert reader.num_bytes == path.stat().st_size
    return lines


def arrow_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def arrow_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def packed(codec):
    def write(table, path):
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
        half = len(lines) // 2
        path.write_bytes(codec(lines[:half]) + codec(lines[half:]))

    return write


WRITERS = {
    "jsonl": packed(bytes),
    "jsonl.gz": packed(gzip.compress),
    "jsonl.zst": packed(lambda data: pa.compress(data, codec="zstd", asbytes=True)),
    "parquet": lambda table, path: pq.write_table(table, path, row_group_size=9),
    "stream.arrow": arrow_stream,
    "file.arrow": arrow_file,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    table = pa.table({"text": TEXTS, "url": ["x"] * len(TEXTS)})
    WRITERS[kind](table, path)
    lines = read(path)
    assert [line.number for line in lines] == list(range(1, len(TEXTS) + 1))
    assert [parse_record(line.data, chat=False).text for line in lines] == TEXTS


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_are_named(tmp_path, kind, damage):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](pa.table({"text": TEXTS}), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"not a table or archive" * 9)
    wanted = rf"a.{kind} is (no intact|a truncated) (zstd|Parquet|Arrow) file.*again"
    with pytest.raises(DataError, match=wanted):
        read(path)


def test_tables_need_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "number": range(len(TEXTS))}), path)
    with pytest.raises(DataError, match="no column 'text', it has 'body', 'number'; name the"):
        read(path)
    with pytest.raises(DataError, match="column 'number' of .* is int64, expected string"):
        read(path, text_field="number")
    assert json.loads(read(path, text_field="body")[3].data) == {"body": TEXTS[3]}


def test_null_and_invalid_rows_of_tables(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pa.array([b"good", b"\xff", None, b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": bad}), path)
    lines = read(path)
    assert [line.reject for line in lines] == ["", "not UTF-8", "", ""]
    with pytest.raises(BadRecordError, match="'text' is not a string but NoneType"):
        parse_record(lines[2].data, chat=False)


PLAIN = b"\none\ntwo\n \nthree\r\n\n\n"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [(2, "one"), (3, "two"), (5, "three")]),
        ("paragraph", [(2, "one\ntwo"), (5, "three")]),
        ("file", [(2, "one\ntwo\n \nthree\r\n\n")]),
    ],
)
def test_documents_of_plain_text(tmp_path, unit, expected):
    for name, data in (("a.txt", PLAIN), ("a.txt.gz", gzip.compress(PLAIN))):
        (tmp_path / name).write_bytes(data)
        lines = read(tmp_path / name, text_documents=unit)
        assert [(line.number, parse_text(line.data).text) for line in lines] == expected


def test_long_lines_are_set_aside_without_holding_them(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "first"}\n')
        for _ in range(40):
            file.write(bytes(range(48, 112)) * (1 << 14))
        file.write(b'\n{"text": "last"}')
    tracemalloc.start()
    lines = read(path, max_line_bytes=1000, max_ratio=1e6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    reason = f"too long ({40 << 20} bytes, --max-line-bytes is 1000)"
    assert lines[1] == Line(2, b"", reason)
    assert [lines[0].data, lines[2].data] == [b'{"text": "first"}', b'{"text": "last"}']
    assert peak < 12 << 20


def test_limit_of_lines_is_exact(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 11)
    rejected = [bool(line.reject) for line in read(path, max_line_bytes=10)]
    assert rejected == [False, True, True]
    text = tmp_path / "a.txt"
    text.write_bytes(b"12345\n1234\n\n12345\n12345\n")
    lines = read(text, max_line_bytes=10, text_documents="paragraph")
    assert [line.data for line in lines] == [b"12345\n1234", b""]
    assert "too long (11 bytes" in lines[1].reject


def test_decompression_bombs(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (20 << 20)))
    with pytest.raises(DataError, match=r"bomb.jsonl.gz grows \d+ times .*--max-ratio is 200"):
        read(path)
    with pytest.raises(DataError, match="holds more than 1000000 bytes once decompressed"):
        read(path, max_file_bytes=1_000_000)
    assert read(path, max_ratio=1e6) == []


def test_nul_characters_are_no_text():
    for data in (rb'{"text": "a\u0000b"}', b'{"text": "a\0b"}'):
        with pytest.raises(BadRecordError, match="NUL|not JSON"):
            parse_record(data, chat=False)
    with pytest.raises(BadRecordError, match=r"NUL character \(character 2"):
        parse_text(b"a\0b")


def test_folders_of_several_kinds(tmp_path):
    for name in ("a.parquet", "LICENSE.txt", "README.md"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_sources([str(tmp_path)])] == ["a.parquet"]
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds .jsonl and .parquet files; choose with a pattern"):
        find_sources([str(tmp_path)])


def test_links_and_odd_names(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    with pytest.raises(ConfigError, match=r"given twice \(it is also .*a.jsonl\)"):
        find_sources([str(tmp_path)])
    with pytest.raises(ConfigError, match="given twice"):
        find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "x" / ".." / "a.jsonl")])
    (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match="c.jsonl is a link to nothing"):
        find_sources([str(tmp_path / "c.jsonl")])
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match="loop.jsonl is a link to nothing"):
        find_sources([str(tmp_path / "loop.jsonl")])
    for name in ("../am", "a/m", ""):
        with pytest.raises(ConfigError, match="must be a language tag"):
            find_sources([str(tmp_path)], language=name)
