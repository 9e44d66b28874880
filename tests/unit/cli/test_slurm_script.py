"""What launch/slurm.sh would submit, and what it refuses; no SLURM needed."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[3] / "launch"


def call(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment | {"PATH": "/usr/bin:/bin"},
    )


def test_a_dry_run_shows_a_chain_of_jobs(tmp_path: Path) -> None:
    done = call(
        "slurm.sh",
        *("--dry-run", "--nodes=2", "--gpus-per-node=8", "--prefix=apptainer exec fs.sif"),
        *("calibrate", "--config", "a b.yaml", "then", "train", "--config", "a b.yaml"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    for words in (first, second):
        assert words[0] == "sbatch"
        assert {"--requeue", "--signal=USR1@120", "--nodes=2", "--gpus-per-node=8"} <= set(words)
        assert f"FORGETSCALE_SHARED={tmp_path}" in words
        assert "FORGETSCALE_PREFIX=apptainer exec fs.sif" in words
        assert words[-2:] == ["--config", "a b.yaml"]
    assert "--dependency=afterok:JOB-calibrate" in second
    assert not any(word.startswith("--dependency") for word in first)


def test_help_shows_examples() -> None:
    done = call("slurm.sh", "--help")
    assert done.returncode == 0
    assert "train --config run.yaml" in done.stdout and "set -euo" not in done.stdout


def test_wrong_use_is_one_sentence_with_exit_code_2(tmp_path: Path) -> None:
    for arguments, sentence in (
        ([], "no job was named"),
        (["--dry-run", "trian"], "'trian' is no job"),
        (["--nodes", "2", "train"], "option --nodes needs the form --name=value"),
        (["--processes-per-node=x", "train"], "must be a number >= 1, got x"),
        ([f"--setup={tmp_path}/none", "train"], "is no file"),
        (["--dry-run", "train", "then"], "'then' needs a job before and after it"),
    ):
        done = call("slurm.sh", *arguments)
        assert done.returncode == 2 and sentence in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    done = call("slurm_job.sh", "train")
    assert done.returncode == 2 and "SLURM_JOB_ID is not set" in done.stderr
