"""Parts of data sets as published tables draw them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.errors import DataError
from forgetscale.evaluation.harness.rows import choose_rows, sampled_rows, shortest_rows


def words(text: str, **options: Any) -> dict[str, list[str]]:
    return {"input_ids": text.split()}


@pytest.mark.parametrize(("num_rows", "wanted"), [(30, 5), (1012, 500), (3, 3)])
def test_a_sample_is_that_of_pandas(num_rows: int, wanted: int):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"row": range(num_rows)})
    expected = frame.sample(wanted, random_state=42)["row"].tolist()
    assert sampled_rows(num_rows, wanted) == expected


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_nothing_that_is_left_out_is_shorter(lengths: list[int], data: st.DataObject):
    wanted = data.draw(st.integers(1, len(lengths)))
    rows = shortest_rows(lengths, wanted)
    assert len(rows) == wanted and rows == sorted(set(rows))
    left = set(range(len(lengths))) - set(rows)
    for out in left:
        for row in rows:
            assert (lengths[row], row) < (lengths[out], out)


DOCUMENTS = [{"text": text} for text in ("a b c", "a", "a b", "b", "a b c d")]


def test_options_choose_rows():
    assert choose_rows(DOCUMENTS, {}, words, "f") is None
    shortest = {"shortest": {"rows": 3, "field": "text"}}
    assert choose_rows(DOCUMENTS, shortest, words, "f") == [1, 2, 3]
    assert choose_rows(DOCUMENTS, {"sample": 5}, words, "f") == sampled_rows(5, 5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample": 6}, "asks for 6 rows, but the data hold 5"),
        ({"sample": True}, "sample is True, expected rows > 0"),
        ({"sample": 0}, "sample is 0"),
        ({"shortest": 3}, "expected rows and field"),
        ({"shortest": {"rows": 3, "field": "body"}}, "row 0 of the data has no text 'body'"),
        ({"sample": 1, "shortest": {"rows": 1, "field": "text"}}, "keep one"),
    ],
)
def test_a_choice_that_cannot_be_is_named(options: dict[str, Any], sentence: str):
    with pytest.raises(DataError, match=sentence) as caught:
        choose_rows(DOCUMENTS, options, words, "tasks/f.yaml")
    assert "tasks/f.yaml" in str(caught.value)
