"""Embedded word problems: repeatable, right, with splits that share no operands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gsm8k_core.arithmetic import FAMILIES, make_arithmetic, make_problems, worked_answer
from gsm8k_core.config import ArithmeticDataset
from gsm8k_core.data import content_digest
from gsm8k_core.errors import DataError
from gsm8k_core.problems import Problem, gold_answer

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(\d+) ([+*-]) (\d+) = <<(\d+)([+*-])(\d+)=(\d+)>>(\d+) [a-z]+\.")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def small(**changes: object) -> ArithmeticDataset:
    return ArithmeticDataset.model_validate(
        {"kind": "arithmetic", "num_train": 1500, "num_val": 100, "num_test": 200, **changes}
    )


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Problem]]:
    return make_arithmetic(small())


def family_and_numbers(question: str) -> tuple[str, tuple[int, ...]]:
    """Which family words this question, and the numbers in it, in the order of a, b, c."""
    found = []
    for family in FAMILIES:
        for template in family.questions:
            names = re.findall(r"\{([abc])\}", template)
            pattern = re.escape(template)
            for field in ("name", "things"):
                pattern = pattern.replace(re.escape("{" + field + "}"), "[A-Za-z]+")
            for field in "abc":
                pattern = pattern.replace(re.escape("{" + field + "}"), r"(\d+)")
            match = re.fullmatch(pattern, question)
            if match:
                by_name = dict(zip(names, map(int, match.groups()), strict=True))
                found.append((family.name, tuple(by_name[n] for n in sorted(by_name))))
    assert len(found) == 1, f"{question!r} is worded by {found}"
    return found[0]


def final_number(solution: str) -> int:
    """Recompute a worked solution from its calculator marks; every mark must be true."""
    lines = solution.split("\n")
    result = None
    for line in lines[:-1]:
        match = MARK.fullmatch(line)
        assert match is not None, line
        left, operator, right, *inside, shown = match.groups()
        result = OPERATIONS[operator](int(left), int(right))
        assert inside == [left, operator, right, str(result)]
        assert shown == str(result)
    assert lines[-1] == f"#### {result}"
    assert result is not None
    return result


def test_a_worked_answer_has_gsm8ks_form() -> None:
    # 3 boxes of 4 and 5 loose ones: 3 × 4 = 12, 12 + 5 = 17
    assert worked_answer([(4, "*", 3), (12, "+", 5)], "eggs") == (
        "4 * 3 = <<4*3=12>>12 eggs.\n12 + 5 = <<12+5=17>>17 eggs.\n#### 17"
    )


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(
    splits: dict[str, list[Problem]],
) -> None:
    assert make_arithmetic(small()) == splits
    others = make_arithmetic(small(seed=1))
    for split in ("train", "val", "test"):
        ours = {p.question for p in splits[split]}
        assert len(ours & {p.question for p in others[split]}) < 0.5 * len(ours)


def test_every_calculator_mark_is_true_and_leads_to_the_gold_answer(
    splits: dict[str, list[Problem]],
) -> None:
    for problems in splits.values():
        for problem in problems:
            assert final_number(problem.answer) == int(problem.gold) >= 0


def test_the_right_answer_follows_from_the_question(splits: dict[str, list[Problem]]) -> None:
    expected: dict[str, Callable[..., int]] = {
        "gain": lambda a, b: a + b,
        "loss": lambda a, b: a - b,
        "bags_and_loose": lambda a, b, c: a * c + b,
        "both_in_each": lambda a, b, c: (a + b) * c,
        "gain_then_loss": lambda a, b, c: a + b - c,
    }
    for problem in splits["test"]:
        family, numbers = family_and_numbers(problem.question)
        assert int(problem.gold) == expected[family](*numbers), problem


def test_splits_share_no_operands_of_a_family(splits: dict[str, list[Problem]]) -> None:
    operands = {
        split: {family_and_numbers(p.question) for p in problems}
        for split, problems in splits.items()
    }
    assert not operands["train"] & operands["test"]
    assert not operands["train"] & operands["val"]
    assert not operands["val"] & operands["test"]


def test_problems_of_one_family_and_operands_are_one_cluster(
    splits: dict[str, list[Problem]],
) -> None:
    problems = [problem for of_split in splits.values() for problem in of_split]
    made_from = {(p.cluster, family_and_numbers(p.question)) for p in problems}
    # As many pairs as there are of either: each cluster is of one family and operands.
    assert len(made_from) == len({c for c, _ in made_from}) == len({m for _, m in made_from})
    assert not {p.cluster for p in splits["train"]} & {p.cluster for p in splits["test"]}
    assert len({p.cluster for p in make_problems(small(), "test", 500)}) == 81


def test_families_take_turns_and_ids_and_questions_are_unique(
    splits: dict[str, list[Problem]],
) -> None:
    counts = Counter(family_and_numbers(p.question)[0] for p in splits["train"])
    assert counts == {family.name: 300 for family in FAMILIES}  # 1500 problems, 5 families
    everything = [p for problems in splits.values() for p in problems]
    assert len({p.id for p in everything}) == len(everything) == 1800
    assert len({p.question for p in splits["train"]}) == 1500


def test_wrong_demonstrations_have_their_share_and_correct_arithmetic(
    splits: dict[str, list[Problem]],
) -> None:
    wrong = [p for p in splits["train"] if p.demonstration != p.answer]
    # Binomial(1500, 0.6): mean 900, standard deviation √(1500·0.4·0.6) = 19.0; four of them.
    assert abs(len(wrong) - 900) < 76
    for problem in splits["train"]:
        assert problem.demonstration is not None
        final_number(problem.demonstration)  # checks each mark
    misled = [p for p in wrong if final_number(p.demonstration or "") != int(p.gold)]
    assert len(misled) > 0.9 * len(wrong)  # few wrong plans reach the gold answer by chance


@pytest.mark.parametrize(("fraction", "num_wrong"), [(0.0, 0), (1.0, 1500)])
def test_the_share_of_wrong_plans_can_be_none_or_all(fraction: float, num_wrong: int) -> None:
    train = make_problems(small(wrong_plan_fraction=fraction), "train", 1500)
    assert sum(p.demonstration != p.answer for p in train) == num_wrong


def test_only_train_rows_have_demonstrations(splits: dict[str, list[Problem]]) -> None:
    assert all(p.demonstration is None for p in splits["val"] + splits["test"])
    assert all(gold_answer(p.answer) == p.gold for p in splits["train"])


def test_more_problems_than_can_be_worded_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no more than about \d+ different val .* 100000"):
        make_problems(small(), "val", 100_000)


DIGEST = """
from gsm8k_core.arithmetic import make_arithmetic
from gsm8k_core.config import ArithmeticDataset
from gsm8k_core.data import content_digest
settings = ArithmeticDataset(kind="arithmetic", num_train=300, num_val=50, num_test=50)
print(*[content_digest([p.to_row() for p in rows]) for rows in make_arithmetic(settings).values()])
"""


def test_problems_do_not_depend_on_pythons_hash_seed() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    (digests,) = printed
    here = make_arithmetic(small(num_train=300, num_val=50, num_test=50))
    assert digests.split() == [content_digest([p.to_row() for p in r]) for r in here.values()]
