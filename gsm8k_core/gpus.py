"""Which NVIDIA GPUs there are for this process, told without torch and without its driver."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def gpus_of_machine(root: Path = Path("/")) -> int:
    """How many NVIDIA GPUs there are: device files, or what the driver lists before it made any."""
    return len(list((root / "dev").glob("nvidia[0-9]*"))) or len(
        list((root / "proc/driver/nvidia/gpus").glob("*"))
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE_DEVICES)
    if named is None:
        return [str(number) for number in range(gpus_of_machine())]
    # CUDA takes the list for ended where a name is none: "" and "-1" say that there is no GPU, and
    # so does "NoDevFiles", of older SLURMs.
    names = [name.strip() for name in named.split(",")]
    known = itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names)
    return list(dict.fromkeys(known))
