"""Which rank is slow: times of all ranks side by side.

In forward and backward the ranks of ZeRO-3 wait for each other's slices, so a slow processor shows
on every rank alike. What shows it is a product of two matrices that each rank times by itself; rows
and the optimizer's step are a rank's own work anyway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from forgetscale.zero3 import World

ROWS, COMPUTE = "rows", "forward and backward"
AGREEMENT, OPTIMIZER = "agreement", "optimizer"
OWN_WORK = {"rows": ROWS, "compute": COMPUTE, "optimizer": OPTIMIZER}
"""Name in metrics -> phase."""
EVERY_STEPS = 10
SLOW_RATIO, SLOW_REPORTS = 1.5, 3
LOST_SHARE = 0.05
"""A rank is worth a line if the others lose this share of their time by it."""
_SIZE, _PRODUCTS = 512, 4


def product_seconds(device: torch.device) -> float:
    """Return the seconds of a few products of ``512 x 512`` fp32 matrices, the best of three."""
    values = torch.ones(_SIZE, _SIZE, device=device)
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(_PRODUCTS):
            result = values @ values
        result[0, 0].item()  # waits for a GPU
        found.append(time.perf_counter() - begun)
    return min(found)


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Return the rank that took longest and how many times as long as the median of the others.

    Args:
        seconds: By rank, two ranks at least.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median([*seconds[:rank], *seconds[rank + 1 :]])
    return rank, seconds[rank] / max(others, 1e-9)


class Pace:
    """Compares the ranks every ``EVERY_STEPS`` steps.

    Args:
        world: This process among all.
        log: Receives a line when a rank stays slow.
    """

    def __init__(self, world: World, log: Callable[[str], None]) -> None:
        self._world = world
        self._log = log
        self._slow: dict[str, tuple[int, int]] = {}

    def measure(self, step: int) -> dict[str, float]:
        """Return for each kind of work its slowest rank and ratio; {} between measurements.

        ``pace/slowest_rank`` is the rank that keeps the others waiting for most seconds.
        Collective: every rank must call it.
        """
        if self._world.size == 1 or step % EVERY_STEPS:
            return {}
        taken = self._world.watchdog.take_seconds()
        mine = {name: taken.get(phase, 0.0) for name, phase in OWN_WORK.items()}
        mine["device"] = product_seconds(self._world.device)
        everyone = self._world.gather_objects(mine)
        found: dict[str, float] = {}
        excess: dict[str, tuple[float, int, float]] = {}
        for name in mine:
            seconds = [each[name] for each in everyone]
            rank, ratio = slowest(seconds)
            found |= {f"pace/{name}_slowest_rank": rank, f"pace/{name}_ratio": ratio}
            excess[name] = (seconds[rank] * (1 - 1 / max(ratio, 1.0)), rank, ratio)
        # A slow product stands for the time in which the ranks compute.
        compute = statistics.median(each["compute"] for each in everyone)
        _, rank, ratio = excess["device"]
        excess["device"] = (compute * (1 - 1 / max(ratio, 1.0)), rank, ratio)
        found["pace/slowest_rank"] = max(excess.values())[1]
        whole = max(sum(each[name] for name in OWN_WORK) for each in everyone)
        for name, (lost, rank, ratio) in excess.items():
            self._tell(name, rank, ratio if lost > LOST_SHARE * whole else 0.0)
        return found

    def _tell(self, name: str, rank: int, ratio: float) -> None:
        last, times = self._slow.get(name, (rank, 0))
        times = times + 1 if rank == last and ratio >= SLOW_RATIO else int(ratio >= SLOW_RATIO)
        self._slow[name] = (rank, times)
        if times == SLOW_REPORTS:
            self._log(
                f"straggler: rank {rank} took {ratio:.1f} times as long as the others ({name}) in"
                f" {SLOW_REPORTS} reports of {EVERY_STEPS} steps"
            )
