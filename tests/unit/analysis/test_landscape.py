"""Numbers and page of the landscape: quadrants, envelope, samples; self-contained and escaped."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from forgetscale.analysis.landscape_numbers import (
    QUADRANTS,
    Borders,
    by_group,
    conflict_of,
    envelope,
    outside_envelope,
    quadrant_of,
    summary,
    transitions,
)
from forgetscale.analysis.landscape_page import render
from forgetscale.analysis.landscape_texts import pieces_of

BORDERS = Borders()
# Sure of another token, sure of this one, sure of nothing, and one of several.
P = np.array([0.001, 0.98, 0.02, 0.4])
H = np.array([0.05, 0.11, 3.0, 1.2])
TOKENS = {
    "log_prob": np.log(P),
    "entropy": H,
    "gate": np.array([0.02, 0.04, 0.9, 0.4]),
    "gradient": np.array([1.4, 0.03, 0.99, 0.7]),
    "best": np.array([5, 6, 7, 8]),
    "best_log_prob": np.log([0.99, 0.98, 0.1, 0.5]),
}


def test_quadrants():
    assert [QUADRANTS[n] for n in quadrant_of(TOKENS, BORDERS)] == [
        "conflict", "mastered", "uncertain", "open",
    ]  # fmt: skip
    wide = Borders(entropy=5.0, probability=0.05)
    assert quadrant_of(TOKENS, wide).tolist() == [0, 1, 0, 1]


def test_borders_belong_to_the_conflict():
    edge = {"log_prob": np.log([0.1]), "entropy": np.array([0.5])}
    assert quadrant_of(edge, BORDERS).tolist() == [0]


def test_conflict_is_what_the_gate_takes():
    assert conflict_of(TOKENS, BORDERS) == pytest.approx([0.98 * -math.log(0.001), 0, 0, 0])


def test_summary():
    found = summary(TOKENS, BORDERS, 50)
    assert found["num_tokens"] == 4 and found["outside_envelope"] == 0
    assert found["mean_gate"] == pytest.approx(0.34)
    assert found["high_entropy_share"] == 0.25
    for mass in ("tokens", "loss", "gradient", "gated_loss", "gated_gradient"):
        assert sum(item[mass] for item in found["quadrants"].values()) == pytest.approx(1)
    conflict = found["quadrants"]["conflict"]
    assert conflict["tokens"] == 0.25 and conflict["mean_gate"] == 0.02
    assert conflict["gradient"] == pytest.approx(1.4 / 3.12)
    gated = 0.02 * 1.4 + 0.04 * 0.03 + 0.9 * 0.99 + 0.4 * 0.7
    assert conflict["gated_gradient"] == pytest.approx(0.02 * 1.4 / gated)
    assert np.sum(found["histogram"]["counts"]) == 4


def test_envelope():
    low, high = envelope(np.array([0.0, 0.5, 1.0]), 50)
    assert low == pytest.approx([0, math.log(2), 0])
    assert high == pytest.approx([math.log(49), math.log(2) + 0.5 * math.log(49), 0])
    inside = {"log_prob": np.log([0.5, 0.5]), "entropy": np.array([0.7, 2.6])}
    assert not outside_envelope(inside, 50).any()
    beyond = {"log_prob": np.log([0.5, 0.5]), "entropy": np.array([0.6, 2.7])}
    assert outside_envelope(beyond, 50).all()


def test_the_pilot_mask_has_its_own_borders():
    p = np.linspace(0.01, 1, 100)
    tokens = {**TOKENS, "log_prob": np.log(p), "entropy": p, "gate": p, "gradient": p}
    found = summary(tokens, BORDERS, 10)["pilot_mask"]
    assert found["share"] == pytest.approx(0.15) and found["entropy"] == pytest.approx(0.1585)
    assert summary({**tokens, "entropy": 1 - p}, BORDERS, 10)["pilot_mask"]["share"] == 0


def test_transitions():
    after = {**TOKENS, "entropy": np.array([3.0, 0.11, 3.0, 1.2])}
    counts = transitions(TOKENS, after, BORDERS)
    assert counts == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_groups():
    first, second, none = by_group(TOKENS, np.array([0, 0, 1, 1]), 3, BORDERS)
    assert (first["tokens"], first["conflicts"]) == (2, 1)
    assert first["conflict_nats"] == pytest.approx(0.98 * -math.log(0.001))
    assert second["conflicts"] == 0 and second["mean_gate"] == pytest.approx(0.65)
    assert second["cross_entropy"] == pytest.approx(-np.log([0.02, 0.4]).mean())
    assert none["tokens"] == 0


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "übermäßig 漢字 ok", ""])
def test_pieces_join_to_the_text(text: str):
    ids = list(text.encode())
    found = pieces_of(Bytes(), ids)
    assert len(found) == len(ids) and "".join(found) == text


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += data


def page_data(models: int) -> dict:
    views = [{"name": f"m<{n}>", "path": f"models/{n}", "model_hash": "ab" * 32}
             | summary(TOKENS, BORDERS, 50) for n in range(models)]  # fmt: skip
    groups = by_group(TOKENS, np.array([0, 0, 0, 0]), 1, BORDERS)[0]
    each = {view["name"]: groups for view in views}
    token = {"probability": 0.001, "best_probability": 0.99, "entropy": 0.05, "gate": 0.02}
    return {
        "title": "Landscape of <chats>",
        "num_tokens": 4, "num_texts": 1, "num_rows": 1, "num_rows_in_all": 9, "vocab_size": 50,
        "borders": {"entropy": 0.5, "probability": 0.1},
        "models": views,
        "quadrants": list(QUADRANTS),
        "transitions": transitions(TOKENS, TOKENS, BORDERS) if models > 1 else None,
        "sources": [{"name": f"file-{n}.jsonl", "models": each} for n in range(2)],
        "texts": [{
            "set": "chats", "row": 3, "source": "a.jsonl:7", "models": each,
            "shown": [
                {"text": "<script>"},
                {"text": " Paris", "quadrant": "conflict", "conflict_nats": 6.8,
                 "model_says": '"Rome"', **token},
            ],
        }],
        "tokens": [{
            "set": "chats", "row": 3, "place": 8, "source": "a.jsonl:7", "before": "the & ",
            "target": "Paris", "model_says": "Rome", "conflict_nats": 6.8,
            "models": {view["name"]: token for view in views},
        }],
        "data": {"chats": "cd" * 32},
        "made_by": {"command": ["forgetscale"], "time": "2026-01-01T00:00:00Z"},
    }  # fmt: skip


@pytest.mark.parametrize("models", [1, 2, 3])
def test_page(models: int):
    text = render(page_data(models))
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("svg") == models
    assert "script" not in reader.tags and "link" not in reader.tags and "img" not in reader.tags
    assert all(link.startswith("#") for link in reader.links)
    assert not re.search(r"https?://", text)
    assert "<script>" in reader.text and "Landscape of <chats>" in reader.text
    assert ("Where targets went" in reader.text) == (models > 1)
    assert "25.0% of the targets contradict what m<0> is sure of" in reader.text


def test_page_without_any_conflict():
    data = page_data(1) | {"texts": [], "tokens": [], "sources": []}
    assert "No target is a conflict." in render(data)
