"""The only package that imports DeepSpeed: start-up, engine, slices of partitioned parameters."""

from forgetscale.stop import StopRequest
from forgetscale.zero3.arrivals import ArrivalWatch
from forgetscale.zero3.engine import (
    DTYPES,
    Matrix,
    ReadSlice,
    ZeroEngine,
    build_engine,
    construct_partitioned,
)
from forgetscale.zero3.shards import STATES, Slice, ZeroShards
from forgetscale.zero3.world import (
    World,
    launcher_rank,
    launcher_world_size,
    lost_peer,
    start_world,
    stop_world,
)

__all__ = [
    "ArrivalWatch",
    "DTYPES",
    "Matrix",
    "ReadSlice",
    "STATES",
    "Slice",
    "StopRequest",
    "World",
    "ZeroEngine",
    "ZeroShards",
    "build_engine",
    "construct_partitioned",
    "launcher_rank",
    "launcher_world_size",
    "lost_peer",
    "start_world",
    "stop_world",
]
