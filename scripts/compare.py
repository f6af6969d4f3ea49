"""Compare the runs of a study: one row per model, method and suite.

Reads the grades and summaries below --study-dir and writes comparison.csv, comparison.parquet (full
precision) and comparison.md (rounded, to be read) to --output-dir. Intervals and p-values take both
seeds and problems as random, and differences to the parent are paired by both (see
gsm8k_core/metrics.py). Refuses to compare runs that graded different problems.

    python scripts/compare.py \\
        --study-dir artifacts/experiments/demo --output-dir artifacts/results/demo \\
        --study '{"name": "demo", "models": ["tiny"], "methods": ["base", "sft"],
                  "suites": ["test"], "seeds_of": {"base": [0], "sft": [0, 1, 2]},
                  "parent_of": {"base": null, "sft": "base"},
                  "chains": {"base": ["base"], "sft": ["base", "sft"]}, "confidence": 0.95}'
"""

from __future__ import annotations

import sys
from pathlib import Path

from gsm8k_core.cli import parser, run_script, settings_from
from gsm8k_core.tables import Study, build_comparison, write_comparison


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--study", required=True, help="the study, as JSON or a file with it")
    arguments.add_argument("--study-dir", type=Path, required=True, help="folder with the runs")
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    args = arguments.parse_args(argv)

    study: Study = settings_from(args.study, Study)
    write_comparison(build_comparison(study, args.study_dir), args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
