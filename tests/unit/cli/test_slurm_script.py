"""What launch/slurm.sh would submit, and what it refuses; no SLURM needed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[3] / "launch"


def call(
    script: str, *arguments: str, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [shutil.which("bash"), str(SCRIPTS / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment | {"PATH": "/usr/bin:/bin"} | more,
    )


def programs(folder: Path, **scripts: str) -> str:
    """Return a PATH with what the scripts need and no SLURM but these stand-ins."""
    folder.mkdir()
    for name in (
        "bash",
        "dirname",
        "realpath",
        "sed",
        "mktemp",
        "tail",
        "rm",
        "cat",
        "awk",
        "sort",
    ):
        (folder / name).symlink_to(shutil.which(name))
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def in_a_job(tmp_path: Path, nodes: str, srun: str = "exit 1", **environment: str) -> str:
    """Run the inside of a job of two nodes; return the sentence it ends with."""
    scontrol = f'if [ "$2" = hostnames ]; then printf "{nodes}"; fi'
    environment = {
        "PATH": programs(tmp_path / "bin", scontrol=scontrol, srun=srun),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "FORGETSCALE_SHARED": str(tmp_path),
        **environment,
    }
    done = call("slurm_job.sh", "train", "--config", "x.yaml", **environment)
    assert done.returncode == 2, done.stderr
    assert not list(tmp_path.glob(".forgetscale-job-*")), "the scratch folder is left"
    return done.stderr.splitlines()[-1]


def test_an_allocation_that_is_not_as_it_says(tmp_path: Path) -> None:
    found = in_a_job(tmp_path, "n1\\n")
    assert "scontrol names 1 nodes, the allocation has 2" in found
    assert "look at SLURM_JOB_NODELIST=n[1-2]" in found


def test_more_processes_than_gpus(tmp_path: Path) -> None:
    found = in_a_job(tmp_path, "n1\\nn2\\n", SLURM_GPUS_ON_NODE="4", FORGETSCALE_PROCESSES="8")
    assert "--processes-per-node=8, but n1 has 4 GPUs in this job" in found


def test_a_shared_folder_that_is_not_there(tmp_path: Path) -> None:
    found = in_a_job(tmp_path, "n1\\nn2\\n", FORGETSCALE_SHARED=str(tmp_path / "none"))
    assert f"no folder can be made in {tmp_path}/none" in found and "--shared=DIR" in found


def test_a_first_node_without_a_free_port(tmp_path: Path) -> None:
    assert "n1 has no free port for the job" in in_a_job(tmp_path, "n1\\nn2\\n")


def test_a_machine_without_slurm(tmp_path: Path) -> None:
    done = call("slurm.sh", "train", PATH=programs(tmp_path / "bin"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "sbatch was not found, so this is no SLURM machine" in line and "--dry-run" in line


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
