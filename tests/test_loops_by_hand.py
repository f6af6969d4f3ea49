"""The training loops against the papers' formulas, worked out token by token.

The parts that the loops put together are tested by themselves elsewhere. Here the scripts run, and
what they sampled, the weights before every update and the gradient that it got are written down.
From these the tests compute loss and gradient again, with nothing but a model's logits and sums in
plain Python: one completion at a time, no padding, no masks, float64. A loop that hands a part the
wrong values (another step's, another minibatch's, another setting's) differs from them.

Read in this order: `RECIPES` says what sets the methods apart, `step_by_hand` what they share.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsm8k_core
from gsm8k_core.engines.base import Completion, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.errors import TrainingError
from gsm8k_core.files import read_jsonl, write_jsonl
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import collate
from gsm8k_core.training import TrainingRun

Weights = dict[str, torch.Tensor]
ByGroup = list[list[float]]
"""A number for each completion of each group."""
PerToken = list[torch.Tensor]
"""A number for each token of a completion."""

PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 6, 4, 24
EPSILON = 1e-6  # of the z-scores
EOS = 0
COMMON: dict[str, Any] = {
    "num_steps": 2,  # in the second, the policy is no longer the starting model
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "learning_rate": 1e-3,  # the first update takes ratios well out of most clip ranges
    "tokens_per_microbatch": 200,  # several for each update
}
GRPO: dict[str, Any] = {
    **COMMON,
    "prompts_per_step": PROMPTS,
    "group_size": GROUP_SIZE,
    "max_new_tokens": MAX_NEW_TOKENS,
    "minibatches": 2,  # the second is off policy
    "reward": {"answer": 0.0, "custom": "reward_by_hand:reward"},
}
UNCHECKED = {"check_sampler_every_steps": 0}  # or a wrong sampler would stop the run


def reward(completion: str, gold: str) -> float:
    """0, ½ or 1 by length, but always 1 where 3 divides `gold`: such groups teach nothing."""
    return 1.0 if int(gold) % 3 == 0 else len(completion) % 3 / 2


# ----------------------------------------------------------------------- running, and writing down


@dataclass
class Update:
    before: Weights
    gradient: Weights


@dataclass
class Step:
    """`rounds` has what each call of the engine was asked and what it gave: one, but for DAPO."""

    rounds: list[list[tuple[Request, list[Completion]]]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)


@dataclass
class Recorded:
    steps: list[Step]
    """Of SFT and DPO, which do not sample, a single one has the updates of all."""
    rows: list[dict[str, Any]]
    """What the run logged, one a step."""


@pytest.fixture
def record(
    script: Callable[[str], ModuleType],
    run_json: Callable[..., str],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Recorded]:
    """`record(script, method, data=, wrong_sampler=, **overrides)` runs it and writes it down.

    With `wrong_sampler`, the engine's log-probs are not the trainer's, as those of vLLM are not;
    with `wrong_from`, from that step on.
    """
    (tmp_path / "reward_by_hand.py").write_text(inspect.getsource(reward), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    generate, update = HfEngine.generate, TrainingRun.update

    def call(
        name: str,
        method: str,
        *,
        data: Path = arithmetic_folder / "train.jsonl",
        wrong_sampler: bool = False,
        wrong_from: int = 1,
        **overrides: Any,
    ) -> Recorded:
        steps: list[Step] = [Step()]

        def note_samples(engine: HfEngine, requests: list[Request]) -> list[list[Completion]]:
            groups = generate(engine, requests)
            if steps[-1].updates:
                steps.append(Step())
            if wrong_sampler and len(steps) >= wrong_from:
                groups = [[_with_wrong_log_probs(one) for one in group] for group in groups]
            steps[-1].rounds.append(list(zip(requests, groups, strict=True)))
            return groups

        def note_update(run: TrainingRun, number: int) -> dict[str, float]:
            parameters = dict(run.model.named_parameters())
            steps[-1].updates.append(
                Update(
                    before={name: p.detach().clone() for name, p in parameters.items()},
                    gradient={name: p.grad.clone() for name, p in parameters.items()},
                )
            )
            return update(run, number)

        monkeypatch.setattr(HfEngine, "generate", note_samples)
        monkeypatch.setattr(TrainingRun, "update", note_update)
        if wrong_sampler:
            monkeypatch.setattr(TrainingRun, "samples_with_itself", False)
        output = tmp_path / f"seed{overrides.get('seed', 0)}"
        script(name).main(
            ["--settings", run_json(method, **overrides), "--starting-model", str(sft_folder),
             "--data", str(data), "--output-dir", str(output)]
        )  # fmt: skip
        return Recorded(steps, read_jsonl(output / "train" / "metrics.jsonl"))

    return call


def _with_wrong_log_probs(completion: Completion) -> Completion:
    """Off by up to 0.2 nats a token, over all of a completion to one side or to the other."""
    side = 1 if sum(completion.token_ids) % 2 else -1
    wrong = [x + side * 0.05 * (place % 5) for place, x in enumerate(completion.log_probs)]
    return replace(completion, log_probs=wrong)


@dataclass
class Reader:
    """What the tests themselves need of the starting model: its logits and its words."""

    model: Any
    tokenizer: Any
    starting_weights: Weights

    def load(self, weights: Weights) -> None:
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected  # which are the embeddings
        self.model.zero_grad()

    def distributions(self, prompt: list[int], response: list[int], temperature: float) -> PerToken:
        """log π(· | prompt, y_<t) for each token y_t of the response, (vocabulary,) each."""
        logits = self.model(torch.tensor([prompt + response])).logits[0]
        first = len(prompt) - 1  # the logits at a token are of the next one
        return list(torch.log_softmax(logits[first : first + len(response)] / temperature, dim=-1))

    def log_probs(
        self, prompt: list[int], response: list[int], temperature: float = 1.0
    ) -> PerToken:
        """log π(y_t | prompt, y_<t) of each token of the response."""
        rows = self.distributions(prompt, response, temperature)
        return [row[token] for row, token in zip(rows, response, strict=True)]

    def gradient(self) -> Weights:
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


@pytest.fixture
def reader(sft_folder: Path) -> Reader:
    model = AutoModelForCausalLM.from_pretrained(sft_folder, dtype=torch.float64).eval()
    weights = load_file(sft_folder / "model.safetensors")
    return Reader(model, AutoTokenizer.from_pretrained(sft_folder), weights)


def check_gradient(found: Weights, expected: Weights) -> float:
    """Compare the two; returns the norm of what is expected."""
    assert found.keys() == expected.keys()
    norm = math.sqrt(sum(float(values.square().sum()) for values in expected.values()))
    for name in expected:
        difference = float((found[name] - expected[name]).norm())
        assert difference <= 1e-4 * norm, f"{name}: {difference} of {norm}"
    return norm


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def total(values: PerToken) -> torch.Tensor:
    return torch.stack(values).sum()


# ------------------------------------------------------------------- from rewards to advantages


def raw(rewards: ByGroup) -> ByGroup:
    """A_i = r_i (Williams 1992, without a baseline)."""
    return rewards


def leave_one_out(rewards: ByGroup) -> ByGroup:
    """A_i = r_i - mean of the other rewards of the group (RLOO, Ahmadian et al. 2024, §3.3)."""
    return [
        [r - mean([*group[:i], *group[i + 1 :]]) for i, r in enumerate(group)] for group in rewards
    ]


def group_centered(rewards: ByGroup) -> ByGroup:
    """A_i = r_i - mean of the group (Dr. GRPO, Liu et al. 2025, §3.2)."""
    return [[r - mean(group) for r in group] for group in rewards]


def zscores(rewards: list[float]) -> list[float]:
    """(r - mean) / std, with the unbiased std. Equal rewards have nothing to be divided by."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    variance = sum((r - mean(rewards)) ** 2 for r in rewards) / (len(rewards) - 1)
    return [(r - mean(rewards)) / (math.sqrt(variance) + EPSILON) for r in rewards]


def group_zscore(rewards: ByGroup) -> ByGroup:
    """A_i = (r_i - mean) / std of the group (GRPO, Shao et al. 2024, §4.1.2)."""
    return [zscores(group) for group in rewards]


def batch_zscore(rewards: ByGroup) -> ByGroup:
    """A_i = (r_i - mean) / std of the whole step (REINFORCE++, Hu et al. 2025)."""
    every = iter(zscores([r for group in rewards for r in group]))
    return [[next(every) for _ in group] for group in rewards]


def group_centered_batch_std(rewards: ByGroup) -> ByGroup:
    """A_i = r_i - mean of the group, over the std of all of these (REINFORCE++-baseline)."""
    centered = group_centered(rewards)
    every = [a for group in centered for a in group]
    std = math.sqrt(sum(a**2 for a in every) / (len(every) - 1))
    return [[a / (std + EPSILON) for a in group] for group in centered]


# ------------------------------------------------------------- what is made larger, token by token


def reinforce(new: PerToken, _old: list[float], advantage: float) -> PerToken:
    """A·log π(y_t) (Williams 1992)."""
    return [advantage * x for x in new]


def _clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    """min(ρ·A, clip(ρ, 1 - low, 1 + high)·A) (PPO, Schulman et al. 2017, eq. 7)."""
    return min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ppo_clip(low: float, high: float) -> Callable[..., PerToken]:
    """With the ratio of each token (DeepSeekMath, eq. 3; the two bounds apart: DAPO, eq. 8)."""

    def objective(new: PerToken, old: list[float], advantage: float) -> PerToken:
        return [
            _clipped(torch.exp(x - before), advantage, low, high)
            for x, before in zip(new, old, strict=True)
        ]

    return objective


def gspo(low: float, high: float) -> Callable[..., PerToken]:
    """With s = (π(y) / π_old(y))^(1/|y|), one for the completion (Zheng et al. 2025, eq. 5, 7)."""

    def objective(new: PerToken, old: list[float], advantage: float) -> PerToken:
        s = torch.exp((total(new) - sum(old)) / len(new))
        return [_clipped(s, advantage, low, high)] * len(new)

    return objective


def cispo(high: float) -> Callable[..., PerToken]:
    """min(ρ_t, 1 + high)·A·log π(y_t), the first factor a constant (MiniMax-M1, eq. 4, 5)."""

    def objective(new: PerToken, old: list[float], advantage: float) -> PerToken:
        return [
            min(math.exp(x.item() - before), 1 + high) * advantage * x
            for x, before in zip(new, old, strict=True)
        ]

    return objective


# ------------------------------------------------------------ from the tokens' losses to one number


def sequence_mean(losses: list[PerToken]) -> torch.Tensor:
    """Over the tokens of each completion, then over the completions (DeepSeekMath, eq. 3)."""
    return total([total(tokens) / len(tokens) for tokens in losses]) / len(losses)


def token_mean(losses: list[PerToken]) -> torch.Tensor:
    """Over all tokens alike (DAPO, eq. 8)."""
    every = [x for tokens in losses for x in tokens]
    return total(every) / len(every)


def constant(losses: list[PerToken]) -> torch.Tensor:
    """Sum of a completion's over the longest length there is, mean over completions (Dr. GRPO)."""
    return total([total(tokens) / MAX_NEW_TOKENS for tokens in losses]) / len(losses)


# -------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Recipe:
    """What sets a method of the family apart."""

    advantages: Callable[[ByGroup], ByGroup]
    objective: Callable[[PerToken, list[float], float], PerToken]
    """(log π, log π_old, A) of a completion -> what is made larger, for each token."""
    one_number: Callable[[list[PerToken]], torch.Tensor]


RECIPES = {
    "reinforce": Recipe(raw, reinforce, constant),
    "rloo": Recipe(leave_one_out, reinforce, constant),
    "grpo": Recipe(group_zscore, ppo_clip(0.2, 0.2), sequence_mean),
    "dr_grpo": Recipe(group_centered, ppo_clip(0.2, 0.2), constant),
    "dapo": Recipe(group_zscore, ppo_clip(0.2, 0.28), token_mean),
    "gspo": Recipe(group_zscore, gspo(3e-4, 4e-4), sequence_mean),
    "cispo": Recipe(group_zscore, cispo(4.0), token_mean),
    "reinforce_pp": Recipe(batch_zscore, ppo_clip(0.2, 0.2), token_mean),
    "reinforce_pp_baseline": Recipe(group_centered_batch_std, ppo_clip(0.2, 0.2), token_mean),
}
# What config.yaml adds to DAPO: dynamic sampling (§3.2), overlong punishment (eq. 13).
OVERLONG_BUFFER = {"dapo": 8}


@dataclass
class Sample:
    """A completion, and all that its part of the loss is made from besides the policy."""

    prompt: list[int]
    completion: Completion
    reward: float
    penalty: float = 0.0
    teaches: bool = True
    """Not where it fills a place that dynamic sampling left empty."""
    advantage: float = 0.0
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.completion.token_ids

    @property
    def is_truncated(self) -> bool:
        return self.tokens[-1] != EOS


def groups_by_hand(
    step: Step, method: str, reader: Reader, golds: dict[str, str]
) -> list[list[Sample]]:
    """The groups that a step learns from, rewarded, in the order in which they were sampled."""
    buffer = OVERLONG_BUFFER.get(method, 0)
    kept: list[list[Sample]] = []
    aside: list[list[Sample]] = []
    for samples in step.rounds:
        assert len(samples) == PROMPTS - len(kept)  # each round fills what is missing
        for request, completions in samples:
            gold = golds[reader.tokenizer.decode(request.prompt_ids)]
            group = []
            for completion in completions:
                text = reader.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                over = len(completion.token_ids) - (MAX_NEW_TOKENS - buffer)
                penalty = -over / buffer if buffer and over > 0 else 0.0  # DAPO, eq. 13
                group.append(Sample(request.prompt_ids, completion, reward(text, gold), penalty))
            has_spread = len({sample.reward for sample in group}) > 1
            if method == "dapo" and not has_spread:
                for sample in group:
                    sample.teaches = False
                aside.append(group)
            else:
                kept.append(group)
    return kept + aside[: PROMPTS - len(kept)]


def minibatches_by_hand(groups: list[list[Sample]], num: int) -> list[list[Sample]]:
    """As many prompts in each. Groups that teach nothing but fill are dealt out among them."""
    size = len(groups) // num
    if all(sample.teaches for group in groups for sample in group):
        parts = [groups[m * size : (m + 1) * size] for m in range(num)]
    else:
        parts = [groups[m::num] for m in range(num)]
    return [[sample for group in part for sample in group] for part in parts]


def floats(values: PerToken) -> list[float]:
    return [x.item() for x in values]


def token_losses(sample: Sample, reader: Reader, recipe: Recipe, settings: Any) -> PerToken:
    """-objective·(importance weight) + β·KL - c·entropy of each token, by the reader's weights."""
    rows = reader.distributions(sample.prompt, sample.tokens, settings.get("temperature", 1.0))
    new = [row[token] for row, token in zip(rows, sample.tokens, strict=True)]
    losses = [-x for x in recipe.objective(new, sample.old, sample.advantage)]

    if "importance_correction" in settings:  # Yao et al. 2025: π_old / π_sampler, bounded
        of_sampler = sample.completion.log_probs
        log_weights = [old - x for old, x in zip(sample.old, of_sampler, strict=True)]
        if settings["importance_correction"] == "sequence":
            log_weights = [sum(log_weights)] * len(log_weights)
        bound = settings["importance_bound"]
        beyond = {"truncate": bound, "mask": 0.0}[settings["importance_mode"]]
        weights = [math.exp(x) if math.exp(x) <= bound else beyond for x in log_weights]
        losses = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    if settings.get("kl_placement") == "loss":  # k3, DeepSeekMath, eq. 4
        for t, of_reference in enumerate(sample.reference):
            log_ratio = of_reference - new[t]
            losses[t] = losses[t] + settings["kl_coefficient"] * (
                torch.exp(log_ratio) - log_ratio - 1
            )
    if "entropy_coefficient" in settings:
        for t, row in enumerate(rows):
            losses[t] = losses[t] + settings["entropy_coefficient"] * (row.exp() * row).sum()
    return losses


def step_by_hand(
    step: Step,
    row: dict[str, Any],
    method: str,
    recipe: Recipe,
    settings: dict[str, Any],
    reader: Reader,
    golds: dict[str, str],
) -> None:
    """Check every update of a step, and what it logged, against the definitions."""
    groups = groups_by_hand(step, method, reader, golds)
    samples = [sample for group in groups for sample in group]

    with torch.no_grad():  # the policy that sampled, then the reference
        temperature = settings.get("temperature", 1.0)
        reader.load(step.updates[0].before)
        for sample in samples:
            sample.old = floats(reader.log_probs(sample.prompt, sample.tokens, temperature))
        reader.load(reader.starting_weights)
        for sample in samples if "kl_coefficient" in settings else []:
            sample.reference = floats(reader.log_probs(sample.prompt, sample.tokens, temperature))

    rewards = [[sample.reward + sample.penalty for sample in group] for group in groups]
    if settings.get("kl_placement") == "reward":  # r(x, y) - β·log(π(y|x) / π_ref(y|x))
        for group, of_group in zip(groups, rewards, strict=True):
            for place, sample in enumerate(group):
                kl = sum(sample.old) - sum(sample.reference)
                of_group[place] -= settings["kl_coefficient"] * kl
    for group, advantages in zip(groups, recipe.advantages(rewards), strict=True):
        for sample, advantage in zip(group, advantages, strict=True):
            sample.advantage = advantage if sample.teaches else 0.0

    minibatches = minibatches_by_hand(groups, settings["minibatches"])
    if settings.get("mask_truncated"):  # DAPO, §3.4
        minibatches = [[s for s in part if not s.is_truncated] for part in minibatches]
        minibatches = [part for part in minibatches if part]
    minibatches *= settings.get("epochs_per_batch", 1)
    losses, norms = [], []
    for update, minibatch in zip(step.updates, minibatches, strict=True):
        reader.load(update.before)
        loss = recipe.one_number([token_losses(s, reader, recipe, settings) for s in minibatch])
        loss.backward()
        losses.append(loss.item())
        norms.append(check_gradient(update.gradient, reader.gradient()))
    assert row["loss"] == pytest.approx(mean(losses), rel=1e-4, abs=1e-5)
    assert row["grad_norm"] == pytest.approx(mean(norms), rel=1e-4)
    assert max(norms) > 0.0  # else there would be nothing to see


@pytest.fixture
def check(
    record: Callable[..., Recorded], reader: Reader, arithmetic_folder: Path
) -> Callable[..., Recorded]:
    """`check(method, recipe=, data=, wrong_sampler=, **overrides)` runs it and checks each step."""
    golds = {
        f"{problem['question']}\n": problem["gold"]
        for problem in read_jsonl(arithmetic_folder / "train.jsonl")
    }

    def call(
        method: str,
        recipe: Recipe | None = None,
        data: Path = arithmetic_folder / "train.jsonl",
        wrong_sampler: bool = False,
        **overrides: Any,
    ) -> Recorded:
        settings = {**GRPO, **overrides}
        if method in ("reinforce", "rloo"):  # which have no ratio
            settings["minibatches"] = 1
        found = record("train_grpo", method, data=data, wrong_sampler=wrong_sampler, **settings)
        assert len(found.steps) == len(found.rows) == 2
        for step, row in zip(found.steps, found.rows, strict=True):
            step_by_hand(step, row, method, recipe or RECIPES[method], settings, reader, golds)
        return found

    return call


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_the_updates_of_each_preset_are_those_of_its_paper(
    check: Callable[..., Recorded], method: str
) -> None:
    # Larger steps would make all completions less likely, and none would pass the upper bound.
    found = check(method, learning_rate=1e-4) if method == "gspo" else check(method)
    if method not in ("reinforce", "rloo", "cispo"):  # some tokens were beyond either bound
        assert all(
            max(row[f"clip_fraction_{side}"] for row in found.rows) > 0 for side in ("low", "high")
        )
    if method == "dapo":
        assert max(len(step.rounds) for step in found.steps) > 1


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient(
    check: Callable[..., Recorded],
) -> None:
    found = check("cispo", replace(RECIPES["cispo"], objective=cispo(0.1)), clip_high=0.1)
    assert all(row["clip_fraction_high"] > 0 for row in found.rows)


def test_dapo_deals_out_the_groups_that_fill_places_to_its_minibatches(
    check: Callable[..., Recorded], arithmetic_folder: Path, tmp_path: Path
) -> None:
    # Two rounds see each of these once at most, so at most four of six places have a spread.
    problems = read_jsonl(arithmetic_folder / "train.jsonl")
    flat = [problem for problem in problems if int(problem["gold"]) % 3 == 0]
    others = [problem for problem in problems if int(problem["gold"]) % 3 != 0]
    write_jsonl(tmp_path / "data.jsonl", flat[:8] + others[:4])
    found = check("dapo", data=tmp_path / "data.jsonl", max_refills=1)
    assert found.rows[0]["fraction_equal_reward_groups"] >= 2 / 6


def test_kl_in_the_loss_is_to_the_starting_model(check: Callable[..., Recorded]) -> None:
    found = check("grpo", kl_coefficient=0.5, kl_placement="loss", kl_estimator="k3")
    assert found.rows[1]["kl"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "reinforce_pp"])
def test_kl_in_the_reward_takes_reward_from_what_the_starting_model_would_not_say(
    check: Callable[..., Recorded], method: str
) -> None:
    found = check(method, kl_coefficient=0.5, kl_placement="reward", kl_estimator="k1")
    assert abs(found.rows[1]["kl"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "correction"),
    [
        ("grpo", {"importance_correction": "token", "importance_mode": "truncate"}),
        ("dr_grpo", {"importance_correction": "sequence", "importance_mode": "mask"}),
    ],
)
def test_a_sampler_with_other_log_probs_is_corrected_for(
    check: Callable[..., Recorded], method: str, correction: dict[str, Any]
) -> None:
    found = check(method, wrong_sampler=True, **UNCHECKED, **correction, importance_bound=1.15)
    for row in found.rows:
        assert 0.0 < row["importance_bounded_fraction"] < 1.0


def test_old_log_probs_are_the_trainers_and_not_those_of_a_sampler_that_differs(
    check: Callable[..., Recorded],
) -> None:
    check("grpo", wrong_sampler=True, **UNCHECKED)


@pytest.mark.parametrize(("wrong_from", "stops_at"), [(1, 1), (2, 2), (3, 4)])
def test_a_sampler_with_other_log_probs_stops_the_run_at_the_next_step_that_looks(
    record: Callable[..., Recorded], tmp_path: Path, wrong_from: int, stops_at: int
) -> None:
    settings = {**GRPO, "num_steps": 5, "check_sampler_every_steps": 4}
    with pytest.raises(TrainingError, match="samples from weights other than those in training"):
        record("train_grpo", "grpo", wrong_sampler=True, wrong_from=wrong_from, **settings)
    logged = tmp_path / "seed0" / "state" / "metrics.jsonl"
    rows = read_jsonl(logged) if logged.exists() else []
    assert [row["step"] for row in rows] == list(range(1, stops_at))


def test_a_sampler_may_differ_by_as_much_as_max_sampler_gap_says(
    record: Callable[..., Recorded],
) -> None:
    found = record("train_grpo", "grpo", wrong_sampler=True, **GRPO, max_sampler_gap=0.2)
    assert [row["step"] for row in found.rows] == [1, 2]
    assert all(row["sampler_gap_mean"] > 0.05 for row in found.rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo"])
def test_masked_completions_count_neither_in_the_loss_nor_in_what_it_is_divided_by(
    check: Callable[..., Recorded], method: str
) -> None:
    found = check(method, mask_truncated=True)
    assert all(0.0 < row["truncated_fraction"] < 1.0 for row in found.rows)


def test_a_wrong_sampler_is_found_where_the_longest_completions_are_masked(
    record: Callable[..., Recorded],
) -> None:
    with pytest.raises(TrainingError, match="the sampler's log-probs differ from the trainer's"):
        record(
            "train_grpo", "grpo", wrong_sampler=True, mask_truncated=True, num_steps=1,
            prompts_per_step=16, group_size=4, max_new_tokens=24, tokens_per_microbatch=128,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"epochs_per_batch": 2}, {"temperature": 0.7, "share_prompts": False},
     {"entropy_coefficient": 0.1}],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_epochs_temperature_and_entropy_bonus_mean_what_they_say(
    check: Callable[..., Recorded], changes: dict[str, Any]
) -> None:
    check("grpo", **changes)


# --------------------------------------------------------------------------- the loop of the docs


def test_the_loop_of_the_usage_page_has_the_trainers_gradient(
    record: Callable[..., Recorded],
    library_loop: dict[str, Any],
) -> None:
    settings = library_loop["settings"].model_copy(update={"num_steps": 1, "max_grad_norm": 1e9})
    own = settings.model_dump(mode="json", by_alias=True, exclude={"kind", "parent"})
    (step,) = record("train_grpo", "grpo", **own).steps
    (samples,), (update,) = step.rounds, step.updates

    model, tokenizer = library_loop["model"], library_loop["tokenizer"]
    model.load_state_dict(update.before, strict=False)
    library_loop["settings"] = settings
    by_question = {f"{problem.question}\n": problem for problem in library_loop["train"]}
    prompts = [request.prompt_ids for request, _ in samples]
    problems = [by_question[tokenizer.decode(ids)] for ids in prompts]
    library_loop["update"](problems, prompts, [completions for _, completions in samples])
    found = {name: p.grad for name, p in model.named_parameters()}
    assert check_gradient(found, update.gradient) > 0.0


def test_old_log_probs_and_a_mask_of_truncation_are_had_as_the_usage_page_says(
    library_loop: dict[str, Any], examples: Callable[[str], list[str]]
) -> None:
    _, *snippets = examples("docs/usage.md")
    problems = library_loop["train"][:8]
    # Of some the end is cut off.
    library_loop["settings"] = library_loop["settings"].model_copy(update={"max_new_tokens": 24})
    prompts, groups = library_loop["sample"](problems, 2)
    rows = [
        (p, ids, c) for p, ids, some in zip(problems, prompts, groups, strict=True) for c in some
    ]
    batch = collate([ids for _, ids, _ in rows], [c.token_ids for _, _, c in rows], EOS)
    whole, model = batch["response_mask"], library_loop["model"]
    expected = score_responses(model, **batch)["log_probs"]
    names: dict[str, Any] = {"torch": torch, "core": gsm8k_core, "batch": batch, "rows": rows}
    names["model"] = model
    for snippet in snippets:
        exec(snippet, names)
    assert torch.allclose(names["old"], expected, atol=1e-4)
    ended = torch.tensor([c.finish_reason == "stop" for _, _, c in rows])
    assert 0 < ended.sum() < len(rows)
    assert torch.equal(names["mask"], whole * ended[:, None])
    assert batch["response_mask"] is names["mask"]


# ----------------------------------------------------------------------------------- random streams


def seeds_of(found: Recorded) -> list[int]:
    rounds = [samples for step in found.steps for samples in step.rounds]
    return [seed for samples in rounds for request, _ in samples for seed in request.seeds]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "dapo"])
def test_each_completion_of_a_run_has_a_random_stream_of_its_own(
    record: Callable[..., Recorded], method: str
) -> None:
    seeds = [
        *seeds_of(record("train_grpo", method, **GRPO)),
        *seeds_of(record("train_grpo", method, **GRPO, seed=1)),
    ]
    assert len(seeds) >= 2 * 2 * PROMPTS * GROUP_SIZE
    assert len(set(seeds)) == len(seeds)


def test_steps_and_places_in_them_that_have_the_same_prompt_sample_other_completions(
    record: Callable[..., Recorded], arithmetic_folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "one.jsonl", read_jsonl(arithmetic_folder / "train.jsonl")[:1])
    settings = {**GRPO, "learning_rate": 1e-12, "reward": {"answer": 1.0}}
    found = record("train_grpo", "grpo", data=tmp_path / "one.jsonl", **settings)
    groups = [
        tuple(tuple(completion.token_ids) for completion in completions)
        for step in found.steps
        for samples in step.rounds
        for _, completions in samples
    ]
    assert len(groups) == 2 * PROMPTS
    assert len(set(groups)) == len(groups)


# ----------------------------------------------------------------------------------------- SFT, DPO


@pytest.fixture
def texts(reader: Reader, arithmetic_folder: Path) -> list[tuple[str, list[int], list[int]]]:
    """Eight of (question, ids of the prompt, ids of its solution)."""
    tokenize = reader.tokenizer
    found = []
    for row in read_jsonl(arithmetic_folder / "train.jsonl")[:8]:
        solution = re.sub("<<.*?>>", "", row["demonstration"])
        prompt_ids, ids = tokenize([f"{row['question']}\n", solution])["input_ids"]
        found.append((row["question"], prompt_ids, [*ids, EOS]))
    return found


@pytest.mark.parametrize(("beta", "nll_coefficient"), [(0.1, 0.0), (2.0, 0.0), (0.1, 1.5)])
def test_the_updates_of_dpo_and_rpo_are_those_of_their_papers(
    record: Callable[..., Recorded],
    reader: Reader,
    texts: list[tuple[str, list[int], list[int]]],
    tmp_path: Path,
    beta: float,
    nll_coefficient: float,
) -> None:
    # Preferred is a problem's own solution to that of another one, which is of another length.
    pairs = [
        (question, prompt, chosen, other[2])
        for (question, prompt, chosen), other in zip(texts, texts[1:] + texts[:1], strict=True)
    ]
    data = tmp_path / "pairs.jsonl"
    names = ("question", "chosen_ids", "rejected_ids")
    write_jsonl(data, [dict(zip(names, (q, c, r), strict=True)) for q, _, c, r in pairs])
    # A step has all pairs, so their order does not matter.
    own = {"batch_size": len(pairs), "beta": beta, "nll_coefficient": nll_coefficient}
    found = record("train_dpo", "dpo", data=data, **COMMON, **own)

    with torch.no_grad():  # the reference is the starting model
        reader.load(reader.starting_weights)
        ref_chosen = [total(reader.log_probs(p, c)).item() for _, p, c, _ in pairs]
        ref_rejected = [total(reader.log_probs(p, r)).item() for _, p, _, r in pairs]
    (step,) = found.steps
    assert len(step.updates) == len(found.rows) == 2
    for update, row in zip(step.updates, found.rows, strict=True):
        reader.load(update.before)
        rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
        losses, cross_entropies = [], []
        for (_, prompt, chosen, rejected), of_chosen, of_rejected in zip(
            pairs, ref_chosen, ref_rejected, strict=True
        ):
            # Rafailov et al. 2023, eq. 7: -log σ(β·log π/π_ref(y_w) - β·log π/π_ref(y_l))
            reward_chosen = beta * (total(reader.log_probs(prompt, chosen)) - of_chosen)
            reward_rejected = beta * (total(reader.log_probs(prompt, rejected)) - of_rejected)
            losses.append(-torch.log(1 / (1 + torch.exp(reward_rejected - reward_chosen))))
            # Pang et al. 2024, eq. 1: -α·log π(y_w) / |y_w|
            cross_entropies.append(-total(reader.log_probs(prompt, chosen)) / len(chosen))
            losses[-1] = losses[-1] + nll_coefficient * cross_entropies[-1]
            rewards["chosen"].append(reward_chosen.item())
            rewards["rejected"].append(reward_rejected.item())
        loss = total(losses) / len(losses)
        loss.backward()
        norm = check_gradient(update.gradient, reader.gradient())
        is_right = [c > r for c, r in zip(*rewards.values(), strict=True)]
        expected = {
            "loss": loss.item(),
            "grad_norm": norm,
            "chosen_reward": mean(rewards["chosen"]),
            "rejected_reward": mean(rewards["rejected"]),
            "margin": mean(rewards["chosen"]) - mean(rewards["rejected"]),
            "chosen_nll": mean([value.item() for value in cross_entropies]),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert row["accuracy"] == mean([float(right) for right in is_right])
    assert abs(row["loss"] - math.log(2)) > 0.05  # the second step's, which β has a part in


@pytest.mark.parametrize("kind", ["sft", "sft, packed", "rft"])
def test_the_loss_of_sft_is_the_mean_over_all_response_tokens_of_a_step(
    record: Callable[..., Recorded],
    reader: Reader,
    texts: list[tuple[str, list[int], list[int]]],
    arithmetic_folder: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    data = tmp_path / "demonstrations.jsonl"
    rows = read_jsonl(arithmetic_folder / "train.jsonl")[: len(texts)]
    if kind == "rft":  # from what was sampled, as it is
        texts = [(question, prompt, [*ids[:-1], 19, 19, EOS]) for question, prompt, ids in texts]
        rows = [{"question": question, "response_ids": ids} for question, _, ids in texts]
    write_jsonl(data, rows)
    method, _, packed = kind.partition(", ")
    found = record(
        "train_sft", method, data=data, **COMMON, batch_size=len(texts), packing=bool(packed),
        max_length=128,
    )  # fmt: skip
    (step,) = found.steps
    assert len(step.updates) == len(found.rows) == 2
    for update, row in zip(step.updates, found.rows, strict=True):
        reader.load(update.before)
        # Of the response's tokens alone, EOS among them, each counted the same.
        nlls = [-x for _, prompt, ids in texts for x in reader.log_probs(prompt, ids)]
        loss = total(nlls) / len(nlls)
        loss.backward()
        assert row["num_response_tokens"] == len(nlls)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = check_gradient(update.gradient, reader.gradient())
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
