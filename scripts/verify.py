"""Recheck the hashes of a finished study: what has changed, what is missing, what is new.

Every file of a study is hashed when it finishes (artifacts/results/NAME/SHA256SUMS): completions,
grades, metrics, weights, tables, figures, logs, benchmarks, W&B's files, the manifests of its
calls, the datasets, traces and starting weights that they came from. Not covered are checkpoints of
unfinished runs (state/), hidden files, and Snakemake's own log, which ends after the record
(gsm8k_core/records.py). Weights that the study does not keep (`study.keep_models`) do not count as
a difference, nor does what `wandb sync` adds. Exits with 1 if anything differs. Run it in the
folder that holds artifacts/; `eval` leaves the same record in its own folder.

    python scripts/verify.py --study default
    python scripts/verify.py --run artifacts/runs/20261123T054450Z_2fbb610d
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.errors import DataError
from gsm8k_core.files import encodable, read_json
from gsm8k_core.layout import ARTIFACTS
from gsm8k_core.progress import progress
from gsm8k_core.records import SUMS, verify_sums


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    which = arguments.add_mutually_exclusive_group(required=True)
    which.add_argument("--study", metavar="NAME", help="a study that has finished")
    which.add_argument("--run", type=Path, metavar="FOLDER", help="the folder of an eval")
    args = arguments.parse_args(argv)

    # As the record names its files: relative to this folder.
    folder = Path(os.path.relpath(args.run or Path(ARTIFACTS) / "results" / args.study))
    if args.run and not (folder / SUMS).exists():
        raise DataError(f"{folder / SUMS}: no such file; an eval writes it when it finishes")
    differences = verify_sums(folder / SUMS, lambda names: progress(list(names), "hashing"))
    for what in ("changed", "missing", "new"):
        for name in getattr(differences, what):
            sys.stdout.write(f"{what:8}{encodable(name)}\n")
    if differences:
        sys.stdout.write(
            f"{folder}: {len(differences.changed)} changed, {len(differences.missing)} missing, "
            f"{len(differences.new)} new; {differences.num_checked} recorded\n"
        )
        return 1
    sys.stdout.write(f"{folder}: all {differences.num_checked} files are as recorded\n")
    if args.study and (dropped := read_json(folder / "provenance.json").get("dropped_weights")):
        count = "1 run" if len(dropped) == 1 else f"{len(dropped)} runs"
        sys.stdout.write(f"dropped: the weights of {count}, as study.keep_models says\n")
    return 0


if __name__ == "__main__":
    leave(run_script(main))
