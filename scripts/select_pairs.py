"""Pair correct with incorrect completions of the same problem: the preferences of offline DPO.

Makes at most `max_pairs_per_prompt` pairs of distinct completions per problem, in the order they
were sampled. The chosen one is right by the method's `grading` and ended by itself; the rejected
one is wrong.

    python scripts/select_pairs.py --model-name tiny-qwen2 --method dpo --seed 0 \\
        --completions /tmp/dpo/round1/completions.jsonl --data artifacts/arithmetic/train.jsonl \\
        --output /tmp/dpo/round1/pairs.jsonl
"""

from __future__ import annotations

import logging

from gsm8k_core.cli import leave, run_script, run_settings_from, selection_parser
from gsm8k_core.config import DpoMethod
from gsm8k_core.errors import DataError
from gsm8k_core.files import write_jsonl
from gsm8k_core.problems import read_problems
from gsm8k_core.selection import graded_completions

log = logging.getLogger("select_pairs")


def main(argv: list[str] | None = None) -> int:
    args = selection_parser(__doc__, "pairs").parse_args(argv)

    run_settings = run_settings_from(args)
    settings = run_settings.of_kind(DpoMethod)
    questions = {problem.id: problem.question for problem in read_problems(args.data)}
    graded = graded_completions(
        args.completions, questions, settings.grading, run_settings.prompt.answer_marker
    )
    rows = [
        {
            "problem_id": problem_id,
            "question": questions[problem_id],
            "chosen_ids": chosen["token_ids"],
            "rejected_ids": rejected["token_ids"],
        }
        for problem_id, (right, wrong) in graded.items()
        for chosen, rejected in list(zip(right, wrong, strict=False))[
            : settings.max_pairs_per_prompt
        ]
    ]
    if not rows:
        raise DataError(
            f"{args.completions}: no problem has both a correct and an incorrect completion, so "
            "there is nothing to prefer; sample more completions per prompt"
        )
    write_jsonl(args.output, rows)
    log.info("%d pairs of %d problems", len(rows), len({row["problem_id"] for row in rows}))
    return 0


if __name__ == "__main__":
    leave(run_script(main))
