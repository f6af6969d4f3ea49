"""Keep the correct completions of a round: the demonstrations of expert iteration.

Of each problem at most `max_kept_per_prompt` distinct completions whose strict grade is right and
that ended by themselves, in the order they were sampled. The sampled token ids are kept: SFT trains
on them, not on re-tokenized text.

    python scripts/select_completions.py --model-name tiny-qwen2 --method rft --seed 0 \\
        --completions /tmp/rft/round1/completions.jsonl --data artifacts/arithmetic/train.jsonl \\
        --output /tmp/rft/round1/demonstrations.jsonl
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from gsm8k_core.answers import is_correct
from gsm8k_core.cli import add_run_arguments, parser, run_script, run_settings_from
from gsm8k_core.config import ExpertIterationMethod
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import Json, iter_jsonl, write_jsonl
from gsm8k_core.problems import read_problems

log = logging.getLogger("select_completions")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_run_arguments(arguments)
    arguments.add_argument("--completions", type=Path, required=True, help="of train problems")
    arguments.add_argument("--data", type=Path, required=True, help="train problems, JSONL")
    arguments.add_argument("--output", type=Path, required=True, help="demonstrations, JSONL")
    args = arguments.parse_args(argv)

    run = run_settings_from(args)
    settings = run.method_settings
    if not isinstance(settings, ExpertIterationMethod):
        raise ConfigError(f"method {run.method} is of kind {settings.kind}, not expert_iteration")
    questions = {problem.id: problem.question for problem in read_problems(args.data)}
    kept: dict[str, list[Json]] = {}
    num_completions = num_correct = 0
    for number, row in enumerate(iter_jsonl(args.completions), start=1):
        num_completions += 1
        if row["problem_id"] not in questions:
            raise DataError(
                f"{args.completions}, row {number}: no problem {row['problem_id']} in {args.data}"
            )
        right = is_correct(row["completion"], row["gold"], "strict", run.prompt.answer_marker)
        if not right or row["finish_reason"] != "stop":
            continue
        num_correct += 1
        of_problem = kept.setdefault(row["problem_id"], [])
        known = {other["completion"] for other in of_problem}
        if len(of_problem) < settings.max_kept_per_prompt and row["completion"] not in known:
            of_problem.append(
                {
                    "problem_id": row["problem_id"],
                    "question": questions[row["problem_id"]],
                    "completion": row["completion"],
                    "response_ids": row["token_ids"],
                }
            )
    rows = [row for group in kept.values() for row in group]
    if not rows:
        raise DataError(
            f"{args.completions}: none of {num_completions} completions is correct, so there is "
            "nothing to train on; start from a stronger parent or sample more"
        )
    write_jsonl(args.output, rows)
    log.info(
        "kept %d distinct of %d correct of %d completions, for %d problems",
        len(rows),
        num_correct,
        num_completions,
        len(kept),
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
