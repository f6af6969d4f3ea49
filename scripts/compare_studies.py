"""Compare two finished studies, yesterday's and today's: what changed, and is it more than chance?

Needs only the two folders of runs: no models, no GPU. Every model × method × suite that both have
is paired by seed and problem; writes studies.csv (full precision) and studies.md (to be read: the
table, every setting, version and commit that differs, and what only one study has).

    python scripts/compare_studies.py --old artifacts/experiments/default \\
        --new /scratch/today/artifacts/experiments/default --output-dir /tmp/changes

With --fail-if-worse the exit code is 3 if a cell got significantly worse (corrected p below
1 − confidence), for automated checks; 0 otherwise, 1 for an error. What was trained with one seed,
or shares only one with the other study, is never called better or worse: two runs of the same
settings with different seeds may differ significantly over the problems. Take three seeds or more.
Where both studies sample, differences of pass@1 stand beside those of accuracy; --measure says
which of the two is to decide, for both would be a test too many.
"""

from __future__ import annotations

import logging
from pathlib import Path

from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import write_text
from gsm8k_core.studies import ONE_SEED, compare_studies, to_markdown
from gsm8k_core.tables import MEASURES

log = logging.getLogger("compare_studies")

EXIT_WORSE = 3


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--old", type=Path, required=True, help="folder with a study's runs")
    arguments.add_argument("--new", type=Path, required=True, help="folder with the other's runs")
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    arguments.add_argument("--confidence", type=float, default=0.95, help="level, default: 0.95")
    arguments.add_argument(
        "--measure",
        choices=list(MEASURES),
        default="accuracy",
        help="what decides that a cell is better or worse: accuracy, greedy where both studies "
        "decode greedily, or pass@1, the mean over samples (default: accuracy)",
    )
    arguments.add_argument(
        "--fail-if-worse",
        action="store_true",
        help="exit with 3 if a cell is significantly worse; not for one seed of a trained cell",
    )
    args = arguments.parse_args(argv)
    if not 0.5 < args.confidence < 1:
        raise ConfigError(
            f"--confidence: expected a level above 0.5 and below 1, found {args.confidence}"
        )

    found = compare_studies(args.old, args.new, args.confidence, args.measure)
    write_text(args.output_dir / "studies.csv", found.rows.write_csv())
    text = to_markdown(found, args.old, args.new, args.confidence)
    write_text(args.output_dir / "studies.md", text)
    worse = found.rows.filter(found.rows["verdict"] == "worse")
    better = found.rows.filter(found.rows["verdict"] == "better")
    for row in worse.iter_rows(named=True):
        log.warning(
            "%s / %s / %s got worse by %.1f points",
            row["model"],
            row["method"],
            row["suite"],
            -100 * row[f"delta{MEASURES[args.measure]}"],
        )
    for line in found.left_out:
        log.warning("left out: %s", line)
    without = found.rows.filter(found.rows["caution"] == ONE_SEED).height
    if without:
        log.warning("rows without a verdict: %d; one seed says nothing of another", without)
    log.info(
        "%s: %d rows compared, %d better, %d worse, %d left out",
        args.output_dir / "studies.md",
        found.rows.height,
        better.height,
        worse.height,
        len(found.left_out),
    )
    compared = found.rows.filter(found.rows[f"p_value{MEASURES[args.measure]}"].is_not_null())
    if args.fail_if_worse and compared.is_empty():
        samples = " with samples" if found.rows.height else ""
        raise DataError(
            f"--fail-if-worse: the two studies have nothing in common{samples} to compare"
        )
    return EXIT_WORSE if args.fail_if_worse and worse.height else 0


if __name__ == "__main__":
    leave(run_script(main))
