"""Two finished studies, yesterday's and today's: what changed, and is it more than chance?

Cells that both have are paired by seed and by problem, where both graded the same ones; what only
one has, and what differs in settings, code and environment, is listed. Shapes: `S` seeds, `P`
problems that both graded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from gsm8k_core.differences import (
    WEIGHTS_OF,
    Facts,
    differing,
    evaluation_facts,
    flag_text,
    leaf_changes,
    origin_facts,
    training_facts,
    training_settings,
)
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, read_optional
from gsm8k_core.layout import run_dir
from gsm8k_core.metrics import Floats, holm, is_significant, paired_difference
from gsm8k_core.tables import (
    MEASURES,
    PASS_AT_1_NOTE,
    TextTable,
    clusters_of,
    level_text,
    markdown_table,
    notes_on_clusters,
    p_text,
    percent,
    points,
    read_grades,
    with_interval,
)

SCHEMA: dict[str, Any] = {
    "model": pl.String,
    "method": pl.String,
    "suite": pl.String,
    "num_seeds": pl.Int64,
    "num_problems": pl.Int64,
    "num_clusters": pl.Int64,
    "accuracy_old": pl.Float64,
    "accuracy_new": pl.Float64,
    "delta": pl.Float64,
    "delta_ci_low": pl.Float64,
    "delta_ci_high": pl.Float64,
    "p_value": pl.Float64,
    "p_value_holm": pl.Float64,
    "smallest_detectable_delta": pl.Float64,
    "pass_at_1_old": pl.Float64,
    "pass_at_1_new": pl.Float64,
    "delta_pass_at_1": pl.Float64,
    "delta_pass_at_1_ci_low": pl.Float64,
    "delta_pass_at_1_ci_high": pl.Float64,
    "p_value_pass_at_1": pl.Float64,
    "p_value_pass_at_1_holm": pl.Float64,
    "smallest_detectable_delta_pass_at_1": pl.Float64,
    "verdict": pl.String,
    "caution": pl.String,
    "differs": pl.String,
}

ONE_SEED, TWO_SEEDS = "1 seed: no verdict", "2 seeds"

Key = tuple[str, str, str]  # model, method, suite


@dataclass(frozen=True)
class StudyComparison:
    """What `compare_studies` finds."""

    rows: pl.DataFrame
    """One row per cell that both studies have; columns of `SCHEMA`."""
    changes: dict[str, list[str]]
    """Each setting, version or commit that differs (`key: old → new`), with the cells it is of."""
    left_out: list[str]
    """What could not be compared, and why."""
    measure: str
    """What decided the verdicts: `accuracy` or `pass_at_1`."""


def find_cells(study_dir: Path) -> dict[Key, list[int]]:
    """The seeds of every model × method × suite that has grades, sorted.

    Raises DataError when the folder holds none.
    """
    cells: dict[Key, list[int]] = {}
    for path in sorted(study_dir.glob("*/*/seed*/grades/*.parquet")):
        seed_dir = path.parent.parent
        seed = re.fullmatch(r"seed(0|[1-9]\d*)", seed_dir.name)
        if seed is not None:
            key = (seed_dir.parent.parent.name, seed_dir.parent.name, path.stem)
            cells.setdefault(key, []).append(int(seed[1]))
    if not cells:
        raise DataError(
            f"{study_dir}: no grades below it; expected a study's folder, such as "
            "artifacts/experiments/default"
        )
    return {key: sorted(seeds) for key, seeds in cells.items()}


def compare_studies(
    old_dir: Path, new_dir: Path, confidence: float = 0.95, measure: str = "accuracy"
) -> StudyComparison:
    """New minus old for every cell that both have.

    `delta` is of greedy accuracy where both decoded greedily, else of the mean over samples, and
    `delta_pass_at_1` of that mean, null where not both have samples. The p-values of each are
    corrected (Holm) over the cells of a model that can have a verdict. `verdict` is `better` or
    `worse` where the corrected one of `measure`, `accuracy` or `pass_at_1`, is below
    1 − `confidence`; a trained cell of which only one seed can be paired has neither, since another
    seed of the same settings may differ by more, and `caution` says so. Raises DataError when
    either folder has no grades or a malformed file.
    """
    old_cells, new_cells = find_cells(old_dir), find_cells(new_dir)
    left_out = [
        f"{' / '.join(key)}: only in {folder}"
        for folder, cells, others in (
            (old_dir, old_cells, new_cells),
            (new_dir, new_cells, old_cells),
        )
        for key in cells
        if key not in others
    ]
    rows: list[Json] = []
    changes: dict[str, list[str]] = {}
    for key in sorted(
        old_cells.keys() & new_cells.keys(), key=lambda key: (key[0], key[2], key[1])
    ):
        seeds = [seed for seed in old_cells[key] if seed in new_cells[key]]
        name = " / ".join(key)
        odd = sorted(set(old_cells[key]) ^ set(new_cells[key]))
        if odd:
            left_out.append(f"{name}: seeds {', '.join(map(str, odd))} are in one study only")
        if not seeds:
            continue
        row, reason = _compare_cell(old_dir, new_dir, key, seeds, confidence)
        if reason:
            left_out.append(f"{name}: {reason}")
        if row is None:
            continue
        if measure == "pass_at_1" and row.get("p_value_pass_at_1") is None:
            left_out.append(f"{name}: not sampled in both studies, so pass@1 has no verdict")
        if len(seeds) <= 2 and _is_trained(new_dir, key, seeds[0]):
            row["caution"] = ONE_SEED if len(seeds) == 1 else TWO_SEEDS
        for line in _facts_of_row(row, old_dir, new_dir, key, seeds):
            changes.setdefault(line, []).append(name)
        rows.append(row)
    for model in dict.fromkeys(row["model"] for row in rows):
        _judge([row for row in rows if row["model"] == model], confidence, measure)
    return StudyComparison(pl.DataFrame(rows, schema=SCHEMA), changes, left_out, measure)


def _compare_cell(
    old_dir: Path, new_dir: Path, key: Key, seeds: Sequence[int], confidence: float
) -> tuple[Json | None, str]:
    """The row of one cell (None where nothing is in common), and what was left out of it."""
    model, method, suite = key
    tables: list[pl.DataFrame] = []
    graded: set[str] = set()
    for seed in seeds:
        old, new = (
            read_grades(run_dir(folder, model, method, seed) / "grades" / f"{suite}.parquet")
            for folder in (old_dir, new_dir)
        )
        tables.append(old.join(new, on="problem_id", suffix="_new").sort("problem_id"))
        graded |= set(old["problem_id"]) | set(new["problem_id"])
    common = set.intersection(*(set(table["problem_id"]) for table in tables))
    if not common:
        return None, "no problem was graded in both studies"
    odd = len(graded) - len(common)
    reason = f"{odd} of {len(graded)} problems are not in every run of both" if odd else ""
    kept = [table.filter(pl.col("problem_id").is_in(list(common))) for table in tables]
    joined = pl.concat(kept)
    sides: dict[str, tuple[Floats, Floats]] = {}  # measure → old and new, (S, P)
    if (joined["num_samples"] > 0).all() and (joined["num_samples_new"] > 0).all():
        shares = [pl.col(f"num_correct{of}") / pl.col(f"num_samples{of}") for of in ("", "_new")]
        sides["pass_at_1"] = _stack(kept, shares[0]), _stack(kept, shares[1])
    if joined["greedy"].null_count() + joined["greedy_new"].null_count() == 0:
        sides["accuracy"] = _stack(kept, pl.col("greedy")), _stack(kept, pl.col("greedy_new"))
    elif sides:
        sides["accuracy"] = sides["pass_at_1"]
    else:
        return None, "one study decoded greedily and the other sampled"
    # Rows of one's own may have been given clusters between the two studies.
    named = kept[0].with_columns(pl.coalesce("cluster_new", "cluster").alias("cluster"))
    clusters = clusters_of(named)
    row: Json = {
        "model": model,
        "method": method,
        "suite": suite,
        "num_seeds": len(seeds),
        "num_problems": len(common),
        "num_clusters": None if clusters is None else clusters.n_unique(),
    }
    for measure, (before, after) in sides.items():
        of, found = MEASURES[measure], paired_difference(after, before, confidence, clusters)
        row |= {
            f"{measure}_old": float(before.mean()),
            f"{measure}_new": float(after.mean()),
            f"delta{of}": found.delta,
            f"delta{of}_ci_low": found.low,
            f"delta{of}_ci_high": found.high,
            f"p_value{of}": found.p_value,
            f"smallest_detectable_delta{of}": found.smallest_detectable,
        }
    return row, reason


def _stack(tables: Sequence[pl.DataFrame], column: pl.Expr) -> Floats:
    return np.stack([table.select(column).to_series().to_numpy() for table in tables])


def _is_trained(study_dir: Path, key: Key, seed: int) -> bool:
    """Whether a run is a draw of training; one that does not tell is taken for it."""
    model, method, suite = key
    run = run_dir(study_dir, model, method, seed)
    metrics = read_optional(run / "metrics" / f"{suite}.json")
    stats = read_optional(run / "completions" / f"{suite}.stats.json")
    return {**metrics, **stats}.get("parent", "unknown") is not None


def _facts_of_row(
    row: Json, old_dir: Path, new_dir: Path, key: Key, seeds: Sequence[int]
) -> list[str]:
    """Name in `row` what differs between the studies; return every change in words."""
    old, new = ([_facts(folder, key, seed) for seed in seeds] for folder in (old_dir, new_dir))
    row["differs"] = flag_text("", differing(old, new)).removeprefix(": ") or None
    was: dict[str, set[str]] = {}
    now: dict[str, set[str]] = {}
    for before, after in zip(old, new, strict=True):
        for name in before.keys() & after.keys():
            for where, values in leaf_changes(before[name], after[name], name).items():
                was.setdefault(where, set()).add(_shown(values[0]))
                now.setdefault(where, set()).add(_shown(values[1]))
    return [
        f"{where}: {' or '.join(sorted(was[where]))} → {' or '.join(sorted(now[where]))}"
        for where in sorted(was)
    ]


def _facts(study_dir: Path, key: Key, seed: int) -> Facts:
    model, method, suite = key
    run = run_dir(study_dir, model, method, seed)
    stats = read_optional(run / "completions" / f"{suite}.stats.json")
    summary = read_optional(run / "train" / "summary.json")
    facts = {
        **evaluation_facts(stats, read_optional(run / "metrics" / f"{suite}.json")),
        **training_facts(summary),
        **training_settings(read_optional(run / "settings.json")),
        **origin_facts(stats, summary),
    }
    # Trained weights are what is compared, and no two trainings need end with the same.
    return {name: value for name, value in facts.items() if not name.startswith(WEIGHTS_OF)}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _judge(rows: list[Json], confidence: float, measure: str = "accuracy") -> None:
    tested = [{} if row.get("caution") == ONE_SEED else row for row in rows]
    for of in MEASURES.values():
        adjusted = holm([row.get(f"p_value{of}") for row in tested])
        for row, p_value in zip(rows, adjusted, strict=True):
            row[f"p_value{of}_holm"] = p_value
    of = MEASURES[measure]
    for row in rows:
        row["verdict"] = None
        if is_significant(row[f"p_value{of}_holm"], confidence):
            row["verdict"] = "better" if row[f"delta{of}"] > 0 else "worse"


def to_markdown(found: StudyComparison, old_dir: Path, new_dir: Path, confidence: float) -> str:
    """The report: the table, what differs, what was left out."""
    rows = found.rows.to_dicts()
    columns: dict[str, Callable[[Json], str]] = {
        "model": lambda row: row["model"],
        "suite": lambda row: row["suite"],
        "method": lambda row: row["method"],
        "seeds": lambda row: str(row["num_seeds"]),
        "problems": lambda row: str(row["num_problems"]),
        "old %": lambda row: percent(row["accuracy_old"]),
        "new %": lambda row: percent(row["accuracy_new"]),
        "new − old, points": lambda row: with_interval(row, "delta", points),
        "p": lambda row: p_text(row["p_value_holm"]),
    }
    has_pass_at_1 = any(
        row["pass_at_1_old"] is not None
        and any(row[f"accuracy_{side}"] != row[f"pass_at_1_{side}"] for side in ("old", "new"))
        for row in rows
    )
    if has_pass_at_1:
        columns |= {
            "old pass@1 %": lambda row: percent(row["pass_at_1_old"]),
            "new pass@1 %": lambda row: percent(row["pass_at_1_new"]),
            "pass@1 new − old, points": lambda row: with_interval(row, "delta_pass_at_1", points),
            "p pass@1": lambda row: p_text(row["p_value_pass_at_1_holm"]),
        }
    columns |= {
        "verdict": lambda row: row["verdict"] or "",
        "flags": lambda row: "; ".join(filter(None, (row["caution"], row["differs"]))),
    }
    parts = [f"# {new_dir} against {old_dir}\n"]
    if rows:
        texts = [[render(row) for render in columns.values()] for row in rows]
        parts.append(markdown_table(TextTable("", list(columns), texts)))
        parts.append(
            f"Differences are paired by seed and problem, with {level_text(confidence)} intervals "
            "over both; p is corrected (Holm) over the rows of a model that have one. One seed: "
            "problems only, and of what was trained neither p nor verdict, as another seed of the "
            "same settings may differ by more. Flags name few seeds, and what is not the same in "
            "both studies.\n"
        )
        if has_pass_at_1 or found.measure != "accuracy":
            name = "accuracy" if found.measure == "accuracy" else "pass@1"
            parts.append(f"Verdicts are by {name}. {PASS_AT_1_NOTE}\n")
        parts += [f"{note}\n" for note in notes_on_clusters(rows)]
    else:
        parts.append("No cell can be compared.\n")
    if found.changes:
        lines = [f"- {line} ({_of(cells, len(rows))})" for line, cells in found.changes.items()]
        parts.append("## What differs\n\n" + "\n".join(lines) + "\n")
    if found.left_out:
        lines = [f"- {line}" for line in found.left_out]
        parts.append("## What was left out\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _of(cells: list[str], num_rows: int) -> str:
    if len(cells) == num_rows:
        return "all rows"
    return ", ".join(cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")
