"""profiles/slurm on a real SLURM: a small study waits, is cancelled, resumes, ends as elsewhere.

One study is submitted once and looked at from many sides: each job of it costs about ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_cluster import Cluster, loopback_cluster, wait_for
from workspace import ROOT, make_workspace, read_comparison

from gsm8k_core.files import read_json

STUDY: dict[str, Any] = {  # each kind of job but training GRPO, which has a test of its own
    "study": {"name": "submitted", "methods": ["base", "sft", "rft"]},
    "models": {
        "tiny-qwen2": {
            "gpus": 1, "mem_mb": 700, "training_minutes": 7, "generation_minutes": 3,
        },
    },
    "datasets": {"arithmetic_debug": {"num_train": 200, "num_val": 10, "num_test": 20}},
    "defaults": {"expert_iteration": {"prompts_per_round": 40}},
    "methods": {"sft": {"num_steps": 240, "checkpoint_every_steps": 10}},
    "suites": {"debug": {"limit": 5, "max_new_tokens": 8}},
    "tracking": {"project": "maths", "mode": "disabled"},
}  # fmt: skip
COMPARISON = "artifacts/results/submitted/comparison.csv"
ON_TWO_GPUS: dict[str, Any] = {
    "study": {"name": "ranks", "methods": ["grpo"]},
    "models": {"tiny-qwen2": {"gpus": 2, "threads": 2}},
    "datasets": {"arithmetic_debug": {"num_train": 50, "num_val": 5, "num_test": 5}},
    "methods": {
        "grpo": {
            "from": "base",
            # An untrained model solves nothing, and is rewarded for its lengths.
            "reward": {"length": 1.0, "length_shaping": {"start": 0, "end": 16}},
            "max_new_tokens": 16,
        },
    },
}
SFT = "artifacts/experiments/submitted/tiny-qwen2/sft/seed0"
PLANTED = {
    "WANDB_API_KEY": "planted00000000000000000000000000000wandb",
    "HF_TOKEN": "hf_plantedPLANTED0123456789",
}

# The first test waits for the whole story: some minutes, more on a busy machine.
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Story:
    """What was seen while the study went through the cluster."""

    workspace: Path
    elsewhere: Path
    waiting: dict[str, tuple[str, str, str]]
    facts: dict[str, dict[str, str]]
    scripts: str
    environment: dict[str, str]
    checkpoint: int
    cancelled: tuple[int, str]
    left_after_cancel: list[str]
    resumed: tuple[int, str]
    jobs: dict[str, tuple[str, str, str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with loopback_cluster() as running:
        yield running


def edited_workspace(folder: Path, study: dict[str, Any] = STUDY) -> Path:
    make_workspace(folder, study)
    # The profile as its reader edits it.
    profile = (ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8")
    for line in ("slurm_partition: cpu", "slurm_partition: gpu", "slurm_account: myproject"):
        assert profile.count(f"# {line}\n") == 1
        profile = profile.replace(f"# {line}\n", f"{line}\n")
    (folder / "edited").mkdir()
    (folder / "edited" / "config.yaml").write_text(profile, encoding="utf-8")
    return folder


def start(
    workspace: Path, environment: dict[str, str], *words: str, log: str, target: str = COMPARISON
) -> subprocess.Popen[bytes]:
    with (workspace / log).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", target, *words,
             "--configfile", "studies/debug.yaml", "study.yaml"],
            cwd=workspace,
            env={**environment, **PLANTED, "PYTHONPATH": str(workspace)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def submit(
    cluster: Cluster, workspace: Path, *words: str, log: str, target: str = COMPARISON
) -> subprocess.Popen[bytes]:
    profile = [
        "--workflow-profile", "edited",
        "--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "1",
        "--latency-wait", "5",
    ]  # fmt: skip
    return start(workspace, cluster.environment, *profile, *words, log=log, target=target)


def finished(process: subprocess.Popen[bytes], workspace: Path, log: str) -> tuple[int, str]:
    code = process.wait(600)
    return code, (workspace / log).read_text(encoding="utf-8")


def processes_in(workspace: Path) -> list[tuple[psutil.Process, list[str]]]:
    """What runs in `workspace`, with its command lines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(workspace):
                found.append((process, process.cmdline()))
    return found


def training_process(workspace: Path) -> psutil.Process:
    (found,) = (p for p, words in processes_in(workspace) if "scripts/train_sft.py" in words)
    return found


def checkpoints(workspace: Path) -> list[int]:
    """Steps; a checkpoint that is being written has another name."""
    found = (workspace / SFT / "state").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("slurm")
    workspace = edited_workspace(folder / "workspace")
    elsewhere = edited_workspace(folder / "elsewhere")
    running: list[subprocess.Popen[bytes]] = []
    try:
        cluster.call("scontrol", "update", f"NodeName={cluster.node}", "State=DRAIN", "Reason=test")
        local = start(elsewhere, dict(os.environ), "--cores", "1", log="local.log")
        first = submit(cluster, workspace, "--retries", "0", log="first.log")
        running += [local, first]
        wait_for(lambda: len(cluster.jobs()) == 2 or first.poll() is not None, "two jobs")
        assert first.poll() is None, finished(first, workspace, "first.log")[1]
        ids = list(cluster.jobs())
        wait_for(lambda: all(job[2] != "None" for job in cluster.jobs().values()), "reasons")
        waiting = cluster.jobs()
        facts = {waiting[job][0]: cluster.facts(job) for job in ids}
        scripts = "".join(
            cluster.call("scontrol", "write", "batch_script", job, "-") for job in ids
        )

        cluster.call("scontrol", "update", f"NodeName={cluster.node}", "State=RESUME")
        (training,) = (job for job in ids if waiting[job][0] == "rule_train_sft")
        wait_for(lambda: bool(checkpoints(workspace)), "a checkpoint")
        trained = training_process(workspace)
        trained.suspend()  # it could be done before it is cancelled
        environment = trained.environ()
        cluster.call("scancel", training)
        cancelled = finished(first, workspace, "first.log")
        left = [path.name for path in (workspace / SFT).iterdir()]
        checkpoint = checkpoints(workspace)[-1]

        second = submit(cluster, workspace, log="second.log")
        running.append(second)
        resumed = finished(second, workspace, "second.log")
        assert finished(local, elsewhere, "local.log")[0] == 0
        jobs = cluster.jobs()
        facts |= {jobs[job][0]: cluster.facts(job) for job in jobs if job not in ids}
        yield Story(
            workspace, elsewhere, waiting, facts, scripts, environment, checkpoint, cancelled, left,
            resumed, jobs,
        )  # fmt: skip
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def test_jobs_of_a_drained_node_wait_and_say_why(story: Story) -> None:
    assert {job[1] for job in story.waiting.values()} == {"PENDING"}
    reasons = [job[2] for job in story.waiting.values()]
    assert all("DRAINED" in reason or "NotAvail" in reason for reason in reasons), reasons


def test_a_job_asks_for_what_the_settings_of_its_model_say(story: Story) -> None:
    training = story.facts["rule_train_sft"]
    assert training["TresPerJob"] == "gres:gpu:1"
    assert training["MinMemoryNode"] == "700M"
    assert training["TimeLimit"] == "00:07:00"
    assert training["NumNodes"] in ("1", "1-1")
    assert training["CPUs/Task"] == "1"
    assert training["Partition"] == "gpu"
    assert {facts["Account"] for facts in story.facts.values()} == {"myproject"}


def test_generation_asks_for_a_gpu_and_its_own_time(story: Story) -> None:
    generation = story.facts["rule_generate"]
    assert generation["TresPerJob"] == "gres:gpu:1"
    assert generation["TimeLimit"] == "00:03:00"
    assert generation["Partition"] == "gpu"


def test_runs_are_graded_together_one_after_the_other_and_without_a_gpu(story: Story) -> None:
    grading = story.facts["rule_grades_grade"]
    assert "TresPerJob" not in grading
    assert grading["CPUs/Task"] == "1"
    assert grading["TimeLimit"] == "00:30:00"  # three times ten minutes
    assert grading["MinMemoryNode"] == "4000M"
    assert grading["Partition"] == "cpu"
    assert len(list(story.workspace.glob("artifacts/experiments/*/*/*/*/metrics/debug.json"))) == 3


def test_a_cancelled_job_is_named_and_what_needs_it_is_not_run(story: Story) -> None:
    code, output = story.cancelled
    assert code == 1
    assert "Error in rule train_sft:" in output
    assert "SLURM status is: 'CANCELLED'" in output
    assert "model" not in story.left_after_cancel and "state" in story.left_after_cancel
    # What did not need it went on.
    base = story.workspace / "artifacts/experiments/submitted/tiny-qwen2/base/seed0"
    assert (base / "completions" / "debug.jsonl").exists()
    assert len(list((story.workspace / "artifacts" / "runs").iterdir())) == 2


def test_a_second_call_goes_on_from_the_last_checkpoint(story: Story) -> None:
    code, output = story.resumed
    assert code == 0, output
    log = (story.workspace / SFT / "logs" / "train_sft.log").read_text(encoding="utf-8")
    assert f"resuming after step {story.checkpoint} of 240" in log


def test_small_jobs_do_not_go_to_the_cluster_by_themselves(story: Story) -> None:
    assert sorted(job[0] for job in story.jobs.values()) == [
        "rule_compare",
        *["rule_generate"] * 3,
        "rule_generate_round",
        "rule_grades_grade",
        "rule_train_round",
        "rule_train_sft",  # cancelled
        "rule_train_sft",
    ]


def test_the_results_are_those_of_a_run_without_a_cluster(story: Story) -> None:
    workspaces = (story.workspace, story.elsewhere)
    tables = [read_comparison(workspace / COMPARISON) for workspace in workspaces]
    assert tables[0].equals(tables[1])
    assert tables[0]["method"].to_list() == STUDY["study"]["methods"]


def test_jobs_get_keys_and_the_call_they_belong_to(story: Story) -> None:
    environment = story.environment
    assert environment["WANDB_API_KEY"] == PLANTED["WANDB_API_KEY"]
    calls = sorted(path.name for path in (story.workspace / "artifacts" / "runs").iterdir())
    assert environment["GSM8K_INVOCATION"] == calls[0]
    assert '"project": "maths"' in environment["GSM8K_TRACKING"]
    summary = read_json(story.workspace / SFT / "train" / "summary.json")
    assert summary["provenance"]["invocation"] == calls[1]


def test_no_key_is_in_a_job_script_a_log_or_a_result(story: Story) -> None:
    assert "scripts" not in story.scripts and "train_sft" in story.scripts
    texts = [story.scripts.encode()] + [
        path.read_bytes()
        for path in story.workspace.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert len(texts) > 30
    for key in PLANTED.values():
        assert not any(key.encode() in text for text in texts)


def test_grpo_on_two_gpus_is_one_job_of_two_ranks(cluster: Cluster, tmp_path: Path) -> None:
    workspace = edited_workspace(tmp_path / "workspace", ON_TWO_GPUS)
    run = workspace / "artifacts/experiments/ranks/tiny-qwen2/grpo/seed0"
    before = set(cluster.jobs())
    target = str((run / "train" / "summary.json").relative_to(workspace))
    process = submit(cluster, workspace, log="log", target=target)
    of_torchrun = "torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 2"

    def is_launched() -> bool:
        return any(of_torchrun in " ".join(words) for _, words in processes_in(workspace))

    wait_for(lambda: is_launched() or process.poll() is not None, "torchrun")
    launched = process.poll() is None
    code, output = finished(process, workspace, "log")
    assert code == 0, output
    (job,) = set(cluster.jobs()) - before
    facts = cluster.facts(job)
    assert (facts["TresPerJob"], facts["CPUs/Task"]) == ("gres:gpu:2", "2")
    assert (facts["NumTasks"], facts["NumNodes"]) == ("1", "1")
    assert (facts["Partition"], facts["Account"]) == ("gpu", "myproject")
    assert launched, "the job ran without torchrun"
    summary = read_json(run / "train" / "summary.json")
    assert (summary["num_ranks"], summary["num_steps"]) == (2, 2)
    log = (run / "logs" / "train_grpo.log").read_text(encoding="utf-8")
    assert "[rank 1] WARNING" in log  # its own: it found no GPU


def test_a_profile_that_would_let_one_gpu_work_at_a_time_is_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    workspace = edited_workspace(tmp_path / "workspace")
    process = start(workspace, cluster.environment, "--profile", "profiles/slurm", log="log")
    code, output = finished(process, workspace, "log")
    assert code == 1
    assert "name the cluster's profile with `--workflow-profile`" in output
    assert "has been submitted" not in output


def test_a_retry_asks_for_more_memory_but_the_tenth_for_no_more_than_the_third(
    tmp_path: Path,
) -> None:
    workspace = edited_workspace(tmp_path / "workspace")
    profile = ("--workflow-profile", "profiles/slurm")
    for attempt, of_model, of_others in ((2, 1400, 8000), (10, 2100, 12000)):
        dry_run = (*profile, "-n", "--cores", "1", "--attempt", str(attempt))
        process = start(workspace, dict(os.environ), *dry_run, log="log")
        code, output = finished(process, workspace, "log")
        assert code == 0, output
        for rule, expected in (("train_sft", of_model), ("compare", of_others)):
            (job,) = re.findall(rf"^rule {rule}:\n(?:    .*\n)+", output, re.M)
            assert f"mem_mb={expected}," in job
