"""What a rank says when a collective failed because another is gone."""

from __future__ import annotations

import pytest

from forgetscale.errors import ForgetScaleError
from forgetscale.zero3 import lost_peer

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (GLOO + "Connection closed by peer [10.0.0.7]:16393", "a rank at 10.0.0.7, which"),
        (GLOO + "Read error [fd00::7]:16393: Connection reset by peer", "a rank at fd00::7, which"),
        (GLOO + "Timed out waiting 600000ms for recv operation to complete", "a rank, which"),
        ("NCCL error: remote process exited or there was a network error", "a rank, which"),
    ],
)
def test_the_host_at_the_other_end_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, where: str
) -> None:
    monkeypatch.setenv("RANK", "3")
    found = lost_peer(RuntimeError(text))
    assert isinstance(found, ForgetScaleError) and found.exit_code == 1
    assert f"rank 3 lost contact with {where} ended or hangs" in str(found)
    assert "\n" not in str(found)


def test_other_errors_are_not_mistaken_for_it() -> None:
    assert lost_peer(RuntimeError("shapes do not match")) is None
    assert lost_peer(ValueError(GLOO + "Connection closed by peer [10.0.0.7]:1")) is None
