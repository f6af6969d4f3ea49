"""Completions of other tools: where their fields lie, whose gold they have, what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import write_jsonl, write_text
from gsm8k_core.grading import GRADES

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
Score = Callable[..., tuple[str, pl.DataFrame]]


@pytest.fixture
def score(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Score:
    """`score(rows, *arguments)`: the table that is printed, and the rows that are written."""

    def run(rows: list[Row], *arguments: str) -> tuple[str, pl.DataFrame]:
        write_jsonl(tmp_path / "in.jsonl", rows)
        output = tmp_path / "out.parquet"
        argv = [str(tmp_path / "in.jsonl"), *arguments, "--output", str(output)]
        assert script("score_completions").main(argv) == 0
        return capsys.readouterr().out, pl.read_parquet(output)

    return run


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n")
    ]
    header, rule, *rows = lines
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table_has_the_share_of_every_grade(score: Score, tmp_path: Path) -> None:
    rows = [
        {"completion": "#### 18", "gold": "18"},
        {"completion": "#### 18.00", "gold": 18},
        {"completion": "It is 18", "gold": "9 * 2\n#### 18"},
        {"completion": None, "gold": "18"},
    ]
    table, scored = score(rows)
    assert cells(table) == [
        {
            "file": str(tmp_path / "in.jsonl"),
            "completions": "4",
            "strict %": "50.00",
            "flexible %": "75.00",
            "lm_eval_strict %": "25.00",
            "lm_eval_flexible %": "50.00",
            "format %": "50.00",
        }
    ]
    assert scored["correct"].to_list() == scored["strict"].to_list() == [True, True, False, False]
    assert scored["extracted"].to_list() == ["18", "18", None, None]
    assert scored["gold"].to_list() == ["18"] * 4
    assert scored["row"].to_list() == [1, 2, 3, 4]
    assert {*GRADES} < {*scored.columns}


def test_several_files_are_several_lines(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("b", "#### 18"), ("a", "#### 19")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"completion": text, "gold": "18"}])
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("b", "a")]
    assert script("score_completions").main(paths) == 0
    table = cells(capsys.readouterr().out)
    assert [(row["file"], row["strict %"]) for row in table] == [
        (paths[0], "100.00"),
        (paths[1], "0.00"),
    ]


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        ({"a": {"b": ["x", "#### 18"]}, "g": {"v": 18}},
         ("--completion-field", "a.b.1", "--gold-field", "g.v")),
        ({"a.b": "#### 18", "gold": "18"}, ("--completion-field", "a.b")),
        ({"resps": [["#### 18"]], "target": "so\n#### 18"},
         ("--completion-field", "resps.0", "--gold-field", "target")),
        ({"completion": [{"role": "assistant", "content": "#### 18"}], "gold": "18"},
         ("--completion-field", "completion.0.content")),
    ],
)  # fmt: skip
def test_a_field_may_lie_deep(score: Score, row: Row, arguments: tuple[str, ...]) -> None:
    _, scored = score([row], *arguments)
    assert scored["strict"].to_list() == [True]


def test_a_completion_that_the_harness_wrote_for_each_of_its_filters_counts_once(
    score: Score,
) -> None:
    rows: list[Row] = [
        {"doc_id": number, "filter": name, "resps": [[f"#### {number}"]], "target": "#### 1"}
        for name in ("strict-match", "flexible-extract")
        for number in range(3)
    ]
    table, scored = score(rows, "--completion-field", "resps.0", "--gold-field", "target")
    assert cells(table)[0]["completions"] == "3"
    assert scored["strict"].to_list() == [False, True, False]


def test_a_list_of_completions_is_a_row_each(score: Score) -> None:
    rows = [{"completion": ["#### 18", "#### 19", None], "gold": "18"}]
    table, scored = score(rows)
    assert cells(table)[0]["completions"] == "3"
    assert scored.select("row", "sample", "correct").rows() == [
        (1, 0, True),
        (1, 1, False),
        (1, 2, False),
    ]


@pytest.mark.parametrize("form", ["ids", "rows"])
def test_golds_come_from_the_problems(score: Score, tmp_path: Path, form: str) -> None:
    problems: list[Row] = [
        {"question": "?", "answer": "#### 18"},
        {"question": "\u2028?", "answer": "1,800 of them\n#### 1,800"},
    ]
    names: list[str | int] = [0, 1]
    if form == "ids":
        names = ["test-0", "test-1"]
        problems = [
            {**problem, "id": name, "gold": problem["answer"].split("#### ")[1].replace(",", "")}
            for name, problem in zip(names, problems, strict=True)
        ]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    rows = [
        {"id": names[1], "completion": "#### 1800"},
        {"id": names[0], "completion": "#### 1800"},
    ]
    arguments = ("--problems", str(tmp_path / "problems.jsonl"), "--id-field", "id")
    _, scored = score(rows, *arguments)
    assert scored["strict"].to_list() == [True, False]
    assert scored["gold"].to_list() == ["1800", "18"]
    assert scored["problem_id"].to_list() == [str(names[1]), str(names[0])]


def test_whole_numbers_with_a_point_are_right_by_every_grade(
    score: Score, caplog: pytest.LogCaptureFixture
) -> None:
    _, scored = score([{"completion": "#### 18", "gold": 18.0}])
    assert scored.select("strict", "lm_eval_strict", "lm_eval_flexible").row(0) == (True,) * 3
    assert not caplog.text


def test_gold_answers_that_the_harness_cannot_compare_are_told(
    score: Score, caplog: pytest.LogCaptureFixture
) -> None:
    golds = ("18", "The answer is 18", "\\boxed{18}")
    rows = [{"completion": "#### 18", "gold": gold} for gold in golds]
    _, scored = score(rows)
    assert scored["strict"].all() and scored["lm_eval_strict"].sum() == 1
    assert "2 gold answers are neither a number nor end in `#### <number>`" in caplog.text


def test_a_right_answer_with_another_one_after_it_is_told(score: Score) -> None:
    rows = [{"completion": ["#### 18\n#### 17", "#### 18"], "gold": "18"}]
    assert score(rows)[1].select("strict", "contradicted").rows() == [(True, True), (True, False)]


def test_marker_and_the_grade_that_counts_are_chosen(score: Score) -> None:
    rows = [{"completion": "#### 7\nThe answer is 18.00.", "gold": "18"}]
    _, scored = score(rows, "--marker", "The answer is", "--grading", "lm_eval_flexible")
    assert scored.select("strict", "correct", "extracted").row(0) == (True, False, "18.00")


def test_math_verify_stands_in_the_table_where_it_is_asked_for(score: Score) -> None:
    table, scored = score([{"completion": "\\boxed{\\frac{36}{2}}", "gold": "18"}], "--math-verify")
    assert cells(table)[0]["math_verify %"] == "100.00"
    assert scored["math_verify"].to_list() == [True]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_are_written_as_the_suffix_says(
    script: Callable[[str], ModuleType], tmp_path: Path, suffix: str
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"completion": "#### 18", "gold": "18"}])
    output = tmp_path / f"out{suffix}"
    script("score_completions").main([str(tmp_path / "in.jsonl"), "--output", str(output)])
    read = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}[suffix]
    scored = read(output)  # type: ignore[operator]
    assert scored.height == 1
    assert scored["lm_eval_strict"].to_list() == [True]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"text": "x", "gold": "1"}], (), r"row 1: no field 'completion'.*among 'text', 'gold'"),
        ([{"completion": "x"}], (), r"row 1: no field 'gold'"),
        ([{"completion": "x", "gold": "1"}, {"completion": 5, "gold": "1"}], (),
         r"row 2: a completion should be a text, found int"),
        ([{"completion": {"content": "x"}, "gold": "1"}], (), r"found dict; name the text itself"),
        ([{"completion": [], "gold": "1"}], (), r"an empty list of completions"),
        ([{"completion": ["x"], "gold": "1"}], ("--completion-field", "completion.1"),
         r"no '1' in a list of 1"),
        ([{"completion": "x", "gold": "many"}], (), r"row 1: gold answer 'many' is not a number"),
        ([{"completion": "x", "gold": True}], (), r"expected a text or a number, found bool"),
        ([{"completion": "x", "gold": None}], (), r"found NoneType"),
        ([], (), r"in\.jsonl: no completions"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named_by_file_and_row(
    score: Score, tmp_path: Path, rows: list[Row], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        score(rows, *arguments)
    assert "in.jsonl" in str(caught.value)
    assert not (tmp_path / "out.parquet").exists()


def test_a_problem_that_is_not_there_or_there_twice_is_an_error(
    score: Score, tmp_path: Path
) -> None:
    problem = {"id": "a", "question": "?", "answer": "#### 1"}
    write_jsonl(tmp_path / "p.jsonl", [problem])
    arguments = ("--problems", str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match=r"in\.jsonl, row 1: no problem 'b' in --problems"):
        score([{"problem_id": "b", "completion": "x"}], *arguments)
    write_jsonl(tmp_path / "p.jsonl", [problem, problem])
    with pytest.raises(DataError, match=r"p\.jsonl, row 2: id 'a' occurs twice"):
        score([{"problem_id": "a", "completion": "x"}], *arguments)


def test_bad_arguments_are_refused_before_anything_is_graded(
    script: Callable[[str], ModuleType], score: Score
) -> None:
    with pytest.raises(ConfigError, match=r"should end in \.parquet, \.csv, \.jsonl"):
        script("score_completions").main(["missing.jsonl", "--output", "x.xlsx"])
    for marker in ("", "\\boxed{}"):
        with pytest.raises(ConfigError, match="--marker"):
            score([{"completion": "x", "gold": "1"}], "--marker", marker)


def test_the_command_line_prints_the_table_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", '{"completion": "#### 18\\ud800", "gold": "18"}\n')
    command = [sys.executable, "scripts/score_completions.py", str(tmp_path / "a.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert cells(result.stdout)[0]["strict %"] == "100.00"
    assert result.stderr == ""
    write_text(tmp_path / "a.jsonl", '{"completion": "#### 18", "gold": "18"}\n{"completion')
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error:") and "row 2" in result.stderr


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR: folder with the real GSM8K")
def test_the_worked_answers_of_the_real_gsm8k_are_all_right(score: Score) -> None:
    problems = Path(os.environ["GSM8K_DIR"]) / "test.jsonl"
    lines = problems.read_text(encoding="utf-8").split("\n")
    answers = [json.loads(line)["answer"] for line in lines if line]
    rows = [{"problem_id": index, "completion": answer} for index, answer in enumerate(answers)]
    table, scored = score(rows, "--problems", str(problems))
    assert scored.height == 1319
    row = cells(table)[0]
    assert {row[f"{grade} %"] for grade in GRADES if grade != "math_verify"} == {"100.00"}


def test_what_is_read_is_not_written_over_and_counts_once(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [{"completion": "#### 1", "gold": "1"}])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is read too, and would be overwritten"):
        script("score_completions").main([str(path), "--output", str(path)])
    with pytest.raises(ConfigError, match="a file is named twice"):
        script("score_completions").main([str(path), str(tmp_path / "." / "in.jsonl")])
    assert path.read_bytes() == before
