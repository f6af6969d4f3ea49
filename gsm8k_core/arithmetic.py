"""Embedded word problems in GSM8K's form, deterministic from a seed.

Five families of one and two steps, operands 2 to 10, multipliers 2 to 4. A question's operands
belong to one split alone: no test question is a train question with another name in it. Within a
split the same operands come often, worded with other names: a problem's `cluster` is its family
with its operands.

Train rows also hold a `demonstration`. A stated share of them follow a wrong plan with correct
arithmetic: imitation learns the wrong plans too, and reinforcement from the gold answers has
something to mend. That makes the dataset a testbed for methods, not a claim about GSM8K.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from gsm8k_core.config import ArithmeticDataset
from gsm8k_core.errors import DataError
from gsm8k_core.problems import Problem, gold_answer

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
THINGS = (
    "apples",
    "books",
    "coins",
    "cards",
    "eggs",
    "marbles",
    "pens",
    "shells",
    "stamps",
    "toys",
)
OPERANDS = range(2, 11)
MULTIPLIERS = range(2, 5)
SPLIT_SHARES = {"test": 0.10, "val": 0.05}
MAX_TRIES_PER_PROBLEM = 200

Operands = tuple[int, int, int]
Steps = list[tuple[int, str, int]]


@dataclass(frozen=True)
class Family:
    """One kind of problem: its wording, its operands (a, b, c), its right plan and a wrong one."""

    name: str
    questions: tuple[str, ...]
    operands: tuple[Operands, ...]
    right_plan: Callable[[int, int, int], Steps]
    wrong_plan: Callable[[int, int, int], Steps]


def _pairs(keep: Callable[[int, int], bool]) -> tuple[Operands, ...]:
    return tuple((a, b, 0) for a, b in itertools.product(OPERANDS, OPERANDS) if keep(a, b))


TRIPLES = tuple(itertools.product(OPERANDS, OPERANDS, MULTIPLIERS))

FAMILIES = (
    Family(
        "gain",
        (
            "{name} has {a} {things}. {name} finds {b} more. "
            "How many {things} does {name} have now?",
            "There are {a} {things} on a table. {name} adds {b} more. How many {things} are there?",
        ),
        _pairs(lambda a, b: a != b),
        lambda a, b, _c: [(a, "+", b)],
        lambda a, b, _c: [(max(a, b), "-", min(a, b))],
    ),
    Family(
        "loss",
        (
            "{name} has {a} {things}. {name} loses {b} of them. How many {things} are left?",
            "There are {a} {things} in a box. {name} takes {b} out. How many {things} are left?",
        ),
        _pairs(lambda a, b: a > b),
        lambda a, b, _c: [(a, "-", b)],
        lambda a, b, _c: [(a, "+", b)],
    ),
    Family(
        "bags_and_loose",
        (
            "{name} has {c} bags with {a} {things} in each, and {b} loose {things}. "
            "How many {things} does {name} have?",
            "{name} buys {c} boxes of {a} {things} and then {b} single {things}. "
            "How many {things} does {name} buy?",
        ),
        TRIPLES,
        lambda a, b, c: [(a, "*", c), (a * c, "+", b)],
        lambda a, b, c: [(a, "+", b), (a + b, "*", c)],
    ),
    Family(
        "both_in_each",
        (
            "{name} packs {c} boxes. Each box gets {a} red and {b} blue {things}. "
            "How many {things} are in the boxes?",
            "{name} has {c} friends. Each friend brings {a} old and {b} new {things}. "
            "How many {things} do they bring?",
        ),
        TRIPLES,
        lambda a, b, c: [(a, "+", b), (a + b, "*", c)],
        lambda a, b, c: [(a, "*", c), (a * c, "+", b)],
    ),
    Family(
        "gain_then_loss",
        (
            "{name} has {a} {things}. {name} finds {b} more and then gives away {c}. "
            "How many {things} are left?",
            "There are {a} {things} in a box. {name} puts {b} in and takes {c} out. "
            "How many {things} are in the box?",
        ),
        TRIPLES,
        lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
        lambda a, b, c: [(a, "+", b), (a + b, "+", c)],
    ),
)

RESULT = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
}


def worked_answer(steps: Steps, things: str) -> str:
    """A solution in GSM8K's form: `3 + 4 = <<3+4=7>>7 apples.` a line, then `#### 7`."""
    lines = []
    for left, operator, right in steps:
        result = RESULT[operator](left, right)
        mark = f"<<{left}{operator}{right}={result}>>"
        lines.append(f"{left} {operator} {right} = {mark}{result} {things}.")
    return "\n".join([*lines, f"#### {result}"])


def _operands_of(family: Family, split: str, seed: int) -> list[Operands]:
    """The operands of `family` that belong to `split`: a fixed shuffle, cut by SPLIT_SHARES."""
    shuffled = list(family.operands)
    random.Random(f"operands {seed} {family.name}").shuffle(shuffled)
    num_test = max(1, round(SPLIT_SHARES["test"] * len(shuffled)))
    num_val = max(1, round(SPLIT_SHARES["val"] * len(shuffled)))
    return {
        "test": shuffled[:num_test],
        "val": shuffled[num_test : num_test + num_val],
        "train": shuffled[num_test + num_val :],
    }[split]


def make_problems(settings: ArithmeticDataset, split: str, num_problems: int) -> list[Problem]:
    """`num_problems` distinct problems of one split, families in turn.

    Raises DataError when the families cannot word so many different questions.
    """
    generator = random.Random(f"problems {settings.seed} {split}")
    operands = {family.name: _operands_of(family, split, settings.seed) for family in FAMILIES}
    problems: list[Problem] = []
    seen: set[str] = set()
    for index in range(num_problems):
        family = FAMILIES[index % len(FAMILIES)]
        for _ in range(MAX_TRIES_PER_PROBLEM):
            a, b, c = generator.choice(operands[family.name])
            things = generator.choice(THINGS)
            question = generator.choice(family.questions).format(
                name=generator.choice(NAMES), things=things, a=a, b=b, c=c
            )
            if question not in seen:
                break
        else:
            raise DataError(
                f"arithmetic: no more than about {index} different {split} problems can be made; "
                f"num_{split} asks for {num_problems}"
            )
        seen.add(question)
        answer = worked_answer(family.right_plan(a, b, c), things)
        demonstration = None
        if split == "train":
            wrong = generator.random() < settings.wrong_plan_fraction
            plan = family.wrong_plan if wrong else family.right_plan
            demonstration = worked_answer(plan(a, b, c), things)
        problems.append(
            Problem(
                f"{split}-{index}",
                question,
                answer,
                gold_answer(answer),
                demonstration,
                cluster=f"{family.name} {a} {b} {c}",
            )
        )
    return problems


def make_arithmetic(settings: ArithmeticDataset) -> dict[str, list[Problem]]:
    """All three splits. Wrong plans may by chance reach the gold answer; see `docs/design.md`."""
    return {
        "train": make_problems(settings, "train", settings.num_train),
        "val": make_problems(settings, "val", settings.num_val),
        "test": make_problems(settings, "test", settings.num_test),
    }
