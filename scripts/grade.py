"""Grade stored completions: no model, no GPU; free to rerun when grading changes.

Reads the completions that generate.py stored, gives each every grade (gsm8k_core/grading.py) and
writes one row per completion (Parquet) and one summary (JSON). The grade named by `grading` is the
one that counts, `correct`; all are kept. `math_verify` is slow, so it is computed only where the
settings say `"math_verify": true` (in a config: `suites.<name>.math_verify`) or name it as the
grade that counts, and is null elsewhere.

The summary is the same to the byte whenever the same code grades the same completions; it copies
the `provenance` of the completions. Who graded, and with which versions, is in a separate file
beside the grades (grades/test.manifest.json).

    python scripts/grade.py --settings '{"grading": "strict", "marker": "####"}' \\
        --completions completions/test.jsonl --stats completions/test.stats.json \\
        --output metrics/test.json --grades grades/test.parquet

In the summary, `accuracy` is that of the greedy completions (null without them); `pass_at_1` is the
mean share of correct samples (without samples, the greedy accuracy); `pass_at_k` is the unbiased
estimator of Chen et al. 2021. Lengths, truncation, format and the accuracy by each grade
(`accuracy_strict`, `accuracy_lm_eval_strict`, …) are those of the greedy completions if there are
any. `contradicted_fraction` is the share of them that is right by `strict` and then states another
number after a later marker. `num_prompts_truncated` counts the prompts that were too long for the
model and lost their beginning. `math_verify_killed` counts completions that math-verify took too
long for; they count as wrong by that grade.

Departures: lm-evaluation-harness compares texts after removing `,` and `$`; `strict` and `flexible`
compare numbers exactly, so `18.00` is 18 and `1, 18` is no number (gsm8k_core/answers.py). The
harness' own grades are `lm_eval_strict` and `lm_eval_flexible`: those of its task `gsm8k_cot` where
the marker is `The answer is`, else those of its task `gsm8k`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.config import GradingSettings, settings_from
from gsm8k_core.errors import DataError
from gsm8k_core.files import (
    Json,
    atomic_path,
    drop_partials,
    iter_jsonl,
    read_json,
    sha256_file,
    write_text,
)
from gsm8k_core.grading import GRADES, Gold, Grader, read_gold
from gsm8k_core.manifest import CallRecord
from gsm8k_core.metrics import maj_at_k, pass_at_k, powers_up_to
from gsm8k_core.tables import answer_codes

log = logging.getLogger("grade")

IDENTITY = ("model", "method", "seed", "suite", "parent")
COPIED = (
    "engine",
    "device",
    "dtype",
    "seconds_loading",
    "seconds_generating",
    "num_prompt_tokens",
    "num_prompts_truncated",
    "num_completion_tokens",
    "provenance",
)
# What grades depend on; math-verify parses with the others' help.
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "numpy", "polars")
ROW_TYPES: dict[str, type] = {
    "problem_id": str,
    "decoding": str,
    "sample_index": int,
    "gold": str,
    "completion": str,
    "token_ids": list,
    "num_tokens": int,
    "finish_reason": str,
}
CHOICES = {"decoding": ("greedy", "sample"), "finish_reason": ("stop", "length")}
GRADES_SCHEMA: dict[str, type[pl.DataType]] = {
    "problem_id": pl.String,
    "cluster": pl.String,
    "decoding": pl.String,
    "sample_index": pl.Int64,
    "correct": pl.Boolean,
    **dict.fromkeys(GRADES, pl.Boolean),
    "has_format": pl.Boolean,
    "contradicted": pl.Boolean,
    "extracted": pl.String,
    "num_tokens": pl.Int64,
    "truncated": pl.Boolean,
}


def check_row(row: Json, where: str) -> None:
    """Raise DataError that begins with `where` unless `row` is a completion."""
    for key, kind in ROW_TYPES.items():
        if key not in row:
            raise DataError(f"{where}: '{key}' is missing; was this written by generate.py?")
        if type(row[key]) is not kind:
            found = type(row[key]).__name__
            raise DataError(f"{where}: '{key}' should be {kind.__name__}, found {found}")
    if type(row.get("cluster")) not in (str, type(None)):  # GSM8K's problems are of none
        raise DataError(f"{where}: 'cluster' should be str, found {type(row['cluster']).__name__}")
    for key, choices in CHOICES.items():
        if row[key] not in choices:
            expected = " or ".join(map(repr, choices))
            raise DataError(f"{where}: '{key}' should be {expected}, found {row[key]!r}")
    if row["sample_index"] < 0 or row["num_tokens"] < 0:
        raise DataError(f"{where}: 'sample_index' and 'num_tokens' cannot be negative")
    if any(type(token) is not int for token in row["token_ids"]):
        raise DataError(f"{where}: 'token_ids' should hold whole numbers only")
    if len(row["token_ids"]) != row["num_tokens"]:
        raise DataError(
            f"{where}: 'num_tokens' is {row['num_tokens']} but 'token_ids' holds "
            f"{len(row['token_ids'])}"
        )


def grade_rows(rows: Iterable[Json], source: str, grader: Grader) -> pl.DataFrame:
    """One graded row per completion, sorted by problem, decoding and sample.

    Raises DataError that names `source` and the row (from 1) for a malformed row, a completion
    that is there twice, a problem with two gold answers or two clusters or a gold answer that is no
    number, and when problems differ in how often they were answered.
    """
    grades: list[Json] = []
    golds: dict[str, tuple[str, Gold]] = {}
    clusters: dict[str, str | None] = {}
    seen: dict[tuple[str, str, int], int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        check_row(row, where)
        key = (row["problem_id"], row["decoding"], row["sample_index"])
        if key in seen:
            raise DataError(f"{where}: the same problem, decoding and sample as row {seen[key]}")
        seen[key] = number
        gold_text, gold = golds.setdefault(key[0], (row["gold"], _gold(row["gold"], where)))
        if gold_text != row["gold"]:
            raise DataError(
                f"{where}: gold is {row['gold']!r}, but {gold_text!r} in an earlier row of "
                f"problem {key[0]!r}"
            )
        cluster = clusters.setdefault(key[0], row.get("cluster"))
        if cluster != row.get("cluster"):
            raise DataError(
                f"{where}: cluster is {row.get('cluster')!r}, but {cluster!r} in an earlier row of "
                f"problem {key[0]!r}"
            )
        grades.append(
            {
                "problem_id": row["problem_id"],
                "cluster": cluster,
                "decoding": row["decoding"],
                "sample_index": row["sample_index"],
                **grader.grade(row["completion"], gold),
                "num_tokens": row["num_tokens"],
                "truncated": row["finish_reason"] == "length",
            }
        )
    if not grades:
        raise DataError(f"{source}: no completions; generate them again")
    frame = pl.DataFrame(grades, schema=GRADES_SCHEMA)
    _check_balance(frame, source)
    return frame.sort("problem_id", "decoding", "sample_index")


def _gold(text: str, where: str) -> Gold:
    try:
        return read_gold(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _check_balance(frame: pl.DataFrame, source: str) -> None:
    """Every problem must have been answered equally often, or means would weigh them unequally."""
    counts = frame.group_by("problem_id").agg(
        greedy=(pl.col("decoding") == "greedy").sum(),
        sample=(pl.col("decoding") == "sample").sum(),
    )
    counts = counts.sort("problem_id")
    first = counts.row(0, named=True)
    for row in counts.iter_rows(named=True):
        for decoding in ("greedy", "sample"):
            if row[decoding] != first[decoding]:
                raise DataError(
                    f"{source}: problem {row['problem_id']!r} has {row[decoding]} {decoding} "
                    f"completions, problem {first['problem_id']!r} has {first[decoding]}; "
                    "generate them again"
                )
    if first["greedy"] > 1:
        raise DataError(f"{source}: {first['greedy']} greedy completions per problem, expected 1")


def summarize(grades: pl.DataFrame) -> dict[str, Any]:
    """Accuracies, pass@k, maj@k, lengths and truncation of graded completions."""
    greedy = grades.filter(pl.col("decoding") == "greedy")
    samples = grades.filter(pl.col("decoding") == "sample")
    main = greedy if greedy.height else samples
    accuracy = _mean(greedy["correct"]) if greedy.height else None
    num_problems = grades["problem_id"].n_unique()
    num_samples = samples.height // num_problems
    ks = powers_up_to(num_samples)
    # Both (problems, samples): grades are sorted, and problems have as many samples each.
    correct = samples["correct"].to_numpy().reshape(num_problems, num_samples)
    answers = answer_codes(samples["extracted"]).to_numpy().reshape(correct.shape)
    num_correct = correct.sum(axis=1)
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "accuracy": accuracy,
        **{f"accuracy_{grade}": _share(main[grade]) for grade in GRADES},
        "pass_at_1": _mean(samples["correct"]) if num_samples else accuracy,
        "pass_at_k": {str(k): float(pass_at_k(num_samples, num_correct, k).mean()) for k in ks},
        "maj_at_k": {str(k): float(maj_at_k(answers, correct, k).mean()) for k in ks},
        "mean_completion_tokens": _mean(main["num_tokens"]),
        "truncated_fraction": _mean(main["truncated"]),
        "format_fraction": _mean(main["has_format"]),
        "contradicted_fraction": _mean(main["contradicted"]),
    }


def _mean(column: pl.Series) -> float:
    return float(column.cast(pl.Float64).to_numpy().mean())


def _share(grades: pl.Series) -> float | None:
    """The share that is right; None for a grade that was not taken."""
    return None if grades.null_count() else _mean(grades)


def read_stats(path: Path) -> Json:
    """What generate.py wrote about a run. Raises DataError when it does not say which run."""
    stats = read_json(path)
    missing = [key for key in IDENTITY if not isinstance(stats, dict) or key not in stats]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing; was this written by generate.py?")
    return dict(stats)


def check_they_belong_together(
    stats: Json, stats_path: Path, completions: Path, grades: pl.DataFrame
) -> None:
    """Raise DataError where the stats are of other completions, or of more or fewer of them."""
    found = {
        "completions_sha256": sha256_file(completions),
        "num_problems": grades["problem_id"].n_unique(),
        "num_completions": grades.height,
    }
    for key, value in found.items():  # stats of completions from elsewhere need not tell these
        if stats.get(key, value) != value:
            raise DataError(
                f"{completions}: not the completions that {stats_path} is of: {key} is {value}, "
                f"expected {stats[key]}; give those that generate.py wrote with it, whole"
            )


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--completions", type=Path, required=True, help="completions, JSONL")
    arguments.add_argument("--stats", type=Path, required=True, help="their .stats.json")
    arguments.add_argument(
        "--settings",
        required=True,
        help='JSON, or a file with it: {"grading": the grade that counts, '
        '"marker": "####", "boxed" or a text, "math_verify": true or false}',
    )
    arguments.add_argument("--output", type=Path, required=True, help="summary to write (JSON)")
    arguments.add_argument("--grades", type=Path, required=True, help="grades to write (Parquet)")
    args = arguments.parse_args(argv)

    record = CallRecord("grade.py", argv)
    settings: GradingSettings = settings_from(args.settings, GradingSettings)
    stats = read_stats(args.stats)
    with Grader(settings) as grader:
        grades = grade_rows(iter_jsonl(args.completions), str(args.completions), grader)
    check_they_belong_together(stats, args.stats, args.completions, grades)
    drop_partials(args.completions)
    summary = {
        **{key: stats.get(key) for key in (*IDENTITY, *COPIED)},
        **settings.model_dump(),
        **summarize(grades),
        "math_verify_killed": grader.num_killed,
    }
    with atomic_path(args.grades) as temporary:
        grades.write_parquet(temporary)
    write_text(
        args.output, json.dumps(summary, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    )
    record.write(
        args.grades.with_suffix(".manifest.json"), PACKAGES, outputs=[args.output, args.grades]
    )
    shown = summary["pass_at_1"] if summary["accuracy"] is None else summary["accuracy"]
    log.info("%s: %.1f %% of %d problems", args.output, 100 * shown, summary["num_problems"])
    return 0


if __name__ == "__main__":
    leave(run_script(main))
