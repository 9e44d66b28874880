"""Neighbours of restoration on worked numbers, and what restore refuses."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch

from forgetscale.cli import restore as command
from forgetscale.knowledge import work
from forgetscale.knowledge.apply import elect_and_average
from forgetscale.knowledge.setup import Request
from forgetscale.ops.noise import element_keys
from tests.unit.knowledge.folders import (
    read_folder,
    restore,
    source_tensors,
    tuned_tensors,
    weight_hashes,
    write_folder,
)

BEFORE = torch.tensor([0.5, -0.02, 0.1, 0.0, 1.0, -0.25, 0.004, 0.2, -0.08, 0.3]).double()
AFTER = torch.tensor([0.51, -0.03, 0.09, 0.001, 1.02, -0.25, 0.002, 0.21, -0.07, 0.33]).double()
SECOND = torch.tensor([-0.02, 0.03, -0.01, 0, 0.01, -0.1, 0, 0.02, 0, -0.05]).double()


def round_numbers(values: torch.Tensor) -> torch.Tensor:
    return torch.round(values * 1000).div(1000)


def worked(directory: Path, values: torch.Tensor) -> Path:
    values = round_numbers(values)
    tensors = {"layers.0.w": values[:4].clone(), "layers.1.w": values[4:].clone()}
    return write_folder(directory, tensors)


def edited(tmp_path: Path, *options, tuned: list[torch.Tensor] | None = None) -> list[float]:
    source = worked(tmp_path / "s", BEFORE)
    folders = [worked(tmp_path / f"t{i}", v) for i, v in enumerate(tuned or [AFTER])]
    assert restore(source, folders, tmp_path / "out", *options) == 0
    found = read_folder(tmp_path / "out")
    return torch.cat([found["layers.0.w"], found["layers.1.w"]]).tolist()


def test_the_worked_restoration(tmp_path: Path):
    found = edited(tmp_path, "--score", "relative", "--fraction", "0.3")
    assert found == [0.51, -0.02, 0.09, 0, 1.02, -0.25, 0.004, 0.21, -0.07, 0.33]


def test_the_worked_ties_of_the_official_precision(tmp_path: Path):
    found = edited(tmp_path, "--score-dtype", "bfloat16", "--fraction", "0.5")
    back = [i for i in range(10) if found[i] == float(round_numbers(BEFORE)[i]) and i != 5]
    assert back == [1, 2, 3, 6, 8]


def test_worked_scalings(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = edited(tmp_path / "a", "--method", "wise-ft", "--lambda", "0.3")
    assert found == pytest.approx(
        [0.503, -0.023, 0.097, 0.0003, 1.006, -0.25, 0.0034, 0.203, -0.077, 0.309], abs=1e-12
    )
    found = edited(tmp_path / "b", "--method", "task-arithmetic", "--lambda", "0.5")
    assert found == pytest.approx(
        [0.505, -0.025, 0.095, 0.0005, 1.01, -0.25, 0.003, 0.205, -0.075, 0.315], abs=1e-12
    )


def test_the_worked_ties_merge(tmp_path: Path):
    # in eighths of a thousand, so that equal changes are equal in floating point
    unit = 2.0**-10
    d = torch.tensor([10, -10, -10, 1, 20, 0, -2, 10, 10, 30]).double() * unit
    d2 = torch.tensor([-20, 30, -10, 0, 10, -100, 0, 20, 0, -50]).double() * unit
    keep = [[0, 1, 2, 4, 9], [0, 1, 5, 7, 9]]
    trimmed = []
    for change, places in zip((d, d2), keep, strict=True):
        part = torch.zeros(10).double()
        part[places] = change[places]
        trimmed.append(part)
    wanted = torch.tensor([-20, 30, -10, 0, 20, -100, 0, 20, 0, -50]).double() * unit
    assert torch.equal(elect_and_average(trimmed), wanted)

    def folder(name: str, values: torch.Tensor) -> Path:
        return write_folder(tmp_path / name, {"layers.0.w": values})

    zero = torch.zeros(10).double()
    source, tuned = folder("s", zero), [folder("t1", d), folder("t2", d2)]
    assert restore(source, tuned, tmp_path / "o", "--method", "ties", "--fraction", "0.5") == 0
    assert torch.equal(read_folder(tmp_path / "o")["layers.0.w"], wanted)


def test_dare_draws_and_rescales(tmp_path: Path):
    found = edited(
        tmp_path, "--method", "dare", "--fraction", "0.5", "--rescale", "inverse", "--seed", 3
    )
    before, after = round_numbers(BEFORE), round_numbers(AFTER)
    drawn = torch.cat([element_keys(3, "layers.0.w", 0, 4), element_keys(3, "layers.1.w", 0, 6)])
    keep = drawn >= 2**30
    assert 0 < int(keep.sum()) < 10
    wanted = torch.where(keep, before + 2 * (after - before), before)
    assert found == pytest.approx(wanted.tolist(), abs=1e-12)
    # The worked mask of the formula
    mask = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 1])
    assert (before + 2 * mask * (after - before)).tolist() == pytest.approx(
        [0.52, -0.02, 0.1, 0.002, 1, -0.25, 0, 0.2, -0.06, 0.36]
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    source = source_tensors(torch.float32)
    write_folder(root / "source", source)
    write_folder(root / "tuned", tuned_tensors(source))
    return root / "source", root / "tuned"


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("method", ["dare", "della", "breadcrumbs"])
def test_rescaling_keeps_the_norm_of_every_tensor(pair, tmp_path: Path, method: str, norm: int):
    options = ("--method", method, "--fraction", "0.6", "--rescale", f"l{norm}")
    assert restore(*pair, tmp_path / "out", *options) == 0
    source, tuned, found = (read_folder(path) for path in (*pair, tmp_path / "out"))
    for name, before in source.items():
        wanted = (tuned[name].double() - before).norm(norm)
        change = found[name].double() - before
        assert float(change.norm(norm)) == pytest.approx(float(wanted), rel=1e-5), name
        assert 0 < int((change == 0).sum()) < change.numel()


def test_breadcrumbs_drop_both_ends_of_each_tensor(pair, tmp_path: Path):
    options = ("--method", "breadcrumbs", "--fraction", "0.5", "--gamma", "0.1")
    assert restore(*pair, tmp_path / "out", *options) == 0
    source, tuned, found = (read_folder(path) for path in (*pair, tmp_path / "out"))
    for name, before in source.items():
        size = (tuned[name] - before).abs().view(-1)
        order = torch.argsort(size, descending=True, stable=True)
        top, kept = math.floor(0.1 * size.numel()), size.numel() - math.floor(0.5 * size.numel())
        mask = torch.zeros(size.numel(), dtype=torch.bool)
        mask[order[top : top + kept]] = True
        wanted = torch.where(mask.view(before.shape), tuned[name], before)
        assert torch.equal(found[name], wanted), name


def test_della_drops_small_changes_more_often(tmp_path: Path):
    torch.manual_seed(0)
    source = {"layers.0.w": torch.zeros(400, 50)}
    tuned = {"layers.0.w": torch.rand(400, 50) + 0.1}
    folders = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    options = ("--method", "della", "--fraction", "0.5", "--spread", "0.4")
    assert restore(*folders, tmp_path / "out", *options) == 0
    kept = read_folder(tmp_path / "out")["layers.0.w"] != 0
    ranks = tuned["layers.0.w"].argsort(1).argsort(1)
    for low in range(0, 50, 10):
        mine = kept[(ranks >= low) & (ranks < low + 10)].float()
        wanted = 0.1 + 0.8 * (low + 4.5) / 49
        assert abs(float(mine.mean()) - wanted) < 4 * 0.5 / math.sqrt(mine.numel())


# ---- what is refused ------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *given, code: int = 2) -> str:
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert restore(*given) == code
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    return capsys.readouterr().err


def changed(tmp_path: Path, **edits) -> tuple[Path, Path]:
    """Two folders; keyword arguments replace tensors of the tuned one (None removes)."""
    source = source_tensors()
    tuned = tuned_tensors(source)
    for name, value in edits.items():
        name = name.replace("__", ".")
        if value is None:
            del tuned[name]
        else:
            tuned[name] = value
    return write_folder(tmp_path / "source", source), write_folder(tmp_path / "tuned", tuned)


UP = "model__layers__0__mlp__up_proj__weight"


def test_names_and_shapes_that_differ(tmp_path: Path, capsys):
    for number, (value, message) in enumerate(
        [(None, "holds no tensor 'model.layers.0.mlp.up_proj.weight'"),
         (torch.zeros(31, 13).bfloat16(), "has shape [31, 13], but [31, 12]")]
    ):  # fmt: skip
        root = tmp_path / str(number)
        pair = changed(root, **{UP: value})
        assert message in refused(capsys, root, *pair, root / "out", "--fraction", "0.2")


def test_integers_on_one_side_only(tmp_path: Path, capsys):
    packed = source_tensors() | {UP.replace("__", "."): torch.zeros(31, 12, dtype=torch.int64)}
    source = write_folder(tmp_path / "source", packed)
    tuned = write_folder(tmp_path / "tuned", tuned_tensors(source_tensors()))
    error = refused(capsys, tmp_path, source, tuned, tmp_path / "out", "--fraction", "0.2")
    assert "is BF16, but I64 in the source model; both must hold plain floats" in error


def test_a_resized_vocabulary(tmp_path: Path, capsys):
    torch.manual_seed(4)
    more = torch.randn(29, 12).bfloat16()
    pair = changed(tmp_path, model__embed_tokens__weight=more)
    options = ("--fraction", "1", "--include", "embed|layers")
    error = refused(capsys, tmp_path, *pair, tmp_path / "out", *options)
    assert "has 29 rows, the source model 23" in error and "--new-rows keep" in error
    # outside the region it does not matter
    assert restore(*pair, tmp_path / "a", "--fraction", "0.5") == 0
    assert restore(*pair, tmp_path / "b", *options, "--new-rows", "keep") == 0
    source, found = read_folder(pair[0]), read_folder(tmp_path / "b")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name][:23], source[name]) and torch.equal(found[name][23:], more[23:])


@pytest.mark.parametrize("score", ["relative", "random", "base"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights(tmp_path: Path, capsys, score: str, value: float):
    torch.manual_seed(5)
    weight = torch.randn(31, 12).bfloat16()
    weight[3, 5] = value
    pair = changed(tmp_path, **{UP: weight})
    options = ("--score", score, "--fraction", "0.2")
    error = refused(capsys, tmp_path, *pair, tmp_path / "out", *options)
    assert "element 41 of model.layers.0.mlp.up_proj.weight is" in error and "tuned" in error


def test_integers_pass_through(tmp_path: Path):
    source = source_tensors() | {"model.layers.0.steps": torch.tensor([1, 2, 3])}
    tuned = tuned_tensors(source_tensors()) | {"model.layers.0.steps": torch.tensor([7, 8, 9])}
    pair = write_folder(tmp_path / "s", source), write_folder(tmp_path / "t", tuned)
    assert restore(*pair, tmp_path / "out", "--fraction", "1") == 0
    assert read_folder(tmp_path / "out")["model.layers.0.steps"].tolist() == [7, 8, 9]


def test_tied_weights(tmp_path: Path):
    """Stored once in the source, twice in the tuned model: both copies end up alike."""
    tied = {"tie_word_embeddings": True}
    source = source_tensors()
    del source["lm_head.weight"]
    tuned = tuned_tensors(source)
    both = tuned | {"lm_head.weight": tuned["model.embed_tokens.weight"].clone()}
    folders = write_folder(tmp_path / "s", source, config=tied)
    twice = write_folder(tmp_path / "twice", both, config=tied)
    once = write_folder(tmp_path / "once", tuned, config=tied)
    options = ("--fraction", "0.5", "--include", ".")
    assert restore(folders, twice, tmp_path / "a", *options) == 0
    assert restore(folders, once, tmp_path / "b", *options) == 0
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert torch.equal(a.pop("lm_head.weight"), a["model.embed_tokens.weight"])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(b["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


def test_adapters_pickles_and_codes(tmp_path: Path, capsys):
    source, tuned = changed(tmp_path)

    def message(folder: Path) -> str:
        return refused(capsys, tmp_path, source, folder, tmp_path / "out", "--fraction", "0.2")

    adapter, pickled = tmp_path / "adapter", tmp_path / "pickled"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "LoRA adapter" in message(adapter)
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    error = message(pickled)
    assert "only as pickle (pytorch_model.bin)" in error and "runs whatever code" in error
    codes = write_folder(
        tmp_path / "codes", source_tensors(), config={"quantization_config": {"quant_method": "x"}}
    )
    assert "quantised (x)" in message(codes)
    (tuned / "model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes()[:-3])
    error = message(tuned)
    assert "model.safetensors" in error and "again" in error or "not readable" in error


def test_outputs_that_meet_inputs(pair, tmp_path: Path, capsys):
    for output in (pair[0], pair[1], pair[1] / "inner", pair[0].parent):
        error = refused(capsys, pair[0].parent, *pair, output, "--fraction", "0.2")
        assert "inputs are never written to" in error
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert "no manifest" in refused(
        capsys, tmp_path, *pair, tmp_path / "there", "--fraction", "0.2"
    )
    assert restore(*pair, tmp_path / "a", "--fraction", "0.2") == 0
    assert restore(*pair, tmp_path / "a", "--fraction", "0.2") == 0
    assert "complete already" in capsys.readouterr().out
    error = refused(capsys, tmp_path, *pair, tmp_path / "a", "--fraction", "0.3")
    assert "another edit" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (("--fraction", "1.2"), "outside 0..1"),
        (("--fraction", "a"), "is no number"),
        (("--fraction", "0.0000001"), "less than one element"),
        ((), "needs --fraction"),
        (("--fraction", "0.2", "--include", "nowhere"), "leaves no float tensor"),
        (("--fraction", "0.2", "--include", "("), "no regular expression"),
        (("--fraction", "0.2", "--score", "fisher"), "--fisher FILE go together"),
        (("--method", "wise-ft", "--fraction", "0.2"), "leave --fraction out"),
        (("--fraction", "0.2", "--rank", "2"), "below --world-size"),
    ],
)
def test_impossible_options(pair, tmp_path: Path, capsys, options, message: str):
    error = refused(capsys, tmp_path, *pair, tmp_path / "out", *options)
    assert message in error and error.count("\n") == 1


def test_a_dry_run_counts_and_writes_nothing(pair, tmp_path: Path, capsys):
    assert restore(*pair, tmp_path / "out", "--fraction", "0.2", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "5 of 9 tensors, 1404 elements" in out and "cut: 280 elements" in out
    assert not any(tmp_path.iterdir())


def test_a_full_disk_and_a_second_start(
    pair, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "Request", lambda **given: Request(**given, part=300, block=100))
    options = ("--fraction", "0.2", "--include", ".")
    assert restore(*pair, tmp_path / "whole", *options) == 0
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    capsys.readouterr()
    assert restore(*pair, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "free space and start the same command again" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", real)
    # Only what was not done is done: counting is not, and some parts were written.
    ran: list[str] = []
    run_part = work._run_part
    monkeypatch.setattr(
        work,
        "_run_part",
        lambda w, path, *rest: ran.append(path.parent.name) or run_part(w, path, *rest),
    )
    assert restore(*pair, tmp_path / "out", *options) == 0
    assert set(ran) == {"write", "hash"}
    assert weight_hashes(tmp_path / "out") == weight_hashes(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
