"""Problems and their rows: every fault has a file and a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.errors import DataError
from gsm8k_core.files import write_jsonl
from gsm8k_core.problems import (
    Problem,
    WorkedExample,
    gold_answer,
    problem_from_row,
    read_problems,
    write_problems,
)

FILLED = st.text().filter(str.strip)


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4", **changes}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### 18", "18"),
        ("so it is 5.\n#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 2.50", "2.50"),
        ("####7", "7"),
        ("#### 7 \n", "7"),
        ("#### 5\nno, wait\n#### 6", "6"),
    ],
)
def test_gold_is_the_number_after_the_last_mark(answer: str, gold: str) -> None:
    assert gold_answer(answer) == gold


@pytest.mark.parametrize("answer", ["18", "### 18", "#### eighteen", "#### 18 apples", "#### ", ""])
def test_an_answer_without_a_gold_number_is_an_error(answer: str) -> None:
    with pytest.raises(DataError, match="no '#### <number>' at the end of the answer"):
        gold_answer(answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "it is 4"}, "row 2: no '#### <number>'"),
        ({"answer": None}, "row 2: 'answer' is missing or not a text"),
        ({"question": 3}, "row 2: 'question' is missing or not a text"),
        ({"gold": "5"}, "row 2: 'gold' is '5' but the answer ends in '4'"),
        ({"gold": 4}, "row 2: 'gold' is 4 but the answer ends in '4'"),
        ({"id": 7}, "row 2: 'id' is missing or not a text"),
        ({"id": "first"}, "row 2: id 'first' occurs twice"),
        ({"answer": "#### 1,2"}, "row 2: no '#### <number>'"),
        ({"question": "\ud800?"}, "row 2: 'question' holds half a surrogate pair at character 0"),
        ({"demonstration": 1}, "row 2: 'demonstration' is missing or not a text"),
        ({"cluster": 7}, "row 2: 'cluster' is missing or not a text"),
        ({"question": " "}, "row 2: 'question' is empty"),
        ({"id": ""}, "row 2: 'id' is empty"),
        ({"demonstration": ""}, "row 2: 'demonstration' is empty"),
        ({"cluster": ""}, "row 2: 'cluster' is empty"),
        ({"examples": {}}, "row 2: 'examples' should be a list of objects"),
        ({"examples": ["a"]}, "row 2: 'examples' should be a list of objects"),
        ({"examples": [{"question": "q"}]}, r"row 2: 'examples'\[0\].answer is missing"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"  # escaped: UTF-8 cannot hold half a surrogate pair
    rows = (row(id="first"), row(**changes))
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}, row 2: ")


def test_a_key_that_looks_mistyped_is_told_once_and_others_are_the_users_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [row(id=name, demonstraton="4", level="easy", source="me") for name in "ab"])
    assert len(read_problems(path)) == 2
    assert caplog.messages == [f"{path}: 'demonstraton' is not read; did you mean 'demonstration'?"]


def test_a_problem_of_no_cluster_has_the_row_that_it_always_had() -> None:
    assert list(problem_from_row(row(), "here").to_row()) == ["id", "question", "answer", "gold"]


def test_a_row_without_an_id_takes_the_default() -> None:
    raw = row()
    del raw["id"]
    assert problem_from_row(raw, "here", default_id="train-0").id == "train-0"
    with pytest.raises(DataError, match=r"here: 'id' is missing; use .*/prepare_data\.py"):
        problem_from_row(raw, "here")


def test_a_question_with_a_line_separator_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    line = json.dumps(row(question="one\u2028two"), ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8", newline="\n")
    (problem,) = read_problems(path)
    assert problem.question == "one\u2028two"


def test_a_folder_is_no_file_of_problems_and_a_path_may_be_a_text(tmp_path: Path) -> None:
    problem = problem_from_row(row(), "here")
    write_problems(tmp_path / "train.jsonl", [problem])
    assert read_problems(str(tmp_path / "train.jsonl")) == [problem]
    with pytest.raises(DataError, match="Is a directory"):
        read_problems(str(tmp_path))


def test_a_file_without_problems_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match="holds no problem"):
        read_problems(tmp_path / "train.jsonl")


@settings(max_examples=40)
@given(
    question=FILLED,
    solution=st.text(),
    gold=st.integers(),
    demo=st.none() | FILLED,
    examples=st.lists(st.builds(WorkedExample, st.text(), st.text()), max_size=2).map(tuple),
    cluster=st.none() | FILLED,
)
def test_problems_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    question: str,
    solution: str,
    gold: int,
    demo: str | None,
    examples: tuple[WorkedExample, ...],
    cluster: str | None,
) -> None:
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    answer = f"{solution}\n#### {gold:,}"
    problem = Problem("a", question, answer, str(gold), demo, examples, cluster)
    write_problems(path, [problem])
    assert read_problems(path) == [problem]
