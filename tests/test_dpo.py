"""The DPO loss, against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.dpo import dpo_loss

LOG_PROB = st.floats(-50, 0)


@settings(max_examples=40)
@given(
    pairs=st.lists(st.tuples(LOG_PROB, LOG_PROB, LOG_PROB, LOG_PROB), min_size=1, max_size=4),
    beta=st.floats(0.01, 1.0),
)
def test_the_loss_equals_equation_7_pair_by_pair(
    pairs: list[tuple[float, float, float, float]], beta: float
) -> None:
    columns = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    losses, metrics = dpo_loss(columns[0], columns[1], columns[2], columns[3], beta)
    for index, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(pairs):
        margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
        # -log σ(m) = log(1 + exp(-m))
        assert losses[index].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-6)
        assert metrics["margin"][index].item() == pytest.approx(margin, abs=1e-9)
        assert metrics["accuracy"][index].item() == (margin > 0)
        assert metrics["chosen_reward"][index].item() == pytest.approx(beta * (chosen - ref_chosen))
        rejected_reward = beta * (rejected - ref_rejected)
        assert metrics["rejected_reward"][index].item() == pytest.approx(rejected_reward)


def test_at_the_reference_the_loss_is_log_two_and_no_pair_counts_as_won() -> None:
    chosen, rejected = torch.tensor([-3.0]), torch.tensor([-5.0])
    losses, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert losses.item() == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() == 0.0


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_response() -> None:
    chosen = torch.tensor([-3.0], requires_grad=True)
    rejected = torch.tensor([-5.0], requires_grad=True)
    losses, metrics = dpo_loss(chosen, rejected, torch.tensor([-3.0]), torch.tensor([-5.0]), 0.1)
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    # β·σ(-m) = 0.1 · 1/2
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)
    assert not any(values.requires_grad for values in metrics.values())


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    low, high = torch.tensor([-9999.0]), torch.tensor([0.0])
    losses, _ = dpo_loss(low, high, high, low, beta=1.0)
    assert losses.item() == pytest.approx(19998.0)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (1,), ()])
def test_log_probs_that_are_not_one_a_response_are_refused(shape: tuple[int, ...]) -> None:
    summed = torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \(B,\) of all four"):
        dpo_loss(summed, summed, summed, torch.zeros(shape), 0.1)
    if len(shape) != 1:
        other = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"expected \(B,\) of all four"):
            dpo_loss(other, other, other, other, 0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_that_is_not_above_0_is_refused(beta: float) -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=f"beta is {beta}: take a number above 0"):
        dpo_loss(ones, ones, ones, ones, beta)
