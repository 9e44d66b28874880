"""Token losses whatever the cut of a step: uneven targets, ranks without any, micro-batches."""

from __future__ import annotations

import re

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Run, Runs

EAFT = {**SSU, "loss": {"kind": "eaft", "divisor": 3.0}}
WEIGHTS = {"kind": "sft", "loss": {"kind": "eaft", "top_k": 6, "normalize": "weights"}}


def assert_same(run: Run, expected: Run, rel: float = 3e-6) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=rel)
    for name in ("method/mean_gate", "method/gated_fraction", "method/cross_entropy"):
        found, wanted = ([line[name] for line in item.metrics] for item in (run, expected))
        # A weight at the border of the count may fall to either side.
        assert found == pytest.approx(wanted, rel=rel, abs=0.01 if "gated" in name else 0.0)
    assert_same_weights(run.masters, expected.masters)


@pytest.fixture(scope="module")
def uneven(runs: Runs) -> str:
    """Rows with padding: ranks hold different numbers of targets."""
    world = runs.world()
    return str(tiny.make_padded_set(world / "uneven", world / "model", seed=6))


@pytest.mark.parametrize("method", [EAFT, WEIGHTS], ids=["tokens", "weights"])
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_uneven_targets(runs: Runs, uneven: str, method: dict, size: int):
    changes = {"data__path": uneven, "data__document_mask": True}
    one, many = (runs.get(method, n, **changes) for n in (1, size))
    assert len({line["target_tokens"] for line in one.metrics}) == len(one.metrics)
    assert_same(many, one, rel=2e-5)


@pytest.mark.parametrize("method", [EAFT, WEIGHTS], ids=["tokens", "weights"])
def test_rank_without_any_target(runs: Runs, method: dict):
    """Two rows a step: of three ranks one sees nothing but masked positions, and takes part."""
    one, three = (runs.get(method, n, train__global_batch_size=2) for n in (1, 3))
    assert any(value["rows"][0] == [] for value in three.outcome.values)
    assert_same(three, one)


@pytest.mark.parametrize("method", [EAFT, WEIGHTS], ids=["tokens", "weights"])
@pytest.mark.parametrize(
    ("micro", "chunk", "size"),
    [
        pytest.param(1, 13, 2, marks=pytest.mark.long),
        pytest.param(7, 1024, 1, marks=pytest.mark.long),
        (3, 5, 3),
    ],
)
def test_cut_of_the_step(runs: Runs, method: dict, micro: int, chunk: int, size: int):
    # With micro-batches of 1 and two ranks one of them passes a micro-batch without a target.
    changes = {"train__micro_batch_size": micro, "train__loss_chunk_size": chunk}
    assert_same(runs.get(method, size, **changes), runs.get(method, 1))


RANDOM = {**SSU, "loss": {"kind": "random_gate", "mean_gate": 0.4, "normalize": "weights"}}


@pytest.mark.parametrize(
    ("micro", "size"), [(1, 2), (3, 3), pytest.param(7, 1, marks=pytest.mark.long)]
)
def test_random_gate_belongs_to_the_token(runs: Runs, micro: int, size: int):
    assert_same(runs.get(RANDOM, size, train__micro_batch_size=micro), runs.get(RANDOM, 1))


def test_random_gate_has_its_mean_and_follows_the_seed(runs: Runs):
    run, other = runs.get(RANDOM, 1), runs.get(RANDOM, 1, run__seed=4)
    gates = [line["method/mean_gate"] for line in run.metrics]
    # 161 targets a step: the mean of 966 weights with a deviation of 0.33.
    assert sum(gates) / len(gates) == pytest.approx(0.4, abs=0.05)
    assert gates[0] != [line["method/mean_gate"] for line in other.metrics][0]


def test_constant_gate_is_cross_entropy_times_a_number(runs: Runs):
    plain = runs.get("sft", 1)
    run = runs.get({"kind": "sft", "loss": {"kind": "constant_gate", "mean_gate": 0.25}}, 2)
    assert run.losses[0] == pytest.approx(0.25 * plain.losses[0], rel=1e-6)
    assert run.metrics[0]["grad_norm"] == pytest.approx(0.25 * plain.metrics[0]["grad_norm"])
    assert run.metrics[0]["method/cross_entropy"] == pytest.approx(plain.losses[0], rel=1e-6)


def test_power_0_is_plain_training_bit_for_bit(runs: Runs):
    plain = runs.get("ssu", 2)
    run = runs.get({**SSU, "loss": {"kind": "eaft", "alpha": 0}}, 2)
    assert run.losses == plain.losses
    assert all(torch.equal(run.masters[name], w) for name, w in plain.masters.items())


def test_weights_of_which_none_is_left(runs: Runs):
    """A hard mask above the largest entropy drops every token; only decay is left."""
    loss = {"kind": "eaft", "gate": "hard", "threshold": 2.0, "normalize": "weights"}
    run = runs.get({"kind": "sft", "loss": loss}, 2, optim__weight_decay=0.0)
    assert run.losses == [0.0] * 6
    assert [line["method/gated_fraction"] for line in run.metrics] == [1.0] * 6
    for name, weight in run.masters.items():
        assert torch.equal(weight, run.source[name].float()), name


@pytest.mark.parametrize("offload", [False, True])
def test_weights_with_bf16_gradients(runs: Runs, offload: bool):
    world = runs.world("bf16", dtype=torch.bfloat16)
    changes = {"model__dtype": "bfloat16", "train__accumulation_dtype": "bfloat16"}
    run = runs.get(WEIGHTS, 2, world=world, offload=offload, **changes)
    expected = runs.get(WEIGHTS, 1, world=world, model__dtype="bfloat16")
    assert run.losses == pytest.approx(expected.losses, rel=1e-2)
    norms = [[line["grad_norm"] for line in item.metrics] for item in (run, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)


def test_top_k_above_the_vocabulary_stops_before_the_model_is_built(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("wide", {"kind": "eaft", "top_k": tiny.VOCAB_SIZE + 1})
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    words = f"method.loss.top_k is {tiny.VOCAB_SIZE + 1}, but .* has a vocabulary of 67; lower it."
    assert any(re.search(words, text) for text in outcome.errors)
