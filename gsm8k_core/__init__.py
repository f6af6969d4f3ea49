"""Training and evaluation on GSM8K, exact and small: the library under the workflow.

Names are imported on first use, so that what needs no torch does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsm8k_core.advantages import compute_advantages as compute_advantages
    from gsm8k_core.advantages import (
        compute_group_normalized_rewards as compute_group_normalized_rewards,
    )
    from gsm8k_core.answers import extract_answer as extract_answer
    from gsm8k_core.answers import is_correct as is_correct
    from gsm8k_core.config import GrpoMethod as GrpoMethod
    from gsm8k_core.config import PromptSettings as PromptSettings
    from gsm8k_core.config import RewardSettings as RewardSettings
    from gsm8k_core.config import load_config as load_config
    from gsm8k_core.dpo import dpo_loss as dpo_loss
    from gsm8k_core.engines.base import Completion as Completion
    from gsm8k_core.engines.base import Request as Request
    from gsm8k_core.engines.hf_engine import HfEngine as HfEngine
    from gsm8k_core.errors import ConfigError as ConfigError
    from gsm8k_core.errors import DataError as DataError
    from gsm8k_core.errors import Gsm8kError as Gsm8kError
    from gsm8k_core.errors import ModelError as ModelError
    from gsm8k_core.errors import TrainingError as TrainingError
    from gsm8k_core.generation import log_generations as log_generations
    from gsm8k_core.grpo import PolicyBatch as PolicyBatch
    from gsm8k_core.grpo import add_metrics as add_metrics
    from gsm8k_core.grpo import grpo_microbatch_train_step as grpo_microbatch_train_step
    from gsm8k_core.grpo import policy_loss as policy_loss
    from gsm8k_core.grpo import summarize_metrics as summarize_metrics
    from gsm8k_core.losses import aggregate as aggregate
    from gsm8k_core.losses import compute_grpo_clip_loss as compute_grpo_clip_loss
    from gsm8k_core.losses import (
        compute_naive_policy_gradient_loss as compute_naive_policy_gradient_loss,
    )
    from gsm8k_core.losses import compute_policy_gradient_loss as compute_policy_gradient_loss
    from gsm8k_core.losses import kl_estimate as kl_estimate
    from gsm8k_core.losses import mask_truncated as mask_truncated
    from gsm8k_core.losses import step_normalizer as step_normalizer
    from gsm8k_core.masking import masked_mean as masked_mean
    from gsm8k_core.masking import masked_normalize as masked_normalize
    from gsm8k_core.metrics import holm as holm
    from gsm8k_core.metrics import maj_at_k as maj_at_k
    from gsm8k_core.metrics import mean_interval as mean_interval
    from gsm8k_core.metrics import paired_difference as paired_difference
    from gsm8k_core.metrics import pass_at_k as pass_at_k
    from gsm8k_core.problems import Problem as Problem
    from gsm8k_core.problems import read_problems as read_problems
    from gsm8k_core.prompts import encode_prompts as encode_prompts
    from gsm8k_core.rewards import build_reward_fn as build_reward_fn
    from gsm8k_core.rewards import gsm8k_reward as gsm8k_reward
    from gsm8k_core.scoring import compute_entropy as compute_entropy
    from gsm8k_core.scoring import get_response_log_probs as get_response_log_probs
    from gsm8k_core.scoring import score_responses as score_responses
    from gsm8k_core.sft import sft_loss as sft_loss
    from gsm8k_core.sft import sft_microbatch_train_step as sft_microbatch_train_step
    from gsm8k_core.tokenization import collate as collate
    from gsm8k_core.tokenization import split_by_token_budget as split_by_token_budget
    from gsm8k_core.tokenization import tokenize_prompt_and_output as tokenize_prompt_and_output

_HOME = {
    "Gsm8kError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "TrainingError": "errors",
    "Problem": "problems",
    "read_problems": "problems",
    "extract_answer": "answers",
    "is_correct": "answers",
    "build_reward_fn": "rewards",
    "gsm8k_reward": "rewards",
    "masked_mean": "masking",
    "masked_normalize": "masking",
    "encode_prompts": "prompts",
    "tokenize_prompt_and_output": "tokenization",
    "collate": "tokenization",
    "split_by_token_budget": "tokenization",
    "compute_entropy": "scoring",
    "get_response_log_probs": "scoring",
    "score_responses": "scoring",
    "pass_at_k": "metrics",
    "maj_at_k": "metrics",
    "mean_interval": "metrics",
    "paired_difference": "metrics",
    "holm": "metrics",
    "compute_advantages": "advantages",
    "compute_group_normalized_rewards": "advantages",
    "compute_grpo_clip_loss": "losses",
    "compute_naive_policy_gradient_loss": "losses",
    "compute_policy_gradient_loss": "losses",
    "aggregate": "losses",
    "kl_estimate": "losses",
    "step_normalizer": "losses",
    "mask_truncated": "losses",
    "policy_loss": "grpo",
    "PolicyBatch": "grpo",
    "add_metrics": "grpo",
    "summarize_metrics": "grpo",
    "sft_loss": "sft",
    "sft_microbatch_train_step": "sft",
    "dpo_loss": "dpo",
    "grpo_microbatch_train_step": "grpo",
    "log_generations": "generation",
    "HfEngine": "engines.hf_engine",
    "Request": "engines.base",
    "Completion": "engines.base",
    "load_config": "config",
    "GrpoMethod": "config",
    "PromptSettings": "config",
    "RewardSettings": "config",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOME)
