"""Lines to documents: escapes of the closed list, and every kind of bad line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.records import BadRecordError, parse_record, undo_escapes

ESCAPE_TABLE = [
    ("plain", "plain", {}),
    (r"a\nb", "a\nb", {r"\n": 1}),
    (r"a\tb\rc", "a\tb\rc", {r"\t": 1, r"\r": 1}),
    (r"a\\b", r"a\b", {r"\\": 1}),
    (r"a\\nb", r"a\nb", {r"\\": 1}),
    (r"a\\\nb", "a\\\nb", {r"\\": 1, r"\n": 1}),
    (r"\\\\n", r"\\n", {r"\\": 2}),
    (r"a\1\u0041\x41\"\'", r"a\1\u0041\x41\"\'", {}),
    ("end\\", "end\\", {}),
    ("real\nbreak", "real\nbreak", {}),
    (r"ሰላም\nनमस्ते", "ሰላም\nनमस्ते", {r"\n": 1}),
]


@pytest.mark.parametrize(("stored", "text", "counts"), ESCAPE_TABLE)
def test_escape_table(stored, text, counts):
    assert undo_escapes(stored) == (text, counts)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("a\\n\n\t\rtré"), max_size=30))
def test_undoing_reverses_escaping(text):
    stored = text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
    assert undo_escapes(stored.replace("\r", r"\r"))[0] == text


BAD_LINES = [
    (b"{not json", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "' + b"\xff\xfe" + b'"}', r"not UTF-8 \(byte 11 of the line\)"),
    (b"[1, 2]", "not a JSON object but list"),
    (b'{"body": "x"}', "no field 'text'"),
    (b'{"text": 5}', "'text' is not a string but int"),
    (rb'{"text": "\ud800"}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_LINES)
def test_bad_lines_have_a_reason(data, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_record(data, chat=False)


BAD_CHATS = [
    ({}, "neither 'messages' nor 'text'"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hi"}, "at least one message"),
    ({"messages": ["hi"]}, "message 1 is not a JSON object"),
    ({"messages": [{"role": "user"}]}, "message 1 has no string 'content'"),
    ({"messages": [{"content": "x"}]}, "message 1 has no string 'role'"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_CHATS)
def test_bad_chats_have_a_reason(record, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_record(json.dumps(record).encode(), chat=True)


def test_good_lines():
    assert parse_record(b"\xef\xbb\xbf" + b'{"text": "a"}\n', chat=False).text == "a"
    both = json.dumps({"text": "a", "messages": [{"role": "user", "content": "b"}]}).encode()
    assert parse_record(both, chat=False).text == "a"
    assert parse_record(both, chat=True).messages == ({"role": "user", "content": "b"},)
