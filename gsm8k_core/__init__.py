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

_NAMES = {
    "errors": ("Gsm8kError", "ConfigError", "DataError", "ModelError", "TrainingError"),
    "problems": ("Problem", "read_problems"),
    "answers": ("extract_answer", "is_correct"),
    "rewards": ("build_reward_fn", "gsm8k_reward"),
    "masking": ("masked_mean", "masked_normalize"),
    "prompts": ("encode_prompts",),
    "tokenization": ("tokenize_prompt_and_output", "collate", "split_by_token_budget"),
    "scoring": ("compute_entropy", "get_response_log_probs", "score_responses"),
    "metrics": ("pass_at_k", "maj_at_k", "mean_interval", "paired_difference", "holm"),
    "advantages": ("compute_advantages", "compute_group_normalized_rewards"),
    "losses": (
        "compute_grpo_clip_loss",
        "compute_naive_policy_gradient_loss",
        "compute_policy_gradient_loss",
        "aggregate",
        "kl_estimate",
        "step_normalizer",
        "mask_truncated",
    ),
    "grpo": (
        "policy_loss",
        "PolicyBatch",
        "add_metrics",
        "summarize_metrics",
        "grpo_microbatch_train_step",
    ),
    "sft": ("sft_loss", "sft_microbatch_train_step"),
    "dpo": ("dpo_loss",),
    "generation": ("log_generations",),
    "engines.hf_engine": ("HfEngine",),
    "engines.base": ("Request", "Completion"),
    "config": ("load_config", "GrpoMethod", "PromptSettings", "RewardSettings"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOME)
