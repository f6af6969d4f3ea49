"""Completions that share their prompt in one row are scored as in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SIZES
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from gsm8k_core.scoring import score_responses
from gsm8k_core.shared_prompts import (
    ForwardCost,
    completions_per_row,
    share_prompts,
    shared_width,
)
from gsm8k_core.tokenization import collate

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6], [6], [7, 8]]
RESPONSES = [[9, 10, 11], [12], [13, 14, 15, 16], [17, 18], [19], [20, 21, 22]]
PACKS = [[0, 1, 2], [3, 4], [5]]


def tiny(config: type, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**{**SIZES, "head_dim": 4, **changes})).eval()


def scores_and_gradients(
    model: Any, inputs: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Of the response tokens in order, and of a loss that weighs each differently."""
    model.zero_grad()
    found = score_responses(model, **inputs, with_entropy=True, entropy_gradient=True)
    of_tokens = [values[inputs["response_mask"]] for values in found.values()]
    weights = torch.linspace(-1.0, 2.0, len(of_tokens[0]))
    (torch.stack(of_tokens) * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return [values.detach() for values in of_tokens], gradients


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_scores_and_gradients_are_those_of_a_row_for_each_completion(config: type) -> None:
    model = tiny(config)
    batch = collate(PROMPTS, RESPONSES, 0)
    batch["response_mask"][1] = False  # left out of the loss: what comes behind it stays right
    lengths = [len(p) + len(r) - 1 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    shared = share_prompts(PACKS, [*map(len, PROMPTS)], lengths, torch.device("cpu"))
    source = (shared.source_rows, shared.source_columns)
    packed = {name: values[source] for name, values in batch.items()}
    packed["response_mask"] &= shared.own
    packed |= {"attention_mask": shared.attention_mask, "position_ids": shared.source_columns}
    assert packed["input_ids"].shape == (3, 4 + 3 + 1 + 4)

    alone, gradients = scores_and_gradients(model, batch)
    together, gradients_together = scores_and_gradients(model, packed)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], gradients_together[name], atol=1e-5, rtol=1e-4, msg=name
        )


def test_the_width_of_a_shared_row_is_the_prompt_once_and_the_completions() -> None:
    assert shared_width([0, 1, 2], 5, [7, 5, 8]) == 4 + 3 + 1 + 4
    assert shared_width([0], 5, [7]) == 7


COST = ForwardCost(per_token=1000.0, per_pair=1.0)


def test_long_prompts_are_shared_and_short_ones_are_not() -> None:
    assert completions_per_row(COST, 100, [10] * 4, 10_000) == 4
    assert completions_per_row(COST, 2, [40] * 4, 10_000) == 1
    # Attention over all completions grows with their square: some of them share.
    assert 1 < completions_per_row(COST, 100, [40] * 64, 10_000) < 16
    # No row is longer than a microbatch may be.
    assert [completions_per_row(COST, 100, [10] * 4, most) for most in (131, 119, 50)] == [3, 1, 1]


def test_nothing_is_shared_where_nothing_is_known_or_there_is_one_completion() -> None:
    assert completions_per_row(None, 1000, [1] * 8, 10_000) == 1
    assert completions_per_row(COST, 1000, [1], 10_000) == 1


@given(st.integers(1, 2000), st.lists(st.integers(1, 500), min_size=1, max_size=32))
def test_sharing_is_never_estimated_to_cost_more(prompt: int, completions: list[int]) -> None:
    number = completions_per_row(COST, prompt, completions, 10_000)
    mean = sum(completions) / len(completions)
    assert 1 <= number <= len(completions)
    row = COST.of_row(round(prompt + number * mean), causal=number == 1)
    assert row / number <= COST.of_row(round(prompt + mean), causal=True)


def test_the_cost_of_a_token_is_of_the_layers_and_not_of_embedding_and_head() -> None:
    small, wide = (ForwardCost.of(tiny(LlamaConfig, vocab_size=size)) for size in (37, 370))
    assert small is not None and small == wide
    deep = ForwardCost.of(tiny(LlamaConfig, num_hidden_layers=4))
    assert deep is not None and deep.per_pair == 2 * small.per_pair
    assert 1.9 * small.per_token < deep.per_token <= 2 * small.per_token


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (GPT2Config, {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        (LlamaConfig, {"attn_implementation": "eager"}),
    ],
)
def test_models_that_might_read_the_mask_otherwise_share_nothing(
    config: type, changes: dict[str, Any]
) -> None:
    assert ForwardCost.of(tiny(config, **changes)) is None
    assert ForwardCost.of(torch.nn.Linear(2, 2)) is None
