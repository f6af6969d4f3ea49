"""Advantages from rewards: each estimator against a loop, and the cases that go wrong elsewhere."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.advantages import (
    compute_advantages,
    compute_group_normalized_rewards,
    equal_reward_groups,
)
from gsm8k_core.config import AdvantageEstimator
from gsm8k_core.errors import DataError, TrainingError

RELATIVE_TO_GROUP: list[AdvantageEstimator] = [
    "group_zscore", "group_centered", "group_centered_batch_std", "leave_one_out",
]  # fmt: skip
EVERY_ESTIMATOR: list[AdvantageEstimator] = [*RELATIVE_TO_GROUP, "batch_zscore", "raw"]


def loop_advantages(
    rewards: list[float], group_size: int, estimator: AdvantageEstimator, epsilon: float
) -> list[float]:
    """One completion at a time, in Python floats."""
    advantages = []
    for index, reward in enumerate(rewards):
        start = index // group_size * group_size
        group = rewards[start : start + group_size]
        others = group[: index - start] + group[index - start + 1 :]
        compared = rewards if estimator == "batch_zscore" else group
        if estimator == "raw":
            advantages.append(reward)
        elif estimator == "leave_one_out":
            advantages.append(reward - statistics.fmean(others))
        elif estimator.startswith("group_centered"):
            advantages.append(reward - statistics.fmean(compared))
        elif len(set(compared)) == 1:
            advantages.append(0.0)
        else:
            std = statistics.stdev(compared)
            advantages.append((reward - statistics.fmean(compared)) / (std + epsilon))
    if estimator == "group_centered_batch_std" and len(advantages) > 1:
        std = statistics.stdev(advantages)
        advantages = [one and one / (std + epsilon) for one in advantages]
    return advantages


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # groups [1, 0, 0, 0] (mean 1/4, variance (9/16 + 3/16)/3 = 1/4) and [1, 1, 1, 1]
        ("group_zscore", [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]),
        ("group_centered", [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]),
        # variance of these eight about 0: (9/16 + 3/16)/7 = 3/28, std 0.32733
        ("group_centered_batch_std", [2.29129, -0.76376, -0.76376, -0.76376, 0, 0, 0, 0]),
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0]),
        # mean 5/8, variance (5·(3/8)² + 3·(5/8)²)/7 = 15/56, std 0.51755
        ("batch_zscore", [0.72457] + [-1.20761] * 3 + [0.72457] * 4),
        ("raw", [1, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_each_estimator_gives_its_definition(
    estimator: AdvantageEstimator, expected: list[float]
) -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    found = compute_advantages(rewards, 4, estimator, epsilon=0.0)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60)
@given(
    estimator=st.sampled_from(EVERY_ESTIMATOR),
    group_size=st.integers(1, 5),
    rewards=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.1 + 0.2, 1.0, -2.0]), min_size=20),
)
def test_estimators_equal_a_loop_over_the_completions(
    estimator: AdvantageEstimator, group_size: int, rewards: list[float]
) -> None:
    rewards = rewards[: len(rewards) // group_size * group_size]
    if estimator == "leave_one_out" and group_size == 1:
        return
    tensor = torch.tensor(rewards, dtype=torch.float64)
    expected = loop_advantages(rewards, group_size, estimator, 1e-3)
    found = compute_advantages(tensor, group_size, estimator, 1e-3)
    assert found.shape == tensor.shape
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", RELATIVE_TO_GROUP)
@settings(max_examples=30)
@given(
    reward=st.sampled_from([0.1 + 0.2, 0.1, 1 / 3, 1e-7, 12345.678, -0.7]) | st.floats(-5, 5),
    group_size=st.integers(2, 12),
)
def test_a_group_with_equal_rewards_has_advantage_exactly_zero(
    estimator: AdvantageEstimator, dtype: torch.dtype, reward: float, group_size: int
) -> None:
    # 0.1 + 0.2 + …: the mean of equal floats can differ from them in the last bit
    rewards = torch.tensor([reward] * group_size + [0.0] * (group_size - 1) + [1.0], dtype=dtype)
    advantages = compute_advantages(rewards, group_size, estimator, epsilon=1e-8)
    assert advantages[:group_size].tolist() == [0.0] * group_size
    assert advantages[-1] > 0


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_batch_with_equal_rewards_has_batch_zscore_exactly_zero(epsilon: float) -> None:
    rewards = torch.full((7,), 0.1)
    assert rewards.mean() != rewards[0]  # so that the naive formula gives noise
    assert compute_advantages(rewards, 7, "batch_zscore", epsilon).tolist() == [0.0] * 7


def test_a_group_of_one_has_advantage_zero_and_no_others_to_leave_out() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.3])
    assert compute_advantages(rewards, 1, "group_zscore").tolist() == [0.0, 0.0, 0.0]
    assert compute_advantages(rewards, 1, "group_centered").tolist() == [0.0, 0.0, 0.0]
    assert compute_advantages(rewards[:1], 1, "batch_zscore").tolist() == [0.0]
    with pytest.raises(ValueError, match="group size of 2"):
        compute_advantages(rewards, 1, "leave_one_out")


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named_by_completion_and_prompt(
    estimator: AdvantageEstimator, value: float
) -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, value, 0.0])
    with pytest.raises(TrainingError, match=r"completion 4 \(prompt 1, sample 1\)"):
        compute_advantages(rewards, 3, estimator)


def test_rewards_that_are_no_whole_number_of_groups_are_refused() -> None:
    for rewards in (torch.zeros(5), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="multiple of the group size 2"):
            compute_advantages(rewards, 2)


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR)
@pytest.mark.parametrize("rewards", [[1.0, 0.0], torch.tensor([1, 0]), torch.tensor([True, False])])
def test_rewards_that_are_no_tensor_of_floats_are_refused(
    estimator: AdvantageEstimator, rewards: Any
) -> None:
    with pytest.raises(ValueError, match="expected a tensor of floats"):
        compute_advantages(rewards, 2, estimator)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_of_nobody_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group size must be 1 or more, found {group_size}"):
        compute_advantages(torch.tensor([1.0, 0.0]), group_size)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_an_epsilon_that_is_not_from_0_on_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"epsilon is {epsilon}: take 0 or above"):
        compute_advantages(torch.tensor([1.0, 0.0]), 2, "group_zscore", epsilon)


def test_finite_rewards_whose_advantages_overflow_are_refused() -> None:
    rewards = torch.tensor([3e38, -3e38, -3e38, -3e38])
    with pytest.raises(TrainingError, match=r"up to 3e\+38 have no finite .*: scale them down"):
        compute_advantages(rewards, 4)


def test_an_unknown_estimator_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'group_zscor': expected group_zscore, group_centered, "):
        compute_advantages(torch.tensor([1.0, 0.0]), 2, "group_zscor")  # type: ignore[arg-type]


def test_groups_with_nothing_to_learn_from_are_found() -> None:
    rewards = torch.tensor([0.3, 0.3, 0.0, 1.0, 0.1 + 0.2, 0.3], dtype=torch.float64)
    # 0.1 + 0.2 and 0.3 are different floats
    assert equal_reward_groups(rewards, 2).tolist() == [True, False, False]


# ---------------------------------------------------------------------------------- with a grader


def grade(response: str, ground_truth: str) -> dict[str, float]:
    right = float(response.endswith(ground_truth))
    marked = float("####" in response)
    return {"reward": right * marked, "format_reward": marked, "answer_reward": right}


RESPONSES = ["#### 4", "4", "#### 5", "#### 4", "#### 9", "8", "7", "6"]
TRUTHS = ["4"] * 4 + ["5"] * 4


def test_responses_are_rewarded_and_compared_with_their_group() -> None:
    advantages, rewards, metadata = compute_group_normalized_rewards(
        grade, RESPONSES, TRUTHS, group_size=4, advantage_eps=1e-6, normalize_by_std=True
    )
    assert rewards.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    # group 0: mean 1/2, unbiased variance 4·(1/4)/3 = 1/3; (1/2)/√(1/3) = 0.86603
    expected = [0.86603, -0.86603, -0.86603, 0.86603, 0, 0, 0, 0]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-4)
    assert metadata["reward_mean"] == pytest.approx(2 / 8)
    assert metadata["format_reward_mean"] == pytest.approx(4 / 8)
    assert metadata["answer_reward_mean"] == pytest.approx(3 / 8)
    assert (metadata["reward_min"], metadata["reward_max"]) == (0.0, 1.0)
    assert metadata["reward_std"] == pytest.approx(statistics.stdev(rewards.tolist()))
    assert metadata["equal_reward_groups"] == 0.5


def test_without_the_std_the_advantage_is_the_distance_to_the_mean() -> None:
    advantages, _, _ = compute_group_normalized_rewards(grade, RESPONSES, TRUTHS, 4, 1e-6, False)
    assert advantages.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]


def test_epsilon_is_added_to_the_std() -> None:
    advantages, _, _ = compute_group_normalized_rewards(
        grade, ["#### 4", "5"], ["4", "4"], 2, 0.5, True
    )
    # (1/2) / (√(1/2) + 1/2) = 0.41421
    assert advantages.tolist() == pytest.approx([0.41421, -0.41421], abs=1e-5)


def test_a_single_completion_has_advantage_zero_and_metadata_without_nan() -> None:
    advantages, rewards, metadata = compute_group_normalized_rewards(
        grade, ["#### 4"], ["4"], 1, 1e-6, True
    )
    assert (advantages.tolist(), rewards.tolist()) == ([0.0], [1.0])
    assert all(math.isfinite(value) for value in metadata.values())


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 responses but 1 ground truths"):
        compute_group_normalized_rewards(grade, ["a", "b"], ["a"], 1, 1e-6, True)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, 1.0], "reward_fn returned 1.0 for 'a': expected a dict of numbers with `reward`"),
        ([{"score": 1.0}] * 2, "returned {'score': 1.0} for 'a'"),
        ([{"reward": 1.0}, {"reward": None}], "returned {'reward': None} for 'b'"),
        ([{"reward": 1.0, "x": 0.0}, {"reward": 1.0}], "returned reward for 'b', and reward, x"),
    ],
)
def test_a_reward_function_that_returns_something_else_is_named_with_the_response(
    returned: list[Any], said: str
) -> None:
    answers = iter(returned)
    with pytest.raises(ValueError, match=said):
        compute_group_normalized_rewards(
            lambda *_: next(answers), ["a", "b"], ["1", "1"], 2, 1e-6, True
        )


@pytest.mark.parametrize("kind", [DataError, ValueError, KeyError])
def test_what_a_reward_function_raises_names_the_completion(kind: type[Exception]) -> None:
    def fails_on_b(response: str, _: str) -> dict[str, float]:
        if response == "b":
            raise kind("no such thing")
        return {"reward": 0.0}

    with pytest.raises(kind, match=r"completion 2 \(prompt 1, sample 0\)") as caught:
        compute_group_normalized_rewards(fails_on_b, list("aabb"), list("1111"), 2, 1e-6, True)
    assert "no such thing" in str(caught.value)


def test_responses_may_come_from_generators() -> None:
    _, rewards, _ = compute_group_normalized_rewards(
        grade, iter(RESPONSES), iter(TRUTHS), 4, 1e-6, True
    )
    assert rewards.sum() == 2


def test_one_text_is_no_list_of_responses() -> None:
    with pytest.raises(ValueError, match="lists of texts, found one text"):
        compute_group_normalized_rewards(grade, "ab", "11", 2, 1e-6, True)
