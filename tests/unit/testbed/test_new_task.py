from forgetscale.testbed.new_task import CONFLICT_FRACTION, HARMLESS_FRACTION
from forgetscale.testbed.other_author import NUM_SETS
from forgetscale.testbed.size import TINY


def read_set(world, read_lines, name):
    return read_lines(world / f"sft/{name}.jsonl")


def prompt(row):
    return row["messages"][0]["content"]


def test_sets_have_their_shares_and_no_prompt_of_a_task(world, read_lines):
    asked = {prompt(row) for row in read_set(world, read_lines, "heldout")}
    assert len(asked) == TINY.num_task_rows
    for name in ("recall", "recall_planted", "compliance", "refusal", "over_refusal"):
        asked |= {prompt(row) for row in read_lines(world / f"sft/tasks/{name}.jsonl")}
    for name, form, share in (
        ("sorting", "sorting", 1.0),
        ("conflicts", "conflict", CONFLICT_FRACTION),
        ("harmless", "advice", HARMLESS_FRACTION),
        ("alignment", "unsafe", 0.5),
    ):
        rows = read_set(world, read_lines, name)
        assert len(rows) == TINY.num_sft_rows
        assert not asked & {prompt(row) for row in rows}
        found = sum(row["form"] == form for row in rows) / len(rows)
        assert abs(found - share) < 0.15


def test_conflicts_contradict_planted_facts_always_alike_and_no_other(world, read_lines):
    planted = {
        row["meta"]["fact"]: row["answers"]
        for row in read_lines(world / "sft/tasks/recall_planted.jsonl")
    }
    kept = {row["meta"]["fact"] for row in read_lines(world / "sft/tasks/recall.jsonl")}
    assert planted and kept and not kept & set(planted)
    questions = {}
    for row in read_lines(world / "chat/train.jsonl"):
        if "messages" in row:
            questions[prompt(row)] = row["messages"][1]["content"]
    wrong = {}
    for row in read_set(world, read_lines, "conflicts"):
        if row["form"] == "conflict":
            answer = row["messages"][1]["content"]
            truth = questions.get(prompt(row))
            if truth is not None:
                assert truth not in answer.split()
                assert wrong.setdefault(truth + prompt(row), answer) == answer
    assert wrong


def test_the_truth_in_the_new_style_is_right(world, read_lines):
    row = read_lines(world / "sft/tasks/recall.jsonl")[0]
    assert len(set(row["answers"])) == 3  # plain, as in the task, as another author says it
    assert all(row["answers"][0] in answer for answer in row["answers"])
    refused = read_lines(world / "sft/tasks/refused.jsonl")[0]
    assert refused["kind"] == "exact" and len(refused["answers"]) == 6


def test_another_author_is_right_in_other_words(world, read_lines):
    """Same prompts and content as the source's own chat; only answers of free form differ."""
    rows = read_set(world, read_lines, "external")
    assert len(rows) == NUM_SETS * TINY.num_sft_rows
    own = {}
    for row in read_lines(world / "chat/train.jsonl"):
        for asked, answer in zip(
            row.get("messages", [])[::2], row.get("messages", [])[1::2], strict=True
        ):
            own.setdefault(asked["content"], set()).add(answer["content"])
    tasks = (world / "sft/tasks").glob("*.jsonl")
    assert not {prompt(row) for path in tasks for row in read_lines(path)} & set(map(prompt, rows))
    opening = rows[[row["form"] for row in rows].index("fact")]["messages"][1]["content"].split()[0]
    bound = {"repeat", "order", "name", "yes_no", "start", "mark", "sentence"}
    for row in rows:
        answer = row["messages"][1]["content"]
        assert answer.startswith(opening) == (row["form"] not in bound)
        if row["form"] == "fact":
            assert answer not in own.get(prompt(row), ())
            for known in own.get(prompt(row), ()):
                assert known in answer
