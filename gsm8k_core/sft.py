"""Supervised fine-tuning: negative log-likelihood of the response tokens.

Shapes: `B` examples of a microbatch, `T` positions.
"""

from __future__ import annotations

import torch

from gsm8k_core.masking import masked_normalize


def sft_loss(
    log_probs: torch.Tensor, response_mask: torch.Tensor, num_tokens_in_step: float
) -> torch.Tensor:
    """A microbatch's share of the optimizer step's mean NLL per response token, in nats.

    `log_probs` and `response_mask` (B, T); `num_tokens_in_step` counts the response tokens of all
    microbatches and ranks, so that the gradient depends on neither.
    """
    return -masked_normalize(log_probs, response_mask, normalize_constant=num_tokens_in_step)


def sft_microbatch_train_step(
    policy_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """NLL of a microbatch, with `backward()` done.

    Masked sum of the NLL (B, T) over `normalize_constant` for each example, mean over the B
    examples, divided by the accumulation steps. Returns the loss (a detached scalar) and metadata:
    `nll_sum` and `num_response_tokens`. Since it counts every example the same, its gradient is
    that of the whole batch only if all microbatches have the same size; `sft_loss` has no such
    condition.
    """
    per_example = -masked_normalize(policy_log_probs, response_mask, -1, normalize_constant)
    loss = per_example.mean() / gradient_accumulation_steps
    loss.backward()
    metadata = {
        "nll_sum": -masked_normalize(policy_log_probs.detach(), response_mask),
        "num_response_tokens": response_mask.bool().sum(),
    }
    return loss.detach(), metadata
