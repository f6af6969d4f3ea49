"""Group-relative policy optimization and its family, on GSM8K-like problems.

Each step: sample a group of completions for some prompts, reward them, turn rewards into
advantages, and take one or several clipped policy-gradient steps. The settings choose advantage,
objective, aggregation and corrections (docs/methods.md maps papers to them).

Departures from DeepSeekMath (Shao et al. 2024): no KL term by default, rewards from the exact
answer alone, several updates per batch of rollouts where `minibatches` is above 1, and groups with
equal rewards have advantage exactly 0.

    python scripts/train_grpo.py --model-name tiny-qwen2 --method grpo --seed 0 \\
        --starting-model /tmp/sft/model --data artifacts/arithmetic/train.jsonl \\
        --output-dir /tmp/grpo

Started again after a kill, it resumes from its last checkpoint. On several GPUs:
`torchrun --standalone --nproc-per-node 4 scripts/train_grpo.py …`
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from gsm8k_core import distributed, ranks
from gsm8k_core.advantages import compute_advantages
from gsm8k_core.cli import leave, run_script, run_settings_from, training_parser
from gsm8k_core.config import GrpoMethod, RunSettings
from gsm8k_core.distributed import own_microbatches, own_work
from gsm8k_core.engines.base import Completion, Engine, Request
from gsm8k_core.errors import DataError, TrainingError
from gsm8k_core.files import Json, seed_from
from gsm8k_core.grpo import (
    Metrics,
    PolicyBatch,
    add_metrics,
    has_gradient,
    policy_loss,
    sampler_gap,
    summarize_metrics,
)
from gsm8k_core.losses import kl_estimate, mask_truncated, step_normalizer
from gsm8k_core.masking import masked_sum
from gsm8k_core.models import compute_dtype, num_embeddings
from gsm8k_core.problems import Problem, read_problems
from gsm8k_core.prompts import encode_prompts
from gsm8k_core.rewards import RewardFn, build_reward_fn, length_reward
from gsm8k_core.scoring import score_responses
from gsm8k_core.shared_prompts import pack_group, share_prompts, shared_width, use_in
from gsm8k_core.tokenization import collate, pad_token_id, split_by_token_budget
from gsm8k_core.training import TrainingRun, disable_dropout, endless_order, take

log = logging.getLogger("train_grpo")

# Mean |log-prob difference| a token between engine and trainer that numerics can explain.
MAX_SAMPLER_GAP = {"float32": 1e-3, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, and what the reward function said of each."""

    prompt_ids: list[int]
    completions: list[Completion]
    rewards: list[dict[str, float]]
    has_spread: bool
    """Whether rewards differ, the overlong penalty left aside."""
    gold: str
    sampled_by: int
    """The rank whose engine it was."""


@dataclass(frozen=True)
class Rollouts:
    """A step's completions as tensors; N = prompts × group size, completion i of prompt i // G."""

    input_ids: torch.Tensor
    """(N, T)"""
    labels: torch.Tensor
    """(N, T)"""
    response_mask: torch.Tensor
    """(N, T), without truncated completions where the method masks them"""
    lengths: list[int]
    """(N,) positions that are not padding"""
    prompt_lengths: list[int]
    """(N,)"""
    packs: list[list[int]]
    """Rows that go together, which have the same prompt; every row is in one"""
    shares_prompts: bool
    """Whether those of a pack share it in a forward; if not, each is alone in its pack"""
    sampler_log_probs: torch.Tensor
    """(N, T)"""
    rewards: torch.Tensor
    """(N,)"""
    own_rows: list[int]
    """Those that this rank's engine sampled."""
    old_log_probs: torch.Tensor | None = None
    """(N, T), zeros for the first minibatch, whose update is on policy; None where that is all, and
    where the sampler's are the trainer's"""
    ref_log_probs: torch.Tensor | None = None


def sample_groups(
    problems: list[Problem],
    first_draw: int,
    engine: Engine,
    reward_fn: RewardFn,
    run_settings: RunSettings,
    tokenizer: Any,
    step: int,
) -> list[Group]:
    """One group a problem. Seeds come from (run seed, step, place in the step, sample).

    Each rank samples its share of them; all get all.
    """
    settings = run_settings.of_kind(GrpoMethod)
    questions = [problem.question for problem in problems]
    requests = [
        Request(
            prompt_ids,
            [
                seed_from(run_settings.seed, "rollout", step, draw, k)
                for k in range(settings.group_size)
            ],
            settings.temperature,
            settings.max_new_tokens,
        )
        for draw, prompt_ids in enumerate(
            encode_prompts(questions, run_settings.prompt, tokenizer), start=first_draw
        )
    ]
    own = slice(ranks.rank(), None, ranks.world_size())
    groups = []
    for problem, request, completions in zip(
        problems[own], requests[own], engine.generate(requests[own]), strict=True
    ):
        rewards = [
            reward_fn(
                completion.text,
                problem.gold,
                len(completion.token_ids),
                problem.question,
                completion.finish_reason == "length",
            )
            for completion in completions
        ]
        has_spread = len({reward["reward"] for reward in rewards}) > 1
        if settings.overlong_buffer:
            end = settings.max_new_tokens
            start = end - settings.overlong_buffer
            penalties = [length_reward(len(c.token_ids), start, end) for c in completions]
            rewards = [
                {**reward, "overlong_reward": penalty, "reward": reward["reward"] + penalty}
                for reward, penalty in zip(rewards, penalties, strict=True)
            ]
        groups.append(
            Group(
                request.prompt_ids,
                completions,
                rewards,
                has_spread,
                problem.gold,
                ranks.rank(),
            )
        )
    by_rank = distributed.gather(groups)
    return [by_rank[n % len(by_rank)][n // len(by_rank)] for n in range(len(problems))]


def collect_groups(
    problems: list[Problem],
    order: Iterator[int],
    engine: Engine,
    reward_fn: RewardFn,
    run_settings: RunSettings,
    tokenizer: Any,
    step: int,
) -> tuple[list[Group], list[Group]]:
    """The groups that a step trains on, and all that were sampled for it.

    With dynamic sampling (DAPO §3.2), groups of equal rewards are set aside and others sampled, for
    at most `max_refills` rounds; places still empty then are filled from those set aside, as many
    in each minibatch.
    """
    settings = run_settings.of_kind(GrpoMethod)
    wanted = settings.prompts_per_step
    kept: list[Group] = []
    aside: list[Group] = []
    for _ in range(1 + (settings.max_refills if settings.dynamic_sampling else 0)):
        chosen = take(problems, order, wanted - len(kept))
        num_drawn = len(kept) + len(aside)
        for group in sample_groups(
            chosen, num_drawn, engine, reward_fn, run_settings, tokenizer, step
        ):
            if group.has_spread or not settings.dynamic_sampling:
                kept.append(group)
            else:
                aside.append(group)
        if len(kept) == wanted:
            break
    fillers = aside[: wanted - len(kept)]
    chosen_groups = kept + fillers
    if fillers:  # at the end, they would leave the last minibatch without a gradient
        num = settings.minibatches
        chosen_groups = [group for m in range(num) for group in chosen_groups[m::num]]
    return chosen_groups, kept + aside


def to_tensors(
    groups: list[Group],
    pad_id: int,
    settings: GrpoMethod,
    device: torch.device,
    most_tokens: int | None,
) -> Rollouts:
    """Pad a step's groups into tensors. The sampled ids are used as they are.

    `most_tokens`: the completions of one prompt share it, in rows of at most so many tokens; None:
    one row per completion.
    """
    prompts = [group.prompt_ids for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    batch = collate(prompts, [c.token_ids for c in completions], pad_id)
    sampled = torch.zeros(batch["labels"].shape)
    sampled[batch["response_mask"]] = torch.tensor([x for c in completions for x in c.log_probs])
    mask = batch["response_mask"]
    if settings.mask_truncated:
        truncated = torch.tensor([c.finish_reason == "length" for c in completions])
        mask = mask_truncated(mask, truncated)
    rewards = [reward["reward"] for group in groups for reward in group.rewards]
    packs = [[row] for row in range(len(completions))]
    if most_tokens is not None:
        packs = [
            [number * settings.group_size + index for index in pack]
            for number, group in enumerate(groups)
            for pack in pack_group(
                len(group.prompt_ids), [len(c.token_ids) for c in group.completions], most_tokens
            )
        ]
    return Rollouts(
        input_ids=batch["input_ids"].to(device),
        labels=batch["labels"].to(device),
        response_mask=mask.to(device),
        lengths=[len(p) + len(c.token_ids) - 1 for p, c in zip(prompts, completions, strict=True)],
        prompt_lengths=[len(prompt) for prompt in prompts],
        packs=packs,
        shares_prompts=most_tokens is not None,
        sampler_log_probs=sampled.to(device),
        rewards=torch.tensor(rewards, device=device),
        own_rows=[
            row
            for row in range(len(completions))
            if groups[row // settings.group_size].sampled_by == ranks.rank()
        ],
    )


def score_rows(
    run: TrainingRun, model: torch.nn.Module, rollouts: Rollouts, rows: list[int], **options: Any
) -> dict[str, torch.Tensor]:
    """Scores of some rows, cut to their own width: each (len(rows), width).

    Of no rows, (0, width), from a forward that other ranks wait for; its gradient is 0.
    """
    if not rows:
        shortest = [rollouts.lengths.index(min(rollouts.lengths))]
        scores = score_rows(run, model, rollouts, shortest, **options)
        return {name: values[:0] for name, values in scores.items()}
    width = max(rollouts.lengths[row] for row in rows)
    inputs = (rollouts.input_ids, rollouts.labels, rollouts.response_mask)
    return _score(run, model, *(tensor[rows, :width] for tensor in inputs), **options)


def _score(
    run: TrainingRun, model: torch.nn.Module, *inputs: torch.Tensor, **options: Any
) -> dict[str, torch.Tensor]:
    """`score_responses` of ids, labels and mask, as the run samples and computes."""
    settings = run.run_settings.of_kind(GrpoMethod)
    with run.autocast():
        return score_responses(model, *inputs, temperature=settings.temperature, **options)


def score_packs(
    run: TrainingRun,
    model: torch.nn.Module,
    rollouts: Rollouts,
    packs: list[list[int]],
    **options: Any,
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The rows of some packs, and their scores as `score_rows` gives them."""
    rows = [row for pack in packs for row in pack]
    if not rows or not rollouts.shares_prompts:
        return rows, score_rows(run, model, rollouts, rows, **options)
    shared = share_prompts(
        packs, rollouts.prompt_lengths, rollouts.lengths, rollouts.input_ids.device
    )
    source = (shared.source_rows, shared.source_columns)
    mask = rollouts.response_mask[source] & shared.own
    inputs = (rollouts.input_ids[source], rollouts.labels[source], mask)
    scores = _score(run, model, *inputs, shared_row=shared, **options)
    # Both masks choose the same tokens in the same order.
    wanted = rollouts.response_mask[rows, : max(rollouts.lengths[row] for row in rows)]
    nothing = torch.zeros(wanted.shape, device=wanted.device)
    return rows, {
        name: nothing.masked_scatter(wanted, values[mask]) for name, values in scores.items()
    }


def own_packs(
    run: TrainingRun, rollouts: Rollouts, packs: list[list[int]]
) -> list[list[list[int]]]:
    """This rank's microbatches of `packs`, each a list of some.

    With shared prompts no padding counts, but in attention there is some, so those whose
    completions are of similar length go together.
    """
    lengths, prompt_lengths = rollouts.lengths, rollouts.prompt_lengths
    if not rollouts.shares_prompts:
        alone = own_microbatches([lengths[row] for (row,) in packs], run.tokens_per_microbatch)
        return [[packs[place] for place in places] for places in alone]
    widths = [shared_width(pack, prompt_lengths, lengths) for pack in packs]
    longest = [max(lengths[row] - prompt_lengths[row] for row in pack) for pack in packs]

    def cut(share: list[int]) -> list[list[list[int]]]:
        microbatches: list[list[list[int]]] = []
        width = 0
        for place in sorted(share, key=lambda place: (-longest[place], place)):
            width += widths[place]
            if not microbatches or width > run.tokens_per_microbatch:
                microbatches.append([])
                width = widths[place]
            microbatches[-1].append(packs[place])
        return microbatches

    return own_work(widths, cut)


def update_microbatches(
    run: TrainingRun, rollouts: Rollouts, rows: range, learnt: list[bool]
) -> list[tuple[list[list[int]], bool]]:
    """This rank's microbatches of `rows`, and whether they need a backward pass, by `learnt` (N,).

    One at least does: the optimizer goes on with its momentum even where nothing is learnt.
    """
    packs = [pack for pack in rollouts.packs if pack[0] in rows]
    learning = [pack for pack in packs if any(learnt[row] for row in pack)] or packs[:1]
    first_rows = {pack[0] for pack in learning}
    rest = [pack for pack in packs if pack[0] not in first_rows]
    return [
        *((microbatch, True) for microbatch in own_packs(run, rollouts, learning)),
        *((microbatch, False) for microbatch in own_packs(run, rollouts, rest)),
    ]


@torch.no_grad()
def score_all(
    run: TrainingRun, model: torch.nn.Module, rollouts: Rollouts, first_row: int = 0
) -> torch.Tensor:
    """Log-probs (N, T) of the completions from `first_row` on under `model`, without gradients."""
    log_probs = torch.zeros_like(rollouts.sampler_log_probs)
    wanted = [pack for pack in rollouts.packs if pack[0] >= first_row]
    for packs in own_packs(run, rollouts, wanted):
        rows, scores = score_packs(run, model, rollouts, packs)
        log_probs[rows, : scores["log_probs"].shape[1]] = scores["log_probs"]
    return distributed.add_tensor(log_probs)


@torch.no_grad()
def check_sampler(run: TrainingRun, rollouts: Rollouts) -> None:
    """Raise TrainingError where the sampler's log-probs are not the trainer's, before an update.

    One microbatch tells: weights that did not reach the engine are wrong for every completion. Each
    rank looks at its own engine, and all stop if one must.
    """
    settings = run.run_settings.of_kind(GrpoMethod)
    bound = (
        settings.max_sampler_gap
        or MAX_SAMPLER_GAP[compute_dtype(run.device, run.run_settings.model_settings.dtype)]
    )
    # Those that are masked for being truncated are the longest, and would come first.
    own = [row for row in rollouts.own_rows if bool(rollouts.response_mask[row].any())]
    groups = split_by_token_budget(
        [rollouts.lengths[row] for row in own], run.tokens_per_microbatch
    )
    rows = [own[place] for place in groups[0]] if groups else []
    log_probs = score_rows(run, run.model, rollouts, rows)["log_probs"]
    width = log_probs.shape[1]
    mask = rollouts.response_mask[rows, :width]
    gap = None
    if bool(mask.any()):
        gap = sampler_gap(log_probs, rollouts.sampler_log_probs[rows, :width], mask)
    for found in distributed.gather(gap):
        if found is None or found["sampler_gap_mean"] <= bound:
            continue
        raise TrainingError(
            f"the sampler's log-probs differ from the trainer's by {found['sampler_gap_mean']:.2g} "
            f"nats on average (at most {found['sampler_gap_max']:.2g}), the bound is {bound:g}: "
            "the engine samples from weights other than those in training. If its numerics explain "
            "it (dtype, kv_cache_dtype), raise max_sampler_gap; engine: transformers has no gap"
        )


def update_policy(
    run: TrainingRun, rollouts: Rollouts, advantages: torch.Tensor, step: int
) -> Metrics:
    """All optimizer steps on one batch of rollouts, those of `step`; returns their metrics.

    The trainer's log-probs before the first update are compared with the sampler's. Completions
    without a gradient, most of them where a model solves few problems or nearly all, count in the
    metrics, but go through no backward pass.
    """
    settings = run.run_settings.of_kind(GrpoMethod)
    num_rows = len(advantages)
    minibatch_size = num_rows // settings.minibatches
    parts: list[Metrics] = []
    updates: list[dict[str, float]] = []
    old_log_probs = rollouts.old_log_probs
    scored_by_trainer = slice(None)  # the rows whose log-probs the trainer itself has computed
    if old_log_probs is None:
        old_log_probs = rollouts.sampler_log_probs.clone()
        scored_by_trainer = slice(minibatch_size)
    old_log_probs[:minibatch_size] = 0.0
    # Ranks that disagreed by a rounding would wait for each other forever.
    with_gradient = distributed.broadcast(has_gradient(advantages, settings).tolist())
    starts = range(0, num_rows, minibatch_size)
    numbers = itertools.count((step - 1) * settings.epochs_per_batch * len(starts))
    for epoch in range(settings.epochs_per_batch):
        for start, number in zip(starts, numbers, strict=False):
            on_policy = epoch == 0 and start == 0  # no update yet: the old log-probs are its own
            minibatch = range(start, start + minibatch_size)
            normalizer = step_normalizer(
                settings.aggregation,
                rollouts.response_mask[start : minibatch.stop],
                settings.max_new_tokens,
            )
            if normalizer == 0:
                log.warning("every completion of a minibatch is truncated and masked: no update")
                continue
            for packs, backward in update_microbatches(run, rollouts, minibatch, with_gradient):
                with torch.set_grad_enabled(backward):
                    rows, scores = score_packs(
                        run,
                        run.model,
                        rollouts,
                        packs,
                        with_entropy=True,
                        entropy_gradient=settings.entropy_coefficient > 0,
                    )
                log_probs = scores["log_probs"]
                width = log_probs.shape[1]
                if on_policy:
                    old_log_probs[rows, :width] = log_probs.detach()
                loss, metrics = policy_loss(
                    log_probs,
                    scores["token_entropy"],
                    _cut(rollouts, rows, width, advantages, None if on_policy else old_log_probs),
                    settings,
                    normalizer,
                )
                if backward:
                    loss.backward()
                parts.append(metrics)
            updates.append(run.update(number))
            if on_policy:
                distributed.add_tensor(old_log_probs[:minibatch_size])
    by_rank = distributed.gather(add_metrics(parts))
    summary = summarize_metrics(add_metrics(by_rank))
    if updates:
        summary["loss"] /= len(updates)
        # Of the loss: masked completions and prompts are not in it, and each pass counts anew.
        for name in ("num_tokens", "num_completions"):
            summary[name.replace("num_", "num_loss_")] = summary.pop(name)
        norms = [update["grad_norm"] for update in updates]
        summary["grad_norm"] = sum(norms) / len(norms)
        summary["grad_norm_max"] = max(norms)
        summary["num_updates_without_gradient"] = norms.count(0.0)
        summary["learning_rate"] = updates[-1]["learning_rate"]
        tensors = (old_log_probs, rollouts.sampler_log_probs, rollouts.response_mask)
        trainers, samplers, mask = (tensor[scored_by_trainer] for tensor in tensors)
        if bool(mask.any()):  # not where all of the first minibatch is truncated and masked
            summary |= sampler_gap(trainers, samplers, mask)
    return summary


def _cut(
    rollouts: Rollouts,
    rows: list[int],
    width: int,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None,
) -> PolicyBatch:
    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows, :width]

    return PolicyBatch(
        advantages=advantages[rows],
        response_mask=rollouts.response_mask[rows, :width],
        old_log_probs=part(old_log_probs),
        sampler_log_probs=part(rollouts.sampler_log_probs),
        ref_log_probs=part(rollouts.ref_log_probs),
    )


def rewards_differ(group: Group, settings: GrpoMethod) -> bool:
    """Whether completions are better or worse than others of the group, so that they teach.

    Dynamic sampling takes advantages from groups that differ by the overlong penalty alone.
    """
    spread = len({reward["reward"] for reward in group.rewards}) > 1
    return spread and (group.has_spread or not settings.dynamic_sampling)


def rollout_metrics(groups: list[Group], sampled: list[Group], settings: GrpoMethod) -> Metrics:
    """What a step's completions look like: rewards by component, lengths, truncation.

    Over all that were sampled, so that methods which choose among their groups compare with those
    that do not; `fraction_equal_reward_groups` is of the groups trained on. A mean over none is
    NaN.
    """
    completions = [completion for group in sampled for completion in group.completions]
    rewards = [reward for group in sampled for reward in group.rewards]
    lengths = torch.tensor([float(len(c.token_ids)) for c in completions])
    ended = torch.tensor([c.finish_reason == "stop" for c in completions])
    correct = torch.tensor([reward["answer_reward"] == 1.0 for reward in rewards])
    of_groups = correct.reshape(len(sampled), -1)
    values = torch.tensor([reward["reward"] for reward in rewards])
    num_equal = sum(not rewards_differ(group, settings) for group in groups)
    metrics = {
        "reward_std": float(values.std(correction=0)),
        "fraction_equal_reward_groups": num_equal / len(groups),
        "fraction_all_correct_groups": float(of_groups.all(dim=-1).float().mean()),
        "fraction_all_incorrect_groups": float((~of_groups).all(dim=-1).float().mean()),
        "num_prompts_sampled": len(sampled),
        "num_sampled_tokens": sum(len(completion.token_ids) for completion in completions),
        "completion_length_mean": float(lengths.mean()),
        "completion_length_min": float(lengths.min()),
        "completion_length_max": float(lengths.max()),
        "completion_length_mean_terminated": float(lengths[ended].mean()),
        "completion_length_mean_correct": float(lengths[correct].mean()),
        "completion_length_mean_incorrect": float(lengths[~correct].mean()),
        "truncated_fraction": float((~ended).float().mean()),
    }
    for name in rewards[0]:
        metrics[f"{name}_mean"] = sum(reward[name] for reward in rewards) / len(rewards)
    return metrics


def completion_rows(groups: list[Group], tokenizer: Any) -> list[Json]:
    """What was sampled, to be looked at: the first completion of every group, then the second, …"""
    prompts = [tokenizer.decode(group.prompt_ids) for group in groups]
    return [
        {
            "prompt": prompt,
            "completion": completion.text,
            "gold": group.gold,
            "reward": reward["reward"],
            "num_tokens": len(completion.token_ids),
            "truncated": completion.finish_reason == "length",
        }
        for k in range(max(len(group.completions) for group in groups))
        for prompt, group in zip(prompts, groups, strict=True)
        for completion, reward in [(group.completions[k], group.rewards[k])]
    ]


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__).parse_args(argv)

    run_settings = run_settings_from(args)
    settings = run_settings.of_kind(GrpoMethod)
    problems = read_problems(args.data)
    reward_fn = build_reward_fn(settings.reward, run_settings.prompt.answer_marker)
    updates_per_step = settings.epochs_per_batch * settings.minibatches
    run = TrainingRun.from_arguments(args, run_settings, updates_per_step)
    disable_dropout(run.model)
    every_problem = problems
    problems = run.with_room(every_problem, settings.max_new_tokens, "problems")
    if not problems:
        raise DataError(
            f"{args.data}: none of its {len(every_problem)} problems leaves room for "
            f"max_new_tokens {settings.max_new_tokens}; lower it, or take a model with more "
            "positions"
        )
    wanted = settings.share_prompts
    shares_prompts = (run.device.type == "cpu" if wanted is None else wanted) and use_in(run.model)
    reference = None
    if settings.kl_coefficient > 0 or settings.log_kl_every_steps:
        reference = run.load_reference()
        if shares_prompts:
            use_in(reference)
    steps_done, extra = run.resume()
    if reference is not None and extra:
        distributed.load_whole_tensors(reference, extra)

    def refreshed_reference() -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of the reference: nothing, unless it has moved."""
        if reference is None or not settings.reference_refresh_steps:
            return {}
        return dict(reference.named_parameters())

    pad_id = pad_token_id(run.tokenizer, num_embeddings(run.model))
    order = endless_order(len(problems), seed_from(run_settings.seed, "prompts"))
    order = itertools.islice(order, run.progress.setdefault("num_prompts_taken", 0), None)
    run.progress.setdefault("num_sampled_tokens", 0)

    run.model.train()
    if steps_done == 0:
        run.validate_start()
    for step in run.steps_after(steps_done, "GRPO"):
        started = time.perf_counter()
        with run.sampling() as engine:
            groups, sampled = collect_groups(
                problems, order, engine, reward_fn, run_settings, run.tokenizer, step
            )
        run.progress["num_prompts_taken"] += len(sampled)
        rolled_out = time.perf_counter()

        rollouts = to_tensors(
            groups,
            pad_id,
            settings,
            run.device,
            run.tokens_per_microbatch if shares_prompts else None,
        )
        every = settings.check_sampler_every_steps
        # The first step of a call, the first after a push, and every so many.
        if every and (step <= steps_done + 2 or step % every == 0):
            check_sampler(run, rollouts)
        in_reward = settings.kl_coefficient > 0 and settings.kl_placement == "reward"
        # In a reward the KL to an equal reference must be 0, to the last bit.
        if in_reward or (updates_per_step > 1 and not run.samples_with_itself):
            first_row = 0 if in_reward else len(rollouts.lengths) // settings.minibatches
            old = score_all(run, run.model, rollouts, first_row)
            rollouts = replace(rollouts, old_log_probs=old)
        log_kl = settings.log_kl_every_steps
        if settings.kl_coefficient > 0 or (log_kl and (step == 1 or step % log_kl == 0)):
            assert reference is not None
            with run.as_reference(reference):
                rollouts = replace(rollouts, ref_log_probs=score_all(run, reference, rollouts))
        rewards = rollouts.rewards
        if in_reward:
            assert rollouts.old_log_probs is not None and rollouts.ref_log_probs is not None
            kl = kl_estimate(rollouts.old_log_probs, rollouts.ref_log_probs, settings.kl_estimator)
            rewards = rewards - settings.kl_coefficient * masked_sum(
                kl, rollouts.response_mask, dim=-1
            )
        scored = time.perf_counter()

        advantages = compute_advantages(
            rewards, settings.group_size, settings.advantage, settings.advantage_epsilon
        )
        if settings.dynamic_sampling:
            # What fills empty places teaches nothing: its rewards may differ by penalties alone.
            has_spread = torch.tensor([group.has_spread for group in groups], device=run.device)
            advantages = advantages * has_spread.repeat_interleave(settings.group_size)
        updated = update_policy(run, rollouts, advantages, step)
        if reference is not None and settings.reference_refresh_steps:
            if step % settings.reference_refresh_steps == 0:
                reference.load_state_dict(run.model.state_dict())
        ended = time.perf_counter()

        row = rollout_metrics(groups, sampled, settings) | updated
        in_a_pass = sum(rollouts.lengths) + len(rollouts.lengths)
        run.progress["num_tokens"] += in_a_pass * settings.epochs_per_batch
        run.progress["num_sampled_tokens"] += row["num_sampled_tokens"]
        # Of all groups that were sampled, for which the seconds are, not of those trained on alone.
        num_tokens = row["num_sampled_tokens"] + sum(
            len(group.prompt_ids) * len(group.completions) for group in sampled
        )
        run.end_step(
            step,
            {
                **row,
                "seconds_rolling_out": round(rolled_out - started, 4),
                "seconds_scoring": round(scored - rolled_out, 4),
                "seconds_updating": round(ended - scored, 4),
                "tokens_per_second": round(num_tokens / (ended - started), 1),
            },
            extra=refreshed_reference,
            completions=lambda: completion_rows(groups, run.tokenizer),
        )
        if step % 10 == 0 or step == run.num_steps:
            log.info("step %d/%d: reward %.3f", step, run.num_steps, row["reward_mean"])
    run.finish(
        {
            "num_prompts": run.progress["num_prompts_taken"],
            "num_sampled_tokens": run.progress["num_sampled_tokens"],
        }
    )
    return 0


if __name__ == "__main__":
    leave(run_script(main))
