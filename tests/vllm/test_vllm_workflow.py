"""A study whose completions all come from vLLM, through Snakemake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from workspace import make_workspace, write_overlay

from gsm8k_core.files import read_json, read_jsonl


def test_a_round_of_rft_and_all_evaluations_generate_through_vllm(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    name = write_overlay(
        workspace,
        "vllm.yaml",
        {
            "models": {"tiny-qwen2": {"engine": "vllm", "vllm": {"kv_cache_gib": 0.25}}},
            "study": {"name": "on_vllm", "methods": ["sft", "rft"]},
        },
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    command += ["--configfile", "studies/debug.yaml", name]
    study = subprocess.run(
        command, cwd=workspace, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert study.returncode == 0, study.stderr
    artifacts = workspace / "artifacts"
    cells = artifacts / "experiments" / "on_vllm" / "tiny-qwen2"
    (rollouts,) = cells.glob("rft/seed0/round1/completions.stats.json")
    evaluations = list(cells.glob("*/seed0/**/debug.stats.json"))
    assert len(evaluations) == 2
    for path in (rollouts, *evaluations):
        assert read_json(path)["engine"] == "vllm"
    samples = read_jsonl(rollouts.with_name("completions.jsonl"))
    kept = read_jsonl(rollouts.with_name("demonstrations.jsonl"))
    sampled = {(row["problem_id"], row["completion"].strip()) for row in samples}
    assert kept
    assert {(row["problem_id"], row["completion"].strip()) for row in kept} <= sampled
    assert (artifacts / "results" / "on_vllm" / "report.html").exists()
