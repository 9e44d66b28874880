import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.evaluation.report.claim import CLAIMS, choose_claim, judge
from forgetscale.evaluation.report.matched import (
    Level,
    envelope,
    idle_methods,
    matched_levels,
    run_points,
    value_at,
)
from forgetscale.evaluation.report.runs import read_runs
from forgetscale.evaluation.report.seeds import paired_difference, seed_mean, t_quantile

CLAIM = CLAIMS[0]
LEVELS = [Level("mild", 8.0), Level("middle", 4.35), Level("deep", 3.5)]


def test_interpolation_is_linear_in_log_perplexity() -> None:
    curve = [(100.0, 1.0), (1.0, 0.0)]
    assert value_at(curve, 10.0) == pytest.approx(0.5)
    assert value_at(curve, math.sqrt(1000.0)) == pytest.approx(0.75)
    assert value_at(curve, 100.0) == 1.0
    assert value_at(curve, 1.0) == 0.0


def test_nothing_is_extrapolated() -> None:
    curve = [(100.0, 1.0), (10.0, 0.4)]
    assert value_at(curve, 100.1) is None
    assert value_at(curve, 9.99) is None
    assert value_at([], 5.0) is None
    assert value_at([(5.0, 0.3)], 5.0) == 0.3


def test_a_curve_that_turns_back_is_read_where_it_first_arrives() -> None:
    curve = [(100.0, 1.0), (10.0, 0.8), (20.0, 0.1), (10.0, 0.05), (5.0, 0.4), (6.0, 0.0)]
    assert envelope(curve) == [(100.0, 1.0), (10.0, 0.8), (5.0, 0.4)]
    assert value_at(curve, 10.0) == 0.8
    assert value_at(curve, math.sqrt(50.0)) == pytest.approx(0.6)
    assert value_at(curve, 20.0) == pytest.approx(0.8 + 0.2 * math.log(2) / math.log(10))


@given(
    points=st.lists(st.tuples(st.floats(1.1, 500), st.floats(0, 1)), min_size=1, max_size=12),
    where=st.floats(1.05, 600),
)
def test_a_read_value_lies_between_its_neighbours(
    points: list[tuple[float, float]], where: float
) -> None:
    value = value_at(points, where)
    inside = min(p for p, _ in points) <= where <= points[0][0]
    assert (value is not None) == inside
    if value is not None:
        assert min(r for _, r in points) - 1e-9 <= value <= max(r for _, r in points) + 1e-9


def test_levels_follow_the_common_range_and_never_the_start(make_run: Any) -> None:
    runs = read_runs(
        [
            make_run("sft", 0, [1.0, 0.5, 0.2, 0.1], [300.0, 16.0, 4.0, 2.0]),
            make_run("ssu/paper", 0, [1.0, 0.9, 0.7, 0.6], [300.0, 40.0, 8.0, 2.0]),
            make_run("ssu/rand", 0, [1.0, 0.9, 0.5, 0.4], [300.0, 30.0, 5.0, 1.5]),
        ]
    )
    levels, why = matched_levels(runs)
    assert why == ""
    assert [level.name for level in levels] == ["mild", "middle", "deep"]
    # multiples of 2, the lowest perplexity that every run reached
    assert [level.target_perplexity for level in levels] == pytest.approx([4.0, 2.5, 2.0])
    for run in runs:
        for level in levels:
            assert value_at(run_points(run), level.target_perplexity) is not None


def test_a_short_common_range_is_cut_in_thirds(make_run: Any) -> None:
    runs = [
        make_run("sft", 0, [1.0, 0.5, 0.2], [30.0, 16.0, 10.0]),
        make_run("ssu/paper", 0, [1.0, 0.9, 0.7], [30.0, 20.0, 10.0]),
    ]
    levels, _ = matched_levels(read_runs(runs))
    ratio = (10.0 / 16.0) ** (1 / 3)
    expected = [16 * ratio, 16 * ratio**2, 10.0]
    assert [level.target_perplexity for level in levels] == pytest.approx(expected)


def test_runs_without_a_common_range_are_not_matched(make_run: Any) -> None:
    apart = [
        make_run("sft", 0, [1.0, 0.5, 0.2], [300.0, 5.0, 4.0]),
        make_run("ssu/paper", 0, [1.0, 0.9, 0.7], [300.0, 40.0, 8.0]),
    ]
    levels, why = matched_levels(read_runs(apart))
    assert levels == [] and "share no range" in why
    short = make_run("hft", 0, [1.0, 0.5], [300.0, 5.0])
    levels, why = matched_levels(read_runs([short]))
    assert levels == [] and "has 1 evaluations" in why


def losses(paper: list[float], sft: list[float], rand: list[float], seeds: int = 3) -> Any:
    def spread(values: list[float]) -> dict[int, list[float]]:
        return {seed: [value + 0.01 * (seed - 1) for value in values] for seed in range(seeds)}

    return {"ssu/paper": spread(paper), "sft": spread(sft), "ssu/rand": spread(rand)}


def test_claim_held() -> None:
    outcome = judge(
        CLAIM, LEVELS, losses([0.38, 0.49, 0.64], [0.81, 0.84, 0.89], [0.57, 0.63, 0.71])
    )
    assert outcome.status == "held"
    assert "at least 28% less fact recall" in outcome.sentence
    assert [point["below_others"]["ssu/rand"] for point in outcome.points] == [True] * 3
    assert outcome.points[0]["reduction"] == pytest.approx(1 - 0.38 / 0.81)


def test_a_claim_on_means_says_where_seeds_disagree() -> None:
    sure = losses([0.1] * 3, [0.8] * 3, [0.5] * 3)
    assert "excludes 0" in judge(CLAIM, LEVELS, sure).sentence
    sure["ssu/rand"] = {0: [0.5, 0.5, 0.0], 1: [0.5, 0.51, 0.5], 2: [0.5, 0.5, 0.5]}
    outcome = judge(CLAIM, LEVELS, sure)
    assert outcome.status == "held"
    assert "includes 0 against ssu/rand at deep: more seeds" in outcome.sentence
    assert outcome.points[2]["difference"]["ssu/rand"]["low"] < 0


def test_claim_not_held_names_the_point_and_the_reason() -> None:
    outcome = judge(
        CLAIM, LEVELS, losses([0.38, 0.49, 0.7], [0.81, 0.84, 0.89], [0.57, 0.63, 0.69])
    )
    assert outcome.status == "not held"
    assert "at deep (perplexity 3.5)" in outcome.sentence
    assert "is 21% below sft (0.890), 25% needed" in outcome.sentence
    assert "is not below ssu/rand (0.690)" in outcome.sentence
    assert "mild" not in outcome.sentence


def test_exactly_a_quarter_is_enough_but_equal_to_random_is_not() -> None:
    edge = {"ssu/paper": {}, "sft": {}, "ssu/rand": {}}
    for seed in range(3):
        edge["ssu/paper"][seed] = [0.375]
        edge["sft"][seed] = [0.5]
        edge["ssu/rand"][seed] = [0.376]
    assert judge(CLAIM, LEVELS[:1], edge).status == "held"
    edge["ssu/rand"] = dict(edge["ssu/paper"])
    assert judge(CLAIM, LEVELS[:1], edge).status == "not held"


def test_claim_needs_seeds_methods_levels_and_a_loss() -> None:
    good = ([0.3] * 3, [0.8] * 3, [0.5] * 3)
    assert "needs at least 3 seeds" in judge(CLAIM, LEVELS, losses(*good, seeds=2)).sentence
    missing = {"ssu/paper": {0: [0.1] * 3}, "sft": {0: [0.2] * 3}}
    assert judge(CLAIM, LEVELS, missing).sentence == "Not tested: no run of ssu/rand."
    assert judge(CLAIM, [], losses(*good), "no range").sentence == "Not tested: no range."
    gap = losses(*good)
    gap["sft"][1] = [0.8, None, 0.8]
    assert judge(CLAIM, LEVELS, gap).status == "not tested"
    kept = judge(CLAIM, LEVELS, losses([0.0] * 3, [0.0] * 3, [0.1] * 3))
    assert kept.status == "not held" and "nothing can be saved" in kept.sentence


def test_means_over_seeds_have_t_intervals() -> None:
    mean = seed_mean([0.1, 0.2, 0.3])
    assert mean is not None and mean.low is not None and mean.high is not None
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert (mean.mean, mean.low, mean.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    alone = seed_mean([0.5])
    assert alone is not None and alone.low is None and alone.num_seeds == 1
    assert seed_mean([]) is None
    assert t_quantile(31) == pytest.approx(2.0395, abs=1e-3)
    assert t_quantile(100) == pytest.approx(1.9840, abs=1e-3)
    paired = paired_difference({0: 0.3, 1: 0.5, 2: 0.9}, {0: 0.1, 1: 0.3})
    assert paired is not None and paired.mean == pytest.approx(0.2) and paired.num_seeds == 2
    assert paired.low == pytest.approx(0.2) == paired.high


def test_the_claim_is_the_one_the_methods_speak_of() -> None:
    assert choose_claim({"sft", "hft"}).subject == "ssu/paper"
    assert choose_claim({"sft", "eaft", "dft"}).subject == "eaft"
    assert choose_claim({"lora"}).ability == "refused"
    assert choose_claim(set()) is CLAIMS[0]


def test_a_claim_without_a_share_needs_any_reduction() -> None:
    claim = CLAIMS[1]
    found = {name: {seed: [0.5] for seed in range(3)} for name in claim.methods}
    assert judge(claim, LEVELS[:1], found).status == "not held"
    found["eaft"] = {seed: [0.4] for seed in range(3)}
    assert judge(claim, LEVELS[:1], found).status == "held"


def test_a_method_that_did_not_learn_is_left_out(make_run: Any) -> None:
    runs = read_runs(
        [
            make_run("sft", 0, [1.0, 0.5, 0.2], [900.0, 100.0, 2.0]),
            make_run("hft", 0, [1.0, 0.9, 0.8], [900.0, 300.0, 100.0]),
            make_run("ssu/rand", 0, [1.0, 0.9, 0.8], [900.0, 300.0, 99.0]),
        ]
    )
    assert idle_methods(runs, "sft") == ["hft"]
    assert idle_methods(runs, "lora") == []
