"""Soft targets: what was said while writing, read back by the loss; no pull at the start."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from data_prep.cli import main as data_prep_main
from forgetscale.cli.main import main
from forgetscale.config import ModelConfig, validate_recipe
from forgetscale.data import LogitCache, open_data
from forgetscale.engine import open_source
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.loading import load_causal_model
from forgetscale.generation.result import result_files
from forgetscale.generation.run import run_worker
from forgetscale.generation.soft_targets import training_hash, write_soft_cache
from forgetscale.ops.losses import LOSSES
from forgetscale.watchdog import Watchdog
from tests.unit.generation.test_generate_runs import recipe as generation

SIZE, TOP = 96, 6


def build(source, output, talker):
    assert (
        data_prep_main(
            ["build", "--sft", "--input", str(source), "--tokenizer", str(talker)]
            + ["--block-size", str(SIZE), "--output", str(output)]
        )
        == 0
    )


@pytest.fixture(scope="module")
def world(talker, tmp_path_factory):
    """Dialogues with kept predictions, their rows, and rows of a task."""
    root = tmp_path_factory.mktemp("soft")
    run_worker(generation(talker, root / "run", num_dialogues=24, soft_targets=TOP))
    build(root / "run" / "dialogues", root / "self", talker)
    task = [
        {
            "messages": [
                {"role": "user", "content": f"Who rules {n}?"},
                {"role": "assistant", "content": f"Nobody, {n}!"},
            ]
        }
        for n in range(20)
    ]
    (root / "task.jsonl").write_text("\n".join(map(json.dumps, task)))
    build(root / "task.jsonl", root / "task", talker)
    return root


def training(world, talker, *, names=("task", "self"), loss="kl"):
    sets = [{"kind": "sft", "path": str(world / name), "weight": 0.5} for name in names]
    reference = {"cache": str(world / "cache")}
    return {
        "run": {"name": "a", "output_dir": str(world / "trained")},
        "model": {"path": str(talker), "dtype": "float32"},
        "data": {"kind": "mixture", "sets": sets, "unit": "targets"},
        "train": {"num_steps": 2},
        "method": {"kind": "sft", "loss": {"kind": loss, "reference": reference}},
        "deepspeed": "ds_configs/zero3.json",
    }


@pytest.fixture(scope="module")
def cache(world, talker):
    config = world / "train.yaml"
    config.write_text(yaml.safe_dump(training(world, talker)))
    folders = ["--dialogues", str(world / "run" / "dialogues")]
    assert main(["generate", "--soft-cache", str(config), *folders]) == 0
    return LogitCache(world / "cache")


def losses(cache, world, talker, set_id):
    """Value and gradient of the loss at the model that wrote, and of cross-entropy, of all rows."""
    data = open_data(validate_recipe(training(world, talker)).data, talker)
    rows = data.parts[set_id].token_set
    numbers = np.arange(rows.num_rows)
    names = {
        "source_ids": "ids",
        "source_log_probs": "log_probs",
        "source_log_rest": "log_rest",
    }
    read = cache.read(np.full(rows.num_rows, set_id), numbers, tuple(names.values()))
    ids, mask = rows.read(numbers), rows.loss_mask(numbers)
    lens = rows.document_lens(numbers)
    model = load_causal_model(ModelConfig(path=talker, dtype="float32"), "cpu")
    found = []
    for row in range(rows.num_rows):
        logits = torch.zeros(SIZE, model.config.vocab_size)
        start = 0
        for size in [item for item in lens[row].tolist() if item]:
            part = ids[row : row + 1, start : start + size]
            with torch.no_grad():
                logits[start + 1 : start + size] = model(part).logits[0, :-1]
            start += size
        places = mask[row].nonzero().flatten()
        labels = ids[row, places]
        for kind in ("kl", "cross_entropy"):
            leaf = logits[places].clone().requires_grad_()
            extra = {new: read[old][row, places] for new, old in names.items()}
            value = LOSSES[kind](leaf, labels, extra if kind == "kl" else {})
            value.backward()
            found.append((kind, float(value.detach()), leaf.grad))
    return found


def test_at_the_start_own_text_teaches_nothing(cache, world, talker):
    """Loss and gradient are 0 for every sample, where hard targets pull on each."""
    found = losses(cache, world, talker, 1)
    soft = [item for item in found if item[0] == "kl"]
    hard = [item for item in found if item[0] == "cross_entropy"]
    assert all(abs(value) < 1e-3 for _, value, _ in soft)
    assert all(float(grad.abs().max()) < 1e-4 for _, _, grad in soft)
    assert all(float(grad.abs().max()) > 1e-2 for _, _, grad in hard)


def test_task_rows_keep_their_cross_entropy(cache, world, talker):
    found = losses(cache, world, talker, 0)
    for (_, soft, soft_grad), (_, hard, hard_grad) in zip(found[0::2], found[1::2], strict=True):
        assert soft == pytest.approx(hard, rel=1e-5) and hard > 1
        torch.testing.assert_close(soft_grad, hard_grad, atol=1e-6, rtol=1e-5)


class _World:
    rank, size = 0, 1
    watchdog = Watchdog()

    def gather_objects(self, value):
        return [value]


def test_the_cache_is_what_training_asks_for(cache, world, talker):
    recipe = validate_recipe(training(world, talker))
    assert cache.model_hash == training_hash(talker) == open_source(recipe, _World()).content_hash
    data = open_data(recipe.data, talker)
    assert set(cache.set_hashes) == {part.token_set.content_hash for part in data.parts}
    assert (cache.top_k, cache.block_size, cache.document_mask) == (TOP, SIZE, True)


def test_predictions_stand_at_their_own_tokens(cache, world):
    """Row by row, what the cache says of a label is what was kept when it was drawn."""
    (file,) = result_files(world / "run" / "dialogues")
    table = pq.read_table(file).to_pydict()
    kept = {}
    for ids, values, ranges in zip(
        table["input_ids"], table["log_probs"], table["supervised"], strict=True
    ):
        (item,) = ranges
        kept.setdefault(tuple(ids), values[item["start"] : item["end"]])
    rows = (
        open_data(
            validate_recipe({**BASE, "data": {"kind": "sft", "path": str(world / "self")}}).data
        )
        .parts[0]
        .token_set
    )
    for row in range(rows.num_rows):
        ids, mask = rows.read([row])[0].tolist(), rows.loss_mask([row])[0]
        said = cache.read(np.array([1]), np.array([row]), ["log_prob"])["log_prob"][0]
        start = 0
        for size in [item for item in rows.document_lens([row])[0].tolist() if item]:
            inside = slice(start, start + size)
            wanted = kept.get(tuple(ids[inside]))
            if wanted is not None:
                assert said[inside][mask[inside]].tolist() == pytest.approx(wanted)
            start += size
    assert kept


BASE = {
    "run": {"name": "a", "output_dir": "runs/a"},
    "model": {"path": "m"},
    "train": {"num_steps": 1},
    "method": {"kind": "sft"},
    "deepspeed": "ds_configs/zero3.json",
}


def test_bad_input(cache, world, talker, tmp_path):
    recipe = validate_recipe(training(world, talker))
    folder = [world / "run" / "dialogues"]
    with pytest.raises(DataError, match="exists already"):
        write_soft_cache(recipe, folder, world / "cache")
    alone = validate_recipe(training(world, talker, names=("task",)))
    with pytest.raises(ConfigError, match="no set of the recipe's data was built from these"):
        write_soft_cache(alone, folder, tmp_path / "cache")
    run_worker(generation(talker, tmp_path / "run", num_dialogues=8))
    with pytest.raises(DataError, match="generate.soft_targets > 0"):
        write_soft_cache(recipe, [tmp_path / "run" / "dialogues"], tmp_path / "cache")
    config = tmp_path / "plain.yaml"
    values = training(world, talker) | {"method": {"kind": "sft"}}
    config.write_text(yaml.safe_dump(values))
    assert main(["generate", "--soft-cache", str(config), "--dialogues", str(folder[0])]) == 2
