"""A real SLURM on one machine: a controller and several node daemons, each with its own port."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
PACKAGES = ("slurm-wlm", "munge")
ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """\
ClusterName=forgetscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MessageTimeout=60
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Install SLURM where this machine lets us; return why there is none, or None."""
    if sys.platform != "linux":
        return "SLURM runs on Linux only"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if not missing:
        return None if os.geteuid() == 0 else "starting SLURM daemons needs root"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{missing[0]} is not installed, and only root with apt-get may install slurm-wlm"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return f"{' '.join(command[:2])} failed: {done.stderr.strip().splitlines()[-1:]}"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> int:
    """Return the first of ``count`` ports in a row that are free."""
    for first in range(17000 + os.getpid() % 2000, 30000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports")


@dataclass(frozen=True)
class JobState:
    """What scontrol says of a job."""

    name: str
    """Such as RUNNING, COMPLETED, FAILED."""
    exit_code: int
    restarts: int


class Cluster:
    """A controller and ``nodes`` node daemons below ``folder``."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder
        for name in ("state", "munge", *(f"spool-n{number + 1}" for number in range(nodes))):
            (folder / name).mkdir(parents=True)
        port = _free_ports(nodes + 1)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            port=port,
            nodes=nodes,
            first=port + 1,
            last=port + nodes,
        )
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(text, encoding="utf-8")
        self.environment = os.environ | {
            "SLURM_CONF": str(self.configuration),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._start_munge()
        self._daemon("slurmctld", "-f", str(self.configuration))
        for number in range(nodes):
            self.start_node(f"n{number + 1}")
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until all nodes are idle."""
        deadline = time.monotonic() + 30
        while self("sinfo", "-h", "-p", "normal", "-o", "%T").split() != ["idle"]:
            if time.monotonic() > deadline:
                raise TimeoutError(self("sinfo", "-N", "-l"))
            time.sleep(0.3)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        folder.chmod(0o711)
        names = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        names |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        self._daemon("munged", "--force", *(f"--{name}={path}" for name, path in names.items()))

    def _daemon(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        subprocess.run([program, *arguments], check=True, env=self.environment, timeout=60)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._daemon("slurmd", "-f", str(self.configuration), "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill a node: its daemon and everything that runs there, at once."""
        for line in self._processes():
            pid, command = line.split(maxsplit=1)
            if f"-N {name}" in command or f"SLURMD_NODENAME={name}" in _environ(int(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def ranks_of(self, recipe: Path) -> dict[str, int]:
        """Return node -> process number of the training rank of a recipe there."""
        lines = [line for line in self._processes() if str(recipe) in line]
        ranks = [line for line in lines if "--local_rank" in line and "launcher" not in line]
        found = {}
        for line in ranks:
            pid = int(line.split()[0])
            (node,) = [v for v in _environ(pid) if v.startswith("SLURMD_NODENAME=")]
            found[node.partition("=")[2]] = pid
        assert found, lines
        return found

    def launcher_of(self, recipe: Path) -> int:
        """Return the process number of the launcher of a recipe's ranks, which starts them."""
        lines = [line for line in self._processes() if str(recipe) in line]
        (line,) = [line for line in lines if "deepspeed.launcher.launch" in line]
        return int(line.split()[0])

    def is_running(self, recipe: Path) -> bool:
        """Return whether any process of a recipe is left."""
        return any(str(recipe) in line for line in self._processes())

    def _processes(self) -> list[str]:
        found = subprocess.run(["ps", "-wweo", "pid=,args="], capture_output=True, text=True)
        own = str(os.getpid())
        return [line for line in found.stdout.splitlines() if line.split()[0] != own]

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a SLURM program; return what it prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(self, folder: Path, *arguments: str) -> list[str]:
        """Submit jobs by ``launch/slurm.sh`` from ``folder``; return their numbers."""
        command = ["bash", str(ROOT / "launch" / "slurm.sh"), f"--python={sys.executable}"]
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [line.split()[0] for line in done.stdout.splitlines()]

    def state(self, job: str) -> JobState:
        """Return a job's state."""
        text = self("scontrol", "show", "job", job, "--oneliner")
        found = dict(re.findall(r"(JobState|ExitCode|Restarts)=(\S+)", text))
        return JobState(
            found["JobState"], int(found["ExitCode"].partition(":")[0]), int(found["Restarts"])
        )

    def wait(self, job: str, seconds: float = 240.0) -> JobState:
        """Wait until a job has ended; return how."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)).name in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "REQUEUED",
            "SUSPENDED",
            "PREEMPTED",
            "SIGNALING",
            "STOPPED",
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state.name} after {seconds:.0f} s")
            time.sleep(0.5)
        return state

    def close(self) -> None:
        """End all daemons."""
        self("scancel", "--full", "-u", "root", check=False)
        time.sleep(1.0)
        for path in [*self.folder.glob("*.pid"), self.folder / "munge" / "pid"]:
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                continue
        # A daemon that was started twice has lost the file of its first process.
        for line in self._processes():
            pid, command = line.split(maxsplit=1)
            if str(self.configuration) in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _environ(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
