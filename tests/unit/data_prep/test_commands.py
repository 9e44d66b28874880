"""The commands as a user runs them: exit codes and sentences."""

import errno
import json
import subprocess
import sys

import pytest

from data_prep.cli import main


@pytest.fixture
def arguments(corpus, tokenizer_dir, tmp_path):
    return [
        "build",
        f"--input={corpus}",
        f"--tokenizer={tokenizer_dir}",
        "--block-size=16",
        f"--output={tmp_path / 'set'}",
    ]


def test_build_verify_stats_inspect(arguments, tmp_path, capsys):
    path = str(tmp_path / "set")
    assert main([*arguments, "--log", str(tmp_path / "log.txt")]) == 0
    assert "rows of 16 tokens from 100 documents" in capsys.readouterr().out
    assert "build" in (tmp_path / "log.txt").read_text()
    assert main(["verify", path]) == 0
    assert "intact" in capsys.readouterr().out
    assert main(["stats", path]) == 0
    assert "tokenizer sha256" in capsys.readouterr().out
    assert main(["stats", path, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["documents"] == 100
    page = tmp_path / "pages" / "set.html"
    assert main(["stats", path, "--html", str(page)]) == 0
    assert "documents" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "http" not in text
    assert "100 documents" in text and "xx_clean_0001.jsonl.gz" in text
    assert stats["escapes_undone"][r"\n"] == 100
    assert main(["inspect", path, "--row", "0"]) == 0
    shown = capsys.readouterr().out
    assert "xx_clean_0000.jsonl.gz line 1, tokens 0 to 15" in shown
    assert "In year 0 the river" in shown


def test_verify_names_the_damage(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    shard = tmp_path / "set" / "shard-00000-of-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "set")]) == 2
    message = capsys.readouterr().err
    assert "shard-00000-of-00001.arrow is damaged in record batch 0, rows 0 to " in message
    assert main(["inspect", str(tmp_path / "set"), "--row", "0"]) == 2
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_verify_names_other_files(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    (tmp_path / "set" / "rejects.jsonl").write_text("{}\n")
    assert main(["verify", str(tmp_path / "set")]) == 2
    assert "rejects.jsonl has 3 bytes, expected 0" in capsys.readouterr().err


def test_inspect_says_what_is_wrong(arguments, tmp_path, capsys):
    path = str(tmp_path / "set")
    assert main(arguments) == 0
    assert main(["inspect", path, "--row", "100000"]) == 2
    assert "--row asks for 100000" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    assert main(["inspect", path, "--row", "0", "--tokenizer", str(other)]) == 2
    assert "made with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["build"], ["verify"], ["inspect"], ["stats"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "python -m data_prep" in capsys.readouterr().out


def test_wrong_usage_is_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["build", "--input", "x"])
    assert ended.value.code == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_full_disk_is_one_sentence(arguments, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("forgetscale.data.writer._HashingFile.write", fail)
    assert main(arguments) == 1
    message, note = capsys.readouterr().err.splitlines()[-2:]
    assert note.startswith(f"note: finished units are kept in {tmp_path / '.set.work'}; the same")
    assert message.startswith(f"error: build stopped at {tmp_path / 'set'}: No space left on dev")
    assert [path.name for path in tmp_path.iterdir() if "set" in path.name] == [".set.work"]


def test_as_a_process(arguments, tmp_path):
    """Run as users do; a failure is one sentence without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments, "--input", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error: input ")
    assert not (tmp_path / "set").exists()
