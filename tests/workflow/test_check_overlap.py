"""The overlap report as a target of the workflow: data is prepared for it, nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked_snakemake import run_snakemake
from workspace import make_workspace

from gsm8k_core.files import read_json

pytestmark = pytest.mark.slow


def test_the_report_of_a_study_covers_what_it_trains_on_and_is_tested_on(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    target = "artifacts/results/debug/overlap.md"
    result = run_snakemake(
        tmp_path, target, "--cores", "1", "--resources", "gpu=1",
        "--configfile", "studies/debug.yaml",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    report = read_json(tmp_path / "artifacts/results/debug/overlap.json")
    train = {"file": "artifacts/arithmetic_debug/train.jsonl", "num_rows": 2000}
    assert report["training"] == [train]
    (test,) = report["tests"]
    assert (test["file"], test["num_problems"]) == ("artifacts/arithmetic_debug/test.jsonl", 500)
    assert test["num_near"] > 0  # the embedded families share their wording
    assert "`artifacts/arithmetic_debug/test.jsonl`" in (tmp_path / target).read_text("utf-8")
    assert not (tmp_path / "artifacts/models").exists()
    results = tmp_path / "artifacts/results/debug"
    tables = read_json(results / "provenance.json")["tables"]
    assert tables["records"] == ["artifacts/results/debug/manifests/check_overlap.json"]
    (call,) = tables["made_by"]
    assert read_json(tmp_path / call)["state"] == "succeeded"
