"""pass@k, maj@k, intervals and paired differences.

Shapes: `S` seeds (training runs), `P` problems. A value is 1 or 0 for a greedy completion, or the
share of correct samples, so it lies in [0, 1].

Which randomness an interval stands for: both the seeds and the problems are samples of more that
might have been drawn, and every seed answers the same problems. That is a crossed two-way layout
with random effects and one value per cell, y_sp = μ + a_s + b_p + e_sp. With the usual mean squares

    Var(mean) = (MS_seed + MS_problem − MS_error) / (S·P)

(each mean square holds the error once; E[MS_seed] = σ²_e + P σ²_a, E[MS_problem] = σ²_e + S σ²_b),
and the degrees of freedom of such a combination are Satterthwaite's (1946, "An approximate
distribution of estimates of variance components", eq. 17). Treating the S·P values as independent
instead is the usual mistake (Miller 2024, "Adding error bars to evals", on clustered questions).
A mean in [0, 1] gets a Wilson interval at the number of independent values that would have this
variance, with t for z, as survey proportions do (Korn and Graubard 1998): a symmetric interval
around 2 % would reach below 0.

Coverage at 95 %, simulated with 200 problems (logistic effects: problems sd 1 to 2, seeds 0 to 0.3
on the logit scale; see tests/test_metrics.py): 94 to 98 % with three seeds, 94 to 97.5 % with five.
Where seeds differ so much that they are most of the variance (sd 0.6, or 0.3 with 1000 problems),
three seeds reach only about 92 to 93 %, for the degrees of freedom are themselves estimated from
three numbers, and five about 93 to 95 %. Use five before trusting a small difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    delta: float
    low: float
    high: float
    p_value: float


# -------------------------------------------------------------------------------- repeated sampling


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> Floats:
    """Probability that one of `k` samples is correct, per problem.

    The unbiased estimator 1 − C(n−c, k) / C(n, k) of Chen et al. 2021 (Codex), eq. 1, as a product
    that does not overflow. Shapes broadcast. Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs k from 1 to the number of samples")
    if ((c < 0) | (c > n)).any():
        raise ValueError("the number of correct samples must lie from 0 to the number of samples")
    # C(n−c, k) / C(n, k) = Π_{i<k} (n−c−i) / (n−i); a factor of 0 ends it where n−c < k.
    i = np.arange(k)
    factors = np.maximum(n[..., None] - c[..., None] - i, 0) / (n[..., None] - i)
    return np.asarray(1.0 - factors.prod(axis=-1), dtype=np.float64)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the most frequent answer of `k` samples is correct, for one problem.

    The mean over the ⌊n/k⌋ disjoint runs of `k` samples, in order (self-consistency, Wang et al.
    2023). A sample without an answer has no vote; a tie counts by the share of the tied answers
    that is correct, the expectation of drawing one of them. Raises ValueError unless 1 ≤ k ≤ n.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs k from 1 to the number of samples, {len(answers)}")
    blocks = range(0, len(answers) - k + 1, k)
    scores = [_majority(answers[at : at + k], correct[at : at + k]) for at in blocks]
    return sum(scores) / len(scores)


def _majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = {answer for answer, count in votes.items() if count == most}
    right = {answer for answer, good in zip(answers, correct, strict=True) if good}
    return len(winners & right) / len(winners) if winners else 0.0


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, … up to `n`: the k at which pass@k and maj@k are reported."""
    return [2**power for power in range(n.bit_length())]


# ---------------------------------------------------------------------------------------- intervals


def wilson_interval(
    num_correct: float, num_total: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). Neither count need be whole.

    Raises ValueError unless 0 ≤ num_correct ≤ num_total and num_total > 0.
    """
    if not 0 <= num_correct <= num_total or num_total <= 0:
        raise ValueError(f"{num_correct} of {num_total} is no proportion")
    z = float(special.ndtri((1 + confidence) / 2))
    return _score_interval(num_correct / num_total, num_total, z)


def _score_interval(mean: float, size: float, quantile: float) -> tuple[float, float]:
    shift = quantile**2 / size
    centre = (mean + shift / 2) / (1 + shift)
    half = math.sqrt(shift * (mean * (1 - mean) + shift / 4)) / (1 + shift)
    # At 0 and 1 the bound is exact on paper and off by a rounding error here.
    low = 0.0 if mean == 0.0 else max(centre - half, 0.0)
    high = 1.0 if mean == 1.0 else min(centre + half, 1.0)
    return low, high


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of `values (S, P)` in [0, 1] and its interval over seeds and problems.

    One seed: problems are the only randomness (0/1 values get the plain Wilson interval). Values
    that do not vary at all get the Wilson interval of `P` values. Raises ValueError when there are
    no values or one is outside [0, 1].
    """
    table = _check(values, 0.0, 1.0)
    mean = float(table.mean())
    num_seeds, num_problems = table.shape
    variance, freedom = _variance_of_mean(table)
    binary = bool(np.isin(table, (0.0, 1.0)).all())
    if variance == 0.0 or (num_seeds == 1 and binary):
        low, high = wilson_interval(mean * num_problems, num_problems, confidence)
        return Interval(mean, low, high)
    quantile = float(special.stdtrit(freedom, (1 + confidence) / 2))
    low, high = _score_interval(mean, mean * (1 - mean) / variance, quantile)
    return Interval(mean, low, high)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Difference:
    """Mean of `a − b`, its interval and two-sided p-value, paired by seed and problem.

    `a (S, P)`; `b (S, P)`, or `(1, P)` where b was run once and stands for every seed. The
    randomness is that of `mean_interval`; the p-value is below 1 − confidence exactly where the
    interval leaves out 0. Differences that do not vary get the width that Wilson's interval has at
    0 of P, and a sign test. Raises ValueError when shapes do not fit or values leave [0, 1].
    """
    left, right = _check(a, 0.0, 1.0), _check(b, 0.0, 1.0)
    if right.shape not in (left.shape, (1, left.shape[1])):
        raise ValueError(f"cannot pair values of shapes {left.shape} and {right.shape}")
    table = left - right
    delta = float(table.mean())
    variance, freedom = _variance_of_mean(table)
    if variance == 0.0:
        num_problems = table.shape[1]
        half = wilson_interval(0, num_problems, confidence)[1]
        p_value = 1.0 if delta == 0.0 else min(1.0, 2.0 * 0.5**num_problems)
    else:
        error = math.sqrt(variance)
        half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * error
        p_value = 2.0 * float(special.stdtr(freedom, -abs(delta) / error))
    return Difference(delta, max(delta - half, -1.0), min(delta + half, 1.0), p_value)


def _check(values: ArrayLike, low: float, high: float) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected values of shape (seeds, problems), found {table.shape}")
    if not ((table >= low) & (table <= high)).all():
        raise ValueError(f"values must lie from {low:g} to {high:g}")
    return table


def _variance_of_mean(table: Floats) -> tuple[float, float]:
    """Variance of the mean of `table (S, P)` and its degrees of freedom; (0, 1) if all are equal.

    A side of length 1 has no effect that could be estimated: the other side's spread is all.
    """
    num_seeds, num_problems = table.shape
    if np.ptp(table) == 0.0:
        return 0.0, 1.0
    if 1 in table.shape:
        return float(table.var(ddof=1)) / table.size, table.size - 1.0
    mean, by_seed, by_problem = table.mean(), table.mean(axis=1), table.mean(axis=0)
    residual = table - by_seed[:, None] - by_problem[None, :] + mean
    df_seed, df_problem = num_seeds - 1, num_problems - 1
    ms_seed = num_problems * float(((by_seed - mean) ** 2).sum()) / df_seed
    ms_problem = num_seeds * float(((by_problem - mean) ** 2).sum()) / df_problem
    ms_error = float((residual**2).sum()) / (df_seed * df_problem)
    # No variance component can be negative, so the sum cannot fall below any one mean square.
    total = max(ms_seed + ms_problem - ms_error, ms_seed, ms_problem, ms_error)
    spread = (
        ms_seed**2 / df_seed + ms_problem**2 / df_problem + ms_error**2 / (df_seed * df_problem)
    )
    return total / table.size, total**2 / spread
