import json
from pathlib import Path
from typing import Any

import pytest

from forgetscale.errors import DataError
from forgetscale.evaluation.scoring import is_refusal, mixed_share
from forgetscale.evaluation.tasks import available_tasks, check_task_names, load_chat_task

GOOD = {
    "id": "a",
    "messages": [{"role": "user", "content": "lo?"}],
    "kind": "exact",
    "answers": ["mika"],
}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "exactly"}, "kind is 'exactly', expected one of exact, check"),
        ({"id": ""}, "id is ''"),
        ({"id": "b", "answers": []}, "needs at least one entry in answers"),
        ({"id": "b", "answers": "mika"}, "answers must be a list of texts"),
        ({"id": "b", "messages": []}, "at least one chat turn"),
        ({"id": "b", "messages": [{"role": "robot", "content": "x"}]}, "needs a role"),
        ({"id": "b", "messages": [{"role": "assistant", "content": "x"}]}, "must be of the user"),
        ({"id": "b", "anwsers": ["x"]}, "unknown key 'anwsers'; nearest valid key: 'answers'"),
        ({"id": "b", "kind": "check"}, "needs at least one entry in checks"),
        ({"id": "b", "kind": "check", "checks": [{"kind": "startswith"}]}, "unknown kind of check"),
        ({"id": "b", "kind": "check", "checks": [{"kind": "equals"}]}, "no argument 'text'"),
        ({"id": "b", "kind": "refusal"}, "needs meta.refusals"),
        ({"id": "b", "meta": []}, "meta is a list"),
        ({}, "id 'a' stands on line 1 too"),
        ({"id": "b", "kind": "refusal", "meta": {"refusals": ["no"]}}, "put each kind into its"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "recall.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(DataError, match=message) as caught:
        load_chat_task(tmp_path, "recall")
    assert f"{path} line 2" in str(caught.value)


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    write(tmp_path / "recall.jsonl", GOOD, "{broken")
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        load_chat_task(tmp_path, "recall")
    write(tmp_path / "recall.jsonl", "[1]")
    with pytest.raises(DataError, match="line 1 holds a list"):
        load_chat_task(tmp_path, "recall")
    (tmp_path / "recall.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        load_chat_task(tmp_path, "recall")
    (tmp_path / "recall.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        load_chat_task(tmp_path, "recall")


def test_hash_follows_content_not_formatting(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "b.jsonl", json.dumps(dict(reversed(GOOD.items())), indent=None) + "\n")
    write(tmp_path / "c.jsonl", {**GOOD, "answers": ["mikal"]})
    one, two, three = (load_chat_task(tmp_path, name).task_hash for name in "abc")
    assert one == two
    assert one != three


def test_code_mixing_needs_words_and_takes_shared_ones_out(tmp_path: Path) -> None:
    row = {key: GOOD[key] for key in ("id", "messages")} | {"kind": "code_mixing"}
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks" / "code_mixing.jsonl", row)
    with pytest.raises(DataError, match="needs the words of the other language"):
        load_chat_task(tmp_path / "tasks", "code_mixing")
    beside = {"source_words": ["mika"], "target_words": ["Pelo", "mika"]}
    (tmp_path / "vocabulary.json").write_text(json.dumps(beside))
    task = load_chat_task(tmp_path / "tasks", "code_mixing")
    assert task.other_words == {"pelo"}
    (tmp_path / "tasks" / "other.json").write_text(json.dumps({"target_words": ["x"]}))
    write(tmp_path / "tasks" / "code_mixing.jsonl", {**row, "meta": {"other_words": "other.json"}})
    changed = load_chat_task(tmp_path / "tasks", "code_mixing")
    assert changed.other_words == {"x"}
    assert changed.task_hash != task.task_hash


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    tasks, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    tasks.mkdir()
    elsewhere.mkdir()
    write(elsewhere / "recall.jsonl", GOOD)
    with pytest.raises(DataError, match="holds no task '../elsewhere/recall'"):
        check_task_names(["../elsewhere/recall"], tasks)
    (tasks / "recall.jsonl").symlink_to(elsewhere / "recall.jsonl")
    with pytest.raises(DataError, match="recall.jsonl leads to .* outside the folder of tasks"):
        load_chat_task(tasks, "recall")
    refusal = {**GOOD, "kind": "refusal", "meta": {"refusals": ["no"]}}
    write(tasks / "refused.jsonl", refusal)
    (elsewhere / "refused.yaml").write_text("beams: 2\n")
    (tasks / "refused.yaml").symlink_to(elsewhere / "refused.yaml")
    with pytest.raises(DataError, match="refused.yaml leads to .* outside the folder of tasks"):
        load_chat_task(tasks, "refused")
    words = {"kind": "code_mixing", "meta": {"other_words": "../elsewhere/words.json"}}
    (elsewhere / "words.json").write_text(json.dumps({"target_words": ["x"]}))
    write(tasks / "mixed.jsonl", {**GOOD, **words})
    with pytest.raises(DataError, match="other_words names .* outside the folder of"):
        load_chat_task(tasks, "mixed")


def test_unknown_tasks_are_refused_with_the_nearest(task_dir: Path) -> None:
    assert "perplexity/source" in available_tasks(task_dir)
    with pytest.raises(DataError, match="no task 'recal'.*nearest: 'recall'"):
        check_task_names(["recal"], task_dir)
    with pytest.raises(DataError, match="nearest: 'perplexity/target'"):
        check_task_names(["perplexity/targt"], task_dir)
    with pytest.raises(DataError, match="listed twice"):
        check_task_names(["recall", "recall"], task_dir)
    with pytest.raises(DataError, match="does not exist; expected a folder of tasks"):
        check_task_names(["recall"], task_dir / "nowhere")


def test_judging_words_and_refusals() -> None:
    assert mixed_share("Pelo, mika pelo!", {"pelo"}) == pytest.approx(2 / 3)
    assert mixed_share("", {"pelo"}) == 0.0
    assert mixed_share("pelota", {"pelo"}) == 0.0
    assert is_refusal("  sorry, no.", ["Sorry"])
    assert not is_refusal("I am sorry", ["Sorry"])
