"""A metric that tasks of lm-evaluation-harness may name beside its own: chrF++ by sentence.

Its own ``chrf++`` is that of a corpus; the SSU paper reports the mean over sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgetscale.evaluation.text_measures import chrf_metric

CORPUS, SENTENCE = "chrf++", "chrf++_sentence"


def _sentence(references: Sequence[str], predictions: Sequence[str], **_: Any) -> float:
    return float(chrf_metric().sentence_score(predictions[0], [references[0]]).score)


def register_metrics() -> None:
    """Make the metric known to the harness, for tasks that generate. Call once."""
    import lm_eval.api.metrics  # noqa: F401  (its own come first: aggregations are looked up)
    from lm_eval.api.registry import register_metric

    register_metric(
        metric=SENTENCE, higher_is_better=True, output_type="generate_until", aggregation="mean"
    )(_sentence)
