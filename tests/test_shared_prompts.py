"""Completions that share their prompt in a forward are scored as in rows of their own."""

from __future__ import annotations

from pathlib import Path
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
from gsm8k_core.shared_prompts import pack_group, share_prompts, shared_width, use_in
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


def shared_inputs(
    prompts: list[list[int]], responses: list[list[int]], packs: list[list[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch of a row for each completion, without the second, and the same as a shared row."""
    batch = collate(prompts, responses, 0)
    batch["response_mask"][1] = False  # left out of the loss: what comes behind it stays right
    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    shared = share_prompts(packs, [*map(len, prompts)], lengths, torch.device("cpu"))
    source = (shared.source_rows, shared.source_columns)
    packed: dict[str, Any] = {name: values[source] for name, values in batch.items()}
    packed["response_mask"] &= shared.own
    return batch, {**packed, "shared_row": shared}


def assert_equal_scores(
    one: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
    other: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    for of_one, of_other in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(of_one, of_other, atol=1e-5, rtol=1e-5)
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("prompts", "responses", "packs"),
    [
        (PROMPTS, RESPONSES, PACKS),
        ([[1, 2, 3]] * 4, [[4, 5], [6, 7], [8, 9], [10, 11]], [[0, 1], [2, 3]]),  # no padding
        ([[6]] * 3, [[7], [8, 9], [10]], [[0, 1, 2]]),  # no token of the prompt but the last
    ],
)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_scores_and_gradients_are_those_of_a_row_for_each_completion(
    config: type,
    prompts: list[list[int]],
    responses: list[list[int]],
    packs: list[list[int]],
) -> None:
    model = tiny(config)
    batch, packed = shared_inputs(prompts, responses, packs)
    num_tokens = sum(map(len, responses)) + sum(len(prompts[pack[0]]) - 1 for pack in packs)
    assert packed["input_ids"].shape == (1, num_tokens)
    alone = scores_and_gradients(model, batch)
    assert use_in(model)
    assert_equal_scores(alone, scores_and_gradients(model, packed))
    # Rows that share nothing are scored as before.
    assert_equal_scores(alone, scores_and_gradients(model, batch))


def test_gradient_checkpointing_computes_a_shared_row_again_as_it_was() -> None:
    model = tiny(Qwen2Config)
    assert use_in(model)
    _, packed = shared_inputs(PROMPTS, RESPONSES, PACKS)
    kept = scores_and_gradients(model, packed)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_scores(kept, scores_and_gradients(model, packed))


def test_a_row_padded_to_a_size_that_comes_again_has_the_same_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(Qwen2Config)
    assert use_in(model)
    _, packed = shared_inputs(PROMPTS, RESPONSES, PACKS)
    plain = scores_and_gradients(model, packed)
    monkeypatch.setattr("gsm8k_core.scoring._width_to_compute", lambda _, width, __: width + 3)
    assert_equal_scores(plain, scores_and_gradients(model, packed))


def test_a_model_that_shares_prompts_is_saved_as_any_other(tmp_path: Path) -> None:
    model = tiny(Qwen2Config)
    model.save_pretrained(tmp_path / "before")
    assert use_in(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (
        (tmp_path / name / "config.json").read_text(encoding="utf-8")
        for name in ("before", "after")
    )
    assert before == after


def test_the_width_of_a_pack_is_the_prompt_once_and_the_completions() -> None:
    assert shared_width([0, 1, 2], [5, 5, 5], [7, 5, 8]) == 4 + 3 + 1 + 4
    assert shared_width([0], [5], [7]) == 7


def test_completions_are_packed_until_padding_costs_more_than_the_prompt_or_a_row_is_full() -> None:
    assert pack_group(10, [7, 9, 8, 7], 1000) == [[1, 2, 0, 3]]
    assert pack_group(10, [5, 30, 21, 19, 10], 1000) == [[1, 2], [3, 4], [0]]
    assert pack_group(10, [5, 5, 5, 5], 21) == [[0, 1], [2, 3]]
    assert pack_group(10, [50, 60], 40) == [[1], [0]]  # longer than a row may be: alone


@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 500), min_size=1, max_size=32),
    st.integers(1, 4000),
)
def test_every_completion_is_in_one_pack_which_is_no_longer_than_allowed(
    prompt: int, lengths: list[int], most: int
) -> None:
    packs = pack_group(prompt, lengths, most)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        of_pack = [lengths[index] for index in pack]
        assert len(pack) == 1 or prompt + sum(of_pack) <= most
        assert max(of_pack) - min(of_pack) <= prompt


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
    assert not use_in(tiny(config, **changes))
    assert not use_in(torch.nn.Linear(2, 2))
