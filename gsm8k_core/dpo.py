"""Direct preference optimization (Rafailov et al. 2023).

Shapes: `B` pairs; log-probs are summed over the tokens of a response.
"""

from __future__ import annotations

import math

import torch


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log σ(β·[log π/π_ref(chosen) - log π/π_ref(rejected)]) per pair (B,) (eq. 7).

    All four inputs are (B,): log-probs of whole responses, in nats. Returns the losses and metrics
    per pair, detached: the implicit rewards `chosen_reward` and `rejected_reward` (β·log π/π_ref),
    their difference `margin`, and `accuracy`, 1 where the margin is above 0. Raises ValueError for
    inputs that are not (B,), such as log-probs of tokens, and a `beta` that is not above 0.
    """
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta is {beta}: take a number above 0")
    inputs = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    shapes = [tuple(log_probs.shape) for log_probs in inputs]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(
            f"log-probs have shapes {', '.join(map(str, shapes))}: expected (B,) of all four, "
            "summed over the tokens of each response"
        )
    chosen_reward = beta * (policy_chosen - ref_chosen)
    rejected_reward = beta * (policy_rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    metrics = {
        "chosen_reward": chosen_reward.detach(),
        "rejected_reward": rejected_reward.detach(),
        "margin": margin.detach(),
        "accuracy": (margin > 0).float(),
    }
    return -torch.nn.functional.logsigmoid(margin), metrics
