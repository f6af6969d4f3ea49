"""One optimizer step of the policy-gradient family."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_models import SIZES
from transformers import Qwen2Config, Qwen2ForCausalLM

from gsm8k_core.config import GrpoMethod
from gsm8k_core.grpo import (
    PolicyBatch,
    add_metrics,
    grpo_microbatch_train_step,
    has_gradient,
    policy_loss,
    sampler_gap,
    summarize_metrics,
)
from gsm8k_core.losses import mask_truncated, step_normalizer
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import collate, split_by_token_budget

AGGREGATIONS = ["sequence_mean", "token_mean", "constant"]
KL_IN_REWARD = {
    "kl_coefficient": 0.1,
    "kl_placement": "reward",
    "kl_estimator": "k1",
    "advantage": "group_centered",
}


def method(**changes: Any) -> GrpoMethod:
    return GrpoMethod.model_validate({"kind": "grpo", "max_new_tokens": 8, **changes})


def random_batch(seed: int, num_rows: int = 4, num_columns: int = 5) -> tuple[Any, PolicyBatch]:
    """Policy log-probs with a gradient, and a batch that is off policy in every way."""
    generator = torch.Generator().manual_seed(seed)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    old = -torch.rand((num_rows, num_columns), generator=generator, dtype=torch.float64)
    mask = torch.rand((num_rows, num_columns), generator=generator) < 0.7
    mask[0, 0] = True
    batch = PolicyBatch(
        advantages=torch.randn(num_rows, generator=generator, dtype=torch.float64),
        response_mask=mask,
        old_log_probs=old,
        sampler_log_probs=near(old),
        ref_log_probs=near(old),
    )
    return near(old).requires_grad_(), batch


def test_log_probs_that_were_not_detached_have_no_part_in_the_gradient() -> None:
    policy, batch = random_batch(0)
    asked = method(kl_coefficient=0.1, importance_correction="token")
    (expected,) = torch.autograd.grad(policy_loss(policy, None, batch, asked, 9.0)[0], policy)
    moved = policy - policy.detach()  # 0, with a gradient
    others = ("old_log_probs", "sampler_log_probs", "ref_log_probs")
    attached = replace(batch, **{name: getattr(batch, name) + moved for name in others})
    (found,) = torch.autograd.grad(policy_loss(policy, None, attached, asked, 9.0)[0], policy)
    assert torch.equal(found, expected)


def test_a_maximum_that_is_nan_stays_one_whichever_comes_first() -> None:
    parts = [{"max/ratio": 1.0}, {"max/ratio": math.nan}, {"max/ratio": 2.0}]
    for order in itertools.permutations(parts):
        assert math.isnan(add_metrics(order)["max/ratio"])


def test_of_no_microbatch_there_is_no_metric() -> None:
    assert summarize_metrics(add_metrics([])) == {}


def rows_of(batch: PolicyBatch, rows: torch.Tensor) -> PolicyBatch:
    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    return PolicyBatch(
        advantages=batch.advantages[rows],
        response_mask=batch.response_mask[rows],
        old_log_probs=pick(batch.old_log_probs),
        sampler_log_probs=pick(batch.sampler_log_probs),
        ref_log_probs=pick(batch.ref_log_probs),
    )


# -------------------------------------------------------------------------------- microbatch step


def test_the_microbatch_step_is_the_mean_over_time_and_then_over_the_batch() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    loss, metadata = grpo_microbatch_train_step(
        log_probs, mask, 4, "no_baseline", raw_rewards=torch.tensor([[1.0], [2.0]])
    )
    # ((2 + 4)/2 + 2·8) / 2 rows / 4 steps
    assert loss.item() == pytest.approx((3.0 + 16.0) / 2 / 4)
    assert log_probs.grad is not None
    # row 0: -1/(2 tokens · 2 rows · 4 steps); row 1: -2/(1 · 2 · 4)
    assert log_probs.grad.tolist() == [[0.0, -0.0625, -0.0625], [-0.25, 0.0, 0.0]]
    assert not loss.requires_grad
    assert metadata == {}


def test_the_microbatch_step_reports_the_masked_means_of_ratio_and_clipping() -> None:
    log_probs = torch.tensor([[1.5, 1.0, 9.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False]])
    loss, metadata = grpo_microbatch_train_step(
        log_probs,
        mask,
        1,
        "grpo_clip",
        advantages=torch.tensor([[1.0]]),
        old_log_probs=torch.zeros(1, 3),
        cliprange=0.2,
    )
    assert loss.item() == pytest.approx(-(1.2 + 1.0) / 2)
    assert metadata["ratio"].item() == pytest.approx(1.25)
    assert metadata["is_clipped"].item() == 0.5


def test_the_microbatch_step_of_a_row_without_tokens_is_nan_and_not_a_number_made_up() -> None:
    loss, _ = grpo_microbatch_train_step(
        torch.zeros(2, 2, requires_grad=True),
        torch.tensor([[True, True], [False, False]]),
        1,
        "reinforce_with_baseline",
        advantages=torch.ones(2, 1),
    )
    assert math.isnan(loss.item())


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_what_stands_in_the_padding_does_not_reach_the_microbatch_step(hidden: float) -> None:
    def step(filler: float) -> tuple[torch.Tensor, ...]:
        policy, batch = random_batch(0)
        assert batch.old_log_probs is not None
        mask = batch.response_mask
        mask[:, 0] = True
        log_probs = policy.detach().masked_fill(~mask, filler).requires_grad_()
        loss, metadata = grpo_microbatch_train_step(
            log_probs,
            mask,
            1,
            "grpo_clip",
            advantages=batch.advantages[:, None],
            old_log_probs=batch.old_log_probs.masked_fill(~mask, filler),
            cliprange=0.2,
        )
        assert log_probs.grad is not None and log_probs.grad.isfinite().all()
        return loss, log_probs.grad, *metadata.values()

    for found, expected in zip(step(hidden), step(0.0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["response_mask", "old_log_probs"])
def test_the_microbatch_step_refuses_another_shape_instead_of_broadcasting(name: str) -> None:
    policy, batch = random_batch(0)
    tensors: Any = {"response_mask": batch.response_mask, "old_log_probs": batch.old_log_probs}
    tensors[name] = tensors[name][:, :1]
    with pytest.raises(ValueError, match=rf"{name} \(4, 1\) and policy_log_probs \(4, 5\) must"):
        grpo_microbatch_train_step(
            policy,
            gradient_accumulation_steps=1,
            loss_type="grpo_clip",
            advantages=batch.advantages[:, None],
            cliprange=0.2,
            **tensors,
        )


# ------------------------------------------------------------------------------------ policy loss


def loop_loss(policy: Any, entropy: Any, batch: PolicyBatch, settings: GrpoMethod) -> float:
    """The loss of a whole step, one completion and one token at a time."""
    sequences: list[list[float]] = []
    assert batch.old_log_probs is not None
    assert batch.sampler_log_probs is not None
    assert batch.ref_log_probs is not None
    for row in range(len(policy)):
        positions = batch.response_mask[row].nonzero()[:, 0].tolist()
        if not positions:
            continue
        advantage = batch.advantages[row].item()
        gaps = {t: (policy - batch.old_log_probs)[row, t].item() for t in positions}
        drift = {
            t: (batch.old_log_probs - batch.sampler_log_probs)[row, t].item() for t in positions
        }
        losses = []
        for t in positions:
            log_ratio = gaps[t]
            if settings.ratio_level == "sequence":
                log_ratio = sum(gaps.values()) / len(gaps)
            ratio = math.exp(log_ratio)
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            log_prob = policy[row, t].item()
            objective = {
                "ppo_clip": min(ratio * advantage, clipped * advantage),
                "cispo": clipped * advantage * log_prob,
                "reinforce": advantage * log_prob,
            }[settings.objective]
            if settings.dual_clip and advantage < 0:
                objective = max(objective, settings.dual_clip * advantage)
            if settings.importance_correction != "none":
                of_sequence = settings.importance_correction == "sequence"
                weight = math.exp(sum(drift.values()) if of_sequence else drift[t])
                if weight > settings.importance_bound:
                    truncate = settings.importance_mode == "truncate"
                    weight = settings.importance_bound if truncate else 0.0
                objective *= weight
            gap = (policy - batch.ref_log_probs)[row, t].item()
            kl = {"k1": gap, "k2": gap * gap / 2, "k3": math.exp(-gap) + gap - 1}
            beta = settings.kl_coefficient if settings.kl_placement == "loss" else 0.0
            bonus = settings.entropy_coefficient * entropy[row, t].item()
            losses.append(-objective + beta * kl[settings.kl_estimator] - bonus)
        sequences.append(losses)
    if settings.aggregation == "sequence_mean":
        return sum(sum(losses) / len(losses) for losses in sequences) / len(sequences)
    total = sum(sum(losses) for losses in sequences)
    if settings.aggregation == "token_mean":
        return total / sum(len(losses) for losses in sequences)
    return total / (len(sequences) * settings.max_new_tokens)


def is_allowed(choices: dict[str, Any]) -> bool:
    try:
        method(**choices)
    except ValidationError:
        return False
    return True


CHOICES = st.fixed_dictionaries(
    {
        "advantage": st.just("group_centered"),  # group_zscore refuses KL in the reward
        "objective": st.sampled_from(["ppo_clip", "cispo", "reinforce"]),
        "ratio_level": st.sampled_from(["token", "sequence"]),
        "clip_low": st.sampled_from([0.1, 0.2]),
        "clip_high": st.sampled_from([0.1, 0.28]),
        "dual_clip": st.sampled_from([None, 1.3]),
        "aggregation": st.sampled_from(AGGREGATIONS),
        "kl_coefficient": st.sampled_from([0.0, 0.5]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_placement": st.sampled_from(["loss", "reward"]),
        "entropy_coefficient": st.sampled_from([0.0, 0.2]),
        "importance_correction": st.sampled_from(["none", "token", "sequence"]),
        "importance_mode": st.sampled_from(["truncate", "mask"]),
        "importance_bound": st.sampled_from([1.1, 2.0]),
    }
).filter(is_allowed)


@settings(max_examples=120)
@given(
    choices=CHOICES,
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 5),
    num_columns=st.integers(1, 5),
)
def test_every_combination_of_parts_equals_a_loop_over_the_tokens(
    choices: dict[str, Any], seed: int, num_rows: int, num_columns: int
) -> None:
    policy, batch = random_batch(seed, num_rows, num_columns)
    entropy = policy.square()
    settings_ = method(**choices)
    normalizer = step_normalizer(
        settings_.aggregation, batch.response_mask, settings_.max_new_tokens
    )
    loss, metrics = policy_loss(policy, entropy, batch, settings_, normalizer)
    expected = loop_loss(policy, entropy, batch, settings_)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert metrics["step_sum/loss"] == loss.item()


@settings(max_examples=20)
@given(choices=CHOICES, seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 3]))
def test_loss_and_metrics_of_microbatches_add_up_to_those_of_the_step(
    choices: dict[str, Any], seed: int, size: int
) -> None:
    policy, batch = random_batch(seed)
    entropy = policy.square()
    settings_ = method(**choices)
    normalizer = step_normalizer(settings_.aggregation, batch.response_mask, 8)
    _, whole = policy_loss(policy, entropy, batch, settings_, normalizer)
    parts = [
        policy_loss(policy[rows], entropy[rows], rows_of(batch, rows), settings_, normalizer)[1]
        for rows in torch.arange(len(policy)).split(size)
    ]
    assert add_metrics(parts) == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"objective": "ppo_clip", "dual_clip": 3.0, "ratio_level": "sequence"}, False),
        ({"objective": "cispo", "importance_correction": "token"}, False),
        ({"objective": "reinforce", "aggregation": "constant"}, False),
        (KL_IN_REWARD, False),
        ({"kl_coefficient": 0.1}, True),
        ({"entropy_coefficient": 0.1}, True),
    ],
)
def test_a_completion_without_advantage_has_no_gradient_unless_something_is_added_to_its_loss(
    changes: dict[str, Any], expected: bool
) -> None:
    log_probs, batch = random_batch(0)
    batch = replace(batch, response_mask=torch.ones_like(batch.response_mask))
    batch.advantages[1] = 0.0
    settings_ = method(**changes)
    entropy = log_probs * log_probs
    policy_loss(log_probs, entropy, batch, settings_, 4.0)[0].backward()
    assert log_probs.grad is not None
    found = log_probs.grad.abs().amax(dim=-1) > 0.0
    assert bool(found[1]) is expected
    assert has_gradient(batch.advantages, settings_)[1] == expected
    assert bool(has_gradient(batch.advantages, settings_)[found].all())


def test_on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped() -> None:
    policy, batch = random_batch(0)
    on_policy = PolicyBatch(batch.advantages, batch.response_mask)
    for level in ("token", "sequence"):
        policy.grad = None
        loss, metrics = policy_loss(
            policy, None, on_policy, method(ratio_level=level, clip_low=1e-9, clip_high=1e-9), 4.0
        )
        summary = summarize_metrics(metrics)
        assert summary["ratio"] == 1.0
        assert summary["ratio_max"] == 1.0
        assert summary["approx_kl"] == 0.0
        assert summary["clip_fraction_low"] == 0.0
        assert summary["clip_fraction_high"] == 0.0
        loss.backward()
        # The gradient is that of REINFORCE, though the clip range is next to nothing.
        lengths = batch.response_mask.sum(-1, keepdim=True).clamp(min=1)
        reinforce = -batch.advantages[:, None] * batch.response_mask / lengths / 4.0
        torch.testing.assert_close(policy.grad, reinforce)


def test_clip_fractions_count_the_tokens_below_and_above_the_range() -> None:
    policy = torch.tensor([[1.5, 0.5, 1.0, 7.0], [1.5, 0.5, 0.5, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    batch = PolicyBatch(torch.tensor([1.0, -1.0]), mask, old_log_probs=torch.zeros(2, 4))
    _, metrics = policy_loss(policy, None, batch, method(), 2.0)
    summary = summarize_metrics(metrics)
    # 7 tokens; good row: 1.5 is above; bad row: 0.5 and 0.5 are below; 7.0 is outside the mask
    assert summary["clip_fraction_high"] == pytest.approx(1 / 7)
    assert summary["clip_fraction_low"] == pytest.approx(2 / 7)
    assert summary["ratio"] == pytest.approx(6.5 / 7)
    assert summary["ratio_max"] == pytest.approx(1.5)
    assert (summary["num_tokens"], summary["num_completions"]) == (7, 2)
    _, metrics = policy_loss(policy, None, batch, method(objective="cispo"), 2.0)
    summary = summarize_metrics(metrics)
    # CISPO bounds the weight whatever the sign: 1.5 twice, 0.5 three times
    assert summary["clip_fraction_high"] == pytest.approx(2 / 7)
    assert summary["clip_fraction_low"] == pytest.approx(3 / 7)


def test_tokens_that_the_dual_clip_holds_are_counted_by_themselves() -> None:
    policy = torch.tensor([[5.0, 1.0], [5.0, 2.0]]).log()
    batch = PolicyBatch(
        torch.tensor([0.5, -0.5]), torch.ones(2, 2).bool(), old_log_probs=torch.zeros(2, 2)
    )
    summary = summarize_metrics(policy_loss(policy, None, batch, method(dual_clip=3.0), 2.0)[1])
    assert summary["clip_fraction_dual"] == pytest.approx(1 / 4)  # the bad row's 5.0
    assert summary["clip_fraction_high"] == pytest.approx(1 / 4)  # the good row's 5.0
    assert summary["clip_fraction_low"] == 0.0
    plain = summarize_metrics(policy_loss(policy, None, batch, method(), 2.0)[1])
    assert "clip_fraction_dual" not in plain


@pytest.mark.parametrize(("mode", "mean"), [("truncate", 1.5), ("mask", 0.5)])
def test_weights_above_the_bound_are_counted_whatever_becomes_of_them(
    mode: str, mean: float
) -> None:
    # Weights 1, 1, 3 and 4 under a bound of 2, and one outside the mask.
    old = torch.tensor([[1.0, 1.0, 3.0], [4.0, 9.0, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    batch = PolicyBatch(torch.ones(2), mask, old, sampler_log_probs=torch.zeros(2, 3))
    settings_ = method(importance_correction="token", importance_mode=mode)
    summary = summarize_metrics(policy_loss(old, None, batch, settings_, 2.0)[1])
    assert summary["importance_bounded_fraction"] == 0.5
    assert summary["importance_weight"] == pytest.approx(mean)


def test_a_weight_at_its_bound_is_not_bounded() -> None:
    old, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    batch = PolicyBatch(torch.ones(1), mask, old, sampler_log_probs=torch.zeros(1, 3))
    settings_ = method(importance_correction="token", importance_bound=1.0)
    summary = summarize_metrics(policy_loss(old, None, batch, settings_, 1.0)[1])
    assert (summary["importance_weight"], summary["importance_bounded_fraction"]) == (1.0, 0.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_how_far_the_policy_has_moved_is_a_mean_over_tokens_of_their_own_ratios(level: str) -> None:
    policy = torch.tensor([[2.0, 0.5, 9.0], [1.0, 9.0, 9.0]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    batch = PolicyBatch(torch.ones(2), mask, old_log_probs=torch.zeros(2, 3))
    summary = summarize_metrics(policy_loss(policy, None, batch, method(ratio_level=level), 2.0)[1])
    # r - 1 - log r: 1 - log 2, -1/2 + log 2 and 0; outside the mask nothing
    assert summary["approx_kl"] == pytest.approx(0.5 / 3)


def test_entropy_and_kl_are_reported_as_means_over_the_response_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    batch = PolicyBatch(torch.ones(2), mask, ref_log_probs=torch.zeros(2, 3))
    policy = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, 5.0, 5.0]])
    entropy = torch.tensor([[1.0, 2.0, math.nan], [6.0, 9.0, 9.0]])
    settings_ = method(**KL_IN_REWARD)
    _, metrics = policy_loss(policy, entropy, batch, settings_, 2.0)
    summary = summarize_metrics(metrics)
    assert summary["entropy"] == 3.0  # (1 + 2 + 6) / 3
    k3 = [math.exp(-d) + d - 1 for d in (-1.0, -2.0, -3.0)]
    assert summary["kl"] == pytest.approx(sum(k3) / 3)
    assert math.isnan(summarize_metrics({"num_tokens": 0.0, "token_sum/kl": 0.0})["kl"])


@pytest.mark.parametrize(
    "changes", [{"kl_coefficient": 0.5, "kl_estimator": "k2"}, KL_IN_REWARD, {}]
)
def test_the_kl_in_the_log_is_the_same_number_whatever_the_method_estimates_it_by(
    changes: dict[str, Any],
) -> None:
    policy, batch = random_batch(3)
    of_k3 = policy_loss(policy, None, batch, method(kl_coefficient=0.5, kl_estimator="k3"), 9.0)[1]
    metrics = policy_loss(policy, None, batch, method(**changes), 9.0)[1]
    assert metrics["token_sum/kl"] == of_k3["token_sum/kl"] > 0.0


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_what_stands_in_the_padding_reaches_neither_loss_nor_gradient_nor_metrics(
    hidden: float, kind: str
) -> None:
    def step(filler: float) -> tuple[float, torch.Tensor, dict[str, float]]:
        policy, batch = random_batch(0)
        outside = ~batch.response_mask
        assert outside.any()
        fields: Any = {
            name: getattr(batch, name).masked_fill(outside, filler)
            for name in ("old_log_probs", "sampler_log_probs", "ref_log_probs")
        }
        log_probs = policy.detach().masked_fill(outside, filler).requires_grad_()
        settings_ = method(kl_coefficient=0.5, kl_estimator=kind, importance_correction="token")
        loss, metrics = policy_loss(log_probs, None, replace(batch, **fields), settings_, 4.0)
        loss.backward()
        assert log_probs.grad is not None and log_probs.grad.isfinite().all()
        return loss.item(), log_probs.grad, metrics

    (loss, gradient, metrics), expected = step(hidden), step(0.0)
    assert (loss, metrics) == (expected[0], expected[2])
    assert torch.equal(gradient, expected[1])


def test_a_reference_for_the_log_alone_adds_nothing_to_the_loss_however_far_it_is() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    far = PolicyBatch(torch.ones(1), mask, ref_log_probs=torch.tensor([[math.inf]]))
    loss, metrics = policy_loss(torch.tensor([[-1.0]]), None, far, method(), 1.0)
    assert loss.item() == -1.0
    assert metrics["token_sum/kl"] > 1e8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_counted_exactly_whatever_the_masks_dtype(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 2049, dtype=dtype)  # 2049 is no number of either type
    _, metrics = policy_loss(
        torch.zeros(1, 2049), None, PolicyBatch(torch.ones(1), mask), method(), 1.0
    )
    assert metrics["num_tokens"] == 2049


def test_a_completion_that_is_left_out_changes_neither_loss_nor_gradient() -> None:
    policy, batch = random_batch(5)
    settings_ = method(kl_coefficient=0.1)
    truncated = torch.tensor([False, True, False, False])
    masked = mask_truncated(batch.response_mask, truncated)
    left_out = PolicyBatch(
        batch.advantages, masked, batch.old_log_probs, ref_log_probs=batch.ref_log_probs
    )
    loss, _ = policy_loss(
        policy, None, left_out, settings_, step_normalizer("sequence_mean", masked, 8)
    )
    kept = (~truncated).nonzero()[:, 0]
    fewer = rows_of(left_out, kept)
    without, _ = policy_loss(
        policy[kept],
        None,
        fewer,
        settings_,
        step_normalizer("sequence_mean", fewer.response_mask, 8),
    )
    assert loss.item() == pytest.approx(without.item())
    loss.backward()
    assert not policy.grad[1].any()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"importance_correction": "token"}, "importance_correction needs sampler_log_probs"),
        ({"kl_coefficient": 0.1}, "kl_coefficient needs ref_log_probs"),
        ({"entropy_coefficient": 0.1}, "entropy_coefficient needs token_entropy"),
    ],
)
def test_settings_that_need_what_is_not_given_are_an_error(
    choices: dict[str, Any], message: str
) -> None:
    policy, batch = random_batch(0)
    with pytest.raises(ValueError, match=message):
        policy_loss(
            policy, None, PolicyBatch(batch.advantages, batch.response_mask), method(**choices), 4.0
        )


@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (5,), (3, 5), (4, 4)])
@pytest.mark.parametrize(
    "name",
    ["response_mask", "old_log_probs", "sampler_log_probs", "ref_log_probs", "token_entropy"],
)
def test_tensors_of_another_shape_are_refused_by_name_instead_of_broadcast(
    name: str, shape: tuple[int, ...]
) -> None:
    policy, batch = random_batch(0)
    fields: Any = {"token_entropy": None, name: torch.ones(shape)}
    entropy = fields.pop("token_entropy")
    with pytest.raises(ValueError, match=rf"{name} .* and policy_log_probs \(4, 5\) must have"):
        policy_loss(policy, entropy, replace(batch, **fields), method(), 4.0)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (5,), (4, 5), ()])
def test_advantages_that_are_not_one_a_completion_are_refused(shape: tuple[int, ...]) -> None:
    policy, batch = random_batch(0)
    with pytest.raises(ValueError, match=r"have shape .*, expected \(4,\) .*: advantages\[:, 0\]"):
        policy_loss(policy, None, replace(batch, advantages=torch.ones(shape)), method(), 4.0)


def test_an_entropy_bonus_without_a_gradient_is_an_error_and_not_a_constant() -> None:
    policy, batch = random_batch(0)
    with pytest.raises(ValueError, match="token_entropy with a gradient"):
        policy_loss(policy, policy.detach() ** 2, batch, method(entropy_coefficient=0.1), 4.0)


# ---------------------------------------------------------------------- with a real language model


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        {"objective": "cispo"},
        {"kl_coefficient": 0.1, "entropy_coefficient": 0.01, "importance_correction": "token"},
    ],
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_does_not_depend_on_the_microbatch_size(
    aggregation: str, choices: dict[str, Any]
) -> None:
    model = tiny_qwen2()
    generator = torch.Generator().manual_seed(1)
    prompt_lengths, lengths = [2, 2, 4, 4, 1, 3, 3, 2], [3, 7, 1, 8, 5, 2, 8, 4]

    def draw(sizes: list[int]) -> list[list[int]]:
        return [torch.randint(1, 29, (n,), generator=generator).tolist() for n in sizes]

    prompts, responses = draw(prompt_lengths), draw(lengths)
    advantages = torch.randn(8, generator=generator)
    noise = 0.2 * torch.randn(3, 8, 12, generator=generator)
    settings_ = method(aggregation=aggregation, **choices)
    whole = collate(prompts, responses, 0)
    truncated = torch.tensor([length == 8 for length in lengths])
    whole_mask = mask_truncated(whole["response_mask"], truncated)
    normalizer = step_normalizer(settings_.aggregation, whole_mask, settings_.max_new_tokens)

    def gradient(groups: list[list[int]]) -> torch.Tensor:
        model.zero_grad()
        for group in groups:
            rows = torch.tensor(group)
            batch = collate([prompts[i] for i in group], [responses[i] for i in group], 0)
            scores = score_responses(
                model, **batch, temperature=0.8, with_entropy=True, entropy_gradient=True
            )
            log_probs = scores["log_probs"]
            old, sampler, ref = log_probs.detach() + noise[:, rows, : log_probs.shape[1]]
            part = PolicyBatch(
                advantages[rows],
                mask_truncated(batch["response_mask"], truncated[rows]),
                old,
                sampler,
                ref,
            )
            loss, _ = policy_loss(log_probs, scores["token_entropy"], part, settings_, normalizer)
            loss.backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    everything = gradient([list(range(8))])
    assert everything.abs().max() > 1e-3
    for size in (1, 2, 4):
        in_order = [list(range(start, start + size)) for start in range(0, 8, size)]
        torch.testing.assert_close(gradient(in_order), everything, atol=1e-5, rtol=1e-5)
    by_length = split_by_token_budget(
        [a + b for a, b in zip(prompt_lengths, lengths, strict=True)], 24
    )
    assert len(by_length) > 1
    torch.testing.assert_close(gradient(by_length), everything, atol=1e-5, rtol=1e-5)


def test_a_few_steps_make_the_rewarded_completion_likelier() -> None:
    model = tiny_qwen2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate([[1, 2], [1, 2]], [[3, 4, 5], [6, 7, 8]], 0)
    advantages, mask = torch.tensor([1.0, -1.0]), batch["response_mask"]

    def gap() -> float:
        with torch.no_grad():
            good, bad = score_responses(model, **batch)["log_probs"].sum(-1)
        return (good - bad).item()

    before = gap()
    for _ in range(5):
        optimizer.zero_grad()
        log_probs = score_responses(model, **batch)["log_probs"]
        loss, _ = policy_loss(log_probs, None, PolicyBatch(advantages, mask), method(), 2.0)
        loss.backward()
        optimizer.step()
    assert gap() > before + 1.0


# ------------------------------------------------------------------------------------ sampler's gap


def test_no_gap_means_an_effective_sample_of_everything() -> None:
    log_probs = -torch.rand(3, 4)
    gap = sampler_gap(log_probs, log_probs, torch.ones(3, 4, dtype=torch.bool))
    assert gap == {
        "sampler_gap_mean": 0.0,
        "sampler_gap_max": 0.0,
        "effective_sample_fraction": pytest.approx(1.0),
    }


def test_the_largest_gap_is_told_beside_the_mean_one() -> None:
    gap = sampler_gap(torch.tensor([[0.5, -1.5]]), torch.zeros(1, 2), torch.ones(1, 2).bool())
    assert gap["sampler_gap_mean"] == pytest.approx(1.0)
    assert gap["sampler_gap_max"] == pytest.approx(1.5)


def test_the_gap_is_measured_per_token_and_the_sample_size_per_completion() -> None:
    sampler = torch.zeros(3, 2)
    trainer = torch.tensor([[math.log(2), math.log(2)], [math.log(0.5), math.nan], [9.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    gap = sampler_gap(trainer, sampler, mask)
    assert gap["sampler_gap_mean"] == pytest.approx(math.log(2))
    assert gap["sampler_gap_max"] == pytest.approx(math.log(2))
    # weights 2·2 = 4 and 1/2: (4.5)² / (2 · (16 + 1/4)); the third completion does not count
    assert gap["effective_sample_fraction"] == pytest.approx(4.5**2 / (2 * 16.25))


def test_one_completion_with_all_the_weight_is_an_effective_sample_of_one() -> None:
    trainer = torch.tensor([[5000.0], [0.0], [0.0], [0.0]])  # exp would overflow
    gap = sampler_gap(trainer, torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool))
    assert gap["effective_sample_fraction"] == pytest.approx(0.25)


def test_a_gap_over_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gap to measure"):
        sampler_gap(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))
