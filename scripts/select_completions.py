"""Keep the correct completions of a round: the demonstrations of expert iteration.

Keeps at most `max_kept_per_prompt` distinct completions of each problem that are right by the
method's `grading` and ended by themselves, in the order they were sampled. The sampled token ids
are kept: SFT trains on them, not on re-tokenized text.

    python scripts/select_completions.py --model-name tiny-qwen2 --method rft --seed 0 \\
        --completions /tmp/rft/round1/completions.jsonl --data artifacts/arithmetic/train.jsonl \\
        --output /tmp/rft/round1/demonstrations.jsonl
"""

from __future__ import annotations

import logging

from gsm8k_core.cli import leave, run_script, run_settings_from, selection_parser
from gsm8k_core.config import ExpertIterationMethod
from gsm8k_core.errors import DataError
from gsm8k_core.files import write_jsonl
from gsm8k_core.problems import read_problems
from gsm8k_core.selection import graded_completions

log = logging.getLogger("select_completions")


def main(argv: list[str] | None = None) -> int:
    args = selection_parser(__doc__, "demonstrations").parse_args(argv)

    run_settings = run_settings_from(args)
    settings = run_settings.of_kind(ExpertIterationMethod)
    questions = {problem.id: problem.question for problem in read_problems(args.data)}
    graded = graded_completions(
        args.completions, questions, settings.grading, run_settings.prompt.answer_marker
    )
    rows = [
        {
            "problem_id": problem_id,
            "question": questions[problem_id],
            "completion": row["completion"],
            "response_ids": row["token_ids"],
        }
        for problem_id, (right, _) in graded.items()
        for row in right[: settings.max_kept_per_prompt]
    ]
    if not rows:
        raise DataError(
            f"{args.completions}: no completion of {len(graded)} problems is correct, so there is "
            "nothing to train on; start from a stronger parent or sample more"
        )
    write_jsonl(args.output, rows)
    num_solved = sum(bool(right) for right, _ in graded.values())
    log.info("kept %d completions; %d of %d problems solved", len(rows), num_solved, len(graded))
    return 0


if __name__ == "__main__":
    leave(run_script(main))
