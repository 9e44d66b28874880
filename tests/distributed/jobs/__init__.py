"""What ranks do in tests; each function runs on every rank of a process group.

Imported by the rank server, not by tests: DeepSpeed stays out of the test process.
"""

POINT_NAMES = (
    "in a step, before the optimizer",
    "in a step, after the optimizer",
    "between step and save",
    "save: before the first file",
    "save: after the ranks' states",
    "save: before hashing",
    "save: before the manifest",
    "save: after the manifest",
    "save: after the rename",
    "save: after latest",
    "save: half of the old one removed",
    "plan: before its manifest",
)
