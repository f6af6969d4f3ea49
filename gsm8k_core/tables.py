"""The comparison: grades and summaries of many runs become one table.

One row per model × method × suite, in the order of the study. Shapes: `S` seeds, `P` problems.

A study folder holds `{model}/{method}/seed{n}/` with `metrics/{suite}.json`,
`grades/{suite}.parquet`, `completions/{suite}.stats.json` and, for what was trained,
`train/summary.json` and `settings.json`. Grades are aggregated file by file, so a thousand runs
need no more memory than their means.
"""

from __future__ import annotations

import contextlib
import html
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from gsm8k_core.config import Comparison
from gsm8k_core.differences import (
    Facts,
    differing,
    evaluation_facts,
    flag_text,
    inconsistent,
    meaning,
    training_facts,
    training_settings,
)
from gsm8k_core.errors import DataError, first_line
from gsm8k_core.files import (
    Json,
    atomic_path,
    read_json,
    read_jsonl,
    read_optional,
    write_text,
)
from gsm8k_core.layout import run_dir
from gsm8k_core.metrics import (
    Difference,
    Floats,
    holm,
    maj_at_k,
    mean_interval,
    paired_difference,
    paired_differences,
    pass_at_k,
    powers_up_to,
)
from gsm8k_core.records import num_gpus

SCHEMA: dict[str, Any] = {
    "study": pl.String,
    "model": pl.String,
    "method": pl.String,
    "suite": pl.String,
    "num_seeds": pl.Int64,
    "num_problems": pl.Int64,
    "num_clusters": pl.Int64,
    "num_samples": pl.Int64,
    "confidence": pl.Float64,
    "accuracy": pl.Float64,
    "accuracy_ci_low": pl.Float64,
    "accuracy_ci_high": pl.Float64,
    "accuracy_by_seed": pl.String,
    "parent": pl.String,
    "delta_vs_parent": pl.Float64,
    "delta_vs_parent_ci_low": pl.Float64,
    "delta_vs_parent_ci_high": pl.Float64,
    "p_value_vs_parent": pl.Float64,
    "p_value_vs_parent_holm": pl.Float64,
    "smallest_detectable_delta": pl.Float64,
    "base": pl.String,
    "delta_vs_base": pl.Float64,
    "delta_vs_base_ci_low": pl.Float64,
    "delta_vs_base_ci_high": pl.Float64,
    "p_value_vs_base": pl.Float64,
    "p_value_vs_base_holm": pl.Float64,
    "smallest_detectable_delta_vs_base": pl.Float64,
    "pass_at_1": pl.Float64,
    "pass_at_1_ci_low": pl.Float64,
    "pass_at_1_ci_high": pl.Float64,
    "pass_at_1_by_seed": pl.String,
    "delta_pass_at_1_vs_parent": pl.Float64,
    "delta_pass_at_1_vs_parent_ci_low": pl.Float64,
    "delta_pass_at_1_vs_parent_ci_high": pl.Float64,
    "p_value_pass_at_1_vs_parent": pl.Float64,
    "p_value_pass_at_1_vs_parent_holm": pl.Float64,
    "smallest_detectable_delta_pass_at_1": pl.Float64,
    "delta_pass_at_1_vs_base": pl.Float64,
    "delta_pass_at_1_vs_base_ci_low": pl.Float64,
    "delta_pass_at_1_vs_base_ci_high": pl.Float64,
    "p_value_pass_at_1_vs_base": pl.Float64,
    "p_value_pass_at_1_vs_base_holm": pl.Float64,
    "smallest_detectable_delta_pass_at_1_vs_base": pl.Float64,
    "pass_at_n": pl.Float64,
    "pass_at_n_ci_low": pl.Float64,
    "pass_at_n_ci_high": pl.Float64,
    "maj_at_n": pl.Float64,
    "maj_at_n_ci_low": pl.Float64,
    "maj_at_n_ci_high": pl.Float64,
    "accuracy_flexible": pl.Float64,
    "format_fraction": pl.Float64,
    "mean_completion_tokens": pl.Float64,
    "truncated_fraction": pl.Float64,
    "train_seconds": pl.Float64,
    "train_seconds_with_parents": pl.Float64,
    "generate_seconds": pl.Float64,
    "gpu_seconds_training": pl.Float64,
    "gpu_seconds_training_with_parents": pl.Float64,
    "gpu_seconds_generating": pl.Float64,
    "num_train_tokens": pl.Float64,
    "num_train_tokens_with_parents": pl.Float64,
    "num_sampled_tokens": pl.Float64,
    "num_generated_tokens": pl.Float64,
    "peak_memory_mb_training": pl.Float64,
    "peak_memory_mb_generating": pl.Float64,
    "flags": pl.String,
}

PASS_AT_K_SCHEMA: dict[str, Any] = {
    "study": pl.String,
    "model": pl.String,
    "method": pl.String,
    "suite": pl.String,
    "num_samples": pl.Int64,
    "confidence": pl.Float64,
    "k": pl.Int64,
    "pass_at_k": pl.Float64,
    "pass_at_k_ci_low": pl.Float64,
    "pass_at_k_ci_high": pl.Float64,
    "maj_at_k": pl.Float64,
    "maj_at_k_ci_low": pl.Float64,
    "maj_at_k_ci_high": pl.Float64,
}

PAIRS_SCHEMA: dict[str, Any] = {
    "study": pl.String,
    "model": pl.String,
    "suite": pl.String,
    "method": pl.String,
    "other": pl.String,
    "confidence": pl.Float64,
    "delta": pl.Float64,
    "delta_ci_low": pl.Float64,
    "delta_ci_high": pl.Float64,
    "p_value": pl.Float64,
    "p_value_holm": pl.Float64,
    "family": pl.String,
    "smallest_detectable_delta": pl.Float64,
}

OTHER_PAIRS = "others"
"""The family of the pairs that no column of the comparison tests."""

MEASURES = {"accuracy": "", "pass_at_1": "_pass_at_1"}
"""What differences are of, and what the names of their columns have for it."""

MEANS_OVER_SEEDS = (
    "accuracy_flexible",
    "format_fraction",
    "mean_completion_tokens",
    "truncated_fraction",
)
METRIC_KEYS = (
    "accuracy",
    "pass_at_1",
    *MEANS_OVER_SEEDS,
    "contradicted_fraction",
    "num_prompts_truncated",
    "math_verify_killed",
    "grading",
    "marker",
)

MAX_BANDS = 4
"""Methods whose bands can be told apart in a figure; those of more cover each other."""

# Flags of single rows, with their share after a colon.
PROMPTS_CUT, CONTRADICTED = "prompts cut", "right and then contradicted"
KILLED = "not graded in time"
LEAST_TOLD = {PROMPTS_CUT: 0.0, CONTRADICTED: 0.01, KILLED: 0.0}
PASS_AT_1_NOTE = (
    "Differences of accuracy and of pass@1 are two measures of one training, and p of each is "
    "corrected by itself. Decide before the study which of them is the question: whoever takes the "
    "better of two tests has up to twice the false positives."
)
DOUBTS = {
    PROMPTS_CUT: "so many prompts were too long for the model and lost their beginning",
    CONTRADICTED: "so many completions are right by the first marker, and state another number "
    "after a later one",
    KILLED: "so many completions took math-verify to a limit of time or memory, and count as wrong",
}


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Cell:
    """The runs of one model × method × suite."""

    greedy: Floats | None  # (S, P), 1 where right
    num_correct: Floats | None  # (S, P), right ones among the samples
    num_samples: int
    maj_at_k: dict[int, Floats]
    """k, a power of two up to `num_samples` → (S, P), chance that the majority of k is right."""
    metrics: list[Json]  # of each seed, as the two below
    stats: list[Json]
    facts: list[Facts]
    clusters: pl.Series | None
    """(P,), the same for problems that are no independent draws; None where each is one."""

    @property
    def accuracy(self) -> Floats:
        """(S, P): greedy where the suite decodes greedily, else the share of right samples."""
        return self.pass_at_1 if self.greedy is None else self.greedy

    @property
    def pass_at_1(self) -> Floats:
        """(S, P): the share of right samples, or greedy where the suite draws none."""
        if self.num_correct is not None:
            return self.num_correct / self.num_samples
        assert self.greedy is not None  # grades without any completion are refused when read
        return self.greedy

    def measured(self, measure: str) -> Floats | None:
        """(S, P) of one of `MEASURES`; None for `pass_at_1` without samples."""
        if measure == "accuracy":
            return self.accuracy
        return self.pass_at_1 if self.num_samples else None

    def pass_at_k(self, k: int) -> Floats:
        """(S, P): chance that one of `k` samples is right; `k` from 1 to `num_samples`."""
        assert self.num_correct is not None
        by_count = pass_at_k(self.num_samples, np.arange(self.num_samples + 1), k)
        return by_count[self.num_correct.astype(np.int64)]


def read_metrics(path: Path) -> Json:
    """A run's summary of one suite. Raises DataError when it is not one."""
    metrics = read_json(path)
    wrong = [key for key in METRIC_KEYS if not isinstance(metrics, dict) or key not in metrics]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)} missing; {_once_more('grade.py')}")
    return dict(metrics)


def answer_codes(extracted: pl.Series) -> pl.Series:
    """A whole number for each answer, the same for the same text; −1 where there is none."""
    return extracted.rank("dense").cast(pl.Int64).fill_null(0) - 1


@contextlib.contextmanager
def reading(path: Path, what: str, script: str) -> Iterator[None]:
    """What goes wrong in the block as a DataError that names the file, and the script to run."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run {script} for it") from error
    except pl.exceptions.PolarsError as error:
        said = first_line(error)
        raise DataError(f"{path}: not {what} ({said}); {_once_more(script)}") from error


def _once_more(script: str) -> str:
    return f"run {script} again, or snakemake with `--forcerun {script.removesuffix('.py')}`"


def reading_grades(path: Path) -> contextlib.AbstractContextManager[None]:
    """`reading` of what `grade.py` writes."""
    return reading(path, "a grades file", "grade.py")


def read_grades(path: Path, with_majority: bool = False) -> pl.DataFrame:
    """Per problem, sorted by it: `greedy` (1 or 0, null without), `num_correct`, `num_samples`.

    `cluster` is null for problems that belong to none.
    `with_majority` adds `maj_at_{k}` for k = 1, 2, 4, … up to the samples that all problems have.
    Raises DataError when the file is missing, is no grades file, or is empty.
    """
    sampled = pl.col("decoding") == "sample"
    names = ["problem_id", "cluster", "decoding", "correct"]
    if with_majority:
        names += ["sample_index", "extracted"]
    with reading_grades(path):
        rows = pl.read_parquet(path, columns=names)
        grades = (
            rows.lazy()
            .group_by("problem_id")
            .agg(
                greedy=pl.col("correct").filter(pl.col("decoding") == "greedy").mean(),
                num_correct=pl.col("correct").filter(sampled).sum().cast(pl.Float64),
                num_samples=sampled.sum(),
                cluster=pl.col("cluster").first(),
            )
            .sort("problem_id")
            .collect()
        )
        samples = rows.filter(sampled).sort("problem_id", "sample_index") if with_majority else None
    if grades.is_empty():
        raise DataError(f"{path}: holds no grades; {_once_more('grade.py')}")
    return grades if samples is None else grades.hstack(_majorities(samples, grades.height))


def clusters_of(problems: pl.DataFrame) -> pl.Series | None:
    """A name for the cluster of each problem, which is its own if of none; None if all are."""
    if problems["cluster"].null_count() == problems.height:
        return None
    names = (pl.lit(f"{name}: ") + pl.col(name) for name in ("cluster", "problem_id"))
    return problems.select(pl.coalesce(*names)).to_series()


def _majorities(samples: pl.DataFrame, num_problems: int) -> list[pl.Series]:
    """`maj_at_{k}` per problem, of samples sorted by problem and number; nothing without samples.

    Nothing as well where problems have not as many each, which `_num_samples` refuses.
    """
    num_samples, rest = divmod(samples.height, num_problems)
    if rest or (samples.group_by("problem_id").len()["len"] != num_samples).any():
        return []
    shape = (num_problems, num_samples)
    answers = answer_codes(samples["extracted"]).to_numpy().reshape(shape)
    correct = samples["correct"].to_numpy().reshape(shape)
    return [
        pl.Series(f"maj_at_{k}", maj_at_k(answers, correct, k)) for k in powers_up_to(num_samples)
    ]


def read_cells(
    study: Comparison,
    study_dir: Path,
    model: str,
    suite: str,
    graded: dict[str, tuple[Path, pl.Series]],
) -> dict[str, Cell]:
    """What every method of the study has on a suite; problems are sorted by id.

    `graded` is filled with the problems of each suite's first run. Raises DataError when a file is
    missing or malformed, and when another run graded other problems.
    """
    return {
        method: _read_cell(study, study_dir, model, method, suite, graded)
        for method in study.methods
    }


def _read_cell(
    study: Comparison,
    study_dir: Path,
    model: str,
    method: str,
    suite: str,
    graded: dict[str, tuple[Path, pl.Series]],
) -> Cell:
    """Read every seed."""
    metrics, stats, facts, tables = [], [], [], []
    for seed in study.seeds_of(method):
        run = run_dir(study_dir, model, method, seed)
        path = run / "grades" / f"{suite}.parquet"
        table = read_grades(path, with_majority=True)
        first_path, first = graded.setdefault(suite, (path, table["problem_id"]))
        _check_same_problems(path, table["problem_id"], first_path, first)
        metrics.append(read_metrics(run / "metrics" / f"{suite}.json"))
        stats.append(read_optional(run / "completions" / f"{suite}.stats.json"))
        tables.append((path, table))
        known = evaluation_facts(stats[-1], metrics[-1])
        known |= training_facts(read_optional(run / "train" / "summary.json"))
        facts.append({**known, **training_settings(read_optional(run / "settings.json"))})
    num_samples = _num_samples(tables)
    return Cell(
        greedy=_stack(tables, "greedy"),
        num_correct=_stack(tables, "num_correct") if num_samples else None,
        num_samples=num_samples,
        maj_at_k={
            k: np.stack([table[f"maj_at_{k}"].to_numpy() for _, table in tables])
            for k in powers_up_to(num_samples)
        },
        metrics=metrics,
        stats=stats,
        facts=facts,
        clusters=clusters_of(tables[0][1]),
    )


def _check_same_problems(
    path: Path, problems: pl.Series, first_path: Path, first: pl.Series
) -> None:
    if problems.equals(first):
        return
    odd = min(set(problems) ^ set(first))
    holder = path if odd in set(problems) else first_path
    raise DataError(
        f"{path} graded {len(problems)} problems, {first_path} {len(first)}, and not the same: "
        f"{odd!r} is only in {holder}; generate and grade both with the same suite"
    )


def _num_samples(tables: Sequence[tuple[Path, pl.DataFrame]]) -> int:
    """Samples per problem. Raises DataError unless it is the same for all problems and runs."""
    first_path, first = tables[0]
    expected = int(first["num_samples"][0])
    for path, table in tables:
        if (table["num_samples"] != expected).any():
            raise DataError(
                f"{path}: not every problem has {expected} samples, as the first of {first_path} "
                "has; generate and grade it again"
            )
    return expected


def _stack(tables: Sequence[tuple[Path, pl.DataFrame]], name: str) -> Floats | None:
    """(S, P) values of one column, or None where no run has it."""
    columns = [table[name] for _, table in tables]
    if all(column.null_count() == len(column) for column in columns):
        return None
    for path, table in tables:
        if table[name].null_count():
            raise DataError(
                f"{path}: greedy completions are missing for some problems that other runs have; "
                "generate and grade it again"
            )
    return np.stack([column.to_numpy() for column in columns])


# -------------------------------------------------------------------------------------------- rows


class Tables(NamedTuple):
    """What `compare.py` writes in full precision."""

    comparison: pl.DataFrame  # of `SCHEMA`
    pass_at_k: pl.DataFrame  # of `PASS_AT_K_SCHEMA`
    pairs: pl.DataFrame  # of `PAIRS_SCHEMA`


def build_comparison(study: Comparison, study_dir: Path) -> Tables:
    """One row per model × method × suite; pass@k and maj@k by k; and every pair of methods.

    `confidence` is the level of every `…_ci_low` and `…_ci_high`, so that tables of several studies
    can be laid together. `accuracy` falls back to the mean over samples in a suite without greedy
    decoding, `pass_at_1` to greedy in one without samples. `pass_at_n` and `maj_at_n` are at the
    largest power of two that is not above the number of samples. `…_by_seed` is what each run has
    by itself, as `0:0.875;1:0.913`: seed, colon, share, semicolons between.

    Differences are paired by seed and problem: `delta_vs_parent` to the method that training
    started from, `delta_vs_base` to the untrained model; null where that is not among the study's
    methods. They are of `accuracy`; `delta_pass_at_1_…` are of `pass_at_1`, null without samples,
    the same where `accuracy` is the mean over samples. `…_holm` is the p-value corrected (Holm
    1979) over all methods and suites of the model, each measure by itself.
    `smallest_detectable_delta` is the difference that a study of this size and spread finds four
    times in five, at the uncorrected level.

    `pairs` has every two methods of a model on a suite: `delta` is the accuracy of `method`, the
    one that the study names later, minus that of `other`. `family` says over what `p_value_holm` is
    corrected: `parent` or `base` where the comparison tests the pair, whose p-value it is; the
    rest is one family of the model, `others`, over all suites.

    Costs are means over seeds, null where unknown. `train_seconds` is the method's own stage
    with what it sampled and without validation, null where nothing is trained; `…_with_parents`
    adds the stages before it. `flags` says what makes a row's comparison doubtful (see
    `gsm8k_core.differences`).

    Raises DataError when a file is missing or malformed and when two runs of a suite graded
    different problems.
    """
    rows: list[Json] = []
    curves: list[Json] = []
    pairs: list[Json] = []
    graded: dict[str, tuple[Path, pl.Series]] = {}
    for model in study.models:
        costs = {
            method: _training_cost(study, study_dir, model, method) for method in study.methods
        }
        for suite in study.suites:
            cells = read_cells(study, study_dir, model, suite, graded)
            where = {
                "study": study.name,
                "model": model,
                "suite": suite,
                "confidence": study.confidence,
            }
            pairs += [where | pair for pair in compare_pairs(cells, study.confidence)]
            for method in study.methods:
                identity = where | {"method": method}
                row = _quality(study, method, cells) | _generation_cost(cells[method])
                rows.append(identity | row | costs[method])
                curves += [identity | point for point in _curve(study, cells[method])]
        of_model = [row for row in rows if row["model"] == model]
        _correct_for_multiplicity(of_model)
        correct_pairs([pair for pair in pairs if pair["model"] == model], of_model)
    return Tables(
        _in_order(pl.DataFrame(rows, schema=SCHEMA), study),
        _in_order(pl.DataFrame(curves, schema=PASS_AT_K_SCHEMA), study),
        pl.DataFrame(pairs, schema=PAIRS_SCHEMA).fill_nan(None),
    )


def _in_order(frame: pl.DataFrame, study: Comparison) -> pl.DataFrame:
    order = {"model": study.models, "method": study.methods, "suite": study.suites}
    keys = [
        pl.col(name).replace_strict(names, range(len(names)), return_dtype=pl.Int64)
        for name, names in order.items()
    ]
    return frame.sort(keys, maintain_order=True)


def _quality(study: Comparison, method: str, cells: dict[str, Cell]) -> Json:
    cell, parent, base = cells[method], study.parent_of(method), study.chains[method][0]
    flags = [flag_text("seeds", inconsistent(cell.facts)), _few_seeds(method, cell, base)]
    flags += _doubts(cell)
    row: Json = {
        "num_seeds": cell.accuracy.shape[0],
        "num_problems": cell.accuracy.shape[1],
        "num_clusters": None if cell.clusters is None else cell.clusters.n_unique(),
        "num_samples": cell.num_samples,
        **_with_bounds("accuracy", cell.accuracy, study.confidence, cell.clusters),
        "accuracy_by_seed": _by_seed(cell.accuracy, study.seeds_of(method)),
        "parent": parent,
        "base": None if method == base else base,
        **_with_bounds("pass_at_1", cell.pass_at_1, study.confidence, cell.clusters),
        "pass_at_1_by_seed": _by_seed(cell.pass_at_1, study.seeds_of(method)),
        **_at_largest_k(cell, study.confidence),
        **{key: _mean_of([one[key] for one in cell.metrics]) for key in MEANS_OVER_SEEDS},
    }
    for kind, other, suffix in (("parent", parent, ""), ("base", row["base"], "_vs_base")):
        compared_with = other if other in cells else None
        if compared_with is not None and (kind == "parent" or other != parent):
            against = cells[compared_with].facts
            flags.append(flag_text(kind, _comparable(differing(cell.facts, against))))
        for measure, of in MEASURES.items():
            found = None
            if compared_with is not None:
                found = difference(cell, cells[compared_with], study.confidence, measure)
            row |= {
                f"delta{of}_vs_{kind}": found and found.delta,
                f"delta{of}_vs_{kind}_ci_low": found and found.low,
                f"delta{of}_vs_{kind}_ci_high": found and found.high,
                f"p_value{of}_vs_{kind}": found and found.p_value,
                f"smallest_detectable_delta{of}{suffix}": found and found.smallest_detectable,
            }
    return row | {"flags": "; ".join(filter(None, flags)) or None}


def _at_largest_k(cell: Cell, confidence: float) -> Json:
    """pass@n and maj@n with their intervals, n being the largest power of two; null without."""
    if not cell.maj_at_k:
        return {}
    largest = max(cell.maj_at_k)
    found = {"pass_at_n": cell.pass_at_k(largest), "maj_at_n": cell.maj_at_k[largest]}
    row: Json = {}
    for name, values in found.items():
        row |= _with_bounds(name, values, confidence, cell.clusters)
    return row


def _with_bounds(name: str, values: Floats, confidence: float, clusters: pl.Series | None) -> Json:
    """Mean of `values (S, P)` and its interval over seeds and problems, as columns of a row."""
    mean, low, high = mean_interval(values, confidence, clusters)
    return {name: mean, f"{name}_ci_low": low, f"{name}_ci_high": high}


def _by_seed(values: Floats, seeds: Sequence[int]) -> str:
    """The mean of each row of `values (S, P)` behind its seed."""
    return ";".join(
        f"{seed}:{share}" for seed, share in zip(seeds, values.mean(axis=1), strict=True)
    )


def _few_seeds(method: str, cell: Cell, base: str) -> str:
    """How few runs an interval stands on; the base model is no draw of training."""
    num_seeds = len(cell.metrics)
    if method == base or num_seeds > 2:
        return ""
    return "1 seed: problems only" if num_seeds == 1 else "2 seeds"


def _doubts(cell: Cell) -> list[str]:
    """`prompts cut: 93 %` and the like: shares of problems or completions, means over seeds."""
    num_problems = cell.accuracy.shape[1]
    num_completions = num_problems * (cell.num_samples + (cell.greedy is not None))
    found: dict[str, list[float]] = {name: [] for name in DOUBTS}
    for metrics in cell.metrics:
        found[PROMPTS_CUT].append((metrics["num_prompts_truncated"] or 0) / num_problems)
        # A flexible grade does not read the number that is contradicted.
        reads_it = metrics["grading"] in ("strict", "lm_eval_strict")
        found[CONTRADICTED].append(metrics["contradicted_fraction"] if reads_it else 0.0)
        killed = metrics["math_verify_killed"] if metrics["grading"] == "math_verify" else 0
        found[KILLED].append(killed / num_completions)
    shares = {name: np.mean(of_runs) for name, of_runs in found.items()}
    return [
        f"{name}: {100 * share:.3g} %"
        for name, share in shares.items()
        if share > 0 and share >= LEAST_TOLD[name]
    ]


def _comparable(names: list[str]) -> list[str]:
    # Methods are meant to be trained differently.
    return [name for name in names if name != "training settings"]


def difference(a: Cell, b: Cell, confidence: float, measure: str = "accuracy") -> Difference | None:
    """`a` minus `b`, paired by seed and problem; one that was run once stands for every seed.

    None for pass@1 where one of them has no samples.
    """
    left, right = a.measured(measure), b.measured(measure)
    if left is None or right is None:
        return None
    return paired_difference(left, right, confidence, a.clusters)


def _correct_for_multiplicity(rows: list[Json]) -> None:
    """Add Holm's p-values of one model's rows: one family for the parents, one for the base.

    A method whose parent is the base is tested once, among the parents. Each measure has families
    of its own: which of them is the question is to be decided before.
    """
    apart = [row for row in rows if row["base"] != row["parent"]]
    for of in MEASURES.values():
        for kind, family in (("parent", rows), ("base", apart)):
            adjusted = holm([row[f"p_value{of}_vs_{kind}"] for row in family])
            for row, p_value in zip(family, adjusted, strict=True):
                row[f"p_value{of}_vs_{kind}_holm"] = p_value
        for row in rows:
            row.setdefault(f"p_value{of}_vs_base_holm", row[f"p_value{of}_vs_parent_holm"])


def compare_pairs(cells: dict[str, Cell], confidence: float) -> list[Json]:
    """Every two methods on a suite: accuracy of the later one minus that of the earlier one."""
    methods = list(cells)
    numbers: dict[tuple[str, str], list[float]] = {}
    for place, other in enumerate(methods):
        before, later = cells[other].accuracy, methods[place + 1 :]
        # Together they take a sixth of the time; what was run once has another shape.
        for num_seeds in {len(cells[method].accuracy) for method in later}:
            alike = [method for method in later if len(cells[method].accuracy) == num_seeds]
            after = np.stack([cells[method].accuracy for method in alike])
            found = paired_differences(
                after, np.stack([before] * len(alike)), confidence, cells[other].clusters
            )
            for method, row in zip(alike, found.tolist(), strict=True):
                numbers[method, other] = row
    columns = ("delta", "delta_ci_low", "delta_ci_high", "p_value", "smallest_detectable_delta")
    return [
        {"method": method, "other": other} | dict(zip(columns, numbers[method, other], strict=True))
        for other, method in itertools.combinations(methods, 2)
    ]


def correct_pairs(pairs: list[Json], rows: list[Json]) -> None:
    """Add Holm's p-values of one model's pairs, and the family that each was corrected in.

    A pair that the comparison's `rows` test keeps its p-value from there: tables and report are to
    say one thing of it. Which of the others comes first, and on which suite, is known from the same
    answers: so they are one family, whichever of them a reader asks for.
    """
    by_cell = {(row["suite"], row["method"]): row for row in rows}
    others = []
    for pair in pairs:
        row, other = (by_cell[pair["suite"], pair[name]] for name in ("method", "other"))
        pair["family"], pair["p_value_holm"] = _tested(row, other)
        if pair["p_value_holm"] is None:
            others.append(pair)
    for pair, p_value in zip(others, holm([pair["p_value"] for pair in others]), strict=True):
        pair["p_value_holm"] = p_value


def _tested(a: Json, b: Json) -> tuple[str, float | None]:
    """Family and corrected p-value where the comparison tests one row against the other."""
    for row, other in ((a, b), (b, a)):
        for reference in ("parent", "base"):
            p_value = row[f"p_value_vs_{reference}_holm"]
            if row[reference] == other["method"] and p_value is not None:
                return reference, p_value
    return OTHER_PAIRS, None


def _curve(study: Comparison, cell: Cell) -> list[Json]:
    """A row for every k; maj@k is null where k is no power of two."""
    curve = []
    for k in range(1, cell.num_samples + 1):
        point = {"num_samples": cell.num_samples, "k": k}
        point |= _with_bounds("pass_at_k", cell.pass_at_k(k), study.confidence, cell.clusters)
        if k in cell.maj_at_k:
            point |= _with_bounds("maj_at_k", cell.maj_at_k[k], study.confidence, cell.clusters)
        curve.append(point)
    return curve


# -------------------------------------------------------------------------------------------- cost


def _training_cost(study: Comparison, study_dir: Path, model: str, method: str) -> Json:
    """Seconds, tokens and memory of a method's own stage, and with those before it."""
    stages = study.chains[method][1:]  # the first is the base model, which nothing trains
    summaries = {
        stage: [
            read_json(run_dir(study_dir, model, stage, seed) / "train" / "summary.json")
            for seed in study.seeds
        ]
        for stage in stages
    }

    def of(stage: str, value: Callable[[Json], float | None]) -> float | None:
        return _mean_of([value(summary) for summary in summaries.get(stage, [])])

    def with_parents(value: Callable[[Json], float | None]) -> float | None:
        found = [of(stage, value) for stage in stages]
        return None if None in found else float(sum(v for v in found if v is not None))

    return {
        "train_seconds": of(method, _seconds_training),
        "train_seconds_with_parents": with_parents(_seconds_training),
        "gpu_seconds_training": of(method, _gpu_seconds_training),
        "gpu_seconds_training_with_parents": with_parents(_gpu_seconds_training),
        "num_train_tokens": of(method, lambda summary: summary.get("num_tokens")),
        "num_train_tokens_with_parents": with_parents(lambda summary: summary.get("num_tokens")),
        "num_sampled_tokens": of(method, lambda summary: summary.get("num_sampled_tokens")),
        "peak_memory_mb_training": of(method, lambda summary: summary.get("peak_memory_mb")),
    }


def read_training_logs(
    study: Comparison, study_dir: Path, model: str
) -> dict[str, list[list[Json]]]:
    """Method → rows of train/metrics.jsonl, a list for each seed; without the base model."""
    return {
        method: [
            read_jsonl(run_dir(study_dir, model, method, seed) / "train" / "metrics.jsonl")
            for seed in study.seeds_of(method)
        ]
        for method in study.methods
        if len(study.chains[method]) > 1
    }


def _generation_cost(cell: Cell) -> Json:
    known = [{**one, **stats} for one, stats in zip(cell.metrics, cell.stats, strict=True)]
    gpu_seconds = [_times(num_gpus(one), one.get("seconds_generating")) for one in known]
    return {
        "generate_seconds": _mean_of([one.get("seconds_generating") for one in known]),
        "gpu_seconds_generating": _mean_of(gpu_seconds),
        "num_generated_tokens": _mean_of([one.get("num_completion_tokens") for one in known]),
        "peak_memory_mb_generating": _mean_of([one.get("peak_memory_mb") for one in known]),
    }


def _seconds_training(summary: Json) -> float | None:
    return summary.get("seconds_training")


def _gpu_seconds_training(summary: Json) -> float | None:
    number, seconds = num_gpus(summary), _seconds_training(summary)
    if not number or seconds is None:
        return _times(number, seconds)
    # A round's or DPO's completions were sampled before, by a job with GPUs of its own.
    sampling = summary.get("seconds_sampling", 0.0)
    return number * (seconds - sampling) + summary.get("gpu_seconds_sampling", sampling)


def _times(number: int | None, seconds: float | None) -> float | None:
    return None if number is None or seconds is None else number * seconds


def _mean_of(values: Sequence[float | None]) -> float | None:
    """Mean over runs; None unless every run has a value."""
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


# ------------------------------------------------------------------------------------------ writing


def write_comparison(tables: Tables, output_dir: Path) -> list[Path]:
    """Write comparison.csv and .parquet (full precision), .md and .html (to be read).

    pass_at_k.csv has a row for every k, with pass@k and, where k is a power of two, maj@k;
    pairs.csv one for every two methods of a model on a suite. Returns all files.
    """
    frame, parquet = tables.comparison, output_dir / "comparison.parquet"
    texts = {
        output_dir / "comparison.csv": frame.write_csv(),
        output_dir / "comparison.html": to_html(frame),
        output_dir / "comparison.md": to_markdown(frame),
        output_dir / "pairs.csv": tables.pairs.write_csv(),
        output_dir / "pass_at_k.csv": tables.pass_at_k.write_csv(),
    }
    for path, text in texts.items():
        write_text(path, text)
    with atomic_path(parquet) as temporary:
        frame.write_parquet(temporary)
    return sorted([*texts, parquet])


def read_comparison(path: Path) -> pl.DataFrame:
    """Read comparison.parquet or comparison.csv. Raises DataError when it is neither."""
    with reading(path, "a comparison", "compare.py"):
        if path.suffix == ".csv":
            return pl.read_csv(path, schema=SCHEMA)
        return pl.read_parquet(path, columns=list(SCHEMA))


def rows_of(study: Comparison, comparison: pl.DataFrame, model: str, suite: str) -> list[Json]:
    """A model's rows of a suite, one for each method, in the study's order.

    Raises DataError where the comparison has others.
    """
    here = comparison.filter((pl.col("model") == model) & (pl.col("suite") == suite))
    rows = {row["method"]: row for row in here.iter_rows(named=True)}
    missing = [method for method in study.methods if method not in rows]
    if missing or here.height != len(rows):
        raise DataError(
            f"the comparison has not one row each for {model} on {suite} with "
            f"{', '.join(missing or study.methods)}: it belongs to another study; run compare.py "
            "again"
        )
    return [rows[method] for method in study.methods]


def read_pass_at_k(path: Path) -> pl.DataFrame:
    """Read pass_at_k.csv. Raises DataError where it is missing, or no such table."""
    with reading(path, "pass@k by model, suite and method", "compare.py"):
        return pl.read_csv(path, schema=PASS_AT_K_SCHEMA)


def read_pairs(path: Path) -> pl.DataFrame:
    """Read pairs.csv. Raises DataError where it is missing, or no such table."""
    with reading(path, "differences of pairs of methods", "compare.py"):
        return pl.read_csv(path, schema=PAIRS_SCHEMA)


@dataclass(frozen=True)
class TextTable:
    """A table to be read: a title, and rows of texts below a header."""

    title: str
    header: list[str]
    rows: list[list[str]]


# The others are numbers.
TEXT_COLUMNS = {
    "model", "suite", "method", "parent", "verdict", "flags",
    "accuracy % by seed", "pass@1 % by seed",
}  # fmt: skip


def to_markdown(frame: pl.DataFrame) -> str:
    """The tables for people: percent with intervals, points, times in plain units."""
    parts = [f"### {table.title}\n\n{markdown_table(table)}" for table in _text_tables(frame)]
    notes = "\n".join(f"- {note}" for note in notes_on(frame))
    return f"## {frame['study'][0]}: comparison\n\n" + "\n".join(parts) + f"\n{notes}\n"


def markdown_table(table: TextTable) -> str:
    """Aligned, with numbers to the right; a `|` in a cell is escaped."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]
    left = [name in TEXT_COLUMNS for name in table.header]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for is_left, cell, width in zip(left, cells, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":"
        for is_left, width in zip(left, widths, strict=True)
    ]
    return "\n".join([line(table.header), f"|{'|'.join(rule)}|", *map(line, rows)]) + "\n"


def _text_tables(frame: pl.DataFrame) -> list[TextTable]:
    # What is to be compared, the methods of one model and suite, stands together.
    parts = frame.partition_by("model", "suite", maintain_order=True)
    rows = [row for part in parts for row in part.iter_rows(named=True)]
    sampled = [row for row in rows if row["num_samples"]]
    repeated = rows if any(row["num_seeds"] > 1 for row in rows) else []
    tables = []
    for title, shown, rows_of in (
        ("Quality", QUALITY_COLUMNS, rows),
        ("Differences of pass@1", PASS_AT_1_COLUMNS, compared_by_pass_at_1(rows)),
        ("Repeated sampling", SAMPLING_COLUMNS, sampled),
        ("Single seeds", SEED_COLUMNS, repeated),
        ("Cost", COST_COLUMNS, rows),
    ):
        texts = [[render(row) for render in shown.values()] for row in rows_of]
        if texts:
            tables.append(TextTable(title, list(shown), texts))
    return tables


def compared_by_pass_at_1(rows: Sequence[Json]) -> list[Json]:
    """Rows with a difference of pass@1; none where it is that of accuracy in all of them."""
    names = ("delta_pass_at_1_vs_parent", "delta_pass_at_1_vs_base")
    compared = [row for row in rows if any(row[name] is not None for name in names)]
    shown = ("_by_seed", "_ci_low", "_ci_high")
    differs = any(row[f"accuracy{of}"] != row[f"pass_at_1{of}"] for row in compared for of in shown)
    return compared if differs else []


def notes_on(frame: pl.DataFrame) -> list[str]:
    """What the columns mean, and every flag that the table holds."""
    level = level_text(frame["confidence"][0])
    # What the intervals take as random.
    over = "problems alone" if frame["num_seeds"].max() == 1 else "seeds and problems"
    notes = [
        "Accuracy is greedy where the suite decodes greedily, else the mean over samples. "
        f"Brackets are {level} intervals over {over}, each for itself: unlike p they are not "
        "corrected for their number.",
        "flexible: the last number counts, wherever it stands. format: the answer stands where the "
        "prompt asked for it. Where accuracy grows with format and flexible does not, read "
        "completions: format alone may have been learnt, or the model writes on after its answer. "
        "These, lengths and truncation are of the greedy completions where there are any.",
        "Differences are in points, paired by seed and problem. p is corrected (Holm) over all "
        "methods and suites of a model, one family for parents and one for a base that is none.",
        "detectable: the smallest difference to the parent that this many problems and seeds would "
        "have found four times in five, before correction.",
        "with parents: own training and that of the stages before it. Times, tokens and memory are "
        "means over seeds; times of training are without validation.",
    ]
    if frame["method"].n_unique() > 2:
        notes.append(
            "pairs.csv compares every two methods. p of those that are not compared here is "
            "corrected (Holm) over all such pairs on all suites of a model."
        )
    notes += notes_on_clusters(frame.iter_rows(named=True))
    if frame["gpu_seconds_training"].max():
        notes.append(
            "peak memory on a GPU is what torch had allocated: vLLM's cache too, while it sleeps."
        )
    if frame["num_samples"].max():
        notes.append(
            "pass@n: one of n samples is right. maj@n: the most frequent answer of n samples is. "
            "n is the largest power of two among the samples; pass_at_k.csv has the others."
        )
    if compared_by_pass_at_1(frame.to_dicts()):
        notes.append(PASS_AT_1_NOTE)
    if (frame["num_seeds"] > 1).any():
        notes.append(
            "by seed: the seed and what its run has by itself; comparison.csv has these shares in "
            "full."
        )
    words: list[str] = []
    for flags in frame["flags"].drop_nulls().to_list():
        for flag in flags.split("; "):
            against, _, names = flag.partition(": ")
            words += names.split(", ") if against in ("seeds", "parent", "base") else [against]
    explained = {
        "1 seed": "the interval is of problems alone; another training run may differ by more",
        "2 seeds": "too few to tell seeds from problems well; false positives reach 7 % at 5 %",
        **DOUBTS,
    }
    notes += [
        f"flag “{word}”: {explained[word] if word in explained else meaning(word)}."
        for word in dict.fromkeys(words)
    ]
    return notes


def notes_on_clusters(rows: Iterable[Json]) -> list[str]:
    """How many clusters the problems of each suite are in; nothing where every problem is its own.

    `rows` have `suite`, `num_problems` and `num_clusters`, as those of the comparison.
    """
    texts: list[str] = []
    for row in rows:
        sizes = row["num_problems"], row["num_clusters"]
        if has_clusters(*sizes):
            texts.append(f"{row['suite']}: {problems_text(*sizes)}")
    if not texts:
        return []
    return [
        f"{'; '.join(dict.fromkeys(texts))}. Problems of one cluster are made from one template or "
        "one set of numbers, so intervals and tests take clusters, not problems, as independent "
        "draws."
    ]


def has_clusters(num_problems: int, num_clusters: int | None) -> bool:
    """Whether problems share clusters; None where no problem is of any."""
    return num_clusters is not None and num_clusters != num_problems


def problems_text(num_problems: int, num_clusters: int | None) -> str:
    """`500 problems in 81 clusters`, or `500 problems` where each is its own."""
    problems = counted(num_problems, "problem")
    if num_clusters is None or not has_clusters(num_problems, num_clusters):
        return problems
    return f"{problems} in {counted(num_clusters, 'cluster')}"


def level_text(confidence: float) -> str:
    """`95 %`, `99.5 %`."""
    return f"{100 * confidence:g} %"


def counted(number: int, noun: str) -> str:
    """`1 problem`, `1,319 problems`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def p_text(p_value: float | None) -> str:
    """To three digits, `<0.001` below them; nothing for None."""
    return "" if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def percent(value: float | None, form: str = ".1f") -> str:
    """A share in per cent, to one digit and without a negative zero; nothing for None."""
    return "" if value is None else f"{round(100 * value, 1) + 0.0:{form}}"


def points(value: float | None) -> str:
    """A difference of shares in points: `+2.5`, or `−2.5` with a minus sign."""
    return percent(value, "+.1f").replace("-", "\N{MINUS SIGN}")


def detectable(value: float | None) -> str:
    """The smallest detectable difference in points."""
    return ">100" if value is not None and value > 1 else percent(value)


def bounds(low: float, high: float, text: Callable[[float], str] = percent) -> str:
    """`[30.0, 50.0]`."""
    return f"[{text(low)}, {text(high)}]"


def with_interval(row: Json, name: str, text: Callable[[float], str] = percent) -> str:
    """`40.0 [30.0, 50.0]` of a share and its bounds; nothing where it is null."""
    if row[name] is None:
        return ""
    return f"{text(row[name])} {bounds(row[f'{name}_ci_low'], row[f'{name}_ci_high'], text)}"


def _seeds_text(by_seed: str | None) -> str:
    """`0: 87.5, 1: 91.3` of a column `…_by_seed`."""
    pairs = [pair.split(":") for pair in by_seed.split(";")] if by_seed else []
    return ", ".join(f"{seed}: {percent(float(share))}" for seed, share in pairs)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit of an axis that reaches to `seconds`, and how many of them it has."""
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 10800 else ("hours", 3600.0)


def are_far_apart(costs: Sequence[float]) -> bool:
    """Whether costs, none of them 0, are to stand on a logarithm."""
    return bool(costs) and max(costs) > 10 * min(costs)


# What people count time in, from a second to a hundred days.
ROUND_TIMES = (
    1, 3, 10, 30, 60, 180, 600, 1800, 3600, 3 * 3600, 10 * 3600, 24 * 3600, 72 * 3600,
    240 * 3600, 720 * 3600, 2400 * 3600,
)  # fmt: skip


def round_times(low: float, high: float) -> list[float]:
    """Ticks of a logarithm of times, in seconds."""
    return [time for time in ROUND_TIMES if low / 1.6 <= time <= high * 1.6] or [low, high]


def short_time(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def all_on_gpus(rows: Iterable[Json]) -> bool:
    """Whether all that trains has GPU time: on its axis, what has none would seem to cost nothing.

    `rows` are of a comparison.
    """
    gpu_time, time = "gpu_seconds_training_with_parents", "train_seconds_with_parents"
    return all(row[gpu_time] for row in rows if row[gpu_time] or row[time])


def _count(number: float | None) -> str:
    if number is None:
        return ""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _memory(megabytes: float | None) -> str:
    return "" if megabytes is None else f"{megabytes / 1024:.1f} GiB"


IDENTITY_COLUMNS: dict[str, Callable[[Json], str]] = {
    "model": lambda row: row["model"],
    "suite": lambda row: row["suite"],
    "method": lambda row: row["method"],
}


def _differences(of: str) -> dict[str, Callable[[Json], str]]:
    """Columns on one of `MEASURES`, by what the names of its columns have for it."""
    return {
        "parent": lambda row: row["parent"] or "",
        "vs parent, points": lambda row: with_interval(row, f"delta{of}_vs_parent", points),
        "p parent": lambda row: p_text(row[f"p_value{of}_vs_parent_holm"]),
        "detectable": lambda row: detectable(row[f"smallest_detectable_delta{of}"]),
        "vs base, points": lambda row: with_interval(row, f"delta{of}_vs_base", points),
        "p base": lambda row: p_text(row[f"p_value{of}_vs_base_holm"]),
    }


QUALITY_COLUMNS: dict[str, Callable[[Json], str]] = {
    **IDENTITY_COLUMNS,
    "seeds": lambda row: str(row["num_seeds"]),
    "problems": lambda row: str(row["num_problems"]),
    "accuracy %": lambda row: with_interval(row, "accuracy"),
    "flexible %": lambda row: percent(row["accuracy_flexible"]),
    "format %": lambda row: percent(row["format_fraction"]),
    **_differences(MEASURES["accuracy"]),
    "pass@1 %": lambda row: with_interval(row, "pass_at_1") if row["num_samples"] else "",
    "flags": lambda row: row["flags"] or "",
}
PASS_AT_1_COLUMNS: dict[str, Callable[[Json], str]] = {
    **IDENTITY_COLUMNS,
    "samples": lambda row: str(row["num_samples"]),
    "pass@1 %": lambda row: percent(row["pass_at_1"]),
    **_differences(MEASURES["pass_at_1"]),
}
SAMPLING_COLUMNS: dict[str, Callable[[Json], str]] = {
    **IDENTITY_COLUMNS,
    "samples": lambda row: str(row["num_samples"]),
    "n": lambda row: str(powers_up_to(row["num_samples"])[-1]),
    "pass@1 %": lambda row: with_interval(row, "pass_at_1"),
    "pass@n %": lambda row: with_interval(row, "pass_at_n"),
    "maj@n %": lambda row: with_interval(row, "maj_at_n"),
}
SEED_COLUMNS: dict[str, Callable[[Json], str]] = {
    **IDENTITY_COLUMNS,
    "accuracy % by seed": lambda row: _seeds_text(row["accuracy_by_seed"]),
    "pass@1 % by seed": lambda row: (
        _seeds_text(row["pass_at_1_by_seed"]) if row["num_samples"] else ""
    ),
}
COST_COLUMNS: dict[str, Callable[[Json], str]] = {
    **IDENTITY_COLUMNS,
    "accuracy %": lambda row: percent(row["accuracy"]),
    "training": lambda row: _duration(row["train_seconds"]),
    "with parents": lambda row: _duration(row["train_seconds_with_parents"] or None),
    "GPU with parents": lambda row: _duration(row["gpu_seconds_training_with_parents"] or None),
    "tokens trained": lambda row: _count(row["num_train_tokens"]),
    "sampled for it": lambda row: _count(row["num_sampled_tokens"]),
    "peak memory": lambda row: _memory(row["peak_memory_mb_training"]),
    "generating": lambda row: _duration(row["generate_seconds"]),
    "tokens generated": lambda row: _count(row["num_generated_tokens"]),
    "peak generating": lambda row: _memory(row["peak_memory_mb_generating"]),
    "tokens a completion": lambda row: (
        "" if row["mean_completion_tokens"] is None else f"{row['mean_completion_tokens']:.0f}"
    ),
    "truncated %": lambda row: percent(row["truncated_fraction"]),
}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 13px/1.4 system-ui, sans-serif; margin: 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .4rem; border-bottom: 1px solid #8886; vertical-align: top; }}
th {{ text-align: left; }}
thead th {{ border-bottom-width: 2px; vertical-align: bottom; }}
td, td span {{ white-space: nowrap; }}
.number {{ text-align: right; }}
.interval, .text {{ white-space: normal; }}
.text {{ min-width: 8rem; }}
.name {{ white-space: normal; overflow-wrap: anywhere; min-width: 4rem; }}
/* The method stays in sight where a table is wider than the screen. */
[scope="row"] {{ position: sticky; left: 0; background: Canvas; font-weight: normal; }}
[scope="rowgroup"] {{ padding-top: .8rem; }}
</style>
<h1>{title}</h1>
{tables}
<ul>
{notes}
</ul>
</html>
"""


def to_html(frame: pl.DataFrame) -> str:
    """The same tables as one static page without scripts, light or dark as the reader's screen."""
    tables = "\n".join(_html_table(table) for table in _text_tables(frame))
    notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes_on(frame))
    title = html.escape(f"{frame['study'][0]}: comparison")
    return PAGE.format(title=title, tables=tables, notes=notes)


HTML_CLASSES = {
    "method": "name",
    "parent": "name",
    "flags": "text",
    "accuracy % by seed": "text",
    "pass@1 % by seed": "text",
}


def _html_table(table: TextTable) -> str:
    """Model and suite, the first two columns, stand above their rows: that leaves room."""
    header = table.header[2:]
    classes = [HTML_CLASSES.get(name, "number") for name in header]
    columns = "".join(
        f'<th scope="col" class="{of}">{html.escape(name)}</th>'
        for of, name in zip(classes, header, strict=True)
    )
    groups: dict[tuple[str, str], list[str]] = {}
    for model, suite, method, *cells in table.rows:
        inner = "".join(_html_cell(cell, of) for cell, of in zip(cells, classes[1:], strict=True))
        row = f'<tr><th scope="row" class="name">{html.escape(method)}</th>{inner}</tr>'
        groups.setdefault((model, suite), []).append(row)
    bodies = [
        f'<tbody>\n<tr><th scope="rowgroup" colspan="{len(header)}">'
        f"{html.escape(f'{model} on {suite}')}</th></tr>\n" + "\n".join(rows) + "\n</tbody>\n"
        for (model, suite), rows in groups.items()
    ]
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table>\n'
        f"<thead><tr>{columns}</tr></thead>\n{''.join(bodies)}</table></div>"
    )


def _html_cell(text: str, css_class: str) -> str:
    """A cell of that class; the line may be broken before an interval."""
    value, bracket, rest = html.escape(text).partition(" [")
    if css_class != "number" or not bracket:
        return f'<td class="{css_class}">{html.escape(text)}</td>'
    return f'<td class="number interval">{value} <span>[{rest}</span></td>'
