"""Recipes: what is accepted, and one sentence for each mistake."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import yaml

from forgetscale.config import (
    apply_overrides,
    dump_recipe,
    load_recipe,
    read_yaml,
    recipe_dict,
    validate_recipe,
)
from forgetscale.errors import ConfigError

GOOD = {
    "run": {"name": "a", "output_dir": "runs/a", "seed": 1},
    "model": {"path": "models/m"},
    "data": {"path": "data/d"},
    "method": {"kind": "ssu", "score": "mag_l2"},
    "train": {"num_steps": 10},
    "deepspeed": "ds_configs/zero3.json",
}


def changed(path: str, value: object) -> dict:
    result = copy.deepcopy(GOOD)
    *sections, last = path.split(".")
    target = result
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return result


def without(path: str) -> dict:
    result = copy.deepcopy(GOOD)
    *sections, last = path.split(".")
    target = result
    for section in sections:
        target = target[section]
    del target[last]
    return result


def sentence(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_recipe(values)
    message = str(caught.value)
    assert "\n" not in message, "one mistake, one sentence"
    assert message.endswith(".")
    return message


class TestMistakes:
    @pytest.mark.parametrize(
        ("path", "value", "expected"),
        [
            ("modle", {}, "modle is not a recipe field (value {}; nearest valid name: model)."),
            (
                "method.frozen_fracton",
                0.4,
                "method.frozen_fracton is not a recipe field (value 0.4; nearest valid name:"
                " frozen_fraction).",
            ),
            (
                "method.calibration",
                {"path": "c", "num_block": 3},
                "method.calibration.num_block is not a recipe field (value 3; nearest valid name:"
                " num_blocks).",
            ),
            ("optim.learning_rate", 1, "optim.learning_rate is not a recipe field (value 1;"),
            ("train.batch", 1, "train.batch is not a recipe field"),
            ("method.kind", "susu", "eaft; nearest: ssu"),
            ("method.score", "papr", "method.score is 'papr', expected one of paper, official,"),
            ("model.dtype", "float16", "model.dtype is 'float16', expected one of bfloat16, floa"),
            ("method.frozen_fraction", 1.5, "method: frozen_fraction must lie in [0, 1], got 1.5."),
            ("method.frozen_fraction", float("nan"), "frozen_fraction must lie in [0, 1], got nan"),
            ("method.score", "paper", "score paper needs source data: set calibration.path, or"),
            ("method.score", "fisher", "score fisher needs source data: set calibration.path, or"),
            ("method.score", "sgpt_true", "score sgpt_true needs source data"),
            ("method.fisher", {"labels": "data"}, "fisher is for score fisher, but score is"),
            ("method.fisher.labels", "true", "method.fisher.labels is 'true', expected one of da"),
            ("method.shield_token_ids", [4, -2], "shield_token_ids must be >= 0, got -2"),
            (
                "method.shield_rows",
                {"rule": "unused_in_target", "min_count": 0},
                "min_count must be > 0, got 0",
            ),
            ("method.shield_rows", {"rule": "rare"}, "method.shield_rows.rule"),
            ("method.shield_rows", {"min_count": 2}, "method.shield_rows.rule"),
            ("optim.lr", 0, "lr must be > 0, got 0"),
            ("optim.lr", "fast", "optim.lr is 'fast': input should be a valid number"),
            ("optim.warmup_fraction", 1.0, "warmup_fraction must lie in [0, 1), got 1.0"),
            ("optim.weight_decay", -0.1, "weight_decay must be >= 0, got -0.1"),
            ("optim.betas", [0.9, 1.0], "betas must lie in [0, 1), got (0.9, 1.0)"),
            ("optim.betas", [0.9], "optim.betas"),
            ("optim.eps", 0, "eps must be > 0, got 0"),
            ("optim.max_grad_norm", 0, "max_grad_norm must be > 0, got 0"),
            ("optim.schedule", "step", "optim.schedule is 'step', expected one of cosine, linear"),
            ("train.num_target_tokens", 5, "give exactly one of num_target_tokens and num_steps"),
            ("train.num_steps", 0, "num_steps must be > 0, got 0"),
            ("train.num_steps", 2.5, "train.num_steps is 2.5: input should be a valid integer"),
            ("train.micro_batch_size", 0, "micro_batch_size must be > 0, got 0"),
            ("train.global_batch_size", -1, "global_batch_size must be > 0, got -1"),
            ("train.keep_checkpoints", 1, "keep_checkpoints must be >= 2"),
            ("train.loss_chunk_size", 0, "loss_chunk_size must be > 0, got 0"),
            ("run.seed", -1, "seed must be >= 0, got -1"),
            ("run.name", "  ", "name must not be empty"),
            ("evaluate.tasks", ["recall"], "tasks need task_dir"),
            ("evaluate.every_steps", 0, "every_steps must be > 0, got 0"),
            ("model", "models/m", "model is 'models/m'"),
        ],
    )
    def test_wrong_value(self, path: str, value: object, expected: str):
        assert expected in sentence(changed(path, value))

    @pytest.mark.parametrize(
        "path",
        ["run", "model.path", "data.path", "run.name", "run.output_dir", "method", "deepspeed"],
    )
    def test_missing_field(self, path: str):
        message = sentence(without(path))
        assert message == (f"{path} is missing; add it to the recipe or give --set {path}=VALUE.")

    def test_missing_kind(self):
        found = sentence(without("method.kind"))
        assert found.startswith("method.kind is missing; expected one of ")
        assert found.endswith("osf, s2ft, salora, sft, spd, ssu.")

    def test_several_mistakes_give_several_sentences(self):
        values = changed("optim.lr", -1)
        values["train"]["num_step"] = values["train"].pop("num_steps")
        with pytest.raises(ConfigError) as caught:
            validate_recipe(values)
        assert len(str(caught.value).splitlines()) == 2

    def test_sft_takes_no_fraction(self):
        message = sentence({**GOOD, "method": {"kind": "sft", "frozen_fraction": 0.5}})
        assert message.startswith("method.frozen_fraction is not a recipe field")


class TestFiles:
    def test_round_trip(self, tmp_path):
        recipe = validate_recipe(GOOD)
        path = tmp_path / "run.yaml"
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe
        assert recipe_dict(load_recipe(path)) == yaml.safe_load(path.read_text())

    def test_every_default_is_written_out(self):
        found = recipe_dict(validate_recipe(GOOD))
        assert found["optim"]["betas"] == [0.9, 0.999]
        assert found["train"]["accumulation_dtype"] == "float32"
        assert found["method"]["frozen_fraction"] == 0.5

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("run: {name: a}\nrun: {name: b}\n", "key 'run' stands twice (line 2); keep one."),
            ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", "key 'lr' stands twice (line 4); keep one."),
            ("run: [", "is not valid YAML"),
            ("- a\n- b\n", "holds list, expected sections (a mapping)."),
            ("", "holds NoneType, expected sections (a mapping)."),
            ("run: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ],
    )
    def test_bad_yaml(self, tmp_path, text: str, expected: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unreadable(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
            read_yaml(tmp_path / "nothing.yaml")
        (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
        with pytest.raises(ConfigError, match="is not UTF-8 text"):
            read_yaml(tmp_path / "latin.yaml")


class TestOverrides:
    @pytest.mark.parametrize(
        ("item", "section", "name", "value"),
        [
            ("method.frozen_fraction=0.4", "method", "frozen_fraction", 0.4),
            ("optim.lr=1e-4", "optim", "lr", 1e-4),
            ("optim.lr=5.0e-5", "optim", "lr", 5e-5),
            ("run.name=x=y", "run", "name", "x=y"),
            ("method.shield_token_ids=[1, 2]", "method", "shield_token_ids", (1, 2)),
            ("train.num_steps=null", "train", "num_steps", None),
        ],
    )
    def test_values(self, tmp_path, item: str, section: str, name: str, value: object):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(GOOD))
        more = ["train.num_target_tokens=9"] if value is None else []
        recipe = load_recipe(path, [item, *more])
        assert getattr(getattr(recipe, section), name) == value

    def test_later_wins_and_the_file_is_untouched(self):
        before = copy.deepcopy(GOOD)
        found = apply_overrides(GOOD, ["optim.lr=1.0", "optim.lr=2.0"])
        assert found["optim"]["lr"] == 2.0
        assert before == GOOD

    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            ("optim.lr", "--set 'optim.lr' is not of the form path=value."),
            ("=3", "--set '=3' is not of the form path=value."),
            ("deepspeed.stage=2", "deepspeed is a value, not a section."),
            ("run.name={", "the value is not valid YAML."),
        ],
    )
    def test_bad_override(self, item: str, expected: str):
        with pytest.raises(ConfigError) as caught:
            apply_overrides(GOOD, [item])
        assert expected in str(caught.value)


def test_configuration_imports_no_torch():
    code = "import forgetscale.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
