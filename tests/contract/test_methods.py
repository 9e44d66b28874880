"""What every method must keep, whatever it does: the same tests for all of them."""

from __future__ import annotations

import signal

import pytest
import torch

from forgetscale.methods import METHODS
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Run, Runs, load_weights, read_lines

SETTINGS = {
    "sft": {"kind": "sft"},
    "ssu": SSU,
    "hft": {"kind": "hft"},
    "freeze_layers": {"kind": "freeze_layers", "trainable_layers": 1},
    "gmt": {"kind": "gmt"},
    "gmt_official": {"kind": "gmt_official"},
    "lota": {"kind": "lota", "trainable_fraction": 0.3, "num_trial_steps": 5, "trial_lr": 1e-3},
    "s2ft": {"kind": "s2ft", "trainable_fraction": 0.3, "variant": "down_output"},
    "adalora": {
        "kind": "adalora",
        "target_rank": 2,
        "shrink_until_step": 4,
        "orthogonality": 0.01,
    },
    "l2_sp": {"kind": "l2_sp", "strength": 0.5, "action": "prox"},
    "ewc": {"kind": "ewc", "strength": 0.2},
    "online_ewc": {"kind": "online_ewc", "strength": 5.0, "action": "prox"},
    "alignguard": {"kind": "alignguard", "reading": "left", "fisher": {"max_rank": 3}},
    "osf": {"kind": "osf", "rank": 4},
    "alignguard_lora": {"kind": "alignguard_lora", "fisher": {"max_rank": 3}},
    "ewc_lora": {"kind": "ewc_lora", "strength": 0.2},
    "l2_sp_lora": {"kind": "l2_sp_lora", "strength": 0.5},
    "olora": {"kind": "olora"},
    "clora": {"kind": "clora", "num_directions": 3},
    "oplora": {"kind": "oplora", "num_directions": 3},
    "asft_lora": {"kind": "asft_lora", "strength": 0.05, "form": "exact", "num_directions": 3},
    "salora": {"kind": "salora", "num_directions": 5},
    "lora_null": {"kind": "lora_null"},
    "spd": {"kind": "spd", "strength": 0.7},
    "mofo": {"kind": "mofo", "fraction": 0.3},
}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 16}}
CHANGES: dict[str, dict] = {
    # Six steps from factors of deviation 0.02, with 0 between them, would hardly show.
    "adalora": {"adapter": {"kind": "svd", "rank": 4, "alpha": 300}, "train.num_steps": 14},
    "alignguard_lora": LORA,
    "ewc_lora": LORA,
    "l2_sp_lora": LORA,
    "olora": LORA,
    "clora": LORA,
    "oplora": LORA,
    "asft_lora": LORA,
    "salora": LORA,
    # Directions the inputs hardly use: what goes through them is small.
    "lora_null": {"adapter": {"kind": "lora", "rank": 12, "alpha": 48}, "train.num_steps": 8},
}
"""What else the recipe of a method needs; methods with an adapter train its factors."""
NEUTRAL = {
    "sft": {"kind": "sft"},
    "ssu": {"kind": "ssu", "frozen_fraction": 0.0},
    "hft": {"kind": "hft", "frozen_fraction": 0.0},
    "freeze_layers": {"kind": "freeze_layers", "trainable_layers": 2, "ends": "train"},
    "gmt": {"kind": "gmt", "trainable_fraction": 1.0},
    # It does not clip, so it is plain training without clipping.
    "gmt_official": {"kind": "gmt_official", "trainable_fraction": 1.0},
    "lota": {**SETTINGS["lota"], "trainable_fraction": 1.0},
    # Whatever the fraction, only feed-forward channels and heads are trained.
    "s2ft": None,
    "adalora": {**SETTINGS["adalora"], "target_rank": 4, "orthogonality": 0.0},
    "l2_sp": {"kind": "l2_sp", "strength": 0.0},
    "ewc": {"kind": "ewc", "strength": 0.0},
    "online_ewc": {"kind": "online_ewc", "strength": 0.0},
    "alignguard": {**SETTINGS["alignguard"], "action": "penalty", "strength": 0.0},
    # At least one direction of every matrix stays.
    "osf": None,
    "alignguard_lora": {**SETTINGS["alignguard_lora"], "strength": 0.0, "task_strength": 0.0},
    "ewc_lora": {"kind": "ewc_lora", "strength": 0.0},
    "l2_sp_lora": {"kind": "l2_sp_lora", "strength": 0.0},
    "olora": {"kind": "olora", "strength": 0.0},
    "clora": {"kind": "clora", "strength": 0.0},
    # At least one direction of every matrix stays.
    "oplora": None,
    "asft_lora": {"kind": "asft_lora", "strength": 0.0},
    # At least one direction of every layer's outputs stays.
    "salora": None,
    # Factors start elsewhere.
    "lora_null": None,
    "spd": {"kind": "spd", "strength": 0.0},
    "mofo": {"kind": "mofo", "fraction": 1.0},
}
DRAWS = {"hft", "s2ft"}
"""Methods whose plan is drawn by ``run.seed``; other plans are measured."""
MOVES = {"gmt": 0.8, "gmt_official": 0.8}
"""Share of elements that moved at all, where each step moves some; else nearly all."""
THIN = {
    "olora",
    "clora",
    "oplora",
    "asft_lora",
    "salora",
    "lora_null",
    "ewc_lora",
    "l2_sp_lora",
    "adalora",
}
"""Methods on the same thin layers as ``alignguard_lora``; ``adalora`` has a parity test of its own.
Three ranks and the neutral setting are long tests for them."""


def for_all(*values: object) -> list:
    """Return parameters for all methods, long tests for the thin ones."""
    return [
        pytest.param(name, *values, marks=[pytest.mark.long] if name in THIN else [])
        for name in sorted(METHODS)
    ]


ENDS = ("model.embed_tokens", "lm_head")
EXACT = ("step", "loss", "grad_norm", "lr", "target_tokens")


def test_every_method_is_here():
    assert set(SETTINGS) == set(NEUTRAL) == set(METHODS), "add the new method to the contract"


@pytest.fixture(params=sorted(METHODS))
def method(request) -> str:
    return request.param


def get(runs: Runs, method: str, size: int, settings: dict | None = None, **changes) -> Run:
    more = {path.replace(".", "__"): value for path, value in CHANGES.get(method, {}).items()}
    return runs.get(settings or SETTINGS[method], size, **more, **changes)


def recipe_of(runs: Runs, name: str, method: str, **changes) -> dict:
    return runs.recipe(name, SETTINGS[method], CHANGES.get(method, {}) | changes)


def trained(run: Run) -> dict[str, torch.Tensor]:
    return run.outcome.value["factors"] or run.masters


def exact(path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in read_lines(path / "metrics.jsonl")]


@pytest.mark.parametrize(("method", "size"), [*((m, 2) for m in sorted(METHODS)), *for_all(3)])
def test_one_rank_equals_many(runs: Runs, method: str, size: int):
    one, many = (get(runs, method, n) for n in (1, size))
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(trained(many), trained(one))
    frozen = [run.frozen for run in (one, many)]
    assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in frozen[0])


# A run stopped and resumed ends bit-equal below, which one that differs from itself could not.
@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_the_same_run_twice_is_bit_equal(ranks: RankServer, runs: Runs, method: str, size: int):
    recipe = recipe_of(runs, f"twice-{method}-{size}", method)
    ranks.must("training:command", size, recipe=recipe)
    first = get(runs, method, size)
    folder = runs.world() / f"twice-{method}-{size}"
    assert exact(folder) == exact(first.folder)
    found = load_weights(folder / "export")
    assert all(torch.equal(found[name], weight) for name, weight in first.export.items())


def test_stop_and_resume_is_bit_equal(ranks: RankServer, runs: Runs, method: str):
    recipe = recipe_of(runs, f"resumed-{method}", method)
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    stopped = ranks.run("crash:train_and_signal", 2, **options)
    assert stopped.codes == [75, 75]
    ranks.must("training:command", 2, recipe=recipe)
    folder, whole = runs.world() / f"resumed-{method}", get(runs, method, 2)
    assert exact(folder) == exact(whole.folder)
    found = load_weights(folder / "export")
    assert all(torch.equal(found[name], weight) for name, weight in whole.export.items())


@pytest.mark.parametrize(("method", "size"), [*((m, 1) for m in sorted(METHODS)), *for_all(3)])
def test_frozen_bits_with_decay(runs: Runs, method: str, size: int):
    run = get(runs, method, size)
    assert run.recipe["optim"]["weight_decay"] > 0
    if "adapter" in CHANGES.get(method, {}):
        assert all(torch.equal(run.masters[name], w) for name, w in run.source.items())
        assert all(bool(value.any()) for value in trained(run).values())
        return
    for name, frozen in run.frozen.items():
        source = run.source[name][frozen]
        assert torch.equal(run.export[name][frozen].view(torch.int32), source.view(torch.int32))
        # A single element may come back to its old value by chance.
        moved = run.masters[name][~frozen] != run.source[name][~frozen]
        share = 0.999 if name.startswith(ENDS) else MOVES.get(method, 0.999)
        assert moved.float().mean() > share or frozen.all(), name


@pytest.mark.parametrize("method", for_all())
def test_neutral_setting_is_sft(runs: Runs, method: str):
    settings = NEUTRAL[method]
    if settings is None:
        assert method in ("s2ft", "osf", "oplora", "salora", "lora_null")
        return
    norm = 1e6 if method == "gmt_official" else 0.5
    neutral, sft = (
        get(runs, method, 2, kind, optim__max_grad_norm=norm)
        for kind in (settings, {"kind": "sft"})
    )
    assert neutral.losses == sft.losses
    assert all(torch.equal(trained(neutral)[n], w) for n, w in trained(sft).items())


def test_learning_happens(runs: Runs, method: str):
    losses = get(runs, method, 2).losses
    assert losses[-1] < losses[0]


@pytest.fixture(scope="session")
def plans_of_two_seeds(ranks: RankServer, runs: Runs) -> dict[str, dict]:
    """Plans of all methods with two values of ``run.seed``, made in one launch."""
    recipes = {
        f"{method}-{seed}": recipe_of(runs, f"seed-{method}-{seed}", method, **{"run.seed": seed})
        for method in SETTINGS
        for seed in (3, 4)
    }
    return ranks.must("plans:make", recipes=recipes).value


def test_another_seed_gives_another_protection_only_where_it_draws(
    plans_of_two_seeds: dict[str, dict], method: str
):
    same = plans_of_two_seeds[f"{method}-3"]["hash"] == plans_of_two_seeds[f"{method}-4"]["hash"]
    assert same == (method not in DRAWS), "scores are measured, halves are drawn"
