"""The comparison: grades and summaries of many runs become one table.

One row per model × method × suite, in the order of the study. Shapes: `S` seeds, `P` problems.

A study folder holds `{model}/{method}/seed{n}/` with `metrics/{suite}.json`,
`grades/{suite}.parquet` and, for what was trained, `train/summary.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, atomic_path, read_json, write_text
from gsm8k_core.metrics import Difference, Floats, mean_interval, paired_difference

Decoding = Literal["greedy", "sample"]


class Study(TypedDict):
    """What a comparison needs to know of a study; `chains` go from the base model to the method."""

    name: str
    models: list[str]
    methods: list[str]
    suites: list[str]
    seeds_of: dict[str, list[int]]
    parent_of: dict[str, str | None]
    chains: dict[str, list[str]]
    confidence: float


SCHEMA: dict[str, Any] = {
    "model": pl.String,
    "method": pl.String,
    "suite": pl.String,
    "num_seeds": pl.Int64,
    "num_problems": pl.Int64,
    "num_samples": pl.Int64,
    "accuracy": pl.Float64,
    "accuracy_ci_low": pl.Float64,
    "accuracy_ci_high": pl.Float64,
    "parent": pl.String,
    "delta_vs_parent": pl.Float64,
    "delta_vs_parent_ci_low": pl.Float64,
    "delta_vs_parent_ci_high": pl.Float64,
    "p_value_vs_parent": pl.Float64,
    "pass_at_1": pl.Float64,
    "pass_at_1_ci_low": pl.Float64,
    "pass_at_1_ci_high": pl.Float64,
    "pass_at_n": pl.Float64,
    "maj_at_n": pl.Float64,
    "format_fraction": pl.Float64,
    "mean_completion_tokens": pl.Float64,
    "truncated_fraction": pl.Float64,
    "train_seconds": pl.Float64,
    "train_seconds_with_parents": pl.Float64,
    "generate_seconds": pl.Float64,
    "num_train_tokens": pl.Float64,
}


METRIC_KEYS = (
    "accuracy",
    "pass_at_1",
    "num_samples",
    "pass_at_k",
    "maj_at_k",
    "format_fraction",
    "mean_completion_tokens",
    "truncated_fraction",
    "seconds_generating",
)


def run_dir(study_dir: Path, model: str, method: str, seed: int) -> Path:
    """The folder of one run."""
    return study_dir / model / method / f"seed{seed}"


@dataclass(frozen=True)
class Cell:
    """The runs of one model × method × suite."""

    greedy: Floats | None  # (S, P), 1 where right
    samples: Floats | None  # (S, P), share of samples that are right
    num_samples: int
    metrics: list[Json]

    @property
    def accuracy(self) -> Floats:
        """(S, P): greedy where the suite decodes greedily, else the share of right samples."""
        values = self.samples if self.greedy is None else self.greedy
        assert values is not None  # grades without any completion are refused when read
        return values

    @property
    def pass_at_1(self) -> Floats:
        """(S, P): the share of right samples, or greedy where the suite draws none."""
        return self.accuracy if self.samples is None else self.samples


def build_comparison(study: Study, study_dir: Path) -> pl.DataFrame:
    """One row per model × method × suite; columns are those of `SCHEMA`.

    `accuracy` falls back to the mean over samples in a suite without greedy decoding, `pass_at_1`
    to greedy in one without samples. `pass_at_n` and `maj_at_n` are at the largest k of the
    metrics. `delta_vs_parent` is of `accuracy`, paired by seed and problem, and null where the
    parent is not among the study's methods. `train_seconds` is the method's own stage, mean over
    seeds, null where nothing is trained; `train_seconds_with_parents` adds the stages before it.

    Raises DataError when a file is missing or malformed and when two runs of a suite graded
    different problems.
    """
    rows = []
    graded: dict[str, tuple[Path, list[str]]] = {}
    for model in study["models"]:
        for suite in study["suites"]:
            cells = {
                method: _read_cell(study, study_dir, model, method, suite, graded)
                for method in study["methods"]
            }
            rows += [
                _row(study, study_dir, model, method, suite, cells) for method in study["methods"]
            ]
    frame = pl.DataFrame(rows, schema=SCHEMA)
    order = [study["models"], study["methods"], study["suites"]]
    keys = [
        pl.col(name).replace_strict(names, range(len(names)), return_dtype=pl.Int64)
        for name, names in zip(("model", "method", "suite"), order, strict=True)
    ]
    return frame.sort(keys)


def _read_cell(
    study: Study,
    study_dir: Path,
    model: str,
    method: str,
    suite: str,
    graded: dict[str, tuple[Path, list[str]]],
) -> Cell:
    """Read every seed; `graded` remembers the problems of each suite's first run."""
    metrics, tables = [], []
    for seed in study["seeds_of"][method]:
        run = run_dir(study_dir, model, method, seed)
        path = run / "grades" / f"{suite}.parquet"
        table = read_grades(path)
        first_path, first = graded.setdefault(suite, (path, table["problem_id"].to_list()))
        _check_same_problems(path, table["problem_id"].to_list(), first_path, first)
        metrics.append(read_metrics(run / "metrics" / f"{suite}.json"))
        tables.append((path, table))
    return Cell(
        greedy=_stack(tables, "greedy"),
        samples=_stack(tables, "sample"),
        num_samples=int(tables[0][1]["num_samples"].max()),  # type: ignore[arg-type]
        metrics=metrics,
    )


def read_metrics(path: Path) -> Json:
    """A run's summary of one suite. Raises DataError when it is not one."""
    metrics = read_json(path)
    wrong = [key for key in METRIC_KEYS if not isinstance(metrics, dict) or key not in metrics]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)} missing; run grade.py again")
    return dict(metrics)


def read_grades(path: Path) -> pl.DataFrame:
    """Per problem, sorted by it: `greedy` and `sample` (share right, null without), `num_samples`.

    Raises DataError when the file is missing, is no grades file, or is empty.
    """
    try:
        grades = pl.read_parquet(path, columns=["problem_id", "decoding", "correct"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run grade.py for it") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a grades file ({error}); run grade.py again") from error
    if grades.is_empty():
        raise DataError(f"{path}: holds no grades; run grade.py again")

    def share(decoding: Decoding) -> pl.Expr:
        return pl.col("correct").filter(pl.col("decoding") == decoding).mean()

    return (
        grades.group_by("problem_id")
        .agg(
            greedy=share("greedy"),
            sample=share("sample"),
            num_samples=(pl.col("decoding") == "sample").sum(),
        )
        .sort("problem_id")
    )


def _check_same_problems(
    path: Path, problems: list[str], first_path: Path, first: list[str]
) -> None:
    if problems == first:
        return
    odd = min(set(problems) ^ set(first))
    holder = path if odd in problems else first_path
    raise DataError(
        f"{path} graded {len(problems)} problems, {first_path} {len(first)}, and not the same: "
        f"{odd!r} is only in {holder}; generate and grade both with the same suite"
    )


def _stack(tables: Sequence[tuple[Path, pl.DataFrame]], decoding: Decoding) -> Floats | None:
    """(S, P) values of one decoding, or None where no run has it."""
    columns = [table[decoding] for _, table in tables]
    if all(column.null_count() == len(column) for column in columns):
        return None
    for path, table in tables:
        if table[decoding].null_count():
            raise DataError(
                f"{path}: {decoding} completions are missing for some problems that other runs "
                "have; generate and grade it again"
            )
    return np.stack([column.to_numpy() for column in columns])


def _row(
    study: Study, study_dir: Path, model: str, method: str, suite: str, cells: dict[str, Cell]
) -> Json:
    cell, parent = cells[method], study["parent_of"].get(method)
    confidence = study["confidence"]
    accuracy = mean_interval(cell.accuracy, confidence)
    pass_at_1 = mean_interval(cell.pass_at_1, confidence)
    delta = None
    if parent is not None and parent in cells:
        delta = _difference(study, method, parent, cells, confidence)
    stages = study["chains"][method][1:]  # the first is the base model, which nothing trains
    summaries = {stage: _summaries(study, study_dir, model, method, stage) for stage in stages}
    seconds = {stage: _mean_of(found, "seconds_training") for stage, found in summaries.items()}
    return {
        "model": model,
        "method": method,
        "suite": suite,
        "num_seeds": cell.accuracy.shape[0],
        "num_problems": cell.accuracy.shape[1],
        "num_samples": cell.num_samples,
        "accuracy": accuracy.mean,
        "accuracy_ci_low": accuracy.low,
        "accuracy_ci_high": accuracy.high,
        "parent": parent,
        "delta_vs_parent": delta and delta.delta,
        "delta_vs_parent_ci_low": delta and delta.low,
        "delta_vs_parent_ci_high": delta and delta.high,
        "p_value_vs_parent": delta and delta.p_value,
        "pass_at_1": pass_at_1.mean,
        "pass_at_1_ci_low": pass_at_1.low,
        "pass_at_1_ci_high": pass_at_1.high,
        "pass_at_n": _mean_of([_largest_k(row["pass_at_k"]) for row in cell.metrics], "value"),
        "maj_at_n": _mean_of([_largest_k(row["maj_at_k"]) for row in cell.metrics], "value"),
        "format_fraction": _mean_of(cell.metrics, "format_fraction"),
        "mean_completion_tokens": _mean_of(cell.metrics, "mean_completion_tokens"),
        "truncated_fraction": _mean_of(cell.metrics, "truncated_fraction"),
        "train_seconds": seconds.get(method),
        "train_seconds_with_parents": sum(value or 0.0 for value in seconds.values()),
        "generate_seconds": _mean_of(cell.metrics, "seconds_generating"),
        "num_train_tokens": _mean_of(summaries.get(method, []), "num_tokens"),
    }


def _difference(
    study: Study, method: str, parent: str, cells: dict[str, Cell], confidence: float
) -> Difference:
    """Method minus parent, seed by seed; a parent that was run once stands for every seed."""
    seeds, parent_seeds = study["seeds_of"][method], study["seeds_of"][parent]
    values = cells[parent].accuracy
    if len(parent_seeds) > 1:
        missing = [seed for seed in seeds if seed not in parent_seeds]
        if missing:
            raise DataError(
                f"{method} has seeds {missing} that its parent {parent} has not: they cannot be "
                "compared in pairs"
            )
        values = values[[parent_seeds.index(seed) for seed in seeds]]
    return paired_difference(cells[method].accuracy, values, confidence)


def _summaries(study: Study, study_dir: Path, model: str, method: str, stage: str) -> list[Json]:
    """Training summaries of a stage of `method`, one per seed."""
    seeds = study["seeds_of"].get(stage, study["seeds_of"][method])
    runs = [run_dir(study_dir, model, stage, seed) for seed in seeds]
    return [read_json(run / "train" / "summary.json") for run in runs]


def _largest_k(by_k: dict[str, float]) -> Json:
    return {"value": by_k[max(by_k, key=int)]} if by_k else {"value": None}


def _mean_of(rows: Sequence[Json], key: str) -> float | None:
    """Mean of a key over runs; None unless every run has it."""
    values = [row.get(key) for row in rows]
    if not values or any(value is None for value in values):
        return None
    return float(np.mean([float(value) for value in values if value is not None]))


# ------------------------------------------------------------------------------------------ writing


def write_comparison(frame: pl.DataFrame, output_dir: Path) -> None:
    """Write comparison.csv, comparison.parquet (full precision) and comparison.md (to be read)."""
    write_text(output_dir / "comparison.csv", frame.write_csv())
    write_text(output_dir / "comparison.md", to_markdown(frame))
    with atomic_path(output_dir / "comparison.parquet") as temporary:
        frame.write_parquet(temporary)


def read_comparison(path: Path) -> pl.DataFrame:
    """Read comparison.parquet or comparison.csv. Raises DataError when it is neither."""
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, schema=SCHEMA)
        return pl.read_parquet(path, columns=list(SCHEMA))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run compare.py") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a comparison ({error}); run compare.py again") from error


def to_markdown(frame: pl.DataFrame) -> str:
    """The table for people: percent with intervals, differences in points, times in plain units."""
    header = [
        "model",
        "suite",
        "method",
        "seeds",
        "problems",
        "accuracy %",
        "parent",
        "vs parent, points",
        "p",
        "pass@1 %",
        "tokens",
        "truncated %",
        "training",
        "with parents",
        "generating",
    ]
    left = {"model", "suite", "method", "parent"}
    # What is to be compared, the methods of one model and suite, stands together.
    parts = frame.partition_by("model", "suite", maintain_order=True)
    rows = [_markdown_row(row) for part in parts for row in part.iter_rows(named=True)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if name in left else "-" * (width + 1) + ":"
        for name, width in zip(header, widths, strict=True)
    ]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)]) + "\n"


def _markdown_row(row: Json) -> list[str]:
    p_value = row["p_value_vs_parent"]
    p_text = "" if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    tokens = row["mean_completion_tokens"]
    return [
        row["model"],
        row["suite"],
        row["method"],
        str(row["num_seeds"]),
        str(row["num_problems"]),
        _with_interval(row, "accuracy", ".1f"),
        row["parent"] or "",
        _with_interval(row, "delta_vs_parent", "+.1f"),
        p_text,
        _with_interval(row, "pass_at_1", ".1f") if row["num_samples"] else "",
        "" if tokens is None else f"{tokens:.0f}",
        _percent(row["truncated_fraction"], ".1f"),
        _duration(row["train_seconds"]),
        _duration(row["train_seconds_with_parents"] or None),
        _duration(row["generate_seconds"]),
    ]


def _percent(value: float | None, form: str) -> str:
    return "" if value is None else f"{round(100 * value, 1) + 0.0:{form}}"


def _with_interval(row: Json, name: str, form: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f"{_percent(row[name], form)} [{_percent(low, form)}, {_percent(high, form)}]"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
