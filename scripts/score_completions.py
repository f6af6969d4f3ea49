"""Score completions that any tool wrote: JSONL in, a table of all grades out, and a row for each.

A row of the JSONL holds a completion, or a list of them, and its gold answer or its problem's id:

    python scripts/score_completions.py samples.jsonl --completion-field output --gold-field answer

The gold answer is a number (`1,000`) or a worked answer that ends in `#### 1,000`. If the rows have
none, `--problems` names the JSONL of problems (GSM8K's own test.jsonl, or the one that
prepare_data.py wrote) and `--id-field` the field that says which problem it is: the problem's `id`,
or its row from 0 where problems have no id.

    python scripts/score_completions.py a.jsonl b.jsonl --completion-field response \\
        --problems test.jsonl --id-field index --output scored.parquet

A field may be nested: join its path by dots, with numbers for places in lists. For the samples of
lm-evaluation-harness (`--log_samples`), and for the batch results of an OpenAI-compatible server:

    python scripts/score_completions.py samples_gsm8k.jsonl --completion-field resps.0 \\
        --gold-field target
    python scripts/score_completions.py results.jsonl --problems test.jsonl --id-field custom_id \\
        --completion-field response.body.choices.0.message.content

The table goes to standard output as Markdown, a line for each file: the share that is right by each
grade (gsm8k_core/grading.py), in percent, and `format %`, the share in which a number follows the
marker. A completion that is null counts as wrong. The text is graded as it is, so cut it at the
task's stops first (lm-evaluation-harness stops gsm8k at `Question:`, `</s>` and `<|im_end|>`).
`--output` (.parquet, .csv or .jsonl) has a row for each completion: its place, its gold, every
grade, `correct` by `--grading`, the answer `extracted` by it, and `contradicted`: right by strict,
but another number follows a later marker.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from gsm8k_core.answers import check_marker
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.config import GradingSettings
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import Json, atomic_path, iter_jsonl
from gsm8k_core.grading import GRADES, Grader, read_gold

log = logging.getLogger("score_completions")
PLAIN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")

SCHEMA: dict[str, type[pl.DataType]] = {
    "file": pl.String,
    "row": pl.Int64,
    "sample": pl.Int64,
    "problem_id": pl.String,
    "gold": pl.String,
    "correct": pl.Boolean,
    **dict.fromkeys(GRADES, pl.Boolean),
    "has_format": pl.Boolean,
    "contradicted": pl.Boolean,
    "extracted": pl.String,
}
WRITERS: dict[str, Callable[[pl.DataFrame, Path], None]] = {
    ".parquet": pl.DataFrame.write_parquet,
    ".csv": pl.DataFrame.write_csv,
    ".jsonl": pl.DataFrame.write_ndjson,
}


def field(row: Json, path: str, where: str) -> Any:
    """The value at `path` (`a.0.b`) of a row. Raises DataError that says what there is instead."""
    if path in row:  # a key may hold a dot
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"{where}: no field {path!r}: no {part!r} {_what_there_is(value)}")
    return value


def _what_there_is(value: Any) -> str:
    if isinstance(value, dict):
        return f"among {', '.join(map(repr, value)) or 'no keys'}"
    if isinstance(value, list):
        return f"in a list of {len(value)}"
    return f"in a {type(value).__name__}"


def completions_of(value: Any, where: str) -> list[str | None]:
    """The completions of one row: a text, null, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise DataError(f"{where}: an empty list of completions")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{where}: a completion should be a text, found {type(text).__name__}; "
                "name the text itself, such as --completion-field message.content"
            )
    return texts


def text_of(value: Any, where: str) -> str:
    """A gold answer or an id, which JSON may hold as a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: expected a text or a number, found {type(value).__name__}")
    # Whole numbers of a column that has gaps, as pandas writes them: 18.0.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def read_golds(path: Path) -> dict[str, str]:
    """Gold answers by problem id, or by row (from 0) where problems have no id."""
    golds: dict[str, str] = {}
    for index, row in enumerate(iter_jsonl(path)):
        where = f"{path}, row {index + 1}"
        problem_id = text_of(row.get("id", index), f"{where}, 'id'")
        if problem_id in golds:
            raise DataError(f"{where}: id {problem_id!r} occurs twice")
        gold = row["gold"] if "gold" in row else field(row, "answer", where)
        golds[problem_id] = text_of(gold, f"{where}, the gold answer")
    return golds


def score_file(
    path: Path,
    completion_field: str,
    gold_field: str,
    id_field: str,
    golds: dict[str, str] | None,
    grader: Grader,
) -> Iterator[Json]:
    """A graded row for each completion of a file. Raises DataError that names file and row.

    lm-evaluation-harness writes a completion once for each filter of its task: one time counts.
    """
    first_filter = None
    num_in_words = 0
    for number, row in enumerate(iter_jsonl(path), start=1):
        where = f"{path}, row {number}"
        if "filter" in row and "doc_id" in row:
            if first_filter is None:
                first_filter = row["filter"]
                log.info("%s: only rows of the filter %s", path, first_filter)
            if row["filter"] != first_filter:
                continue
        problem_id = None
        if golds is None:
            gold = text_of(field(row, gold_field, where), f"{where}, {gold_field!r}")
        else:
            problem_id = text_of(field(row, id_field, where), f"{where}, {id_field!r}")
            if problem_id not in golds:
                raise DataError(f"{where}: no problem {problem_id!r} in --problems")
            gold = golds[problem_id]
        try:
            reference = read_gold(gold)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        num_in_words += PLAIN_NUMBER.fullmatch(reference.lm_eval) is None
        for sample, text in enumerate(completions_of(field(row, completion_field, where), where)):
            yield {
                "file": str(path),
                "row": number,
                "sample": sample,
                "problem_id": problem_id,
                "gold": str(reference.value),
                **grader.grade(text, reference),
            }
    if num_in_words:
        log.warning(
            "%s: %d gold answers are neither a number nor end in `#### <number>`; lm-evaluation-"
            "harness compares texts, so by its grades no completion of theirs is right",
            path,
            num_in_words,
        )


def table(scored: pl.DataFrame) -> str:
    """The shares of each file, in percent, as Markdown; grades that were not taken are left out."""
    taken = [grade for grade in GRADES if scored[grade].null_count() == 0]
    shares = scored.group_by("file", maintain_order=True).agg(
        pl.len().alias("completions"),
        *(pl.col(grade).mean().mul(100).round(2).alias(f"{grade} %") for grade in taken),
        pl.col("has_format").mean().mul(100).round(2).alias("format %"),
    )
    with pl.Config(
        tbl_formatting="ASCII_MARKDOWN",
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=1000,
        float_precision=2,
    ):
        return f"{shares}\n"


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("completions", type=Path, nargs="+", help="one JSONL file or several")
    arguments.add_argument(
        "--completion-field", default="completion", metavar="PATH", help="default: completion"
    )
    arguments.add_argument("--gold-field", default="gold", metavar="PATH", help="default: gold")
    arguments.add_argument("--problems", type=Path, help="JSONL of problems with gold answers")
    arguments.add_argument(
        "--id-field",
        default="problem_id",
        metavar="PATH",
        help="names the problem (with --problems); default: problem_id",
    )
    arguments.add_argument(
        "--marker",
        default="####",
        help="what strict reads the answer after: ####, boxed or a text; default: ####",
    )
    arguments.add_argument(
        "--grading",
        choices=GRADES,
        default="strict",
        help="the grade that `correct` and `extracted` show; default: strict",
    )
    arguments.add_argument(
        "--math-verify", action="store_true", help="also grade with math-verify (slower)"
    )
    arguments.add_argument("--output", type=Path, help="one row each: .parquet, .csv or .jsonl")
    args = arguments.parse_args(argv)

    try:
        check_marker(args.marker)
    except ValueError as error:
        raise ConfigError(f"--marker: {error}") from None
    if args.output is not None and args.output.suffix not in WRITERS:
        raise ConfigError(f"--output: {args.output} should end in {', '.join(WRITERS)}")
    read = [path.resolve() for path in [*args.completions, args.problems] if path is not None]
    if args.output is not None and args.output.resolve() in read:
        raise ConfigError(f"--output: {args.output} is read too, and would be overwritten")
    if len(set(read)) < len(read):
        raise ConfigError("a file is named twice: its completions would count twice")
    golds = None if args.problems is None else read_golds(args.problems)
    settings = GradingSettings(
        grading=args.grading, marker=args.marker, math_verify=args.math_verify
    )
    with Grader(settings) as grader:
        rows = [
            row
            for path in args.completions
            for row in score_file(
                path, args.completion_field, args.gold_field, args.id_field, golds, grader
            )
        ]
    if not rows:
        raise DataError(f"{', '.join(map(str, args.completions))}: no completions")
    scored = pl.DataFrame(rows, schema=SCHEMA)
    sys.stdout.write(table(scored))
    if grader.num_killed:
        log.warning("math-verify took too long for %d completions", grader.num_killed)
    if args.output is not None:
        with atomic_path(args.output) as temporary:
            WRITERS[args.output.suffix](scored, temporary)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
