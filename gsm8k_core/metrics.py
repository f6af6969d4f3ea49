"""pass@k, maj@k, intervals, paired tests and what a study could have found.

Shapes: `S` seeds (training runs), `P` problems, `N` tables at once. A value is 1 or 0 for a greedy
completion, or the share of correct samples, so it lies in [0, 1].

Which randomness an interval stands for: both the seeds and the problems are samples of more that
might have been drawn, and every seed answers the same problems. That is a crossed two-way layout
with random effects and one value per cell, y_sp = μ + a_s + b_p + e_sp. Treating the S·P values as
independent is the usual mistake (Miller 2024, "Adding error bars to evals", on clustered
questions). With the usual mean squares, whose expectations are E[MS_seed] = σ²_e + P σ²_a and
E[MS_problem] = σ²_e + S σ²_b,

    Var(mean) = (MS_seed + MS_problem − MS_error) / (S·P)

(each of the first two holds the error once). The first term is the variance of a mean of S
independent runs, estimated from S numbers alone; the rest is the σ²_b / P that all runs share. With
w the first term's part of the sum, the interval is mean ± c·√Var where

    c² = t²_(P−1) + (t²_(S−1) − t²_(P−1)) · w^γ

At both ends it is the usual one: the t interval over seeds where runs are all that varies, over
problems where runs agree. Between them, Satterthwaite's degrees of freedom (1946, eq. 17) give
1/df = w²/(S−1), and Welch's series (1947) has c² linear in 1/df to second order: this formula with
γ = 2. Plain Satterthwaite covers as little as 87 % with two seeds and 92 % with three, for t_df is
far from linear at 1 or 2 degrees of freedom. By numerical integration over all ratios of the two
terms, false positives at 5 % with γ = 2 are 3.5 to 7.3 % (two seeds), 4.4 to 5.9 % (three) and 4.8
to 5.3 % (five); with γ = 1.8, which is used there, 3.1 to 6.8 %, 4.1 to 5.6 % and 4.6 to 5.1 %.

Further out in the tail, which corrected tests are decided by, the same γ is too bold: at α = 5 %/12
false positives would be up to 3.2, 1.9 and 1.3 times α. Below 5 % it is

    γ(α) = 1 + 0.8 / (1 + (3/S)·ln(5 % / α))

which keeps them, from 5 % down to 5 %/500, within 1.4 α with two seeds, 1.3 α with three and 1.1 α
with five: a family of twelve tests corrected to 5 % has up to 6.7, 5.7 and 5.1 %. The price: where
seeds and problems both count, tests are cautious there (a fifth of α and less with three seeds).

The sum is not let below MS_error, which it exceeds but for chance: three runs with 250 of 500 right
each would have an interval of ±0 points, where so many answers of independent problems have ±2.5.
Where runs of a method differ no more than its answers do, intervals are wide for that and false
positives rare; without it they would be right on average, and a fifth of the intervals narrower
than those of so many independent answers.

Problems made from one template with other names or numbers are no independent draws either. Where
`clusters` say which belong together, clusters take the place of problems in all of the above: G of
them instead of P, the value of a cluster being the seed's mean plus G/P times the sum of its
problems' residuals. The problem term is then the cluster-robust variance of a mean with the factor
G/(G−1), Σ_g (Σ_(p in g) r_p)² / P² · G/(G−1) (Liang and Zeger 1986; Miller's section on clustered
questions), the error term that of seed × cluster, as in two-way clustering (Cameron, Gelbach and
Miller 2011), and t has G−1 degrees of freedom. With one problem a cluster nothing changes.

A side of a difference that was run once has one answer a problem, whose noise the data show as an
effect of problems, and as none where it got all or nothing right by chance: then false positives
against ten seeds would be 23 % at 99 % right. The variance of one more answer is added to that of
the difference: 1/P² for a greedy completion, 1/(nP)² for one of n samples.

A mean in [0, 1] gets Wilson's interval with c for z at the number of independent values that would
have this variance, as survey proportions do (Korn and Graubard 1998): a symmetric interval around
2 % would reach below 0.

What can be had, from simulated studies of logistic effects (tests/test_metrics.py holds the grid):

- one seed: seeds cannot be seen. The interval is of problems alone, true of this one run and too
  narrow for the method wherever training runs differ; the tables flag it.
- two seeds: 95 % intervals cover 93 to 99 %, but they are wide, and the paired test's false
  positives at 5 % are 1 to 7 %, depending on how the variance divides. The tables flag it.
- three seeds and more: 93 to 98 %, and false positives of 4 to 6 % where seeds differ by several
  points, down to 1 % where they do not.

Shares of right samples and maj@k behave as greedy completions do: with eight samples a problem the
same bounds hold. With clusters (20 to 85 of them, one to five seeds) intervals cover 93 to 98 %,
and false positives are 6 % at most; a few clusters several times as large as the others, like those
of the embedded problems, are at the low end. Without knowing of them: 53 to 91 %, and 7 to 37 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gsm8k_core.files import Json

Floats = NDArray[np.float64]

SAME = 1e-9  # values that are nearer are equal but for rounding
POWER = 0.8


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, in the unit of the values (shares)."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference, its confidence interval, and the p-value of the test that it is 0.

    In the unit of the values: shares, of which the tables make points.
    """

    delta: float
    low: float
    high: float
    p_value: float
    smallest_detectable: float | None
    """The difference that so many problems and seeds would have found (p below 1 − confidence) in
    four of five such studies: (c + c_power)·√Var (Bloom 1995, "Minimum detectable effects"), where
    c_power is the quantile of 80 %. Above 1, which no difference is, so few seeds and problems
    would hardly find any. None where nothing varies."""


class Units(NamedTuple):
    """What is drawn independently of N tables: problems, or clusters of them."""

    values: Floats
    """(N, S, P), or (N, S, G) of clusters."""
    by_seed: Floats
    """(N, S), their means, which are those over problems."""
    step: Floats
    """Distance of neighbouring values, but for what all clusters of a seed have in common."""


class Spread(NamedTuple):
    """Of each of N tables; all (N,)."""

    mean: Floats
    variance: Floats
    """Of the mean."""
    seed_share: Floats
    """The w of the module's docstring."""


# -------------------------------------------------------------------------------- repeated sampling


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> Floats:
    """Probability that one of `k` samples is correct, per problem.

    The unbiased estimator 1 − C(n−c, k) / C(n, k) of Chen et al. 2021 (Codex), eq. 1, as a product
    that does not overflow. Shapes broadcast. Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n,
    and for a `k` that is no whole number.
    """
    if not isinstance(k, Integral):
        raise ValueError(f"pass@k needs a whole number k, found {k!r}")
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs k from 1 to the number of samples")
    if not ((c >= 0) & (c <= n)).all():
        raise ValueError("the number of correct samples must lie from 0 to the number of samples")
    # C(n−c, k) / C(n, k) = Π_{i<k} (n−c−i) / (n−i); a factor of 0 ends it where n−c < k.
    i = np.arange(k)
    factors = np.maximum(n[..., None] - c[..., None] - i, 0) / (n[..., None] - i)
    return np.asarray(1.0 - factors.prod(axis=-1), dtype=np.float64)


def maj_at_k(answers: ArrayLike, correct: ArrayLike, k: int) -> Floats:
    """Probability that the most frequent answer of `k` samples is correct, per problem (P,).

    `answers (P, n)`: whole numbers, the same for the same answer, below 0 for none; `correct
    (P, n)`. The mean over the ⌊n/k⌋ disjoint runs of `k` samples, in order (self-consistency, Wang
    et al. 2023). A sample without an answer has no vote; a tie counts by the share of the tied
    answers that is correct, the expectation of drawing one of them. Raises ValueError unless
    1 ≤ k ≤ n, and for other shapes.
    """
    codes, right = np.asarray(answers), np.asarray(correct, dtype=bool)
    if codes.ndim != 2 or codes.shape != right.shape:
        raise ValueError(
            f"answers {codes.shape} and correct {right.shape} must both be (problems, samples)"
        )
    if not isinstance(k, Integral) or not 1 <= k <= codes.shape[1]:
        raise ValueError(
            f"maj@{k} needs a whole number k from 1 to the number of samples, {codes.shape[1]}"
        )
    num_runs = codes.shape[1] // k
    codes = codes[:, : num_runs * k].reshape(-1, num_runs, k)
    right = right[:, : num_runs * k].reshape(codes.shape)
    votes = np.zeros(codes.shape, dtype=np.int64)  # for the answer of each sample
    is_right = np.zeros(codes.shape, dtype=bool)
    for place in range(k):
        same = codes == codes[..., place, None]
        votes += same
        is_right |= same & right[..., place, None]
    votes[codes < 0] = 0
    # Tied answers have as many samples each, so the share of samples is the share of answers.
    winners = (votes == votes.max(axis=-1, keepdims=True)) & (votes > 0)
    scores = (winners & is_right).sum(axis=-1) / np.maximum(winners.sum(axis=-1), 1)
    return np.asarray(scores.mean(axis=-1), dtype=np.float64)


class Agreement(NamedTuple):
    """What two methods answer to the same problems, as shares that add up to 1."""

    both_right: float
    only_a: float
    only_b: float
    same_wrong: float
    """Both wrong, with the same answer."""
    other_wrong: float
    """Both wrong, with two different answers."""
    no_answer: float
    """Both wrong, and at least one of them without an answer."""

    @property
    def same_answer(self) -> float:
        return self.both_right + self.same_wrong


def agreement(
    answers_a: ArrayLike, right_a: ArrayLike, answers_b: ArrayLike, right_b: ArrayLike
) -> Agreement:
    """How often two methods give the same answer, over every sample of `a` with every one of `b`.

    `answers_a` and `right_a (R, n)`, `answers_b` and `right_b (R, m)`: `R` problems (of one or
    several seeds, one below the other) and their samples, or one greedy completion; answers as in
    `maj_at_k`.
    """
    codes_a, codes_b = np.asarray(answers_a), np.asarray(answers_b)
    good_a, good_b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    shares = np.zeros(6)
    for place in range(codes_a.shape[1]):
        code, good = codes_a[:, place, None], good_a[:, place, None]
        wrong = ~good & ~good_b
        answered = wrong & (code >= 0) & (codes_b >= 0)
        cases = [
            good & good_b,
            good & ~good_b,
            ~good & good_b,
            answered & (code == codes_b),
            answered & (code != codes_b),
            wrong & ~answered,
        ]
        shares += [case.mean() for case in cases]
    return Agreement(*map(float, shares / codes_a.shape[1]))


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
    _check_confidence(confidence)
    z = special.ndtri((1 + confidence) / 2)
    low, high = _score_interval(
        np.asarray(num_correct / num_total), np.asarray(num_total), np.asarray(z)
    )
    return float(low), float(high)


def _score_interval(mean: Floats, size: Floats, quantile: Floats) -> tuple[Floats, Floats]:
    shift = quantile**2 / size
    centre = (mean + shift / 2) / (1 + shift)
    half = np.sqrt(shift * (mean * (1 - mean) + shift / 4)) / (1 + shift)
    # At 0 and 1 the bound is exact on paper and off by a rounding error here.
    low = np.where(mean == 0.0, 0.0, np.maximum(centre - half, 0.0))
    high = np.where(mean == 1.0, 1.0, np.minimum(centre + half, 1.0))
    return low, high


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, clusters: ArrayLike | None = None
) -> Interval:
    """Mean of `values (S, P)` in [0, 1] and its interval over seeds and problems.

    `clusters (P,)`: names or numbers, the same for problems that are no independent draws; without
    them every problem is its own, as is one whose cluster is None or NaN. One seed: problems are
    the only randomness (0/1 values without clusters get the plain Wilson interval). Values that do
    not vary at all get the Wilson interval of as many values as there are clusters. Raises
    ValueError when there are no values, one is outside [0, 1], or there is not one cluster for each
    problem.
    """
    return Interval(*map(float, mean_intervals(_batch(values), confidence, clusters)[0]))


def mean_intervals(
    values: ArrayLike, confidence: float = 0.95, clusters: ArrayLike | None = None
) -> Floats:
    """`mean_interval` of each of `values (N, S, P)`: mean, low, high as (N, 3)."""
    _check_confidence(confidence)
    tables = _check(values)
    units = _units(tables, clusters)
    _, num_seeds, num_units = units.values.shape
    spread = _spread(units)
    quantile = _quantile(spread, units.values.shape, confidence)
    # Wilson's interval takes its variance from the mean, so a z belongs to it, and P answers.
    z = special.ndtri((1 + confidence) / 2)
    binary = ((tables == 0.0) | (tables == 1.0)).all(axis=(1, 2)) & (units.values is tables)
    plain = (spread.variance == 0.0) | (num_seeds == 1 and binary)
    variance = np.where(plain, 1.0, spread.variance)
    size = np.where(plain, num_units, spread.mean * (1 - spread.mean) / variance)
    low, high = _score_interval(spread.mean, size, np.where(plain, z, quantile))
    return np.stack([spread.mean, low, high], axis=1)


def paired_difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, clusters: ArrayLike | None = None
) -> Difference:
    """Mean of `a − b`, its interval and two-sided p-value, paired by seed and problem.

    `a` and `b (S, P)`, or `(1, P)` where one was run once and stands for every seed. The
    randomness and the `clusters (P,)`, with None or NaN for none, are those of `mean_interval`; the
    p-value is below 1 − confidence exactly where the interval leaves out 0. Differences that do not
    vary from cluster to cluster get a sign test over clusters with its exact interval (Clopper and
    Pearson 1934); where all are 0, one as wide as Wilson's at 0 of as many. Raises ValueError when
    shapes do not fit or values leave [0, 1].
    """
    delta, low, high, p_value, detectable = paired_differences(
        _batch(a), _batch(b), confidence, clusters
    )[0]
    return Difference(
        float(delta),
        float(low),
        float(high),
        float(p_value),
        None if math.isnan(detectable) else float(detectable),
    )


def paired_differences(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, clusters: ArrayLike | None = None
) -> Floats:
    """`paired_difference` of each of `a` and `b`, `(N, S, P)` or `(N, 1, P)`: (N, 5).

    The columns are those of `Difference`; what cannot be told is NaN.
    """
    _check_confidence(confidence)
    left, right = _check(a), _check(b)
    runs = {left.shape[1], right.shape[1]}
    if left.shape[::2] != right.shape[::2] or (len(runs) == 2 and 1 not in runs):
        raise ValueError(f"cannot pair values of shapes {left.shape[1:]} and {right.shape[1:]}")
    units = _units(left - right, clusters)
    shape = units.values.shape
    spread = _spread(units)
    if 1 in runs:
        spread = _with_another_answer(spread, units)
    constant = spread.variance == 0.0
    error = np.sqrt(spread.variance)
    quantile = _quantile(spread, shape, confidence)
    half = np.where(constant, _constant_half(spread.mean, shape[2], confidence), quantile * error)
    sign_test = np.where(np.abs(spread.mean) < SAME, 1.0, min(1.0, 2.0 * 0.5 ** shape[2]))
    p_value = np.where(constant, sign_test, _p_values(spread, shape))
    power = _quantile(spread, shape, 2 * POWER - 1)
    detectable = np.where(constant, np.nan, (quantile + power) * error)
    low, high = np.maximum(spread.mean - half, -1.0), np.minimum(spread.mean + half, 1.0)
    return np.stack([spread.mean, low, high, p_value, detectable], axis=1)


def is_significant(p_value: float | None, confidence: float) -> bool:
    """Whether a p-value is below 1 − `confidence`."""
    # The confidence is a decimal number: 1 − 0.95 is a little more than 0.05.
    return p_value is not None and p_value < round(1 - confidence, 9)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down adjustment over the p-values that are there; None stays None.

    Rejecting what is below α bounds the chance of any false rejection by α, however the tests
    depend on one another. Raises ValueError for what is no probability.
    """
    for p_value in p_values:
        if p_value is not None and not 0.0 <= p_value <= 1.0 + SAME:
            raise ValueError(f"a p-value is {p_value}: expected 0 to 1, or None for none")
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_value))
        adjusted[index] = largest
    return adjusted


def _constant_half(mean: Floats, num_problems: int, confidence: float) -> Floats:
    """Half width where every problem has the difference `mean`: of it, or of none.

    With s the share of problems whose difference has this sign, P of P give s a lower bound of
    (α/2)^(1/P); the difference, |mean|·(2s − 1), is above 0 there where s is above 1/2.
    """
    least = ((1 - confidence) / 2) ** (1 / num_problems)
    none = wilson_interval(0, num_problems, confidence)[1]
    return np.where(np.abs(mean) < SAME, none, 2 * (1 - least) * np.abs(mean))


def _batch(values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        remedy = "; give one run as [values]" if table.ndim == 1 else ""
        raise ValueError(f"expected values of shape (seeds, problems), found {table.shape}{remedy}")
    return table[None]


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: expected a share below 1, such as 0.95")


def _check(values: ArrayLike) -> Floats:
    tables = np.asarray(values, dtype=np.float64)
    if tables.ndim != 3 or tables.size == 0:
        raise ValueError(f"expected values of shape (…, seeds, problems), found {tables.shape}")
    outside = np.argwhere(~((tables >= 0.0) & (tables <= 1.0)))
    if len(outside):
        place = tuple(outside[0])
        raise ValueError(
            f"values must lie from 0 to 1, found {tables[place]} at seed {place[-2]}, problem "
            f"{place[-1]}"
        )
    return tables


def _units(tables: Floats, clusters: ArrayLike | None) -> Units:
    """Values `(N, S, G)` of clusters, from those of problems `(N, S, P)`; as they are without.

    With n_g problems in cluster g and ȳ_s the mean of seed s, a cluster's value is
    ȳ_s + (G/P) Σ_(p in g) (y_sp − ȳ_s): the mean over clusters is ȳ_s, as it is over problems, and
    their spread is that of the sums of residuals. Of clusters of one size it is their mean.
    """
    num_problems = tables.shape[2]
    codes = np.arange(num_problems)
    if clusters is not None:
        names = np.asarray(clusters, dtype=object)  # where a NaN among texts stays one
        if names.shape != (num_problems,):
            raise ValueError(f"expected clusters of {num_problems} problems, found {names.shape}")
        missing = np.array([name is None or name != name for name in names])
        known = np.array(names[~missing].tolist())
        codes[~missing] = np.unique(known, return_inverse=True)[1]
        codes[missing] += num_problems
        codes = np.unique(codes, return_inverse=True)[1]
    sizes = np.bincount(codes)
    by_seed = tables.mean(axis=2)
    if len(sizes) == num_problems:
        return Units(tables, by_seed, _grid_step(tables))
    order, starts = np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes
    scale = len(sizes) / num_problems
    sums = scale * np.add.reduceat(tables[:, :, order], starts, axis=2)
    mean = by_seed[..., None]
    return Units(mean + (sums - scale * sizes * mean), by_seed, _grid_step(sums))


def _spread(units: Units) -> Spread:
    """Mean of each of N tables, its variance, and the part that seeds tell of.

    "Problems" are clusters where there are any. The variance is 0 where all values of a table are
    equal. A side of length 1 has no effect that could be estimated: the other side's spread is all.
    """
    tables, by_seed, _ = units
    _, num_seeds, num_problems = tables.shape
    by_problem = tables.mean(axis=1)
    mean = by_seed.mean(axis=1)
    constant = np.ptp(tables, axis=(1, 2)) < SAME
    share = np.zeros_like(mean)
    if num_seeds == 1 and num_problems == 1:
        return Spread(mean, share, share)
    if num_seeds == 1 or num_problems == 1:
        values = by_problem if num_seeds == 1 else by_seed
        variance = np.where(constant, 0.0, values.var(axis=1, ddof=1) / values.shape[1])
        return Spread(mean, variance, share if num_seeds == 1 else share + 1.0)
    squares_seed = num_problems * ((by_seed - mean[:, None]) ** 2).sum(axis=1)
    squares_problem = num_seeds * ((by_problem - mean[:, None]) ** 2).sum(axis=1)
    squares_all = ((tables - mean[:, None, None]) ** 2).sum(axis=(1, 2))
    squares_error = np.maximum(squares_all - squares_seed - squares_problem, 0.0)
    df_seed, df_problem = num_seeds - 1, num_problems - 1
    ms_error = squares_error / (df_seed * df_problem)
    ms_seed = squares_seed / df_seed
    total = np.maximum(ms_seed + squares_problem / df_problem - ms_error, ms_error)
    total = np.where(constant, 1.0, total)
    variance = np.where(constant, 0.0, total / (num_seeds * num_problems))
    return Spread(mean, variance, np.minimum(ms_seed / total, 1.0))


def _with_another_answer(spread: Spread, units: Units) -> Spread:
    """`spread` of differences from a side that was run once, as the module's docstring says."""
    more = (units.step / units.values.shape[2]) ** 2
    variance = np.where(spread.variance == 0.0, 0.0, spread.variance + more)
    scale = spread.variance / np.where(variance == 0.0, 1.0, variance)
    return Spread(spread.mean, variance, np.where(variance == 0.0, 1.0, scale) * spread.seed_share)


def _grid_step(tables: Floats) -> Floats:
    """Distance of neighbouring values of each table, (N,): 1/n for shares of n samples."""
    gaps = [np.diff(np.unique(np.round(table, 9))) for table in tables]
    return np.array([of_one.min(initial=1.0) for of_one in gaps])


def _quantile(spread: Spread, shape: tuple[int, ...], confidence: float | Floats) -> Floats:
    """The c of the module's docstring, (N,)."""
    _, num_seeds, num_problems = shape
    tail = (1 - np.asarray(confidence, dtype=np.float64)) / 2
    return _quantile_of_tail(spread, num_seeds, num_problems, tail)


def _quantile_of_tail(spread: Spread, num_seeds: int, num_problems: int, tail: Floats) -> Floats:
    # The lower tail keeps the precision of probabilities as small as 1e-150.
    over_problems = special.stdtrit(max(num_problems - 1, 1), tail) ** 2
    over_seeds = special.stdtrit(max(num_seeds - 1, 1), tail) ** 2
    further_out = np.maximum(np.log(0.05 / (2 * tail)), 0.0)
    exponent = 1.0 + 0.8 / (1.0 + 3.0 / num_seeds * further_out)  # the γ of the docstring
    # As a sum of parts: the difference of both would swallow the smaller one in extreme tails.
    part = spread.seed_share**exponent
    return np.asarray(np.sqrt((1 - part) * over_problems + part * over_seeds))


def _p_values(spread: Spread, shape: tuple[int, ...]) -> Floats:
    """Two-sided p-values of a mean of 0: the level at which the interval just reaches 0.

    By bisection over log p, for the quantile has no inverse in closed form.
    """
    _, num_seeds, num_problems = shape
    error = np.sqrt(np.where(spread.variance == 0.0, 1.0, spread.variance))
    statistic = np.abs(spread.mean) / error
    low, high = np.full_like(statistic, math.log(1e-150)), np.zeros_like(statistic)
    for _ in range(60):
        middle = (low + high) / 2
        reached = _quantile_of_tail(spread, num_seeds, num_problems, np.exp(middle) / 2)
        low, high = (
            np.where(reached > statistic, middle, low),
            np.where(reached > statistic, high, middle),
        )
    return np.exp(high)


def smoothed_curve(runs: Sequence[Sequence[Json]], key: str) -> tuple[list[int], Floats, int]:
    """Steps that the logs of all runs have, the running mean of `key` there, and its window.

    `runs` are rows with `step`, one list a seed. The means are (S, steps), over the last `window`
    steps, fewer at the start; validations are few, and stay as they are. Steps that a seed lacks
    are left out: beyond the end of one, a mean over seeds would be of others. (S, 0) where no step
    is left.
    """
    series = [{row["step"]: row[key] for row in run if row.get(key) is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    values = np.array([[one[step] for step in steps] for one in series], dtype=np.float64)
    window = 1 if key == "validation_accuracy" else max(1, len(steps) // 25)
    if not steps:
        return [], values, window
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, len(steps) + 1)
    starts = np.maximum(ends - window, 0)
    return steps, (sums[:, ends] - sums[:, starts]) / (ends - starts), window
