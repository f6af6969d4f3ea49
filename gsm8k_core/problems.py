"""Problems and their JSONL form, the same for every dataset.

A row is `{"id", "question", "answer", "gold"}`, as GSM8K has it: `answer` is a worked solution with
calculator marks `<<48/2=24>>`, ended by `#### 24`; `gold` is the number after that mark. A row may
hold a `demonstration`: the worked solution that SFT imitates where it differs from `answer`; and
`examples`, a list of `{"question", "answer"}`: the worked examples that a few-shot prompt shows
before this problem, where they differ from problem to problem. A `cluster` names what a generated
problem was made from, such as its template: problems that share one are no independent draws, and
intervals take them as one (gsm8k_core/metrics.py).
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl, write_jsonl

log = logging.getLogger(__name__)

GOLD = re.compile(r"####[ \t]*(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\s*$")


@dataclass(frozen=True)
class WorkedExample:
    """A question with its solution, as a few-shot prompt shows it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Problem:
    """A problem, as a row of a problems JSONL holds it.

    - `id`: of its own, among the problems of a file;
    - `question`: as it is asked, without a prompt around it;
    - `answer`: a worked solution with calculator marks `<<48/2=24>>`, ended by `#### 24`;
    - `gold`: the number after `####`, as text without thousands separators;
    - `demonstration`: what SFT imitates where that is not `answer`;
    - `examples`: worked ones that a few-shot prompt shows before it;
    - `cluster`: the same for problems made from one template, which are no independent draws; None:
      by itself.
    """

    id: str
    question: str
    answer: str
    gold: str
    demonstration: str | None = None
    examples: tuple[WorkedExample, ...] = ()
    cluster: str | None = None

    def to_row(self) -> Json:
        """What `problem_from_row` reads; without the fields that the problem does not have."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}


KEYS = {field.name for field in fields(Problem)}


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
    question = _filled_text(row.get("question"), f"{where}: 'question'")
    answer = checked_text(row.get("answer"), f"{where}: 'answer'")
    if "id" not in row and default_id is None:
        raise DataError(
            f"{where}: 'id' is missing; use the file that scripts/prepare_data.py makes of this one"
        )
    problem_id = _filled_text(row.get("id", default_id), f"{where}: 'id'")
    gold = gold_answer(answer, where)
    if row.get("gold", gold) != gold:
        raise DataError(f"{where}: 'gold' is {row['gold']!r} but the answer ends in {gold!r}")
    demonstration, cluster = (
        None if row.get(key) is None else _filled_text(row[key], f"{where}: '{key}'")
        for key in ("demonstration", "cluster")
    )
    examples = worked_examples(row.get("examples", []), f"{where}: 'examples'")
    return Problem(problem_id, question, answer, gold, demonstration, examples, cluster)


def worked_examples(rows: Any, where: str) -> tuple[WorkedExample, ...]:
    """Worked examples from a list of `{"question", "answer"}`; `where` begins every error."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{where} should be a list of objects with question and answer")
    return tuple(
        WorkedExample(
            *(
                checked_text(row.get(key), f"{where}[{index}].{key}")
                for key in ("question", "answer")
            )
        )
        for index, row in enumerate(rows)
    )


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is a text that UTF-8 can hold (JSON can escape half a surrogate pair)."""
    if not isinstance(value, str):
        raise DataError(f"{what} is missing or not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair at character {error.start}") from None
    return value


def _filled_text(value: Any, what: str) -> str:
    text = checked_text(value, what)
    if not text.strip():
        raise DataError(f"{what} is empty")
    return text


def warn_of_misspelt(keys: Iterable[str], where: Path | str) -> None:
    """Warn of keys that look like one that a row may have, mistyped; others are the user's own."""
    for key in sorted({*keys} - KEYS):
        if close := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85):
            log.warning("%s: '%s' is not read; did you mean '%s'?", where, key, close[0])


def read_problems(path: Path | str) -> list[Problem]:
    """Read a problems JSONL. Raises DataError that names file and row of the first fault."""
    problems: list[Problem] = []
    seen: set[str] = set()
    keys: set[str] = set()
    for number, row in enumerate(iter_jsonl(path), start=1):
        keys |= row.keys()
        problem = problem_from_row(row, f"{path}, row {number}")
        if problem.id in seen:
            raise DataError(f"{path}, row {number}: id {problem.id!r} occurs twice")
        seen.add(problem.id)
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: holds no problem")
    warn_of_misspelt(keys, path)
    return problems


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Write a JSONL file that `read_problems` reads, atomically."""
    write_jsonl(path, (problem.to_row() for problem in problems))
