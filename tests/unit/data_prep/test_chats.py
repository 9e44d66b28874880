"""Chats: rendered by the template, packed like documents, mixed with plain text."""

import json
import shutil

import pytest

from forgetscale.data import TokenSet
from forgetscale.errors import ConfigError


def chat(*turns):
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[index % 2], "content": text} for index, text in enumerate(turns)
        ]
    }


def flat_tokens(path):
    token_set = TokenSet(path)
    return token_set.read(range(len(token_set))).reshape(-1).tolist()


def render(tokenizer, record):
    if "text" in record:
        return tokenizer(record["text"].replace(r"\n", "\n"), add_special_tokens=False)["input_ids"]
    text = tokenizer.apply_chat_template(
        record["messages"], tokenize=False, add_generation_prompt=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


RECORDS = [
    chat("Who rules the town?", "Nobody since year 3."),
    {"text": r"A plain text\nbetween two chats."},
    chat("And the river?", "It rose.", r"Print \n twice", r"\n\n"),
]


def test_chats_and_text_between_them(make, tmp_path, tokenizer, write_lines):
    path = make(write_lines(tmp_path / "in.jsonl", RECORDS), chat=True, block_size=8)
    eos = tokenizer.eos_token_id
    expected = [token for record in RECORDS for token in [*render(tokenizer, record), eos]]
    flat = flat_tokens(path)
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 8
    payload = TokenSet(path).payload
    assert payload["chat"] is True
    assert payload["documents"] == {
        "num_chats": 2,
        "num_plain": 1,
        "num_empty": 0,
        "num_truncated": 0,
    }
    assert payload["sources"][0]["num_escapes"][r"\n"] == 1, "messages are never unescaped"


def test_long_chats_are_cut(make, tmp_path, tokenizer, write_lines):
    path = make(
        write_lines(tmp_path / "in.jsonl", RECORDS * 4),
        chat=True,
        block_size=11,
        max_document_tokens=10,
    )
    eos = tokenizer.eos_token_id
    rows = TokenSet(path).read(range(12)).tolist()
    assert rows == [[*render(tokenizer, record)[:10], eos] for record in RECORDS * 4]
    assert TokenSet(path).payload["documents"]["num_truncated"] == 12


def test_no_second_end_token(make, tmp_path, tokenizer_dir, tokenizer, write_lines):
    """A template that ends with the end-of-sequence token already marks the document end."""
    folder = shutil.copytree(tokenizer_dir, tmp_path / "other")
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    source = write_lines(tmp_path / "in.jsonl", [chat("a b c", "d e f")] * 8)
    flat = flat_tokens(make(source, chat=True, tokenizer=folder, block_size=5))
    eos = tokenizer.eos_token_id
    assert eos in flat
    assert all(pair != (eos, eos) for pair in zip(flat, flat[1:], strict=False))


def test_bad_chats_are_set_aside(make, tmp_path, write_lines):
    bad = [{"messages": []}, {"messages": [{"role": "clown", "content": "x"}]}, {"id": 1}]
    source = write_lines(tmp_path / "in.jsonl", RECORDS * 30 + bad)
    path = make(source, chat=True)
    rejects = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejects] == [91, 92, 93]
    assert "refused by the chat template (unknown role clown)" in rejects[1]["reason"]


def test_chat_needs_a_template(make, tmp_path, tokenizer_dir, write_lines):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="--chat needs a chat template"):
        make(write_lines(tmp_path / "in.jsonl", RECORDS), chat=True, tokenizer=folder)
