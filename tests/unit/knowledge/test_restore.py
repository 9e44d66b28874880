"""Restoration and its relatives against a full sort, and the rules about bits and counts."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from forgetscale.artifact import verify_artifact
from forgetscale.cli import restore as command
from forgetscale.knowledge.setup import Request
from tests.unit.knowledge.folders import (
    SHAPES,
    read_folder,
    restore,
    source_tensors,
    tuned_tensors,
    weight_hashes,
    write_folder,
)

REGION = [name for name in sorted(SHAPES) if "layers" in name and "norm" not in name]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    source = source_tensors()
    write_folder(root / "source", source, shards=2)
    write_folder(root / "tuned", tuned_tensors(source), shards=3)
    return root / "source", root / "tuned"


def scores(kind: str, source: dict, tuned: dict, names: list[str]) -> torch.Tensor:
    p = torch.cat([source[name].float().view(-1) for name in names])
    s = torch.cat([tuned[name].float().view(-1) for name in names])
    if kind == "relative":
        return (s - p).abs() / (p.abs() + 1e-8)
    return (s - p).abs() if kind == "absolute" else p.abs()


def expected(kind: str, side: str, fraction: str, source: dict, tuned: dict, names: list[str]):
    """What a full sort restores, as a dict of tensors; ties go by name, then by place."""
    r = scores(kind, source, tuned, names)
    count = math.floor(Fraction(fraction) * r.numel())
    order = torch.argsort(r, descending=side == "top", stable=True)[:count]
    chosen = torch.zeros(r.numel(), dtype=torch.bool)
    chosen[order] = True
    out, start = {}, 0
    for name in names:
        mask = chosen[start : start + tuned[name].numel()].view(tuned[name].shape)
        start += tuned[name].numel()
        out[name] = torch.where(mask, source[name], tuned[name])
    return out


@pytest.mark.parametrize("kind", ["relative", "absolute", "base"])
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_a_full_sort_agrees(pair, tmp_path: Path, kind: str, side: str):
    fractions = ["0.01", "0.03", "0.05", "0.1", "0.2", "0.4", "0.6"]
    output = tmp_path / "out"
    code = restore(*pair, output, "--score", kind, "--side", side, "--fraction", *fractions)
    assert code == 0
    source, tuned = map(read_folder, pair)
    for fraction in fractions:
        found = read_folder(output / f"fraction-{fraction}")
        wanted = tuned | expected(kind, side, fraction, source, tuned, REGION)
        for name, value in wanted.items():
            assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name
        manifest = verify_artifact(output / f"fraction-{fraction}", "model_edit")
        total = sum(source[name].numel() for name in REGION)
        assert manifest["payload"]["dropped"] == math.floor(Fraction(fraction) * total)


def changed_by(kind: str, value: torch.Tensor) -> torch.Tensor:
    """Return the change of a tensor; fp32, so that sums with zero are exact."""
    step = torch.randn(value.shape)
    return {
        "random": 1e-3 * step,
        "none": torch.zeros_like(step),
        "few": torch.where(step > 1.5, step, 0.0),
        "constant": torch.full_like(step, 2.0**-9),
        "ties": torch.round(step),
        "denormal": step * 1e-41,
    }[kind]


@pytest.mark.parametrize("score", ["relative", "absolute"])
@pytest.mark.parametrize("kind", ["random", "none", "few", "constant", "ties", "denormal"])
def test_one_element_and_all_but_one(tmp_path: Path, kind: str, score: str):
    """The ends of the range, on changes that are hard to rank; the source is zero in places."""
    torch.manual_seed(11)
    source, tuned = {}, {}
    for name, shape in SHAPES.items():
        zero = kind == "denormal" or torch.rand(shape) < 0.3
        source[name] = torch.where(torch.as_tensor(zero), 0.0, torch.randint(1, 4, shape).float())
        tuned[name] = source[name] + changed_by(kind, source[name])
    folders = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    total = sum(source[name].numel() for name in REGION)
    # the decimal just above k / N, so that floor(N * fraction) is k
    fractions = [f"{math.ceil(k / total * 1e9) / 1e9:.9f}" for k in (1, total - 1, total)]
    assert restore(*folders, tmp_path / "o", "--score", score, "--fraction", *fractions) == 0
    outputs = sorted((tmp_path / "o").iterdir(), key=lambda path: float(path.name.split("-")[1]))
    counts = []
    for output, fraction in zip(outputs, fractions, strict=True):
        found = read_folder(output)
        wanted = tuned | expected(score, "top", fraction, source, tuned, REGION)
        for name, value in wanted.items():
            assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name
        counts.append(verify_artifact(output, "model_edit")["payload"]["dropped"])
    assert counts == [1, total - 1, total]


@pytest.mark.parametrize("scope", ["tensor", "layer", "module"])
def test_other_scopes(pair, tmp_path: Path, scope: str):
    assert restore(*pair, tmp_path / "out", "--scope", scope, "--fraction", "0.25") == 0
    source, tuned = map(read_folder, pair)
    keys = {
        "tensor": lambda name: name,
        "layer": lambda name: name.split(".")[2],
        "module": lambda name: name.split(".")[-2],
    }
    groups: dict[str, list[str]] = {}
    for name in REGION:
        groups.setdefault(keys[scope](name), []).append(name)
    wanted = dict(tuned)
    for names in groups.values():
        wanted |= expected("relative", "top", "0.25", source, tuned, names)
    found = read_folder(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_nothing_and_everything(pair, tmp_path: Path):
    assert restore(*pair, tmp_path / "none", "--fraction", "0") == 0
    assert weight_hashes(tmp_path / "none") == weight_hashes(pair[1])
    assert restore(*pair, tmp_path / "all", "--fraction", "1") == 0
    source, tuned, found = (read_folder(path) for path in (*pair, tmp_path / "all"))
    for name in SHAPES:
        assert torch.equal(found[name], (source if name in REGION else tuned)[name])


def test_side_files_are_the_tuned_models(pair, tmp_path: Path):
    assert restore(*pair, tmp_path / "out", "--fraction", "0.2") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in pair[1].iterdir()} | {"manifest.json"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("part", [60, 1000])
@pytest.mark.parametrize("scope", ["global", "tensor", "module"])
def test_parts_and_blocks_do_not_matter(
    tmp_path: Path, part: int, scope: str, monkeypatch: pytest.MonkeyPatch
):
    """Many equal scores, so that ties straddle every border."""
    torch.manual_seed(3)
    source = {name: torch.randint(-2, 3, shape).bfloat16() for name, shape in SHAPES.items()}
    tuned = {n: v + torch.randint(-1, 2, v.shape).bfloat16() for n, v in source.items()}
    folders = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    options = ("--fraction", "0.1", "0.5", "--scope", scope, "--controls", "--seed", "5")
    assert restore(*folders, tmp_path / "a", *options) == 0
    monkeypatch.setattr(
        command, "Request", lambda **given: Request(**given, part=part, block=part // 3 + 1)
    )
    assert restore(*folders, tmp_path / "b", *options) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 8
    for name in names:
        # the norm-matched control's scale is a sum of floats, formed part by part
        if "scaled" not in name:
            assert weight_hashes(tmp_path / "a" / name) == weight_hashes(tmp_path / "b" / name)
    if scope == "global":
        wanted = expected("relative", "top", "0.5", source, tuned, REGION)
        found = read_folder(tmp_path / "b" / "fraction-0.5")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_workers_and_ranks_write_the_same_bytes(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One process, 2, 3 and 8 workers, and three ranks that share nothing but the folder."""
    monkeypatch.setattr(command, "Request", lambda **given: Request(**given, part=600, block=200))
    options = ("--fraction", "0.2", "--controls")
    assert restore(*pair, tmp_path / "one", *options) == 0
    for workers in (2, 3, 8):
        assert restore(*pair, tmp_path / f"{workers}", *options, "--workers", workers) == 0
    with ThreadPoolExecutor(3) as pool:
        ranks = [("--rank", rank, "--world-size", 3) for rank in range(3)]
        done = [pool.submit(restore, *pair, tmp_path / "r", *options, *rank) for rank in ranks]
        assert [future.result() for future in done] == [0, 0, 0]
    for folder in (tmp_path / "one").iterdir():
        for other in ("2", "3", "8", "r"):
            assert weight_hashes(folder) == weight_hashes(tmp_path / other / folder.name)


def test_official_precision(tmp_path: Path):
    """The same multiset of scores as a top-k of bf16 scores."""
    (source,) = [source_tensors()]
    tuned = tuned_tensors(source)
    folders = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    options = ("--score-dtype", "bfloat16", "--fraction", "0.2")
    assert restore(*folders, tmp_path / "out", *options) == 0
    found = read_folder(tmp_path / "out")
    p = torch.cat([source[name].view(-1) for name in REGION])
    s = torch.cat([tuned[name].view(-1) for name in REGION])
    r = (s - p).abs() / (p.abs() + 1e-8)
    assert r.dtype == torch.bfloat16
    top = torch.topk(r.float(), math.floor(0.2 * r.numel())).values.sort().values
    out = torch.cat([found[name].view(-1) for name in REGION])
    changed = r[(out != s)].float().sort().values
    assert torch.equal(changed, top[-changed.numel() :]) and changed.numel() == top.numel()


def test_random_is_even_and_repeatable(pair, tmp_path: Path):
    base = ("--score", "hash", "--fraction", "0.5")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert restore(*pair, tmp_path / name, *base, "--seed", seed) == 0
    assert weight_hashes(tmp_path / "a") == weight_hashes(tmp_path / "b")
    assert weight_hashes(tmp_path / "a") != weight_hashes(tmp_path / "c")
    source, tuned, found = (read_folder(path) for path in (*pair, tmp_path / "a"))
    for name in REGION:
        moved = tuned[name] != source[name]
        share = float((found[name] == source[name])[moved].float().mean())
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(int(moved.sum()))


def test_the_fisher_score(pair, tmp_path: Path):
    from safetensors.torch import save_file

    torch.manual_seed(9)
    fisher = {name: torch.rand(SHAPES[name]) for name in REGION}
    save_file(fisher, tmp_path / "fisher.safetensors")
    options = ("--score", "fisher", "--fisher", tmp_path / "fisher.safetensors")
    assert restore(*pair, tmp_path / "out", *options, "--fraction", "0.3") == 0
    source, tuned, found = (read_folder(path) for path in (*pair, tmp_path / "out"))
    cost = torch.cat(
        [(fisher[n] * (tuned[n].float() - source[n].float()) ** 2).view(-1) for n in REGION]
    )
    back = torch.cat([(found[n] != tuned[n]).view(-1) for n in REGION])
    assert int(back.sum()) == math.floor(0.3 * cost.numel())
    assert float(cost[back].min()) >= float(cost[~back].max())


def test_the_norm_matched_control(tmp_path: Path):
    wide = source_tensors(torch.float32)
    pair = write_folder(tmp_path / "s", wide), write_folder(tmp_path / "t", tuned_tensors(wide))
    assert restore(*pair, tmp_path / "out", "--fraction", "0.2", "--controls") == 0
    source, tuned = map(read_folder, pair)

    def distance(folder: str) -> float:
        found = read_folder(tmp_path / "out" / folder)
        parts = [(found[n].double() - source[n].double()).square().sum() for n in REGION]
        return math.sqrt(float(sum(parts)))

    restored = distance("fraction-0.2")
    whole = math.sqrt(
        sum(float((tuned[n].double() - source[n].double()).square().sum()) for n in REGION)
    )
    assert distance("fraction-0.2-scaled") == pytest.approx(restored, rel=1e-5)
    payload = json.loads((tmp_path / "out/fraction-0.2-scaled/manifest.json").read_text())[
        "payload"
    ]
    assert payload["scales"]["match"] == pytest.approx(restored / whole, rel=1e-6)
