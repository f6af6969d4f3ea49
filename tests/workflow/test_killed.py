"""Snakemake killed in the middle of a study, and a study that does not keep its weights."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import polars as pl
import psutil
import pytest
from safetensors import safe_open
from workspace import make_workspace, read_comparison

from gsm8k_core.files import read_json, read_jsonl

# The kinds of jobs of the default study, little of each: starting processes takes most of the time.
STUDY = {
    "study": {
        "name": "killed", "methods": ["sft", "rft", "grpo"],
        "keep_models": "none",
    },
    "datasets": {"arithmetic_debug": {"num_train": 400, "num_val": 10, "num_test": 20}},
    "defaults": {
        "sft": {"num_steps": 100, "checkpoint_every_steps": 10},
        "expert_iteration": {"prompts_per_round": 40},
        "grpo": {"num_steps": 4},
    },
    "suites": {"debug": {"limit": 10, "max_new_tokens": 16}},
}  # fmt: skip
RUNS = "artifacts/experiments/killed/tiny-qwen2"
RESULTS = "artifacts/results/killed"
NUM_KILLS = 3

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


# Not `**`, which fails on a temporary folder that goes while it looks.
BENCHMARKS = (
    "benchmarks/*/*.tsv",
    "experiments/*/*/*/*/benchmarks/*.tsv",
    "experiments/*/*/*/*/round*/benchmarks/*.tsv",
    "results/*/benchmarks/*.tsv",
)


def num_finished(workspace: Path) -> int:
    """Jobs that have ended well: Snakemake then writes their benchmark."""
    artifacts = workspace / "artifacts"
    return sum(len(list(artifacts.glob(pattern))) for pattern in BENCHMARKS)


def moments_of_kills(num_jobs: int, seed: int) -> list[tuple[int, float]]:
    """After so many jobs have ended, so many seconds: one moment in each part of the study."""
    draw = random.Random(seed)
    ends = [round(number * (num_jobs - 2) / NUM_KILLS) for number in range(NUM_KILLS + 1)]
    return [(draw.randrange(*part), draw.uniform(0.0, 3.0)) for part in pairwise(ends)]


def wait_for_jobs(workspace: Path, process: subprocess.Popen[str], call: int, count: int) -> None:
    """Return when `count` jobs have ended, and those of this call have begun."""
    deadline = time.monotonic() + 300
    manifests = workspace / "artifacts" / "runs"
    while (
        num_finished(workspace) < count or len(list(manifests.glob("*/run_manifest.json"))) < call
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def outputs(workspace: Path) -> list[Path]:
    """Files under the names that jobs declare; not logs, and not what a job keeps for going on."""
    aside = {"state", "logs", "benchmarks", "runs"}
    return [
        path
        for path in sorted((workspace / "artifacts").rglob("*"))
        if path.is_file()
        and path.suffix != ".partial"
        and not any(
            part in aside or part.startswith(".") for part in path.relative_to(workspace).parts
        )
    ]


def assert_whole(path: Path, same: Path) -> None:
    """That nothing is missing of a file; `same` is that of the undisturbed study."""
    if path.suffix == ".safetensors":  # dropped there
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
            beside.name for beside in path.parent.iterdir()
        }
        with safe_open(path, framework="np") as weights:  # refuses a file that was cut
            assert len(list(weights.keys())) == 26
    elif path.suffix == ".json":
        read_json(path)
    elif path.name == "metrics.jsonl":  # has seconds
        assert len(read_jsonl(path)) == len(read_jsonl(same))
    elif path.suffix == ".jsonl":
        assert path.read_bytes() == same.read_bytes()
    elif path.suffix == ".parquet" and path.parent.name == "grades":
        assert pl.read_parquet(path).equals(pl.read_parquet(same))


def comparison(workspace: Path) -> pl.DataFrame:
    """The table but for what varies, and for flags: an edit of the code shows there."""
    return read_comparison(workspace / RESULTS / "comparison.csv").drop("flags")


def kept_weights(workspace: Path) -> list[str]:
    folders = (path.parent for path in (workspace / RUNS).rglob("model.safetensors"))
    return sorted(str(folder.relative_to(workspace / RUNS)) for folder in folders)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the study has been run to its end."""
    workspace = make_workspace(tmp_path_factory.mktemp("undisturbed") / "workspace", STUDY)
    finish(start_study(workspace))
    return workspace


def test_a_study_killed_three_times_ends_as_if_nobody_had_disturbed_it(
    undisturbed: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("GSM8K_KILL_SEED") or random.randrange(10**6))
    num_jobs = num_finished(undisturbed)
    assert num_jobs == 15
    moments = moments_of_kills(num_jobs, seed)
    print(f"GSM8K_KILL_SEED={seed}: kills after so many jobs, and so many seconds: {moments}")
    workspace = make_workspace(tmp_path / "workspace", STUDY)
    for call, (count, seconds) in enumerate(moments, start=1):
        with start_study(workspace) as process:
            wait_for_jobs(workspace, process, call, count)
            moment = time.monotonic() + seconds
            while time.monotonic() < moment and num_finished(workspace) < num_jobs - 2:
                time.sleep(0.02)
            assert process.poll() is None, "the study has ended before it was killed"
            process.kill()
        deadline = time.monotonic() + 120  # two seconds; more while torch is being loaded
        while orphans := processes_in(workspace):
            assert time.monotonic() < deadline, orphans
            time.sleep(0.1)
        for path in outputs(workspace):
            assert_whole(path, undisturbed / path.relative_to(workspace))
        finish(start_study(workspace, "--unlock"))
    output = finish(start_study(workspace))
    assert processes_in(workspace) == [], output
    assert comparison(workspace).equals(comparison(undisturbed))
    ends = [{path.relative_to(folder) for path in outputs(folder) if path.parent.name != "model"}
            for folder in (workspace, undisturbed)]  # fmt: skip
    assert ends[0] == ends[1]
    for path in ends[0]:
        assert_whole(workspace / path, undisturbed / path)
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
    assert "dropped: the weights of 4 runs, as study.keep_models says" in output
