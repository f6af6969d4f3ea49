"""Compare the runs of a study: one row per model, method and suite.

Reads the grades and summaries below --study-dir and writes to --output-dir: comparison.csv and
comparison.parquet (full precision), comparison.md and comparison.html (rounded, to be read),
pass_at_k.csv, and pairs.csv, which has the differences between every two methods. Intervals and
p-values take both seeds and problems as random, and all differences are paired by both (see
gsm8k_core/metrics.py). Rows are flagged if their settings, engine, code or environment differ from
what they are compared with. Runs that graded different problems are refused. Within a call of
snakemake, so are runs that were made with other settings than its config asks for. Where W&B is on,
it gets the table too. --manifest writes a record of this call: command line, commit, versions,
hashes.

    python scripts/compare.py --config config.yaml \\
        --study-dir artifacts/experiments/default --output-dir artifacts/results/default

The workflow gives the study itself instead of `--config`, as JSON: names, seeds and parents.
"""

from __future__ import annotations

from pathlib import Path

from gsm8k_core.cli import leave, run_script, study_from, study_parser
from gsm8k_core.layout import Layout
from gsm8k_core.manifest import CallRecord, invocation_config
from gsm8k_core.records import check_settings
from gsm8k_core.tables import build_comparison, write_comparison
from gsm8k_core.tracking import TrackedRun, new_run_id, start_tracker

PACKAGES = ("numpy", "scipy", "polars")


def main(argv: list[str] | None = None) -> int:
    arguments = study_parser(__doc__)
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    args = arguments.parse_args(argv)

    record = CallRecord("compare.py", argv)
    study = study_from(args)
    if (asked := invocation_config()) is not None:
        check_settings(Layout(asked))
    tables = build_comparison(study, args.study_dir)
    written = write_comparison(tables, args.output_dir)
    if args.manifest is not None:
        record.write(args.manifest, PACKAGES, written)
    tracked = TrackedRun(new_run_id(), "comparison", study.name, study.model_dump(mode="json"))
    tracker = start_tracker(args.output_dir, tracked)
    if tracker is not None:
        tracker.log_table("comparison", tables.comparison.columns, tables.comparison.rows())
        tracker.finish({})
    return 0


if __name__ == "__main__":
    leave(run_script(main))
