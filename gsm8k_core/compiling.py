"""Whether torch.compile makes kernels: on a GPU with Triton and a C compiler, on a CPU with C++."""

from __future__ import annotations

import functools
import subprocess

import torch

from gsm8k_core.errors import first_line


@functools.cache
def compile_error(device_type: str) -> str | None:
    """Why torch.compile makes no kernel for `device_type` ("cpu", "cuda"); None where it does.

    Found by making a small one: a compiler without Python's headers, or a cache that cannot be
    written, shows in no other way.
    """
    try:
        compiled = torch.compile(_sum_of_exponentials, dynamic=True)
        compiled(torch.ones(2, 64, device=device_type))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return first_line(error) or type(error).__name__
    return None


def _sum_of_exponentials(values: torch.Tensor) -> torch.Tensor:
    return values.exp().sum(dim=-1)
