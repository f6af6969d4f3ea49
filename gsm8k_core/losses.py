"""The parts of policy-gradient losses, each a function of tensors.

Shapes: `B` completions in a microbatch, `T` positions, `N` completions of an optimizer step.
Per-token tensors are (B, T); advantages (B, 1). An *objective* is to be made larger, a *loss*
smaller. A named method is a choice of these parts: ratio, objective, KL, aggregation.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal

import torch

from gsm8k_core.errors import TrainingError
from gsm8k_core.masking import at_least_float32, masked, masked_normalize, masked_sum

Level = Literal["token", "sequence"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
BoundMode = Literal["truncate", "mask"]
LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip"]
LossMetadata = dict[str, torch.Tensor]

# Nats, far outside any clip range.
MAX_LOG_RATIO = 20.0

# ---------------------------------------------------------------------------------- whole losses


def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: torch.Tensor, policy_log_probs: torch.Tensor
) -> torch.Tensor:
    """-A·log π per token (B, T), for rewards or advantages (B, 1) (Williams 1992).

    Raises ValueError for those of another shape, (B, T) aside: (B,) would be taken for one a token.
    """
    _check_advantages(raw_rewards_or_advantages, policy_log_probs)
    return -reinforce_objective(policy_log_probs, raw_rewards_or_advantages)


def compute_grpo_clip_loss(
    advantages: torch.Tensor,
    policy_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    cliprange: float,
) -> tuple[torch.Tensor, LossMetadata]:
    """-min(ρ·A, clip(ρ, 1 ± cliprange)·A) per token (B, T) (Schulman et al. 2017, eq. 7).

    `advantages` (B, 1), log-probs (B, T); the old ones are taken as constants. Metadata, per token
    (B, T): `ratio`, and `is_clipped`, true where the clipped term is the smaller one and no
    gradient flows. Raises ValueError for other shapes (advantages may be (B, T)), and for a clip
    range below 0.
    """
    if not cliprange >= 0.0:
        raise ValueError(f"cliprange is {cliprange}: take 0 or above")
    _check_advantages(advantages, policy_log_probs)
    check_shapes(policy_log_probs, old_log_probs=old_log_probs)
    everywhere = torch.ones_like(policy_log_probs, dtype=torch.bool)
    # With a gradient of their own they would take away the policy's: on policy all of it.
    ratio = policy_ratio(policy_log_probs, old_log_probs.detach(), everywhere, "token")
    loss = -ppo_clip_objective(ratio, advantages, cliprange, cliprange)
    below, above = clipped_tokens(ratio, advantages, cliprange, cliprange)
    return loss, {"ratio": ratio.detach(), "is_clipped": below | above}


def compute_policy_gradient_loss(
    policy_log_probs: torch.Tensor,
    loss_type: LossType,
    raw_rewards: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[torch.Tensor, LossMetadata]:
    """One of three per-token losses (B, T), with its metadata.

    `no_baseline` needs raw_rewards (B, 1); `reinforce_with_baseline` advantages (B, 1); `grpo_clip`
    advantages, old_log_probs (B, T) and cliprange. Raises ValueError that names what is missing or
    has another shape.
    """
    if loss_type == "no_baseline":
        if raw_rewards is None:
            raise ValueError("loss_type no_baseline needs raw_rewards")
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    if loss_type == "reinforce_with_baseline":
        if advantages is None:
            raise ValueError("loss_type reinforce_with_baseline needs advantages")
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
    if loss_type == "grpo_clip":
        if advantages is None or old_log_probs is None or cliprange is None:
            given = {
                "advantages": advantages, "old_log_probs": old_log_probs, "cliprange": cliprange,
            }  # fmt: skip
            missing = [name for name, value in given.items() if value is None]
            raise ValueError(f"loss_type grpo_clip needs {', '.join(missing)}")
        return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
    raise ValueError(
        f"unknown loss_type '{loss_type}': expected no_baseline, reinforce_with_baseline, grpo_clip"
    )


# --------------------------------------------------------------------------------- ratio, objective


def policy_ratio(
    policy_log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor, level: Level
) -> torch.Tensor:
    """π/π_old per token (B, T); 1 outside the mask.

    - `token`: the token's own ratio (PPO, GRPO);
    - `sequence`: (π(y)/π_old(y))^(1/|y|), the same value at every token of a completion, with the
      gradient of the token's own log-prob (GSPO, Zheng et al. 2025, eq. 7 and 14: summed over the
      tokens, the gradient is that of eq. 7 times |y|).

    At most exp(`MAX_LOG_RATIO`), where its gradient is 0.
    """
    log_ratio = masked(policy_log_probs - old_log_probs, mask)
    if level == "token":
        return _bounded_exp(log_ratio)
    if level == "sequence":
        lengths = mask.bool().sum(dim=-1, keepdim=True).clamp(min=1)
        of_sequence = (log_ratio.sum(dim=-1, keepdim=True) / lengths).detach()
        in_mask = torch.where(mask.bool(), of_sequence, torch.zeros_like(log_ratio))
        # What is in brackets is exactly 0 and carries the gradient of the token's log-prob.
        finite = log_ratio.nan_to_num(nan=math.nan)  # ∞ − ∞ would be none
        return _bounded_exp(in_mask + (finite - finite.detach()))
    raise ValueError(f"unknown ratio level '{level}': expected token, sequence")


def _bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """An infinity would make NaN of the gradient, even of a clipped objective, and of 0·A.

    float16 ends at 65,504, below the bound; bfloat16 has three digits.
    """
    return at_least_float32(log_ratio).clamp(max=MAX_LOG_RATIO).exp()


def ppo_clip_objective(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """min(ρ·A, clip(ρ, 1 - clip_low, 1 + clip_high)·A) (B, T), for advantages (B, 1).

    Schulman et al. 2017, eq. 7, with the two bounds apart (DAPO, Yu et al. 2025, §3.1). With
    `dual_clip` c > 1 the objective of a negative advantage is at least c·A (Ye et al. 2020).
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return objective
    bounded = torch.maximum(objective, dual_clip * advantages)
    return torch.where(advantages < 0, bounded, objective)


def cispo_objective(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    policy_log_probs: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """sg[clip(ρ, 1 - clip_low, 1 + clip_high)]·A·log π (B, T): no token loses its gradient.

    MiniMax-M1 (2025), eq. 4 and 5. A clip_low of 1 or more leaves the ratio unbounded below.
    """
    weight = ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    return weight * advantages * policy_log_probs


def reinforce_objective(policy_log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """A·log π (B, T), for advantages (B, 1) (Williams 1992)."""
    return advantages * policy_log_probs


def clipped_tokens(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where PPO's clipped term is the smaller one: below the range, above it; bool (B, T) each.

    A ratio below the range is clipped only for a negative advantage, one above only for a positive.
    """
    ratio = ratio.detach()
    return (ratio < 1.0 - clip_low) & (advantages < 0), (ratio > 1.0 + clip_high) & (advantages > 0)


# ----------------------------------------------------------------------------------- KL divergence


def kl_estimate(
    policy_log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: KlEstimator
) -> torch.Tensor:
    """Estimate per token (B, T) of KL(π ‖ π_ref) from tokens of π (Schulman 2020, "Approximating").

    With d = log π - log π_ref: k1 = d, k2 = d²/2, k3 = exp(-d) + d - 1. As values k1 and k3 are
    unbiased, k2 is not. As losses on samples of π it is otherwise: the gradient of k1 has mean 0
    (it regularizes nothing), that of k2 has the gradient of KL(π ‖ π_ref) as its mean, and that of
    k3, which DeepSeekMath uses (Shao et al. 2024, eq. 4), the gradient of KL(π_ref ‖ π). Taken from
    a reward, an estimate k counts through E[k·∇log π], which is ∇KL(π ‖ π_ref) for k1 alone. In k3
    a d below -`MAX_LOG_RATIO` is taken to it, where its gradient is 0: one token would else make an
    infinity of the loss. Raises ValueError if the shapes differ.
    """
    check_shapes(policy_log_probs, ref_log_probs=ref_log_probs)
    difference = policy_log_probs - ref_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        difference = at_least_float32(difference).clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator '{kind}': expected k1, k2, k3")


# ------------------------------------------------------------------------------------- aggregation


def aggregate(
    per_token_loss: torch.Tensor, mask: torch.Tensor, how: Aggregation, *, normalizer: float
) -> torch.Tensor:
    """One number from the losses (B, T) of a microbatch: its share of the optimizer step's loss.

    `normalizer` is `step_normalizer` of the whole step, so that the shares, and their gradients,
    add up to the same whatever the microbatch size and the number of ranks.
    - `sequence_mean`: mean over each completion, then over completions (GRPO, DeepSeekMath eq. 3);
    - `token_mean`: mean over all tokens of the step (DAPO, eq. 8, where it is over those of a
      prompt, then over prompts; TRL and verl do as here);
    - `constant`: sum over tokens over a fixed length, mean over completions (Dr. GRPO, §3.2).
    A row without true entries in the mask adds nothing. Raises TrainingError if the normalizer is
    not above 0, which is a step with nothing to learn from.
    """
    if normalizer <= 0:
        raise TrainingError(
            "no completion counts in this optimizer step (all are masked as truncated?): skip it, "
            "raise max_new_tokens or set mask_truncated: false"
        )
    if how == "sequence_mean":
        lengths = mask.bool().sum(dim=-1).clamp(min=1)
        return (masked_sum(per_token_loss, mask, dim=-1) / lengths).sum() / normalizer
    if how in ("token_mean", "constant"):
        return masked_normalize(per_token_loss, mask, None, normalizer)
    raise ValueError(f"unknown aggregation '{how}': expected sequence_mean, token_mean, constant")


def step_normalizer(how: Aggregation, mask: torch.Tensor, constant: float) -> float:
    """What `aggregate` divides by, from the mask (N, T) of every completion of an optimizer step.

    `sequence_mean`: completions with a true entry; `token_mean`: true entries; `constant`: such
    completions times `constant` (`max_new_tokens`). Normalizers of parts add up, so ranks sum
    theirs. Completions masked as truncated count nowhere.
    """
    if how == "token_mean":
        return float(mask.bool().sum())
    num_completions = float(mask.bool().any(dim=-1).sum())
    if how == "sequence_mean":
        return num_completions
    if how == "constant":
        return num_completions * constant
    raise ValueError(f"unknown aggregation '{how}': expected sequence_mean, token_mean, constant")


def mask_truncated(response_mask: torch.Tensor, truncated: torch.Tensor) -> torch.Tensor:
    """`response_mask` (B, T) without the rows where `truncated` (B,) is true, bool (DAPO, §3.4).

    `truncated`: of `Completion.finish_reason`, whether it is `length`. Used for both
    `step_normalizer` and `aggregate`, the result takes these rows out of both parts of the mean.
    """
    return response_mask.bool() & ~truncated.bool()[:, None]


# ------------------------------------------------------------------- corrections of weight, reward


def importance_weights(
    trainer_log_probs: torch.Tensor,
    sampler_log_probs: torch.Tensor,
    mask: torch.Tensor,
    level: Level,
    mode: BoundMode,
    bound: float,
) -> torch.Tensor:
    """Trainer's over sampler's probability, bounded and detached: (B, T), 1 outside the mask.

    The engine that samples and the one that trains give the same token slightly different
    probabilities; this weight corrects for it (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). `level`: of each token, or of the whole completion
    (the product over its tokens) at every token of it. `mode`: `truncate` takes a weight above
    `bound` to `bound`, `mask` to 0;
    `step_normalizer` counts such tokens all the same.
    """
    log_weight = masked(trainer_log_probs - sampler_log_probs, mask).detach()
    if level == "sequence":
        of_sequence = log_weight.sum(dim=-1, keepdim=True)
        log_weight = torch.where(mask.bool(), of_sequence, torch.zeros_like(log_weight))
    elif level != "token":
        raise ValueError(f"unknown level '{level}': expected token, sequence")
    weight = log_weight.exp()
    if mode == "truncate":
        return weight.clamp(max=bound)
    if mode == "mask":
        return torch.where(weight > bound, torch.zeros_like(weight), weight)
    raise ValueError(f"unknown mode '{mode}': expected truncate, mask")


def check_accumulation(gradient_accumulation_steps: int) -> None:
    """Raise ValueError unless it is a whole number from 1 on."""
    if not isinstance(gradient_accumulation_steps, Integral) or gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}: take a whole number, "
            "1 or more"
        )


def check_shapes(policy_log_probs: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError that names the first of `others` whose shape is not the policy's."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != policy_log_probs.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and policy_log_probs "
                f"{tuple(policy_log_probs.shape)} must have the same shape"
            )


def _check_advantages(advantages: torch.Tensor, policy_log_probs: torch.Tensor) -> None:
    shape = policy_log_probs.shape
    if advantages.shape not in (shape, (*shape[:-1], 1)):
        raise ValueError(
            f"advantages (or rewards) have shape {tuple(advantages.shape)}, expected "
            f"{(*shape[:-1], 1)} for log-probs {tuple(shape)}: advantages[:, None] of (B,)"
        )
