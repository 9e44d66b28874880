"""Tasks of lm-evaluation-harness on any number of processes, from local files alone.

The harness builds the requests and judges the answers. Who answers which request is ours: every
rank builds the same list, and ``GlobalRankLM`` shares it over all processes of all nodes.
"""

from forgetscale.evaluation.harness.files import (
    HARNESS_PREFIX,
    HarnessFile,
    harness_names,
    is_harness,
    read_harness_file,
)

__all__ = [
    "HARNESS_PREFIX",
    "HarnessFile",
    "harness_names",
    "is_harness",
    "read_harness_file",
]
