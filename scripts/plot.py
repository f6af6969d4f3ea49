"""Draw the figures of a study: accuracy by method, accuracy against cost, reward over training.

Reads the comparison that compare.py wrote, the summaries below --study-dir (for single seeds) and
the training logs; writes accuracy, cost and reward, each as .svg and .png. For a study without
rewards, reward.* shows the training loss, and the margin of what learns from pairs; for one that
trains nothing, it and cost.* say so.
--manifest writes a record of this call: command line, commit, versions, hashes.

    python scripts/plot.py --config config.yaml --study-dir artifacts/experiments/default \\
        --comparison artifacts/results/default/comparison.parquet \\
        --output-dir artifacts/results/default/figures
"""

from __future__ import annotations

from pathlib import Path

from gsm8k_core.cli import leave, run_script, study_from, study_parser
from gsm8k_core.figures import plot_accuracy, plot_cost, plot_reward, save_figure
from gsm8k_core.manifest import CallRecord
from gsm8k_core.tables import read_comparison

PACKAGES = ("numpy", "scipy", "polars", "altair", "vl-convert-python")


def main(argv: list[str] | None = None) -> int:
    arguments = study_parser(__doc__)
    arguments.add_argument(
        "--comparison", type=Path, required=True, help="comparison.parquet or comparison.csv"
    )
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    args = arguments.parse_args(argv)

    record = CallRecord("plot.py", argv)
    study = study_from(args)
    comparison = read_comparison(args.comparison)
    figures = {
        "accuracy": plot_accuracy(study, args.study_dir, comparison),
        "cost": plot_cost(study, comparison),
        "reward": plot_reward(study, args.study_dir),
    }
    for name, figure in figures.items():
        save_figure(figure, *(args.output_dir / f"{name}.{kind}" for kind in ("svg", "png")))
    if args.manifest is not None:
        files = [f"{name}.{kind}" for name in figures for kind in ("svg", "png")]
        record.write(args.manifest, PACKAGES, [args.output_dir / file for file in files])
    return 0


if __name__ == "__main__":
    leave(run_script(main))
