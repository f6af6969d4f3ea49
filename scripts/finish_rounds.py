"""Make a run of expert iteration look like any other: its last model, and all rounds' records.

The rounds lie below `--run-dir`, as `round1`, `round2`, …

    python scripts/finish_rounds.py --rounds 1 --run-dir /tmp/rft
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from gsm8k_core.cli import leave, parser, positive, run_script
from gsm8k_core.files import (
    Json,
    atomic_path,
    drop_finished,
    iter_jsonl,
    link_or_copy,
    read_json,
    write_json,
    write_jsonl,
)
from gsm8k_core.manifest import attempts_record
from gsm8k_core.records import sampling_cost

log = logging.getLogger("finish_rounds")
CUMULATIVE = ("step", "num_tokens_total", "seconds_total")
SUMMED = ("num_steps", "num_updates", "num_tokens", "seconds_training")
VALIDATING = "seconds_validating"


def steps_of(rounds: list[Path]) -> Iterator[Json]:
    """The training logs of all rounds as one: steps, tokens and seconds are counted through.

    The start of a later round would be a second row of the step at which the one before it ended.
    """
    before = dict.fromkeys(CUMULATIVE, 0)
    for number, folder in enumerate(rounds, start=1):
        so_far = before
        for row in iter_jsonl(folder / "train" / "metrics.jsonl"):
            counted = {key: round(before[key] + row[key], 3) for key in CUMULATIVE if key in row}
            so_far = so_far | counted
            if row["step"] > 0 or number == 1:
                yield {**row, **counted, "round": number}
        before = so_far


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--run-dir", type=Path, required=True, help="folder with round1, …")
    # To be said: folders of a study that once had more rounds may still be there.
    arguments.add_argument("--rounds", type=positive, required=True, help="how many of them count")
    args = arguments.parse_args(argv)
    rounds = [args.run_dir / f"round{number}" for number in range(1, args.rounds + 1)]
    for folder in rounds:
        drop_finished(folder / "model")

    summaries = [read_json(folder / "train" / "summary.json") for folder in rounds]
    sampled = [read_json(folder / "completions.stats.json") for folder in rounds]
    summary = {
        **summaries[-1],
        **{key: sum(one[key] for one in summaries) for key in SUMMED},
        # Rounds of older commits counted it among the seconds of training.
        VALIDATING: sum(one.get(VALIDATING, 0.0) for one in summaries),
        "round": 0,
        "num_rounds": len(rounds),
        "num_examples": sum(one["num_examples"] for one in summaries),
        "peak_memory_mb": max(one["peak_memory_mb"] or 0 for one in [*summaries, *sampled]),
        **sampling_cost(sampled),
        **attempts_record([row for one in summaries for row in one.get("attempts", [])]),
    }
    if best := summary.get("best_validation"):
        steps_before = sum(one["num_steps"] for one in summaries[:-1])
        summary["best_validation"] = {**best, "step": steps_before + best["step"]}
    # What a round samples is part of what training costs, as GRPO's rollouts are.
    summary["seconds_training"] = round(
        summary["seconds_training"] + summary["seconds_sampling"], 3
    )
    write_jsonl(args.run_dir / "train" / "metrics.jsonl", steps_of(rounds))
    write_json(args.run_dir / "train" / "summary.json", summary)
    settings = read_json(rounds[-1] / "settings.json")
    settings["method_settings"]["rounds"] = args.rounds  # no single round depends on it
    write_json(args.run_dir / "settings.json", settings)
    with atomic_path(args.run_dir / "model") as temporary:
        shutil.copytree(
            rounds[-1] / "model",
            temporary,
            copy_function=link_or_copy,
            ignore=shutil.ignore_patterns(".snakemake_timestamp"),
        )
    return 0


if __name__ == "__main__":
    leave(run_script(main))
