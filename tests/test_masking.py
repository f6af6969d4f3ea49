"""Masked sums and means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.masking import masked_mean, masked_normalize, masked_sum


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 4),
    num_columns=st.integers(1, 5),
    dim=st.sampled_from([None, 0, 1, -1]),
    seed=st.integers(0, 1000),
)
def test_sum_and_mean_equal_a_loop_over_the_entries(
    num_rows: int, num_columns: int, dim: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_rows, num_columns, generator=generator) < 0.5
    cells: dict[int, list[float]] = {}
    for row in range(num_rows):
        for column in range(num_columns):
            key = {None: 0, 0: column, 1: row, -1: row}[dim]
            values = cells.setdefault(key, [])
            if mask[row, column]:
                values.append(tensor[row, column].item())
    sums = [math.fsum(cells[key]) for key in sorted(cells)]
    means = [
        math.fsum(cells[key]) / len(cells[key]) if cells[key] else math.nan for key in sorted(cells)
    ]
    assert masked_sum(tensor, mask, dim).reshape(-1).tolist() == pytest.approx(sums)
    assert masked_mean(tensor, mask, dim).reshape(-1).tolist() == pytest.approx(means, nan_ok=True)
    normalized = masked_normalize(tensor, mask, dim, 4.0).reshape(-1).tolist()
    assert normalized == pytest.approx([value / 4 for value in sums])


def test_normalize_divides_by_the_constant_and_not_by_the_count() -> None:
    tensor, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, True]])
    assert masked_normalize(tensor, mask, normalize_constant=10.0).item() == 0.5  # (1 + 4) / 10
    assert masked_mean(tensor, mask).item() == 2.5  # (1 + 4) / 2


def test_masks_of_zeros_and_ones_mean_the_same_as_bool_masks() -> None:
    tensor = torch.tensor([[1.0, 2.0, 4.0]])
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([[1, 0, 1]]).to(dtype)
        assert masked_mean(tensor, mask, dim=-1).tolist() == [2.5]
        assert masked_normalize(tensor, mask, dim=-1).tolist() == [5.0]


def test_a_mean_of_bool_is_the_share_that_is_true_and_one_of_integers_no_integer() -> None:
    mask = torch.tensor([[True, True, False], [True, True, False]])
    is_clipped = torch.tensor([[True, False, True], [False, False, True]])
    assert masked_mean(is_clipped, mask).item() == 0.25
    assert masked_mean(is_clipped, mask, dim=1).tolist() == [0.5, 0.0]
    assert masked_sum(is_clipped, mask).item() == 1
    numbers = torch.tensor([[1, 2, 9], [4, 4, 9]])
    assert masked_mean(numbers, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_normalize(numbers, mask, normalize_constant=2.0).item() == 5.5
    assert masked_sum(numbers, mask).dtype == torch.int64
    assert math.isnan(masked_mean(numbers, torch.zeros_like(mask)).item())


def test_the_mean_over_nothing_is_nan_and_the_sum_is_zero() -> None:
    tensor, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert math.isnan(masked_mean(tensor, mask).item())
    assert masked_mean(tensor, mask, dim=1).isnan().all()
    assert masked_normalize(tensor, mask).item() == 0.0


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_what_is_outside_the_mask_reaches_neither_value_nor_gradient(hidden: float) -> None:
    tensor = torch.tensor([1.0, hidden, 3.0], requires_grad=True)
    mean = masked_mean(tensor, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [0.5, 0.0, 0.5]


def test_a_mask_of_another_shape_is_refused_instead_of_broadcast() -> None:
    with pytest.raises(ValueError, match=r"mask \(3,\) and tensor \(2, 3\)"):
        masked_mean(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_half_precision_overflows_no_sooner_than_torch_s(dtype: torch.dtype) -> None:
    values = torch.full((300,), 250.3, dtype=dtype)
    mask = torch.ones(300)
    assert masked_mean(values, mask) == values.mean()
    assert masked_normalize(values, mask, None, 300.0) == values.mean()
    assert masked_mean(values, mask).dtype == masked_sum(values, mask).dtype == dtype
