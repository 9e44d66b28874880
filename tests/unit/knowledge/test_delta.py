"""Statistics of a change: worked shares, groups that add up, and the null model's verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetscale.analysis import delta as command
from forgetscale.cli import main
from forgetscale.knowledge.setup import Request
from tests.unit.knowledge.folders import source_tensors, tuned_tensors, write_folder

FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.4, 0.6)


def analyse(source: Path, tuned: Path, output: Path, *options: Any) -> dict[str, Any]:
    given = ["--source", source, "--tuned", tuned, "--output", output, "--workers", 1, *options]
    assert main(["analyze", "--delta", *map(str, given)]) == 0
    page = (output / "delta.html").read_text()
    assert page.count("<svg") >= 1 and "http" not in page.replace("http-equiv", "")
    return json.loads((output / "delta.json").read_text())


def test_the_worked_shares(tmp_path: Path):
    before = torch.tensor([0.5, -0.02, 0.1, 0.0, 1.0, -0.25, 0.004, 0.2, -0.08, 0.3]).double()
    after = torch.tensor([0.51, -0.03, 0.09, 0.001, 1.02, -0.25, 0.002, 0.21, -0.07, 0.33])
    before, after = (torch.round(x.double() * 1000) / 1000 for x in (before, after))

    def folder(name: str, values: torch.Tensor) -> Path:
        parts = {"layers.0.w": values[:4].clone(), "layers.1.w": values[4:].clone()}
        return write_folder(tmp_path / name, parts)

    pair = folder("s", before), folder("t", after)
    data = analyse(*pair, tmp_path / "out", "--fractions", "0.1", "0.2", "0.3", "0.5")
    found = [[row[name] for name in ("sum_r", "sum_abs", "sum_sq")] for row in data["shares"]]
    wanted = [
        (0.999986, 0.0097, 0.0006),
        (0.999991, 0.1068, 0.0560),
        (0.999996, 0.1262, 0.0582),
        (0.999998, 0.5146, 0.6122),
    ]
    for row, values in zip(found, wanted, strict=True):
        assert row == pytest.approx(values, abs=5e-5)
    assert data["model"]["sum_r"] == pytest.approx(100001.41500, rel=1e-7)
    assert data["model"]["unchanged"] == 0.1 and data["model"]["flipped"] == 0


def test_groups_add_up_and_parts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = source_tensors()
    tuned = tuned_tensors(source)
    pair = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    whole = analyse(*pair, tmp_path / "a")
    monkeypatch.setattr(
        command, "Request", lambda *a, **given: Request(*a, **given, part=300, block=100)
    )
    cut = analyse(*pair, tmp_path / "b")
    assert cut["shares"] == [pytest.approx(row, rel=1e-12) for row in whole["shares"]]
    assert [row["name"] for row in cut["tensors"]] == [row["name"] for row in whole["tensors"]]
    for scope in ("tensors", "layers", "modules"):
        rows = cut[scope]
        assert sum(row["elements"] for row in rows) == cut["model"]["elements"] == 1404
        for name in ("sum_r", "sum_abs", "sum_sq"):
            assert sum(row[name] for row in rows) == pytest.approx(cut["model"][name], rel=1e-12)
        even = sum(row["enrichment"] * row["elements"] for row in rows) / 1404
        assert even == pytest.approx(1, abs=5e-3)  # 280 of 1404 is not quite a fifth
    name = "model.layers.10.mlp.up_proj.weight"
    row = next(row for row in cut["tensors"] if row["name"] == name)
    p, s = source[name].double(), tuned[name].double()
    assert row["relative_norm"] == pytest.approx(float((s - p).norm() / p.norm()), rel=1e-9)
    cosine = float((p * s).sum() / (p.norm() * s.norm()))
    assert row["cosine"] == pytest.approx(cosine, rel=1e-9)


def test_a_random_update_is_called_one(tmp_path: Path):
    torch.manual_seed(1)
    source = {f"layers.{i}.w.weight": (0.013 * torch.randn(1024, 512)).bfloat16() for i in (0, 1)}
    random = tuned_tensors(source, step=8e-5, seed=7)
    # an update that is not: it moves large weights most
    scaled = {name: (1.02 * value.float()).bfloat16() for name, value in source.items()}
    folders = [
        write_folder(tmp_path / name, tensors)
        for name, tensors in (("s", source), ("r", random), ("c", scaled))
    ]
    options = ("--eps", "1e-5")
    same = analyse(folders[0], folders[1], tmp_path / "a", *options)["verdict"]
    other = analyse(folders[0], folders[2], tmp_path / "b", *options)["verdict"]
    assert not same["different"] and "not different from the null" in same["sentence"]
    assert other["different"] and other["largest_difference"] > 0.3


@pytest.mark.long
def test_the_null_table_of_the_paper(tmp_path: Path):
    """Random updates of Gaussian weights give the paper's shares without any model or data.

    The printed row is one draw of 1e8 weights, and so is this one. Of N weights with density f at
    zero, the relative standard error of sum r is sqrt(pi / 2 / (N f eps)) / ln(sigma / eps), 0.011
    here (eight draws gave 0.0032 for the first share, which is (1 - 0.71) x 0.011), since few
    weights near eps hold much of the sum.
    """
    source, tuned = {}, {}
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        p = (0.013 * torch.randn(4096, 4096, generator=generator)).bfloat16()
        step = 8e-5 * torch.randn(4096, 4096, generator=generator)
        source[f"layers.{number}.w.weight"] = p
        tuned[f"layers.{number}.w.weight"] = (p.float() + step).bfloat16()
    pair = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    data = analyse(*pair, tmp_path / "out")
    wanted = (0.7056, 0.7842, 0.8207, 0.8701, 0.9190, 0.9656, 0.9893)
    density = math.sqrt(2 / math.pi) / 0.013
    error = math.sqrt(math.pi / 2 / (6 * 4096**2 * density * 1e-8)) / math.log(0.013 / 1e-8)
    for row, share in zip(data["shares"], wanted, strict=True):
        # three standard errors of the difference of two draws
        assert row["sum_r"] == pytest.approx(share, abs=3 * math.sqrt(2) * error * (1 - share))
    assert "not different from the null" in data["verdict"]["sentence"]
    assert 0.25 < data["model"]["unchanged"] < 0.29
    fifth = data["shares"][4]
    assert (fifth["sum_abs"], fifth["sum_sq"]) == pytest.approx((0.32, 0.37), abs=0.01)


def test_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["analyze", "--delta", "--source", str(tmp_path)]) == 2
    assert "--delta needs --tuned" in capsys.readouterr().err
    assert main(["analyze", "--landscape", "--output", str(tmp_path)]) == 2
    assert "--landscape needs a recipe" in capsys.readouterr().err
