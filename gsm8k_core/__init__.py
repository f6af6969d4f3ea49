"""Training and evaluation on GSM8K, exact and small: the library under the workflow.

Names are imported on first use, so that what needs no torch does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Problem": "problems",
    "read_problems": "problems",
    "extract_answer": "answers",
    "is_correct": "answers",
    "build_reward_fn": "rewards",
    "gsm8k_reward": "rewards",
    "masked_mean": "masking",
    "masked_normalize": "masking",
    "tokenize_prompt_and_output": "tokenization",
    "compute_entropy": "scoring",
    "get_response_log_probs": "scoring",
    "compute_advantages": "advantages",
    "compute_group_normalized_rewards": "advantages",
    "compute_grpo_clip_loss": "losses",
    "compute_naive_policy_gradient_loss": "losses",
    "compute_policy_gradient_loss": "losses",
    "sft_microbatch_train_step": "sft",
    "grpo_microbatch_train_step": "grpo",
    "log_generations": "generation",
    "HfEngine": "engines.hf_engine",
    "load_config": "config",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOME)
