"""The replay of DeepSpeed's parameter coordinator, on two layers counted by hand."""

from __future__ import annotations

import pytest

from forgetscale.engine.memory import Event, GatherSettings, gathered_elements

# Two modules of one matrix and one vector each; forward 0, 1, backward 1, 0.
NUMELS = [100, 4, 60, 4]
PARAMS_OF = {0: [0, 1], 1: [2, 3]}
EVENTS = [Event(action, module) for module in (0, 1, 1, 0) for action in ("fetch", "release")]
NOTHING_AHEAD = {"prefetch_bucket_size": 0, "max_reuse_distance": 0}


def gathered(world_size: int = 2, **settings: int) -> list[int]:
    base = {"param_persistence_threshold": 0} | settings
    return gathered_elements(
        NUMELS, PARAMS_OF, EVENTS, world_size=world_size, settings=GatherSettings(**base)
    )


def test_one_rank_gathers_nothing():
    assert gathered(1) == [0] * 8


def test_one_module_at_a_time():
    # Fetching: buffer and copies of both parameters; releasing begins with the copies.
    expected = [208, 104, 128, 64, 128, 64, 208, 104]
    assert gathered(**NOTHING_AHEAD) == expected


def test_vectors_that_stay_gathered_leave_single_parameters_without_a_copy():
    expected = [100, 100, 60, 60, 60, 60, 100, 100]
    found = gathered(param_persistence_threshold=4, **NOTHING_AHEAD)
    assert found == [8 + value for value in expected]


def test_the_model_limit_bounds_what_stays():
    settings = GatherSettings(param_persistence_threshold=4, model_persistence_threshold=5)
    assert settings.persistent(NUMELS) == {1}


def test_what_is_used_again_soon_is_kept():
    found = gathered(prefetch_bucket_size=0, max_reuse_distance=1000)
    # Module 0 waits through module 1, which comes once more at once.
    assert found[2] == 104 + 128
    assert found[4:6] == [168, 168]
    assert found[-1] == 104


def test_prefetch_gathers_the_next_module_ahead():
    found = gathered(prefetch_bucket_size=64, max_reuse_distance=0)
    # The buffer of the first gather is gone when the second begins.
    assert found[:2] == [208, 104 + 64]


def test_padding_of_the_gathered_buffer():
    settings = GatherSettings(param_persistence_threshold=0, **NOTHING_AHEAD)
    found = gathered_elements([10], {0: [0]}, EVENTS[:2], world_size=8, settings=settings)
    assert found == [16, 16]


@pytest.mark.parametrize("name", ["prefetch_bucket_size", "max_live_parameters"])
def test_settings_come_from_the_json(name: str):
    assert getattr(GatherSettings.read({f"stage3_{name}": 3.0}), name) == 3
    assert GatherSettings.read({}) == GatherSettings()
