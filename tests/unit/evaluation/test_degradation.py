import pytest

from forgetscale.evaluation import Result
from forgetscale.evaluation.degradation import (
    ability_name,
    is_target,
    name_abilities,
    relative_change,
    relative_degradation,
)


def result(
    task: str, value: float, *, metric: str = "accuracy", higher: bool = True, kind: str = "exact"
) -> Result:
    return Result(task, metric, value, 100, value, value, "hash", higher, kind)


def test_paper_numbers_are_reproduced() -> None:
    """IFEval, GSM8K and safety of FFT at 7B: -32.4, -23.6 and -6.3 %."""
    before = {n: result(n, v) for n, v in (("ifeval", 0.675), ("gsm8k", 0.796), ("safe", 0.851))}
    after = {n: result(n, v) for n, v in (("ifeval", 0.456), ("gsm8k", 0.608), ("safe", 0.797))}
    average, changes = relative_degradation(before, after)
    assert changes == pytest.approx({"ifeval": -0.324, "gsm8k": -0.236, "safe": -0.063}, abs=1e-3)
    assert average == pytest.approx(sum(changes.values()) / 3)


def test_where_less_is_better_the_sign_is_turned() -> None:
    rate = {"metric": "rate", "higher": False, "kind": "no_refusal"}
    change = relative_change(result("o", 0.02, **rate), result("o", 0.12, **rate))
    assert change == pytest.approx((0.88 - 0.98) / 0.98)
    nats = {"metric": "perplexity", "higher": False, "kind": "perplexity"}
    change = relative_change(result("p", 5.0, **nats), result("p", 6.0, **nats))
    assert change == pytest.approx(-0.2)


def test_average_leaves_out_target_mixing_and_perplexity() -> None:
    def tasks(scale: float) -> dict[str, Result]:
        found = [
            result("recall", 0.8 * scale),
            result("target_recall", 0.1 / scale),
            result("code_mixing", 0.4 * (1 - scale), metric="rate", higher=False),
            result("perplexity/source", 5 / scale, metric="perplexity", higher=False),
            result("perplexity/source", 2 / scale, metric="bits_per_byte", higher=False),
        ]
        return {ability_name(one): one for one in found}

    average, changes = relative_degradation(tasks(1.0), tasks(0.5))
    assert average == pytest.approx(-0.5)
    assert set(changes) == {
        "recall", "target_recall", "code_mixing", "perplexity/source", "bits_per_byte/source",
    }  # fmt: skip


def test_a_task_of_several_metrics_counts_once() -> None:
    def measured(scale: float) -> dict[str, Result]:
        return name_abilities(
            [
                result("ifeval", 0.6 * scale, metric="prompt_level_strict_acc", kind="ifeval"),
                result("ifeval", 0.9, metric="inst_level_loose_acc", kind="ifeval"),
                result("mt", 30.0, metric="chrf++", kind="chrf"),
                result("mt", 40.0 * scale, metric="chrf++_sentence", kind="chrf"),
                result("perplexity/source", 5.0, metric="perplexity", higher=False),
                result("perplexity/source", 2.0, metric="bits_per_byte", higher=False),
            ]
        )

    before, after = measured(1.0), measured(0.5)
    assert before["ifeval"].metric == "prompt_level_strict_acc"
    assert before["mt"].metric == "chrf++_sentence"
    assert set(before) == {
        *("ifeval", "ifeval inst_level_loose_acc", "mt", "mt chrf++"),
        *("perplexity/source", "bits_per_byte/source"),
    }
    average, changes = relative_degradation(before, after)
    assert average == pytest.approx(-0.5), "the other metrics of a task do not count again"
    assert changes["mt chrf++"] == 0.0


def test_undefined_changes_are_left_out_and_other_contents_refused() -> None:
    assert relative_change(result("a", 0.0), result("a", 0.5)) is None
    assert relative_degradation({"a": result("a", 0.0)}, {"a": result("a", 0.5)}) == (None, {})
    with pytest.raises(ValueError, match="cannot compare"):
        relative_change(result("a", 0.1), result("b", 0.1))


def test_target_abilities_are_known_by_name() -> None:
    assert is_target("perplexity/target") and is_target("target_recall")
    assert is_target("bits_per_byte/target")
    assert is_target("lm_eval/belebele_target") and is_target("lm_eval/target_to_source chrf++")
    assert not is_target("recall") and not is_target("perplexity/source")
