"""Which ids there are, in which shards, and how many shards a run needs.

The number of ids is not known beforehand, because filters reject some. The first round has
``over_generation`` times the wanted number. Where too few are accepted, whoever finds out writes a
larger number of shards into ``rounds.json``; that number is a function of the sealed shards alone.
What is selected in the end, the first N accepted ids, does not depend on how many more there are.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from forgetscale.artifact import write_json
from forgetscale.generation.store import RunStore

ROUNDS_FILE = "rounds.json"
_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """The ids of a run.

    Attributes:
        shard_size: Ids of a shard, > 0.
        num_wanted: Accepted samples wanted; None: every id is.
        num_ids: All ids there are; None: as many as needed.
        over_generation: Ids of the first round for each sample wanted, >= 1.
    """

    shard_size: int
    num_wanted: int | None
    num_ids: int | None
    over_generation: float

    @property
    def first_shards(self) -> int:
        """Shards of the first round."""
        wanted = self.num_wanted or 0
        count = self.num_ids
        if count is None:
            count = math.ceil(wanted * self.over_generation)
        return math.ceil(count / self.shard_size)

    def num_shards(self, store: RunStore) -> int:
        """Return how many shards the run has for now."""
        path = store.directory / ROUNDS_FILE
        try:
            return int(json.loads(path.read_bytes())["num_shards"])
        except FileNotFoundError:
            return self.first_shards

    def total_ids(self, store: RunStore) -> int:
        """Return how many ids the run has for now."""
        return self.shard_ids(self.num_shards(store) - 1).stop

    def shard_ids(self, shard: int) -> range:
        """Return the ids of a shard."""
        first = shard * self.shard_size
        end = first + self.shard_size
        return range(first, end if self.num_ids is None else min(end, self.num_ids))

    def extend(self, store: RunStore, num_shards: int, num_accepted: int) -> int:
        """Add shards because too few ids were accepted; return the new number.

        Args:
            store: The run.
            num_shards: Shards so far, all sealed.
            num_accepted: Samples accepted in them, > 0.
        """
        finished = num_shards * self.shard_size
        missing = (self.num_wanted or 0) - num_accepted
        more = math.ceil(missing * finished / num_accepted * _MARGIN / self.shard_size)
        write_json(store.directory / ROUNDS_FILE, {"num_shards": num_shards + max(1, more)})
        return num_shards + max(1, more)
