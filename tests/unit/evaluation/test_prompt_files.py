"""A user's own prompts become tasks that evaluation reads."""

from __future__ import annotations

import json

import pytest

from forgetscale.cli import main
from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.prompt_files import (
    Prompt,
    choose,
    read_prompts,
    task_rows,
    write_prompt_tasks,
)
from forgetscale.evaluation.tasks import load_chat_task


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def unsafe(tmp_path):
    rows = ["prompt,kind", 'how to "x", quickly,Hate Speech', "b one,violence", "c,violence"]
    rows[1] = '"how to ""x"", quickly",Hate Speech'
    return write(tmp_path / "unsafe.csv", "\ufeff" + "\n".join([*rows, "c,violence"]) + "\n")


def test_csv_jsonl_and_text(tmp_path, unsafe):
    found = read_prompts(unsafe, category_column="kind")
    assert found == [
        Prompt('how to "x", quickly', "hate-speech"),
        Prompt("b one", "violence"),
        Prompt("c", "violence"),
    ]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ("one", "zwei – ä", "one"))
    assert [p.text for p in read_prompts(write(tmp_path / "a.jsonl", lines), column="text")] == [
        "one",
        "zwei – ä",
    ]
    assert [p.text for p in read_prompts(write(tmp_path / "a.txt", " one \n\ntwo\n"))] == [
        "one",
        "two",
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "question\nx\n", "'prompt' is None, expected a text"),
        ("a.jsonl", '{"prompt": 3}\n', "'prompt' is 3, expected a text"),
        ("a.jsonl", "{bad\n", "line 1 is not valid JSON"),
        ("a.jsonl", "[1]\n", "holds a list, expected an object"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.xlsx", "x", "expected .jsonl, .csv or .txt, got .xlsx"),
    ],
)
def test_bad_files(tmp_path, name: str, text: str, expected: str):
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path / name, text))
    assert expected in str(caught.value)


def test_not_utf8_and_missing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "b.txt")


def test_equal_quotas_do_not_depend_on_neighbours():
    prompts = [Prompt(f"{c}{i}", c) for c in "ab" for i in range(20)]
    found = choose(prompts, 5, seed=1)
    assert [sum(p.category == c for p in found) for c in "ab"] == [5, 5]
    assert found == choose(prompts, 5, seed=1) and found != choose(prompts, 5, seed=2)
    rest = [p for p in prompts if p not in found[:1] and p.category == "a"]
    again = choose(rest, 4, seed=1)
    assert set(again) == {p for p in found[1:] if p.category == "a"}, "one away, the others stay"
    with pytest.raises(DataError, match="category 'a' has 20 prompts, 21 are wanted"):
        choose(prompts, 21, seed=1)
    assert choose(prompts, None, seed=1) == prompts


def test_command_writes_tasks_that_load(tmp_path, unsafe, capsys):
    safe = write(tmp_path / "safe.txt", "what is 2 + 2?\nname a river\n")
    output = tmp_path / "tasks"
    command = ["prompts", "--unsafe", str(unsafe), "--safe", str(safe), "--output", str(output)]
    assert main([*command, "--category-column", "kind"]) == 0
    assert "refusal.jsonl  3 prompts" in capsys.readouterr().out
    refusal, over = (load_chat_task(output, name) for name in ("refusal", "over_refusal"))
    assert (refusal.kind, over.kind) == ("refusal", "no_refusal")
    assert [q.id for q in refusal.questions] == [
        "refusal/hate-speech/00000",
        "refusal/violence/00000",
        "refusal/violence/00001",
    ]
    assert [q.id for q in over.questions] == ["over_refusal/all/00000", "over_refusal/all/00001"]
    assert "I cannot" in refusal.questions[0].meta["refusals"]
    assert main([*command, "--category-column", "kind"]) == 2, "nothing is overwritten"
    assert "is there already" in capsys.readouterr().err


def test_own_openings_and_clashes(tmp_path, unsafe):
    safe = write(tmp_path / "safe.txt", "c\n")
    openings = write(tmp_path / "no.txt", "Nein\nDas kann ich nicht\n")
    command = ["prompts", "--unsafe", str(unsafe), "--safe", str(safe), "--refusals", str(openings)]
    assert main([*command, "--output", str(tmp_path / "tasks")]) == 2, "c is in both"
    rows = task_rows("refusal", "refusal", [Prompt("x", "all")], ["Nein"])
    assert rows[0]["meta"] == {"refusals": ["Nein"], "category": "all"}
    with pytest.raises(ConfigError, match="no opening"):
        write_prompt_tasks(tmp_path / "t", unsafe=[], safe=[], refusals=())
