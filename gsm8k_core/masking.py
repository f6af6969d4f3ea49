"""Sums and means over the entries of a tensor that a mask selects.

Entries outside the mask are replaced, not multiplied by 0, so that a NaN or an infinity there
reaches neither the value nor the gradient.
"""

from __future__ import annotations

import torch


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, all else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def masked(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`tensor` where `mask` (bool or {0, 1}, of its shape) is true, 0 elsewhere."""
    return torch.where(mask.bool(), tensor, torch.zeros_like(tensor))


def masked_sum(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """Sum of the entries where `mask` (bool or {0, 1}, of the tensor's shape) is true.

    `dim=None` sums over everything. As in torch, a sum of bool or integers is an int64. Raises
    ValueError if the shapes differ.
    """
    return _narrowed(_wide_sum(tensor, mask, dim), tensor)


def _wide_sum(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None
) -> torch.Tensor:
    """`masked_sum`; of half precision in float32, where a sum does not overflow before a mean."""
    if mask.shape != tensor.shape:
        raise ValueError(
            f"mask {tuple(mask.shape)} and tensor {tuple(tensor.shape)} must have the same shape"
        )
    return torch.sum(at_least_float32(masked(tensor, mask)), dim=dim)


def _narrowed(result: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`result` in the type of `tensor`; that of bool or integers as it is."""
    return result.to(tensor.dtype) if tensor.is_floating_point() else result


def masked_normalize(
    tensor: torch.Tensor,
    mask: torch.Tensor,
    dim: int | tuple[int, ...] | None = None,
    normalize_constant: float = 1.0,
) -> torch.Tensor:
    """`masked_sum` divided by `normalize_constant`."""
    return _narrowed(_wide_sum(tensor, mask, dim) / normalize_constant, tensor)


def masked_mean(
    tensor: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """Mean of the entries where `mask` is true, of bool the share that is true.

    NaN where the mask selects none, as in torch.
    """
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim=dim)
    return _narrowed(_wide_sum(tensor, mask, dim) / count, tensor)
