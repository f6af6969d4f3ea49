"""Stop a trainer at any moment and start it again: the result is that of a run nobody stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsm8k_core import training
from gsm8k_core.files import read_json, read_jsonl, sha256_file, write_jsonl
from gsm8k_core.training import TrainingRun

ROOT = Path(__file__).resolve().parent.parent
GRPO = {
    "num_steps": 6,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 16,
    "checkpoint_every_steps": 2,
    "reward": {"length": 1.0, "length_shaping": {"start": 0, "end": 16}},
}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("train_sft", "sft", {"num_steps": 6, "batch_size": 4, "checkpoint_every_steps": 2}),
    "sft with dropout": (
        "train_sft",
        "sft",
        {
            "num_steps": 6,
            "batch_size": 4,
            "checkpoint_every_steps": 2,
            "lora": {"rank": 2, "dropout": 0.5},
        },
    ),
    "dpo": ("train_dpo", "dpo", {"num_steps": 6, "batch_size": 2, "checkpoint_every_steps": 2}),
    "grpo with a refreshed reference": (
        "train_grpo",
        "grpo",
        {**GRPO, "minibatches": 2, "kl_coefficient": 0.1, "reference_refresh_steps": 1},
    ),
    # Of the presets two: how a run goes on depends on none.
    "grpo": ("train_grpo", "grpo", {**GRPO, "minibatches": 2}),
    "dapo": ("train_grpo", "dapo", {**GRPO, "minibatches": 2}),
}


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` may catch it."""


@pytest.fixture
def arguments(
    run_json: Callable[..., str], sft_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> Callable[[str, Path], list[str]]:
    """Command-line arguments of one of RUNS."""
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(
        pairs,
        [
            {"problem_id": str(n), "question": f"q {n}", "chosen_ids": [20 + n, 0],
             "rejected_ids": [21 + n, 22, 0]}
            for n in range(6)
        ],
    )  # fmt: skip

    def build(name: str, output: Path) -> list[str]:
        script_name, method, overrides = RUNS[name]
        data = pairs if script_name == "train_dpo" else arithmetic_folder / "train.jsonl"
        return [
            "--settings", run_json(method, **overrides), "--starting-model", str(sft_folder),
            "--data", str(data), "--val-data", str(arithmetic_folder / "val.jsonl"),
            "--output-dir", str(output),
        ]  # fmt: skip

    return build


def reproducible_rows(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items()
         if "second" not in key and key != "peak_memory_mb"}
        for row in read_jsonl(path)
    ]  # fmt: skip


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()
    metrics = "train/metrics.jsonl"
    assert reproducible_rows(one / metrics) == reproducible_rows(other / metrics)
    completions = "train/completions.jsonl"
    assert (one / completions).read_bytes() == (other / completions).read_bytes()
    summaries = [read_json(run / "train" / "summary.json") for run in (one, other)]
    for key in ("num_updates", "num_tokens", "num_prompts", "num_sampled_tokens"):
        assert summaries[0].get(key) == summaries[1].get(key), key
    assert (one / "settings.json").read_bytes() == (other / "settings.json").read_bytes()
    assert not (other / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "grpo"])  # but for the plainest
def test_a_run_stopped_twice_ends_as_one_that_was_never_stopped(
    name: str,
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = {"num_generations": 2, "generations_every_steps": 2, "completions_every_steps": 2}
    monkeypatch.setenv("GSM8K_TRACKING", json.dumps(look))
    main = script(RUNS[name][0]).main
    main(arguments(name, tmp_path / "whole"))

    end_step = TrainingRun.end_step
    stops = iter([3, 5])  # between checkpoints: steps 3 and 5 are done again
    stop_at = next(stops)

    def end_step_or_die(self: TrainingRun, step: int, row: Any, **options: Any) -> None:
        end_step(self, step, row, **options)
        if step == stop_at:
            raise Killed

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "end_step", end_step_or_die)
        with pytest.raises(Killed):
            main(arguments(name, stopped))
        stop_at = next(stops)
        with pytest.raises(Killed):
            main(arguments(name, stopped))
    main(arguments(name, stopped))
    assert_same_run(tmp_path / "whole", stopped)


@pytest.mark.slow
def test_a_run_killed_twice_with_sigkill_ends_as_one_that_was_never_killed(
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    # In tests/workflow a whole study is killed, with the other ways of training.
    main = script("train_grpo").main
    main(arguments("grpo", tmp_path / "whole"))
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "train_grpo.py")]
    command += arguments("grpo", killed)
    generator = random.Random("grpo")
    for num_rows in (1, 4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        metrics = killed / "state" / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= num_rows:
                time.sleep(generator.uniform(0.0, 0.1))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
    main(arguments("grpo", killed))
    assert_same_run(tmp_path / "whole", killed)


def remove_outputs(run: Path) -> None:
    """As Snakemake does with what a job has declared that it does not accept."""
    shutil.rmtree(run / "model")
    for name in ("train/metrics.jsonl", "train/summary.json", "settings.json"):
        (run / name).unlink()


def files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_finished_run_whose_outputs_were_removed_comes_back_without_training(
    name: str,
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, later = tmp_path / "run", tmp_path / "later"
    main = script(RUNS[name][0]).main
    main(arguments(name, run))
    before = files_below(run)
    assert "train/completions.jsonl" in before
    linked = run / ".finished" / "model" / "model.safetensors"
    assert linked.samefile(run / "model" / "model.safetensors")  # no more disk
    ended = linked.stat().st_mtime_ns
    remove_outputs(run)
    with monkeypatch.context() as patched, caplog.at_level("INFO"):
        patched.delattr(TrainingRun, "update")
        main(arguments(name, run))
    assert "are brought back" in caplog.text
    assert files_below(run) == before
    for path in ("model/model.safetensors", "train/metrics.jsonl", "settings.json"):
        assert (run / path).stat().st_mtime_ns > ended
    # What reads the model shows that it was accepted.
    words = arguments("sft", later)
    words[words.index("--starting-model") + 1] = str(run / "model")
    script("train_sft").main(words)
    assert not (run / ".finished").exists() and (later / ".finished").exists()
    assert files_below(run) == {k: v for k, v in before.items() if k[:9] != ".finished"}


@pytest.mark.parametrize(
    "change", ["settings", "code", "tokenizer", "--max-steps", "nothing is missing"]
)
def test_a_run_that_is_another_or_is_whole_does_not_come_back_but_is_trained(
    change: str,
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, parent = tmp_path / "run", tmp_path / "parent"
    main = script("train_sft").main
    words = arguments("sft", run)
    shutil.copytree(tiny_folder, parent)
    words[words.index("--starting-model") + 1] = str(parent)
    main([*words, "--max-steps", "2"])
    before = tmp_path / "before.safetensors"
    before.hardlink_to(run / "model" / "model.safetensors")
    if change != "nothing is missing":
        remove_outputs(run)
    if change == "settings":
        words[1] = run_json("sft", **RUNS["sft"][2], learning_rate=1e-4)
    elif change == "code":
        monkeypatch.setattr(training, "code_digest", lambda: "0" * 64)
    elif change == "tokenizer":
        (parent / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    main([*words, "--max-steps", "3" if change == "--max-steps" else "2"])
    assert "are brought back" not in caplog.text
    weights = run / "model" / "model.safetensors"
    assert not weights.samefile(before)
    assert weights.samefile(run / ".finished" / "model" / "model.safetensors")
    assert read_json(run / "train" / "summary.json")["num_steps"] == 2 + (change == "--max-steps")


def run_until_step_3(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int], arguments: list[str]
) -> None:
    """A trainer that is killed after its third step."""
    end_step = TrainingRun.end_step

    def die_at_step_3(self: TrainingRun, step: int, row: Any, **options: Any) -> None:
        end_step(self, step, row, **options)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TrainingRun, "end_step", die_at_step_3)
        main(arguments)


def test_a_run_goes_on_with_another_share_of_the_gpu_for_its_engine(
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    main = script("train_sft").main
    run_until_step_3(monkeypatch, main, arguments("sft", tmp_path / "run"))
    with caplog.at_level("INFO"):
        main([*arguments("sft", tmp_path / "run"), "--vllm-rollout-gpu-memory-fraction", "0.2"])
    assert "resuming after step 2" in caplog.text


def test_a_run_with_other_settings_does_not_go_on_from_the_old_state(
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main = script("train_sft").main
    changed = arguments("sft", tmp_path / "run")
    changed[1] = run_json("sft", **RUNS["sft"][2], learning_rate=1e-4)
    main([*changed[:-1], str(tmp_path / "fresh")])

    run_until_step_3(monkeypatch, main, arguments("sft", tmp_path / "run"))
    main(changed)
    assert_same_run(tmp_path / "fresh", tmp_path / "run")


def test_a_run_does_not_go_on_with_another_custom_reward(
    arguments: Callable[[str, Path], list[str]],
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = tmp_path / "my_edited_reward.py"
    code.write_text("def reward(completion, gold): return len(completion)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    custom = "my_edited_reward:reward"
    main = script("train_grpo").main
    words = arguments("grpo", tmp_path / "run")
    words[1] = run_json("grpo", **{**GRPO, "minibatches": 2, "reward": {"custom": custom}})
    run_until_step_3(monkeypatch, main, words)
    code.write_text("def reward(completion, gold): return -len(completion)\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_edited_reward")
    main(words)
    assert "was made with different reward code: deleting its checkpoints (2 steps)" in caplog.text
    summary = read_json(tmp_path / "run" / "train" / "summary.json")
    assert summary["reward_code"] == {custom: sha256_file(code)}
    monkeypatch.delitem(sys.modules, "my_edited_reward")
