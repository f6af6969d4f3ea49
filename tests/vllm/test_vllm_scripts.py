"""Evaluation and rollouts through vLLM, by the scripts that the workflow runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from gsm8k_core.config import Config, dump, merge
from gsm8k_core.errors import TrainingError
from gsm8k_core.files import read_json, read_jsonl

ROOT = Path(__file__).resolve().parent.parent.parent
GRPO: dict[str, Any] = {
    "num_steps": 4,
    "prompts_per_step": 8,
    "group_size": 4,
    "max_new_tokens": 24,
    "minibatches": 2,
    "learning_rate": 3e-3,
    "checkpoint_every_steps": 1,
    # The barely trained model seldom answers right; a reward by length always has a spread.
    "reward": {"length": 1.0, "length_shaping": {"start": 0, "end": 24}},
}


@pytest.fixture
def arguments(
    run_json: Callable[..., str], sft_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> Callable[..., list[str]]:
    """`arguments(**overrides)`: those of train_grpo.py, on vLLM."""

    def build(**overrides: Any) -> list[str]:
        return [
            "--settings", run_json("grpo", **{**GRPO, **overrides}),
            "--starting-model", str(sft_folder),
            "--data", str(arithmetic_folder / "train.jsonl"),
            "--val-data", str(arithmetic_folder / "val.jsonl"),
            "--output-dir", str(tmp_path / "grpo"),
            "--engine", "vllm", "--vllm-kv-cache-gib", "0.25",
        ]  # fmt: skip

    return build


def test_grpo_on_vllm_samples_from_the_weights_in_training(
    script: Callable[[str], ModuleType], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    script("train_grpo").main(arguments(validate_every_steps=2))
    start, *rows = read_jsonl(tmp_path / "grpo" / "train" / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["sampler_gap_max"] < 1e-4 and row["sampler_gap_mean"] < 1e-5
    validated = [row["step"] for row in (start, *rows) if "validation_accuracy" in row]
    assert validated == [0, 2, 4]
    assert read_json(tmp_path / "grpo" / "train" / "summary.json")["engine"] == "vllm"


def test_grpo_with_lora_pushes_merged_weights(
    script: Callable[[str], ModuleType], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    script("train_grpo").main(arguments(lora={"rank": 4}, num_steps=3, learning_rate=1e-2))
    rows = read_jsonl(tmp_path / "grpo" / "train" / "metrics.jsonl")
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows)


def test_a_push_that_does_not_arrive_stops_the_run_before_it_trains_on_it(
    script: Callable[[str], ModuleType],
    arguments: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from gsm8k_core.engines.vllm_engine import VllmEngine

    monkeypatch.setattr(VllmEngine, "load_weights", lambda *_: None)
    with pytest.raises(TrainingError, match="samples from weights other than those in training"):
        script("train_grpo").main(arguments(check_sampler_every_steps=2))
    rows = read_jsonl(tmp_path / "grpo" / "state" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]


def test_each_of_two_ranks_has_an_engine_with_the_weights_that_they_train_together(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "--max-restarts", "0", str(ROOT / "scripts" / "train_grpo.py")]
    command += arguments(lora={"rank": 4}, num_steps=2, learning_rate=1e-2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    rows = read_jsonl(tmp_path / "grpo" / "train" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows)


def test_a_job_killed_within_a_rollout_leaves_nothing_and_its_rerun_ends_as_if_undisturbed(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train_grpo.py"), *arguments(num_steps=6)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run_to_the_end() -> tuple[str, list[dict[str, Any]]]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr, read_jsonl(tmp_path / "grpo" / "train" / "metrics.jsonl")

    _, undisturbed = run_to_the_end()
    shutil.rmtree(tmp_path / "grpo")

    shared_before = set(os.listdir("/dev/shm"))
    job = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    state = tmp_path / "grpo" / "state"
    while not (state / "step-00000003").exists():  # then comes the fourth rollout
        assert job.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    ports = {
        connection.laddr
        for process in family
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    job.kill()
    job.wait()
    assert psutil.wait_procs(family, timeout=5)[1] == []
    for address in ports:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(tuple(address))
    assert set(os.listdir("/dev/shm")) <= shared_before
    assert len(read_jsonl(state / "metrics.jsonl")) == 3

    said, rows = run_to_the_end()
    assert "resuming after step" in said
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows)
    for resumed, whole in zip(rows, undisturbed, strict=True):
        assert resumed["reward_mean"] == whole["reward_mean"]
        assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_a_suite_is_generated_by_vllm_as_by_transformers(
    script: Callable[[str], ModuleType],
    config: Config,
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
) -> None:
    settings = config.evaluation_settings("tiny-qwen2", "base", 0, "arithmetic")
    raw = merge(json.loads(dump(settings)), {"suite_settings": {"num_samples": 2}})
    rows, stats = {}, {}
    for engine in ("vllm", "transformers"):
        output, stats_file = tmp_path / f"{engine}.jsonl", tmp_path / f"{engine}.json"
        script("generate").main(
            ["--settings", json.dumps(raw), "--model", str(sft_folder),
             "--data", str(arithmetic_folder / "test.jsonl"), "--output", str(output),
             "--stats", str(stats_file), "--engine", engine]
        )  # fmt: skip
        rows[engine], stats[engine] = read_jsonl(output), read_json(stats_file)
    assert [stats[name]["engine"] for name in ("vllm", "transformers")] == ["vllm", "transformers"]
    assert stats["vllm"]["settings"]["model_settings"]["engine"] == "vllm"
    pairs = list(zip(rows["vllm"], rows["transformers"], strict=True))
    assert len(pairs) == 40 * 3
    greedy = [(a, b) for a, b in pairs if a["decoding"] == "greedy"]
    assert sum(a != b for a, b in greedy) <= 1


OPEN = """
import sys, torch
from pathlib import Path
from gsm8k_core import distributed
from gsm8k_core.cli import leave, run_script
from gsm8k_core.config import VllmSettings
from gsm8k_core.engines.vllm_engine import VllmEngine
def main():
    global engine  # is there until the end
    settings = VllmSettings(kv_cache_gib=0.25)
    engine = VllmEngine(Path(sys.argv[1]), settings, "float32", torch.device("cpu"), 0.5)
leave(run_script(main))
"""


def test_a_script_that_ends_with_its_engine_open_ends_without_a_word(tiny_folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OPEN, str(tiny_folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
