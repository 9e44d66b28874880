"""Who answers a knock, and what is said of links that are cut."""

from __future__ import annotations

import contextlib
import socket
import sys

import pytest

from forgetscale.links import Door, describe_cuts, own_address, silent_hosts


def place(rank: int, host: str, address: str, *silent: str) -> dict:
    return {"rank": rank, "host": host, "door": [address, 1], "silent_hosts": list(silent)}


def test_a_door_answers_and_so_does_a_host_whose_process_is_gone(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    door = Door()
    assert door.address[0] == own_address() == "127.0.0.1"
    assert silent_hosts([door.address], 1.0) == set()
    door.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(door.address)
    assert silent_hosts([door.address], 1.0) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="needs 127.0.0.2, and what Linux does there")
def test_a_host_without_an_answer_is_silent() -> None:
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(contextlib.closing(Door()))
        # A queue that is full: the kernel drops who knocks, as a cut link would.
        full = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        address = full.getsockname()
        stack.enter_context(socket.create_connection(address))
        assert silent_hosts([address, door.address], 0.3) == {"127.0.0.2"}
    assert silent_hosts([], 0.3) == set()


def test_a_link_between_two_hosts() -> None:
    places = [place(0, "a", "10.0.0.1", "10.0.0.2"), place(1, "b", "10.0.0.2", "10.0.0.1")]
    expected = "a (10.0.0.1, rank 0) and b (10.0.0.2, rank 1) do not reach each other"
    assert describe_cuts(places) == expected
    assert describe_cuts(places[:1]) == (
        "a (10.0.0.1, rank 0) and 10.0.0.2 do not reach each other"
    )


def test_a_host_that_is_cut_off_from_all_others() -> None:
    places = [
        place(0, "a", "10.0.0.1", "10.0.0.3"),
        place(1, "b", "10.0.0.2", "10.0.0.3"),
        place(2, "c", "10.0.0.3", "10.0.0.1", "10.0.0.2"),
        place(3, "c", "10.0.0.3", "10.0.0.1", "10.0.0.2"),
    ]
    assert describe_cuts(places) == "c (10.0.0.3, ranks 2, 3) is cut off from the others"
    seen_by_the_others = "10.0.0.3 is cut off from the others"
    assert describe_cuts(places[:2]) == seen_by_the_others


def test_nothing_is_said_of_links_that_are_sound() -> None:
    assert describe_cuts([place(0, "a", "10.0.0.1"), {"rank": 1, "beats": -1}]) is None
    apart = [place(0, "a", "10.0.0.1", "10.0.0.2"), place(2, "c", "10.0.0.3", "10.0.0.4")]
    assert describe_cuts(apart) == (
        "a (10.0.0.1, rank 0) and 10.0.0.2 do not reach each other; c (10.0.0.3, rank 2) and"
        " 10.0.0.4 do not reach each other"
    )
