"""Problems and their JSONL form, the same for every dataset.

A row is `{"id", "question", "answer", "gold"}`, as GSM8K has it: `answer` is a worked solution with
calculator marks `<<48/2=24>>`, ended by `#### 24`; `gold` is the number after that mark. A row may
hold a `demonstration`: the worked solution that SFT imitates where it differs from `answer`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl, write_jsonl

GOLD = re.compile(r"####[ \t]*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    answer: str
    gold: str
    demonstration: str | None = None

    def to_row(self) -> Json:
        row = {"id": self.id, "question": self.question, "answer": self.answer, "gold": self.gold}
        return row if self.demonstration is None else {**row, "demonstration": self.demonstration}


def gold_answer(answer: str, where: str = "answer") -> str:
    """The number after the final `####`, without thousands separators.

    Raises DataError that begins with `where` when there is none: a problem without a gold answer
    cannot be graded, and grading it as wrong would be a lie.
    """
    match = GOLD.search(answer)
    if match is None:
        raise DataError(f"{where}: no '#### <number>' at the end of the answer: {answer[-60:]!r}")
    return match.group(1).replace(",", "")


def problem_from_row(row: Json, where: str, default_id: str | None = None) -> Problem:
    """Build a Problem from a JSONL row; `where` (file and row) begins every error."""
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise DataError(f"{where}: '{key}' is missing or not a text")
    problem_id = row.get("id", default_id)
    if not isinstance(problem_id, str):
        raise DataError(f"{where}: 'id' is missing or not a text")
    gold = gold_answer(row["answer"], where)
    if row.get("gold", gold) != gold:
        raise DataError(f"{where}: 'gold' is {row['gold']!r} but the answer ends in {gold!r}")
    demonstration = row.get("demonstration")
    if demonstration is not None and not isinstance(demonstration, str):
        raise DataError(f"{where}: 'demonstration' is not a text")
    return Problem(problem_id, row["question"], row["answer"], gold, demonstration)


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Read a problems JSONL. Raises DataError that names file and row for every fault."""
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, row in enumerate(iter_jsonl(path), start=1):
        if limit is not None and len(problems) == limit:
            break
        problem = problem_from_row(row, f"{path}, row {number}")
        if problem.id in seen:
            raise DataError(f"{path}, row {number}: id {problem.id!r} stands twice")
        seen.add(problem.id)
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: holds no problem")
    return problems


def write_problems(path: Path, problems: list[Problem]) -> None:
    write_jsonl(path, (problem.to_row() for problem in problems))
