"""``python -m data_prep``; a request to stop (SIGTERM) removes what is half-written."""

import signal
import sys

from data_prep.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
