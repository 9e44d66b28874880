"""The fault matrix: kill or break a run at every point, start it again, compare every bit.

A tiny model on CPU trains 6 steps with a checkpoint every 2. ``SIGKILL`` comes at every labelled
point of the checkpoint protocol (``forgetscale.points``), at the first and at the second save, and
at random instants of the steps and saves (their duration is measured first); writes meet ENOSPC,
EIO on fsync, short writes, flipped bits; published checkpoints are damaged in each kind of file.
The next start must use the newest good checkpoint and end with the metrics and the exported weights
of the uninterrupted run, to the bit.

    python launch/bench/faults.py                    all; about 10 minutes on two quiet cores
    python launch/bench/faults.py --short            the cases that the usual tests have
    python launch/bench/faults.py --instants 500 --seed 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import keep  # noqa: E402

from tests.distributed.fault_cases import (  # noqa: E402
    Case,
    Row,
    cases,
    instants,
    loop_seconds,
    missed,
    run_cases,
)
from tests.distributed.harness import RankServer  # noqa: E402
from tests.distributed.runs import Runs  # noqa: E402

HEADER = f"{'what':12} {'where':34} {'file':9} {'action':36} {'exit':>5} {'from':>5}  result"


def line(row: Row) -> str:
    """Return a row of the table: what was done, the exit code, where the next start went on."""
    case, result = row.case, row.problem or "equal to the bit"
    where = f"{case.point} ({case.number})" if case.group == "kill" else case.point
    start = row.resumed_step or "-"
    return (
        f"{case.group:12} {where:34} {case.file:9} {case.action:36} {row.exit_code:5} {start:>5}"
        f"  {result}"
    )


def main() -> int:
    """Run the matrix; 1 if a case did not end as it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="only what the usual tests run")
    parser.add_argument("--instants", type=int, default=50, help="kills at random instants")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    parser.add_argument("--width", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forgetscale-faults-") as scratch:
        ranks = RankServer(Path(scratch))
        try:
            runs = Runs(ranks, Path(scratch))
            wanted: list[Case] = [case for case in cases() if case.short or not options.short]
            seconds = None
            if not options.short:
                seconds = loop_seconds(ranks, runs, options.width)
                wanted += instants(options.instants, seconds, options.seed)
            begun = time.monotonic()
            print(HEADER, flush=True)
            rows = run_cases(
                ranks, runs, wanted, lambda row: print(line(row), flush=True), options.width
            )
        finally:
            ranks.close()
    bad = [row for row in rows if row.problem]
    result = {
        "settings": vars(options),
        "cases": len(rows),
        "groups": dict(Counter(row.case.group for row in rows)),
        "bad": len(bad),
        "loop_seconds": seconds,
        "instants_missed": missed(rows),
        "seconds": time.monotonic() - begun,
        "rows": [row.as_json() for row in rows],
    }
    keep("faults-short" if options.short else "faults", result)
    print(f"{len(rows)} cases, {len(bad)} not as they must be", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
