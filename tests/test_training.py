"""What every trainer does besides its loss: rates, orders, resume, validation, saving."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

from gsm8k_core import checkpoints, training
from gsm8k_core.config import RunSettings, SftMethod
from gsm8k_core.engines.base import Completion, Engine, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.errors import ConfigError, TrainingError
from gsm8k_core.files import read_json, read_jsonl, seed_from, unlock, write_text
from gsm8k_core.models import load_model, load_tokenizer, tiny_model
from gsm8k_core.problems import Problem
from gsm8k_core.scoring import score_responses
from gsm8k_core.training import (
    TrainingRun,
    build_optimizer,
    disable_dropout,
    endless_order,
    learning_rate_at,
    num_greedy_right,
    take,
)

CPU = torch.device("cpu")
IDS = torch.arange(2, 34).reshape(4, 8)


def sft(**changes: Any) -> SftMethod:
    return SftMethod.model_validate({"kind": "sft", "learning_rate": 1.0, **changes})


@pytest.fixture
def start(
    tiny_folder: Path, run_json: Callable[..., str], tmp_path: Path
) -> Callable[..., TrainingRun]:
    """`start(num_steps=4, val=None, **overrides)`: a run of SFT on the tiny model, resumed."""

    def build(
        num_steps: int = 4,
        val: list[Problem] | None = None,
        starting_model: Path = tiny_folder,
        data: str = "problems",
        **overrides: Any,
    ) -> TrainingRun:
        overrides = {"checkpoint_every_steps": 2, "warmup_fraction": 0.0, **overrides}
        settings = RunSettings.model_validate_json(
            run_json("sft", num_steps=num_steps, **overrides)
        )
        (tmp_path / "data.jsonl").write_text(data, encoding="utf-8")
        return TrainingRun(
            settings,
            starting_model,
            tmp_path / "data.jsonl",
            tmp_path / "run",
            num_steps,
            num_steps,
            val,
        )

    return build


def step(run: TrainingRun, number: int) -> None:
    """One optimizer step on fixed tokens."""
    run.model(input_ids=IDS, labels=IDS).loss.backward()
    run.end_step(number, run.update(number - 1))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Learning rate


@pytest.mark.parametrize(
    ("schedule", "update", "expected"),
    [
        # warmup 0.2 of 10 updates is 2: (0+1)/2, (1+1)/2
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 9, 1.0),
        # then 8 updates of decay to 0.1: 0.1 + 0.9·left, left = 1 − (update − 2)/8
        ("linear", 0, 0.5),
        ("linear", 2, 1.0),
        ("linear", 6, 0.1 + 0.9 * 0.5),
        ("linear", 9, 0.1 + 0.9 * 0.125),
        # left = (1 + cos(π·(update − 2)/8))/2
        ("cosine", 1, 1.0),
        ("cosine", 2, 1.0),
        ("cosine", 4, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        ("cosine", 6, 0.1 + 0.9 * 0.5),
        ("cosine", 8, 0.1 + 0.9 * 0.5 * (1 - math.sqrt(0.5))),
        ("linear", 10, 0.1),
        ("cosine", 10, 0.1),
    ],
)
def test_learning_rate_of_each_schedule(schedule: str, update: int, expected: float) -> None:
    settings = sft(schedule=schedule, warmup_fraction=0.2, min_learning_rate_fraction=0.1)
    assert learning_rate_at(update, 10, settings) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_first_update_has_the_full_rate() -> None:
    assert learning_rate_at(0, 10, sft(schedule="cosine")) == 1.0
    assert learning_rate_at(0, 1, sft(schedule="linear")) == 1.0


def test_a_warmup_of_the_whole_run_climbs_to_the_end() -> None:
    rates = [learning_rate_at(i, 4, sft(warmup_fraction=1.0)) for i in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_the_rate_reaches_the_optimizer(start: Callable[..., TrainingRun]) -> None:
    run = start(num_steps=4, learning_rate=0.008, schedule="linear")
    run.resume()
    for number in range(1, 5):
        step(run, number)
    rates = [row["learning_rate"] for row in read_jsonl(run.state_dir / "metrics.jsonl")]
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002])


# Order


def test_every_item_comes_once_each_time_round_in_another_order() -> None:
    order = endless_order(20, seed=3)
    rounds = [list(islice(order, 20)) for _ in range(3)]
    assert all(sorted(one) == list(range(20)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


def test_the_order_depends_on_the_seed_alone() -> None:
    one, again, other = (list(islice(endless_order(20, s), 45)) for s in (3, 3, 4))
    assert one == again != other


def test_take_goes_on_where_the_last_batch_ended() -> None:
    order = iter([2, 0, 1, 2])
    assert take("abc", order, 3) == ["c", "a", "b"]
    assert take("abc", order, 1) == ["c"]


# Optimizer


def test_matrices_alone_decay(start: Callable[..., TrainingRun]) -> None:
    model = start().model
    optimizer = build_optimizer(model, sft(weight_decay=0.1, adam_beta2=0.98))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert decayed["betas"] == (0.9, 0.98)


def test_a_gradient_is_clipped_and_its_norm_from_before_is_told(
    start: Callable[..., TrainingRun],
) -> None:
    run = start(max_grad_norm=0.5)
    run.resume()
    parameter = run.model.model.norm.weight  # 64 entries of gradient 1: norm 8
    parameter.grad = torch.ones_like(parameter)
    clipped: list[float] = []
    run.optimizer.register_step_pre_hook(
        lambda *_args: clipped.append(float(parameter.grad.norm()))
    )
    assert run.update(0)["grad_norm"] == pytest.approx(8.0)
    assert clipped == pytest.approx([0.5], rel=1e-4)
    assert parameter.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    start: Callable[..., TrainingRun], value: float
) -> None:
    run = start()
    run.resume()
    step(run, 1)
    before = weights(run.model)
    run.model(input_ids=IDS, labels=IDS).loss.backward()
    run.model.model.norm.weight.grad[3] = value
    with pytest.raises(TrainingError, match="gradient of update 2 is not finite .*learning_rate"):
        run.update(1)
    assert same(weights(run.model), before)


# Resume


def test_going_on_from_a_checkpoint_equals_not_stopping(start: Callable[..., TrainingRun]) -> None:
    whole = start()
    whole.resume()
    for number in range(1, 5):
        step(whole, number)
    expected = weights(whole.model)

    again = start()
    steps_done, extra = again.resume()
    assert (steps_done, extra) == (2, {})
    rows = read_jsonl(again.state_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for number in (3, 4):
        step(again, number)
    assert same(weights(again.model), expected)
    assert again.progress["num_updates_done"] == 4


def test_a_run_of_other_settings_starts_afresh(start: Callable[..., TrainingRun]) -> None:
    run = start()
    run.resume()
    step(run, 1)
    step(run, 2)
    untrained = weights(start().model)
    other = start(learning_rate=0.5)
    assert other.resume() == (0, {})
    assert same(weights(other.model), untrained)
    assert not list(other.state_dir.glob("step-*"))
    assert read_jsonl(other.state_dir / "metrics.jsonl") == []


def test_a_run_from_other_starting_weights_starts_afresh(
    start: Callable[..., TrainingRun], tmp_path: Path
) -> None:
    # The parent was trained again: its name and this run's settings are what they were.
    run = start()
    run.resume()
    step(run, 1)
    step(run, 2)
    run._save_weights(tmp_path / "retrained")
    assert start(starting_model=tmp_path / "retrained").resume() == (0, {})


def test_nothing_to_resume_starts_at_zero(start: Callable[..., TrainingRun]) -> None:
    assert start().resume() == (0, {})


def test_a_skipped_update_has_its_place_in_the_schedule_before_and_after_a_resume(
    start: Callable[..., TrainingRun],
) -> None:
    options = {"schedule": "linear", "min_learning_rate_fraction": 0.0, "learning_rate": 1.0}
    run = start(**options, checkpoint_every_steps=1)
    run.resume()
    step(run, 2)
    again = start(**options, checkpoint_every_steps=1)
    again.resume()
    step(again, 4)
    rows = read_jsonl(again.state_dir / "metrics.jsonl")
    assert [row["learning_rate"] for row in rows] == [0.75, 0.25]  # the second and fourth of four
    assert again.progress["num_updates_done"] == 2


def test_seconds_go_on_and_checkpoints_fall_on_their_steps(
    start: Callable[..., TrainingRun],
) -> None:
    run = start(num_steps=6, keep_checkpoints=1)
    run.resume()
    for number in range(1, 6):
        step(run, number)
    assert [path.name for path in run.state_dir.glob("step-*")] == ["step-00000004"]
    again = start(num_steps=6, keep_checkpoints=1)
    again.resume()
    step(again, 5)
    rows = read_jsonl(again.state_dir / "metrics.jsonl")
    assert rows[4]["seconds_total"] >= rows[3]["seconds_total"]


def test_no_checkpoint_is_ahead_of_the_rows_on_the_disk(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: dict[int, int] = {}  # bytes of each file, by its inode
    fsync, save = os.fsync, checkpoints.save_checkpoint

    def note(descriptor: int) -> None:
        fsync(descriptor)
        on_disk[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def check(folder: Path, *others: Any, **options: Any) -> Any:
        for name, num_rows in (("metrics.jsonl", 2), ("completions.jsonl", 1)):
            path = folder / name
            assert len(read_jsonl(path)) == num_rows
            assert on_disk[path.stat().st_ino] == path.stat().st_size
        saved.append(True)
        return save(folder, *others, **options)

    saved: list[bool] = []
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(checkpoints, "save_checkpoint", check)
    run = start()
    run.resume()
    assert run.samples is not None
    step(run, 1)
    run.samples.append({"step": 1, "completions": []})
    step(run, 2)
    assert saved == [True]


def test_a_run_whose_rows_end_before_its_checkpoint_says_so(
    start: Callable[..., TrainingRun], caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    run.resume()
    for number in (1, 2, 3):
        step(run, number)
    unlock(run._lock_path, run._lock)
    assert "are lost" not in caplog.text
    again = start()
    again.resume()
    assert "are lost" not in caplog.text
    rows = run.state_dir / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes().split(b"\n")[0] + b"\n")
    unlock(again._lock_path, again._lock)
    assert start().resume()[0] == 2
    assert "metrics.jsonl ends at step 1: rows up to that of the checkpoint, 2, are lost" in (
        caplog.text
    )


# Saving


def test_a_finished_run_has_its_files_and_no_state(start: Callable[..., TrainingRun]) -> None:
    run = start()
    run.resume()
    for number in range(1, 5):
        step(run, number)
    run.progress["num_tokens"] = 128
    run.finish({"num_examples": 4})
    folder = run.output_dir
    names = [".finished", "model", "settings.json", "train"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert same(weights(load_model(folder / "model", CPU)), weights(run.model))
    assert [row["step"] for row in read_jsonl(folder / "train" / "metrics.jsonl")] == [1, 2, 3, 4]
    summary = read_json(folder / "train" / "summary.json")
    expected = {
        "method": "sft", "parent": "base", "seed": 0, "num_steps": 4, "num_updates": 4,
        "num_tokens": 128, "num_examples": 4, "device": "cpu", "best_validation": None,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["peak_memory_mb"] > 10
    settings = RunSettings.model_validate(read_json(folder / "settings.json"))
    assert settings == run.run_settings


def test_a_run_killed_while_its_engine_shuts_down_goes_on_from_its_checkpoint(
    start: Callable[..., TrainingRun],
) -> None:
    class Hanging:
        name = "vllm"

        def close(self) -> None:
            raise KeyboardInterrupt

    run = start(num_steps=2, checkpoint_every_steps=1)
    run.resume()
    for number in (1, 2):
        step(run, number)
    run._engine = cast(Engine, Hanging())
    with pytest.raises(KeyboardInterrupt):
        run.finish({})
    # Snakemake takes the outputs of a failed job away.
    shutil.rmtree(run.output_dir / "model")
    unlock(run._lock_path, run._lock)
    again = start(num_steps=2, checkpoint_every_steps=1)
    assert again.resume()[0] == 1
    step(again, 2)
    again.finish({})
    attempts = read_json(run.output_dir / "train" / "summary.json")["attempts"]
    assert [one["state"] for one in attempts] == ["killed", "finished"]
    assert not again.state_dir.exists()
    assert same(weights(run.model), weights(again.model))


def test_a_call_that_finds_all_steps_done_tells_the_engine_and_the_memory_of_those_before(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(num_steps=3, checkpoint_every_steps=1)
    run.resume()
    run.progress["engine"] = "vllm"
    monkeypatch.setattr(training, "peak_memory_mb", lambda _: 30_000)
    for number in (1, 2):
        step(run, number)
    unlock(run._lock_path, run._lock)
    monkeypatch.setattr(training, "peak_memory_mb", lambda _: 1_500)
    again = start(num_steps=3, checkpoint_every_steps=1)
    again.num_steps = 2  # as by --max-steps
    assert again.resume()[0] == 2
    again.finish({})
    summary = read_json(again.output_dir / "train" / "summary.json")
    assert summary["engine"] == "vllm" and summary["peak_memory_mb"] == 30_000


def test_an_engine_that_fails_to_shut_down_takes_no_finished_run_with_it(
    start: Callable[..., TrainingRun], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        name = "vllm"

        def close(self) -> None:
            raise RuntimeError("NCCL error")

    run = start(num_steps=1)
    run.resume()
    step(run, 1)
    run._engine = cast(Engine, Failing())
    run.finish({})
    assert (run.output_dir / "model" / "model.safetensors").exists()
    assert read_json(run.output_dir / "train" / "summary.json")["engine"] == "vllm"
    assert "vllm could not be shut down in order: NCCL error" in caplog.text


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_lost(
    start: Callable[..., TrainingRun],
) -> None:
    run = start(num_steps=8, checkpoint_every_steps=2)
    run.resume()
    for number in range(1, 5):
        step(run, number)
    again = start(num_steps=8, checkpoint_every_steps=2)
    again.num_steps = 3  # by --max-steps
    with pytest.raises(ConfigError, match=r"--max-steps 3: .*step-00000004 has done more"):
        again.resume()
    assert sorted(path.name for path in run.state_dir.glob("step-*"))[-1] == "step-00000004"


def test_keep_best_saves_the_weights_of_the_best_validation(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter([1, 7, 7, 2])
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: next(right))
    run = start(val=[Problem("a", "q", "#### 1", "1")] * 10, keep_best=True, validate_every_steps=1)
    run.resume()
    at_step: dict[int, dict[str, torch.Tensor]] = {}
    for number in range(1, 5):
        step(run, number)
        at_step[number] = weights(run.model)
    run.finish({})
    saved = weights(load_model(run.output_dir / "model", CPU))
    assert same(saved, at_step[2]) and not same(saved, at_step[3])  # the first of equals
    summary = read_json(run.output_dir / "train" / "summary.json")
    assert summary["best_validation"] == {"step": 2, "accuracy": 0.7}


def test_of_the_best_weights_only_the_last_and_those_of_checkpoints_lie_on_the_disk(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter([1, 2, 3, 4, 5])
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: next(right))
    problems = [Problem("a", "q", "#### 1", "1")] * 10
    own = {"num_steps": 8, "validate_every_steps": 1, "checkpoint_every_steps": 2}
    run = start(val=problems, keep_best=True, keep_checkpoints=1, **own)
    run.resume()
    lying = []
    for number in range(1, 6):
        step(run, number)
        lying.append(sorted(path.name for path in run.state_dir.glob("best-*")))
    assert lying == [["best-1"], ["best-2"], ["best-2", "best-3"], ["best-4"], ["best-4", "best-5"]]


def test_the_best_so_far_survives_a_resume(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter([9, 1, 2, 3])
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: next(right))
    options: dict[str, Any] = {
        "val": [Problem("a", "q", "#### 1", "1")] * 10,
        "keep_best": True, "validate_every_steps": 1,
    }  # fmt: skip
    run = start(**options)
    run.resume()
    step(run, 1)
    best = weights(run.model)
    step(run, 2)
    again = start(**options)
    assert again.resume()[0] == 2
    step(again, 3)
    step(again, 4)
    again.finish({})
    assert same(weights(load_model(again.output_dir / "model", CPU)), best)


def test_validation_falls_on_the_start_on_its_steps_and_on_the_last(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: 1)
    run = start(num_steps=5, val=[Problem("a", "q", "#### 1", "1")], validate_every_steps=2)
    run.resume()
    run.validate_start()
    for number in range(1, 6):
        step(run, number)
    rows = read_jsonl(run.state_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]


def test_what_validation_takes_is_no_training_and_both_go_on_after_a_resume(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def pass_by(seconds: float) -> int:
        nonlocal now
        now += seconds
        return 1

    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: pass_by(100.0))
    options: dict[str, Any] = {
        "val": [Problem("a", "q", "#### 1", "1")],
        "validate_every_steps": 2, "num_steps": 4,
    }  # fmt: skip
    run = start(**options)
    run.resume()
    run.validate_start()
    for number in range(1, 4):  # the third is after the checkpoint, and is lost
        pass_by(1.0)
        step(run, number)
    again = start(**options)
    assert again.resume()[0] == 2
    for number in (3, 4):
        pass_by(1.0)
        step(again, number)
    again.finish({"seconds_sampling": 50.0})
    summary = read_json(again.output_dir / "train" / "summary.json")
    assert summary["seconds_validating"] == 300.0  # before step 1, after 2 and 4
    assert summary["seconds_training"] == 4.0 + 50.0
    rows = read_jsonl(again.output_dir / "train" / "metrics.jsonl")
    assert rows[-1]["seconds_total"] == 304.0


def test_a_run_without_validation_has_no_row_of_its_start(
    start: Callable[..., TrainingRun],
) -> None:
    run = start(num_steps=2)
    run.resume()
    run.validate_start()
    assert read_jsonl(run.state_dir / "metrics.jsonl") == []


def test_the_start_is_kept_where_training_only_harms(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter([8, 7, 7, 2, 1])
    monkeypatch.setattr(training, "num_greedy_right", lambda *_a, **_k: next(right))
    run = start(val=[Problem("a", "q", "#### 1", "1")] * 10, keep_best=True, validate_every_steps=1)
    run.resume()
    before = weights(run.model)
    run.validate_start()
    for number in range(1, 5):
        step(run, number)
    run.finish({})
    assert same(weights(load_model(run.output_dir / "model", CPU)), before)
    summary = read_json(run.output_dir / "train" / "summary.json")
    assert summary["best_validation"] == {"step": 0, "accuracy": 0.8}


# LoRA


def test_lora_trains_adapters_alone_and_saves_a_plain_model_with_the_same_logits(
    start: Callable[..., TrainingRun],
) -> None:
    run = start(lora={"rank": 4, "alpha": 8.0}, learning_rate=0.05)
    frozen = {name: p for name, p in weights(run.model).items() if "lora" not in name}
    run.resume()
    for number in range(1, 5):
        step(run, number)
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert same({name: weights(run.model)[name] for name in frozen}, frozen)
    with torch.no_grad():
        expected = run.model.eval()(IDS).logits
        untrained = start().model(IDS).logits
    run.finish({})
    assert "adapter_config.json" not in {p.name for p in (run.output_dir / "model").iterdir()}
    merged = load_model(run.output_dir / "model", CPU)
    assert type(merged).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        logits = merged(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert float((logits - untrained).abs().max()) > 1e-2


def test_saving_with_lora_leaves_the_adapters_in_training(
    start: Callable[..., TrainingRun], tmp_path: Path
) -> None:
    run = start(lora={"rank": 2})
    run.resume()
    step(run, 1)
    before = weights(run.model)
    run._save_weights(tmp_path / "early")
    assert same(weights(run.model), before)
    step(run, 2)
    assert not same(weights(run.model), before)


def test_saving_with_lora_merges_into_the_starting_weights_without_copying_the_model(
    start: Callable[..., TrainingRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(lora={"rank": 4}, learning_rate=0.05)
    run.resume()
    step(run, 1)
    step(run, 2)
    merged = weights(copy.deepcopy(run.model).merge_and_unload())

    def refuse(*_: Any) -> None:
        raise AssertionError("a GPU would have to hold the model twice")

    monkeypatch.setattr(type(run.model), "__deepcopy__", refuse, raising=False)
    run._save_weights(tmp_path / "saved")
    saved = weights(load_model(tmp_path / "saved", CPU))
    assert saved.keys() == merged.keys()
    assert max(float((saved[name] - merged[name]).abs().max()) for name in merged) < 1e-6
    started = weights(load_model(run.starting_model, CPU))
    assert max(float((saved[name] - started[name]).abs().max()) for name in saved) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora_the_reference_is_the_trained_model_without_its_adapters_to_the_bit(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    options = {"gradient_checkpointing": checkpointing, "learning_rate": 0.05}
    run = start(lora={"rank": 4, "dropout": 0.5}, **options)
    run.resume()
    step(run, 1)
    step(run, 2)
    run.model.train()
    scored: tuple[torch.Tensor, ...] = (IDS, IDS, torch.ones_like(IDS))
    second = start().load_reference()
    expected = score_responses(second, *scored)["log_probs"]
    draws = torch.random.get_rng_state()

    def refuse(*_: Any) -> None:
        raise AssertionError("the weights would lie in memory twice")

    monkeypatch.setattr(training, "load_model", refuse)
    reference = run.load_reference()
    run.model(input_ids=IDS, labels=IDS).loss.backward()
    torch.random.set_rng_state(draws)
    before = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    modes = [part.training for part in run.model.modules()]
    with run.as_reference(reference):
        found = score_responses(reference, *scored)["log_probs"]
    assert torch.equal(found, expected)
    assert torch.equal(torch.random.get_rng_state(), draws)
    trained = checkpoints.trained_parameters(run.model)
    assert trained.keys() == {name for name in before if "lora_" in name}
    assert all(parameter.grad is before[name] for name, parameter in trained.items())
    assert [part.training for part in run.model.modules()] == modes
    policy = score_responses(run.model, *scored)["log_probs"]
    assert policy.requires_grad and float((policy - expected).detach().abs().max()) > 1e-2


def test_without_lora_the_reference_is_a_model_of_its_own_that_training_leaves_alone(
    start: Callable[..., TrainingRun],
) -> None:
    run = start()
    run.resume()
    reference = run.load_reference()
    before = weights(reference)
    step(run, 1)
    assert same(weights(reference), before) and not same(weights(run.model), before)


def test_lora_starts_the_same_for_the_same_seed(start: Callable[..., TrainingRun]) -> None:
    assert same(weights(start(lora={}).model), weights(start(lora={}).model))


# Dropout and accuracy


def test_dropout_is_drawn_by_the_run_s_seed_on_every_device(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.manual_seed seeds all devices: on a GPU the last one counts, and that was LoRA's.
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    own = seed_from(0, "sft", 0)
    for options in ({}, {"lora": {"rank": 2}}):
        start(**options)
        state = torch.random.get_rng_state()
        assert seeds[-1] == own
        torch.manual_seed(own)
        assert torch.equal(state, torch.random.get_rng_state())


def test_the_plain_copy_that_samples_for_several_ranks_lets_autocast_keep_its_casts(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    monkeypatch.setattr(training.ranks, "world_size", lambda: 2)
    engine: Any = run._start_engine()
    assert engine.model is not run.model
    assert all(parameter.requires_grad for parameter in engine.model.parameters())


@pytest.mark.parametrize("num_updates", [0, 3])
@pytest.mark.parametrize("drops", [False, True])
def test_weights_are_pushed_where_they_have_moved_or_were_dropped(
    start: Callable[..., TrainingRun],
    monkeypatch: pytest.MonkeyPatch,
    drops: bool,
    num_updates: int,
) -> None:
    run = start()
    pushes: list[int] = []
    monkeypatch.setattr(HfEngine, "load_weights", lambda *_: pushes.append(run._num_updates))
    monkeypatch.setattr(HfEngine, "drops_weights", drops)
    run.progress["num_updates_done"] = num_updates  # of a checkpoint that it goes on from
    monkeypatch.setattr(training.ranks, "world_size", lambda: 2)
    for moved in (0, 0, 1, 0):
        run.progress["num_updates_done"] += moved
        with run.sampling():
            pass
    before, after = num_updates, num_updates + 1
    assert pushes == ([before, before, after, after] if drops else [after])


def test_what_samples_is_the_trainer_only_where_it_is_the_same_model_in_float32(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    assert not run.samples_with_itself, "nothing samples yet"
    with run.sampling():
        pass
    assert run.samples_with_itself
    monkeypatch.setattr(training, "compute_dtype", lambda *_: "bfloat16")
    assert not run.samples_with_itself, "decoding and scoring round differently"
    monkeypatch.undo()
    run._engine = HfEngine(copy.deepcopy(run.model), run.tokenizer)
    assert not run.samples_with_itself, "a copy of the weights may be behind"


def test_disabled_dropout_makes_training_mode_deterministic(tiny_folder: Path) -> None:
    # Attention keeps its own copy of the rate, in each layer.
    model = tiny_model(load_tokenizer(tiny_folder))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.5, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapted.train()
    with torch.no_grad():
        assert not torch.equal(adapted(IDS).logits, adapted(IDS).logits)
        disable_dropout(adapted)
        assert torch.equal(adapted(IDS).logits, adapted(IDS).logits)


def test_rates_of_dropout_are_found_by_whatever_name_a_model_keeps_them() -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    wide: dict[str, Any] = {"intermediate_size": 16, "num_key_value_heads": 2}
    models = [
        OPTForCausalLM(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5)),
        Starcoder2ForCausalLM(
            Starcoder2Config(**sizes, **wide, residual_dropout=0.5, embedding_dropout=0.5)
        ),
    ]
    for model in models:
        model.train()
        with torch.no_grad():
            assert not torch.equal(model(IDS).logits, model(IDS).logits)
            disable_dropout(model)
            assert torch.equal(model(IDS).logits, model(IDS).logits)


class Scripted:
    """An engine that answers what it is told, and keeps what it was asked."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.asked = answers, list[Request]()

    def generate(self, requests: list[Request]) -> list[list[Completion]]:
        self.asked = requests
        return [[Completion([1], [0.0], "stop", text)] for text in self.answers]


@pytest.mark.parametrize(("grading", "right"), [("strict", 2), ("flexible", 3)])
def test_greedy_completions_are_counted_right_by_the_grade_that_is_asked_for(
    tiny_folder: Path, run_json: Callable[..., str], grading: Any, right: int
) -> None:
    prompt = RunSettings.model_validate_json(run_json("sft")).prompt
    problems = [Problem(str(i), f"q{i}", "#### 4", "4") for i in range(4)]
    engine: Any = Scripted(["#### 4", "2 + 2 = 4", "#### 5", "so\n#### 4"])
    num_right = num_greedy_right(engine, problems, prompt, load_tokenizer(tiny_folder), 9, grading)
    assert num_right == right  # the second has no mark, the third is wrong
    assert all(r.temperature == 0.0 and r.max_new_tokens == 9 for r in engine.asked)


def test_a_damaged_newest_checkpoint_stops_and_says_what_to_delete(
    start: Callable[..., TrainingRun],
) -> None:
    run = start()
    run.resume()
    step(run, 1)
    step(run, 2)
    write_text(run.state_dir / "step-00000002" / "weights.safetensors", "torn")
    with pytest.raises(TrainingError, match=r"weights\.safetensors: damaged .*; delete .*step-0"):
        start().resume()


def test_a_run_on_other_data_starts_afresh(start: Callable[..., TrainingRun]) -> None:
    run = start()
    run.resume()
    for number in (1, 2):
        step(run, number)
    assert start(data="other problems").resume()[0] == 0


def test_how_often_to_checkpoint_may_change_between_stop_and_resume(
    start: Callable[..., TrainingRun],
) -> None:
    run = start()
    run.resume()
    for number in (1, 2):
        step(run, number)
    assert start(checkpoint_every_steps=1, keep_checkpoints=5).resume()[0] == 2


def test_who_ran_out_of_memory_goes_on_with_smaller_microbatches(
    start: Callable[..., TrainingRun], caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    run.resume()
    for number in (1, 2):
        step(run, number)
    assert start(tokens_per_microbatch=64, gradient_checkpointing=True).resume()[0] == 2
    assert "from scratch" not in caplog.text
    assert start(batch_size=3).resume()[0] == 0
    told = "different settings: deleting its checkpoints (2 steps) and starting from scratch"
    assert f"state was made with {told}" in caplog.text


def test_weights_that_are_not_trained_pass_for_such_while_a_gpu_samples(
    start: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(lora={"rank": 2})
    before = [parameter.requires_grad for parameter in run.model.parameters()]
    assert not all(before)
    monkeypatch.setattr(run, "device", torch.device("cuda"))
    with run._sampling_context():
        assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert [parameter.requires_grad for parameter in run.model.parameters()] == before


def test_microbatches_on_a_cpu_are_no_larger_than_its_cache_likes(
    start: Callable[..., TrainingRun],
) -> None:
    assert start(tokens_per_microbatch=100_000).tokens_per_microbatch == 2048
    assert start(tokens_per_microbatch=100).tokens_per_microbatch == 100
