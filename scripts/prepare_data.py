"""Write a dataset as train.jsonl, val.jsonl and test.jsonl with a manifest.

GSM8K comes from a local folder ($GSM8K_DIR or datasets.<name>.path), else from the hub at a pinned
revision, else from GitHub at a pinned commit; its content digest must be the pinned one.
GSM8K-Platinum and the worked examples of lm-evaluation-harness are made from it. `arithmetic` and
`gsm_symbolic` are generated from their seed.

    python scripts/prepare_data.py --dataset arithmetic --output-dir /tmp/arithmetic
    GSM8K_DIR=~/gsm8k python scripts/prepare_data.py --dataset gsm8k --output-dir /tmp/gsm8k

Do not write into artifacts/ where a study is: for newer data there, snakemake trains it again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from gsm8k_core.arithmetic import make_arithmetic
from gsm8k_core.cli import (
    add_settings_arguments,
    check_known,
    config_from,
    given_settings,
    leave,
    parser,
    run_script,
)
from gsm8k_core.config import (
    ArithmeticDataset,
    DatasetSettings,
    GsmSymbolicDataset,
)
from gsm8k_core.data import content_digest, make_gsm8k
from gsm8k_core.files import sha256_file, write_json
from gsm8k_core.manifest import provenance
from gsm8k_core.problems import write_problems
from gsm8k_core.symbolic import make_symbolic

log = logging.getLogger("prepare_data")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--dataset", required=True, help="its name (without --settings, one of the config)"
    )
    add_settings_arguments(arguments)
    arguments.add_argument("--output-dir", type=Path, required=True, help="the dataset's folder")
    args = arguments.parse_args(argv)

    settings = given_settings(args, DatasetSettings)
    if settings is None:
        datasets = config_from(args).datasets
        check_known("--dataset", args.dataset, datasets)
        settings = datasets[args.dataset]

    if isinstance(settings, ArithmeticDataset):
        problems, source = make_arithmetic(settings), "generated"
    elif isinstance(settings, GsmSymbolicDataset):
        problems, source = make_symbolic(settings)
    else:
        problems, source = make_gsm8k(settings)

    manifest: dict[str, object] = {
        "dataset": args.dataset,
        "source": source,
        "settings": settings.model_dump(mode="json"),
    }
    for split, rows in problems.items():
        path = args.output_dir / f"{split}.jsonl"
        write_problems(path, rows)
        # Of rows as GSM8K has them, without ids: that of its test split is the pinned one.
        manifest[split] = {
            "num_problems": len(rows),
            "content_digest": content_digest(
                [{**problem.to_row(), "id": None} for problem in rows]
            ),
            "sha256": sha256_file(path),
        }
        log.info("%s: %d problems", path, len(rows))
    write_json(args.output_dir / "manifest.json", {**manifest, "provenance": provenance()})
    return 0


if __name__ == "__main__":
    leave(run_script(main))
