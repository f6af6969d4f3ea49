"""Look at what a model writes: completions with their rewards, lengths and entropies.

Shapes: `B` prompts, `T` generated positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gsm8k_core.advantages import RewardFunction, check_reward, named_in_errors
from gsm8k_core.engines.base import Request, check_requests
from gsm8k_core.models import in_eval_mode, max_positions, num_embeddings, stop_token_ids
from gsm8k_core.scoring import compute_entropy
from gsm8k_core.tokenization import TokenIds, collate_prompts, pad_token_id

Row = dict[str, Any]

# Of a generation config: what bounds and ends completions, which is given by other names.
NOT_OF_SAMPLING = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "transformers_version"
}  # fmt: skip


def log_generations(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str],
    ground_truths: Iterable[str] | None = None,
    reward_fn: RewardFunction | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    prompt_ids: Sequence[TokenIds] | None = None,
    on_all_ranks: bool = False,
) -> tuple[list[Row], dict[str, float | None]]:
    """Generate one completion per prompt; return a row for each and a summary.

    A row holds `prompt`, `ground_truth`, `response` (text without special tokens), `response_ids`
    (up to and including the first EOS), `length` (their number), `truncated` (no EOS was written),
    `mean_entropy` (nats per token of the distribution sampled from) and, with `reward_fn`, what it
    returns for (response, ground_truth). The summary holds `num_completions`, `length_mean`,
    `truncated_mean`, `entropy_mean` (over completions) and, with `reward_fn`, the mean of each of
    its entries and `length_mean_correct` and `length_mean_incorrect` (correct: an `answer_reward`
    above 0); a mean over nothing is None.

    Prompts are rendered already: no special token is added, unless `prompt_ids` has other ids for
    them. A `temperature` of 0 is greedy. Top-p, top-k and a repetition penalty that the model's
    generation config holds (Qwen2.5's does) are not used. `on_all_ranks`: all ranks call this with
    the same prompts, as a model that is spread over them needs; none is done before the others.
    The model is put in eval mode meanwhile. Samples come from torch's global generator: seed it for
    the same ones again. Raises ValueError if there are no prompts, or one text
    instead of a list, or a reward function comes without one ground truth per prompt or returns an
    entry that the row has already, or ids are not of as many prompts; and ValueError and ModelError
    as an engine does for its requests.
    """
    if isinstance(prompts, str) or isinstance(ground_truths, str):
        raise ValueError("prompts and ground truths are lists of texts, found one text")
    prompts = list(prompts)
    ground_truths = None if ground_truths is None else list(ground_truths)
    if not prompts:
        raise ValueError("no prompts to generate from")
    if ground_truths is not None and len(ground_truths) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(ground_truths)} ground truths")
    if reward_fn is not None and ground_truths is None:
        raise ValueError("reward_fn needs ground_truths")
    if prompt_ids is None:
        prompt_ids = [
            tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts
        ]
    elif len(prompt_ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but token ids of {len(prompt_ids)}")
    check_requests(
        [Request(list(ids), [], temperature, max_new_tokens) for ids in prompt_ids],
        max_positions(model),
        num_embeddings(model),
    )
    eos_ids = set(stop_token_ids(model, tokenizer))
    responses, entropies = _generate(
        model, tokenizer, prompt_ids, eos_ids, max_new_tokens, temperature, on_all_ranks
    )
    rows: list[Row] = []
    rewards: dict[str, float] = {}
    for index, prompt in enumerate(prompts):
        response_ids, truncated = _until_eos(responses[index].tolist(), eos_ids)
        row: Row = {
            "prompt": prompt,
            "ground_truth": None if ground_truths is None else ground_truths[index],
            "response": tokenizer.decode(response_ids, skip_special_tokens=True),
            "response_ids": response_ids,
            "length": len(response_ids),
            "truncated": truncated,
            "mean_entropy": entropies[index, : len(response_ids)].mean().item(),
        }
        if reward_fn is not None and ground_truths is not None:
            with named_in_errors(f"completion {index}"):
                given = reward_fn(row["response"], ground_truths[index])
                check_reward(given, row["response"], rewards or given)
            rewards = given
            if taken := sorted(rewards.keys() & row.keys()):
                raise ValueError(f"reward_fn returns {', '.join(taken)}, which a row has already")
            row |= rewards
        rows.append(row)
    return rows, _summarize(rows, rewards)


class _Entropies(LogitsProcessor):
    """Keeps the entropy of every step's distribution, (B,), and changes nothing.

    The distributions themselves would be T × B × vocabulary numbers.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature or 1.0  # greedy decoding knows none
        self.of_steps: list[torch.Tensor] = []

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.of_steps.append(compute_entropy(scores / self.temperature))
        return scores


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[TokenIds],
    eos_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    on_all_ranks: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated ids (B, T) and the entropy of every step's distribution (B, T)."""
    pad_id = pad_token_id(tokenizer, num_embeddings(model))
    input_ids, attention_mask = collate_prompts(prompt_ids, pad_id, model.device)
    # Whatever else the model's own generation_config asks for (min_p, beams, a time limit) is put
    # back to what it would be without one.
    neutral = GenerationConfig._get_default_generation_params()
    sampling: Row = {
        name: neutral.get(name)
        for name in model.generation_config.to_diff_dict()
        if not name.startswith("_") and name not in NOT_OF_SAMPLING
    }
    sampling |= {"do_sample": False, "repetition_penalty": 1.0}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    if on_all_ranks:
        sampling["synced_gpus"] = True
    entropies = _Entropies(temperature)
    with in_eval_mode(model):
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sorted(eos_ids),
            logits_processor=LogitsProcessorList([entropies]),
            **sampling,
        )
    return sequences[:, input_ids.shape[1] :], torch.stack(entropies.of_steps, dim=1)


def _until_eos(token_ids: list[int], eos_ids: set[int]) -> tuple[list[int], bool]:
    """The ids up to and including the first EOS, and whether there is none (truncated).

    What follows an EOS is padding. The pad id is not asked: it may be the EOS id.
    """
    for position, token_id in enumerate(token_ids):
        if token_id in eos_ids:
            return token_ids[: position + 1], False
    return token_ids, True


def _summarize(rows: list[Row], reward_names: Iterable[str]) -> dict[str, float | None]:
    summary: dict[str, float | None] = {
        "num_completions": len(rows),
        "length_mean": _mean([row["length"] for row in rows]),
        "truncated_mean": _mean([row["truncated"] for row in rows]),
        "entropy_mean": _mean([row["mean_entropy"] for row in rows]),
    }
    for key in reward_names:
        summary[f"{key}_mean"] = _mean([row[key] for row in rows])
    if "answer_reward" in rows[0]:
        correct = [row["length"] for row in rows if row["answer_reward"] > 0]
        incorrect = [row["length"] for row in rows if not row["answer_reward"] > 0]
        summary["length_mean_correct"] = _mean(correct)
        summary["length_mean_incorrect"] = _mean(incorrect)
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
