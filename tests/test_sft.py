"""Supervised fine-tuning losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SIZES
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gsm8k_core.errors import ConfigError, TrainingError
from gsm8k_core.scoring import score_responses
from gsm8k_core.sft import check_packing, sft_loss, sft_microbatch_train_step
from gsm8k_core.tokenization import collate

LOG_PROBS = [[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]]
MASK = torch.tensor([[False, True, True], [True, False, False]])


def test_the_microbatch_loss_is_the_mean_of_the_examples_sums() -> None:
    log_probs = torch.tensor(LOG_PROBS, requires_grad=True)
    loss, metadata = sft_microbatch_train_step(log_probs, MASK, 5, normalize_constant=2.0)
    # ((2 + 4)/2 + 8/2) / 2 examples / 5 accumulation steps
    assert loss.item() == pytest.approx((3.0 + 4.0) / 2 / 5)
    assert log_probs.grad is not None
    # d/dlogp = -1 / (2 · 2 · 5) where the mask is true
    assert log_probs.grad.tolist() == [
        pytest.approx([0.0, -0.05, -0.05]),
        pytest.approx([-0.05, 0.0, 0.0]),
    ]
    assert not loss.requires_grad
    assert metadata["nll_sum"].item() == 14.0
    assert metadata["num_response_tokens"].item() == 3


def test_the_normalize_constant_of_the_microbatch_step_defaults_to_one() -> None:
    loss, _ = sft_microbatch_train_step(torch.tensor(LOG_PROBS, requires_grad=True), MASK, 1)
    assert loss.item() == pytest.approx((6.0 + 8.0) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_counted_exactly_whatever_the_masks_dtype(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 2049, dtype=dtype)  # 2049 is no number of either type
    _, metadata = sft_microbatch_train_step(torch.zeros(1, 2049, requires_grad=True), mask, 1)
    assert metadata["num_response_tokens"].item() == 2049


def test_the_loss_of_a_step_is_its_mean_nll_per_response_token() -> None:
    assert sft_loss(torch.tensor(LOG_PROBS), MASK, 3).item() == pytest.approx((2 + 4 + 8) / 3)


def test_a_step_without_a_response_token_is_an_error_and_no_nan() -> None:
    with pytest.raises(TrainingError, match="no response token counts in this optimizer step"):
        sft_loss(torch.tensor(LOG_PROBS), torch.zeros_like(MASK), 0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_divisor_that_is_no_number_above_0_is_refused_before_the_gradient(wrong: float) -> None:
    log_probs = torch.tensor(LOG_PROBS, requires_grad=True)
    with pytest.raises(ValueError, match=f"normalize_constant is {wrong}: take a number above 0"):
        sft_microbatch_train_step(log_probs, MASK, 1, wrong)
    assert log_probs.grad is None
    with pytest.raises((ValueError, TrainingError)):
        sft_loss(log_probs, MASK, wrong)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 4), st.integers(0, 5)), min_size=4, max_size=4),
    microbatch=st.sampled_from([1, 2, 3]),
)
def test_the_gradient_does_not_depend_on_the_microbatch_size(
    lengths: list[tuple[int, int]], microbatch: int
) -> None:
    lengths[0] = (2, 3)  # something to learn from
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    prompts, responses = (
        [torch.randint(1, 20, (n,), generator=generator).tolist() for n in side]
        for side in zip(*lengths, strict=True)
    )
    num_tokens = sum(len(response) for response in responses)

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for rows in torch.arange(len(prompts)).split(size):
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], 0)
            log_probs = score_responses(model, **batch)["log_probs"]
            sft_loss(log_probs, batch["response_mask"], num_tokens).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(microbatch), gradient(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [Qwen2Config, Gemma3TextConfig])
def test_packing_is_for_models_that_keep_the_examples_of_a_row_apart(config: type) -> None:
    model = AutoModelForCausalLM.from_config(config(**SIZES)).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (OPTConfig, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
        (Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_packing_is_refused_where_examples_of_a_row_attend_to_one_another(
    config: type, changes: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, **changes}))
    with pytest.raises(ConfigError, match="packing: in .* attend to one another; set packing: f"):
        check_packing(model)
