"""Make a dataset of collected reasoning traces: verify, filter, deduplicate, write demonstrations.

An answer is kept if it is correct (against the problem's gold answer), has reasoning, is neither
too short nor too long, and does not repeat an earlier one. Each kept trace becomes a separate
problem in `<output-dir>/train.jsonl` whose demonstration is the trace in the think format, so SFT
reads the file like that of any dataset; `manifest.json` beside it says what was left out and why.

    python scripts/select_traces.py --traces r1_traces --data artifacts/gsm8k/train.jsonl \\
        --answers artifacts/r1_traces/collected/answers.jsonl --output-dir artifacts/r1_traces
"""

from __future__ import annotations

import logging
from pathlib import Path

from gsm8k_core.cli import leave, run_script, traces_parser, traces_settings_from
from gsm8k_core.config import Config, TraceDatasetSettings
from gsm8k_core.errors import DataError
from gsm8k_core.files import sha256_file, write_json
from gsm8k_core.manifest import provenance
from gsm8k_core.problems import read_problems, write_problems
from gsm8k_core.traces import select_traces

log = logging.getLogger("select_traces")


def main(argv: list[str] | None = None) -> int:
    arguments = traces_parser(__doc__)
    arguments.add_argument("--answers", type=Path, required=True, help="as collected, JSONL")
    arguments.add_argument("--data", type=Path, required=True, help="the problems asked, JSONL")
    arguments.add_argument("--output-dir", type=Path, required=True, help="the dataset's folder")
    args = arguments.parse_args(argv)

    settings: TraceDatasetSettings = traces_settings_from(
        args, TraceDatasetSettings, Config.trace_dataset_settings
    )
    traces, counts = select_traces(args.answers, read_problems(args.data), settings)
    fates = ", ".join(f"{name} {count}" for name, count in counts.items())
    if not traces:
        raise DataError(f"{args.answers}: no trace is left to learn from ({fates})")
    train = args.output_dir / "train.jsonl"
    write_problems(train, traces)
    manifest = {
        "dataset": settings.name,
        "source": {"answers": str(args.answers), "sha256": sha256_file(args.answers)},
        "settings": settings.model_dump(mode="json"),
        "counts": counts,
        "train": {"num_problems": len(traces), "sha256": sha256_file(train)},
    }
    write_json(args.output_dir / "manifest.json", {**manifest, "provenance": provenance()})
    log.info("%s: %d traces (%s)", train, len(traces), fates)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
