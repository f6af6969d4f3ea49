"""Run a command on GPUs of its own: `with_gpus.py 2 python scripts/train_grpo.py …`.

Jobs side by side would all take GPU 0. This waits until as many GPUs as asked for are free, names
them in $CUDA_VISIBLE_DEVICES and becomes the command. It chooses among those that the variable
already names, otherwise among all of the machine's. A GPU is taken by locking a file in a folder of
the user's, below the temporary directory. The process keeps that file open, so the GPU is free
again when the job has ended, for whatever reason.

The command runs unchanged if it asks for no GPU, if there is none, or in a job of a scheduler
(SLURM, LSF, PBS, SGE): that gives each job its own devices, and may number them from 0 in every
job.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import tempfile
import time
import urllib.parse
from pathlib import Path

from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.errors import ConfigError
from gsm8k_core.gpus import VISIBLE_DEVICES, visible_gpus

log = logging.getLogger("with_gpus")

SECONDS_BETWEEN_LOOKS = 0.5
OF_SCHEDULERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID")


def locks_folder() -> Path:
    """Where the user's locks lie; no one else can have put anything there."""
    folder = Path(tempfile.gettempdir()) / f"gsm8k-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: not a folder of yours; remove it, or set TMPDIR")
    return folder


def claim(devices: list[str], count: int) -> list[str]:
    """`count` of `devices` that are free, now taken until this process ends; or none of them."""
    folder = locks_folder()
    taken: dict[str, int] = {}
    # One looks at a time: two that need two each would otherwise hold one each, and both give up.
    with (folder / "looking").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        for device in devices:
            descriptor = os.open(
                folder / urllib.parse.quote(device, safe=""), os.O_RDWR | os.O_CREAT, 0o600
            )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            taken[device] = descriptor
            if len(taken) == count:
                break
        kept = len(taken) == count
        for descriptor in taken.values():
            if kept:
                os.set_inheritable(descriptor, True)  # the command goes on holding it
            else:
                os.close(descriptor)
    return list(taken) if kept else []


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("count", type=int, help="how many GPUs")
    arguments.add_argument("command", nargs=argparse.REMAINDER, help="what runs on them")
    args = arguments.parse_args(argv)
    count, command = args.count, args.command
    if not command:
        arguments.error("name a command")
    has_own = any(name in os.environ for name in OF_SCHEDULERS)
    if count > 0 and not has_own and (devices := visible_gpus()):
        # Who asks for more than there are is told so by Snakemake and by the trainer.
        count = min(count, len(devices))
        taken = claim(devices, count)
        if not taken:
            log.info("waiting until %d of the GPUs %s are free", count, ",".join(devices))
        while not taken:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            taken = claim(devices, count)
        os.environ[VISIBLE_DEVICES] = ",".join(taken)
    os.execvp(command[0], command)


if __name__ == "__main__":
    leave(run_script(main))
