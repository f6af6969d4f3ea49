"""Look for test problems in training data: shared 13-grams and near-duplicates.

Training files are JSONL of any form (problems, demonstrations, reasoning traces, completions):
every text in a row counts. Test files are problems. Several of each may be given.

    python scripts/check_overlap.py --train artifacts/gsm8k/train.jsonl \\
        --test artifacts/gsm8k/test.jsonl artifacts/gsm8k_platinum/test.jsonl \\
        --output /tmp/overlap.json --markdown /tmp/overlap.md

The 13-grams are GPT-3's (Brown et al. 2020, appendix C). Departure: nothing is removed and no score
is recomputed; the report names the problems. gsm8k_core/overlap.py says how near-duplicates are
measured.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentTypeError
from pathlib import Path

from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl, write_json, write_text
from gsm8k_core.manifest import CallRecord
from gsm8k_core.overlap import MIN_JACCARD, find_overlap
from gsm8k_core.problems import read_problems
from gsm8k_core.progress import progress

log = logging.getLogger("check_overlap")

LISTED_PROBLEMS = 50


def share(text: str) -> float:
    """A similarity from the command line: above 0, at most 1."""
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise ArgumentTypeError(f"expected a number above 0 and at most 1, found {text}")
    return value


def page(report: Json) -> str:
    """The report as Markdown, the first LISTED_PROBLEMS of each list."""
    trained = ", ".join(f"`{one['file']}` ({one['num_rows']:,} rows)" for one in report["training"])
    lines = [
        "# Overlap of test problems with training data",
        "",
        f"Training data: {trained}.",
        "",
        f"- *Shared*: {report['ngram_words']} words in a row of the question (all of it where it "
        "is shorter) occur in a training text; lower case, no punctuation (Brown et al. 2020).",
        f"- *Near*: the {report['shingle_words']}-grams of words, numbers masked, have a Jaccard "
        f"similarity of {report['min_jaccard']} or more with those of a training text.",
        "- *Identical*: a training text has exactly the same words.",
        "",
        "| test file | problems | shared | near | identical | shorter than "
        f"{report['ngram_words']} words |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for test in report["tests"]:
        numbers = ("num_problems", "num_sharing", "num_near", "num_identical", "num_shorter")
        cells = " | ".join(f"{test[key]:,}" for key in numbers)
        lines.append(f"| `{test['file']}` | {cells} |")
    for test in report["tests"]:
        if test["sharing"]:
            lines += ["", f"## Shared with `{test['file']}`", ""]
            for problem in test["sharing"][:LISTED_PROBLEMS]:
                first = problem["rows"][0]
                lines.append(
                    f"- {_quoted(problem['id'])} ({_rows(problem)}): “{first['ngram']}” in "
                    f"{_place(first)}"
                )
            lines += _more(test["sharing"])
        if test["near"]:
            lines += ["", f"## Near-duplicates of `{test['file']}`", ""]
            for problem in test["near"][:LISTED_PROBLEMS]:
                first = problem["rows"][0]
                lines += [
                    f"- {_quoted(problem['id'])} ({_rows(problem)}), {first['jaccard']:.2f} with "
                    f"{_place(first)}",
                    f"  - test: {_quoted(problem['question'])}",
                    f"  - training: {_quoted(first['excerpt'])}",
                ]
            lines += _more(test["near"])
    return "\n".join(lines) + "\n"


def _rows(problem: Json) -> str:
    return "1 row" if problem["num_rows"] == 1 else f"{problem['num_rows']:,} rows"


def _place(entry: Json) -> str:
    return f"{_quoted(entry['file'])}, row {entry['row']}"


def _more(problems: list[Json]) -> list[str]:
    left = len(problems) - LISTED_PROBLEMS
    return [f"- … and {left:,} more, in the JSON file"] if left > 0 else []


def _quoted(text: str) -> str:
    """Text on one line in which nothing is markup: as code, between more backticks than it has."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    blank = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--train", nargs="+", type=Path, required=True, help="training, JSONL")
    arguments.add_argument("--test", nargs="+", type=Path, required=True, help="problems, JSONL")
    arguments.add_argument("--output", type=Path, required=True, help="report to write, JSON")
    arguments.add_argument("--markdown", type=Path, required=True, help="report to write, Markdown")
    arguments.add_argument(
        "--min-jaccard",
        type=share,
        default=MIN_JACCARD,
        help=f"similarity of a near-duplicate (default: {MIN_JACCARD})",
    )
    arguments.add_argument("--manifest", type=Path, help="record of this call to write, JSON")
    args = arguments.parse_args(argv)

    record = CallRecord("check_overlap.py", argv)
    tests = {str(path): read_problems(path) for path in args.test}
    training = ((str(path), progress(iter_jsonl(path), str(path))) for path in args.train)
    report = find_overlap(tests, training, args.min_jaccard)
    for one in report["training"]:
        if one["num_rows"] == 0:
            raise DataError(f"{one['file']}: holds no row, so nothing was compared with it")
    write_json(args.output, report)
    write_text(args.markdown, page(report))
    if args.manifest is not None:
        record.write(args.manifest, packages=(), outputs=[args.output, args.markdown])
    for test in report["tests"]:
        log.info(
            "%s: of %d problems %d share %d words in a row, %d are near-duplicates",
            test["file"],
            test["num_problems"],
            test["num_sharing"],
            report["ngram_words"],
            test["num_near"],
        )
    return 0


if __name__ == "__main__":
    leave(run_script(main))
