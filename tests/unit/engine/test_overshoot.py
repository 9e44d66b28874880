"""When a penalty counts as overshot."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from forgetscale.engine.metrics import MetricsLog
from forgetscale.engine.overshoot import NUM_STEPS, OvershootWatch
from forgetscale.errors import ConfigError

SECTION = SimpleNamespace(kind="ewc_lora", strength=7.0)
WITH_PROX = SimpleNamespace(kind="alignguard_lora", strength=7.0, action="penalty", reading="left")


def follow(penalties: list[float], losses: list[float], section=SECTION, first=None) -> int:
    """Return the steps that were taken before the run was stopped."""
    watch = OvershootWatch(section, first)
    for number, (penalty, loss) in enumerate(zip(penalties, losses, strict=True)):
        try:
            watch.look(number + 1, loss, {"penalty": penalty, "penalty_grad_norm": 1.0})
        except ConfigError:
            return number
    return len(penalties)


def test_a_penalty_above_all_losses_stops_the_run():
    assert follow([50.0] * 20, [3.0] * 20) == NUM_STEPS - 1
    # Jumping across the minimum: now and then it is low.
    assert follow([50.0, 60.0, 0.1, 55.0] * 5, [3.0] * 20) == NUM_STEPS - 1


def test_a_penalty_that_pays_goes_on():
    assert follow([2.9] * 20, [3.0, *[0.2] * 19]) == 20, "it may exceed what is left of the loss"
    assert follow([0.0] * 9 + [80.0] * 3 + [0.1] * 8, [3.0] * 20) == 20, "a few bad steps"
    assert follow([1.0] * 20, [0.1, *[3.0] * 19]) == 20, "the first rows were easy"


def test_a_resumed_run_goes_by_its_first_loss():
    losses = [0.2] * 20
    assert follow([1.0] * 20, losses) == NUM_STEPS - 1
    assert follow([1.0] * 20, losses, first=3.0) == 20


def test_methods_without_a_penalty_gradient():
    watch = OvershootWatch(SECTION, None)
    for step in range(20):
        watch.look(step + 1, 1.0, {"penalty": 1e9})
        watch.look(step + 1, 1.0, {})


@pytest.mark.parametrize(("section", "prox"), [(SECTION, False), (WITH_PROX, True)])
def test_the_sentence(section, prox: bool):
    watch = OvershootWatch(section, None)
    with pytest.raises(ConfigError, match=f"step {NUM_STEPS}: the penalty") as caught:
        for step in range(NUM_STEPS):
            watch.look(step + 1, 3.0, {"penalty": 50.0, "penalty_grad_norm": 1.0})
    sentence = str(caught.value)
    assert "median of 8 steps 50" in sentence and "began with (3)" in sentence
    assert "method.strength (7)" in sentence
    assert ("method.action: prox" in sentence) == prox


def test_the_first_loss_is_read_back(tmp_path):
    log = MetricsLog(tmp_path, visible=True, step=0)
    assert log.first_loss() is None
    log.step({"step": 1})  # it was skipped
    for step in (2, 3):
        log.step({"step": step, "loss": 7.0 / step})
    log.close()
    resumed = MetricsLog(tmp_path, visible=True, step=2)
    assert resumed.first_loss() == 3.5
    resumed.close()
    assert MetricsLog(tmp_path, visible=False, step=1).first_loss() is None
    (tmp_path / "metrics.jsonl").unlink()
    lost = MetricsLog(tmp_path, visible=True, step=2)
    assert lost.first_loss() == math.inf
    lost.close()
    assert follow([50.0] * 20, [3.0] * 20, first=math.inf) == 20, "nothing to go by"
