from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from gsm8k_core.metrics import (
    Floats,
    maj_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    powers_up_to,
    wilson_interval,
)

# -------------------------------------------------------------------------------- repeated sampling


@given(st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(
    n: int, data: st.DataObject
) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(range(n), k))
    hits = sum(any(sample < c for sample in subset) for subset in subsets)
    assert pass_at_k(n, c, k) == pytest.approx(hits / len(subsets), abs=1e-12)


def test_pass_at_k_holds_for_many_samples_without_overflow() -> None:
    # 1 − C(9000, 100) / C(10000, 100) ≈ 1 − 0.9^100
    assert pass_at_k([10_000], [1_000], 100)[0] == pytest.approx(1 - 0.9**100, abs=1e-5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["1", "1", "2"], "1", 3, 1.0),
        (["1", "2", "2"], "1", 3, 0.0),
        (["1", "2", None], "1", 3, 0.5),  # a tie of two answers, one right
        ([None, None, "1"], "1", 3, 1.0),  # no answer has no vote
        ([None, None], "1", 2, 0.0),
        (["1", "1", "2", "2"], "1", 2, 0.5),  # two runs of two: one right, one wrong
        (["1", "2", "1"], "1", 2, 0.5),  # the third is in no whole run: (1 of 2 tied)
        (["1", "2", "1"], "1", 1, 2 / 3),
    ],
)
def test_maj_at_k_is_the_majority_with_ties_shared(
    answers: list[str | None], right: str, k: int, expected: float
) -> None:
    assert maj_at_k(answers, [answer == right for answer in answers], k) == pytest.approx(expected)


def test_reported_k_are_the_powers_of_two_up_to_n() -> None:
    assert powers_up_to(0) == []
    assert powers_up_to(1) == [1]
    assert powers_up_to(10) == [1, 2, 4, 8]
    assert powers_up_to(16) == [1, 2, 4, 8, 16]


# ---------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (700, 1319)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_wilson_interval_is_that_of_scipy(correct: int, total: int, confidence: float) -> None:
    expected = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_one_run_of_right_and_wrong_answers_has_the_wilson_interval() -> None:
    values = np.array([[1.0] * 30 + [0.0] * 70])
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(0.3)
    assert interval[1:] == pytest.approx(wilson_interval(30, 100))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_all_wrong_and_all_right_keep_an_interval_over_the_problems(
    value: float, num_seeds: int
) -> None:
    interval = mean_interval(np.full((num_seeds, 100), value))
    assert interval[1:] == wilson_interval(value * 100, 100)
    assert interval.low < interval.high


def test_repeating_a_run_adds_no_information() -> None:
    # Three equal runs: only the problems are random, so the interval is that of one run.
    run = np.array([1.0] * 40 + [0.0] * 60)
    one, three = mean_interval(run[None]), mean_interval(np.stack([run] * 3))
    # t with 99 degrees of freedom for z, 99 for 100: the same to a hundredth.
    assert three[1:] == pytest.approx(one[1:], abs=0.003)
    # Counting 300 independent answers would be too narrow by √3.
    assert three.high - three.low > 1.5 * np.subtract(*wilson_interval(120, 300)[::-1])


def test_the_variance_is_that_of_the_crossed_layout_by_hand() -> None:
    # Rows (seeds) 1 1 0 0 / 1 0 0 0 / 1 1 1 0; S = 3, P = 4, mean 6/12 = 1/2.
    # Row means 1/2 1/4 3/4:   MS_seed = 4·(0 + 1/16 + 1/16)/2 = 1/4
    # Column means 1 2/3 1/3 0: MS_problem = 3·(1/4 + 1/36 + 1/36 + 1/4)/3 = 5/9
    # Total SS = 12·1/4 = 3; error SS = 3 − 1/2 − 5/3 = 5/6, MS_error = (5/6)/6 = 5/36
    # Var = (1/4 + 5/9 − 5/36)/12 = (24/36)/12 = 1/18
    # df = (2/3)² / ((1/4)²/2 + (5/9)²/3 + (5/36)²/6) = (4/9) / (1/32 + 25/243 + 25/7776)
    table = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    t = stats.t.ppf(0.975, (4 / 9) / (1 / 32 + 25 / 243 + 25 / 7776))
    size = 0.25 / (1 / 18)  # independent answers that would have this variance
    half = t * math.sqrt(size * 0.25 + t * t / 4) / (size + t * t)
    assert mean_interval(table) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    # The same table as a difference to nothing right: mean ± t·√(1/18), cut at ±1.
    difference = paired_difference(table, np.zeros((1, 4)))
    assert difference.delta == 0.5
    assert difference.low == pytest.approx(max(0.5 - t * math.sqrt(1 / 18), -1))
    assert difference.p_value == pytest.approx(
        2 * stats.t.sf(0.5 / math.sqrt(1 / 18), (4 / 9) / (1 / 32 + 25 / 243 + 25 / 7776))
    )


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.data(),
    st.sampled_from([0.8, 0.95]),
)
@settings(max_examples=150, deadline=None)
def test_intervals_hold_their_mean_and_stay_in_range(
    num_seeds: int, num_problems: int, data: st.DataObject, confidence: float
) -> None:
    cells = st.lists(
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        min_size=num_seeds * num_problems,
        max_size=num_seeds * num_problems,
    )
    a = np.array(data.draw(cells)).reshape(num_seeds, num_problems)
    b = np.array(data.draw(cells)).reshape(num_seeds, num_problems)
    interval = mean_interval(a, confidence)
    assert 0 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= 1
    difference = paired_difference(a, b, confidence)
    assert -1 <= difference.low <= difference.delta <= difference.high <= 1
    assert 0 <= difference.p_value <= 1
    mirrored = paired_difference(b, a, confidence)
    assert (mirrored.delta, mirrored.p_value) == pytest.approx((-difference.delta, difference[3]))


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3), [[1.5]], [[-0.1]], [[math.nan]]])
def test_values_that_are_no_shares_are_refused(values: object) -> None:
    with pytest.raises(ValueError):
        mean_interval(values)  # type: ignore[arg-type]


def test_pairing_removes_what_the_problems_have_in_common() -> None:
    # 100 problems, half of them easy; b is right where a is, and on 10 more.
    a = np.array([[1.0] * 50 + [0.0] * 50])
    b = np.array([[1.0] * 60 + [0.0] * 40])
    difference = paired_difference(b, a)
    # Differences: ten 1s in a hundred; variance 0.1·0.9·100/99, error √(·/100) = 0.03015
    assert difference.delta == pytest.approx(0.1)
    error = math.sqrt(0.09 / 99)
    assert difference.high - difference.low == pytest.approx(2 * stats.t.ppf(0.975, 99) * error)
    assert difference.p_value == pytest.approx(2 * stats.t.sf(0.1 / error, 99))


def test_a_parent_that_was_run_once_stands_for_every_seed() -> None:
    a = np.array([[1, 1, 0, 0.0], [1, 0, 0, 1], [1, 1, 1, 0]])
    b = np.array([[1, 0, 0, 0.0]])
    assert paired_difference(a, b) == paired_difference(a, np.repeat(b, 3, axis=0))
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference(a, np.zeros((2, 4)))


def test_runs_without_a_difference_have_p_value_one_and_an_interval_around_zero() -> None:
    run = np.array([[1.0, 0.0] * 50])
    difference = paired_difference(run, run)
    assert (difference.delta, difference.p_value) == (0.0, 1.0)
    assert difference.low == -difference.high < 0


# --------------------------------------------------------------------------------------- simulation

NUM_STUDIES = 2000


def simulate(
    logit: float, sd_problem: float, sd_seed: float, num_seeds: int, rng: np.random.Generator
) -> tuple[Floats, float]:
    """Right and wrong answers (studies, S, 200) of logistic effects, and the true accuracy."""
    shape = (NUM_STUDIES, num_seeds, 200)
    problems = rng.normal(0, sd_problem, (shape[0], 1, shape[2]))
    seeds = rng.normal(0, sd_seed, (shape[0], shape[1], 1))
    right = rng.random(shape) < special.expit(logit + problems + seeds)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    spread = math.hypot(sd_problem, sd_seed)
    truth = np.average(special.expit(logit + nodes * spread), weights=weights)
    return right.astype(np.float64), float(truth)


@pytest.mark.parametrize(
    ("num_seeds", "sd_seed", "logit", "sd_problem", "lowest", "highest"),
    [
        (1, 0.0, 0.0, 2.0, 0.93, 0.97),
        (3, 0.0, 0.0, 2.0, 0.93, 0.98),
        (3, 0.1, -3.0, 2.0, 0.93, 0.98),
        (3, 0.3, 0.0, 2.0, 0.93, 0.97),
        (3, 0.3, 2.0, 1.0, 0.93, 0.97),
        (3, 0.6, 0.0, 2.0, 0.91, 0.96),  # seeds are most of the variance: three are too few
        (5, 0.1, 0.0, 2.0, 0.93, 0.97),
        (5, 0.3, -3.0, 2.0, 0.93, 0.97),
        (5, 0.6, 0.0, 2.0, 0.93, 0.97),
    ],
)
def test_the_interval_covers_the_true_accuracy_about_as_often_as_it_says(
    num_seeds: int, sd_seed: float, logit: float, sd_problem: float, lowest: float, highest: float
) -> None:
    rng = np.random.default_rng(17)
    tables, truth = simulate(logit, sd_problem, sd_seed, num_seeds, rng)
    intervals = [mean_interval(table) for table in tables]
    covered = np.mean([low <= truth <= high for _, low, high in intervals])
    assert lowest <= covered <= highest


@pytest.mark.parametrize(("num_seeds", "lowest", "highest"), [(1, 0.035, 0.065), (3, 0.015, 0.07)])
def test_two_methods_of_equal_skill_differ_significantly_about_one_time_in_twenty(
    num_seeds: int, lowest: float, highest: float
) -> None:
    rng = np.random.default_rng(18)
    shape = (NUM_STUDIES, num_seeds, 200)
    problems = rng.normal(0, 2.0, (NUM_STUDIES, 1, 200))
    spread = 0.0 if num_seeds == 1 else 0.2  # one run says nothing of the spread of runs
    a, b = (
        (rng.random(shape) < special.expit(problems + rng.normal(0, spread, (*shape[:2], 1))))
        for _ in range(2)
    )
    found = [paired_difference(x, y).p_value < 0.05 for x, y in zip(a, b, strict=True)]
    assert lowest <= np.mean(found) <= highest
