"""Training that is stopped by Ctrl-C, or fails and is tried again, in real runs of Snakemake."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked_snakemake import run_snakemake
from killing import outputs, states_of_calls, stopped
from workspace import make_workspace, write_overlay

from gsm8k_core.files import read_json, read_jsonl

NAMES = ("model/model.safetensors", "train/metrics.jsonl", "train/summary.json", "settings.json")
CELLS = Path("artifacts/experiments/stopped/tiny-qwen2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which Snakemake has made the model and the data, as if no call had."""
    workspace = make_workspace(tmp_path_factory.mktemp("stopped") / "prepared")
    targets = ("artifacts/models/tiny-qwen2", "artifacts/arithmetic_debug/train.jsonl")
    words = (*targets, "--cores", "2", "--configfile", "studies/debug.yaml")
    made = run_snakemake(workspace, *words)
    assert made.returncode == 0, made.stdout
    shutil.rmtree(workspace / "artifacts" / "runs")
    return workspace


def one_training(
    prepared: Path, workspace: Path, method: str, **settings: Any
) -> tuple[list[str], Path]:
    """A workspace with a study of one method; what follows `snakemake`, and the run's folder."""
    shutil.copytree(prepared, workspace, symlinks=True)
    study = {"name": "stopped", "methods": [method]}
    write_overlay(workspace, "study.yaml", {"study": study, "methods": {method: settings}})
    run = CELLS / method / "seed0"
    words = [f"{run}/train/summary.json", "--cores", "2"]
    return [*words, "--configfile", "studies/debug.yaml", "study.yaml"], run


def assert_whole(run: Path, num_steps: int) -> None:
    """That a run has ended as one that nobody has stopped."""
    assert read_json(run / "train" / "summary.json")["num_steps"] == num_steps
    steps = [row["step"] for row in read_jsonl(run / "train" / "metrics.jsonl")]
    assert steps == list(range(1, num_steps + 1))
    assert (run / "model" / "model.safetensors").is_file()
    assert not (run / "state").exists()


def test_ctrl_c_ends_snakemake_and_its_jobs_and_the_same_command_goes_on(
    prepared: Path, tmp_path: Path
) -> None:
    workspace, num_steps = tmp_path / "workspace", 150
    words, folder = one_training(
        prepared, workspace, "sft", num_steps=num_steps, checkpoint_every_steps=5
    )
    run = workspace / folder
    # As a terminal does.
    checkpoint = f"{folder}/state/step-*"
    stopped(workspace, checkpoint, words, lambda process: os.killpg(process.pid, signal.SIGINT))
    assert states_of_calls(workspace) == ["interrupted"]
    left = {path: (workspace / path).read_bytes() for path in outputs(workspace)}
    assert not [path for path in left if path.is_relative_to(folder)]

    again = run_snakemake(workspace, *words)
    assert again.returncode == 0, again.stdout
    log = (run / "logs" / "train_sft.log").read_text(encoding="utf-8")
    assert "resuming after step " in log and f" of {num_steps}\n" in log
    assert_whole(run, num_steps)
    assert states_of_calls(workspace) == ["interrupted", "succeeded"]
    attempts = read_json(run / "train" / "summary.json")["attempts"]
    assert [one["state"] for one in attempts] == ["interrupted", "finished"]
    assert {path: (workspace / path).read_bytes() for path in left} == left


def test_sigterm_lets_running_jobs_end_and_begins_no_other(prepared: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    words, folder = one_training(
        prepared, workspace, "sft", num_steps=150, checkpoint_every_steps=5
    )
    words[0] = f"{folder}/completions/arithmetic.jsonl"
    stopped(workspace, f"{folder}/state/step-*", words, lambda process: process.terminate())
    assert states_of_calls(workspace) == ["interrupted"]
    assert_whole(workspace / folder, 150)
    assert not (workspace / words[0]).exists()


def test_finished_jobs_that_snakemake_rejects_come_back_with_the_same_command(
    prepared: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    words, folder = one_training(prepared, workspace, "sft", num_steps=4, checkpoint_every_steps=2)
    run = workspace / folder
    train, test = (Path(f"artifacts/arithmetic_debug/{split}.jsonl") for split in ("train", "test"))
    later = time.time() + 3600
    for data in (train, test):
        os.utime(workspace / data, (later, later))  # as if the clock was set back

    def is_rejected() -> bool:
        result = run_snakemake(workspace, *words)
        return result.returncode == 1 and "has older modification time" in result.stdout

    def log_of(job: str) -> str:
        return (run / "logs" / f"{job}.log").read_text(encoding="utf-8")

    assert is_rejected()
    assert not any((run / name).exists() for name in (*NAMES, "state"))
    kept = {name: (run / ".finished" / name).read_bytes() for name in NAMES}

    os.utime(workspace / train)
    words[0] = f"{folder}/metrics/debug.json"
    assert is_rejected()
    assert "are brought back" in log_of("train_sft") and "loss" not in log_of("train_sft")
    assert {name: (run / name).read_bytes() for name in NAMES} == kept
    assert_whole(run, 4)
    assert not (run / ".finished").exists()  # the model was read
    assert not (run / "completions" / "debug.jsonl").exists()

    os.utime(workspace / test)
    again = run_snakemake(workspace, *words)
    assert again.returncode == 0, again.stdout
    stats = read_json(run / "completions" / "debug.stats.json")
    num = stats["num_problems"]
    assert f"resuming after {num} of {num} problems" in log_of("generate_debug")
    assert stats["seconds_generating"] > 0 and not list((run / "completions").glob("*.partial"))
    assert {name: (run / name).read_bytes() for name in NAMES} == kept
    assert states_of_calls(workspace) == ["failed", "failed", "succeeded"]


REWARD = f"""
from pathlib import Path


def fails_once(completion, gold):
    failed = Path("failed")
    if not failed.exists() and Path("{CELLS}/grpo/seed0/state/step-00000002").exists():
        failed.touch()
        raise RuntimeError("as a server that cannot be reached")
    return len(completion) / 100
"""


def test_with_retries_a_job_that_fails_goes_on_from_its_last_checkpoint(
    prepared: Path, tmp_path: Path
) -> None:
    """Snakemake removes what the job has declared before it tries again."""
    workspace = tmp_path / "workspace"
    words, folder = one_training(
        prepared, workspace, "grpo", **{"from": "base"}, num_steps=4, checkpoint_every_steps=1,
        reward={"custom": "my_reward:fails_once"},
    )  # fmt: skip
    (workspace / "my_reward.py").write_text(REWARD, encoding="utf-8")
    result = run_snakemake(workspace, *words, "--retries", "1")
    assert result.returncode == 0, result.stdout
    assert "as a server that cannot be reached" in result.stdout  # the log of the first try
    log = (workspace / folder / "logs" / "train_grpo.log").read_text(encoding="utf-8")
    assert "resuming after step 2 of 4\n" in log
    assert_whole(workspace / folder, 4)
