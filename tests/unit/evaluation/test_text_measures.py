"""chrF++ and code-mixing of answers, and tasks in Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetscale.errors import DataError
from forgetscale.evaluation import EvaluationOptions, evaluate_model, load_chat_task
from forgetscale.evaluation.degradation import is_averaged
from forgetscale.evaluation.forced import MeasureSettings
from forgetscale.evaluation.mixing import measure_mixing, script_counts
from forgetscale.evaluation.tasks import ChatTask, Question
from forgetscale.evaluation.text_measures import (
    chrf_measures,
    chrf_signature,
    mixing_measures,
)

sacrebleu = pytest.importorskip("sacrebleu", reason="pip install 'forgetscale[eval]'")
pytest.importorskip("pycld2", reason="pip install 'forgetscale[eval]'")
pytest.importorskip("langdetect", reason="pip install 'forgetscale[eval]'")

SETTINGS = MeasureSettings(batch_size=2, seed=0, num_resamples=1000)
ENGLISH = "The capital of France is Paris and the weather there is nice today."
AMHARIC = "ሰላም ለዓለም ይህ የአማርኛ ጽሑፍ ነው"
NEPALI = "नेपालको राजधानी काठमाडौं हो र त्यहाँ धेरै मन्दिरहरू छन्"
HAUSA = "Sannu da zuwa, yaya aikin ka yau? Ina fata komai lafiya a gida."


def question(number: int, kind: str, **more: Any) -> Question:
    return Question(str(number), ({"role": "user", "content": "q"},), kind, **more)


def task_of(kind: str, *questions: Question) -> ChatTask:
    return ChatTask("translate", kind, questions, "hash")


def test_chrf_is_that_of_sacrebleu_as_a_corpus_and_by_sentence():
    references = [["the cat sat on the mat", "a cat was sitting"], ["hello there"], ["one two"]]
    answers = ["the cat sat on a mat", "hello you there", "three"]
    task = task_of(
        "chrf", *(question(n, "chrf", answers=tuple(r)) for n, r in enumerate(references))
    )
    (corpus, sentence), scores = chrf_measures(task, answers, SETTINGS)
    metric = sacrebleu.CHRF(word_order=2)
    padded = [[each[min(n, len(each) - 1)] for each in references] for n in (0, 1)]
    assert corpus.value == pytest.approx(metric.corpus_score(answers, padded).score)
    expected = [metric.sentence_score(a, r).score for a, r in zip(answers, references, strict=True)]
    assert scores == pytest.approx(expected)
    assert sentence.value == pytest.approx(np.mean(expected))
    assert corpus.value != pytest.approx(sentence.value), "the two are different numbers"
    for item in (corpus, sentence):
        assert item.low <= item.value <= item.high and item.higher_is_better
    assert chrf_signature().startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:")


@pytest.mark.parametrize(
    ("answer", "language", "mixed"),
    [
        (ENGLISH, "en", False),
        (ENGLISH, "am", True),
        (AMHARIC, "am", False),
        (NEPALI, "ne", False),
        (HAUSA, "ha", False),
        (HAUSA, "en", True),
        (f"{ENGLISH} {AMHARIC}", "en", True),
        ("42", "en", False),
        ("", "en", False),
    ],
)
def test_answers_are_mixed_or_not(answer: str, language: str, mixed: bool):
    assert measure_mixing(answer, language).mixed == mixed


def test_lines_words_and_letters_see_what_the_whole_answer_hides():
    long = " ".join([ENGLISH] * 12)
    found = measure_mixing(f"{long}\n{AMHARIC}\n{ENGLISH}", "en")
    assert (found.lines, found.lines_mixed) == (3, 1)
    assert found.words_mixed == len(AMHARIC.split())
    assert found.letters_other == sum(letter.isalpha() for letter in AMHARIC)
    inserted = measure_mixing(f"{long} {AMHARIC.split()[0]} {long}", "en")
    assert not inserted.mixed and inserted.lines_mixed == 0, "one word in hundreds is not seen"
    assert inserted.words_mixed == 1
    latin = measure_mixing(f"{ENGLISH} {ENGLISH}\n{HAUSA} {HAUSA}", "en")
    assert latin.lines_mixed == 1 and latin.letters_other == 0, "scripts do not tell these apart"


def test_scripts_are_exact():
    assert script_counts("abc ሰላ 12 नेपाल", "en") == (8, 5)
    assert script_counts("abc ሰላ", "am") == (5, 3)


def test_shares_are_over_all_lines_and_words_and_stay_out_of_the_average():
    task = task_of(
        "language_mixing",
        *(question(n, "language_mixing", meta={"language": "en"}) for n in range(3)),
    )
    results, values = mixing_measures(task, [ENGLISH, AMHARIC, ""], SETTINGS)
    found = {item.metric: item for item in results}
    assert values == [0.0, 1.0, 0.0]
    assert found["answers_mixed"].value == pytest.approx(1 / 3)
    assert found["answers_mixed_langid"].value == pytest.approx(1 / 3)
    assert found["lines_mixed"].value == pytest.approx(1 / 2)
    words = len(AMHARIC.split())
    assert found["words_mixed"].value == pytest.approx(words / (words + len(ENGLISH.split())))
    assert not any(item.higher_is_better or is_averaged(item) for item in results)


def rows_of(kind: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "kind": kind, "messages": [{"role": "user", "content": "lo?"}], **more}
        for n in range(3)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_kinds_are_measured_from_files_on_any_number_of_ranks(
    model_dir: Path, tmp_path: Path, run_ranks: Any
) -> None:
    write_jsonl(tmp_path / "mt.jsonl", rows_of("chrf", answers=["mika lo"]))
    rows = rows_of("language_mixing", meta={"language": "en"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixing.parquet")
    published = {
        "key": 7,
        "prompt": "lo?",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    write_jsonl(tmp_path / "ifeval.jsonl", [published])
    outcomes = []
    for size in (1, 2):
        outcomes += run_ranks(
            size,
            lambda ranks, size=size: evaluate_model(
                model_dir,
                ["mt", "mixing", "ifeval"],
                tmp_path,
                tmp_path / f"out-{size}",
                collective=ranks,
                batch_size=1,
                max_new_tokens=12,
                options=EvaluationOptions(dtype="float32", device="cpu"),
            ),
        )
    assert outcomes == [outcomes[0]] * 3
    assert [item.metric for item in outcomes[0]][:3] == [
        "chrf++",
        "chrf++_sentence",
        "answers_mixed",
    ]
    shares = {item.metric: item.value for item in outcomes[0] if item.task == "ifeval"}
    assert shares == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": 0.5,
        "prompt_level_loose_acc": 0.0,
        "inst_level_loose_acc": 0.5,
    }
    stored = json.loads((tmp_path / "out-1" / "results.json").read_text())
    assert stored["settings"]["chrf"] == chrf_signature()


def test_parquet_rows_are_the_same_task_as_json_lines(tmp_path: Path) -> None:
    rows = rows_of("exact", answers=["mika"])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "a" / "t.jsonl", rows)
    # Null columns, as they come from tables in which other rows use them.
    table = pa.Table.from_pylist([{**row, "meta": None} for row in rows])
    pq.write_table(table, tmp_path / "b" / "t.parquet")
    tasks = [load_chat_task(tmp_path / name, "t") for name in ("a", "b")]
    assert tasks[0].task_hash == tasks[1].task_hash
    write_jsonl(tmp_path / "b" / "t.jsonl", rows)
    with pytest.raises(DataError, match="are both there"):
        load_chat_task(tmp_path / "b", "t")
    (tmp_path / "b" / "t.jsonl").unlink()
    (tmp_path / "b" / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="not readable as Parquet"):
        load_chat_task(tmp_path / "b", "t")
    write_jsonl(tmp_path / "c.jsonl", rows_of("language_mixing", meta={"language": "English"}))
    with pytest.raises(DataError, match="two-letter code of the language"):
        load_chat_task(tmp_path, "c")
    write_jsonl(tmp_path / "d.jsonl", rows_of("chrf"))
    with pytest.raises(DataError, match="at least one entry in answers, the references"):
        load_chat_task(tmp_path, "d")
