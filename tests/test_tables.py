"""scripts/grade.py and scripts/compare.py with the tables that they stand on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from gsm8k_core.errors import DataError
from gsm8k_core.files import read_json, write_json, write_jsonl
from gsm8k_core.metrics import paired_difference, wilson_interval
from gsm8k_core.tables import (
    SCHEMA,
    Study,
    build_comparison,
    read_comparison,
    to_markdown,
    write_comparison,
)

SCRIPTS = Path(__file__).parent.parent / "scripts"
SETTINGS = '{"grading": "strict", "marker": "####"}'


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


grade, compare = load_script("grade"), load_script("compare")


def completion(
    problem: str, text: str, decoding: str = "greedy", index: int = 0, **other: Any
) -> dict[str, Any]:
    return {
        "problem_id": problem,
        "decoding": decoding,
        "sample_index": index,
        "gold": "18",
        "completion": text,
        "token_ids": [5] * 10,
        "num_tokens": 10,
        "finish_reason": "stop",
        **other,
    }


def run_grade(
    folder: Path, rows: list[dict[str, Any]], settings: str = SETTINGS, **stats: Any
) -> dict[str, Any]:
    """Grade `rows` in `folder` and return the summary."""
    suite = stats.get("suite", "test")
    identity = {"model": "m", "method": "base", "seed": 0, "suite": suite, "parent": None}
    write_jsonl(folder / "completions" / f"{suite}.jsonl", rows)
    write_json(
        folder / "completions" / f"{suite}.stats.json",
        {**identity, "seconds_generating": 2.5, "provenance": {"commit": "abc"}, **stats},
    )
    assert grade.main(
        [
            "--completions", str(folder / "completions" / f"{suite}.jsonl"),
            "--stats", str(folder / "completions" / f"{suite}.stats.json"),
            "--settings", settings,
            "--output", str(folder / "metrics" / f"{suite}.json"),
            "--grades", str(folder / "grades" / f"{suite}.parquet"),
        ]
    ) == 0  # fmt: skip
    summary = read_json(folder / "metrics" / f"{suite}.json")
    assert isinstance(summary, dict)
    return summary


# -------------------------------------------------------------------------------------------- grade

RIGHT, WRONG, UNMARKED = "#### 18", "#### 19", "It is 18"
SAMPLES = [
    # a: 2 of 4 right; b: 0 of 4
    *(completion("a", text, "sample", i) for i, text in enumerate([RIGHT, WRONG, RIGHT, UNMARKED])),
    *(completion("b", WRONG, "sample", i) for i in range(4)),
]
GREEDY = [
    completion("b", RIGHT, token_ids=[1] * 30, num_tokens=30, finish_reason="length"),
    completion("a", UNMARKED),
]


def test_the_summary_of_greedy_and_samples(tmp_path: Path) -> None:
    summary = run_grade(tmp_path, GREEDY + SAMPLES)
    assert summary["accuracy"] == 0.5  # b
    assert summary["accuracy_strict"] == 0.5
    assert summary["accuracy_flexible"] == 1.0
    assert summary["format_fraction"] == 0.5
    assert summary["num_problems"] == 2
    assert summary["num_samples"] == 4
    assert summary["pass_at_1"] == 0.25  # (2/4 + 0/4) / 2
    # pass@2 of a: 1 − C(2,2)/C(4,2) = 5/6; pass@4: 1; of b: 0
    assert summary["pass_at_k"] == pytest.approx({"1": 0.25, "2": 5 / 12, "4": 0.5})
    # maj@2 of a: {18, 19} tied: 1/2; {18, none}: 1 → 3/4. maj@4: 18 twice, 19 once → 1. b: 0
    assert summary["maj_at_k"] == pytest.approx({"1": 0.25, "2": 0.375, "4": 0.5})
    assert summary["mean_completion_tokens"] == 20.0  # greedy: (30 + 10) / 2
    assert summary["truncated_fraction"] == 0.5
    assert summary["seconds_generating"] == 2.5
    assert summary["provenance"] == {"commit": "abc"}
    assert (summary["grading"], summary["marker"]) == ("strict", "####")


def test_a_suite_without_samples_takes_pass_at_1_from_greedy(tmp_path: Path) -> None:
    summary = run_grade(tmp_path, GREEDY)
    assert (summary["pass_at_1"], summary["pass_at_k"], summary["maj_at_k"]) == (0.5, {}, {})


def test_a_suite_without_greedy_has_no_accuracy(tmp_path: Path) -> None:
    summary = run_grade(tmp_path, SAMPLES)
    assert summary["accuracy"] is None
    assert summary["pass_at_1"] == 0.25
    assert summary["mean_completion_tokens"] == 10.0


def test_flexible_grading_changes_the_grade_that_counts(tmp_path: Path) -> None:
    summary = run_grade(tmp_path, GREEDY, '{"grading": "flexible", "marker": "####"}')
    assert summary["accuracy"] == 1.0
    assert summary["accuracy_strict"] == 0.5


def test_grades_hold_one_sorted_row_per_completion(tmp_path: Path) -> None:
    run_grade(tmp_path, GREEDY + SAMPLES)
    grades = pl.read_parquet(tmp_path / "grades" / "test.parquet")
    assert grades.height == 10
    assert grades.row(0, named=True) == {
        "problem_id": "a",
        "decoding": "greedy",
        "sample_index": 0,
        "correct": False,
        "correct_strict": False,
        "correct_flexible": True,
        "has_format": False,
        "extracted": None,
        "num_tokens": 10,
        "truncated": False,
    }
    assert grades["extracted"].to_list() == [None, "18", "19", "18", None, "18", *["19"] * 4]


def test_the_order_of_completions_changes_no_byte(tmp_path: Path) -> None:
    run_grade(tmp_path / "one", GREEDY + SAMPLES)
    run_grade(tmp_path / "two", (GREEDY + SAMPLES)[::-1])
    for name in ("metrics/test.json", "grades/test.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / "metrics" / "test.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": None}, "row 2: 'num_tokens' should be int, found NoneType"),
        ({"num_tokens": True}, "'num_tokens' should be int, found bool"),
        ({"num_tokens": 9}, "'num_tokens' is 9 but 'token_ids' holds 10"),
        ({"token_ids": ["a"] * 10}, "whole numbers"),
        ({"completion": 18}, "'completion' should be str, found int"),
        ({"decoding": "beam"}, "'decoding' should be 'greedy' or 'sample', found 'beam'"),
        ({"finish_reason": "eos"}, "'finish_reason' should be 'stop' or 'length'"),
        ({"sample_index": -1}, "negative"),
        ({"gold": "eighteen"}, "row 2: gold answer 'eighteen' is not a number"),
        ({"problem_id": "b"}, "row 2: the same problem, decoding and sample as row 1"),
        ({"problem_id": "b", "sample_index": 1, "gold": "19"}, "gold is '19', but '18'"),
        ({"problem_id": "b", "sample_index": 1}, "2 greedy completions per problem"),
        ({"decoding": "sample"}, "problem 'b' has 1 greedy completions, problem 'a' has 0"),
    ],
)
def test_a_bad_completion_is_named_by_file_and_row(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [GREEDY[0], {**GREEDY[1], **change}]
    with pytest.raises(DataError) as caught:
        run_grade(tmp_path, rows)
    assert message in str(caught.value)
    assert "test.jsonl" in str(caught.value)
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize("key", sorted(GREEDY[0]))
def test_a_completion_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    row = {name: value for name, value in GREEDY[1].items() if name != key}
    with pytest.raises(DataError, match=f"row 2: '{key}' is missing"):
        run_grade(tmp_path, [GREEDY[0], row])


def test_no_completions_is_an_error_and_not_an_accuracy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no completions"):
        run_grade(tmp_path, [])


def test_grading_imports_no_torch_and_comparing_no_matplotlib() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import grade, compare\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS.parent, timeout=60)


# ------------------------------------------------------------------------------------------ compare


def make_study(**changes: Any) -> Study:
    study: Study = {
        "name": "demo",
        "models": ["m2", "m1"],
        "methods": ["base", "sft", "grpo"],
        "suites": ["test"],
        "seeds_of": {"base": [0], "sft": [3, 5], "grpo": [3, 5]},
        "parent_of": {"base": None, "sft": "base", "grpo": "sft"},
        "chains": {"base": ["base"], "sft": ["base", "sft"], "grpo": ["base", "sft", "grpo"]},
        "confidence": 0.95,
    }
    study.update(changes)  # type: ignore[typeddict-item]
    return study


def outcomes(method: str, seed: int) -> list[bool]:
    """Which of 40 problems a run gets right: base 8, sft 16 or 18, grpo 24 or 27."""
    limit = {"base": 8, "sft": 13 + seed, "grpo": 24 + 3 * (seed // 5)}[method]
    return [problem < limit for problem in range(40)]


@pytest.fixture
def study_dir(tmp_path: Path) -> Path:
    study = make_study()
    for model in study["models"]:
        for method in study["methods"]:
            for seed in study["seeds_of"][method]:
                run = tmp_path / "runs" / model / method / f"seed{seed}"
                rows = [
                    completion(f"p{i:02d}", RIGHT if right else WRONG)
                    for i, right in enumerate(outcomes(method, seed))
                ]
                run_grade(run, rows, model=model, method=method, seed=seed)
                if method != "base":
                    seconds = {"sft": 100.0, "grpo": 1000.0}[method] + seed
                    write_json(
                        run / "train" / "summary.json",
                        {"seconds_training": seconds, "num_tokens": 1000 * seed},
                    )
    return tmp_path / "runs"


def test_the_comparison_has_one_row_per_cell_in_the_order_of_the_study(study_dir: Path) -> None:
    frame = build_comparison(make_study(), study_dir)
    assert dict(frame.schema) == SCHEMA
    assert frame.select("model", "method").rows() == [
        (model, method) for model in ("m2", "m1") for method in ("base", "sft", "grpo")
    ]


def test_the_row_of_a_method_says_how_well_against_what_and_at_what_cost(study_dir: Path) -> None:
    frame = build_comparison(make_study(), study_dir)
    base, sft, grpo = frame.filter(pl.col("model") == "m1").iter_rows(named=True)

    assert (base["num_seeds"], base["num_problems"], base["accuracy"]) == (1, 40, 0.2)
    assert (base["accuracy_ci_low"], base["accuracy_ci_high"]) == pytest.approx(
        wilson_interval(8, 40)
    )
    for key in ("parent", "delta_vs_parent", "p_value_vs_parent", "train_seconds"):
        assert base[key] is None
    assert base["train_seconds_with_parents"] == 0.0

    assert sft["num_seeds"] == 2
    assert sft["accuracy"] == pytest.approx((16 + 18) / 80)
    assert sft["parent"] == "base"
    assert sft["delta_vs_parent"] == pytest.approx(34 / 80 - 8 / 40)
    assert sft["train_seconds"] == 104.0  # (103 + 105) / 2
    assert sft["num_train_tokens"] == 4000.0

    expected = paired_difference(
        np.array([outcomes("grpo", seed) for seed in (3, 5)], dtype=float),
        np.array([outcomes("sft", seed) for seed in (3, 5)], dtype=float),
    )
    found = [grpo[f"delta_vs_parent{end}"] for end in ("", "_ci_low", "_ci_high")]
    assert [*found, grpo["p_value_vs_parent"]] == pytest.approx(list(expected))
    assert grpo["train_seconds_with_parents"] == 104.0 + 1004.0
    assert grpo["generate_seconds"] == 2.5
    assert grpo["mean_completion_tokens"] == 10.0


def test_seeds_are_paired_by_number_and_not_by_position(study_dir: Path) -> None:
    study = make_study()
    study["seeds_of"] = {"base": [0], "sft": [5, 3], "grpo": [3, 5]}
    assert (
        build_comparison(study, study_dir)
        .filter(pl.col("method") == "grpo")
        .equals(build_comparison(make_study(), study_dir).filter(pl.col("method") == "grpo"))
    )


def test_a_parent_outside_the_study_is_named_but_not_compared_with(study_dir: Path) -> None:
    study = make_study(methods=["base", "grpo"])
    row = build_comparison(study, study_dir).row(1, named=True)
    assert (row["method"], row["parent"], row["delta_vs_parent"]) == ("grpo", "sft", None)
    assert row["train_seconds_with_parents"] == 104.0 + 1004.0


def test_a_suite_without_greedy_is_compared_by_its_samples(tmp_path: Path) -> None:
    run_grade(tmp_path / "m" / "base" / "seed0", SAMPLES)
    study = make_study(models=["m"], methods=["base"])
    row = build_comparison(study, tmp_path).row(0, named=True)
    assert (row["accuracy"], row["pass_at_1"], row["num_samples"]) == (0.25, 0.25, 4)
    assert (row["pass_at_n"], row["maj_at_n"]) == (0.5, 0.5)


def test_runs_of_different_problems_are_not_compared(study_dir: Path) -> None:
    run = study_dir / "m1" / "grpo" / "seed5"
    rows = [completion(f"p{i:02d}", RIGHT) for i in range(39)] + [completion("other", RIGHT)]
    run_grade(run, rows, model="m1", method="grpo", seed=5)
    with pytest.raises(DataError, match="not the same") as caught:
        build_comparison(make_study(), study_dir)
    assert "'other' is only in" in str(caught.value)
    assert str(run) in str(caught.value)


@pytest.mark.parametrize("name", ["grades/test.parquet", "metrics/test.json", "train/summary.json"])
def test_a_file_that_is_missing_or_torn_is_named(study_dir: Path, name: str) -> None:
    path = study_dir / "m1" / "sft" / "seed3" / name
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=name):
        build_comparison(make_study(), study_dir)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        build_comparison(make_study(), study_dir)


def test_a_summary_without_its_numbers_is_refused(study_dir: Path) -> None:
    write_json(study_dir / "m1" / "sft" / "seed3" / "metrics" / "test.json", {"accuracy": 1.0})
    with pytest.raises(DataError, match="pass_at_k.*missing"):
        build_comparison(make_study(), study_dir)


def test_the_comparison_reads_back_as_it_was_written(study_dir: Path, tmp_path: Path) -> None:
    frame = build_comparison(make_study(), study_dir)
    write_comparison(frame, tmp_path / "results")
    for suffix in ("csv", "parquet"):
        assert read_comparison(tmp_path / "results" / f"comparison.{suffix}").equals(frame)
    with pytest.raises(DataError, match="no such file"):
        read_comparison(tmp_path / "comparison.csv")


def test_the_markdown_is_aligned_rounded_and_in_percent(study_dir: Path) -> None:
    lines = to_markdown(build_comparison(make_study(), study_dir)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    low, high = (100 * bound for bound in wilson_interval(8, 40))
    assert f" 20.0 [{low:.1f}, {high:.1f}] |" in lines[2]
    assert " +22.5 [" in lines[3]  # 100·(34/80 − 8/40)
    assert "17.4 min" not in lines[3] and "16.7 min" in lines[4]  # 1004 s


def test_the_compare_script_writes_three_files_and_is_deterministic(
    study_dir: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        arguments = ["--study", json.dumps(make_study()), "--study-dir", str(study_dir)]
        assert compare.main([*arguments, "--output-dir", str(tmp_path / name)]) == 0
    for suffix in ("csv", "md", "parquet"):
        files = [tmp_path / name / f"comparison.{suffix}" for name in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
