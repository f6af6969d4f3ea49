"""Sums and means over the entries of a tensor that a mask selects.

Entries outside the mask are replaced, not multiplied by 0, so that a NaN or an infinity there
reaches neither the value nor the gradient.
"""

from __future__ import annotations

import torch


def masked(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`tensor` where `mask` (bool or {0, 1}, of its shape) is true, 0 elsewhere."""
    return torch.where(mask.bool(), tensor, torch.zeros_like(tensor))


def masked_sum(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """Sum of the entries where `mask` (bool or {0, 1}, of the tensor's shape) is true.

    `dim=None` sums over everything. Raises ValueError if the shapes differ.
    """
    return _wide_sum(tensor, mask, dim).to(tensor.dtype)


def _wide_sum(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None
) -> torch.Tensor:
    """`masked_sum`; of half precision in float32, where a sum does not overflow before a mean."""
    if mask.shape != tensor.shape:
        raise ValueError(
            f"mask {tuple(mask.shape)} and tensor {tuple(tensor.shape)} must have the same shape"
        )
    kept = masked(tensor, mask)
    is_half = kept.dtype in (torch.float16, torch.bfloat16)
    return torch.sum(kept, dim=dim, dtype=torch.float32 if is_half else None)


def masked_normalize(
    tensor: torch.Tensor,
    mask: torch.Tensor,
    dim: int | tuple[int, ...] | None = None,
    normalize_constant: float = 1.0,
) -> torch.Tensor:
    """`masked_sum` divided by `normalize_constant`."""
    return (_wide_sum(tensor, mask, dim) / normalize_constant).to(tensor.dtype)


def masked_mean(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """Mean of the entries where `mask` is true; NaN where it selects none, as in torch."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim=dim)
    return (_wide_sum(tensor, mask, dim) / count).to(tensor.dtype)
