"""Pure tensor functions: scores, losses, schedules. No process group, no DeepSpeed, no files."""

IGNORE_INDEX = -100
"""Label of a position without loss."""
