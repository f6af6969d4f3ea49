"""One optimizer step of the policy-gradient family (GRPO, Shao et al. 2024, and its relatives).

Shapes: `B` completions in a microbatch, `N` in an optimizer step, `T` positions.

The loop scores a microbatch, calls `policy_loss`, calls `backward()` on the result and, at the end
of the step, adds up the metrics. Losses are shares of the whole step's loss, and metrics are sums
and counts, so neither depends on how a step is cut into microbatches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gsm8k_core.config import GrpoMethod
from gsm8k_core.losses import (
    KlEstimator,
    LossType,
    aggregate,
    check_accumulation,
    check_shapes,
    cispo_objective,
    clipped_tokens,
    compute_policy_gradient_loss,
    importance_weights,
    kl_estimate,
    policy_ratio,
    ppo_clip_objective,
    reinforce_objective,
)
from gsm8k_core.masking import masked, masked_mean, masked_sum

LOGGED_KL: KlEstimator = "k3"
"""Whatever the method's own estimator is, so that logs compare: unbiased and never negative."""
Metrics = dict[str, float]
"""`num_tokens`, `num_completions`; `token_sum/x`, to be divided by num_tokens; `step_sum/x`, a sum
by itself; `max/x`."""


def grpo_microbatch_train_step(
    policy_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gradient_accumulation_steps: int,
    loss_type: LossType,
    raw_rewards: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy-gradient loss of a microbatch, with `backward()` done.

    `policy_log_probs` and `response_mask` are (B, T), the rest as `compute_policy_gradient_loss`
    takes it: its per-token loss (B, T), masked mean over time, mean over the B completions, divided
    by the accumulation steps. Returns the loss (a detached scalar) and, as metadata, the masked
    mean of each entry of that function's metadata. A row without response tokens has no mean: the
    loss is NaN. Raises ValueError as that function does, for a mask of another shape, and for
    accumulation steps that are no whole number from 1 on.
    `policy_loss` is what the training loop uses.
    """
    check_accumulation(gradient_accumulation_steps)
    check_shapes(policy_log_probs, response_mask=response_mask, old_log_probs=old_log_probs)
    # A NaN outside the mask would reach the gradient through the ratio, as 0·NaN.
    if old_log_probs is not None:
        old_log_probs = masked(old_log_probs, response_mask)
    per_token_loss, per_token = compute_policy_gradient_loss(
        masked(policy_log_probs, response_mask),
        loss_type,
        raw_rewards,
        advantages,
        old_log_probs,
        cliprange,
    )
    loss = masked_mean(per_token_loss, response_mask, dim=-1).mean() / gradient_accumulation_steps
    loss.backward()
    metadata = {
        name: masked_mean(values.float(), response_mask) for name, values in per_token.items()
    }
    return loss.detach(), metadata


@dataclass(frozen=True)
class PolicyBatch:
    """What a microbatch's loss needs beside the policy's own log-probs; nothing has a gradient.

    `advantages` are (B,), all else (B, T): `response_mask`, bool, without completions that are left
    out (`mask_truncated`), and log-probs in nats. `old_log_probs` are the trainer's before the
    first update on these rollouts; None on policy, where they are the policy's own.
    `sampler_log_probs` are as the engine that sampled the tokens gave them (`Completion.log_probs`,
    laid where the mask of `collate` is true), `ref_log_probs` the reference model's.
    """

    advantages: torch.Tensor
    response_mask: torch.Tensor
    old_log_probs: torch.Tensor | None = None
    sampler_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None


def policy_loss(
    policy_log_probs: torch.Tensor,
    token_entropy: torch.Tensor | None,
    batch: PolicyBatch,
    settings: GrpoMethod,
    normalizer: float,
) -> tuple[torch.Tensor, Metrics]:
    """A microbatch's share of the optimizer step's loss: a scalar to call `backward()` on.

    Per token: -objective·(importance weight) + β·KL - (entropy coefficient)·entropy, put together
    by `aggregate` with `normalizer`, the `step_normalizer` of the whole step. With
    `kl_placement: reward` there is no KL here: the caller takes it from the rewards, before
    `compute_advantages`. The importance weight, of the old policy over the sampler, does not apply
    to KL and entropy. `policy_log_probs` and `token_entropy` are (B, T). Raises ValueError if the
    settings ask for something that is not given, or for an entropy bonus of an entropy without
    gradient, and for tensors of other shapes, TrainingError for a normalizer that is not above 0.

    Of the settings it reads objective, ratio, clip ranges, aggregation, KL, entropy bonus and
    importance correction. How rewards become advantages, which completions are masked and how often
    a batch is used are the caller's.

    Among the metrics, `kl` is that to the reference by k3, whatever `kl_estimator` is, and
    `approx_kl` estimates KL(π_old ‖ π) per token by Schulman's r - 1 - log r, which is k3 too.
    """
    mask = batch.response_mask
    check_shapes(
        policy_log_probs,
        token_entropy=token_entropy,
        response_mask=mask,
        old_log_probs=batch.old_log_probs,
        sampler_log_probs=batch.sampler_log_probs,
        ref_log_probs=batch.ref_log_probs,
    )
    if batch.advantages.shape != policy_log_probs.shape[:1]:
        raise ValueError(
            f"advantages have shape {tuple(batch.advantages.shape)}, expected "
            f"{tuple(policy_log_probs.shape[:1])} for log-probs {tuple(policy_log_probs.shape)}: "
            "advantages[:, 0] of (B, 1)"
        )
    advantages = batch.advantages[:, None]
    # On policy the old log-probs are the new ones: the ratio is exactly 1 (its gradient is not 0).
    old = (policy_log_probs if batch.old_log_probs is None else batch.old_log_probs).detach()
    ratio = policy_ratio(policy_log_probs, old, mask, settings.ratio_level)
    per_token_loss = -_objective(policy_log_probs, ratio, advantages, settings)
    metrics = _count(mask)
    if settings.objective != "reinforce":  # which uses no ratio
        metrics |= _ratio_metrics(ratio, advantages, mask, settings)
        moved = kl_estimate(masked(old, mask), masked(policy_log_probs.detach(), mask), LOGGED_KL)
        metrics |= _token_sum("approx_kl", moved, mask)

    if settings.importance_correction != "none":
        sampler = _given(batch.sampler_log_probs, "importance_correction", "sampler_log_probs")
        level, bound = settings.importance_correction, settings.importance_bound
        weight = importance_weights(old, sampler, mask, level, settings.importance_mode, bound)
        per_token_loss = per_token_loss * weight
        metrics |= _token_sum("importance_weight", weight, mask)
        unbounded = importance_weights(old, sampler, mask, level, "truncate", math.inf)
        metrics |= _token_sum("importance_bounded_fraction", unbounded > bound, mask)
    kl_in_loss = settings.kl_coefficient > 0 and settings.kl_placement == "loss"
    if kl_in_loss:
        _given(batch.ref_log_probs, "kl_coefficient", "ref_log_probs")
    if batch.ref_log_probs is not None:
        # A NaN outside the mask would reach the gradient through the estimate, as 0·NaN.
        policy = masked(policy_log_probs, mask)
        ref = masked(batch.ref_log_probs.detach(), mask)
        # One that is given for the log alone adds nothing, not even 0·∞.
        if kl_in_loss:
            kl = kl_estimate(policy, ref, settings.kl_estimator)
            per_token_loss = per_token_loss + settings.kl_coefficient * kl
        if not kl_in_loss or settings.kl_estimator != LOGGED_KL:
            kl = kl_estimate(policy.detach(), ref, LOGGED_KL)
        metrics |= _token_sum("kl", kl, mask)
    if settings.entropy_coefficient > 0:
        entropy = _given(token_entropy, "entropy_coefficient", "token_entropy")
        if policy_log_probs.requires_grad and not entropy.requires_grad:
            raise ValueError("entropy_coefficient needs a token_entropy with a gradient")
        per_token_loss = per_token_loss - settings.entropy_coefficient * entropy
    if token_entropy is not None:
        metrics |= _token_sum("entropy", token_entropy, mask)

    loss = aggregate(per_token_loss, mask, settings.aggregation, normalizer=normalizer)
    return loss, metrics | {"step_sum/loss": loss.item()}


def has_gradient(advantages: torch.Tensor, settings: GrpoMethod) -> torch.Tensor:
    """Bool (B,), false for completions whose loss has a gradient of exactly 0.

    Every objective is a multiple of the advantage, which is 0 in a group of equal rewards; what is
    added to it, KL to the reference and the entropy bonus, is not.
    """
    in_loss = settings.kl_coefficient > 0 and settings.kl_placement == "loss"
    if in_loss or settings.entropy_coefficient > 0:
        return torch.ones_like(advantages, dtype=torch.bool)
    return advantages != 0


def _objective(
    policy_log_probs: torch.Tensor,
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    settings: GrpoMethod,
) -> torch.Tensor:
    if settings.objective == "ppo_clip":
        return ppo_clip_objective(
            ratio, advantages, settings.clip_low, settings.clip_high, settings.dual_clip
        )
    if settings.objective == "cispo":
        return cispo_objective(
            ratio, advantages, policy_log_probs, settings.clip_low, settings.clip_high
        )
    return reinforce_objective(policy_log_probs, advantages)


def _given(tensor: torch.Tensor | None, setting: str, name: str) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"{setting} needs {name}, which are not given")
    return tensor


# ----------------------------------------------------------------------------------------- metrics


def _count(mask: torch.Tensor) -> Metrics:
    return {
        "num_tokens": float(mask.bool().sum()),
        "num_completions": float(mask.bool().any(dim=-1).sum()),
    }


def _token_sum(name: str, values: torch.Tensor, mask: torch.Tensor) -> Metrics:
    return {f"token_sum/{name}": masked_sum(values.detach().float(), mask).item()}


def _ratio_metrics(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, settings: GrpoMethod
) -> Metrics:
    """Ratio, and share of tokens clipped below, above and by the dual clip.

    CISPO clips the weight whatever the advantage's sign.
    """
    ratio = ratio.detach()
    if settings.objective == "cispo":
        below, above = ratio < 1.0 - settings.clip_low, ratio > 1.0 + settings.clip_high
    else:
        below, above = clipped_tokens(ratio, advantages, settings.clip_low, settings.clip_high)
    in_mask = ratio[mask.bool()]
    dual: Metrics = {}
    if settings.dual_clip is not None:
        held = (advantages < 0) & (ratio > settings.dual_clip)
        dual = _token_sum("clip_fraction_dual", held, mask)
    return (
        _token_sum("ratio", ratio, mask)
        | _token_sum("clip_fraction_low", below, mask)
        | _token_sum("clip_fraction_high", above, mask)
        | dual
        | {"max/ratio": in_mask.max().item() if in_mask.numel() else 0.0}
    )


def add_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Metrics of several microbatches as those of one: sums added, the largest of maxima."""
    total: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif name.startswith("max/"):
                # `max` by itself would lose a NaN that comes second.
                total[name] = value if math.isnan(value) else max(total[name], value)
            else:
                total[name] += value
    return total


def summarize_metrics(total: Metrics) -> dict[str, float]:
    """Means per token, sums and maxima under their plain names, from the total of a step.

    A mean over no token is NaN. Maxima are called `x_max`. Of no microbatch there is nothing.
    """
    num_tokens = total.get("num_tokens", 0.0)
    summary: dict[str, float] = {}
    for name, value in total.items():
        kind, _, plain = name.rpartition("/")
        if kind == "token_sum":
            summary[plain] = value / num_tokens if num_tokens else math.nan
        elif kind == "max":
            summary[f"{plain}_max"] = value
        else:
            summary[plain] = value
    return summary


def sampler_gap(
    trainer_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """How far the trainer's log-probs (N, T) are from the sampler's, on the same tokens.

    - `sampler_gap_mean`, `sampler_gap_max`: of |log π_trainer - log π_sampler| per token, in nats;
    - `effective_sample_fraction`: (Σw)² / (N·Σw²) for the completions' weights
      w = π_trainer/π_sampler; 1 where both agree, 1/N where one completion carries all the weight
      (Kong 1992).
    Completions without true entries in the mask do not count. Raises ValueError if none has any.
    """
    counted = mask.bool().any(dim=-1)
    if not bool(counted.any()):
        raise ValueError("the mask selects no token: there is no gap to measure")
    gap = (trainer_log_probs - sampler_log_probs).detach().double()
    absolute = gap.abs()[mask.bool()]
    log_weight = masked_sum(gap, mask, dim=-1)[counted]
    log_size = 2 * log_weight.logsumexp(dim=0) - (2 * log_weight).logsumexp(dim=0)
    return {
        "sampler_gap_mean": absolute.mean().item(),
        "sampler_gap_max": absolute.max().item(),
        "effective_sample_fraction": log_size.exp().item() / len(log_weight),
    }
