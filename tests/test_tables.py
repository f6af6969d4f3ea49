"""scripts/grade.py and scripts/compare.py with the tables that they stand on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from script_modules import SCRIPTS, load_script

from gsm8k_core.config import Comparison, dump
from gsm8k_core.errors import DataError
from gsm8k_core.files import read_json, write_json, write_jsonl
from gsm8k_core.metrics import holm, mean_interval, paired_difference, pass_at_k, wilson_interval
from gsm8k_core.tables import (
    COST_COLUMNS,
    OTHER_PAIRS,
    PAIRS_SCHEMA,
    PASS_AT_1_COLUMNS,
    PASS_AT_K_SCHEMA,
    QUALITY_COLUMNS,
    SAMPLING_COLUMNS,
    SCHEMA,
    build_comparison,
    notes_on,
    points,
    read_comparison,
    read_pairs,
    to_html,
    to_markdown,
    with_interval,
    write_comparison,
)

SETTINGS = '{"grading": "strict", "marker": "####"}'
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


def test_no_answer_votes_for_nothing_and_not_for_the_first_of_the_answers(tmp_path: Path) -> None:
    # Two say nothing, and of the others as many say 18 as 19.
    texts = (RIGHT, "none", WRONG, "none")
    rows = [completion("a", text, "sample", index) for index, text in enumerate(texts)]
    assert run_grade(tmp_path, rows)["maj_at_k"]["4"] == 0.5


def test_the_order_of_rows_in_a_grades_file_changes_no_majority(tmp_path: Path) -> None:
    run = tmp_path / "m" / "base" / "seed0"
    run_grade(run, SAMPLES)
    study = make_study(models=["m"], methods=["base"])
    before = build_comparison(study, tmp_path)
    path = run / "grades" / "test.parquet"
    pl.read_parquet(path).sort("sample_index", "problem_id").write_parquet(path)
    for frame, same in zip(before, build_comparison(study, tmp_path), strict=True):
        assert frame.equals(same)


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
        "cluster": None,
        "decoding": "greedy",
        "sample_index": 0,
        "correct": False,
        "strict": False,
        "flexible": True,
        "lm_eval_strict": False,
        "lm_eval_flexible": True,
        "math_verify": None,
        "has_format": False,
        "contradicted": False,
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
        ({"cluster": 7}, "row 2: 'cluster' should be str, found int"),
        (
            {"problem_id": "b", "sample_index": 1, "cluster": "t"},
            "row 2: cluster is 't', but None in an earlier row of problem 'b'",
        ),
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


def test_grading_imports_no_torch_and_comparing_no_altair() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import grade, compare\n"
        "assert not {'torch', 'altair', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS.parent, timeout=60)


# ------------------------------------------------------------------------------------------ compare


def make_study(**changes: Any) -> Comparison:
    study: dict[str, Any] = {
        "name": "demo",
        "models": ["m2", "m1"],
        "methods": ["base", "sft", "grpo"],
        "suites": ["test"],
        "seeds": [3, 5],
        "chains": {"base": ["base"], "sft": ["base", "sft"], "grpo": ["base", "sft", "grpo"]},
        "confidence": 0.95,
    }
    return Comparison.model_validate({**study, **changes})


def build(study: Comparison, study_dir: Path) -> pl.DataFrame:
    return build_comparison(study, study_dir)[0]


def row_of(frame: pl.DataFrame, method: str, model: str = "m1", suite: str = "test") -> Any:
    wanted = {"model": model, "method": method, "suite": suite}
    return frame.row(
        by_predicate=pl.all_horizontal(pl.col(k) == v for k, v in wanted.items()), named=True
    )


def outcomes(method: str, seed: int) -> list[bool]:
    """Which of 40 problems a run gets right: base 8, sft 16 or 18, grpo 24 or 27."""
    limit = {"base": 8, "sft": 13 + seed, "grpo": 24 + 3 * (seed // 5)}[method]
    return [problem < limit for problem in range(40)]


@pytest.fixture
def study_dir(tmp_path: Path) -> Path:
    study = make_study()
    for model in study.models:
        for method in study.methods:
            for seed in study.seeds_of(method):
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
                        {
                            "seconds_training": seconds,
                            "num_tokens": 1000 * seed,
                            "peak_memory_mb": 2048 + seed,
                            **({"num_sampled_tokens": 10 * seed} if method == "grpo" else {}),
                            "device": "NVIDIA H200",
                        },
                    )
    return tmp_path / "runs"


def test_the_comparison_has_one_row_per_cell_in_the_order_of_the_study(study_dir: Path) -> None:
    frame = build(make_study(), study_dir)
    assert dict(frame.schema) == SCHEMA
    study = make_study()
    assert frame.select("study", "model", "method", "confidence").rows() == [
        (study.name, model, method, study.confidence)
        for model in ("m2", "m1")
        for method in ("base", "sft", "grpo")
    ]


def test_the_row_of_a_method_says_how_well_against_what_and_at_what_cost(study_dir: Path) -> None:
    frame = build(make_study(), study_dir)
    base, sft, grpo = frame.filter(pl.col("model") == "m1").iter_rows(named=True)

    assert (base["num_seeds"], base["num_problems"], base["accuracy"]) == (1, 40, 0.2)
    assert (base["accuracy_ci_low"], base["accuracy_ci_high"]) == pytest.approx(
        wilson_interval(8, 40)
    )
    for key in ("parent", "base", "flags", "train_seconds", "gpu_seconds_training"):
        assert base[key] is None
    for kind in ("parent", "base"):
        for key in (f"delta_vs_{kind}", f"p_value_vs_{kind}", f"p_value_vs_{kind}_holm"):
            assert base[key] is None
    assert base["train_seconds_with_parents"] == 0.0

    assert sft["num_seeds"] == 2
    assert sft["accuracy"] == pytest.approx((16 + 18) / 80)
    assert sft["parent"] == "base"
    assert sft["delta_vs_parent"] == pytest.approx(34 / 80 - 8 / 40)
    assert sft["train_seconds"] == 104.0  # (103 + 105) / 2
    assert sft["num_train_tokens"] == 4000.0
    assert (sft["num_sampled_tokens"], grpo["num_sampled_tokens"]) == (None, 40.0)

    right = {
        method: np.array([outcomes(method, seed) for seed in seeds], dtype=float)
        for method, seeds in (("base", [0]), ("sft", [3, 5]), ("grpo", [3, 5]))
    }
    for kind, other, detectable in (
        ("parent", "sft", "smallest_detectable_delta"),
        ("base", "base", "smallest_detectable_delta_vs_base"),
    ):
        expected = paired_difference(right["grpo"], right[other])
        found = [grpo[f"delta_vs_{kind}{end}"] for end in ("", "_ci_low", "_ci_high")]
        found += [grpo[f"p_value_vs_{kind}"], grpo[detectable]]
        assert found == pytest.approx(list(expected))
    assert grpo["base"] == "base"
    assert grpo["train_seconds_with_parents"] == 104.0 + 1004.0
    assert grpo["generate_seconds"] == 2.5
    assert grpo["mean_completion_tokens"] == 10.0


def test_a_gain_that_is_format_alone_can_be_told_from_one_in_arithmetic(study_dir: Path) -> None:
    # Right from the start, and after training also where the prompt asked for the answer.
    for method, text in (("base", UNMARKED), ("sft", RIGHT)):
        for seed in make_study().seeds_of(method):
            run = study_dir / "m1" / method / f"seed{seed}"
            rows = [completion(f"p{i:02d}", text) for i in range(40)]
            run_grade(run, rows, model="m1", method=method, seed=seed)
    frame = build(make_study(), study_dir)
    base, sft = row_of(frame, "base"), row_of(frame, "sft")
    assert (base["accuracy"], sft["accuracy"]) == (0.0, 1.0)
    assert (base["accuracy_flexible"], sft["accuracy_flexible"]) == (1.0, 1.0)
    assert (base["format_fraction"], sft["format_fraction"]) == (0.0, 1.0)
    for text in (to_markdown(frame), to_html(frame)):
        assert "flexible %" in text and "format %" in text and "format alone may have been" in text


def test_cost_is_that_of_the_stage_and_of_what_came_before_it(study_dir: Path) -> None:
    for method in ("base", "grpo"):  # two GPUs for grpo's completions; sft's device is unknown
        for stats in (study_dir / "m1" / method).glob("seed*/completions/test.stats.json"):
            engine = {"engine": "vllm", "device": "NVIDIA H200", "peak_memory_mb": 4096}
            settings = {"model_settings": {"vllm": {"tensor_parallel": 2}}}
            known = {**read_json(stats), **engine, "settings": settings}
            write_json(stats, {**known, "num_completion_tokens": 400})
    frame = build(make_study(), study_dir)
    base, sft, grpo = (row_of(frame, method) for method in ("base", "sft", "grpo"))
    assert (sft["gpu_seconds_training"], grpo["gpu_seconds_training"]) == (104.0, 1004.0)
    assert grpo["gpu_seconds_training_with_parents"] == 1108.0
    assert grpo["num_train_tokens_with_parents"] == 8000.0
    assert grpo["peak_memory_mb_training"] == 2052.0
    assert (base["gpu_seconds_generating"], grpo["gpu_seconds_generating"]) == (5.0, 5.0)
    assert (grpo["num_generated_tokens"], grpo["peak_memory_mb_generating"]) == (400.0, 4096.0)
    assert (sft["gpu_seconds_generating"], sft["peak_memory_mb_generating"]) == (None, None)
    # Each rank holds a GPU; what was sampled before held one.
    for summary in (study_dir / "m1" / "grpo").glob("seed*/train/summary.json"):
        write_json(summary, {**read_json(summary), "num_ranks": 4, "seconds_sampling": 100.0})
    four = row_of(build(make_study(), study_dir), "grpo")
    assert four["gpu_seconds_training"] == 4 * 904.0 + 100.0
    for summary in (study_dir / "m1" / "grpo").glob("seed*/train/summary.json"):
        write_json(summary, {**read_json(summary), "gpu_seconds_sampling": 300.0})
    three = row_of(build(make_study(), study_dir), "grpo")
    assert three["gpu_seconds_training"] == 4 * 904.0 + 300.0
    for summary in (study_dir / "m1" / "grpo").glob("seed*/train/summary.json"):
        write_json(summary, {**read_json(summary), "num_ranks": 1, "gpu_seconds_sampling": 100.0})
    # On the CPU no GPU is held.
    for summary in (study_dir / "m1" / "sft").glob("seed*/train/summary.json"):
        write_json(summary, {**read_json(summary), "device": "cpu"})
    assert (
        row_of(build(make_study(), study_dir), "grpo")["gpu_seconds_training_with_parents"] == 1004
    )


def test_a_cost_that_one_seed_does_not_tell_is_not_the_mean_of_the_others(study_dir: Path) -> None:
    path = study_dir / "m1" / "sft" / "seed3" / "train" / "summary.json"
    write_json(path, {**read_json(path), "seconds_training": None})
    frame = build(make_study(), study_dir)
    sft, grpo = row_of(frame, "sft"), row_of(frame, "grpo")
    assert (sft["train_seconds"], sft["num_train_tokens"]) == (None, 4000.0)
    assert (grpo["train_seconds"], grpo["train_seconds_with_parents"]) == (1004.0, None)


def test_p_values_are_corrected_over_all_methods_and_suites_of_a_model(study_dir: Path) -> None:
    for run in study_dir.glob("*/*/seed*"):
        rows = [completion(f"q{i}", RIGHT if i % 3 else WRONG) for i in range(30)]
        run_grade(run, rows, suite="other")
    frame = build(make_study(suites=["test", "other"]), study_dir)
    # What was trained from the base is tested once, among the parents.
    once = pl.col("parent").ne_missing(pl.col("base"))
    for kind, family, size in (("parent", pl.lit(True), 4), ("base", once, 2)):
        for model in ("m1", "m2"):
            part = frame.filter((pl.col("model") == model) & family)
            expected = holm(part[f"p_value_vs_{kind}"].to_list())
            assert part[f"p_value_vs_{kind}_holm"].to_list() == expected
            assert len([value for value in expected if value is not None]) == size
    twice = frame.filter(~once & pl.col("parent").is_not_null())
    assert twice["p_value_vs_base_holm"].to_list() == twice["p_value_vs_parent_holm"].to_list()
    assert twice.height == 4


SIBLINGS = {
    "base": ["base"],
    "sft": ["base", "sft"],
    "grpo": ["base", "sft", "grpo"],
    "dapo": ["base", "sft", "dapo"],
}
"""Chains of methods of which the comparison does not test one pair: `dapo` against `grpo`."""


def with_sibling(study_dir: Path, suites: Sequence[str] = ("test",)) -> Comparison:
    """`dapo` with what `grpo` has, but for two problems of each seed; all graded on every suite."""
    study = make_study(methods=list(SIBLINGS), chains=SIBLINGS, suites=list(suites))
    for model in study.models:
        for method in study.methods:
            for seed in study.seeds_of(method):
                run = study_dir / model / method / f"seed{seed}"
                for place, suite in enumerate(suites):
                    right = outcomes("grpo" if method == "dapo" else method, seed)
                    if method == "dapo":
                        right[38 - place] = right[39 - place] = True
                    rows = [
                        completion(f"{suite}{i:02d}", RIGHT if one else WRONG)
                        for i, one in enumerate(right)
                    ]
                    run_grade(run, rows, model=model, method=method, seed=seed, suite=suite)
                if method != "base":
                    write_json(run / "train" / "summary.json", {})
    return study


def test_every_pair_of_methods_has_a_row_with_its_paired_difference(study_dir: Path) -> None:
    study = with_sibling(study_dir)
    pairs = build_comparison(study, study_dir).pairs
    assert dict(pairs.schema) == PAIRS_SCHEMA
    of_model = [
        ("sft", "base"), ("grpo", "base"), ("dapo", "base"),
        ("grpo", "sft"), ("dapo", "sft"), ("dapo", "grpo"),
    ]  # fmt: skip
    assert pairs.select("study", "model", "suite", "method", "other", "confidence").rows() == [
        ("demo", model, "test", *pair, 0.95) for model in ("m2", "m1") for pair in of_model
    ]
    right = {
        method: np.array([outcomes(method, seed) for seed in seeds], dtype=float)
        for method, seeds in (("base", [0]), ("sft", [3, 5]), ("grpo", [3, 5]))
    }
    right["dapo"] = right["grpo"].copy()
    right["dapo"][:, 38:] = 1.0
    columns = ("delta", "delta_ci_low", "delta_ci_high", "p_value", "smallest_detectable_delta")
    for row in pairs.iter_rows(named=True):
        expected = paired_difference(right[row["method"]], right[row["other"]])
        assert [row[name] for name in columns] == pytest.approx(list(expected))


def test_a_pair_that_the_comparison_tests_keeps_its_p_and_all_others_are_one_family(
    study_dir: Path,
) -> None:
    study = with_sibling(study_dir, ("test", "other"))
    frame, _, pairs = build_comparison(study, study_dir)
    assert pairs.filter(family=OTHER_PAIRS).select("method", "other").unique().rows() == [
        ("dapo", "grpo")
    ]
    for row in pairs.filter(pl.col("family") != OTHER_PAIRS).iter_rows(named=True):
        tested = row_of(frame, row["method"], row["model"], row["suite"])
        kind = row["family"]
        assert tested[kind] == row["other"] and (kind == "parent" or tested["parent"] != "base")
        for name, of_frame in (
            ("delta", f"delta_vs_{kind}"),
            ("delta_ci_low", f"delta_vs_{kind}_ci_low"),
            ("p_value", f"p_value_vs_{kind}"),
        ):
            assert row[name] == pytest.approx(tested[of_frame])
        assert row["p_value_holm"] == tested[f"p_value_vs_{kind}_holm"]
    for model in study.models:
        family = pairs.filter(model=model, family=OTHER_PAIRS)
        assert family["suite"].to_list() == ["test", "other"]
        expected = holm(family["p_value"].to_list())
        assert family["p_value_holm"].to_list() == expected
        assert expected[0] is not None and expected[0] > family["p_value"][0]


def test_a_pair_is_the_same_whichever_of_the_two_the_study_names_first(study_dir: Path) -> None:
    study = with_sibling(study_dir)
    one = build_comparison(study, study_dir).pairs.filter(model="m1")
    turned = study.model_copy(update={"methods": study.methods[::-1]})
    other = build_comparison(turned, study_dir).pairs.filter(model="m1")
    for row in one.iter_rows(named=True):
        (same,) = other.filter(method=row["other"], other=row["method"]).to_dicts()
        assert same["delta"] == pytest.approx(-row["delta"])
        assert same["delta_ci_low"] == pytest.approx(-row["delta_ci_high"])
        for name in ("p_value", "p_value_holm", "smallest_detectable_delta"):
            assert same[name] == pytest.approx(row[name])
        assert same["family"] == row["family"]


def test_one_method_has_no_pairs_and_the_file_a_header_alone(
    study_dir: Path, tmp_path: Path
) -> None:
    tables = build_comparison(make_study(methods=["base"]), study_dir)
    write_comparison(tables, tmp_path / "results")
    path = tmp_path / "results" / "pairs.csv"
    assert path.read_text(encoding="utf-8") == ",".join(PAIRS_SCHEMA) + "\n"
    assert read_pairs(path).equals(tables.pairs) and tables.pairs.is_empty()
    assert "pairs.csv" not in to_markdown(tables.comparison)


def test_pairs_of_single_runs_and_of_samples_are_those_of_accuracy(study_dir: Path) -> None:
    once = build_comparison(make_study(seeds=[3]), study_dir).pairs.filter(model="m1")
    expected = paired_difference([outcomes("grpo", 3)], [outcomes("sft", 3)])
    row = once.row(by_predicate=(pl.col("other") == "sft"), named=True)
    assert (row["method"], row["delta"]) == ("grpo", pytest.approx(expected.delta))
    assert row["p_value"] == pytest.approx(expected.p_value)
    # Equal runs: nothing varies, so nothing can be said of what would have been found.
    for path in study_dir.glob("m1/grpo/*/grades/test.parquet"):
        shutil.copyfile(study_dir / "m1/sft/seed3/grades/test.parquet", path)
    row = (
        build_comparison(make_study(seeds=[3]), study_dir)
        .pairs.filter(model="m1", method="grpo", other="sft")
        .to_dicts()[0]
    )
    assert (row["delta"], row["p_value"], row["smallest_detectable_delta"]) == (0.0, 1.0, None)
    # A suite without greedy completions: accuracy is the mean over samples.
    sample_suite(study_dir, "sampled", greedy=False)
    pairs = build_comparison(make_study(suites=["sampled"]), study_dir).pairs
    after, before = (
        np.stack([sampled(method, seed, "sampled").mean(axis=1) for seed in (3, 5)])
        for method in ("grpo", "sft")
    )
    row = pairs.filter(model="m1", method="grpo", other="sft").to_dicts()[0]
    assert row["delta"] == pytest.approx(paired_difference(after, before).delta)


def test_the_tables_say_where_the_pairs_are_that_they_do_not_have(study_dir: Path) -> None:
    frame = build(make_study(), study_dir)
    for text in (to_markdown(frame), to_html(frame)):
        assert text.count("pairs.csv compares every two methods.") == 1
    two = build(make_study(methods=["base", "sft"]), study_dir)
    assert "pairs.csv" not in to_markdown(two)  # the one pair is in the table


def sampled(method: str, seed: int, suite: str) -> np.ndarray[Any, Any]:
    """Which of two samples of 40 problems are right, (40, 2)."""
    first = np.array(outcomes(method, seed))
    second = np.roll(first, len(suite)) & (np.arange(40) % 5 > seed % 2)
    return np.stack([first, second], axis=1)


def sample_suite(study_dir: Path, suite: str, greedy: bool = True) -> None:
    """Grade two samples a problem of every run, and a greedy completion."""
    for run in study_dir.glob("*/*/seed*"):
        method, seed = run.parent.name, int(run.name.removeprefix("seed"))
        rows = [
            completion(f"p{i:02d}", RIGHT if right else WRONG, "sample", index)
            for i, of_problem in enumerate(sampled(method, seed, suite))
            for index, right in enumerate(of_problem)
        ]
        if greedy:
            rows += [
                completion(f"p{i:02d}", RIGHT if right else WRONG)
                for i, right in enumerate(outcomes(method, seed))
            ]
        run_grade(run, rows, suite=suite, method=method, seed=seed)


def test_differences_of_pass_at_1_are_paired_and_corrected_by_themselves(study_dir: Path) -> None:
    sample_suite(study_dir, "test")
    sample_suite(study_dir, "sampled", greedy=False)
    frame = build(make_study(suites=["test", "sampled"]), study_dir)
    for suite in ("test", "sampled"):
        shares = {
            method: np.stack([sampled(method, seed, suite).mean(axis=1) for seed in seeds])
            for method, seeds in (("base", [0]), ("sft", [3, 5]), ("grpo", [3, 5]))
        }
        row = row_of(frame, "grpo", suite=suite)
        for kind, other, suffix in (("parent", "sft", ""), ("base", "base", "_vs_base")):
            delta = f"delta_pass_at_1_vs_{kind}"
            found = [row[f"{delta}{end}"] for end in ("", "_ci_low", "_ci_high")]
            found += [row[f"p_value_pass_at_1_vs_{kind}"]]
            found += [row[f"smallest_detectable_delta_pass_at_1{suffix}"]]
            assert found == pytest.approx(list(paired_difference(shares["grpo"], shares[other])))
            assert row[delta] != row[f"delta_vs_{kind}"] or suite == "sampled"
    once = pl.col("parent").ne_missing(pl.col("base"))
    for kind, family, size in (("parent", pl.lit(True), 4), ("base", once, 2)):
        part = frame.filter((pl.col("model") == "m1") & family)
        for of in ("", "_pass_at_1"):
            expected = holm(part[f"p_value{of}_vs_{kind}"].to_list())
            assert part[f"p_value{of}_vs_{kind}_holm"].to_list() == expected
            assert len([value for value in expected if value is not None]) == size
    sft = row_of(frame, "sft")  # its parent is the base: tested once
    assert sft["p_value_pass_at_1_vs_base_holm"] == sft["p_value_pass_at_1_vs_parent_holm"]


def test_pass_at_1_has_a_table_of_its_own_where_it_says_more_than_accuracy(study_dir: Path) -> None:
    study = make_study(models=["m1"], suites=["sampled"])
    sample_suite(study_dir, "sampled", greedy=False)
    alike = build(study, study_dir)
    grpo = row_of(alike, "grpo", suite="sampled")
    assert grpo["delta_pass_at_1_vs_parent"] == grpo["delta_vs_parent"] > 0
    assert grpo["p_value_pass_at_1_vs_parent_holm"] == grpo["p_value_vs_parent_holm"]
    title, note = "Differences of pass@1", "Decide before the study which of them is the question"
    for text in (to_markdown(alike), to_html(alike)):
        assert title not in text and note not in text
    # Without samples there is no pass@1 that could differ.
    greedy = build(make_study(models=["m1"]), study_dir)
    assert row_of(greedy, "grpo")["delta_pass_at_1_vs_parent"] is None
    assert row_of(greedy, "grpo")["p_value_pass_at_1_vs_parent_holm"] is None
    assert title not in to_markdown(greedy)

    sample_suite(study_dir, "test")
    both = build(make_study(models=["m1"], suites=["test", "sampled"]), study_dir)
    for text in (to_markdown(both), to_html(both)):
        assert text.count(title) == text.count(note) == 1
    # Whoever asks for pass@1 finds all of its family there.
    table = to_markdown(both).partition(f"### {title}\n\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.split("\n")[2:]]
    assert [line[2:4] for line in cells] == [
        [suite, method] for suite in ("test", "sampled") for method in ("sft", "grpo")
    ]


def test_pass_at_k_has_a_row_for_every_k_with_its_interval(tmp_path: Path) -> None:
    run_grade(tmp_path / "m" / "base" / "seed0", SAMPLES)
    curves = build_comparison(make_study(models=["m"], methods=["base"]), tmp_path).pass_at_k
    assert dict(curves.schema) == PASS_AT_K_SCHEMA
    assert curves["k"].to_list() == [1, 2, 3, 4]
    for row in curves.iter_rows(named=True):
        expected = mean_interval(pass_at_k(4, [2, 0], row["k"])[None])
        ends = ("", "_ci_low", "_ci_high")
        assert [row[f"pass_at_k{end}"] for end in ends] == pytest.approx(list(expected))


def test_maj_at_k_has_an_interval_over_seeds_and_problems(tmp_path: Path) -> None:
    texts = {
        # For each seed and problem four samples; 18 is right.
        1: {"a": (RIGHT, WRONG, RIGHT, UNMARKED), "b": (WRONG,) * 4, "c": (RIGHT,) * 4},
        2: {
            "a": (RIGHT, WRONG, WRONG, RIGHT),
            "b": (WRONG, RIGHT, RIGHT, RIGHT),
            "c": (WRONG,) * 4,
        },
    }
    # maj@2 of a by hand: {18, 19} tied ½ and {18, none} 1; {18, 19} ½ and {19, 18} ½. Of b: 0;
    # {19, 18} ½ and {18, 18} 1. maj@4 of a: 18 twice, 19 once; two each. Of b: 0; 18 three times.
    by_hand = {
        1: [[0.5, 0.0, 1.0], [0.5, 0.75, 0.0]],
        2: [[0.75, 0.0, 1.0], [0.5, 0.75, 0.0]],
        4: [[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]],
    }
    for seed, problems in texts.items():
        rows = [
            completion(problem, text, "sample", index)
            for problem, samples in problems.items()
            for index, text in enumerate(samples)
        ]
        summary = run_grade(tmp_path / "m" / "sft" / f"seed{seed}", rows, method="sft", seed=seed)
        for k, values in by_hand.items():
            assert summary["maj_at_k"][str(k)] == pytest.approx(np.mean(values[seed - 1]))
        write_json(tmp_path / "m" / "sft" / f"seed{seed}" / "train" / "summary.json", {})
    study = make_study(models=["m"], methods=["sft"], seeds=[1, 2])
    frame, curves, _ = build_comparison(study, tmp_path)
    ends = ("", "_ci_low", "_ci_high")
    for row in curves.iter_rows(named=True):
        found = [row[f"maj_at_k{end}"] for end in ends]
        if row["k"] == 3:  # maj@k is of powers of two alone
            assert found == [None, None, None]
        else:
            assert found == pytest.approx(list(mean_interval(by_hand[row["k"]])))
    (row,) = frame.iter_rows(named=True)
    for name in ("pass_at", "maj_at"):
        last = curves.row(3, named=True)
        assert [row[f"{name}_n{end}"] for end in ends] == [last[f"{name}_k{end}"] for end in ends]
    low, high = (100 * bound for bound in mean_interval(by_hand[4])[1:])
    for text in (to_markdown(frame), to_html(frame)):
        assert "Repeated sampling" in text
        assert f"58.3 [{low:.1f}, {high:.1f}]" in re.sub("</?span>", "", text)


def test_a_study_without_samples_has_no_table_of_repeated_sampling(study_dir: Path) -> None:
    frame, curves, _ = build_comparison(make_study(), study_dir)
    assert curves.is_empty() and "Repeated sampling" not in to_markdown(frame)
    assert row_of(frame, "sft")["maj_at_n"] is None


def set_stats(study_dir: Path, method: str, **changes: Any) -> None:
    for stats in (study_dir / "m1" / method).glob("seed*/completions/test.stats.json"):
        write_json(stats, {**read_json(stats), **changes})


def test_rows_that_were_not_made_alike_are_flagged_and_explained(study_dir: Path) -> None:
    assert row_of(build(make_study(), study_dir), "grpo")["flags"] == "2 seeds"
    suite = {"suite_settings": {"max_new_tokens": 256}, "prompt": {"template": "{question}"}}
    for method in ("base", "sft", "grpo"):
        code = {"code_digest": "abc", "git": {"commit": "1", "diff_sha256": None}}
        set_stats(study_dir, method, engine="transformers", settings=suite, provenance=code)
    assert row_of(build(make_study(), study_dir), "grpo")["flags"] == "2 seeds"

    other = {**suite, "suite_settings": {"max_new_tokens": 512}}
    code = {"code_digest": "def", "git": {"commit": "2", "diff_sha256": None}}
    set_stats(study_dir, "sft", engine="vllm", settings=other, provenance=code)
    frame = build(make_study(), study_dir)
    assert row_of(frame, "base")["flags"] is None
    assert row_of(frame, "sft")["flags"] == "2 seeds; parent: engine, suite settings, code"
    assert row_of(frame, "grpo")["flags"] == "2 seeds; parent: engine, suite settings, code"
    for text in (to_markdown(frame), to_html(frame)):
        assert "flag “suite settings”: other problems, sampling or limits." in text
        assert "flag “2 seeds”: too few" in text


def test_seeds_that_were_not_trained_alike_are_flagged(study_dir: Path) -> None:
    for seed, rate in ((3, 1e-5), (5, 2e-5)):
        settings = {"seed": seed, "method": "sft", "method_settings": {"learning_rate": rate}}
        write_json(study_dir / "m1" / "sft" / f"seed{seed}" / "settings.json", settings)
    settings = {"method": "grpo", "method_settings": {"clip_low": 0.2}}
    write_json(study_dir / "m1" / "grpo" / "seed3" / "settings.json", settings)
    frame = build(make_study(), study_dir)
    assert row_of(frame, "sft")["flags"] == "seeds: training settings; 2 seeds"
    assert row_of(frame, "grpo")["flags"] == "2 seeds"  # methods are meant to differ


def test_rows_of_other_problems_data_or_starting_weights_are_flagged(study_dir: Path) -> None:
    def write(method: str, parent: str | None, data: str, problems: str = "p") -> None:
        for run in (study_dir / "m1" / method).glob("seed*"):
            stats = run / "completions" / "test.stats.json"
            weights = {"weights": f"{method} {run.name}", "problems_sha256": problems}
            write_json(stats, {**read_json(stats), **weights})
            if parent is not None:
                start = f"{parent} {run.name}" if parent != "base" else "base seed0"
                path = run / "train" / "summary.json"
                began = {"parent": parent, "starting_weights": start, "data_sha256": data}
                write_json(path, {**read_json(path), **began})

    write("base", None, "")
    write("sft", "base", "d")
    write("grpo", "sft", "d")
    frame = build(make_study(), study_dir)
    assert [row_of(frame, name)["flags"] for name in ("sft", "grpo")] == ["2 seeds"] * 2

    write("grpo", "sft", "e", problems="q")
    path = study_dir / "m1" / "sft" / "seed3" / "train" / "summary.json"
    write_json(path, {**read_json(path), "starting_weights": "another revision"})
    frame = build(make_study(), study_dir)
    assert row_of(frame, "sft")["flags"] == "2 seeds; parent: starting weights"
    assert row_of(frame, "grpo")["flags"] == (
        "2 seeds; parent: problems, training data; base: problems"
    )
    assert "flag “problems”: other problems" in to_markdown(frame)


def test_prompts_that_were_cut_are_copied_from_the_stats_and_flagged(study_dir: Path) -> None:
    run = study_dir / "m1" / "base" / "seed0"
    rows = [completion(f"p{i:02d}", WRONG) for i in range(40)]
    assert run_grade(run, rows, model="m1", num_prompts_truncated=37)["num_prompts_truncated"] == 37
    frame = build(make_study(), study_dir)
    assert row_of(frame, "base")["flags"] == "prompts cut: 92.5 %"
    assert row_of(frame, "sft")["flags"] == "2 seeds"
    for text in (to_markdown(frame), to_html(frame)):
        assert "prompts cut: 92.5 %" in text
        assert "flag “prompts cut”: so many prompts were too long for the model" in text
    run_grade(run, rows, model="m1", num_prompts_truncated=0)
    assert row_of(build(make_study(), study_dir), "base")["flags"] is None


@pytest.mark.parametrize(
    ("grading", "flagged"), [("strict", True), ("lm_eval_strict", True), ("flexible", False)]
)
def test_completions_that_contradict_themselves_are_flagged_from_one_in_a_hundred(
    study_dir: Path, grading: str, flagged: bool
) -> None:
    settings = SETTINGS.replace("strict", grading)
    study = make_study(seeds=[3])
    for num_problems, expected in ((101, None), (100, "right and then contradicted: 1 %")):
        for model in study.models:
            for method in study.methods:
                texts = [RIGHT] * (num_problems - 2)
                # The second is wrong by the number that counts, so nothing right is contradicted.
                texts += [f"{RIGHT} shells.\n#### 17", f"{WRONG}\n{RIGHT}"]
                rows = [completion(f"p{i:03d}", text) for i, text in enumerate(texts)]
                run = study_dir / model / method / f"seed{study.seeds_of(method)[0]}"
                summary = run_grade(run, rows, settings)
                assert summary["contradicted_fraction"] == 1 / num_problems
        frame = build(study, study_dir)
        assert row_of(frame, "base")["flags"] == (expected if flagged else None)
        if flagged and expected:
            assert "flag “right and then contradicted”: so many" in to_markdown(frame)


def test_completions_that_math_verify_was_killed_on_are_flagged_where_its_grade_counts(
    tmp_path: Path,
) -> None:
    run = tmp_path / "m" / "base" / "seed0"
    rows = [completion("a", text, "sample", i) for i, text in enumerate([RIGHT, RIGHT, WRONG])]
    rows.append(completion("a", "$9^{9^{9^{9}}}$"))
    summary = run_grade(run, rows, '{"grading": "math_verify", "marker": "####"}')
    assert summary["math_verify_killed"] == 1
    study = make_study(models=["m"], methods=["base"])
    frame = build(study, tmp_path)
    assert frame["flags"].to_list() == ["not graded in time: 25 %"]
    assert "flag “not graded in time”: so many completions took" in to_markdown(frame)
    write_json(run / "metrics" / "test.json", {**summary, "grading": "strict"})
    assert build(study, tmp_path)["flags"].to_list() == [None]


def test_what_was_run_once_says_that_its_interval_is_of_problems_alone(study_dir: Path) -> None:
    study = make_study(seeds=[3])
    frame = build(study, study_dir)
    assert row_of(frame, "base")["flags"] is None  # nothing of it is a draw of training
    assert row_of(frame, "sft")["flags"] == "1 seed: problems only"
    assert "flag “1 seed”: the interval is of problems alone" in to_markdown(frame)


def test_runs_without_statistics_of_generation_are_compared_all_the_same(study_dir: Path) -> None:
    for stats in study_dir.glob("*/*/*/completions/*"):
        stats.unlink()
    row = row_of(build(make_study(), study_dir), "grpo")
    assert row["delta_vs_parent"] is not None
    assert row["peak_memory_mb_generating"] is None


def test_problems_that_were_not_sampled_equally_often_are_refused(study_dir: Path) -> None:
    path = study_dir / "m1" / "sft" / "seed3" / "grades" / "test.parquet"
    extra = pl.read_parquet(path).with_columns(decoding=pl.lit("sample"))
    pl.concat([pl.read_parquet(path), extra.head(3)]).write_parquet(path)
    with pytest.raises(DataError, match="not every problem has .* samples"):
        build(make_study(), study_dir)


def test_a_parent_outside_the_study_is_named_but_not_compared_with(study_dir: Path) -> None:
    study = make_study(methods=["base", "grpo"])
    row = build(study, study_dir).row(1, named=True)
    assert (row["method"], row["parent"], row["delta_vs_parent"]) == ("grpo", "sft", None)
    assert row["train_seconds_with_parents"] == 104.0 + 1004.0


def test_a_suite_without_greedy_is_compared_by_its_samples(tmp_path: Path) -> None:
    run_grade(tmp_path / "m" / "base" / "seed0", SAMPLES)
    study = make_study(models=["m"], methods=["base"])
    row = build(study, tmp_path).row(0, named=True)
    assert (row["accuracy"], row["pass_at_1"], row["num_samples"]) == (0.25, 0.25, 4)
    assert (row["pass_at_n"], row["maj_at_n"]) == (0.5, 0.5)
    low, high = row["maj_at_n_ci_low"], row["maj_at_n_ci_high"]
    assert (low, high) == pytest.approx(mean_interval([[1.0, 0.0]])[1:])


def test_runs_of_different_problems_are_not_compared(study_dir: Path) -> None:
    run = study_dir / "m1" / "grpo" / "seed5"
    rows = [completion(f"p{i:02d}", RIGHT) for i in range(39)] + [completion("other", RIGHT)]
    run_grade(run, rows, model="m1", method="grpo", seed=5)
    with pytest.raises(DataError, match="not the same") as caught:
        build(make_study(), study_dir)
    assert "'other' is only in" in str(caught.value)
    assert str(run) in str(caught.value)


def test_a_suite_has_the_same_problems_for_every_model(study_dir: Path) -> None:
    for run in (study_dir / "m1").glob("*/seed*"):
        run_grade(run, [completion("other", RIGHT)], model="m1", method=run.parent.name)
    with pytest.raises(DataError, match="graded 1 problems, .* 40, and not the same"):
        build(make_study(), study_dir)


@pytest.mark.parametrize("name", ["grades/test.parquet", "metrics/test.json", "train/summary.json"])
def test_a_file_that_is_missing_or_torn_is_named(study_dir: Path, name: str) -> None:
    path = study_dir / "m1" / "sft" / "seed3" / name
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=name):
        build(make_study(), study_dir)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        build(make_study(), study_dir)


def test_a_summary_without_its_numbers_is_refused(study_dir: Path) -> None:
    write_json(study_dir / "m1" / "sft" / "seed3" / "metrics" / "test.json", {"accuracy": 1.0})
    with pytest.raises(DataError, match="pass_at_1.*missing"):
        build(make_study(), study_dir)


def with_clusters(path: Path, size: int) -> list[str]:
    """Put so many problems of a grades file into each cluster; returns the problems' clusters."""
    grades = pl.read_parquet(path)
    names = [f"c{int(name[1:]) // size}" for name in grades["problem_id"]]
    grades.with_columns(cluster=pl.Series(names)).write_parquet(path)
    return names


def test_clones_have_the_intervals_and_tests_of_their_clusters(study_dir: Path) -> None:
    plain = build(make_study(), study_dir)
    for path in study_dir.glob("m1/*/*/grades/test.parquet"):
        clusters = with_clusters(path, 4)
    frame = build(make_study(), study_dir)
    assert frame.filter(model="m2").equals(plain.filter(model="m2"))
    right = {
        method: np.array([outcomes(method, seed) for seed in seeds], dtype=float)
        for method, seeds in (("base", [0]), ("sft", [3, 5]), ("grpo", [3, 5]))
    }
    for method, values in right.items():
        row, before = row_of(frame, method), row_of(plain, method)
        assert (row["num_problems"], row["num_clusters"]) == (40, 10)
        assert before["num_clusters"] is None
        ends = [row[f"accuracy{end}"] for end in ("", "_ci_low", "_ci_high")]
        assert ends == pytest.approx(list(mean_interval(values, 0.95, clusters)))
        assert ends[2] - ends[1] > before["accuracy_ci_high"] - before["accuracy_ci_low"]
    row = row_of(frame, "grpo")
    for kind, other in (("parent", "sft"), ("base", "base")):
        expected = paired_difference(right["grpo"], right[other], 0.95, clusters)
        found = [row[f"delta_vs_{kind}{end}"] for end in ("", "_ci_low", "_ci_high")]
        assert [*found, row[f"p_value_vs_{kind}"]] == pytest.approx(list(expected[:4]))
    note = "test: 40 problems in 10 clusters. Problems of one cluster are made from one template or"
    for text in (to_markdown(frame), to_html(frame)):
        assert text.count(note) == 1
    assert "cluster" not in to_markdown(plain)


def test_samples_of_clones_have_the_intervals_of_their_clusters(tmp_path: Path) -> None:
    texts = {"a": (RIGHT, RIGHT), "b": (RIGHT, WRONG), "c": (WRONG, WRONG), "d": (WRONG, RIGHT)}
    rows = [
        completion(problem, text, "sample", index, cluster="ab" if problem in "ab" else "cd")
        for problem, samples in texts.items()
        for index, text in enumerate(samples)
    ]
    run_grade(tmp_path / "m" / "base" / "seed0", rows)
    frame, curves, _ = build_comparison(make_study(models=["m"], methods=["base"]), tmp_path)
    clusters, ends = ["ab", "ab", "cd", "cd"], ("", "_ci_low", "_ci_high")
    by_hand: dict[str, list[float]] = {
        "pass_at_1": [1, 0.5, 0, 0.5],
        "pass_at_n": [1, 1, 0, 1],
        "maj_at_n": [1, 0.5, 0, 0.5],
    }
    for name, values in by_hand.items():
        expected = mean_interval([values], 0.95, clusters)
        found = frame.row(0, named=True)
        assert [found[f"{name}{end}"] for end in ends] == pytest.approx(list(expected))
    for name, of_frame in (("pass_at_k", "pass_at_n"), ("maj_at_k", "maj_at_n")):
        expected = mean_interval([by_hand[of_frame]], 0.95, clusters)
        found = curves.row(1, named=True)
        assert [found[f"{name}{end}"] for end in ends] == pytest.approx(list(expected))


def test_grades_that_do_not_tell_clusters_are_refused_with_what_makes_them_again(
    study_dir: Path,
) -> None:
    path = study_dir / "m1" / "sft" / "seed5" / "grades" / "test.parquet"
    pl.read_parquet(path).drop("cluster").write_parquet(path)
    with pytest.raises(DataError) as refused:
        build(make_study(), study_dir)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{path}: not a grades file") and '"cluster"' in line
    assert line.endswith("run grade.py again, or snakemake with `--forcerun grade`")


def test_a_problem_of_no_cluster_is_its_own(study_dir: Path) -> None:
    for path in study_dir.glob("m1/*/*/grades/test.parquet"):
        grades = pl.read_parquet(path)
        cluster = pl.when(pl.col("problem_id") < "p04").then(pl.lit("p07")).otherwise(None)
        grades.with_columns(cluster=cluster).write_parquet(path)
    assert row_of(build(make_study(), study_dir), "base")["num_clusters"] == 1 + 36


def test_the_comparison_reads_back_as_it_was_written(study_dir: Path, tmp_path: Path) -> None:
    tables = build_comparison(make_study(), study_dir)
    write_comparison(tables, tmp_path / "results")
    for suffix in ("csv", "parquet"):
        found = read_comparison(tmp_path / "results" / f"comparison.{suffix}")
        assert found.equals(tables.comparison)
    assert read_pairs(tmp_path / "results" / "pairs.csv").equals(tables.pairs)
    for read, name in ((read_comparison, "comparison.csv"), (read_pairs, "pairs.csv")):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / name)


def test_differences_have_a_sign_which_below_0_is_a_minus_and_no_hyphen() -> None:
    row = {"delta": -0.0254, "delta_ci_low": -0.0501, "delta_ci_high": -0.0001}
    assert with_interval(row, "delta", points) == "\u22122.5 [\u22125.0, +0.0]"
    assert with_interval({"delta": None}, "delta", points) == ""


def test_the_markdown_is_aligned_rounded_and_in_percent(study_dir: Path) -> None:
    text = to_markdown(build(make_study(), study_dir))
    quality = text.partition("### Quality\n\n")[2].partition("\n\n")[0].split("\n")
    cost = text.partition("### Cost\n\n")[2].partition("\n\n")[0].split("\n")
    for lines in (quality, cost):
        assert len(lines) == 2 + 6
        assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    low, high = (100 * bound for bound in wilson_interval(8, 40))
    assert f" 20.0 [{low:.1f}, {high:.1f}] |" in quality[2]
    assert " +22.5 [" in quality[3]  # 100·(34/80 − 8/40)
    assert "18.5 min" not in cost[3] and "18.5 min" in cost[4]  # 1108 s


def test_every_column_shows_the_number_that_its_name_says() -> None:
    row: dict[str, Any] = {
        name: place / 128 if kind == pl.Float64 else 8 if kind == pl.Int64 else name
        for place, (name, kind) in enumerate(SCHEMA.items())
    }

    def interval(name: str, form: str = ".1f") -> str:
        value, low, high = (
            f"{100 * row[name + end]:{form}}" for end in ("", "_ci_low", "_ci_high")
        )
        return f"{value} [{low}, {high}]"

    quality = {name: render(row) for name, render in QUALITY_COLUMNS.items()}
    assert quality == {
        **{name: name for name in ("model", "suite", "method", "parent", "flags")},
        **dict.fromkeys(("seeds", "problems"), "8"),
        "accuracy %": interval("accuracy"),
        "flexible %": f"{100 * row['accuracy_flexible']:.1f}",
        "format %": f"{100 * row['format_fraction']:.1f}",
        "vs parent, points": interval("delta_vs_parent", "+.1f"),
        "p parent": f"{row['p_value_vs_parent_holm']:.3f}",
        "detectable": f"{100 * row['smallest_detectable_delta']:.1f}",
        "vs base, points": interval("delta_vs_base", "+.1f"),
        "p base": f"{row['p_value_vs_base_holm']:.3f}",
        "pass@1 %": interval("pass_at_1"),
    }
    pass_at_1 = {name: render(row) for name, render in PASS_AT_1_COLUMNS.items()}
    assert pass_at_1 == {
        **{name: name for name in ("model", "suite", "method", "parent")},
        "samples": "8",
        "pass@1 %": f"{100 * row['pass_at_1']:.1f}",
        "vs parent, points": interval("delta_pass_at_1_vs_parent", "+.1f"),
        "p parent": f"{row['p_value_pass_at_1_vs_parent_holm']:.3f}",
        "detectable": f"{100 * row['smallest_detectable_delta_pass_at_1']:.1f}",
        "vs base, points": interval("delta_pass_at_1_vs_base", "+.1f"),
        "p base": f"{row['p_value_pass_at_1_vs_base_holm']:.3f}",
    }
    sampling = {
        name: render({**row, "num_samples": 13}) for name, render in SAMPLING_COLUMNS.items()
    }
    assert (sampling["samples"], sampling["n"]) == ("13", "8")
    for title, name in (
        ("pass@1 %", "pass_at_1"),
        ("pass@n %", "pass_at_n"),
        ("maj@n %", "maj_at_n"),
    ):
        assert sampling[title] == interval(name)
    costs = {
        "training": "train_seconds",
        "with parents": "train_seconds_with_parents",
        "GPU with parents": "gpu_seconds_training_with_parents",
        "tokens trained": "num_train_tokens",
        "sampled for it": "num_sampled_tokens",
        "peak memory": "peak_memory_mb_training",
        "generating": "generate_seconds",
        "tokens generated": "num_generated_tokens",
        "peak generating": "peak_memory_mb_generating",
        "tokens a completion": "mean_completion_tokens",
    }
    for title, render in COST_COLUMNS.items():
        if title in costs:
            assert render(row) != render({**row, costs[title]: 5000.0})
            others = dict.fromkeys(costs.values(), 5000.0)
            assert render(row) == render({**row, **others, costs[title]: row[costs[title]]})
    assert costs.keys() <= COST_COLUMNS.keys()


def test_where_all_ran_once_the_tables_say_that_intervals_are_over_problems_alone(
    study_dir: Path,
) -> None:
    frame = build(make_study(seeds=[3]), study_dir)
    assert "95 % intervals over problems alone, each for itself" in notes_on(frame)[0]


def test_the_tables_say_the_level_of_their_intervals(study_dir: Path, tmp_path: Path) -> None:
    study = make_study(confidence=0.995)
    arguments = ["--study", dump(study), "--study-dir", str(study_dir)]
    assert compare.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    for suffix in ("md", "html"):
        text = (tmp_path / f"comparison.{suffix}").read_text(encoding="utf-8")
        assert "Brackets are 99.5 % intervals over seeds and problems, each for itself" in text


def test_names_cannot_break_out_of_the_tables(study_dir: Path) -> None:
    name = "<script>alert(1)</script>|`"
    frame = build(make_study(), study_dir).with_columns(model=pl.lit(name))
    assert "<script>" not in to_html(frame)
    assert "&lt;script&gt;" in to_html(frame)
    line = to_markdown(frame).split("\n")[6]
    assert "\\|`" in line
    named = frame.with_columns(study=pl.lit(name))
    assert "<script>" not in to_html(named) and "&lt;script&gt;" in to_html(named)


def test_the_page_needs_nothing_from_elsewhere_and_is_well_formed(study_dir: Path) -> None:
    page = to_html(build(make_study(), study_dir))
    assert not re.search(r"(src|href)=|https?://|<script", page)
    for tag in ("table", "tr", "td", "th", "tbody", "span", "ul", "li", "h1", "h2", "html"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>") > 0


def test_what_single_seeds_reach_stands_in_every_table(study_dir: Path, tmp_path: Path) -> None:
    tables = build_comparison(make_study(), study_dir)
    seeds = make_study().seeds_of("grpo")
    alone = [float(np.mean(outcomes("grpo", seed))) for seed in seeds]
    by_seed = ";".join(f"{seed}:{share}" for seed, share in zip(seeds, alone, strict=True))
    write_comparison(tables, tmp_path)
    rows = pl.read_csv(tmp_path / "comparison.csv").filter(pl.col("method") == "grpo")
    assert rows["accuracy_by_seed"].to_list() == [by_seed, by_seed]
    assert rows["pass_at_1_by_seed"].to_list() == [by_seed, by_seed]
    assert np.mean(alone) == pytest.approx(rows["accuracy"][0])
    text = ", ".join(f"{seed}: {100 * share:.1f}" for seed, share in zip(seeds, alone, strict=True))
    for suffix in ("md", "html"):
        page = (tmp_path / f"comparison.{suffix}").read_text(encoding="utf-8")
        assert "Single seeds" in page and page.count(text) == 2  # of two models, without samples
    once = make_study(seeds=seeds[:1])
    assert "Single seeds" not in to_markdown(build(once, study_dir))


def test_the_tables_say_which_study_they_are_of(study_dir: Path, tmp_path: Path) -> None:
    study = make_study(name="spring")
    arguments = ["--study", dump(study), "--study-dir", str(study_dir)]
    assert compare.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "<title>spring: comparison</title>" in page
    assert "<h1>spring: comparison</h1>" in page
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith("## spring: comparison\n\n### Quality\n")


def test_every_header_cell_of_the_page_says_what_it_heads(study_dir: Path) -> None:
    page = to_html(build(make_study(), study_dir))
    cells = re.findall(r"<th( [^>]*)?>(.*?)</th>", page)
    assert cells and all(' scope="' in attributes for attributes, _ in cells)
    of_rows = [name for attributes, name in cells if 'scope="row"' in attributes]
    assert of_rows[:3] == ["base", "sft", "grpo"]
    groups = [name for attributes, name in cells if "rowgroup" in attributes]
    assert groups[:2] == ["m2 on test", "m1 on test"]
    assert len(re.findall("<tbody>", page)) == len(groups)


def test_the_compare_script_writes_six_files_and_is_deterministic(
    study_dir: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        arguments = ["--study", dump(make_study()), "--study-dir", str(study_dir)]
        assert compare.main([*arguments, "--output-dir", str(tmp_path / name)]) == 0
    names = ["comparison.csv", "comparison.html", "comparison.md", "comparison.parquet"]
    names += ["pairs.csv", "pass_at_k.csv"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_a_tenth_of_ten_million_completions_is_compared_in_seconds_and_little_memory() -> None:
    script = SCRIPTS.parent / "benchmarks" / "compare_scale.py"
    limits = ["--num-models", "1", "--max-seconds", "20", "--max-gib", "1"]
    result = subprocess.run(
        [sys.executable, str(script), *limits], stdout=subprocess.PIPE, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert json.loads(result.stdout)["num_completions"] == 1_055_200
