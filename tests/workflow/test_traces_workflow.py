"""The rules for reasoning traces, in real runs of Snakemake against a server on loopback."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import ChatServer
from flips import files_of, unnoticed_flips
from forked_snakemake import run_snakemake
from workspace import make_workspace

from gsm8k_core.arithmetic import make_arithmetic
from gsm8k_core.config import ArithmeticDataset, load_config
from gsm8k_core.files import read_json, read_jsonl
from gsm8k_core.layout import Layout
from gsm8k_core.problems import read_problems
from gsm8k_core.records import record_study

KEY = "sk-planted0123456789abcdef"
OVERLAYS = ["studies/debug.yaml", "traces.yaml"]

pytestmark = pytest.mark.slow


class WordProblemServer(ChatServer):
    """Answers the embedded word problems: it has their solutions."""

    answers: dict[str, str] = {}

    def completion(self, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
        question = body["messages"][-1]["content"].split("\n")[0]
        message = {"content": f"\\boxed{{{self.answers[question]}}}"} | changes.pop("message", {})
        return super().completion(body, message=message, **changes)


def snakemake(workspace: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    words = [*arguments, "--cores", "1", "--configfile", *OVERLAYS]
    result = run_snakemake(workspace, *words, environment={**os.environ, **environment})
    return result.returncode, result.stdout


def planned(output: str) -> dict[str, int]:
    table = output.partition("Job stats:")[2]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.M)}


def check_provenance(path: Path) -> None:
    """The row of what learned from traces leads to every call that collected and chose them."""
    (row,) = read_json(path)["rows"]
    (run,) = row["runs"]
    traces = "artifacts/tiny_traces"
    assert run["training_data"][:2] == [f"{traces}/manifest.json", f"{traces}/collected.json"]
    root = path.parents[3]
    states = [read_json(root / name)["state"] for name in run["made_by"]]
    calls = {Path(name).parent.name for name in run["made_by"]}
    collected, selected = (read_json(root / name) for name in run["training_data"][1::-1])
    attempts = collected["attempts"]
    # The one that was out of balance, the one that asked for the rest, the one that asked nothing.
    assert [attempt["state"] for attempt in attempts] == ["failed", "finished", "finished"]
    assert {attempt["invocation"] for attempt in attempts} < calls
    assert selected["provenance"]["invocation"] in calls
    assert states.count("failed") == 1


def test_what_is_collected_outlives_a_failed_job_and_becomes_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path)

    def study(url: str, **budget: Any) -> None:
        api = {"base_url": url, "model": "m", "max_tokens": 50, "concurrency": 2}
        traces = {"dataset": "arithmetic_debug", "num_questions": 12, "api": api}
        overlay = {
            "study": {"name": "traced", "methods": ["base", "sft_r1", "sft_r1_grpo"]},
            "datasets": {"arithmetic_debug": {"num_train": 100}},
            "methods": {"sft_r1": {"dataset": "tiny_traces", "num_steps": 2}},
            "traces": {"tiny_traces": {**traces, "prompt": "chat_boxed", "budget": budget}},
        }
        (tmp_path / "traces.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")

    train = "artifacts/tiny_traces/train.jsonl"
    answers = tmp_path / "artifacts" / "tiny_traces" / "collected" / "answers.jsonl"
    requests: list[str] = []

    def out_of_balance_after_five(question: str, _: int) -> str:
        requests.append(question)
        return "402" if len(requests) > 5 else "answer"

    with WordProblemServer(out_of_balance_after_five) as server:
        study(server.url)
        problems = make_arithmetic(ArithmeticDataset(kind="arithmetic", num_train=100))["train"]
        server.answers = {problem.question: problem.gold for problem in problems}

        code, said = snakemake(tmp_path, train, DEEPSEEK_API_KEY=KEY)
        assert code == 1
        assert "HTTP 402, the account has no balance left" in said and "Traceback" not in said
        assert len(read_jsonl(answers)) == 5  # Snakemake has removed nothing of them
        assert not (tmp_path / "artifacts" / "tiny_traces" / "collected.json").exists()

        server.behave = lambda *_: "answer"
        code, said = snakemake(tmp_path, train, DEEPSEEK_API_KEY=KEY)
        assert code == 0, said
        assert server.asked_again == []
        assert server.delivered.total() == 12 == len(read_problems(tmp_path / train))
        num_requests = len(server.requests)

        # More of the budget, or of the patience, asks for nothing that is there.
        study(server.url, tokens=10**6)
        code, said = snakemake(tmp_path, train, DEEPSEEK_API_KEY=KEY)
        assert code == 0 and planned(said)["collect_traces"] == 1, said
        assert len(server.requests) == num_requests

    # Nor do another address of the server, another price, or another patience.
    study("http://127.0.0.1:9", tokens=10**6, prompt_price=0.5)
    _, said = snakemake(tmp_path, "-n", train)
    assert "Nothing to be done" in said

    _, said = snakemake(tmp_path, "-n")
    jobs = planned(said)
    assert (jobs["train_sft"], jobs["train_grpo"]) == (1, 1) and "collect_traces" not in jobs
    run = "artifacts/experiments/traced/tiny-qwen2/sft_r1/seed0"
    code, said = snakemake(tmp_path, f"{run}/metrics/debug.json")
    assert code == 0, said
    assert read_json(tmp_path / run / "train" / "summary.json")["num_examples"] == 12
    check_provenance(tmp_path / "artifacts" / "results" / "traced" / "provenance.json")
    monkeypatch.chdir(tmp_path)
    # By itself it is recorded once it is whole.
    record_study(Layout(load_config("config.yaml", OVERLAYS)), since_ns=0)
    assert any(path.name == "ledger.jsonl" for path in files_of("traced"))
    assert unnoticed_flips("traced") == []
    for path in (tmp_path / "artifacts").rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
