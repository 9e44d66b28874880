"""Freeze plans: the same for any number of ranks, from real tokens alone, without a trace after."""

from __future__ import annotations

import pytest
import torch

from forgetscale.config import SCORES
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs
from tests.parity import reference

AXES = {
    "row": {"axis": "row"},
    "row-official": {"axis": "row", "score": "official"},
    "element": {"axis": "element"},
    "element-global": {"axis": "element", "scope": "global", "score": "official"},
    "element-rand": {"axis": "element", "score": "rand"},
}
BASELINES = {
    "hft": {"kind": "hft"},
    "hft-quarter": {"kind": "hft", "frozen_fraction": 0.25},
    "s2ft": {"kind": "s2ft", "trainable_fraction": 0.2, "variant": "down_output"},
    "lota": {"kind": "lota", "trainable_fraction": 0.2, "num_trial_steps": 6, "trial_lr": 1e-3},
}
NUM_ROWS, NUM_BLOCKS = 19, 7
COUNTS = (1, 9)


@pytest.fixture(scope="module")
def plans(ranks: RankServer, runs: Runs) -> dict[int, list[dict]]:
    """Plans of every score, by number of ranks, as each rank made them."""
    recipes = {score: runs.recipe("plans", {**SSU, "score": score}) for score in SCORES}
    recipes |= {name: runs.recipe("plans", {**SSU, **axis}) for name, axis in AXES.items()}
    recipes |= {name: runs.recipe("plans", method) for name, method in BASELINES.items()}
    for count in COUNTS:
        shield = {"rule": "unused_in_target", "min_count": count}
        recipes[f"shield-{count}"] = runs.recipe(
            "plans", {"kind": "ssu", "score": "mag_l2", "shield_rows": shield}
        )
    return {size: ranks.must("plans:make", size, recipes=recipes).values for size in (1, 2, 3)}


@pytest.fixture(scope="module")
def statistics(ranks: RankServer, runs: Runs) -> dict[int, list[dict]]:
    recipe = runs.recipe("statistics", SSU)
    return {size: ranks.must("plans:statistics", size, recipe=recipe).values for size in (1, 2, 3)}


@pytest.fixture(scope="module")
def exact(runs: Runs) -> dict[str, torch.Tensor]:
    """Sum of squared inputs of every module over the used rows, in fp64, without our code."""
    tokens = torch.from_numpy(tiny.set_rows(rows=NUM_ROWS, seed=2)).long()
    model = reference.DenseOlmo2(runs.world() / "model")
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for row in tokens[list(range(0, NUM_ROWS, NUM_ROWS // NUM_BLOCKS))[:NUM_BLOCKS]]:
            model.logits(row[None])
            for name, x in model.inputs.items():
                sums[name] = sums.get(name, 0) + x.square().sum((0, 1))
    return sums


@pytest.mark.parametrize("score", [*SCORES, *AXES, *BASELINES])
def test_plans_are_equal_for_any_number_of_ranks(plans, score: str):
    first = plans[1][0][score]
    assert first["columns"] or first["whole"] or first["elements"]
    for size in (1, 2, 3):
        for found in plans[size]:
            assert found[score] == first


def test_a_trial_trains_exactly_the_fraction_of_the_body(plans, runs: Runs):
    body = {n: w for n, w in runs.get("ssu", 1).source.items() if n.startswith("model.layers.")}
    bits = plans[3][0]["lota"]["elements"]
    assert set(bits) == {*body, "model.norm.weight"}
    total = sum(w.numel() for w in body.values()) + 35
    frozen = sum(byte.bit_count() for tensor in bits.values() for byte in tensor)
    assert total - frozen == total // 5


def test_scores_give_different_plans(plans):
    hashes = {plans[1][0][score]["hash"] for score in SCORES}
    assert len(hashes) == len(SCORES)


def test_forgetscale_freezes_its_share_of_all_matrices(plans, runs: Runs):
    columns = plans[2][0]["forgetscale"]["columns"]
    shapes = {n: w.shape for n, w in runs.get("ssu", 1).source.items() if n in columns}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    total = sum(shape.numel() for shape in matrices.values())
    frozen = sum(len(columns[name]) * shape[0] for name, shape in matrices.items())
    highest = max(shape[0] for shape in matrices.values())
    assert total // 2 - highest < frozen <= total // 2
    shares = {len(columns[name]) / shape[1] for name, shape in matrices.items()}
    assert max(shares) > 1.2 * min(shares), "matrices are not frozen alike"


@pytest.mark.parametrize("score", [name for name in SCORES if name != "forgetscale"])
def test_each_matrix_is_frozen_at_the_fraction(plans, runs: Runs, score: str):
    columns = plans[2][0][score]["columns"]
    shapes = {n: w.shape for n, w in runs.get("ssu", 1).source.items()}
    assert set(columns) == {n for n in shapes if "embed_tokens" not in n and "lm_head" not in n}
    for name, index in columns.items():
        assert len(index) == shapes[name][-1] // 2
        assert index == sorted(set(index))


class TestRowsUnusedInTarget:
    @pytest.mark.parametrize("count", COUNTS)
    def test_every_token_is_counted_once_by_any_number_of_ranks(self, plans, count: int):
        text = tiny.set_rows()
        unused = [t for t in range(tiny.VOCAB_SIZE) if int((text == t).sum()) < count]
        assert 3 <= len(unused) < tiny.VOCAB_SIZE - 3
        for size in (1, 2, 3):
            for found in plans[size]:
                made = found[f"shield-{count}"]
                assert made["rows"] == {
                    "lm_head.weight": unused,
                    "model.embed_tokens.weight": unused,
                }
                assert made == plans[1][0][f"shield-{count}"]
                assert made["provenance"]["target"]["num_tokens"] == text.size

    def test_plans_that_count_nothing_name_no_target(self, plans):
        assert "target" not in plans[1][0]["paper"]["provenance"]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"method.shield_rows.min_count": 2}, "method.shield_rows {'min_count': 9"),
            ({"method.shield_rows": None}, "method.shield_rows {'min_count': 9"),
            ({"data.path": "calibration"}, "made with another target text"),
        ],
    )
    def test_a_plan_of_another_count_or_text_is_refused(
        self, ranks: RankServer, runs: Runs, changes: dict, words: str
    ):
        shield = {"rule": "unused_in_target", "min_count": 9}
        method = {**SSU, "shield_rows": shield}
        made = runs.get(method, 2)
        if "data.path" in changes:
            changes = {"data.path": str(runs.world() / changes["data.path"])}
        recipe = runs.recipe("foreign-rows", {**method, "plan": str(made.folder / "plan")}, changes)
        outcome = ranks.run("training:command", 1, recipe=recipe)
        assert outcome.codes == [2]
        assert words in outcome.errors[0] and "\n" not in outcome.errors[0]


def test_random_choice_depends_on_the_seed(ranks: RankServer, runs: Runs):
    recipes = {
        str(seed): runs.recipe("seeds", {"kind": "ssu", "score": "rand"}, {"run.seed": seed})
        for seed in (1, 2)
    }
    found = ranks.must("plans:make", 1, recipes=recipes).value
    assert found["1"]["hash"] != found["2"]["hash"]
    columns = found["1"]["columns"]
    assert (
        columns["model.layers.0.self_attn.q_proj.weight"]
        != (columns["model.layers.1.self_attn.q_proj.weight"])
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_statistics_count_real_tokens_once(statistics, exact, size: int):
    tokens = NUM_BLOCKS * tiny.BLOCK_SIZE
    for found in statistics[size]:
        # Four groups of two rows, the last with one real row; ranks take them in turn.
        assert found["passes"] == -(-4 // size)
        for parameter, norm in found["l2_norm"].items():
            name = parameter.removesuffix(".weight")
            assert torch.allclose(norm, exact[name].sqrt(), rtol=2e-6), name
            mean = found["mean_square"][parameter]
            assert torch.allclose(mean, exact[name] / tokens, rtol=4e-6), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_shared_input_is_seen_once(statistics, size: int):
    """ZeRO-3 hands each module its own view of the input; ours must look before it does."""
    for found in statistics[size]:
        shared = {name: owner for name, owner in found["owner"].items() if name != owner}
        assert shared == {
            f"model.layers.{layer}.{name}": f"model.layers.{layer}.{owner}"
            for layer in range(2)
            for name, owner in (
                ("self_attn.k_proj", "self_attn.q_proj"),
                ("self_attn.v_proj", "self_attn.q_proj"),
                ("mlp.up_proj", "mlp.gate_proj"),
            )
        }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_weight_norms_from_slices(statistics, runs: Runs, size: int):
    source = runs.get("ssu", 1).source
    for found in statistics[size]:
        for name, norm in found["weight_l1"].items():
            matrix = source[name].double().reshape(-1, source[name].shape[-1])
            assert torch.allclose(norm, matrix.abs().sum(0), rtol=1e-12)
            assert torch.allclose(found["weight_l2"][name], matrix.norm(dim=0), rtol=1e-12)


def test_provenance_names_model_data_and_settings(plans):
    found = plans[1][0]["paper"]["provenance"]
    assert found["method"] == "ssu" and found["score"] == "paper"
    assert found["frozen_fraction"] == 0.5
    assert len(found["model_hash"]) == 64
    assert found["calibration"]["num_blocks"] == NUM_BLOCKS
    assert "calibration" not in plans[1][0]["hft"]["provenance"]


@pytest.mark.parametrize("size", [1, 2])
def test_calibration_leaves_later_training_bit_equal(runs: Runs, size: int):
    made = runs.get("ssu", size)
    given = runs.get({**SSU, "plan": str(made.folder / "plan")}, size)
    assert given.losses == made.losses
    for name, weight in made.masters.items():
        assert torch.equal(given.masters[name], weight), name


def test_missing_calibration_data_is_one_sentence(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("no-data", SSU)
    recipe["method"]["calibration"]["path"] = str(runs.world() / "nowhere")
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    assert "nowhere" in outcome.errors[0] and "\n" not in outcome.errors[0]
    assert not (runs.world() / "no-data" / "plan").exists()
