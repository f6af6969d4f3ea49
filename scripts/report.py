"""Write the report of a study: one HTML file that opens from disk and needs no network.

First the answer: which method is best, by how much, and how sure that is. Then learning curves,
cost, pass@k, lengths, agreement between methods, and a browser of all completions with their
grades; at the end, where everything came from. Reads what the runs below --study-dir and compare.py
wrote. --manifest writes a record of this call: command line, commit, versions, hash of the page.

    python scripts/report.py --config config.yaml --study-dir artifacts/experiments/default \\
        --comparison artifacts/results/default/comparison.parquet \\
        --problems arithmetic=artifacts/arithmetic/test.jsonl \\
        --output artifacts/results/default/report.html

Every problem has a link of its own: report.html#p/MODEL/SUITE/PROBLEM.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from gsm8k_core.cli import leave, run_script, study_from, study_parser
from gsm8k_core.errors import ConfigError
from gsm8k_core.files import write_text
from gsm8k_core.manifest import CallRecord
from gsm8k_core.report import Sources, build_report

log = logging.getLogger("report")

PACKAGES = ("numpy", "scipy", "polars", "altair", "vl-convert-python", "jinja2")


def suite_file(text: str) -> tuple[str, Path]:
    """`SUITE=FILE` as its parts."""
    suite, equals, path = text.partition("=")
    if not (suite and equals and path):
        raise argparse.ArgumentTypeError(f"expected SUITE=FILE, found {text!r}")
    return suite, Path(path)


def megabytes(text: str) -> float:
    """A number of megabytes above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def main(argv: list[str] | None = None) -> int:
    arguments = study_parser(__doc__)
    arguments.add_argument("--comparison", type=Path, required=True, help="comparison.parquet")
    arguments.add_argument(
        "--problems",
        type=suite_file,
        nargs="+",
        default=[],
        metavar="SUITE=FILE",
        help="problems of each suite, JSONL, for questions and solutions (without them: only ids)",
    )
    arguments.add_argument(
        "--runs-dir", type=Path, help="manifests of the calls of snakemake (artifacts/runs)"
    )
    arguments.add_argument(
        "--max-megabytes",
        type=megabytes,
        help="for problems and completions in the page; beyond it, a stratified sample is kept "
        "(default: the study's report_megabytes)",
    )
    arguments.add_argument("--output", type=Path, required=True, help="HTML file to write")
    args = arguments.parse_args(argv)

    record = CallRecord("report.py", argv)
    study = study_from(args)
    if unknown := sorted(set(dict(args.problems)) - set(study.suites)):
        raise ConfigError(
            f"--problems: no suite {', '.join(unknown)} in the study; there are: "
            f"{', '.join(study.suites)}"
        )
    sources = Sources(args.study_dir, args.comparison, dict(args.problems), args.runs_dir)
    size = study.report_megabytes if args.max_megabytes is None else args.max_megabytes
    write_text(args.output, build_report(study, sources, int(size * 1e6)))
    if args.manifest is not None:
        record.write(args.manifest, PACKAGES, [args.output])
    log.info("%s: %.1f MB", args.output, args.output.stat().st_size / 1e6)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
