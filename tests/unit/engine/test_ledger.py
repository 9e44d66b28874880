"""The ledger is appended to, never rewritten, and outlives a line that was cut short."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from forgetscale.engine.ledger import LEDGER_FILE, Ledger, read_ledger


def ledger(folder: Path) -> Ledger:
    return Ledger(folder, SimpleNamespace(on_main=lambda work: work()))


def test_lines_in_order(tmp_path: Path):
    ledger(tmp_path).note("started", step=0)
    ledger(tmp_path).note("saved", step=2, seconds=0.5)
    found = ledger(tmp_path).events()
    assert [line["event"] for line in found] == ["started", "saved"]
    assert found[1]["seconds"] == 0.5 and found[0]["time"].endswith("Z")


def test_half_a_line_is_left_out_and_closed(tmp_path: Path):
    ledger(tmp_path).note("started", step=0)
    path = tmp_path / LEDGER_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "sav')
    assert [line["event"] for line in read_ledger(path)] == ["started"]
    ledger(tmp_path).note("resumed", step=0)
    assert path.read_bytes().startswith(whole + b'{"event": "sav\n')
    assert [line["event"] for line in read_ledger(path)] == ["started", "resumed"]


def test_no_file_no_events(tmp_path: Path):
    assert read_ledger(tmp_path / LEDGER_FILE) == []
