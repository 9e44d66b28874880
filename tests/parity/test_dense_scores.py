"""Scores with gradients and Hessians against dense fp64 ones, on 1, 2 and 3 ranks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.methods.ssu.gradients import uniform_numbers
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs, load_weights
from tests.parity import reference

SAMPLED = {**SSU, "score": "fisher", "fisher": {"labels": "sampled"}}
METHODS = {
    "fisher": {**SSU, "score": "fisher"},
    "sampled": SAMPLED,
    "sgpt_true": {**SSU, "score": "sgpt_true"},
    "sgpt_official": {**SSU, "score": "sgpt_official"},
}
ROWS = torch.from_numpy(tiny.set_rows(rows=19, seed=2)).long()[list(range(0, 19, 2))[:7]]


@pytest.fixture(scope="module")
def found(ranks: RankServer, runs: Runs) -> dict[int, list[dict]]:
    """Scores of every method, by number of ranks, as each rank has them."""
    recipes = {name: runs.recipe("scores", method) for name, method in METHODS.items()}
    recipes["recomputed"] = runs.recipe(
        "scores", METHODS["fisher"], {"model.activation_checkpointing": True}
    )
    return {size: ranks.must("plans:scores", size, recipes=recipes).values for size in (1, 2, 3)}


@pytest.fixture(scope="module")
def expected(runs: Runs) -> dict[str, dict[str, torch.Tensor]]:
    folder = runs.world() / "model"
    return {
        "fisher": reference.fisher_scores(folder, ROWS),
        "sampled": reference.fisher_scores(folder, ROWS, drawn_labels(folder)),
        "sgpt_true": reference.sgpt_scores(folder, ROWS, published=False),
        "sgpt_official": reference.sgpt_scores(folder, ROWS, published=True),
    }


def drawn_labels(folder) -> torch.Tensor:
    """Draw labels from the dense model with the run's numbers, by counting what lies below."""
    with torch.no_grad():
        share = reference.DenseOlmo2(folder).logits(ROWS)[:, :-1].softmax(-1).cumsum(-1)
    # The number of a label belongs to its own position, so the first one is not used.
    numbers = torch.stack([uniform_numbers(3, block, tiny.BLOCK_SIZE)[1:] for block in range(7)])
    return (share <= numbers[..., None]).sum(-1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_the_dense_ones(found, expected, method: str, size: int):
    for rank in found[size]:
        assert set(rank[method]) == set(expected[method])
        for name, exact in expected[method].items():
            score = rank[method][name]
            assert score.dtype == torch.float32
            assert torch.allclose(score.double(), exact, rtol=2e-4, atol=1e-5 * exact.max()), name


def test_the_same_for_any_number_of_ranks(found):
    first = found[1][0]
    for size in (1, 2, 3):
        for rank in found[size]:
            for method in METHODS:
                for name, score in first[method].items():
                    # One rounding to fp32 of fp64 sums in another order.
                    assert torch.allclose(rank[method][name], score, rtol=2e-7, atol=0), name


def test_drawn_labels_are_not_the_data(found):
    fisher, sampled = found[1][0]["fisher"], found[1][0]["sampled"]
    assert not any(torch.allclose(fisher[name], sampled[name], rtol=1e-2) for name in fisher)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_recomputed_layers_give_the_same_fisher(found, size: int):
    for rank in found[size]:
        for name, score in rank["fisher"].items():
            assert torch.equal(rank["recomputed"][name], score), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nothing_of_the_backward_passes_stays(found, size: int):
    for rank in found[size]:
        for method in [*METHODS, "recomputed"]:
            for what in ("gathered", "gradients", "training"):
                assert rank[f"{method}/{what}"] == [], (method, what)


@pytest.mark.parametrize(
    ("architecture", "tied"), [(tiny.qwen2, True), (tiny.llama, False)], ids=["qwen2", "llama"]
)
def test_biases_and_other_norms_as_plain_autograd(
    ranks: RankServer, runs: Runs, architecture, tied: bool
):
    folder = runs.world(f"scores-{architecture.__name__}", architecture=architecture, tied=tied)
    recipe = runs.recipe("scores", METHODS["fisher"], world=folder)
    found = ranks.must("plans:scores", 2, recipes={"fisher": recipe}).value["fisher"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    exact = {name: torch.zeros(p.shape[-1]).double() for name, p in model.named_parameters()}
    for row in ROWS:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, param in model.named_parameters():
            exact[name] += param.grad.pow(2).reshape(-1, param.shape[-1]).sum(0) / len(ROWS)
    assert sum("bias" in name for name in found) == (6 if architecture is tiny.qwen2 else 0)
    for name, score in found.items():
        scale = exact[name].max()
        assert torch.allclose(score.double(), exact[name], rtol=2e-4, atol=1e-5 * scale), name


def test_bf16_error_is_at_most_twice_that_of_plain_bf16(ranks: RankServer, runs: Runs):
    folder = runs.world("scores-bf16", dtype=torch.bfloat16)
    recipe = runs.recipe("scores", METHODS["fisher"], {"model.dtype": "bfloat16"}, world=folder)
    ours = ranks.must("plans:scores", 2, recipes={"fisher": recipe}).value["fisher"]
    exact = reference.fisher_scores(folder / "model", ROWS)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    plain = {name: torch.zeros(len(value)).double() for name, value in exact.items()}
    params = dict(model.named_parameters())
    for row in ROWS:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name in plain:
            grad = params[name].grad.double()
            plain[name] += grad.pow(2).reshape(-1, grad.shape[-1]).sum(0) / len(ROWS)

    def error(values: dict[str, torch.Tensor]) -> float:
        return sum(float((values[n].double() / exact[n] - 1).abs().mean()) for n in exact)

    assert error(ours) <= 2 * error(plain)


def test_a_plan_remembers_its_estimator(ranks: RankServer, runs: Runs):
    """A plan of the empirical Fisher does not serve a recipe that asks for the true one."""
    made = runs.get(METHODS["fisher"], 1)
    header = json.loads((made.folder / "plan" / "manifest.json").read_text())
    assert header["payload"]["provenance"]["fisher"] == {"labels": "data"}
    given = {**SAMPLED, "plan": str(made.folder / "plan")}
    outcome = ranks.run("training:command", 1, recipe=runs.recipe("estimator", given))
    assert outcome.codes == [2]
    assert "was made with method.fisher {'labels': 'data'}" in outcome.errors[0]


@pytest.mark.parametrize("size", [1, 2])
def test_training_after_fisher_is_bit_equal_to_training_with_its_plan(runs: Runs, size: int):
    made = runs.get(METHODS["fisher"], size)
    given = runs.get({**METHODS["fisher"], "plan": str(made.folder / "plan")}, size)
    assert given.losses == made.losses
    assert all(torch.equal(given.masters[name], w) for name, w in made.masters.items())
    exported, source = load_weights(made.folder / "export"), made.source
    for name, frozen in made.frozen.items():
        assert torch.equal(exported[name][frozen], source[name][frozen])
