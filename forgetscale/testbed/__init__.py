"""A small world, made from a seed, where forgetting can be measured exactly."""

from forgetscale.testbed.build import build_world, ensure_world, world_path
from forgetscale.testbed.size import TINY, WorldSize

__all__ = ["TINY", "WorldSize", "build_world", "ensure_world", "world_path"]
