"""All grades of a completion, the one that counts, and what regrading a finished study redoes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import polars as pl
import pytest

from gsm8k_core.answers import Mode, extract_answer
from gsm8k_core.config import Config, Grade, GradingSettings, RewardGrade, RewardSettings, dump
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import read_json, sha256_file, write_json, write_jsonl
from gsm8k_core.grading import GRADES, Grader, is_right, read_gold
from gsm8k_core.lm_eval_grades import LmEvalMode, lm_eval_correct
from gsm8k_core.rewards import build_reward_fn

ROOT = Path(__file__).resolve().parent.parent
FAST: tuple[RewardGrade, ...] = get_args(RewardGrade)
Script = Callable[[str], ModuleType]

# Every grade alone is right (or wrong) somewhere: text, then strict, flexible, lm_eval_strict,
# lm_eval_flexible for gold 18.
TABLE = [
    ("#### 18", (True, True, True, True)),
    ("#### 19", (False, False, False, False)),
    ("It is 18", (False, True, False, True)),
    ("#### 18.00", (True, True, False, False)),
    ("It is 18.00", (False, True, False, False)),
    ("#### 1,8", (False, False, True, True)),
    ("#### 18 of 20", (False, False, True, False)),
    ("####18, not 7", (False, False, False, False)),
    ("####18", (True, True, False, True)),
    ("#### 18\nQuestion: 3?\n#### 3", (True, False, True, False)),
    ("nothing", (False, False, False, False)),
    (None, (False, False, False, False)),
]


@pytest.mark.parametrize(("text", "expected"), TABLE)
def test_every_completion_carries_every_grade(text: str | None, expected: tuple[bool, ...]) -> None:
    with Grader(GradingSettings()) as grader:
        graded = grader.grade(text, read_gold("18"))
    assert tuple(graded[grade] for grade in FAST) == expected
    assert graded["math_verify"] is None
    assert set(graded) == {*GRADES, "correct", "extracted", "has_format", "contradicted"}
    if text is not None:
        assert tuple(is_right(text, "18", grade, "####") for grade in FAST) == expected


@pytest.mark.parametrize(
    ("text", "contradicted"),
    [
        ("#### 18 shells.\n#### 17", True),
        ("#### 18\nWait.\n#### 9\n#### 18", True),
        ("#### 18\n#### 17\nQuestion: 3?\n#### 3", True),
        ("#### 18", False),
        ("#### 18\n#### 18.00", False),  # the same number
        ("#### 18\n#### Check\n#### 1, 17", False),  # states none
        ("#### 18\n\nQuestion: 3?\n#### 3", False),
        ("#### 18\n**Q:** 3?\n#### 3", False),
        ("#### 17\n#### 18", False),  # wrong, and so nothing right is contradicted
        ("#### 1. Find\n#### 2. Multiply\n#### 18", False),  # headings
        ("nothing #### and #### again", False),
        (None, False),
    ],
)
def test_a_right_answer_with_another_one_after_it_is_told(
    text: str | None, contradicted: bool
) -> None:
    with Grader(GradingSettings()) as grader:
        graded = grader.grade(text, read_gold("18"))
    assert graded["contradicted"] is contradicted
    assert graded["strict"] or not contradicted


def test_boxes_contradict_nothing_and_other_markers_do() -> None:
    for marker, text, contradicted in (
        ("boxed", "\\boxed{17}, so \\boxed{18}", False),
        ("The answer is", "The answer is 18. The answer is 17.", True),
        ("The answer is", "The answer is 18.\n\nQ: 3?\nA: The answer is 3.", False),
    ):
        with Grader(GradingSettings(marker=marker)) as grader:
            graded = grader.grade(text, read_gold("18"))
        assert (graded["strict"], graded["contradicted"]) == (True, contradicted)


@pytest.mark.parametrize(
    ("grading", "correct", "extracted"),
    [
        ("strict", True, "18"),
        ("flexible", False, "37/2"),
        ("lm_eval_strict", False, "18.00"),
        ("lm_eval_flexible", False, "18.5"),
        ("math_verify", False, "37/2"),
    ],
)
def test_the_grade_that_counts_decides_what_is_correct_and_what_was_extracted(
    grading: Grade, correct: bool, extracted: str
) -> None:
    with Grader(GradingSettings(grading=grading)) as grader:
        graded = grader.grade("#### 18.00\nQuestion: half of 37?\nIt is 18.5", read_gold("18"))
    assert (graded["correct"], graded["extracted"]) == (correct, extracted)
    assert graded["correct"] == graded[grading]


def test_the_marker_is_what_the_settings_say() -> None:
    for marker, text in (("boxed", "\\boxed{18}"), ("The answer is", "The answer is 18.")):
        with Grader(GradingSettings(marker=marker)) as grader:
            graded = grader.grade(f"#### 7\n{text}", read_gold("18"))
            assert graded["strict"] and graded["has_format"]
            assert not grader.grade("#### 18", read_gold("18"))["has_format"]


def test_the_marker_chooses_the_task_whose_grades_the_harness_ones_are(config: Config) -> None:
    marker = config.suites["gsm8k_8shot_cot"].marker
    assert marker is not None
    for text in ("The answer is 18.", "The answer is 18", "#### 18", "#### 7. The answer is 18.\n"):
        expected = [lm_eval_correct(text, "18", mode, marker) for mode in get_args(LmEvalMode)]
        with Grader(GradingSettings(marker=marker)) as grader:
            graded = grader.grade(text, read_gold("18"))
        assert [graded[mode] for mode in get_args(LmEvalMode)] == expected
        assert [is_right(text, "18", mode, marker) for mode in get_args(LmEvalMode)] == expected
        assert graded["lm_eval_strict"] == ("The answer is 18." in text)


def test_a_reward_by_a_grade_that_needs_a_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode 'math_verify' is unknown"):
        is_right("#### 18", "18", "math_verify", "####")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1,000", "$1,000.00", "9 * 9\n#### 1,000", "####1000", "1000"])
def test_a_gold_answer_may_be_a_number_or_a_worked_answer(text: str) -> None:
    assert read_gold(text).value == 1000


def test_a_gold_answer_that_is_no_number_is_an_error() -> None:
    for text in ("eighteen", "", "#### ", "1, 18"):
        with pytest.raises(DataError, match="is not a number"):
            read_gold(text)


@pytest.mark.parametrize("gold", [18, 18.0, None, ["1"]])
def test_a_gold_answer_that_is_no_text_is_an_error_that_says_so(gold: Any) -> None:
    with pytest.raises(DataError, match=f"of type {type(gold).__name__}, expected text such as"):
        read_gold(gold)


def test_math_verify_runs_where_it_is_asked_for() -> None:
    with Grader(GradingSettings(math_verify=True)) as grader:
        assert grader.grade("\\boxed{\\frac{36}{2}}", read_gold("18"))["math_verify"] is True
        assert grader.grade("#### 19", read_gold("18"))["math_verify"] is False
        assert grader.grade(None, read_gold("18"))["math_verify"] is False
        assert grader.num_killed == 0


@pytest.mark.parametrize("asked", [{"grading": "math_verify"}, {"math_verify": True}])
def test_without_the_package_its_grade_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"needs the package math-verify: .*uv sync --inexact"):
        Grader(GradingSettings(**asked))


# ---------------------------------------------------------------------------------------- settings


def test_regrading_generates_nothing(config: Config) -> None:
    def with_suite(**changes: Any) -> Config:
        suite = config.suites["arithmetic"].model_copy(update=changes)
        return config.model_copy(update={"suites": {**config.suites, "arithmetic": suite}})

    def generation(of: Config) -> str:
        return dump(of.evaluation_settings("tiny-qwen2", "base", 0, "arithmetic"))

    def grading(of: Config) -> str:
        return dump(of.grading_settings("tiny-qwen2", "arithmetic"))

    for change in (
        {"grading": "flexible"},
        {"grading": "lm_eval_strict"},
        {"marker": "boxed"},
        {"math_verify": True},
    ):
        # Snakemake redoes a job when its settings differ: grade is redone, generate is not.
        assert generation(with_suite(**change)) == generation(config), change
        assert grading(with_suite(**change)) != grading(config), change
    assert generation(with_suite(max_new_tokens=7)) != generation(config)


def test_a_suites_marker_goes_before_the_prompts(config: Config) -> None:
    assert config.grading_settings("tiny-qwen2", "arithmetic").marker == "####"
    suite = config.suites["arithmetic"].model_copy(update={"marker": "The answer is"})
    changed = config.model_copy(update={"suites": {"arithmetic": suite}})
    assert changed.grading_settings("tiny-qwen2", "arithmetic").marker == "The answer is"


@pytest.mark.parametrize("grading", FAST)
@pytest.mark.parametrize("text", [text for text, _ in TABLE if text is not None])
def test_a_reward_is_what_the_grade_says(grading: RewardGrade, text: str) -> None:
    reward_fn = build_reward_fn(RewardSettings(grading=grading), "####")
    assert reward_fn(text, "18", 5)["answer_reward"] == float(is_right(text, "18", grading, "####"))


# ---------------------------------------------------------------------------------------- grade.py


def completion(problem: int, text: str, sample: int | None = None) -> dict[str, Any]:
    return {
        "problem_id": f"p{problem:04d}",
        "decoding": "greedy" if sample is None else "sample",
        "sample_index": sample or 0,
        "gold": "1800",
        "completion": text,
        "token_ids": [1, 2, 3],
        "num_tokens": 3,
        "finish_reason": "stop",
    }


class Job:
    """One call of scripts/grade.py."""

    def __init__(self, module: ModuleType, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.module, self.folder = module, folder
        write_jsonl(folder / "c.jsonl", rows)
        identity = {"model": "m", "method": "base", "seed": 0, "suite": "s", "parent": None}
        write_json(folder / "c.stats.json", identity)

    def arguments(self, settings: dict[str, Any]) -> list[str]:
        names = {"--completions": "c.jsonl", "--stats": "c.stats.json", "--output": "m.json",
                 "--grades": "g.parquet"}  # fmt: skip
        paths = [part for flag, name in names.items() for part in (flag, str(self.folder / name))]
        return [*paths, "--settings", json.dumps(settings)]

    def run(self, **settings: Any) -> tuple[dict[str, Any], pl.DataFrame]:
        assert self.module.main(self.arguments(settings)) == 0
        return read_json(self.folder / "m.json"), pl.read_parquet(self.folder / "g.parquet")


MIXED = ["#### 1,800", "#### 1800.00", "It is $1,800.", "#### 7"]


@pytest.fixture
def job(script: Script, tmp_path: Path) -> Job:
    return Job(script("grade"), tmp_path, [completion(i, text) for i, text in enumerate(MIXED)])


@pytest.mark.parametrize("key", ["completions_sha256", "num_problems", "num_completions"])
def test_completions_that_are_not_those_of_the_stats_are_refused(job: Job, key: str) -> None:
    path, stats = job.folder / "c.stats.json", read_json(job.folder / "c.stats.json")
    right = {
        "completions_sha256": sha256_file(job.folder / "c.jsonl"),
        "num_problems": 4,
        "num_completions": 4,
    }
    write_json(path, {**stats, **right})
    job.run()
    write_json(path, {**stats, **right, key: 5})
    with pytest.raises(
        DataError, match=rf"c\.jsonl: not the completions .*: {key} is .*expected 5"
    ):
        job.run()


def test_the_grades_file_has_a_column_for_each_grade(job: Job) -> None:
    _, grades = job.run()
    assert all(grades.schema[grade] == pl.Boolean for grade in GRADES)
    for harness_mode in get_args(LmEvalMode):
        expected = [lm_eval_correct(text, "1800", harness_mode) for text in MIXED]
        assert grades[harness_mode].to_list() == expected
    for mode in get_args(Mode):
        assert grades[mode].to_list() == [extract_answer(text, mode) == 1800 for text in MIXED]
    assert grades["math_verify"].null_count() == len(MIXED)
    assert grades["correct"].equals(grades["strict"].alias("correct"))


def test_the_summary_has_the_share_that_is_right_by_each_grade(job: Job) -> None:
    summary, _ = job.run()
    shares = {grade: summary[f"accuracy_{grade}"] for grade in GRADES}
    # strict: 1, 2; flexible: 1, 2, 3; the harness does not know 1800.00 for 1800.
    assert shares == {
        "strict": 0.5,
        "flexible": 0.75,
        "lm_eval_strict": 0.25,
        "lm_eval_flexible": 0.5,
        "math_verify": None,
    }
    assert summary["accuracy"] == summary["accuracy_strict"]
    assert summary["math_verify_killed"] is None


@pytest.mark.parametrize("grading", FAST)
def test_the_suite_names_the_grade_that_counts(job: Job, grading: str) -> None:
    summary, grades = job.run(grading=grading)
    assert summary["grading"] == grading
    assert summary["accuracy"] == summary[f"accuracy_{grading}"] == grades["correct"].mean()
    assert grades["correct"].to_list() == grades[grading].to_list()


def test_math_verify_is_counted_beside_the_others(script: Script, tmp_path: Path) -> None:
    job = Job(script("grade"), tmp_path, [completion(0, "#### 1800"), completion(1, "#### 7")])
    summary, grades = job.run(math_verify=True)
    assert grades["math_verify"].to_list() == [True, False]
    assert (summary["accuracy_math_verify"], summary["math_verify_killed"]) == (0.5, 0)
    assert summary["accuracy"] == summary["accuracy_strict"] == 0.5


def test_a_majority_under_math_verify_is_not_split_by_the_form_of_its_votes(
    script: Script, tmp_path: Path
) -> None:
    texts = ["\\boxed{1800}", "\\boxed{1800\\%}", "\\boxed{x=1800}", "#### 7", "#### 7", "#### 8"]
    rows = [completion(0, text, sample) for sample, text in enumerate([*texts, "#### 7", "#### 9"])]
    summary, grades = Job(script("grade"), tmp_path, rows).run(grading="math_verify")
    assert grades["extracted"].to_list() == ["1800"] * 3 + ["7", "7", "8", "7", "9"]
    assert summary["maj_at_k"]["8"] == 0.5  # three for 1800, three for 7


def test_a_missing_package_is_one_line_on_the_command_line(job: Job, tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['math_verify'] = None;"
        f"sys.argv[1:] = {job.arguments({'grading': 'math_verify'})!r};"
        "runpy.run_path('scripts/grade.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the grade math_verify needs the package")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "m.json").exists()


@pytest.mark.slow
def test_a_study_of_1319_problems_and_8_samples_is_graded_in_seconds(
    script: Script, tmp_path: Path
) -> None:
    text = "She sells 9 + 9 eggs, so 18 of them at $100 each make 18 * 100 = $1,800. " * 4
    rows = [completion(i, f"{text}\n#### {i + k}", k) for i in range(1319) for k in range(8)]
    job = Job(script("grade"), tmp_path, rows)
    started = time.process_time()
    _, grades = job.run()
    assert grades.height == 10_552
    assert time.process_time() - started < 10.0  # it takes 1.5 s alone; the machine may be slow
