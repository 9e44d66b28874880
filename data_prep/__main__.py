"""``python -m data_prep``; a request to stop (SIGUSR1, SIGTERM) removes what is half-written.

Finished units of work stay, so that the same command goes on from them: the exit code is 75.
"""

import signal
import sys

from data_prep.cli import main
from forgetscale.errors import StoppedEarly

if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(StoppedEarly.exit_code))
    sys.exit(main())
