"""The logit cache: what it holds, the same for any number of ranks, and training that reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.artifact import read_manifest, verify_artifact
from forgetscale.data import LogitCache, TokenSet
from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import Outcome, RankServer
from tests.distributed.runs import SSU, Runs, read_lines

TOP_K = 9
NAMES = ("log_prob", "ids", "log_probs", "log_rest", "text_nll")


class Caches:
    """Makes caches of the tiny world's SFT rows by command."""

    def __init__(self, ranks: RankServer, runs: Runs) -> None:
        self.ranks, self.runs = ranks, runs
        self.folder = runs.world()
        self.path = tiny.make_sft_set(self.folder / "chats", self.folder / "model")
        self.data = {
            "kind": "sft", "path": str(self.path), "shuffle_seed": 5, "document_mask": True,
        }  # fmt: skip
        self._made: dict[str, Path] = {}

    def start(
        self,
        name: str,
        size: int = 1,
        *options: object,
        changes: dict | None = None,
        rows: int = 4,
        **job: object,
    ) -> Outcome:
        """Run the command; the cache is ``name`` below the world."""
        recipe = self.runs.recipe(f"{name}-run", None, {"data": self.data, **(changes or {})})
        path = tiny.write_recipe(self.folder / f"{name}.yaml", recipe)
        arguments = ["analyze", "--cache-logits", "--config", path, "--output", self.folder / name]
        arguments += ["--top-k", TOP_K, *options]
        return self.ranks.run(
            "analyze:cache", size, arguments=[str(part) for part in arguments], rows=rows, **job
        )

    def get(self, size: int = 1) -> Path:
        """Return the cache made on so many ranks."""
        name = f"cache-{size}"
        if name not in self._made:
            assert self.start(name, size).codes == [0] * size
            self._made[name] = self.folder / name
        return self._made[name]


@pytest.fixture(scope="module")
def caches(ranks: RankServer, runs: Runs) -> Caches:
    return Caches(ranks, runs)


def loss(kind: str, path: Path, **options: object) -> dict:
    return {"kind": kind, "reference": {"cache": str(path)}, **options}


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_bytes_on_any_number_of_ranks(caches: Caches, size: int):
    one, many = caches.get(1), caches.get(size)
    files = [read_manifest(path)["files"] for path in (one, many)]
    assert files[0] == files[1] and len(files[0]) == 8
    verify_artifact(many)
    assert LogitCache(one).content_hash == LogitCache(many).content_hash


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_it_holds(caches: Caches, runs: Runs, dtype: str):
    """Against transformers alone, in fp64, each document by itself."""
    path = caches.get(1)
    if dtype == "float16":
        assert caches.start("half", 2, "--stored-dtype", "float16").codes == [0, 0]
        path = caches.folder / "half"
    model = AutoModelForCausalLM.from_pretrained(runs.world() / "model").double()
    token_set, cache = TokenSet(caches.path), LogitCache(path)
    rows = np.array([29, 0, 7, 7, 12])
    found = cache.read(np.zeros(5, np.int64), rows, NAMES)
    losses = []
    for place, row in enumerate(rows.tolist()):
        ids, mask = token_set.read([row])[0], token_set.loss_mask([row])[0]
        start = 0
        for length in token_set.document_lens([row])[0].tolist():
            piece = slice(start, start + length)
            with torch.no_grad():
                log_p = model(ids[piece][None]).logits[0].log_softmax(-1)[:-1]
            wanted = mask[piece][1:]
            label = log_p.gather(1, ids[piece][1:, None])[:, 0]
            mine = {name: value[place, piece][1:] for name, value in found.items()}
            assert torch.allclose(mine["log_prob"][wanted].double(), label[wanted], atol=1e-5)
            values, best = log_p[wanted].topk(TOP_K, -1)
            assert torch.equal(mine["ids"][wanted].long(), best)
            close = 1e-5 if dtype == "float32" else 4e-3
            assert torch.allclose(mine["log_probs"][wanted].double(), values, atol=close)
            rest = log_p[wanted].exp().sum(-1) - values.exp().sum(-1)
            assert torch.allclose(mine["log_rest"][wanted].double(), rest.log(), atol=1e-4)
            if wanted.any():
                nll = -float(label[wanted].mean())
                assert mine["text_nll"][wanted] == pytest.approx(nll, rel=1e-5)
                losses.append(nll)
            assert not any(value[~wanted].any() for value in mine.values())
            start += length
    payload = read_manifest(path)["payload"]
    assert payload["num_targets"] == int(token_set.loss_mask(range(30)).sum())
    assert min(losses) < cache.median_text_nll < max(losses)


def test_goes_on_with_the_next_file_after_a_kill(caches: Caches):
    outcome = caches.start("killed", 2, die_at=3)
    assert outcome.codes == [-9, -9]
    work = caches.folder / ".killed.work"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("rows-*")}
    assert len(before) == 4 and not (caches.folder / "killed").exists()
    outcome = caches.start("killed", 3)
    assert outcome.codes == [0, 0, 0]
    assert "4 of 8 files are there from an earlier start" in outcome.logs[0]
    assert not work.exists()
    path = caches.folder / "killed"
    assert LogitCache(path).content_hash == LogitCache(caches.get(1)).content_hash
    for old, time in before.items():
        assert (path / old.relative_to(work / "files")).stat().st_mtime_ns == time
    assert "holds this cache already" in caches.start("killed", 1).logs[0]


def test_a_request_to_stop_loses_no_file(caches: Caches):
    outcome = caches.start("asked", 2, stop_at=3)
    assert outcome.codes == [75, 75]
    assert "stopped on request during the pass over rows" in outcome.logs[0]
    outcome = caches.start("asked", 1)
    assert outcome.codes == [0] and "6 of 8 files are there" in outcome.logs[0]
    assert LogitCache(caches.folder / "asked").content_hash == LogitCache(caches.get()).content_hash


def test_a_killed_pass_of_another_job_is_not_mixed_in(caches: Caches):
    caches.start("mixed", 1, "--top-k", 3, die_at=3)
    outcome = caches.start("mixed", 1)
    assert outcome.codes == [0]
    assert "is from another job and is removed" in outcome.logs[0]
    assert LogitCache(caches.folder / "mixed").content_hash == LogitCache(caches.get()).content_hash


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--top-k", tiny.VOCAB_SIZE + 1], "has a vocabulary of 67; give 0 to 67."),
        (["--top-k", -1], "--top-k is -1"),
    ],
)
def test_more_tokens_than_there_are(caches: Caches, options: list, sentence: str):
    outcome = caches.start("wide", 2, *options)
    assert outcome.codes == [2, 2]
    assert sentence in outcome.logs[0]
    assert not (caches.folder / "wide").exists()


def test_a_folder_with_another_cache(caches: Caches):
    path = caches.get(2)
    outcome = caches.start(path.name, 1, "--top-k", 4)
    assert outcome.codes == [2]
    assert "holds another logit cache (top_k is 9 there and 4 here)" in outcome.logs[0]


class TestTraining:
    """Losses that look at the source model, from the cache and from a frozen model."""

    METHODS = {
        "sft_kl": {"factor": 2.0},
        "asft": {"factor": 0.5, "direction": "reverse"},
        "iw_sft": {},
        "psft": {},
        "flow": {},
    }

    def run(self, caches: Caches, kind: str, size: int, reference: dict | None = None, **changes):
        method = {**SSU, "loss": loss(kind, caches.get(1), **self.METHODS[kind])}
        if reference is not None:
            method["loss"]["reference"] = reference
        return caches.runs.get(method, size, data=caches.data, **changes)

    @pytest.mark.parametrize(
        "kind",
        [
            "sft_kl",
            "flow",
            *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asft", "iw_sft", "psft")),
        ],
    )
    def test_any_cut_of_the_step(self, caches: Caches, kind: str):
        one = self.run(caches, kind, 1)
        many = self.run(caches, kind, 3, train__micro_batch_size=1, train__loss_chunk_size=5)
        assert many.losses == pytest.approx(one.losses, rel=2e-5)
        assert_same_weights(many.masters, one.masters)
        plain = caches.runs.get("ssu", 1, data=caches.data)
        assert many.losses[-1] != pytest.approx(plain.losses[-1], rel=1e-4)

    @pytest.mark.parametrize(
        ("kind", "size"),
        [
            pytest.param("sft_kl", 1, marks=pytest.mark.long),
            ("sft_kl", 3),
            pytest.param("psft", 2, marks=pytest.mark.long),
        ],
    )
    def test_a_frozen_model_says_what_the_cache_says(self, caches: Caches, kind: str, size: int):
        wanted = {"model": "source"} | ({"top_k": TOP_K} if kind == "sft_kl" else {})
        live = self.run(caches, kind, size, wanted)
        kept = self.run(caches, kind, 1)
        assert live.losses == pytest.approx(kept.losses, rel=2e-5)
        assert_same_weights(live.masters, kept.masters)

    def test_divergence_holds_the_model_back(self, caches: Caches):
        def distance(run) -> float:
            pairs = [(run.masters[name], run.source[name]) for name in run.masters]
            return sum(float((a - b.float()).square().sum()) for a, b in pairs)

        options = {"data": caches.data, "optim__lr": 3e-3, "train__num_steps": 12}
        far = caches.runs.get({"kind": "sft"}, 1, **options)
        near = caches.runs.get(
            {"kind": "sft", "loss": loss("sft_kl", caches.get(1), factor=30.0)}, 1, **options
        )
        assert distance(near) < 0.8 * distance(far)
        assert far.losses[0] == pytest.approx(near.losses[0], rel=1e-5), "no divergence at first"

    def test_goes_on_bit_equal_after_a_kill(self, ranks: RankServer, caches: Caches):
        method = {**SSU, "loss": loss("sft_kl", caches.get(1), factor=2.0)}
        recipe = caches.runs.recipe("kl-killed", method, {"data": caches.data})
        point = "in a step, before the optimizer"
        ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=4)
        ranks.must("training:train", 2, recipe=recipe)
        lines = read_lines(Path(recipe["run"]["output_dir"], "metrics.jsonl"))
        assert [line["loss"] for line in lines] == self.run(caches, "sft_kl", 2).losses

    def test_another_cache_in_its_place(self, ranks: RankServer, caches: Caches):
        moved = caches.folder / "moved"
        shutil.copytree(caches.get(1), moved)
        method = {"kind": "sft", "loss": loss("sft_kl", moved)}
        recipe = caches.runs.recipe("kl-swapped", method, {"data": caches.data})
        point = "in a step, before the optimizer"
        ranks.run("crash:train_until", 1, recipe=recipe, point=point, number=4)
        shutil.rmtree(moved)
        assert caches.start("moved", 1, "--top-k", 3).codes == [0]
        outcome = ranks.run("training:command", 1, recipe=recipe)
        assert outcome.codes == [2]
        assert "began with another logit cache" in outcome.errors[0]

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"data": None}, "was made for other data: it does not cover"),
            ({"data.document_mask": False}, "was made with data.document_mask True"),
            ({"method.loss.reference.cache": "none"}, "none does not exist; make it with"),
            (
                {"method.loss.reference": {"model": "source", "top_k": 68}},
                "reference.top_k is 68, but",
            ),
        ],
    )
    def test_refused_before_the_model_is_built(
        self, ranks: RankServer, caches: Caches, changes: dict, sentence: str
    ):
        method = {"kind": "sft", "loss": loss("sft_kl", caches.get(1))}
        start = {"data": dict(caches.data)}
        if changes.get("data", start) is None:
            changes = {"data": {"path": str(caches.folder / "data")}}
        recipe = caches.runs.recipe("kl-refused", method, {**start, **changes})
        outcome = ranks.run("training:command", 2, recipe=recipe)
        assert outcome.codes == [2, 2]
        assert any(text and sentence in text for text in outcome.errors)

    def test_a_cache_of_another_model(self, ranks: RankServer, caches: Caches, runs: Runs):
        other = runs.world("other-model", seed=9)
        method = {"kind": "sft", "loss": loss("sft_kl", caches.get(1))}
        recipe = runs.recipe("kl-other", method, {"data": caches.data}, other)
        outcome = ranks.run("training:command", 2, recipe=recipe)
        assert outcome.codes == [2, 2]
        assert any(text and "was made with another model" in text for text in outcome.errors)

    def test_without_other_tokens(self, ranks: RankServer, caches: Caches):
        assert caches.start("scalars", 1, "--top-k", 0).codes == [0]
        path = caches.folder / "scalars"
        recipe = caches.runs.recipe(
            "kl-scalars", {"kind": "sft", "loss": loss("sft_kl", path)}, {"data": caches.data}
        )
        outcome = ranks.run("training:command", 1, recipe=recipe)
        assert outcome.codes == [2] and "was made with --top-k 0" in outcome.errors[0]
        method = {**SSU, "loss": loss("psft", path)}
        run = caches.runs.get(method, 1, data=caches.data)
        assert run.losses == self.run(caches, "psft", 1).losses

    def test_a_changed_byte(self, ranks: RankServer, caches: Caches):
        path = caches.folder / "spoiled"
        shutil.copytree(caches.get(1), path)
        file = next(path.rglob("rows-*"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        recipe = caches.runs.recipe(
            "kl-spoiled", {"kind": "sft", "loss": loss("sft_kl", path)}, {"data": caches.data}
        )
        outcome = ranks.run("training:command", 2, recipe=recipe)
        assert any(outcome.codes)
        assert any(text and "SHA-256 differs" in text for text in outcome.errors)

    def test_check_knows_what_it_needs(self, ranks: RankServer, caches: Caches):
        sizes = []
        for reference in ({"cache": str(caches.get(1))}, {"model": "source"}):
            method = {"kind": "sft", "loss": {"kind": "sft_kl", "reference": reference}}
            recipe = caches.runs.recipe("kl-check", method, {"data": caches.data})
            path = tiny.write_recipe(caches.folder / "kl-check.yaml", recipe)
            outcome = ranks.run("cli:run", 2, arguments=["check", "--config", str(path)])
            assert outcome.codes == [0, 0], outcome.logs[0]
            sizes.append("frozen source model" in outcome.logs[0])
        assert sizes == [False, True]
