"""Builds that are killed go on; ranks and processes share the work; the folder is the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.build import BuildOptions, build
from data_prep.team import MpiTeam, mpi_team
from data_prep.tokenise import UnitTokenizer
from forgetscale.data import TokenSet
from forgetscale.errors import ConfigError, ForgetScaleError

MPIEXEC = Path(sys.executable).with_name("mpiexec")
ENVIRONMENT = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
needs_mpi = pytest.mark.skipif(
    not MPIEXEC.exists(), reason="no mpiexec beside python: pip install forgetscale[mpi]"
)


@pytest.fixture
def many_files(tmp_path, sentence, write_lines):
    """24 files of about 100 kB, so that there is time to kill something."""
    for number in range(24):
        lines = [{"text": sentence(number * 1000 + line) * 8} for line in range(200)]
        write_lines(tmp_path / "in" / f"{number:02d}.jsonl.gz", lines)
    return tmp_path / "in"


@pytest.fixture
def command(many_files, tokenizer_dir, tmp_path):
    return [
        *(sys.executable, "-m", "data_prep", "build", "--input", str(many_files)),
        *("--tokenizer", str(tokenizer_dir), "--block-size", "64", "--deduplicate", "exact"),
        *("--output", str(tmp_path / "set")),
    ]


def run(command):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)


def start(command):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )


def results(tmp_path):
    return sorted((tmp_path / ".set.work" / "tokens").glob("*/*/" + "[0-9]" * 7))


def wait_for_results(tmp_path, process, count=3):
    while len(results(tmp_path)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def set_aside(tmp_path):
    """Return the files of the finished set and make room for the next build."""
    assert not (tmp_path / ".set.work").exists()
    assert not list(tmp_path.glob(".set.tmp-*"))
    found = contents(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / f"set-{time.monotonic_ns()}")
    return found


@needs_mpi
def test_killed_and_shared_builds_make_the_same_folder(command, tmp_path):
    """Alone, killed and continued by three ranks: every file is the same, the manifest too."""
    done = run(command)
    assert done.returncode == 0, done.stderr
    alone = set_aside(tmp_path)
    process = start(command)
    wait_for_results(tmp_path, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "set").exists()
    assert len(results(tmp_path)) < 24
    done = run([str(MPIEXEC), "-n", "3", *command])
    assert done.returncode == 0, done.stderr
    assert set_aside(tmp_path) == alone


@pytest.mark.long
@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_makes_the_same_folder(command, tmp_path, ranks):
    assert run(command).returncode == 0
    alone = set_aside(tmp_path)
    done = run([str(MPIEXEC), "-n", str(ranks), *command])
    assert done.returncode == 0, done.stderr
    assert set_aside(tmp_path) == alone


@pytest.mark.long
@needs_mpi
def test_a_rank_that_dies_ends_all(command, tmp_path):
    process = start([str(MPIEXEC), "-n", "2", *command])
    wait_for_results(tmp_path, process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "data_prep" in child.cmdline()
    ]
    ranks[-1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert not (tmp_path / "set").exists()
    assert run(command).returncode == 0


def test_finished_units_are_not_made_again(many_files, tokenizer_dir, tmp_path, monkeypatch):
    options = BuildOptions(
        inputs=(str(many_files),),
        tokenizer=tokenizer_dir,
        block_size=64,
        output=tmp_path / "set",
        num_processes=1,
    )
    calls = []
    original = UnitTokenizer.__call__

    def count(self, unit):
        calls.append(unit.number)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(self, unit)

    monkeypatch.setattr(UnitTokenizer, "__call__", count)
    with pytest.raises(KeyboardInterrupt):
        build(options)
    kept = results(tmp_path)
    assert len(kept) == 9
    kept[4].write_bytes(kept[4].read_bytes()[:-1])
    build(options)
    assert len(calls) == 10 + 24 - 8, "8 good results were kept, the damaged one is made again"
    assert not (tmp_path / ".set.work").exists()


def test_changed_input_and_settings_do_not_meet_old_results(
    many_files, tokenizer_dir, tmp_path, write_lines, monkeypatch
):
    original = UnitTokenizer.__call__

    def fail(self, unit):
        if len(results(tmp_path)) >= 23:
            raise ForgetScaleError("stopped here")
        return original(self, unit)

    def make(**options):
        return build(
            BuildOptions(
                inputs=(str(many_files),),
                **{"tokenizer": tokenizer_dir, "block_size": 64, "output": tmp_path / "set"},
                **options,
            )
        )

    monkeypatch.setattr(UnitTokenizer, "__call__", fail)
    with pytest.raises(ForgetScaleError, match="stopped here"):
        make()
    monkeypatch.setattr(UnitTokenizer, "__call__", original)
    write_lines(many_files / "00.jsonl.gz", [{"text": "new text " * 50}])
    payload = make(document_end="none")
    assert payload["sources"][0]["num_documents"] == 1
    assert payload["document_end"]["token_id"] is None
    set_aside(tmp_path)
    assert make(document_end="none")["shards"] == payload["shards"]


def test_a_killed_worker_ends_the_build(command, tmp_path):
    process = start([*command, "--num-processes", "2"])
    wait_for_results(tmp_path, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline())
    ]
    workers[0].kill()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "was killed by signal 9" in message and "finished units are kept" in message
    assert "Traceback" not in message
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert not (tmp_path / "set").exists()


def test_a_request_to_stop_of_all_processes_is_safe_to_start_again(command, tmp_path):
    process = start([*command, "--num-processes", "2"])
    wait_for_results(tmp_path, process)
    os.killpg(process.pid, signal.SIGUSR1)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert not (tmp_path / "set").exists() and results(tmp_path)
    done = run([*command, "--num-processes", "2"])
    assert done.returncode == 0, done.stderr


@needs_mpi
def test_bad_input_under_mpi_is_one_sentence(command, many_files):
    path = many_files / "15.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    done = run([str(MPIEXEC), "-n", "2", *command])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # A rank that meets the same file before it is ended says so too.
    assert 1 <= len(errors) <= 2
    assert all("15.jsonl.gz is a truncated gzip file" in error for error in errors)
    assert "Traceback" not in done.stderr


def test_several_processes_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert mpi_team() is None
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(ConfigError, match=r"mpiexec started 4 .* install forgetscale\[mpi\] or"):
        mpi_team()


class World:
    """A rank of two, without MPI."""

    def Get_rank(self):
        return 1

    def Get_size(self):
        return 2

    def bcast(self, value):
        return ("token", self.folder, "order")


def test_a_silent_rank_is_noticed(tmp_path):
    world = World()
    world.folder = tmp_path / "alive"
    team = MpiTeam(world)
    hook = sys.excepthook
    try:
        team.start(None, None)
    finally:
        sys.excepthook = hook
    team.check()
    other = world.folder / "00000"
    other.write_text("node7")
    past = time.time() - 1000
    os.utime(other, (past, past))
    team._next_check = 0.0
    with pytest.raises(ForgetScaleError, match=r"rank 0 on node7 gave no sign of life for 1\d\d\d"):
        team.check()
    (world.folder / "00000.done").touch()
    team._next_check = 0.0
    team.check()
    (world.folder / "00001.done").unlink(missing_ok=True)
    team.finish()
    assert (world.folder / "00001.done").exists()


def test_output_that_cannot_be_made(many_files, tokenizer_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ForgetScaleError, match="file/set cannot be made .*name another --output"):
        build(
            BuildOptions(
                inputs=(str(many_files),),
                tokenizer=tokenizer_dir,
                block_size=64,
                output=tmp_path / "file" / "set",
            )
        )


def test_a_long_document_is_shared_and_joined(make, tmp_path, monkeypatch, write_lines):
    text = " ".join(f"word{number}" for number in range(220_000))
    assert 2 << 20 < len(text) < 4 << 20, "three pieces, but no long line for the default units"
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a b c"}, {"text": text}, {"text": "x"}])
    whole = make(source, name="whole", num_processes=1)
    monkeypatch.setattr("data_prep.build._UNIT_BYTES", 20_000)
    split = []
    original = UnitTokenizer._part
    monkeypatch.setattr(UnitTokenizer, "_part", lambda *args: split.append(1) or original(*args))
    parts = make(source, name="parts", num_processes=1)
    assert len(split) == 3
    name = "shard-00000-of-00001.arrow"
    assert contents(whole)[name] == contents(parts)[name]
    assert TokenSet(whole).payload == TokenSet(parts).payload
