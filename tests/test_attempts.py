"""A job that was killed and gone on with names every call that worked on it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsm8k_core.config import Config, dump
from gsm8k_core.files import read_json
from gsm8k_core.manifest import Attempts, attempts_record, code_digest, git_state

ROOT = Path(__file__).resolve().parent.parent
CALLS = [f"2026112{day}T000000Z_aaaaaaaa" for day in range(4)]
WORK = """
import os, signal, sys, time
from pathlib import Path
from gsm8k_core.cli import leave, run_script
from gsm8k_core.files import write_json
from gsm8k_core.manifest import Attempts

path, job, end = sys.argv[1:4]

def main():
    attempts = Attempts(Path(path), job, num_gpus=2)
    if end == "failed":
        raise RuntimeError
    if end == "interrupted":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
        os.kill(os.getpid(), signal.SIGINT)
    if end == "hang":
        print("begun", flush=True)
        time.sleep(600)
    write_json(Path(path).with_name("record.json"), attempts.finish())

leave(run_script(main))
"""


def start(*words: str, call: str = CALLS[0]) -> subprocess.Popen[str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GSM8K_INVOCATION": call}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def work(path: Path, end: str, call: str, job: str = "a job") -> None:
    """A call that works on the job in `path` and ends so."""
    with start("-c", WORK, str(path), job, end, call=call) as process:
        if end == "hang":
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGKILL)


def test_the_record_lists_each_call_with_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "state" / "attempts.json"
    for end, call in zip(("hang", "failed", "interrupted", "finished"), CALLS, strict=True):
        work(path, end, call)
    record = read_json(path.with_name("record.json"))
    attempts = record["attempts"]
    states = ["killed", "failed", "interrupted", "finished"]
    assert [one["state"] for one in attempts] == states
    assert [one["invocation"] for one in attempts] == CALLS
    for one in attempts:
        assert (one["host"], one["code_digest"]) == (platform.node(), code_digest())
        assert one["git"]["commit"] == git_state()["commit"]
        assert one["command"][0] == "-c" and "a job" in one["command"]
        assert datetime.fromisoformat(one["started"]) <= datetime.fromisoformat(one["last_sign"])
        assert one["seconds_gpu"] == pytest.approx(2 * one["seconds_wall"], abs=0.11)
    assert record["attempts_total"] == {
        kind: pytest.approx(sum(one[kind] for one in attempts), abs=0.06)
        for kind in ("seconds_wall", "seconds_cpu", "seconds_gpu")
    }
    assert record["attempts_total"]["seconds_cpu"] > 0


def test_calls_that_worked_on_another_job_there_are_no_attempts_at_this_one(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    work(path, "hang", CALLS[0], job="with other settings")
    work(path, "finished", CALLS[1])
    assert [one["invocation"] for one in read_json(tmp_path / "record.json")["attempts"]] == [
        CALLS[1]
    ]


def test_no_secret_of_a_command_line_is_written(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    with start("-c", WORK, str(path), "a job", "finished", "--token", "planted-0123"):
        pass
    text = path.read_text(encoding="utf-8")
    assert "planted" not in text and "***" in text


def test_the_record_of_no_attempt_has_no_seconds() -> None:
    assert attempts_record([])["attempts_total"]["seconds_wall"] == 0


def kill_when(path: Path, num_lines: int, process: subprocess.Popen[str]) -> None:
    """SIGKILL a process once a file has so many lines."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= num_lines):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_training_run_that_was_killed_names_the_call_that_was(
    run_json: Callable[..., str],
    tiny_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = run_json("sft", num_steps=60, batch_size=4, checkpoint_every_steps=2)
    words = [
        "--settings", settings, "--starting-model", str(tiny_folder),
        "--data", str(arithmetic_folder / "train.jsonl"), "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    state = tmp_path / "run" / "state"
    kill_when(state / "metrics.jsonl", 4, start("scripts/train_sft.py", *words, call=CALLS[0]))
    before = read_json(state / "attempts.json")["attempts"]
    assert [one["state"] for one in before] == ["running"]
    # Every checkpoint is a sign of life; that of the last one may have been cut off.
    first = min(state.glob("step-*/progress.json"))
    assert (state / "attempts.json").stat().st_mtime_ns >= first.stat().st_mtime_ns
    monkeypatch.setenv("GSM8K_INVOCATION", CALLS[1])
    assert script("train_sft").main(words) == 0
    summary = read_json(tmp_path / "run" / "train" / "summary.json")
    check(summary)
    killed = summary["attempts"][0]
    assert killed == {**before[0], "state": "killed"}
    assert summary["provenance"]["cpu_seconds"] == pytest.approx(
        summary["attempts"][1]["seconds_cpu"], abs=1
    )
    assert not state.exists()


@pytest.mark.slow
def test_completions_whose_job_was_killed_name_the_call_that_was(
    evaluation_json: str,
    tiny_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, stats = tmp_path / "completions.jsonl", tmp_path / "completions.stats.json"
    words = [
        "--settings", evaluation_json, "--model", str(tiny_folder),
        "--data", str(arithmetic_folder / "test.jsonl"),
        "--output", str(output), "--stats", str(stats),
    ]  # fmt: skip
    killed = start("scripts/generate.py", *words, call=CALLS[0])
    kill_when(tmp_path / "completions.jsonl.partial", 8, killed)
    monkeypatch.setenv("GSM8K_INVOCATION", CALLS[1])
    assert script("generate").main(words) == 0
    check(read_json(stats))
    kept = [f".{output.name}.attempts", f"{output.name}.partial"]  # until they are graded
    assert {path.name for path in tmp_path.iterdir()} == {*kept, output.name, stats.name}


def check(record: dict[str, Any]) -> None:
    """Two attempts, the first of them killed; the total is their sum."""
    attempts = record["attempts"]
    assert [one["state"] for one in attempts] == ["killed", "finished"]
    assert [one["invocation"] for one in attempts] == CALLS[:2]
    assert record["provenance"]["invocation"] == CALLS[1]
    assert all(one["seconds_wall"] > 0 and one["seconds_cpu"] > 0 for one in attempts)
    assert record["attempts_total"]["seconds_wall"] == pytest.approx(
        sum(one["seconds_wall"] for one in attempts), abs=0.06
    )
    assert record["attempts_total"]["seconds_gpu"] == 0  # on the CPU


@pytest.fixture
def evaluation_json(config: Config) -> str:
    """Forty problems, one at a time."""
    settings = config.evaluation_settings("tiny-qwen2", "base", 0, "arithmetic")
    raw = json.loads(dump(settings))
    raw["model_settings"]["completions_per_batch"] = 1
    raw["suite_settings"] |= {"num_samples": 0, "max_new_tokens": 40}
    return json.dumps(raw)


def test_what_all_ranks_took_outlives_a_failure_that_knows_of_one(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "attempts.json", "a job")
    attempts.note(cpu_seconds=10**6)
    attempts.note("failed")
    (row,) = read_json(tmp_path / "attempts.json")["attempts"]
    assert (row["state"], row["seconds_cpu"]) == ("failed", 10**6)
    attempts.finish()
