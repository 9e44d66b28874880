"""Fisher bases on real ranks: the same for any number of them, SFT rows, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forgetscale.artifact import ArtifactWriter, read_manifest
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs

FISHER = {"structures": ["diagonal", "vector", "left", "right"], "max_rank": 4}


def calibrate(ranks: RankServer, recipe: dict, output: Path, size: int = 1):
    return ranks.run("fisher:measure", size, recipe=recipe, output=str(output))


def measured(ranks: RankServer, recipe: dict, output: Path, size: int = 1, readers: int = 1):
    """Measure on some ranks, read on others."""
    assert calibrate(ranks, recipe, output, size).codes == [0] * size
    found = ranks.must("fisher:read", readers, recipe=recipe, directory=str(output))
    return found.values[-1]


def refusal(ranks: RankServer, recipe: dict, output: Path) -> str:
    outcome = calibrate(ranks, recipe, output)
    assert outcome.codes == [2], outcome.logs[0][-2000:]
    return outcome.errors[0]


def assert_same(first: dict, other: dict, tolerance: float) -> None:
    assert set(first) == set(other)
    for key, value in first.items():
        kind = key.rsplit("/", 1)[0]
        if key == "payload":
            continue
        if kind in ("vector", "left", "right"):
            # Directions of equal eigenvalues may turn; what they span may not.
            spans = [v.double() @ v.double().t() for v in (value, other[key])]
            assert torch.allclose(*spans, atol=1e3 * tolerance), key
        elif isinstance(value, float):
            assert other[key] == pytest.approx(value, rel=tolerance), key
        else:
            bound = tolerance * float(value.abs().max())
            assert torch.allclose(other[key], value, rtol=tolerance, atol=bound), key


@pytest.mark.parametrize("per_sample", [1, 3])
def test_the_same_for_any_number_of_ranks(ranks: RankServer, runs: Runs, tmp_path, per_sample):
    method = {"kind": "alignguard", "fisher": {**FISHER, "blocks_per_sample": per_sample}}
    method["fisher"]["max_rank"] = 3
    recipe = runs.recipe("fisher-sizes", method)
    sizes = (1, 2, 3) if per_sample == 3 else (1, 2)
    # Written by some ranks, read by another number.
    found = {n: measured(ranks, recipe, tmp_path / f"b{n}", n, 4 - n) for n in sizes}
    for size in sizes[1:]:
        assert_same(found[1], found[size], 5e-6)
    payload = found[1]["payload"]
    assert payload["num_rows"] == 7 and payload["seed"] == 3
    assert payload["model_hash"] and payload["calibration"]["content_hash"]


def test_supervised_rows_and_contrast(ranks: RankServer, runs: Runs, tmp_path):
    world = runs.world()
    answers = tiny.make_sft_set(tmp_path / "answers", world / "model")
    calibration = {"path": str(answers), "num_blocks": 7, "micro_batch_size": 2}
    general = {"path": str(world / "data"), "num_blocks": 5, "micro_batch_size": 2}
    method = {"kind": "alignguard", "calibration": calibration, "fisher": FISHER}
    plain = measured(ranks, runs.recipe("fisher-sft", method), tmp_path / "plain")
    method = {**method, "fisher": {**FISHER, "contrast": general}}
    contrast = measured(ranks, runs.recipe("fisher-contrast", method), tmp_path / "contrast", 2)
    for kind in ("vector", "left"):
        key = f"{kind}/model.layers.0.mlp.up_proj.weight"
        for basis in (plain[key], contrast[key]):
            eye = basis.t() @ basis
            assert torch.allclose(eye, torch.eye(len(eye)), atol=1e-4), kind
        cosines = torch.linalg.svdvals(plain[key].t() @ contrast[key])
        assert float(cosines.min()) < 0.99, "general data chose other directions"
    assert 0 < contrast["payload"]["contrast_cosine"] < 0.99
    assert "contrast_cosine" not in plain["payload"]
    assert torch.equal(
        plain["diagonal/model.norm.weight"] > 0, contrast["diagonal/model.norm.weight"] > 0
    )


def test_nothing_supervised(ranks: RankServer, runs: Runs, tmp_path):
    answers = tiny.make_sft_set(tmp_path / "answers", runs.world() / "model", rows=1)
    method = {"kind": "ewc", "calibration": {"path": str(answers)}}
    sentence = refusal(ranks, runs.recipe("no-target", method), tmp_path / "basis")
    assert "hold no target" in sentence and str(answers) in sentence


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            {"kind": "alignguard", "reading": "vector", "fisher": {"max_rank": 8}},
            "max_rank is 8, but 7 rows in sums of 1 make 7 samples",
        ),
        (
            {"kind": "alignguard", "target_modules": ["q_prj"]},
            "names 'q_prj', but no linear layer of the model ends with it; nearest: q_proj",
        ),
        ({"kind": "sft"}, "uses no Fisher basis; choose ewc, online_ewc,"),
        (
            {
                "kind": "alignguard",
                "calibration": {"path": "calibration", "max_statistics_bytes": 100},
            },
            "allows 100 bytes",
        ),
    ],
)
def test_refused(ranks: RankServer, runs: Runs, tmp_path, method, expected):
    if "calibration" in method:
        method["calibration"]["path"] = str(runs.world() / "calibration")
    assert expected in refusal(ranks, runs.recipe("refused-fisher", method), tmp_path / "basis")


def test_alignment_data_without_refusals(ranks: RankServer, runs: Runs, tmp_path):
    """English openings, which the made-up words never hold; the CLI says so before any work."""
    method = {"kind": "alignguard_lora", "refusals": None}
    adapter = {"adapter": {"kind": "lora", "rank": 4, "alpha": 16}}
    recipe = runs.recipe("no-refusals", method, adapter)
    sentence = refusal(ranks, recipe, tmp_path / "basis")
    assert "calibration.path: 0 of the 7 rows used of" in sentence
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2] and "method.refusals" in outcome.errors[0]
    # A word that opens a row counts there.
    recipe["method"]["refusals"] = [f"w{number}" for number in range(67)]
    assert calibrate(ranks, recipe, tmp_path / "words").codes == [0]
    held_out = {"steps": 2, "calibration": {"path": str(runs.world() / "calibration")}}
    recipe["method"] |= {"refusals": None, "basis": str(tmp_path / "words"), "refresh": held_out}
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "refresh.calibration.path: 0 of" in outcome.errors[0]


@pytest.fixture(scope="module")
def basis(ranks: RankServer, runs: Runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("given") / "basis"
    recipe = runs.recipe("given-basis", {"kind": "alignguard"})
    assert calibrate(ranks, recipe, output, 2).codes == [0, 0]
    return output


class TestGivenBasis:
    """A finished basis named by a recipe."""

    def train(self, ranks, runs, name: str, method: dict, world=None):
        return ranks.run("training:command", 1, recipe=runs.recipe(name, method, world=world))

    def test_it_is_used(self, ranks: RankServer, runs: Runs, basis: Path):
        outcome = self.train(ranks, runs, "given-a", {"kind": "alignguard", "basis": str(basis)})
        assert outcome.codes == [0], outcome.errors
        assert not (runs.world() / "given-a" / "fisher").exists()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"reading": "right"}, "holds left, but the method needs right"),
            ({"fisher": {"labels": "data"}}, "labels 'sampled', the recipe says 'data'"),
            ({"target_modules": ["q_proj"]}, "target_modules None"),
        ],
    )
    def test_other_settings(self, ranks, runs: Runs, basis: Path, changes, expected):
        method = {"kind": "alignguard", "basis": str(basis), **changes}
        outcome = self.train(ranks, runs, "given-b", method)
        assert outcome.codes == [2] and expected in outcome.errors[0]

    def test_another_convention(self, ranks, runs: Runs, basis: Path, tmp_path):
        """The mean over tokens squared, say, is another number; a sound folder is refused too."""
        with ArtifactWriter(tmp_path / "other", "fisher_basis") as artifact:
            artifact.payload = dict(read_manifest(basis)["payload"], convention="mean over tokens")
            for path in basis.glob("basis-*"):
                (artifact.path / path.name).write_bytes(path.read_bytes())
        method = {"kind": "alignguard", "basis": str(tmp_path / "other")}
        outcome = self.train(ranks, runs, "given-e", method)
        assert outcome.codes == [2], outcome.errors
        sentence = outcome.errors[0]
        assert "has the convention 'mean over tokens', expected 'gradient of the" in sentence
        assert "calibrate --kind fisher" in sentence

    def test_another_model(self, ranks, runs: Runs, basis: Path):
        world = runs.world("other-seed", seed=9)
        method = {"kind": "alignguard", "basis": str(basis)}
        outcome = self.train(ranks, runs, "given-c", method, world)
        assert outcome.codes == [2] and "measured on another model" in outcome.errors[0]

    def test_damage_is_noticed(self, ranks, runs: Runs, basis: Path, tmp_path):
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in basis.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        file = next(copy.glob("basis-*"))
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(bytes(data))
        outcome = self.train(ranks, runs, "given-d", {"kind": "alignguard", "basis": str(copy)})
        assert outcome.codes == [2] and file.name in outcome.errors[0]
