"""From sampled completions of train problems to what is learned from them."""

from __future__ import annotations

from pathlib import Path

from gsm8k_core.answers import Marker
from gsm8k_core.config import RewardGrade
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, drop_partials, iter_jsonl, required
from gsm8k_core.grading import is_right


def graded_completions(
    path: Path, questions: dict[str, str], grading: RewardGrade, marker: Marker
) -> dict[str, tuple[list[Json], list[Json]]]:
    """Distinct completions of each problem: the right ones that ended, and the wrong ones.

    Right is what is right by `grading`. In the order of the file; a text that was sampled twice
    counts once. `questions` by problem id.
    Raises DataError that names the row of a problem that is not among them, or that lacks a key.
    With all read, what generate.py has kept of them for a rejection goes.
    """
    graded: dict[str, tuple[list[Json], list[Json]]] = {}
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(iter_jsonl(path), start=1):
        where = f"{path}, row {number}"
        problem_id, text, gold, finish_reason = (
            required(row, key, str, where)
            for key in ("problem_id", "completion", "gold", "finish_reason")
        )
        if problem_id not in questions:
            raise DataError(f"{where}: no problem {problem_id} in the data")
        right, wrong = graded.setdefault(problem_id, ([], []))
        if (problem_id, text) in seen:
            continue
        if not is_right(text, gold, grading, marker):
            wrong.append(row)
        elif finish_reason == "stop":
            right.append(row)
        else:
            continue  # cut short: the same text may yet come with its end
        seen.add((problem_id, text))
    drop_partials(path)
    return graded
