"""Supervised fine-tuning: negative log-likelihood of the response tokens.

Shapes: `B` examples of a microbatch, `T` positions.
"""

from __future__ import annotations

import math

import torch

from gsm8k_core.errors import ConfigError, TrainingError
from gsm8k_core.losses import check_accumulation
from gsm8k_core.masking import masked_normalize
from gsm8k_core.models import in_eval_mode
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import collate_packed

# Nats: more than rounding, less than what the least of the models that are known to mix them do.
PACKING_TOLERANCE = 5e-6


def sft_loss(
    log_probs: torch.Tensor, response_mask: torch.Tensor, num_tokens_in_step: float
) -> torch.Tensor:
    """A microbatch's share of the optimizer step's mean NLL per response token, in nats.

    `log_probs` and `response_mask` (B, T); `num_tokens_in_step` counts the response tokens of all
    microbatches and ranks, so that the gradient depends on neither. Raises TrainingError where that
    is not above 0: a step with nothing to learn from. Raises ValueError where it is no number.
    """
    if not num_tokens_in_step < math.inf:
        raise ValueError(f"num_tokens_in_step is {num_tokens_in_step}: take a finite number")
    if num_tokens_in_step <= 0:
        raise TrainingError("no response token counts in this optimizer step: skip it")
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
    condition. Raises ValueError unless the accumulation steps are a whole number from 1 on and the
    constant is above 0.
    """
    check_accumulation(gradient_accumulation_steps)
    if not 0.0 < normalize_constant < math.inf:
        raise ValueError(f"normalize_constant is {normalize_constant}: take a number above 0")
    per_example = -masked_normalize(policy_log_probs, response_mask, -1, normalize_constant)
    loss = per_example.mean() / gradient_accumulation_steps
    loss.backward()
    metadata = {
        "nll_sum": -masked_normalize(policy_log_probs.detach(), response_mask),
        "num_response_tokens": response_mask.bool().sum(),
    }
    return loss.detach(), metadata


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Raise ConfigError where an example of a packed row changes the scores of the next one.

    transformers reads the borders of examples off their positions, but only for some kinds of
    attention, and layers that keep a state run on over them. All ranks call it together.
    """
    device = next(model.parameters()).device
    found: list[torch.Tensor] = []
    with in_eval_mode(model):
        for first in ([3, 4, 5, 6, 7], [9, 8, 7, 6, 5]):
            batch = collate_packed([[2], [2]], [first, [3, 5, 4, 6]], [[0, 1]], 0)
            on_device = {name: values.to(device) for name, values in batch.items()}
            found.append(score_responses(model, **on_device)["log_probs"][0, len(first) :])
    if not torch.allclose(found[0], found[1], rtol=0.0, atol=PACKING_TOLERANCE):
        raise ConfigError(
            f"packing: in {type(model).__name__} the examples of a row attend to one another; set "
            "packing: false"
        )
