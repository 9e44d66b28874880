"""Chat templates that ask for today's date: one day for all processes and starts."""

from __future__ import annotations

import json
import re
from datetime import date

_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def fix_day(template: str, day: date) -> str:
    """Return a chat template that takes ``day`` for today where it calls ``strftime_now``."""
    return _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)


def asks_for_day(template: str) -> bool:
    """Return whether a chat template calls ``strftime_now``."""
    return "strftime_now(" in template
