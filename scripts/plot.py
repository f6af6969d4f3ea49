"""Draw the figures of a study: accuracy by method, accuracy against cost, reward over training.

Reads the comparison that compare.py wrote, the summaries below --study-dir (for single seeds) and
the training logs; writes accuracy, cost and reward, each as .svg and .png. A study without rewards
shows the training loss in reward.*, one that trains nothing says so there and in cost.*.

    python scripts/plot.py --study study.json --study-dir artifacts/experiments/demo \\
        --comparison artifacts/results/demo/comparison.parquet \\
        --output-dir artifacts/results/demo/figures

where study.json is the text that compare.py takes as --study.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gsm8k_core.cli import parser, run_script, settings_from
from gsm8k_core.config import Comparison
from gsm8k_core.plots import plot_accuracy, plot_cost, plot_reward, save_figure
from gsm8k_core.tables import read_comparison


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--study", required=True, help="the study, as JSON or a file with it")
    arguments.add_argument("--study-dir", type=Path, required=True, help="folder with the runs")
    arguments.add_argument(
        "--comparison", type=Path, required=True, help="comparison.parquet or comparison.csv"
    )
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    args = arguments.parse_args(argv)

    study: Comparison = settings_from(args.study, Comparison)
    comparison = read_comparison(args.comparison)
    save_figure(plot_accuracy(study, args.study_dir, comparison), args.output_dir, "accuracy")
    save_figure(plot_cost(study, comparison), args.output_dir, "cost")
    save_figure(plot_reward(study, args.study_dir), args.output_dir, "reward")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
