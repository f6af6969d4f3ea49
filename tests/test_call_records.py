"""Who graded, compared and drew: each such call leaves a record, and its results stay the same."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest
from report_study import make_study

from gsm8k_core.files import read_json, sha256_file, write_json, write_jsonl
from gsm8k_core.manifest import code_digest, git_state

ROOT = Path(__file__).resolve().parent.parent
INVOCATION = "20261123T000000Z_aaaaaaaa"
COMPLETION = {
    "problem_id": "a", "decoding": "greedy", "sample_index": 0, "gold": "18",
    "completion": "#### 18", "token_ids": [5], "num_tokens": 1, "finish_reason": "stop",
}  # fmt: skip


def run(*words: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        capture_output=True,
    )


def grade(folder: Path, **environment: str) -> list[str]:
    """Grade one completion by the script itself; its command line."""
    write_jsonl(folder / "completions.jsonl", [COMPLETION])
    identity = {"model": "m", "method": "base", "seed": 0, "suite": "test", "parent": None}
    made_by = {"invocation": "another call", "written": "2026-01-01"}
    write_json(folder / "stats.json", {**identity, "provenance": made_by})
    words = [
        "--settings", '{"grading": "strict", "marker": "####"}',
        "--completions", str(folder / "completions.jsonl"), "--stats", str(folder / "stats.json"),
        "--output", str(folder / "metrics" / "test.json"),
        "--grades", str(folder / "grades" / "test.parquet"),
    ]  # fmt: skip
    run("scripts/grade.py", *words, **environment)
    return words


def test_a_grading_call_leaves_a_record_beside_the_grades(tmp_path: Path) -> None:
    words = grade(tmp_path, GSM8K_INVOCATION=INVOCATION)
    record = read_json(tmp_path / "grades" / "test.manifest.json")
    assert record["command"] == ["grade.py", *words]
    assert record["host"] == platform.node()
    assert datetime.fromisoformat(record["started"]) <= datetime.fromisoformat(record["ended"])
    assert record["seconds_wall"] > 0
    made_by = record["provenance"]
    assert made_by["invocation"] == INVOCATION
    assert made_by["code_digest"] == code_digest()
    assert made_by["git"]["commit"] == git_state()["commit"]
    assert made_by["packages"]["math-verify"] == importlib.metadata.version("math-verify")
    assert record["outputs"] == {
        str(path): sha256_file(path)
        for path in (tmp_path / "metrics" / "test.json", tmp_path / "grades" / "test.parquet")
    }


@pytest.mark.slow
def test_who_graded_and_when_does_not_change_what_the_grades_are(tmp_path: Path) -> None:
    outputs = [tmp_path / "metrics" / "test.json", tmp_path / "grades" / "test.parquet"]
    grade(tmp_path, GSM8K_INVOCATION=INVOCATION)
    before = [path.read_bytes() for path in outputs]
    first = read_json(tmp_path / "grades" / "test.manifest.json")
    grade(tmp_path, GSM8K_INVOCATION=INVOCATION.replace("a", "b"), PYTHONHASHSEED="7")
    assert [path.read_bytes() for path in outputs] == before
    second = read_json(tmp_path / "grades" / "test.manifest.json")
    assert second["outputs"] == first["outputs"]
    assert second["provenance"]["invocation"] != first["provenance"]["invocation"]
    assert read_json(outputs[0])["provenance"]["invocation"] == "another call"


def test_a_secret_on_the_command_line_is_in_no_record(tmp_path: Path) -> None:
    folder = tmp_path / "hf_planted0123456789abcdef"
    grade(folder)
    text = (folder / "grades" / "test.manifest.json").read_text(encoding="utf-8")
    assert "planted" not in text and "***" in text


@pytest.mark.slow
def test_compare_plot_and_report_record_themselves_where_they_are_told_to(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    paths = make_study(tmp_path, script)
    results = paths["comparison"].parent
    study = ["--study", str(paths["study"]), "--study-dir", str(paths["study_dir"])]
    comparison = ["--comparison", str(paths["comparison"])]
    calls = {
        "compare": ["--output-dir", str(results)],
        "plot": [*comparison, "--output-dir", str(results / "figures")],
        "report": [*comparison, "--output", str(results / "report.html")],
    }
    recorded = []
    for name, words in calls.items():
        path = tmp_path / f"{name}.json"
        assert script(name).main([*study, *words, "--manifest", str(path)]) == 0
        record = read_json(path)
        assert record["command"][:2] == [f"{name}.py", "--study"]
        assert record["provenance"]["packages"]["polars"] and record["host"]
        assert all(sha256_file(Path(file)) == it for file, it in record["outputs"].items())
        recorded += record["outputs"]
    written = [path for path in results.rglob("*") if path.is_file()]
    assert sorted(recorded) == sorted(map(str, written))
