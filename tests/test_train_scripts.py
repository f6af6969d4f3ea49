"""The training loops, run whole on the embedded model: they learn, and they say what happened."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gsm8k_core import advantages, grpo, losses, manifest, scoring, shared_prompts, training
from gsm8k_core.config import GrpoMethod, RunSettings
from gsm8k_core.engines.base import Completion
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.errors import ConfigError, DataError, TrainingError
from gsm8k_core.files import read_json, read_jsonl, write_json, write_jsonl
from gsm8k_core.models import load_model, load_tokenizer
from gsm8k_core.problems import read_problems
from gsm8k_core.training import TrainingRun

GRPO_PRESETS = (
    "reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp",
    "reinforce_pp_baseline",
)  # fmt: skip
SMALL: dict[str, Any] = {
    "num_steps": 2,
    "prompts_per_step": 8,
    "group_size": 4,
    "max_new_tokens": 24,
    "minibatches": 1,
    # The barely trained model seldom answers right; a reward by length always has a spread.
    "reward": {"length": 1.0, "length_shaping": {"start": 0, "end": 24}},
}


@pytest.fixture
def train(
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
) -> Callable[..., Path]:
    """`train(script, method, name=, data=, val=, seed=, model=, start=, **overrides)`: the folder.

    `model` is laid over the model's settings, `overrides` over the method's; `start` holds the
    weights to start from.
    """

    def call(
        script_name: str,
        method: str,
        *,
        name: str = "run",
        data: Path | None = None,
        val: bool = False,
        seed: int = 0,
        flags: tuple[str, ...] = (),
        model: dict[str, Any] | None = None,
        start: Path | None = None,
        **overrides: Any,
    ) -> Path:
        output = tmp_path / name
        settings = json.loads(run_json(method, seed=seed, **overrides))
        settings["model_settings"] |= model or {}
        arguments = [
            "--settings",
            json.dumps(settings),
            "--starting-model",
            str(start or sft_folder),
            "--data",
            str(data or arithmetic_folder / "train.jsonl"),
            "--output-dir",
            str(output),
            *flags,
        ]
        if val:
            arguments += ["--val-data", str(arithmetic_folder / "val.jsonl")]
        script(script_name).main(arguments)
        return output

    return call


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return read_jsonl(run / "train" / "metrics.jsonl")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_sft_lowers_the_loss_on_its_demonstrations(train: Callable[..., Path]) -> None:
    rows = metrics_of(train("train_sft", "sft", num_steps=30, batch_size=16, learning_rate=3e-3))
    first = sum(row["loss"] for row in rows[:5]) / 5
    last = sum(row["loss"] for row in rows[-5:]) / 5
    assert last < first - 0.02
    assert [row["step"] for row in rows] == list(range(1, 31))


@pytest.mark.parametrize("packing", [False, True])
def test_an_sft_step_does_not_depend_on_the_microbatch_size_nor_on_packing(
    train: Callable[..., Path], packing: bool
) -> None:
    # A large ε: AdamW blows a gradient that is zero but for rounding up to a step of its own.
    common = {"num_steps": 2, "batch_size": 8, "learning_rate": 1e-3, "max_length": 128,
              "adam_epsilon": 1e-4}  # fmt: skip
    whole = train("train_sft", "sft", name="whole", **common)
    cut = train(
        "train_sft", "sft", name="cut", **common, packing=packing, tokens_per_microbatch=130
    )
    assert largest_difference(whole, cut) < 2e-5


def test_a_pad_token_that_was_added_to_the_tokenizer_alone_changes_nothing(
    train: Callable[..., Path], sft_folder: Path, tmp_path: Path
) -> None:
    added = shutil.copytree(sft_folder, tmp_path / "added")
    tokenizer = load_tokenizer(added)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(added)
    assert tokenizer.pad_token_id == json.loads((added / "config.json").read_text())["vocab_size"]
    for script_name, method, common in (
        ("train_sft", "sft", {"num_steps": 2, "batch_size": 8}),
        ("train_grpo", "grpo", {**SMALL, "num_steps": 1}),
    ):
        plain, padded = (
            train(script_name, method, name=f"{method}-{start.name}", start=start, **common)
            for start in (sft_folder, added)
        )
        assert largest_difference(plain, padded) == 0.0


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_a_grpo_step_does_not_depend_on_the_microbatch_size(
    train: Callable[..., Path], aggregation: str
) -> None:
    common = {**SMALL, "num_steps": 1, "aggregation": aggregation, "adam_epsilon": 1e-3}
    whole = train("train_grpo", "grpo", name="whole", **common)
    cut = train("train_grpo", "grpo", name="cut", **common, tokens_per_microbatch=100)
    assert largest_difference(whole, cut) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mask_truncated": True},
        {"minibatches": 2, "epochs_per_batch": 2, "kl_coefficient": 0.1},
        {"lora": {"rank": 4}, "entropy_coefficient": 0.01, "tokens_per_microbatch": 200},
    ],
)
def test_a_grpo_step_does_not_depend_on_whether_completions_share_their_prompt(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    common = {**SMALL, "adam_epsilon": 1e-3, **changes}
    alone = train("train_grpo", "grpo", name="alone", **common, share_prompts=False)
    share, packs = shared_prompts.share_prompts, []

    def note(of: list[list[int]], *rest: Any) -> shared_prompts.SharedRow:
        packs.extend(of)
        return share(of, *rest)

    monkeypatch.setattr(shared_prompts, "share_prompts", note)
    together = train("train_grpo", "grpo", name="together", **common)
    assert max(map(len, packs)) == SMALL["group_size"]
    assert largest_difference(alone, together) < 1e-5
    for one, other in zip(metrics_of(alone), metrics_of(together), strict=True):
        assert one["reward_mean"] == other["reward_mean"]
        for name in ("loss", "entropy", "grad_norm", "sampler_gap_mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_on_policy_with_one_update_the_ratio_is_one_and_nothing_is_clipped(
    train: Callable[..., Path],
) -> None:
    for row in metrics_of(train("train_grpo", "grpo", **SMALL)):
        assert row["ratio"] == 1.0 and row["ratio_max"] == 1.0
        assert row["clip_fraction_low"] == 0.0 and row["clip_fraction_high"] == 0.0


def test_with_several_updates_the_ratio_leaves_one(train: Callable[..., Path]) -> None:
    rows = metrics_of(
        train("train_grpo", "grpo", **{**SMALL, "minibatches": 4}, learning_rate=3e-3)
    )
    assert rows[-1]["ratio_max"] > 1.0
    assert rows[-1]["approx_kl"] > 0.0


def test_the_sampler_and_the_trainer_agree_on_the_log_probs(train: Callable[..., Path]) -> None:
    # The engine decodes with a cache and left padding, the trainer scores whole rows padded on the
    # right, at another temperature than 1: any slip in positions, masks or scaling shows here.
    for row in metrics_of(train("train_grpo", "grpo", **SMALL, temperature=0.7)):
        assert row["sampler_gap_max"] < 1e-4
        assert row["effective_sample_fraction"] == pytest.approx(1.0, abs=1e-5)


def test_kl_to_the_start_is_logged_now_and_then_and_changes_nothing(
    train: Callable[..., Path],
) -> None:
    options = {**SMALL, "num_steps": 4, "learning_rate": 1e-3}
    plain = metrics_of(train("train_grpo", "grpo", name="plain", **options))
    logged = metrics_of(train("train_grpo", "grpo", name="kl", **options, log_kl_every_steps=2))
    assert ["kl" in row for row in logged] == [True, True, False, True]
    assert logged[0]["kl"] < 1e-3 < logged[3]["kl"]
    for one, other in zip(plain, logged, strict=True):
        assert "kl" not in one
        assert one["loss"] == other["loss"] and one["grad_norm"] == other["grad_norm"]


def test_every_pass_over_a_batch_counts_as_tokens_trained_on(train: Callable[..., Path]) -> None:
    one, two = (
        metrics_of(train("train_grpo", "grpo", name=f"{n}", **{**SMALL, "epochs_per_batch": n}))[0]
        for n in (1, 2)
    )
    assert two["num_tokens_total"] == 2 * one["num_tokens_total"]
    assert two["num_loss_tokens"] == 2 * one["num_loss_tokens"]
    assert one["num_loss_tokens"] == one["num_sampled_tokens"] < one["num_tokens_total"]
    assert one["grad_norm_max"] >= one["grad_norm"] > 0


def test_validation_reads_an_answer_as_the_reward_does(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def right(*_arguments: object, grading: str, **_others: object) -> int:
        asked.append(grading)
        return 0

    monkeypatch.setattr(training, "num_greedy_right", right)
    own = {"num_steps": 1, "validate_every_steps": 1, "reward": {"grading": "flexible"}}
    train("train_grpo", "grpo", val=True, **{**SMALL, **own})
    assert asked == ["flexible", "flexible"]  # of the start and of the only step


def test_the_commit_of_a_run_is_the_one_it_began_with(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ["began"]
    finish = training.TrainingRun.finish

    def after_a_commit(run: training.TrainingRun, summary: Any) -> None:
        commit[0] = "made meanwhile"
        finish(run, summary)

    monkeypatch.setattr(manifest, "git_state", lambda: {"commit": commit[0]})
    monkeypatch.setattr(training.TrainingRun, "finish", after_a_commit)
    summary = read_json(train("train_sft", "sft", num_steps=1) / "train" / "summary.json")
    assert summary["provenance"]["git"] == {"commit": "began"}


@pytest.mark.parametrize("method", GRPO_PRESETS)
def test_every_preset_trains_and_logs_the_same_metrics(
    train: Callable[..., Path], method: str
) -> None:
    minibatches = 1 if method in ("reinforce", "rloo") else 2
    run = train("train_grpo", method, **{**SMALL, "minibatches": minibatches})
    wanted = {
        "reward_mean", "reward_std", "answer_reward_mean", "format_reward_mean",
        "fraction_equal_reward_groups", "fraction_all_correct_groups",
        "fraction_all_incorrect_groups", "completion_length_mean", "completion_length_min",
        "completion_length_max", "completion_length_mean_terminated",
        "completion_length_mean_correct", "completion_length_mean_incorrect",
        "truncated_fraction", "num_sampled_tokens", "num_updates_without_gradient",
        "entropy", "sampler_gap_mean", "sampler_gap_max", "effective_sample_fraction", "grad_norm",
        "learning_rate", "loss", "num_tokens_total", "seconds_rolling_out", "seconds_scoring",
        "seconds_updating", "tokens_per_second", "seconds_total", "peak_memory_mb",
    }  # fmt: skip
    if method not in ("reinforce", "rloo"):  # these use no ratio
        wanted |= {"ratio", "ratio_max", "approx_kl", "clip_fraction_low", "clip_fraction_high"}
    for row in metrics_of(run):
        assert wanted <= row.keys()
    summary = read_json(run / "train" / "summary.json")
    assert summary["method"] == method and summary["num_steps"] == 2
    assert summary["seconds_training"] > 0 and summary["provenance"]["packages"]["torch"]


@pytest.mark.parametrize("samples_with_itself", [True, False])
def test_old_log_probs_are_those_before_the_first_update_whoever_scored_them(
    samples_with_itself: bool,
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first minibatch is on policy and gives its own. The others are scored beforehand, but not
    # where the engine is the model in training: what it said as it sampled is the same.
    module = script("train_grpo")
    update_policy, cut, score_all = module.update_policy, module._cut, module.score_all
    if not samples_with_itself:
        monkeypatch.setattr(TrainingRun, "samples_with_itself", False)
    sampler_gap = module.sampler_gap
    compared: list[int] = []
    scored: list[int] = []
    whole: list[torch.Tensor] = []
    used: list[tuple[list[int], torch.Tensor | None]] = []

    def score_and_update(run: TrainingRun, rollouts: Any, *rest: Any) -> Any:
        whole.append(score_all(run, run.model, rollouts))
        return update_policy(run, rollouts, *rest)

    def note(rollouts: Any, rows: list[int], width: int, advantages: Any, old: Any) -> Any:
        used.append((rows, None if old is None else old[rows].clone()))
        return cut(rollouts, rows, width, advantages, old)

    def score(run: TrainingRun, model: Any, rollouts: Any, first_row: int = 0) -> torch.Tensor:
        scored.append(first_row)
        return score_all(run, model, rollouts, first_row)

    def gap(trainer: torch.Tensor, *others: torch.Tensor) -> Any:
        compared.append(len(trainer))
        return sampler_gap(trainer, *others)

    monkeypatch.setattr(module, "update_policy", score_and_update)
    monkeypatch.setattr(module, "_cut", note)
    monkeypatch.setattr(module, "score_all", score)
    monkeypatch.setattr(module, "sampler_gap", gap)
    small = {**SMALL, "num_steps": 1, "minibatches": 2, "epochs_per_batch": 2}
    module.main(
        ["--settings", run_json("grpo", **small, learning_rate=3e-3),
         "--starting-model", str(sft_folder), "--data", str(arithmetic_folder / "train.jsonl"),
         "--output-dir", str(tmp_path / "run")]
    )  # fmt: skip
    assert scored == ([] if samples_with_itself else [16])
    # First a microbatch, as a check; then only what the trainer itself has computed.
    assert compared[1:] == [16 if samples_with_itself else 32]
    on_policy = [row for rows, old in used if old is None for row in rows]
    assert sorted(on_policy) == list(range(16))
    later = [(rows, old) for rows, old in used if old is not None]
    assert sorted(row for rows, _ in later for row in rows) == sorted([*range(32), *range(16, 32)])
    for rows, old in later:
        torch.testing.assert_close(old, whole[0][rows], atol=1e-5, rtol=1e-5)


def test_a_first_minibatch_that_is_masked_as_a_whole_leaves_the_others_to_be_learnt_from(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_half(mask: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return mask & (torch.arange(len(mask)) >= len(mask) // 2)[:, None]

    monkeypatch.setattr(losses, "mask_truncated", first_half)
    run = train("train_grpo", "grpo", **{**SMALL, "minibatches": 2, "mask_truncated": True})
    for row in metrics_of(run):
        assert row["grad_norm"] > 0 and "sampler_gap_mean" not in row


@pytest.fixture
def same_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a reward that is 1 for every completion."""
    (tmp_path / "same.py").write_text(
        "def reward(completion, gold):\n    return 1.0\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return {"answer": 0.0, "custom": "same:reward"}


def test_kl_in_the_reward_to_an_equal_reference_is_zero_to_the_last_bit(
    train: Callable[..., Path], same_reward: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[torch.Tensor] = []
    compute_advantages = advantages.compute_advantages

    def note(*arguments: Any) -> torch.Tensor:
        computed.append(compute_advantages(*arguments))
        return computed[-1]

    monkeypatch.setattr(advantages, "compute_advantages", note)
    kl = {"kl_coefficient": 0.1, "kl_placement": "reward", "kl_estimator": "k1"}
    changes = {**SMALL, **kl, "num_steps": 1, "minibatches": 2, "reward": same_reward}
    train("train_grpo", "reinforce_pp", **changes)
    assert [float(values.abs().max()) for values in computed] == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"minibatches": 2, "epochs_per_batch": 2}])
def test_completions_of_groups_with_equal_rewards_count_but_go_through_no_backward_pass(
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    (tmp_path / "half.py").write_text(
        "def reward(completion, gold):\n    return len(completion) % 7 if int(gold) % 2 else 1.0\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = {**SMALL, "reward": {"answer": 0.0, "custom": "half:reward"}, "adam_epsilon": 1e-3,
              "learning_rate": 1e-3, "share_prompts": False, **changes}  # fmt: skip
    has_gradient, score = grpo.has_gradient, scoring.score_responses
    num_useful: list[int] = []
    num_rows = {True: 0, False: 0}

    def note(advantages: torch.Tensor, settings: Any) -> torch.Tensor:
        useful = has_gradient(advantages, settings)
        num_useful.append(int(useful.sum()))
        return useful

    def count(model: Any, input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if "with_entropy" in options:  # an update, not what is scored before it
            num_rows[torch.is_grad_enabled()] += len(input_ids)
        return score(model, input_ids, *rest, **options)

    monkeypatch.setattr(grpo, "has_gradient", note)
    monkeypatch.setattr(scoring, "score_responses", count)
    less = train("train_grpo", "grpo", name="less", **common)
    epochs = changes.get("epochs_per_batch", 1)
    assert 0 < sum(num_useful) < 64
    assert num_rows == {
        True: sum(num_useful) * epochs,
        False: (64 - sum(num_useful)) * epochs,
    }
    monkeypatch.setattr(grpo, "has_gradient", lambda a, _: torch.ones_like(a, dtype=torch.bool))
    everything = train("train_grpo", "grpo", name="everything", **common)
    assert largest_difference(less, everything) < 1e-6
    for one, other in zip(metrics_of(less), metrics_of(everything), strict=True):
        assert 0.0 < one["fraction_equal_reward_groups"] < 1.0
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokens_per_second", "peak_memory_mb"}:
            if one[name] is None:  # a mean over no completion
                assert other[name] is None
            elif not name.startswith("seconds"):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_grpo_run_with_compiled_layers_is_the_one_without(train: Callable[..., Path]) -> None:
    common = {**SMALL, "kl_coefficient": 0.1, "adam_epsilon": 1e-3, "num_steps": 1}
    plain = train("train_grpo", "grpo", name="plain", **common)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = train(
        "train_grpo", "grpo", name="compiled", model={"compile_layers": True}, **common
    )
    # One for the decoder's layers, all alike, in each of a few situations; none for each token.
    assert 0 < graphs["unique_graphs"] < 8
    assert largest_difference(plain, compiled) < 1e-5
    for one, other in zip(metrics_of(plain), metrics_of(compiled), strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "sampler_gap_mean", "kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_logged_generations_compile_nothing(train: Callable[..., Path]) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model, options = {"compile_layers": True}, {"num_steps": 1, "batch_size": 2}
    run = train("train_sft", "sft", val=True, model=model, **options)
    assert 0 < graphs["unique_graphs"] < 6
    assert metrics_of(run)[0]["loss"] > 0.0


def test_training_sets_up_its_process_for_the_device(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(training, "set_up_process", devices.append)
    train("train_sft", "sft", num_steps=1, batch_size=2)
    assert devices == [torch.device("cpu")]


def test_a_step_in_which_nothing_is_learnt_goes_on_with_the_momentum(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first.py").write_text(
        "calls = 0\n\ndef reward(completion, gold):\n    global calls\n    calls += 1\n"
        "    return len(completion) if calls <= 32 else 1.0\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = {**SMALL, "reward": {"answer": 0.0, "custom": "first:reward"}, "schedule": "constant"}
    once = train("train_grpo", "grpo", name="once", **{**common, "num_steps": 1})
    monkeypatch.setattr(sys.modules["first"], "calls", 0)
    twice = train("train_grpo", "grpo", name="twice", **common)
    assert [row["grad_norm"] > 0.0 for row in metrics_of(twice)] == [True, False]
    assert [row["num_updates_without_gradient"] for row in metrics_of(twice)] == [0, 1]
    assert largest_difference(once, twice) > 0.0


def test_grpo_raises_the_reward(train: Callable[..., Path]) -> None:
    rows = metrics_of(train("train_grpo", "grpo", **{**SMALL, "num_steps": 12}, learning_rate=3e-3))
    first = sum(row["reward_mean"] for row in rows[:3]) / 3
    last = sum(row["reward_mean"] for row in rows[-3:]) / 3
    assert last > first + 0.05


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_kl_term_loads_a_reference_and_starts_at_zero(
    train: Callable[..., Path], placement: str
) -> None:
    estimator = {"loss": "k3", "reward": "k1"}[placement]
    rows = metrics_of(
        train(
            "train_grpo",
            "dr_grpo",
            **{**SMALL, "num_steps": 3},
            kl_coefficient=0.1,
            kl_placement=placement,
            kl_estimator=estimator,
            learning_rate=3e-3,
        )
    )
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert rows[-1]["kl"] > 1e-5


def test_a_refreshed_reference_is_the_policy_again(train: Callable[..., Path]) -> None:
    rows = metrics_of(
        train(
            "train_grpo",
            "grpo",
            **{**SMALL, "num_steps": 3},
            kl_coefficient=0.1,
            reference_refresh_steps=2,
            learning_rate=3e-3,
        )  # fmt: skip
    )
    assert rows[1]["kl"] > 1e-5
    assert rows[2]["kl"] == pytest.approx(0.0, abs=1e-6)  # refreshed after step 2


def test_dynamic_sampling_refills_groups_without_spread(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parity.py").write_text(
        "def reward(completion, gold):\n    return sum(completion.encode()) % 2\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**SMALL, "group_size": 2, "reward": {"answer": 0.0, "custom": "parity:reward"}}
    plain = metrics_of(train("train_grpo", "grpo", name="plain", **settings))
    dynamic = metrics_of(
        train(
            "train_grpo", "grpo", name="dynamic", **settings, dynamic_sampling=True, max_refills=40
        )  # fmt: skip
    )
    assert any(row["fraction_equal_reward_groups"] > 0 for row in plain)
    for row in dynamic:
        assert row["fraction_equal_reward_groups"] == 0
    num_sampled = [row["num_prompts_sampled"] for row in dynamic]
    assert min(num_sampled) >= 8 < max(num_sampled)  # and it says what that cost


@pytest.mark.parametrize(
    ("with_spread", "trained_on"),
    [
        # Three kept, then five of those set aside, dealt out to four minibatches of two.
        ({1, 2, 6}, [[1, 3], [2, 4], [6, 5], [0, 7]]),
        # All kept, the last five of them from the second round: in the order of sampling.
        ({1, 2, 6, 8, 9, 10, 11, 12}, [[1, 2], [6, 8], [9, 10], [11, 12]]),
    ],
)
def test_groups_that_fill_empty_places_are_dealt_out_to_the_minibatches(
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    with_spread: set[int],
    trained_on: list[list[int]],
) -> None:
    module: Any = script("train_grpo")
    settings = RunSettings.model_validate_json(
        run_json("dapo", prompts_per_step=8, minibatches=4, max_refills=1)
    )

    def sample(problems: list[int], *_: Any) -> list[Any]:
        return [module.Group([n], [], [], n in with_spread, "1", 0) for n in problems]

    monkeypatch.setattr(module, "sample_groups", sample)
    order = itertools.count()
    groups, sampled = module.collect_groups(range(99), order, None, None, settings, None, 1)
    found = [group.prompt_ids[0] for group in groups]
    assert [found[place : place + 2] for place in range(0, 8, 2)] == trained_on
    assert sorted(group.prompt_ids[0] for group in sampled) == list(range(13))


def test_an_overlong_penalty_alone_is_no_spread_for_dynamic_sampling(
    train: Callable[..., Path], same_reward: dict[str, Any]
) -> None:
    # DAPO asks whether answers differ (eq. 11). Here all are alike, but lengths, so penalties, do.
    settings = {**SMALL, "reward": same_reward, "overlong_buffer": 20}
    rows = metrics_of(train("train_grpo", "grpo", **settings, dynamic_sampling=True, max_refills=2))
    for row in rows:
        assert row["reward_std"] > 0.0
        assert row["fraction_equal_reward_groups"] == 1.0
        assert row["num_prompts_sampled"] == 3 * 8
        # Nor does it teach, where groups of equal answers fill the places.
        assert row["num_updates_without_gradient"] == 1 and row["grad_norm"] == 0.0


def test_an_overlong_penalty_alone_makes_rewards_differ_where_groups_are_not_chosen(
    train: Callable[..., Path], same_reward: dict[str, Any]
) -> None:
    # Without dynamic sampling the same groups have advantages, so they do teach.
    settings = {**SMALL, "reward": same_reward, "overlong_buffer": 20}
    for row in metrics_of(train("train_grpo", "grpo", **settings)):
        assert row["fraction_equal_reward_groups"] < 1.0
        assert row["num_updates_without_gradient"] == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_group_whose_penalties_make_its_rewards_equal_teaches_nothing(
    script: Callable[..., ModuleType], dynamic: bool
) -> None:
    module: Any = script("train_grpo")
    completions = [Completion([5] * length, [0.0] * length, "stop", "") for length in (8, 4)]
    # Right and as long as can be, wrong and short.
    rewards = [{"reward": 0.0, "answer_reward": right} for right in (1.0, 0.0)]
    groups = [module.Group([1], completions, rewards, True, gold="1", sampled_by=0)]
    settings = GrpoMethod(kind="grpo", overlong_buffer=4, dynamic_sampling=dynamic)
    assert module.rollout_metrics(groups, groups, settings)["fraction_equal_reward_groups"] == 1.0


def test_what_dynamic_sampling_leaves_out_counts_as_sampled_but_not_as_trained_on(
    train: Callable[..., Path], same_reward: dict[str, Any]
) -> None:
    settings = {**SMALL, "reward": same_reward, "dynamic_sampling": True, "max_refills": 2}
    run = train("train_grpo", "grpo", **settings)  # equal rewards: 24 groups of 4, 8 trained on
    rows = metrics_of(run)
    for row in rows:
        assert row["num_sampled_tokens"] == round(row["completion_length_mean"] * 24 * 4)
    summary = read_json(run / "train" / "summary.json")
    assert summary["num_sampled_tokens"] == sum(row["num_sampled_tokens"] for row in rows)
    assert "seconds_sampling" not in summary  # they are among those of training already
    handled = sum(
        row["tokens_per_second"]
        * sum(row[f"seconds_{part}"] for part in ("rolling_out", "scoring", "updating"))
        for row in rows
    )
    assert handled > 2 * summary["num_tokens"]


def test_correct_and_incorrect_completions_are_told_apart(
    script: Callable[..., ModuleType],
) -> None:
    module: Any = script("train_grpo")

    def group(*completions: tuple[float, int]) -> Any:
        return module.Group(
            [1],
            [Completion([5] * length, [0.0] * length, "stop", "") for _, length in completions],
            [{"reward": right, "answer_reward": right} for right, _ in completions],
            has_spread=len({right for right, _ in completions}) > 1,
            gold="1",
            sampled_by=0,
        )

    all_correct, mixed = group((1.0, 2), (1.0, 4)), group((1.0, 6), (0.0, 9))
    all_incorrect = [group((0.0, 1), (0.0, 2)) for _ in range(2)]
    sampled = [mixed, all_correct, *all_incorrect]
    metrics = module.rollout_metrics([mixed], sampled, GrpoMethod(kind="grpo"))
    assert metrics["fraction_all_correct_groups"] == 1 / 4
    assert metrics["fraction_all_incorrect_groups"] == 2 / 4
    assert metrics["fraction_equal_reward_groups"] == 0.0  # of those trained on
    assert metrics["completion_length_mean_correct"] == 4.0  # 2, 4, 6
    assert metrics["completion_length_mean_incorrect"] == 3.0  # 9, 1, 2, 1, 2
    assert metrics["num_sampled_tokens"] == 27


def test_completions_that_are_all_truncated_and_masked_give_no_update(
    train: Callable[..., Path], sft_folder: Path
) -> None:
    run = train("train_grpo", "grpo", **{**SMALL, "max_new_tokens": 2}, mask_truncated=True)
    assert all(row["truncated_fraction"] == 1.0 for row in metrics_of(run))
    before = load_file(sft_folder / "model.safetensors")
    after = weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_learning_rate_falls_to_its_end_although_an_update_is_skipped(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = HfEngine.generate
    reasons: Any = iter(["length", "stop", "stop"])  # in the first step all completions are cut

    def ended(*args: Any) -> list[list[Completion]]:
        reason = next(reasons)
        groups = generate(*args)
        return [[replace(one, finish_reason=reason) for one in group] for group in groups]

    monkeypatch.setattr(HfEngine, "generate", ended)
    settings = {**SMALL, "num_steps": 3, "mask_truncated": True, "learning_rate": 0.03}
    schedule = {"schedule": "linear", "warmup_fraction": 0.0, "min_learning_rate_fraction": 0.0}
    rows = metrics_of(train("train_grpo", "grpo", **settings, **schedule))
    rates = [row.get("learning_rate") for row in rows]
    assert rates == [None, pytest.approx(0.02), pytest.approx(0.01)]  # of 0.03, 0.02, 0.01


def test_the_overlong_penalty_is_logged_and_lowers_the_reward(train: Callable[..., Path]) -> None:
    rows = metrics_of(train("train_grpo", "grpo", **SMALL, overlong_buffer=20))
    for row in rows:
        assert -1.0 <= row["overlong_reward_mean"] < 0.0
        assert row["reward_mean"] == pytest.approx(
            row["answer_reward_mean"] + row["length_reward_mean"] + row["overlong_reward_mean"],
            abs=1e-6,
        )


def test_a_custom_reward_that_returns_no_number_stops_with_its_name(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def nothing(completion, gold):\n    return None\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match="my_rewards:nothing"):
        train("train_grpo", "grpo", **{**SMALL, "reward": {"custom": "my_rewards:nothing"}})


def test_a_custom_reward_is_told_the_question_and_whether_the_completion_was_cut(
    train: Callable[..., Path],
    arithmetic_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "judges.py").write_text(
        "asked = []\n"
        "def judge(completion, gold, question, truncated):\n"
        "    asked.append(question)\n"
        "    return truncated\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"reward": {"custom": "judges:judge"}, "num_steps": 1}
    (row,) = metrics_of(train("train_grpo", "grpo", **{**SMALL, **own}))
    assert row["custom_reward_mean"] == row["truncated_fraction"] > 0
    questions = {problem.question for problem in read_problems(arithmetic_folder / "train.jsonl")}
    asked = importlib.import_module("judges").asked
    assert len(asked) == 32 and set(asked) <= questions


def test_the_start_of_the_engine_that_rolls_out_is_no_part_of_validation(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, start_engine, later = time.perf_counter, TrainingRun._start_engine, [0.0]

    def takes_long(run: TrainingRun) -> Any:
        later[0] += 1000.0
        return start_engine(run)

    monkeypatch.setattr(TrainingRun, "_start_engine", takes_long)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + later[0])
    small = {**SMALL, "num_steps": 1, "validate_every_steps": 1, "num_validation_problems": 2}
    summary = read_json(train("train_grpo", "grpo", val=True, **small) / "train" / "summary.json")
    assert summary["seconds_training"] > 1000.0
    assert 0.0 < summary["seconds_validating"] < 1000.0


def test_validation_keeps_the_best_step(train: Callable[..., Path]) -> None:
    run = train(
        "train_sft", "sft", val=True, num_steps=6, batch_size=4, learning_rate=1e-4,
        validate_every_steps=2, keep_best=True,
    )  # fmt: skip
    validated = [
        (row["validation_accuracy"], -row["step"])
        for row in metrics_of(run)
        if "validation_accuracy" in row
    ]
    assert len(validated) == 4
    accuracy, negative_step = max(validated)  # of equal ones the first is kept
    best = read_json(run / "train" / "summary.json")["best_validation"]
    assert best == {"step": -negative_step, "accuracy": accuracy}


@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_lora_is_merged_into_a_plain_model(
    train: Callable[..., Path], method: str, sft_folder: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(pairs, [{"question": "q", "chosen_ids": [20, 0], "rejected_ids": [21, 22, 0]}])
    sizes = SMALL if method == "grpo" else {"num_steps": 2, "batch_size": 4}
    data = pairs if method == "dpo" else None
    run = train(f"train_{method}", method, data=data, **sizes, lora={"rank": 4}, learning_rate=1e-2)
    before, after = load_file(sft_folder / "model.safetensors"), weights_of(run)
    assert before.keys() == after.keys()  # no adapter names
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("proj" in name for name in moved)  # linear layers only


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dpo"])
def test_with_lora_a_reference_of_its_own_would_change_no_bit(
    train: Callable[..., Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(pairs, [{"question": "q", "chosen_ids": [20, 0], "rejected_ids": [21, 22, 0]}])
    common: dict[str, Any] = {"lora": {"rank": 4}, "learning_rate": 1e-2}
    if method == "dpo":
        common |= {"data": pairs, "num_steps": 3, "batch_size": 4, "tokens_per_microbatch": 30}
    else:
        placements = {"grpo": ("loss", "k3"), "dr_grpo": ("reward", "k1")}
        placement, estimator = placements[method]
        common |= {**SMALL, "minibatches": 2, "kl_coefficient": 0.5}
        common |= {"kl_placement": placement, "kl_estimator": estimator}
    script_name = f"train_{'dpo' if method == 'dpo' else 'grpo'}"
    one = train(script_name, method, name="one", **common)

    def second(run: TrainingRun) -> Any:
        return load_model(run.starting_model, run.device)

    monkeypatch.setattr(TrainingRun, "load_reference", second)
    two = train(script_name, method, name="two", **common)
    assert largest_difference(one, two) == 0.0
    for row, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert row["loss"] == other["loss"] and row.get("kl") == other.get("kl")


def test_gradient_checkpointing_does_not_change_the_result(train: Callable[..., Path]) -> None:
    common = {"num_steps": 2, "batch_size": 4}
    plain = train("train_sft", "sft", name="plain", **common)
    checkpointed = train("train_sft", "sft", name="cp", **common, gradient_checkpointing=True)
    assert largest_difference(plain, checkpointed) < 1e-6


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_bfloat16_computes_roughly_and_keeps_float32_weights(
    train: Callable[..., Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU's autocast stands in for CUDA's: the same casts, only slow.
    sizes = SMALL if method == "grpo" else {"num_steps": 2, "batch_size": 4}
    sizes = {**sizes, "learning_rate": 1e-4, "schedule": "constant"}
    exact = train(f"train_{method}", method, name="exact", **sizes)
    on_cpu = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(TrainingRun, "autocast", lambda _run, _keep_casts=None: on_cpu)
    rough = train(f"train_{method}", method, name="rough", **sizes)
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(rough).values())
    # Adam moves a weight by about the rate a step: two runs of two steps part by 4e-4 at most.
    assert 0.0 < largest_difference(exact, rough) < 4.5e-4
    if method == "sft":
        assert metrics_of(rough)[0]["loss"] == pytest.approx(metrics_of(exact)[0]["loss"], rel=0.02)


def test_max_steps_gives_an_early_look_on_the_same_schedule(train: Callable[..., Path]) -> None:
    whole = train("train_sft", "sft", name="whole", num_steps=6, batch_size=4)
    early = train(
        "train_sft", "sft", name="early", num_steps=6, batch_size=4, flags=("--max-steps", "2")
    )

    def without_seconds(run: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if is_reproducible(k)} for row in metrics_of(run)]

    assert without_seconds(early) == without_seconds(whole)[:2]
    # A study that asks for six steps does not take it for one of its runs.
    assert read_json(early / "settings.json")["method_settings"]["num_steps"] == 2


def is_reproducible(key: str) -> bool:
    return "second" not in key and key != "peak_memory_mb"


def test_expert_iteration_trains_on_the_sampled_token_ids(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    # Token 19 is sampled as it is, though no tokenizer would write "2" so in this place.
    data = tmp_path / "demonstrations.jsonl"
    write_jsonl(
        data,
        [{"question": "q", "response_ids": [19, 19, 0], "problem_id": "a", "completion": "22"}],
    )
    run = train("train_sft", "rft", data=data, num_steps=2, batch_size=2)
    assert metrics_of(run)[0]["num_response_tokens"] == 6  # two copies of three ids


def test_dpo_prefers_the_chosen_completions(train: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    pair = {"problem_id": "a", "question": "q", "chosen_ids": [20, 0], "rejected_ids": [21, 22, 0]}
    write_jsonl(data, [pair])
    stats = tmp_path / "stats.json"
    write_json(
        stats, {"seconds_loading": 10.0, "seconds_generating": 990.0, "num_completion_tokens": 77}
    )
    run = train(
        "train_dpo", "dpo", data=data, num_steps=6, batch_size=2,
        flags=("--sampling-stats", str(stats)),
    )  # fmt: skip
    rows = metrics_of(run)
    summary = read_json(run / "train" / "summary.json")
    assert summary["seconds_training"] > 1000.0  # sampling the pairs is part of the cost
    assert summary["num_sampled_tokens"] == 77
    assert rows[0]["margin"] == 0.0  # policy and reference are the same
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # -log σ(0) = log 2
    assert rows[-1]["margin"] > 0 and rows[-1]["accuracy"] == 1.0


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"question": None}, "row 2: 'question' is missing or not a text"),
    ({"question": "\ud83d"}, "row 2: 'question' holds half a surrogate pair"),
    ({"IDS": None}, "row 2: 'IDS': expected list, found null"),
    ({"IDS": []}, "row 2: 'IDS' holds no token"),
    ({"IDS": [19, "a"]}, "row 2: 'IDS' should hold token ids from 0 to .*, found 'a' at place 1"),
    ({"IDS": [True]}, "row 2: 'IDS' should hold token ids .*, found True at place 0"),
    ({"IDS": [10**6]}, "row 2: 'IDS' .* found 1000000 at place 0; was it made with another model"),
    ({"IDS": [-1]}, "row 2: 'IDS' should hold token ids"),
]


@pytest.mark.parametrize("ids", ["response_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_fault_of_what_is_trained_on_is_named_by_file_and_row(
    train: Callable[..., Path], tmp_path: Path, ids: str, fault: dict[str, Any], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    good = {"question": "q", "response_ids": [19, 0], "chosen_ids": [20, 0], "rejected_ids": [21]}
    bad = {**good, **{ids if key == "IDS" else key: value for key, value in fault.items()}}
    # ASCII JSON can hold half a surrogate pair.
    data.write_text("".join(json.dumps(row) + "\n" for row in (good, bad)), encoding="utf-8")
    script_name, method = ("train_sft", "rft") if ids == "response_ids" else ("train_dpo", "dpo")
    with pytest.raises(DataError, match=message.replace("IDS", ids)) as caught:
        train(script_name, method, data=data, num_steps=1)
    assert str(caught.value).startswith(f"{data}, row 2: ")


def test_no_pair_to_prefer_is_an_error_and_not_an_endless_loop(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs.jsonl: holds no pair"):
        train("train_dpo", "dpo", data=data, num_steps=1)


def test_a_method_of_another_kind_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="sft is of kind sft, not grpo"):
        train("train_grpo", "sft")


def test_demonstrations_that_are_all_too_long_are_an_error(train: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="max_length 5"):
        train("train_sft", "sft", max_length=5)


@pytest.mark.parametrize("kind", ["sft", "rft", "dpo"])
def test_what_is_longer_than_the_model_has_positions_is_left_out_and_counted(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    # As after a round on a prompt that generate.py has cut: the tiny model has 512 positions.
    def row(question: str, num_tokens: int) -> dict[str, Any]:
        solution = {"answer": "#### 1", "gold": "1", "demonstration": "x " * num_tokens}
        ids = [19] * num_tokens
        return {"id": question[:2], "question": question, **solution, "response_ids": ids,
                "chosen_ids": [20, 0], "rejected_ids": ids}  # fmt: skip

    name, what = ("train_dpo", "pairs") if kind == "dpo" else ("train_sft", "demonstrations")
    data = tmp_path / "data.jsonl"
    fits, long_prompt, long_response = row("1", 9), row("2" * 600, 9), row("3", 600)
    write_jsonl(data, [fits, long_prompt, long_response])
    run = train(name, kind, data=data, num_steps=1, batch_size=2)
    warning = f"2 of 3 {what} are longer than the model's 512 positions and are left out"
    assert warning in caplog.text
    assert read_json(run / "train" / "summary.json")["num_examples"] == 1
    write_jsonl(data, [long_prompt, long_response])
    with pytest.raises(
        DataError, match=f"none of its 2 {what} is within the model's 512 positions"
    ):
        train(name, kind, name="none left", data=data, num_steps=1)


def with_long_prompts(source: Path, target: Path, *long: int) -> None:
    """The problems of `source`, of which those at `long` have more words than the tiny model has
    positions.
    """
    rows = read_jsonl(source)[:12]
    for place in long:
        rows[place]["question"] = "2 " * 600 + rows[place]["question"]
    write_jsonl(target, rows)


def test_a_problem_that_leaves_no_room_for_a_completion_does_not_end_a_run(
    train: Callable[..., Path],
    arithmetic_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    with_long_prompts(arithmetic_folder / "train.jsonl", data, 3, 7)
    with_long_prompts(arithmetic_folder / "val.jsonl", val, 0)
    settings = {"num_steps": 3, "prompts_per_step": 8, "max_new_tokens": 8, "group_size": 2}
    run = train(
        "train_grpo", "grpo", data=data, flags=("--val-data", str(val)), validate_every_steps=3,
        num_validation_problems=4, validation_max_new_tokens=8, **settings,
    )  # fmt: skip
    assert "2 of 12 problems with 8 new tokens are longer than the model's 512 positions" in (
        caplog.text
    )
    assert "1 of 4 validation problems with 8 new tokens are longer" in caplog.text
    rows = read_jsonl(run / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    shown = read_jsonl(run / "train" / "completions.jsonl")
    prompts = [row["prompt"] for entry in shown for row in entry["completions"]]
    assert prompts and not any("2 2 2" in prompt for prompt in prompts)


def test_sft_runs_where_no_validation_problem_leaves_room_unless_it_is_to_validate(
    train: Callable[..., Path], arithmetic_folder: Path, tmp_path: Path
) -> None:
    val = tmp_path / "val.jsonl"
    with_long_prompts(arithmetic_folder / "val.jsonl", val, *range(12))
    given = ("--val-data", str(val))
    train("train_sft", "sft", flags=given, num_steps=1, batch_size=2)
    wanted = {"validate_every_steps": 1, "num_validation_problems": 4}
    with pytest.raises(ConfigError, match="no validation problem leaves room"):
        train("train_sft", "sft", name="validates", flags=given, num_steps=1, **wanted)


@pytest.mark.parametrize(("engine", "is_left_out"), [("transformers", False), ("auto", True)])
def test_a_length_of_vllm_counts_where_vllm_may_be_chosen(
    train: Callable[..., Path], caplog: pytest.LogCaptureFixture, engine: str, is_left_out: bool
) -> None:
    model = {"engine": engine, "vllm": {"max_model_length": 16}}
    train("train_sft", "sft", val=True, model=model, num_steps=1, batch_size=2)
    assert ("longer than vllm.max_model_length 16" in caplog.text) == is_left_out


def test_grpo_says_so_where_no_problem_leaves_room(train: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"none of its \d+ problems leaves room for max_new_tokens"):
        train("train_grpo", "grpo", max_new_tokens=512)


def test_settings_json_of_a_run_starts_the_same_run_again(
    train: Callable[..., Path],
    script: Callable[[str], ModuleType],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
) -> None:
    run = train("train_sft", "sft", num_steps=2, batch_size=4)
    again = tmp_path / "again"
    script("train_sft").main(
        [
            "--settings",
            str(run / "settings.json"),
            "--starting-model",
            str(sft_folder),
            "--data",
            str(arithmetic_folder / "train.jsonl"),
            "--output-dir",
            str(again),
        ]  # fmt: skip
    )
    assert largest_difference(run, again) == 0.0
    assert json.loads((again / "settings.json").read_text(encoding="utf-8")) == json.loads(
        (run / "settings.json").read_text(encoding="utf-8")
    )


def test_a_sample_of_rollouts_is_kept_now_and_then(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"completions_every_steps": 2, "num_completions": 3}
    monkeypatch.setenv("GSM8K_TRACKING", json.dumps(kept))
    run = train("train_grpo", "grpo", **{**SMALL, "num_steps": 4})
    rows = read_jsonl(run / "train" / "completions.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert len(row["completions"]) == 3
        assert {"prompt", "completion", "gold", "reward"} <= row["completions"][0].keys()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    pair = {"problem_id": "a", "question": "q", "chosen_ids": [20, 0], "rejected_ids": [21, 22, 0]}
    write_jsonl(path, [pair])
    return path


GENERATIONS = {"num_steps": 4, "batch_size": 2, "validation_max_new_tokens": 12}


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_sft_and_dpo_keep_what_the_model_writes_to_problems_of_val(
    train: Callable[..., Path],
    pairs: Path,
    arithmetic_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("GSM8K_TRACKING", '{"num_generations": 3, "generations_every_steps": 3}')
    data = pairs if name == "dpo" else None
    run = train(f"train_{name}", name, val=True, data=data, learning_rate=3e-3, **GENERATIONS)
    rows = read_jsonl(run / "train" / "completions.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 4]
    problems = read_jsonl(arithmetic_folder / "val.jsonl")[:3]
    for row in rows:
        assert [one["gold"] for one in row["completions"]] == [p["gold"] for p in problems]
        for one, problem in zip(row["completions"], problems, strict=True):
            assert problem["question"] in one["prompt"]
            assert 1 <= one["num_tokens"] <= 12 and one["mean_entropy"] > 0
            assert one["truncated"] == (one["num_tokens"] == 12) and one["reward"] in (0.0, 1.0)
    assert rows[0]["completions"] != rows[-1]["completions"]  # it has learnt between them


def test_what_a_run_is_looked_at_by_default_is_little_and_without_val_nothing(
    train: Callable[..., Path],
) -> None:
    run = train("train_sft", "sft", name="val", val=True, **GENERATIONS)
    rows = read_jsonl(run / "train" / "completions.jsonl")
    assert [(row["step"], len(row["completions"])) for row in rows] == [(0, 4), (4, 4)]
    # Nor has it those of a run that was there before.
    assert run == train("train_sft", "sft", name="val", learning_rate=1e-5, **GENERATIONS)
    assert not (run / "train" / "completions.jsonl").exists()


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_looking_at_what_the_model_writes_changes_no_bit_of_training(
    train: Callable[..., Path], pairs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Dropout is what draws from torch's own generator; DPO has none, but a model in train mode.
    lora = {"lora": {"rank": 2, "dropout": 0.5}} if name == "sft" else {}
    weights = []
    for every in (0, 1):
        look = {"num_generations": 4 * every, "generations_every_steps": every}
        monkeypatch.setenv("GSM8K_TRACKING", json.dumps(look))
        data = pairs if name == "dpo" else None
        run = train(f"train_{name}", name, name=f"{every}", val=True, data=data, **GENERATIONS,
                    **lora)  # fmt: skip
        assert (run / "train" / "completions.jsonl").exists() == bool(every)
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
