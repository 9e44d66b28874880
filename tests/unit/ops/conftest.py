"""Types are checked on every call; some tests pass wrong ones on purpose."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Let wrong shapes and names reach the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
