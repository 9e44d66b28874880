"""SFT rows through real training steps: only supervised tokens count, however ranks share them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from forgetscale.data import TokenSet
from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs, read_lines


@pytest.fixture(scope="module")
def path(runs: Runs) -> str:
    world = runs.world()
    return str(tiny.make_sft_set(world / "sft", world / "model"))


@pytest.fixture(scope="module")
def data(path: str) -> dict:
    return {"kind": "sft", "path": path, "shuffle_seed": 5}


def first_loss(runs: Runs, path: str, rows: list[int], *, apart: bool) -> tuple[float, int]:
    """Mean loss of the source model on rows, by transformers alone, and their targets."""
    model = AutoModelForCausalLM.from_pretrained(runs.world() / "model").double()
    token_set = TokenSet(path)
    total, count = 0.0, 0
    for row in rows:
        ids, mask = token_set.read([row])[0], token_set.loss_mask([row])[0]
        lens = [piece.num_tokens for piece in token_set.document_pieces(row)]
        sizes = lens if apart else [sum(lens)]
        for text, wanted in zip(ids.split(sizes), mask.split(sizes), strict=True):
            with torch.no_grad():
                logits = model(text[None]).logits[0, :-1]
            labels = text[1:].masked_fill(~wanted[1:], -100)
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int(wanted[1:].sum())
    return total / count, count


@pytest.mark.parametrize("mask", [True, False])
def test_only_supervised_tokens_count(runs: Runs, path: str, data: dict, mask: bool):
    run = runs.get("ssu", 1, data=data | {"document_mask": mask})
    loss, count = first_loss(runs, path, run.rows[0], apart=mask)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert run.metrics[0]["target_tokens"] == count
    token_set = TokenSet(path)
    expected = token_set.targets_per_row(document_mask=mask) * len(token_set)
    assert expected == first_loss(runs, path, range(len(token_set)), apart=mask)[1]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_any_number_of_ranks(runs: Runs, data: dict, size: int):
    one, many = (runs.get("ssu", n, data=data) for n in (1, size))
    assert one.rows == many.rows
    counts = [line["target_tokens"] for line in one.metrics]
    assert counts == [line["target_tokens"] for line in many.metrics]
    assert many.losses == pytest.approx(one.losses, rel=2e-5)
    assert_same_weights(many.masters, one.masters)
    for name, frozen in many.frozen.items():
        assert torch.equal(many.export[name][frozen], many.source[name][frozen]), name


def test_micro_batches_without_any_target_are_harmless(runs: Runs, path: str, data: dict):
    whole = runs.get("ssu", 1, data=data)
    one_each = runs.get("ssu", 2, data=data, train__micro_batch_size=1)
    empty = ~TokenSet(path).loss_mask(range(30)).any(1)
    assert any(empty[row] for rows in one_each.rows for row in rows), "such a row was met"
    assert one_each.losses == pytest.approx(whole.losses, rel=2e-5)
    assert_same_weights(one_each.masters, whole.masters)


def test_goes_on_bit_equal_after_a_kill(ranks: RankServer, runs: Runs, data: dict):
    recipe = runs.recipe("sft-killed", SSU, changes={"data": data})
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=4)
    ranks.must("training:train", 2, recipe=recipe)
    lines = read_lines(Path(recipe["run"]["output_dir"], "metrics.jsonl"))
    assert [line["loss"] for line in lines] == runs.get("ssu", 2, data=data).losses


def test_not_for_calibration(ranks: RankServer, runs: Runs, path: str):
    recipe = runs.recipe("sft-calibration", SSU)
    recipe["method"]["calibration"]["path"] = path
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    assert "holds SFT rows, but calibration looks at every token" in outcome.errors[0]


def test_member_of_a_mixture(runs: Runs, path: str):
    world = runs.world()
    sets = [
        {"path": str(world / "data"), "weight": 0.5},
        {"kind": "sft", "path": path, "weight": 0.5},
    ]
    section = {"kind": "mixture", "shuffle_seed": 5, "sets": sets}
    one, two = (runs.get("sft", n, data=section, train__global_batch_size=8) for n in (1, 2))
    assert two.losses == pytest.approx(one.losses, rel=2e-5)
    assert_same_weights(two.masters, one.masters)
    last = one.metrics[-1]
    assert last["data/row_share/sft"] == 0.5
    mean = float(TokenSet(path).targets_per_row(document_mask=True))
    expected = mean / (mean + tiny.BLOCK_SIZE - 1)
    assert last["data/target_share/sft"] == pytest.approx(expected)
    text = TokenSet(world / "data")
    for rows, line in zip(one.rows[:1], one.metrics, strict=False):
        # Rows alternate: text at even places, conversations at odd ones.
        assert len(rows) == 8
        chats = int(TokenSet(path).loss_mask(rows[1::2]).sum())
        assert line["target_tokens"] == chats + 4 * (text.block_size - 1)
