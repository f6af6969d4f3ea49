"""From rewards to advantages: how much better a completion is than what it is compared with.

Shapes: `N` completions, `G` group size; completion i answers prompt i // G.

A group whose rewards are all equal says nothing about which completion is better. Where a reward
is compared with its group, its advantages are exactly 0 then: its mean, computed in floating point,
can differ from its members in the last bit, and dividing that noise by a small epsilon would make a
gradient out of it. `batch_zscore` does so where all N are equal; `raw` compares with nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, get_args

import torch

from gsm8k_core.config import AdvantageEstimator
from gsm8k_core.errors import DataError, TrainingError

RewardFunction = Callable[[str, str], dict[str, float]]


def compute_advantages(
    rewards: torch.Tensor,
    group_size: int,
    estimator: AdvantageEstimator = "group_zscore",
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Advantages (N,) of rewards (N,).

    - `group_zscore`: (r - mean) / (std + epsilon) over the group (GRPO, Shao et al. 2024, §4.1.2);
    - `group_centered`: r - mean over the group (Dr. GRPO, Liu et al. 2025, §3.2);
    - `group_centered_batch_std`: that over (std + epsilon) of all N of them (REINFORCE++ with a
      group baseline, Hu et al. 2025);
    - `leave_one_out`: r - mean of the others in the group (RLOO, Ahmadian et al. 2024);
    - `batch_zscore`: (r - mean) / (std + epsilon) over all N (REINFORCE++, Hu et al. 2025);
    - `raw`: r itself.

    The std is the unbiased one (divided by the count less one). A group of one has nothing to be
    compared with: its advantage is 0 where the group's mean is taken off, and `leave_one_out` is
    not defined. Raises TrainingError that names completion and prompt if a reward is NaN or
    infinite, or if rewards are too large to compute with, ValueError if they are no tensor of
    floats, N is no multiple of the group size or `epsilon` is below 0.
    """
    _check_rewards(rewards, group_size)
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}: take 0 or above")
    advantages = _estimated(rewards, group_size, estimator, epsilon)
    if not torch.isfinite(advantages).all():
        raise TrainingError(
            f"rewards up to {rewards.abs().max().item():g} have no finite advantages in "
            f"{rewards.dtype}: scale them down"
        )
    return advantages


def _estimated(
    rewards: torch.Tensor, group_size: int, estimator: AdvantageEstimator, epsilon: float
) -> torch.Tensor:
    if estimator == "raw":
        return rewards.clone()
    if estimator == "batch_zscore":
        return _zscore(rewards[None, :], epsilon).reshape(-1)
    groups = rewards.reshape(-1, group_size)
    if estimator == "group_zscore":
        return _zscore(groups, epsilon).reshape(-1)
    if estimator == "group_centered":
        return _centered(groups).reshape(-1)
    if estimator == "group_centered_batch_std":
        # Their mean is 0 but for rounding, which must not make a 0 anything else.
        return _scaled(_centered(groups).reshape(-1), epsilon)
    if estimator == "leave_one_out":
        if group_size < 2:
            raise ValueError("leave_one_out needs a group size of 2 or more")
        # r_i - (S - r_i)/(G - 1) = (r_i - S/G)·G/(G - 1), with S the sum of the group
        return (_centered(groups) * (group_size / (group_size - 1))).reshape(-1)
    known = ", ".join(get_args(AdvantageEstimator))
    raise ValueError(f"unknown advantage estimator '{estimator}': expected {known}")


def compute_group_normalized_rewards(
    reward_fn: RewardFunction,
    rollout_responses: Iterable[str],
    repeated_ground_truths: Iterable[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Reward every response and compare it with its group.

    `rollout_responses` and `repeated_ground_truths` hold N = prompts × `group_size` texts, the
    completions of a prompt next to each other. Returns advantages (N,), raw rewards (N,), both
    float32, and metadata: mean, std, min and max of the reward, the mean of every other entry that
    `reward_fn` returns, and the share of groups whose rewards are all equal. With
    `normalize_by_std` this is `group_zscore`, without it `group_centered`.
    Raises what `compute_advantages` raises, and ValueError if the lists differ in length or are
    texts, or the reward function returns no `reward` or other entries than before. What the reward
    function raises, or returns wrongly, is told with the completion that it was called for.
    """
    if isinstance(rollout_responses, str) or isinstance(repeated_ground_truths, str):
        raise ValueError("responses and ground truths are lists of texts, found one text")
    _check_group_size(group_size)
    responses, truths = list(rollout_responses), list(repeated_ground_truths)
    if len(responses) != len(truths):
        raise ValueError(f"{len(responses)} responses but {len(truths)} ground truths")
    graded: list[dict[str, float]] = []
    for index, (response, ground_truth) in enumerate(zip(responses, truths, strict=True)):
        with named_in_errors(_name(index, group_size)):
            graded.append(reward_fn(response, ground_truth))
            check_reward(graded[-1], response, graded[0])
    raw_rewards = torch.tensor([grade["reward"] for grade in graded], dtype=torch.float32)
    estimator: AdvantageEstimator = "group_zscore" if normalize_by_std else "group_centered"
    advantages = compute_advantages(raw_rewards, group_size, estimator, advantage_eps)
    parts = {
        f"{key}_mean": sum(float(grade[key]) for grade in graded) / len(graded)
        for key in graded[0]
        if key != "reward"
    }
    equal = equal_reward_groups(raw_rewards, group_size).float().mean()
    metadata = {
        "reward_mean": raw_rewards.mean().item(),
        "reward_std": raw_rewards.std(unbiased=len(graded) > 1).item(),
        "reward_min": raw_rewards.min().item(),
        "reward_max": raw_rewards.max().item(),
        **parts,
        "equal_reward_groups": equal.item(),
    }
    return advantages, raw_rewards, metadata


@contextlib.contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Say in an error of the block what `name` it is about: first, or in a note to others' errors.

    Only of DataError (a gold answer that is no number) is it known how to make one like it.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:
        error.add_note(name)
        raise


def check_reward(grade: Any, response: str, first: Any) -> None:
    """Raise ValueError unless a reward function has returned numbers, among them `reward`.

    `first` is what it returned first: means are taken of entries that all have.
    """
    whole = isinstance(grade, Mapping) and "reward" in grade
    if not whole or not all(isinstance(value, Real) for value in grade.values()):
        raise ValueError(
            f"reward_fn returned {grade!r:.80} for {response[:80]!r}: expected a dict of numbers "
            "with `reward`, such as gsm8k_reward returns"
        )
    if grade.keys() != first.keys():
        raise ValueError(
            f"reward_fn returned {', '.join(sorted(grade))} for {response[:80]!r}, and "
            f"{', '.join(sorted(first))} for the first response: return the same entries for all"
        )


def equal_reward_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Bool (N / G,): true for a group that has nothing to learn from, all its rewards being equal.

    Dynamic sampling (DAPO, Yu et al. 2025, §3.2) replaces these.
    """
    groups = rewards.reshape(-1, group_size)
    return groups.amax(dim=-1) == groups.amin(dim=-1)


def _centered(groups: torch.Tensor) -> torch.Tensor:
    """r - mean over the last dimension; exactly 0 where all are equal."""
    equal = groups.amax(dim=-1, keepdim=True) == groups.amin(dim=-1, keepdim=True)
    centered = groups - groups.mean(dim=-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(centered), centered)


def _zscore(groups: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Centered rewards over their unbiased std plus epsilon; exactly 0 where all are equal."""
    return _scaled(_centered(groups), epsilon)


def _scaled(centered: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What is centered over the last dimension, over its unbiased std plus epsilon; 0 stays 0."""
    if centered.shape[-1] < 2:
        return centered  # already 0; the std of one value does not exist
    scale = centered.std(dim=-1, keepdim=True) + epsilon
    # With epsilon 0 and equal rewards, 0/0 would be NaN.
    return torch.where(centered == 0, torch.zeros_like(centered), centered / scale)


def _check_rewards(rewards: torch.Tensor, group_size: int) -> None:
    if not isinstance(rewards, torch.Tensor) or not rewards.is_floating_point():
        found = rewards.dtype if isinstance(rewards, torch.Tensor) else type(rewards).__name__
        raise ValueError(
            f"rewards are {found}, expected a tensor of floats: "
            "torch.tensor(rewards, dtype=torch.float32)"
        )
    _check_group_size(group_size)
    if rewards.dim() != 1 or rewards.numel() == 0 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}: expected (N,) with N a multiple of the "
            f"group size {group_size}"
        )
    wrong = (~torch.isfinite(rewards)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise TrainingError(
            f"reward of {_name(index, group_size)} is {rewards[index].item()}: the reward function "
            "must return a finite number"
        )


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group size must be 1 or more, found {group_size}")


def _name(index: int, group_size: int) -> str:
    return f"completion {index} (prompt {index // group_size}, sample {index % group_size})"
