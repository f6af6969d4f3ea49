"""Snakemake killed in the middle of a study, and a study that does not keep its weights."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from workspace import make_workspace

STUDY = {
    "study": {"name": "killed", "methods": ["sft"], "keep_models": "none"},
    "datasets": {"arithmetic_debug": {"num_train": 400, "num_val": 10, "num_test": 20}},
    "defaults": {"sft": {"num_steps": 100, "checkpoint_every_steps": 10}},
    "suites": {"debug": {"limit": 10, "max_new_tokens": 16}},
}
RUNS = "artifacts/experiments/killed/tiny-qwen2"
RESULTS = "artifacts/results/killed"
NUM_KILLS = 5

pytestmark = pytest.mark.slow


def start(workspace: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_study(workspace: Path, *words: str) -> subprocess.Popen[str]:
    targets = words or (f"{RESULTS}/comparison.csv",)
    files = ("--configfile", "studies/debug.yaml", "study.yaml")
    return start(workspace, "-m", "snakemake", *targets, "--cores", "2", *files)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def processes_in(workspace: Path) -> list[psutil.Process]:
    """Jobs and shells that run in `workspace`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and Path(process.cwd()) == workspace:
                found.append(process)
    return found


def wait_for_first_job(workspace: Path, process: subprocess.Popen[str], calls: int) -> None:
    deadline = time.monotonic() + 300
    while len(list((workspace / "artifacts").glob("runs/*/run_manifest.json"))) < calls:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def comparison(workspace: Path) -> pl.DataFrame:
    """The table but for what varies, and for flags: an edit of the code shows there."""
    table = pl.read_csv(workspace / RESULTS / "comparison.csv")
    varying = [name for name in table.columns if "seconds" in name or "memory" in name]
    return table.drop([*varying, "flags"])


def kept_weights(workspace: Path) -> list[str]:
    folders = (path.parent for path in (workspace / RUNS).rglob("model.safetensors"))
    return sorted(str(folder.relative_to(workspace / RUNS)) for folder in folders)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the study has been run to its end."""
    workspace = make_workspace(tmp_path_factory.mktemp("undisturbed") / "workspace", STUDY)
    finish(start_study(workspace))
    return workspace


def test_a_study_killed_five_times_ends_as_if_nobody_had_disturbed_it(
    undisturbed: Path, tmp_path: Path
) -> None:
    workspace = make_workspace(tmp_path / "workspace", STUDY)
    moments = random.Random(0)
    for call in range(1, NUM_KILLS + 1):
        with start_study(workspace) as process:
            wait_for_first_job(workspace, process, call)
            time.sleep(moments.uniform(0.5, 4.0))
            process.kill()
        deadline = time.monotonic() + 120  # two seconds; more while torch is being loaded
        while orphans := processes_in(workspace):
            assert time.monotonic() < deadline, orphans
            time.sleep(0.1)
        finish(start_study(workspace, "--unlock"))
    output = finish(start_study(workspace))
    assert comparison(workspace).equals(comparison(undisturbed))
    # Whole, and the same to the last bit: nothing that a kill had cut short was counted.
    completions = f"{RUNS}/sft/seed0/completions/debug.jsonl"
    assert (workspace / completions).read_bytes() == (undisturbed / completions).read_bytes()
    assert processes_in(workspace) == [], output
    finish(start(workspace, "scripts/verify.py", "--study", "killed"))


def test_a_study_that_keeps_no_weights_keeps_all_else_and_has_nothing_left_to_do(
    undisturbed: Path,
) -> None:
    assert kept_weights(undisturbed) == []
    assert (undisturbed / "artifacts/models/tiny-qwen2/model.safetensors").exists()
    for name in ("train/summary.json", "completions/debug.jsonl", "metrics/debug.json"):
        assert (undisturbed / RUNS / "sft" / "seed0" / name).exists()
    assert "Nothing to be done" in finish(start_study(undisturbed))
    output = finish(start(undisturbed, "scripts/verify.py", "--study", "killed"))
    assert "dropped: the weights of 1 run, as study.keep_models says" in output
