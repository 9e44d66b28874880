"""Plans made from shapes: every method gets an estimate, and says what was assumed."""

from __future__ import annotations

import pytest

from forgetscale.config import validate_recipe
from forgetscale.data import open_data
from forgetscale.engine.stand_in import assume_plan
from forgetscale.methods import METHODS
from forgetscale.models import build_skeleton, parameter_shapes, read_model_config
from tests.distributed import tiny
from tests.distributed.runs import change

UNKNOWN = "not known before it is made: every element keeps its states"
DRAWN, SHAPES, NONE = "drawn with the right counts", "known from shapes", "none, every element"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return tiny.make_world(tmp_path_factory.mktemp("stand-in"))


def assume(world, method: dict, **changes):
    recipe = validate_recipe(change(tiny.base_recipe(world, "run", **method), changes))
    skeleton = build_skeleton(read_model_config(recipe.model.path))
    found = assume_plan(recipe, skeleton, open_data(recipe.data), lambda c: METHODS[c.kind](c))
    return found, parameter_shapes(skeleton)


@pytest.mark.parametrize(
    "method, source",
    [
        ({"kind": "sft"}, NONE),
        ({"kind": "ssu"}, DRAWN),
        ({"kind": "ssu", "score": "rand"}, SHAPES),
        ({"kind": "ssu", "score": "mag_l2", "axis": "row"}, DRAWN),
        ({"kind": "ssu", "score": "fisher"}, DRAWN),
        ({"kind": "ssu", "shield_rows": {"rule": "unused_in_target"}}, DRAWN),
        ({"kind": "ssu", "score": "mag_l1", "axis": "element"}, UNKNOWN),
        ({"kind": "hft"}, SHAPES),
        ({"kind": "s2ft"}, SHAPES),
        ({"kind": "gmt"}, NONE),
        ({"kind": "gmt_official"}, NONE),
        ({"kind": "lota"}, UNKNOWN),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_method_has_one(world, method: dict, source: str):
    found, shapes = assume(world, method)
    assert found.source.startswith(source)
    assert (found.plan is None) == (source in (NONE, UNKNOWN))
    if found.plan is not None:
        found.plan.check_model(shapes)
        assert 0 < found.plan.num_frozen(shapes)


def test_counts_are_those_of_the_fraction(world):
    found, shapes = assume(world, {"kind": "ssu", "frozen_fraction": 0.3})
    assert len(found.plan.columns) > 10
    for name, index in found.plan.columns.items():
        assert index.numel() == int(shapes[name][-1] * 0.3)


def test_hft_and_rand_are_the_plans_that_training_makes(world):
    for method in ({"kind": "hft"}, {"kind": "ssu", "score": "rand"}):
        assert assume(world, method)[0].plan.content_hash() == (
            assume(world, method)[0].plan.content_hash()
        )
    seeds = [assume(world, {"kind": "hft"}, **{"run.seed": seed})[0].plan.whole for seed in (1, 2)]
    assert seeds[0] != seeds[1]
