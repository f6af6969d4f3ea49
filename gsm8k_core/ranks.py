"""Which of the processes of a job this is, by torchrun's environment. Imports no torch."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among those of the job, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine: which of the GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which logs and writes files for all."""
    return rank() == 0
