"""A real SLURM on loopback: munged, slurmctld and slurmd in a folder of their own."""

from __future__ import annotations

import os
import platform
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
NUM_GPUS = 2  # counted by SLURM, and nothing more

# No accounting (slurmdbd), as in the worst of clusters; every path and port is the test's own.
SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig=/dev/null
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
KillWait=5
MessageTimeout=100
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={node} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={node} MaxTime=1-0 State=UP
"""


def why_not() -> str | None:
    """What keeps SLURM from being started here."""
    missing = [name for name in (*DAEMONS, "sbatch", "setpriv") if shutil.which(name) is None]
    if missing:
        return f"not installed (Debian: slurm-wlm, munge): {', '.join(missing)}"
    return None if os.geteuid() == 0 else "SLURM's daemons are started as root"


@dataclass
class Cluster:
    """What a test needs of a running cluster."""

    folder: Path
    node: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which SLURM's commands find this cluster and no other."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        return {
            **outside,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }

    def call(self, *words: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True
        ).stdout

    def jobs(self) -> dict[str, tuple[str, str, str]]:
        """(rule or group, state, reason) of each job that the cluster remembers, by its id."""
        lines = self.call("squeue", "--all", "--states=all", "--noheader", "--format=%i|%k|%T|%r")
        rows = [line.split("|") for line in lines.splitlines()]
        return {row[0]: (row[1].split("_wildcards_")[0], row[2], row[3]) for row in rows}

    def facts(self, job: str) -> dict[str, str]:
        """`scontrol show job` by its keys."""
        words = self.call("scontrol", "show", "--detail", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to whoever asks for any, if there is room."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8")
    first = int(limits.split()[0])
    found: set[int] = set()
    while len(found) < count:
        # Of its own: a seed that other tests set would give two workers the same ports.
        port = random.SystemRandom().randrange(max(2000, first - 10_000), max(12_000, first))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.add(port)
    return sorted(found)


def write_configuration(folder: Path, node: str) -> None:
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    controller_port, node_port = free_ports(2)
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            folder=folder,
            node=node,
            controller_port=controller_port,
            node_port=node_port,
            cpus=os.cpu_count(),
            megabytes=psutil.virtual_memory().total // 2**20 - 512,
            gpus=NUM_GPUS,
        ),
        encoding="utf-8",
    )
    gpus = [folder / f"gpu{number}" for number in range(NUM_GPUS)]
    for gpu in gpus:
        gpu.touch()
    (folder / "gres.conf").write_text(
        "".join(f"Name=gpu File={gpu}\n" for gpu in gpus), encoding="utf-8"
    )
    # Within a job Snakemake drops SLURM_CONF before it calls srun; clusters have /etc/slurm.
    srun = folder / "bin" / "srun"
    srun.write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n',
        encoding="utf-8",
    )
    srun.chmod(0o755)


@contextmanager
def loopback_cluster() -> Iterator[Cluster]:
    """A cluster of this machine alone, with counted GPUs and the partitions `cpu` and `gpu`.

    Skips the test where there is no SLURM, or no root to start it.
    """
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no SLURM: {reason}")
    # A socket's path has at most 107 characters, and pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        folder, node = Path(name), platform.node().split(".")[0]
        folder.chmod(0o755)  # munge wants others to reach its socket
        write_configuration(folder, node)
        running = Cluster(folder, node)
        munge = [
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        ]  # fmt: skip
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            for words in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", node]):
                daemons.append(
                    subprocess.Popen(
                        [
                            "setpriv",
                            "--pdeathsig",
                            "TERM",
                            *words,
                        ],  # they go if the tests are killed
                        env=running.environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                if words is munge:
                    wait_for((folder / "munge.socket").exists, "munged", 120)
            wait_for(lambda: is_idle(running), "an idle node", 120)
            yield running
            subprocess.run(["scancel", "--user=root"], env=running.environment, check=False)
            wait_for(lambda: not running.call("squeue", "--noheader"), "the end of all jobs", 120)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(120)


def is_idle(cluster: Cluster) -> bool:
    result = subprocess.run(
        ["sinfo", "--noheader", "--format=%t"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode == 0 and "idle" in result.stdout
