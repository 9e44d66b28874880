"""Rows with padding and document masks through real training steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from forgetscale.data import TokenSet
from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs


@pytest.fixture(scope="module")
def padded(runs: Runs) -> str:
    world = runs.world()
    return str(tiny.make_padded_set(world / "padded", world / "model"))


def first_losses(runs: Runs, padded: str, rows: list[int], *, apart: bool) -> tuple[float, int]:
    """Mean loss of the source model on rows, by transformers alone, and their targets."""
    model = AutoModelForCausalLM.from_pretrained(runs.world() / "model").double()
    token_set = TokenSet(padded)
    total, count = 0.0, 0
    for row in rows:
        ids = token_set.read([row])[0]
        lens = [piece.num_tokens for piece in token_set.document_pieces(row)]
        texts = ids[: sum(lens)].split(lens if apart else [sum(lens)])
        for text in texts:
            if len(text) > 1:
                with torch.no_grad():
                    logits = model(text[None]).logits[0, :-1]
                total += nn.functional.cross_entropy(logits, text[1:], reduction="sum").item()
                count += len(text) - 1
    return total / count, count


@pytest.mark.parametrize("mask", [False, True])
def test_padding_is_no_target_and_masked_documents_are_alone(runs: Runs, padded: str, mask: bool):
    assert TokenSet(padded).num_padding_tokens > 0
    changes = {"data__path": padded, "data__document_mask": mask}
    one, two = (runs.get("ssu", size, **changes) for size in (1, 2))
    loss, count = first_losses(runs, padded, one.rows[0], apart=mask)
    assert one.losses[0] == pytest.approx(loss, rel=1e-5)
    assert one.metrics[0]["target_tokens"] == count == two.metrics[0]["target_tokens"]
    assert two.losses == pytest.approx(one.losses, rel=2e-5)
    assert_same_weights(two.masters, one.masters)
    expected = TokenSet(padded).targets_per_row(document_mask=mask) * TokenSet(padded).num_rows
    _, everything = first_losses(runs, padded, range(TokenSet(padded).num_rows), apart=mask)
    assert expected == everything


def test_padded_calibration_rows_are_refused(ranks: RankServer, runs: Runs, padded: str):
    recipe = runs.recipe("padded-calibration", SSU)
    recipe["method"]["calibration"]["path"] = padded
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    assert "has rows with padding, which would count as source data" in outcome.errors[0]
