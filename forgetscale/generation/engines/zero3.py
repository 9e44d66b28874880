"""A generation engine whose model lies in slices on all ranks of a launcher.

For models that fit no other way: each forward pass gathers every weight on every rank, so a token
costs as much as sending the model once. All ranks together are one worker. Rank 0 holds the leases,
writes the journals and decides which rank writes which dialogue; each rank runs a ``SlotEngine`` of
its own on its share. Gathering needs all ranks, so before a step they agree on the largest number
of passes over beginnings that any of them has to make, and make equally many.

A dialogue is a function of its id and attempt, and the arithmetic is that of ``SlotEngine`` on the
gathered weights: in fp32 on CPU the text is that of the ``transformers`` engine, bit by bit.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from forgetscale.config import GenerateRecipe, ModelConfig
from forgetscale.config.generate import EngineConfig
from forgetscale.errors import ConfigError
from forgetscale.generation.engines.base import Dialogue
from forgetscale.generation.engines.slots import SlotEngine
from forgetscale.generation.records import Sample
from forgetscale.models import (
    SafetensorsFolder,
    buffer_values,
    build_skeleton,
    construct,
    parameter_shapes,
    read_model_config,
    restore_buffers,
)
from forgetscale.zero3 import (
    DTYPES,
    ArrivalWatch,
    World,
    ZeroEngine,
    build_engine,
    construct_partitioned,
)

_PATIENCE = datetime.timedelta(days=7)
"""Ranks wait for orders as long as rank 0 waits for other workers; it is the watch that ends."""

Start = Callable[[int, int], Dialogue]
"""``(sample_id, attempt)`` -> the dialogue at its beginning."""


def require_launcher() -> None:
    """Refuse to run without a launcher.

    Raises:
        ConfigError: No launcher started this process.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ConfigError(
            "generate.engine.kind zero3 spreads one model over the ranks of a launcher, but"
            f" {missing[0]} is not set; start it with deepspeed --num_gpus 8 --module forgetscale"
            " generate --config ..., or bash launch/slurm.sh --nodes=2 generate --config ..."
        )


class ShardedModel:
    """A partitioned model that is called like a whole one; each call takes all ranks.

    Args:
        engine: The model in slices.
        config: Its configuration.
        dtype: Its type.
        watch: Told of each call.
    """

    def __init__(
        self, engine: ZeroEngine, config: Any, dtype: torch.dtype, watch: ArrivalWatch
    ) -> None:
        self.config = config
        self.device = engine.world.device
        self.dtype = dtype
        self._engine = engine
        self._watch = watch

    def __call__(self, **inputs: Any) -> Any:
        """Run forward. Collective: every rank must call it equally often."""
        self._watch.arrive("a forward pass")
        return self._engine(**inputs)


def open_sharded_model(
    model: ModelConfig, engine: EngineConfig, world: World, watch: ArrivalWatch
) -> ShardedModel:
    """Load the slices of this rank.

    Args:
        model: The recipe's ``model`` section.
        engine: The recipe's ``generate.engine`` section.
        world: This process among all.
        watch: Told of each forward pass.

    Raises:
        DataError: The folder's weights do not fit its configuration.

    Collective: every rank must call it.
    """
    dtype = DTYPES[model.dtype]
    config = read_model_config(model.path, model.attn_implementation)
    skeleton = build_skeleton(config)
    folder = SafetensorsFolder(model.path)
    folder.check_shapes(parameter_shapes(skeleton))
    ds_config = deepspeed_config(model.dtype, engine.offload, world.size)
    partitioned: Any = construct_partitioned(lambda: construct(config), ds_config, dtype)
    sharded = build_engine(
        partitioned, prefix="", read=folder.read_flat, world=world, config=ds_config
    )
    restore_buffers(sharded.module, buffer_values(skeleton))
    sharded.set_training(False)
    return ShardedModel(sharded, config, dtype, watch)


def deepspeed_config(dtype: str, offload: str, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a model for forward passes."""
    stage: dict[str, Any] = {"stage": 3}
    if offload == "cpu":
        stage["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": stage,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}),
    }


class _Finished:
    """A dialogue that another rank wrote."""

    def __init__(self, sample: Sample) -> None:
        self.sample_id, self.attempt = sample.sample_id, sample.attempt
        self._sample = sample

    def sample(self) -> Sample:
        return self._sample


class Zero3Group:
    """What the ranks of one worker say to each other.

    Args:
        recipe: What is generated.
        world: This process among all.
        start: Begins dialogues.
        watch: Names late ranks.

    Collective: every rank must make one.
    """

    def __init__(
        self, recipe: GenerateRecipe, world: World, start: Start, watch: ArrivalWatch
    ) -> None:
        config = recipe.generate
        self.world, self.watch = world, watch
        self._start = start
        self._talk = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.local = SlotEngine(
            open_sharded_model(recipe.model, config.engine, world, watch),
            num_slots=config.engine.num_slots,
            max_tokens=config.max_tokens,
            agree=self._agree,
        )

    def _agree(self, own: int) -> int:
        """Return the largest number of passes that a rank has to make."""
        self.watch.arrive("agreeing on the passes of a step")
        most = torch.tensor(own)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._talk)
        return int(most)

    def order(self, orders: list[list[tuple[int, int]]] | None) -> list[tuple[int, int]] | None:
        """Send each rank the ids and attempts it begins; None ends the work. On others: receive.

        Collective: every rank must call it.
        """
        box = [orders]
        dist.broadcast_object_list(box, src=0, group=self._talk)
        return None if box[0] is None else box[0][self.world.rank]

    def step(self, begun: list[Dialogue]) -> tuple[list[Dialogue], list[tuple[list[Sample], bool]]]:
        """Advance this rank's dialogues by a token.

        Args:
            begun: New dialogues of this rank.

        Returns:
            The dialogues of this rank that ended; on rank 0 also, by rank, the samples that ended
            there and whether that rank was asked to stop.

        Collective: every rank must call it.
        """
        for dialogue in begun:
            self.local.submit(dialogue)
        ended = self.local.step()
        self.watch.arrive("the end of a step")
        is_main = self.world.is_main
        mine = ([] if is_main else [item.sample() for item in ended], self.world.stop.requested)
        found: list[Any] | None = [None] * self.world.size if is_main else None
        dist.gather_object(mine, found, dst=0, group=self._talk)
        self.watch.rest()
        return ended, found or []

    def serve(self) -> None:
        """Do what rank 0 orders until it has no more. Collective: every other rank must call it."""
        while (orders := self.order(None)) is not None:
            self.step([self._start(sample_id, attempt) for sample_id, attempt in orders])


class Zero3Engine:
    """The engine as the worker on rank 0 sees it: as many slots as all ranks have together.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Zero3Group) -> None:
        self._group = group
        self._busy = [0] * group.world.size
        self._waiting: list[list[Dialogue]] = [[] for _ in self._busy]
        self._is_between_steps = True
        self.stop_requested = False

    @property
    def num_busy(self) -> int:
        """Dialogues in progress on all ranks."""
        return sum(self._busy)

    @property
    def num_free(self) -> int:
        """Dialogues that could be submitted now."""
        return self._group.local.num_slots * len(self._busy) - self.num_busy

    def submit(self, dialogue: Dialogue) -> None:
        """Give a dialogue to the rank with the most room."""
        assert self.num_free, "submit() needs a free slot"
        rank = min(range(len(self._busy)), key=lambda item: self._busy[item])
        self._busy[rank] += 1
        self._waiting[rank].append(dialogue)

    def step(self) -> list[Any]:
        """Advance all dialogues by a token; return those that ended."""
        self._is_between_steps = False
        own, *others = self._waiting
        self._waiting = [[] for _ in self._busy]
        pairs = [[(item.sample_id, item.attempt) for item in part] for part in others]
        self._group.order([[], *pairs])
        ended, reports = self._group.step(own)
        self._busy[0] -= len(ended)
        found: list[Any] = list(ended)
        for rank, (samples, is_stopping) in enumerate(reports):
            self.stop_requested |= is_stopping
            if rank:
                self._busy[rank] -= len(samples)
                found += [_Finished(sample) for sample in samples]
        self._is_between_steps = True
        return found

    def dismiss(self) -> None:
        """Tell the other ranks that there is no more to do, unless a step broke off in the middle.

        In that case they wait inside the step, and find out when this process ends.
        """
        if self._is_between_steps:
            self._group.order(None)
