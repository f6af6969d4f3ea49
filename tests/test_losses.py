"""The parts of policy-gradient losses, each against arithmetic by hand or a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.errors import TrainingError
from gsm8k_core.grpo import grpo_microbatch_train_step
from gsm8k_core.losses import (
    Aggregation,
    KlEstimator,
    Level,
    aggregate,
    cispo_objective,
    clipped_tokens,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    importance_weights,
    kl_estimate,
    mask_truncated,
    policy_ratio,
    ppo_clip_objective,
    reinforce_objective,
    step_normalizer,
)
from gsm8k_core.sft import sft_microbatch_train_step

AGGREGATIONS: list[Aggregation] = ["sequence_mean", "token_mean", "constant"]


def random_case(
    seed: int, num_rows: int, num_columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy and old log-probs (B, T), advantages (B, 1), mask (B, T), possibly with empty rows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_columns)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    policy = old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn((num_rows, 1), generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.6
    return policy, old, advantages, mask


CASES = given(
    seed=st.integers(0, 10_000), num_rows=st.integers(1, 4), num_columns=st.integers(1, 5)
)


# ---------------------------------------------------------------------------------- whole losses


def test_the_naive_loss_is_minus_advantage_times_log_prob() -> None:
    loss = compute_naive_policy_gradient_loss(
        torch.tensor([[2.0], [-1.0]]), torch.tensor([[-0.5, -1.0], [-0.25, 0.0]])
    )
    assert loss.tolist() == [[1.0, 2.0], [-0.25, 0.0]]


@settings(max_examples=40)
@CASES
def test_the_clip_loss_equals_a_loop_over_the_tokens(
    seed: int, num_rows: int, num_columns: int
) -> None:
    policy, old, advantages, _ = random_case(seed, num_rows, num_columns)
    loss, metadata = compute_grpo_clip_loss(advantages, policy, old, 0.2)
    for row in range(num_rows):
        for column in range(num_columns):
            ratio = math.exp(policy[row, column] - old[row, column])
            free = ratio * advantages[row, 0].item()
            clipped = min(max(ratio, 0.8), 1.2) * advantages[row, 0].item()
            assert loss[row, column].item() == pytest.approx(-min(free, clipped))
            assert metadata["is_clipped"][row, column].item() == (clipped < free)
            assert metadata["ratio"][row, column].item() == pytest.approx(ratio)


def test_no_gradient_flows_where_the_clipped_term_is_the_smaller_one() -> None:
    # ratios 1.5 and 0.5, for a good and a bad completion, clipped at 1 ± 0.2
    policy = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    loss, metadata = compute_grpo_clip_loss(
        torch.tensor([[1.0], [-1.0]]), policy, torch.zeros(2, 2), 0.2
    )
    loss.sum().backward()
    assert policy.grad is not None
    # good and already likelier: stop; good and less likely: d(-ρA)/dlogπ = -0.5; bad: the reverse
    assert policy.grad.tolist() == [
        [0.0, pytest.approx(-0.5)],
        [pytest.approx(1.5), 0.0],
    ]
    assert metadata["is_clipped"].tolist() == [[True, False], [False, True]]


def test_each_loss_type_is_the_function_of_its_name() -> None:
    policy, old, advantages, _ = random_case(0, 3, 4)
    rewards = advantages + 1.0
    inputs = (rewards, advantages, old, 0.2)
    no_baseline, metadata = compute_policy_gradient_loss(policy, "no_baseline", *inputs)
    assert torch.equal(no_baseline, -rewards * policy)
    assert metadata == {}
    baseline, _ = compute_policy_gradient_loss(policy, "reinforce_with_baseline", *inputs)
    assert torch.equal(baseline, -advantages * policy)
    clip, metadata = compute_policy_gradient_loss(policy, "grpo_clip", *inputs)
    assert torch.equal(clip, compute_grpo_clip_loss(advantages, policy, old, 0.2)[0])
    assert set(metadata) == {"ratio", "is_clipped"}


@pytest.mark.parametrize(
    ("loss_type", "missing"),
    [
        ("no_baseline", "raw_rewards"),
        ("reinforce_with_baseline", "advantages"),
        ("grpo_clip", "needs advantages, old_log_probs, cliprange"),
        ("ppo", "unknown loss_type 'ppo'"),
    ],
)
def test_a_loss_without_what_it_needs_says_what_is_missing(loss_type: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        compute_policy_gradient_loss(
            torch.zeros(1, 1),
            loss_type,  # type: ignore[arg-type]
            None,
            None,
            None,
            None,
        )


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 2), (3, 1), (4, 1, 1), ()])
def test_advantages_that_are_not_one_a_completion_are_refused_instead_of_broadcast(
    shape: tuple[int, ...],
) -> None:
    log_probs = torch.zeros(4, 4)  # as wide as high, so that all but two would go through
    with pytest.raises(ValueError, match=r"expected \(4, 1\) for log-probs \(4, 4\)"):
        compute_naive_policy_gradient_loss(torch.ones(shape), log_probs)
    with pytest.raises(ValueError, match=r"expected \(4, 1\) for log-probs \(4, 4\)"):
        compute_grpo_clip_loss(torch.ones(shape), log_probs, log_probs, 0.2)


def test_advantages_may_be_one_a_token() -> None:
    advantages = torch.tensor([[1.0, -2.0]])
    loss = compute_naive_policy_gradient_loss(advantages, torch.tensor([[-0.5, -0.25]]))
    assert loss.tolist() == [[0.5, -0.5]]
    loss, _ = compute_grpo_clip_loss(advantages, torch.zeros(1, 2), torch.zeros(1, 2), 0.2)
    assert loss.tolist() == [[-1.0, 2.0]]


def test_old_log_probs_of_another_shape_are_refused_instead_of_broadcast() -> None:
    with pytest.raises(ValueError, match=r"old_log_probs \(2, 1\) and policy_log_probs \(2, 3\)"):
        compute_grpo_clip_loss(torch.ones(2, 1), torch.zeros(2, 3), torch.zeros(2, 1), 0.2)


def test_the_clip_loss_has_its_gradient_also_where_the_old_log_probs_were_not_detached() -> None:
    policy = torch.zeros(1, 2, requires_grad=True)
    loss, _ = compute_grpo_clip_loss(torch.tensor([[2.0]]), policy, policy, 0.2)
    loss.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[-2.0, -2.0]]


# ------------------------------------------------------------------------------------------- ratio


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_ratio_is_exactly_one_and_its_gradient_is_not_zero(level: Level) -> None:
    policy = (-torch.rand(3, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    ratio = policy_ratio(policy, policy.detach(), mask, level)
    assert (ratio == 1.0).all()
    ratio.sum().backward()
    assert policy.grad is not None
    assert (policy.grad == 1.0).all()


@settings(max_examples=40)
@CASES
def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(
    seed: int, num_rows: int, num_columns: int
) -> None:
    policy, old, _, mask = random_case(seed, num_rows, num_columns)
    ratio = policy_ratio(policy, old, mask, "sequence")
    for row in range(num_rows):
        gaps = (policy - old)[row][mask[row]].tolist()
        expected = math.exp(math.fsum(gaps) / len(gaps)) if gaps else 1.0
        for column in range(num_columns):
            wanted = expected if mask[row, column] else 1.0
            assert ratio[row, column].item() == pytest.approx(wanted)


def test_summed_over_its_tokens_the_sequence_ratio_has_the_gradient_of_gspo_equation_7() -> None:
    policy, old, advantages, _ = random_case(1, 3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    lengths = mask.sum(-1)
    policy.requires_grad_()
    ratio = policy_ratio(policy, old, mask, "sequence")
    (ratio * advantages * mask).sum().backward()
    assert policy.grad is not None
    found, policy.grad = policy.grad, None
    of_sequence = (((policy - old) * mask).sum(-1) / lengths).exp()  # eq. 7
    (of_sequence * advantages[:, 0] * lengths).sum().backward()
    torch.testing.assert_close(found, policy.grad)


def test_a_nan_outside_the_mask_does_not_reach_the_ratio() -> None:
    mask = torch.tensor([[True, False]])
    levels: list[Level] = ["token", "sequence"]
    for level in levels:
        policy = torch.tensor([[-1.0, math.nan]], requires_grad=True)
        ratio = policy_ratio(policy, torch.tensor([[-1.5, -1.0]]), mask, level)
        assert ratio.tolist() == [[pytest.approx(math.exp(0.5)), 1.0]]


# --------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [
        (1.5, 1.0, 1.28),  # clipped above at 1 + 0.28
        (1.1, 1.0, 1.1),  # inside
        (0.5, 1.0, 0.5),  # below, good: the free term is smaller
        (0.5, -1.0, -0.8),  # below, bad: clipped at 1 - 0.2
        (1.5, -1.0, -1.5),  # above, bad: the free term is smaller
        (9.0, -1.0, -9.0),
        (0.5, 0.0, 0.0),
    ],
)
def test_the_clip_objective_has_a_bound_for_each_side(
    ratio: float, advantage: float, objective: float
) -> None:
    found = ppo_clip_objective(torch.tensor([[ratio]]), torch.tensor([[advantage]]), 0.2, 0.28)
    assert found.item() == pytest.approx(objective)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [
        (9.0, -2.0, -6.0),  # -18 without it; c·A = 3·(-2)
        (2.0, -2.0, -4.0),  # above c·A: as it was
        (0.5, -2.0, -1.6),  # clipped at 0.8, above c·A
        (9.0, 2.0, 2.4),  # good: clipped at 1.2, no lower bound
    ],
)
def test_the_dual_clip_bounds_a_bad_completion_from_below(
    ratio: float, advantage: float, objective: float
) -> None:
    found = ppo_clip_objective(torch.tensor([[ratio]]), torch.tensor([[advantage]]), 0.2, 0.2, 3.0)
    assert found.item() == pytest.approx(objective)


def test_cispo_bounds_the_weight_and_leaves_every_token_its_gradient() -> None:
    policy = torch.tensor([[3.0, 0.5, 1.1]]).log().requires_grad_()
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    ratio = policy_ratio(policy, torch.zeros(1, 3), everywhere, "token")
    cispo_objective(ratio, torch.tensor([[2.0]]), policy, 0.2, 0.28).sum().backward()
    assert policy.grad is not None
    # weight·A: 1.28·2, 0.8·2, 1.1·2, though PPO would clip the first; the weight is a constant
    assert policy.grad.tolist() == [pytest.approx([2.56, 1.6, 2.2])]


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_beyond_all_numbers_is_bounded_and_no_nan(
    advantage: float, dual_clip: float | None, level: Level
) -> None:
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = policy_ratio(log_probs, torch.tensor([[-101.0, -101.0]]), mask, level)
    objective = ppo_clip_objective(ratio, torch.tensor([[advantage]]), 0.2, 0.2, dual_clip)
    objective.sum().backward()
    assert bool(objective.isfinite().all())
    assert log_probs.grad is not None and bool(log_probs.grad.isfinite().all())


def test_reinforce_weights_the_log_prob_with_the_advantage() -> None:
    objective = reinforce_objective(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0]]))
    assert objective.tolist() == [[3.0, 6.0]]


def test_tokens_count_as_clipped_only_where_clipping_changes_the_objective() -> None:
    ratio = torch.tensor([[0.5, 1.5, 1.0], [0.5, 1.5, 1.0], [0.5, 1.5, 1.0]])
    below, above = clipped_tokens(ratio, torch.tensor([[1.0], [-1.0], [0.0]]), 0.2, 0.2)
    assert below.tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert above.tolist() == [[False, True, False], [False] * 3, [False] * 3]


# ---------------------------------------------------------------------------------------------- KL


def test_the_kl_estimators_are_those_of_schulman() -> None:
    policy, ref = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    # d = 0.5: d; d²/2; exp(-d) + d - 1
    assert kl_estimate(policy, ref, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(policy, ref, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(policy, ref, "k3").item() == pytest.approx(math.exp(-0.5) - 0.5)
    kinds: list[KlEstimator] = ["k1", "k2", "k3"]
    assert [kl_estimate(policy, policy, kind).item() for kind in kinds] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (3,), ()])
def test_the_kl_to_log_probs_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ref_log_probs .* and policy_log_probs \(2, 3\) must"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(shape), "k3")


def expectation_over_tokens(kind: KlEstimator, as_loss: bool) -> torch.Tensor:
    """Exact mean under π, over a vocabulary of 6, of the estimate or of its gradient."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.requires_grad_()
    ref = REF_LOGITS.log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    estimate = kl_estimate(log_probs, ref, kind)
    mean = (log_probs.exp().detach() * estimate).sum()
    return torch.autograd.grad(mean, logits)[0] if as_loss else mean.detach()


REF_LOGITS = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def exact_kl(forward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(π ‖ π_ref), or with the two exchanged, and its gradient by the policy's logits."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.requires_grad_()
    policy, ref = logits.log_softmax(-1), REF_LOGITS.log_softmax(-1)
    kl = (policy.exp() * (policy - ref)).sum() if forward else (ref.exp() * (ref - policy)).sum()
    return kl.detach(), torch.autograd.grad(kl, logits)[0]


def test_k1_and_k3_are_unbiased_as_values_and_k2_is_not() -> None:
    kl, _ = exact_kl(forward=True)
    torch.testing.assert_close(expectation_over_tokens("k1", as_loss=False), kl)
    torch.testing.assert_close(expectation_over_tokens("k3", as_loss=False), kl)
    assert (expectation_over_tokens("k2", as_loss=False) - kl).abs() > 0.01


def test_as_losses_k1_does_nothing_k2_follows_the_kl_and_k3_the_kl_the_other_way_round() -> None:
    _, gradient = exact_kl(forward=True)
    _, gradient_reversed = exact_kl(forward=False)
    nothing = torch.zeros_like(gradient)
    torch.testing.assert_close(expectation_over_tokens("k1", as_loss=True), nothing)
    torch.testing.assert_close(expectation_over_tokens("k2", as_loss=True), gradient)
    torch.testing.assert_close(expectation_over_tokens("k3", as_loss=True), gradient_reversed)
    assert (gradient - gradient_reversed).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_token_far_from_the_reference_makes_no_infinity_of_k3_or_of_a_ratio(
    dtype: torch.dtype,
) -> None:
    policy = torch.tensor([[-100.0, -1.0]], dtype=dtype, requires_grad=True)
    far = torch.tensor([[-1.0, -2.0]], dtype=dtype)
    estimate = kl_estimate(policy, far, "k3")
    ratio = policy_ratio(-policy, -far, torch.ones(1, 2, dtype=torch.bool), "token")
    for found in (estimate, ratio):
        assert found.isfinite().all()
        assert found[0, 1].item() == pytest.approx(math.exp(-1.0), rel=1e-6)
    (gradient,) = torch.autograd.grad(estimate.sum() + ratio.sum(), policy)
    assert gradient.isfinite().all()
    assert gradient[0, 0] == 0.0


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_taken_from_a_reward_k1_alone_follows_the_kl(kind: KlEstimator) -> None:
    _, gradient = exact_kl(forward=True)
    logits = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_probs = logits.requires_grad_().log_softmax(-1)
    penalty = kl_estimate(log_probs.detach(), REF_LOGITS.log_softmax(-1), kind)
    mean = (log_probs.exp().detach() * penalty * log_probs).sum()  # E[k·log π]
    (found,) = torch.autograd.grad(mean, logits)
    assert torch.allclose(found, gradient) == (kind == "k1")


# ------------------------------------------------------------------------------------- aggregation

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("how", "normalizer", "loss"),
    [
        ("sequence_mean", 2.0, 6.0),  # (2 + 10) / 2; the empty row is not a sequence
        ("token_mean", 4.0, 4.0),  # (1 + 2 + 3 + 10) / 4
        ("constant", 16.0, 1.0),  # 16 / (2 · 8)
    ],
)
def test_each_aggregation_gives_its_mean(how: Aggregation, normalizer: float, loss: float) -> None:
    assert step_normalizer(how, MASK, constant=8) == normalizer
    assert aggregate(LOSSES, MASK, how, normalizer=normalizer).item() == loss


@pytest.mark.parametrize("how", AGGREGATIONS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 6),
    num_columns=st.integers(1, 5),
    microbatch=st.integers(1, 6),
)
def test_the_parts_of_a_step_add_up_to_the_step(
    how: Aggregation, seed: int, num_rows: int, num_columns: int, microbatch: int
) -> None:
    losses, _, _, mask = random_case(seed, num_rows, num_columns)
    mask[0, 0] = True  # something to learn from
    normalizer = step_normalizer(how, mask, constant=7)
    whole = aggregate(losses, mask, how, normalizer=normalizer).item()
    parts = [
        aggregate(losses[rows], mask[rows], how, normalizer=normalizer).item()
        for rows in torch.arange(num_rows).split(microbatch)
    ]
    assert math.fsum(parts) == pytest.approx(whole)
    of_parts = [step_normalizer(how, part, constant=7) for part in mask.split(microbatch)]
    assert math.fsum(of_parts) == pytest.approx(normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_counted_exactly_whatever_the_masks_dtype(dtype: torch.dtype) -> None:
    everywhere = torch.ones(1, 2049, dtype=torch.bool)
    mask = everywhere.to(dtype)  # 2049 is no number of either type
    losses, old = torch.ones(1, 2049), torch.full((1, 2049), -0.5)
    assert step_normalizer("token_mean", mask, 1) == 2049.0
    assert aggregate(losses, mask, "sequence_mean", normalizer=1.0).item() == 1.0
    ratio = policy_ratio(torch.zeros(1, 2049), old, mask, "sequence")
    assert torch.equal(ratio, policy_ratio(torch.zeros(1, 2049), old, everywhere, "sequence"))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_truncated_completions_leave_numerator_and_denominator(how: Aggregation) -> None:
    masked = mask_truncated(torch.ones(3, 3, dtype=torch.bool), torch.tensor([False, True, False]))
    with_mask = aggregate(LOSSES, masked, how, normalizer=step_normalizer(how, masked, 8))
    kept = LOSSES[[0, 2]]
    everywhere = torch.ones_like(kept, dtype=torch.bool)
    without = aggregate(kept, everywhere, how, normalizer=step_normalizer(how, everywhere, 8))
    assert with_mask.item() == pytest.approx(without.item())


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_step_with_nothing_to_learn_from_is_an_error_and_not_a_nan(how: Aggregation) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    normalizer = step_normalizer(how, nothing, 8)
    assert normalizer == 0.0
    with pytest.raises(TrainingError, match="no completion counts.*max_new_tokens"):
        aggregate(LOSSES[:2], nothing, how, normalizer=normalizer)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_microbatch_with_nothing_in_the_mask_adds_zero(how: Aggregation) -> None:
    losses = torch.full((2, 3), math.nan, requires_grad=True)
    share = aggregate(losses, torch.zeros(2, 3, dtype=torch.bool), how, normalizer=4.0)
    share.backward()
    assert share.item() == 0.0
    assert losses.grad is not None
    assert not losses.grad.any()


# ------------------------------------------------------------------- corrections of weight, reward


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        # ratios per token: 3 and 1/2 | 1.2 and (outside the mask) anything; bound 1.4
        ("token", "truncate", [[1.4, 0.5], [1.2, 1.0]]),
        ("token", "mask", [[0.0, 0.5], [1.2, 1.0]]),
        # per completion: 3/2 | 1.2
        ("sequence", "truncate", [[1.4, 1.4], [1.2, 1.0]]),
        ("sequence", "mask", [[0.0, 0.0], [1.2, 1.0]]),
    ],
)
def test_importance_weights_are_bounded_by_token_or_by_completion(
    level: str, mode: str, expected: list[list[float]]
) -> None:
    trainer = torch.tensor([[3.0, 0.5], [1.2, math.nan]]).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    weights = importance_weights(
        trainer,
        torch.zeros(2, 2),
        mask,
        level,  # type: ignore[arg-type]
        mode,  # type: ignore[arg-type]
        1.4,
    )
    assert weights.tolist() == [pytest.approx(row) for row in expected]
    assert not weights.requires_grad


ONE, EVERYWHERE, UNKNOWN = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), cast(Any, "x")


@pytest.mark.parametrize(
    "call",
    [
        lambda: policy_ratio(ONE, ONE, EVERYWHERE, UNKNOWN),
        lambda: kl_estimate(ONE, ONE, UNKNOWN),
        lambda: aggregate(ONE, EVERYWHERE, UNKNOWN, normalizer=1.0),
        lambda: step_normalizer(UNKNOWN, EVERYWHERE, 1),
        lambda: importance_weights(ONE, ONE, EVERYWHERE, UNKNOWN, "mask", 2.0),
        lambda: importance_weights(ONE, ONE, EVERYWHERE, "token", UNKNOWN, 2.0),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="unknown .*'x': expected"):
        call()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("policy", "old"), [(-2.0, -math.inf), (-math.inf, -2.0)])
def test_a_token_of_probability_zero_makes_no_nan_of_a_ratio(
    level: str, policy: float, old: float
) -> None:
    policies = torch.tensor([[-1.0, policy]], requires_grad=True)
    ratio = policy_ratio(
        policies, torch.tensor([[-1.0, old]]), torch.ones(1, 2).bool(), cast(Any, level)
    )
    assert bool(ratio.isfinite().all())
    ratio.sum().backward()
    assert policies.grad is not None and not bool(policies.grad.isnan().any())


def test_a_clip_range_below_zero_and_steps_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="cliprange is -0.2: take 0 or above"):
        compute_grpo_clip_loss(ONE, ONE, ONE, -0.2)
    mask = torch.ones_like(ONE).bool()
    for step in (sft_microbatch_train_step, grpo_microbatch_train_step):
        for wrong in (0, 2.5):
            with pytest.raises(ValueError, match=f"gradient_accumulation_steps is {wrong}: take"):
                step(ONE, mask, cast(int, wrong), cast(Any, "reinforce_with_baseline"))
