"""AsFT, SaLoRA and LoRA-Null in whole runs: what they promise of the applied update."""

from __future__ import annotations

import signal

import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs, load_weights
from tests.parity import reference
from tests.parity.test_dense_scores import ROWS

LORA = {"kind": "lora", "rank": 3, "alpha": 12}
SCALE = 4.0
ASFT = {"kind": "asft_lora", "form": "exact", "num_directions": 3, "strength": 2.0}
SALORA = {"kind": "salora", "num_directions": 4}


def deltas(run: Run) -> dict[str, torch.Tensor]:
    factors = run.outcome.value["factors"]
    modules = sorted({name.rpartition(".")[0] for name in factors})
    return {
        m: SCALE * factors[f"{m}.lora_B"].double() @ factors[f"{m}.lora_A"].double()
        for m in modules
    }


def inputs_of(run: Run) -> dict[str, torch.Tensor]:
    """Return every layer's inputs on the calibration rows at the source weights, fp64."""
    model = reference.DenseOlmo2(run.world_folder / "model")
    found: dict[str, list[torch.Tensor]] = {}
    for row in ROWS:
        model.logits(row[None])
        for name, x in model.inputs.items():
            found.setdefault(name, []).append(x.flatten(0, -2))
    return {name: torch.cat(parts) for name, parts in found.items()}


def stored(run: Run) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run.folder / "fisher").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def assert_merged(run: Run) -> None:
    """The export is the source plus the update, and loads with plain transformers."""
    updates = deltas(run)
    for module, delta in updates.items():
        expected = run.source[f"{module}.weight"].double() + delta
        assert torch.allclose(run.export[f"{module}.weight"].double(), expected, atol=1e-6), module
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    assert torch.equal(model.state_dict()["lm_head.weight"], run.export["lm_head.weight"])


class TestSalora:
    def test_directions_are_those_of_dense_outputs(self, runs: Runs):
        run = runs.get(SALORA, 2, adapter=LORA)
        basis = stored(run)
        for name, x in inputs_of(run).items():
            if f"left/{name}.weight" not in basis:
                continue
            outputs = run.source[f"{name}.weight"].double() @ x.double().t()
            left, singular, _ = torch.linalg.svd(outputs, full_matrices=False)
            found = basis[f"left/{name}.weight"].double()
            assert found.shape[1] == 4
            values = basis[f"values/left/{name}.weight"].double()
            assert torch.allclose(values, singular[:4].square() / len(x), rtol=1e-3)
            expected = left[:, :4] @ left[:, :4].t()
            gap = float((singular[3] - singular[4]) / singular[0])
            assert torch.allclose(found @ found.t(), expected, atol=max(1e-3, 1e-4 / gap)), name

    @pytest.mark.parametrize("size", [1, 3])
    def test_the_update_never_reaches_them(self, runs: Runs, size: int):
        run, plain = (runs.get(m, size, adapter=LORA) for m in (SALORA, {"kind": "sft"}))
        leaks = {"salora": 0.0, "plain": 1.0}
        for module, delta in deltas(run).items():
            left = stored(run)[f"left/{module}.weight"].double()
            other = deltas(plain)[module]
            leak = float((left.t() @ delta).norm() / delta.norm())
            leaks["salora"] = max(leaks["salora"], leak)
            free = float((left.t() @ other).norm() / other.norm())
            leaks["plain"] = min(leaks["plain"], free)
        assert leaks["salora"] < 1e-5 < 0.05 < leaks["plain"], "the control leaks"
        assert run.losses[-1] < run.losses[0] and run.metrics[-1]["method/removed"] > 0.01
        assert_merged(run)


class TestLoraNull:
    def test_a_starts_as_the_weakest_inputs(self, runs: Runs):
        run = runs.get({"kind": "lora_null", "freeze_a": True}, 2, adapter=LORA)
        factors = run.outcome.value["factors"]
        for name, x in inputs_of(run).items():
            if f"{name}.lora_A" not in factors:
                continue
            rows = factors[f"{name}.lora_A"].double()
            assert torch.allclose(rows @ rows.t(), torch.eye(3, dtype=torch.float64), atol=1e-5)
            moment = (x.double().t() @ x.double()) / len(x)
            weakest = torch.linalg.eigvalsh(moment)[:3]
            found = torch.einsum("ri,ij,rj->r", rows, moment, rows)
            tiny = 1e-6 * float(moment.trace())
            assert torch.allclose(found, weakest, rtol=1e-3, atol=tiny), name
        assert_merged(run)

    def test_a_moves_unless_it_is_held(self, runs: Runs):
        held, free = (
            runs.get({"kind": "lora_null", "freeze_a": freeze}, 2, adapter=LORA)
            for freeze in (True, False)
        )
        assert held.losses[0] == free.losses[0]
        start, end = (run.outcome.value["factors"] for run in (held, free))
        moved = [n for n in start if n.endswith("lora_A") and not torch.equal(start[n], end[n])]
        assert len(moved) == 14

    def test_source_inputs_hardly_see_the_update(self, runs: Runs):
        run = runs.get({"kind": "lora_null", "freeze_a": True}, 1, adapter=LORA)
        plain = runs.get({"kind": "sft"}, 1, adapter=LORA)
        inputs = inputs_of(run)

        def seen(of: Run) -> float:
            shares = [
                float((inputs[m].double() @ d.t()).norm() / (inputs[m].norm() * d.norm()))
                for m, d in deltas(of).items()
            ]
            return sum(shares) / len(shares)

        assert seen(run) < 0.5 * seen(plain)


class TestAsft:
    @pytest.mark.parametrize(("form", "count"), [("exact", 3), ("published", None)])
    def test_the_penalty_is_the_dense_one(self, runs: Runs, form: str, count: int | None):
        method = {**ASFT, "form": form, "num_directions": count}
        run = runs.get(method, 2, adapter=LORA, train__num_steps=2, optim__schedule="constant")
        one = runs.get(method, 2, adapter=LORA, train__num_steps=1, optim__schedule="constant")
        base = load_weights(run.world_folder / "base")
        # The second step's penalty is that of the factors after the first.
        expected = 0.0
        for module, delta in deltas(one).items():
            name = f"{module}.weight"
            difference = (run.source[name] - base[name]).double()
            if form == "exact":
                left = torch.linalg.svd(difference)[0][:, :3]
                matrix = left @ left.t()
            else:
                matrix, delta = difference @ difference.t() / difference.norm(), delta / SCALE
            expected += 2.0 * float((delta - matrix @ delta).square().sum())
        assert run.metrics[0]["method/penalty"] == 0.0
        assert run.metrics[1]["method/penalty"] == pytest.approx(expected, rel=1e-4)

    def test_the_update_stays_inside(self, runs: Runs):
        one, two = (runs.get(ASFT, size, adapter=LORA) for size in (1, 2))
        assert_same_weights(two.outcome.value["factors"], one.outcome.value["factors"])
        plain = runs.get({"kind": "sft"}, 1, adapter=LORA)
        base = load_weights(one.world_folder / "base")

        def outside(run: Run) -> float:
            shares = []
            for module, delta in deltas(run).items():
                name = f"{module}.weight"
                left = torch.linalg.svd((run.source[name] - base[name]).double())[0][:, :3]
                shares.append(float((delta - left @ (left.t() @ delta)).norm() / delta.norm()))
            return sum(shares) / len(shares)

        assert outside(one) < 0.9 * outside(plain)
        assert_merged(one)

    def test_bad_input(self, ranks: RankServer, runs: Runs):
        runs.get(ASFT, 1, adapter=LORA)
        model = str(runs.world() / "model")
        for name, changes, sentence in (
            ("asft-same", {"base": model}, "holds the same weights as model.path"),
            ("asft-all", {"num_directions": None}, "are all outputs of"),
            ("asft-none", {"base": model + "-gone"}, "does not exist"),
        ):
            recipe = runs.recipe(name, {**ASFT, **changes}, {"adapter": LORA})
            outcome = ranks.run("training:command", 2, recipe=recipe)
            assert outcome.codes == [2, 2] and sentence in outcome.errors[0], outcome.errors


def test_resume_at_another_number_of_ranks_keeps_the_directions(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("salora-resized", SALORA, {"adapter": LORA})
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    found = ranks.must("training:train", 3, recipe=recipe).value
    whole = runs.get(SALORA, 3, adapter=LORA)
    assert_same_weights(found["factors"], whole.outcome.value["factors"])
