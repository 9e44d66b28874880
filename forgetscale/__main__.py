"""``python -m forgetscale`` is the ``forgetscale`` command."""

import sys

from forgetscale.cli import main

sys.exit(main())
