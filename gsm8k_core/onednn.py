"""Matrix products by oneDNN where PyTorch's own, by MKL, are slow: AMD's processors with AVX-512.

MKL gives those its kernels for AVX2. On Zen 5, whose AVX-512 units are twice as wide, these have
half of oneDNN's speed in large products, and less than it in small ones too; on Zen 4 they are a
tenth slower in large ones, and faster in small ones (docs/experiments.md). The operator is the one
that torch.compile uses for a linear layer. What is chosen depends on the processor and the matrix
alone, never on a measurement, so a rerun on the same machine computes the same.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

FAMILY_OF_ZEN_4 = 25


@functools.cache
def smallest_matrix() -> float:
    """Entries of a matrix from which on oneDNN multiplies by it faster: 0 for all, inf for none."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return math.inf
    family = re.search(
        r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", described, re.MULTILINE
    )
    if (
        family is None
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return math.inf
    return 2**17 if int(family[1]) <= FAMILY_OF_ZEN_4 else 0


def applies_to(rows: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether `product` is right for these and faster: a large enough matrix, float32 on the CPU.

    Neither is empty or of a subclass, and autocast is off.
    """
    return (
        matrix.numel() >= smallest_matrix()
        and all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0
            for tensor in (rows, matrix)
        )
        and not torch.is_autocast_enabled("cpu")
        and not torch.overrides.has_torch_function((rows, matrix))
    )


def product(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`rows @ matrix.T + bias`, without a gradient: (…, K), (N, K) and (N,) to (…, N)."""
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")


def matmul_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` of matrices, without a gradient, by what is faster."""
    return product(a.contiguous(), b) if applies_to(a, b) else a @ b.T


def repeating_size(size: int) -> int:
    """`size`, or up to a sixteenth more: one of sixteen sizes from each power of two to the next.

    For a shape that it has not had lately, oneDNN makes a kernel first, which takes longer than a
    small product. Batches that are padded to these sizes have few shapes (docs/experiments.md).
    """
    step = 1 << max(0, size.bit_length() - 5)
    return -(-size // step) * step


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = product(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            columns = gradient.reshape(-1, gradient.shape[-1]).T.contiguous()
            of_weight = product(columns, rows.reshape(-1, rows.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return of_rows, of_weight, of_bias


class OneDnnLinear(torch.nn.Linear):
    """A linear layer whose products are oneDNN's, where `applies_to` says so."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not applies_to(input, self.weight):
            return functional.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        return _LinearFunction.apply(input, self.weight, self.bias)


def use_in(model: torch.nn.Module) -> None:
    """Let the linear layers of a model be `OneDnnLinear`, in place, where that is faster."""
    for part in model.modules():
        if type(part) is torch.nn.Linear and part.weight.numel() >= smallest_matrix():
            part.__class__ = OneDnnLinear
