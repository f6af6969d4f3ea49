"""Log-probs and entropies: block by block against plain logits, values and gradients."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small_models import SIZES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gsm8k_core import onednn, scoring
from gsm8k_core.compiling import compile_error
from gsm8k_core.scoring import compute_entropy, get_response_log_probs, score_responses
from gsm8k_core.tokenization import collate, collate_packed

PROMPTS = [[1, 2, 3], [4, 5], [6]]
RESPONSES = [[7, 8, 9, 10], [11], [12, 13, 14]]


def tiny_qwen2(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes})).eval()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`cut(width, kept)`: score blocks of `width` tokens; keep up to `kept` logits for backward."""

    def set_sizes(width: int, kept: int) -> None:
        monkeypatch.setattr(scoring, "LOGITS_PER_BLOCK", {"cpu": 0})
        monkeypatch.setattr(scoring, "MIN_BLOCK_WIDTH", width)
        monkeypatch.setattr(scoring, "LOGITS_KEPT", kept)

    return set_sizes


def naive_scores(
    model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies from all the logits, one token at a time."""
    log_probs = torch.zeros(batch["labels"].shape)
    entropies = torch.zeros(batch["labels"].shape)
    logits = model(input_ids=batch["input_ids"]).logits / temperature
    for row, position in batch["response_mask"].nonzero().tolist():
        log_softmax = logits[row, position] - logits[row, position].logsumexp(0)
        log_probs[row, position] = log_softmax[batch["labels"][row, position]]
        entropies[row, position] = -(log_softmax.exp() * log_softmax).sum()
    return log_probs, entropies


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_scores(model: Any, temperature: float) -> None:
    """Values and gradients of score_responses and of its naive twin, in float32."""
    batch = collate(PROMPTS, RESPONSES, 0)
    found = score_responses(
        model,
        **batch,
        temperature=temperature,
        with_entropy=True,
        entropy_gradient=True,
    )
    log_probs, entropies = naive_scores(model, batch, temperature)
    torch.testing.assert_close(found["log_probs"], log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["token_entropy"], entropies, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1.0, 2.0, log_probs.numel()).reshape(log_probs.shape)
    ours = gradients(
        model, (found["log_probs"] * weights + found["token_entropy"] * weights**2).sum()
    )
    twins = gradients(model, (log_probs * weights + entropies * weights**2).sum())
    assert ours.keys() == twins.keys() != set()
    for name in twins:
        torch.testing.assert_close(ours[name], twins[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [0, 8 * 20, 2**25])
@pytest.mark.parametrize(("temperature", "width"), [(1.0, 1), (0.7, 10), (1.5, 37), (1.0, 50)])
def test_scores_and_gradients_by_block_equal_those_of_plain_logits(
    by_onednn: bool,
    tied: bool,
    temperature: float,
    width: int,
    kept: int,
    cut: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut(width, kept)
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: 0 if by_onednn else math.inf)
    assert_same_scores(tiny_qwen2(tie_word_embeddings=tied), temperature)


@pytest.mark.parametrize(
    ("num_positions", "longest", "faster", "expected"),
    [
        (33, 64, True, 34),
        (33, 64, False, 33),
        (32, 64, True, 32),
        (37, 37, True, 37),  # a position more has no embedding
    ],
)
def test_rows_are_padded_to_repeating_widths_where_onednn_multiplies(
    num_positions: int,
    longest: int,
    faster: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: 0 if faster else math.inf)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_positions=longest, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    onednn.use_in(model)
    widths = []
    model.transformer.wte.register_forward_hook(lambda *of: widths.append(of[1][0].shape[-1]))
    batch = collate([[1, 2], [3] * 20], [[4] * (num_positions - 1), [5]], 0)
    scores = score_responses(model, **batch, with_entropy=True)
    assert widths == [expected]
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: math.inf)
    plain = score_responses(model, **batch, with_entropy=True)
    for name, values in plain.items():
        assert scores[name].shape == (2, num_positions)
        torch.testing.assert_close(scores[name], values, atol=1e-5, rtol=1e-5)


def test_blocks_of_very_different_logits_add_up(cut: Callable[[int, int], None]) -> None:
    model = tiny_qwen2(tie_word_embeddings=False)
    with torch.no_grad():  # logits of up to a thousand: whole blocks with probabilities of 0
        model.lm_head.weight *= torch.linspace(0.0, 300.0, 37)[:, None]
    cut(5, 0)
    batch = collate(PROMPTS, RESPONSES, 0)
    found = score_responses(model, **batch, with_entropy=True, entropy_gradient=True)
    log_probs, entropies = naive_scores(model, batch)
    assert log_probs.min() < -200
    torch.testing.assert_close(found["log_probs"], log_probs, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found["token_entropy"], entropies, atol=1e-5, rtol=1e-4)
    loss = (found["log_probs"] + found["token_entropy"]).sum()
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "lm_head"]])
def test_a_model_with_lora_adapters_is_scored_with_them(
    modules: str | list[str], cut: Callable[[int, int], None]
) -> None:
    cut(10, 3 * 37)
    base = tiny_qwen2(tie_word_embeddings=False)
    plain = score_responses(base, **collate(PROMPTS, RESPONSES, 0))["log_probs"]
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    ).eval()
    assert_same_scores(adapted, 0.7)
    with_adapters = score_responses(adapted, **collate(PROMPTS, RESPONSES, 0))["log_probs"]
    assert (with_adapters - plain).abs().max() > 0.01


def test_logits_changed_after_the_output_layer_are_not_scored_as_if_they_were_not() -> None:
    capped = Gemma2ForCausalLM(
        Gemma2Config(**{**SIZES, "head_dim": 4, "final_logit_softcapping": 2.0})
    ).eval()
    scaled = CohereForCausalLM(CohereConfig(**{**SIZES, "logit_scale": 0.25})).eval()
    for model in (capped, scaled):
        assert_same_scores(model, 1.0)


def test_a_model_that_changes_its_logits_is_found_out_once_and_keeps_nothing_of_that_forward() -> (
    None
):
    model = CohereForCausalLM(CohereConfig(**{**SIZES, "logit_scale": 0.25}))
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def note(_: Any, __: Any, hidden: torch.Tensor) -> None:
        alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(hidden))

    model.model.layers[0].register_forward_hook(note)
    batch = collate(PROMPTS, RESPONSES, 0)
    for _ in range(3):
        score_responses(model, **batch)["log_probs"].sum().backward()
    assert alive == [0, 0, 0, 0], "two forwards for the first scoring, one for each of the others"


@pytest.mark.parametrize("devices", [{"": 0}, {"model": 0, "lm_head": 1}])
def test_of_a_model_on_several_devices_plain_logits_are_scored(devices: dict[str, int]) -> None:
    model = tiny_qwen2()
    model.hf_device_map = devices  # type: ignore[assignment]  # accelerate's own name
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, output: widths.append(output.shape[-1]))
    score_responses(model, **collate(PROMPTS, RESPONSES, 0))
    assert widths == [SIZES["vocab_size"] if len(devices) > 1 else 1]
    assert_same_scores(model, 1.0)


class HalvedInPlace(Qwen2ForCausalLM):
    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits.div_(2.0)
        return output


class WithoutSomeTokens(Qwen2ForCausalLM):
    """Columns that scores do not have."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits[..., -5:] = -torch.inf
        return output


class WithoutLastTokens(Qwen2ForCausalLM):
    """Rows of the output layer that only pad it are cut off its logits."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = output.logits[..., :-5]
        return output


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [HalvedInPlace, WithoutSomeTokens, WithoutLastTokens])
def test_logits_changed_in_place_or_cut_to_fewer_tokens_are_scored_as_they_end_up(
    kind: type[Qwen2ForCausalLM], without_gradient: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    model = kind(Qwen2Config(**SIZES)).eval()
    ids, labels = torch.randint(0, SIZES["vocab_size"] - 5, (2, 3, 7))
    with without_gradient():
        found = get_response_log_probs(model, ids, labels)["log_probs"]
        whole = model(ids).logits.log_softmax(-1)
    torch.testing.assert_close(found, whole.gather(-1, labels[..., None])[..., 0])


def test_a_forward_of_another_thread_gets_logits_and_another_scoring_waits() -> None:
    model = tiny_qwen2()
    ids, labels = torch.randint(0, SIZES["vocab_size"], (2, 2, 9))
    expected = get_response_log_probs(model, ids, labels)["log_probs"]
    in_forward, go_on = threading.Event(), threading.Event()
    entered: list[str] = []

    def hold(*_: Any) -> None:
        entered.append(threading.current_thread().name)
        if entered[-1] == "first":
            in_forward.set()
            go_on.wait(120)

    hook = model.model.norm.register_forward_hook(hold)
    found: list[torch.Tensor] = []

    def score() -> None:
        found.append(get_response_log_probs(model, ids, labels)["log_probs"])

    threads = [threading.Thread(target=score, name=name) for name in ("first", "second")]
    threads[0].start()
    assert in_forward.wait(120)
    with torch.no_grad():
        assert model(ids).logits.shape == (*ids.shape, SIZES["vocab_size"])
    threads[1].start()
    threads[1].join(0.3)  # time in which it would have entered
    assert threads[1].is_alive() and "second" not in entered
    go_on.set()
    for thread in threads:
        thread.join(120)
    hook.remove()
    assert len(found) == 2
    for one in found:
        torch.testing.assert_close(one, expected)
    assert "forward" not in vars(model.lm_head)


class BigramModel(torch.nn.Module):
    """Not a transformers model: the logits depend on the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.randn(37, 37, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_any_module_that_returns_logits_can_be_scored() -> None:
    assert_same_scores(BigramModel(), 0.7)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives, views aside."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage().nbytes() // result.element_size()
            self.num_elements = max(self.num_elements, min(result.numel(), storage))
        return result


def test_no_tensor_is_as_large_as_the_logits(cut: Callable[[int, int], None]) -> None:
    model = tiny_qwen2(vocab_size=1000)  # weights of 16,000 numbers
    batch = collate([[1, 2, 3]] * 4, [list(range(4, 14))] * 4, 0)  # 40 positions: 40,000 logits
    largest = []
    for width, kept in ((100, 0), (1000, 2**25)):
        cut(width, kept)
        with LargestTensor() as seen:
            found = score_responses(model, **batch, with_entropy=True, entropy_gradient=True)
            (found["log_probs"] + found["token_entropy"]).sum().backward()
        largest.append(seen.num_elements)
    assert largest == [16_000, 40_000]


def test_an_output_layer_that_is_wrapped_makes_no_more_than_a_chunk_of_logits(
    cut: Callable[[int, int], None],
) -> None:
    cut(37, 3 * 37)
    model = tiny_qwen2()
    made: list[int] = []
    head_forward = model.lm_head.forward

    def counted(hidden_states: torch.Tensor) -> torch.Tensor:
        made.append(hidden_states[..., 0].numel())
        return head_forward(hidden_states)

    model.lm_head.forward = counted
    scores = score_responses(model, **collate(PROMPTS, RESPONSES, 0))["log_probs"]
    scores.sum().backward()
    # 4 + 1 + 3 response tokens in chunks of 3, forward and again for the backward
    assert made[:3] == [3, 3, 2]
    assert sorted(made[3:]) == [2, 3, 3]
    assert model.lm_head.forward is counted  # the wrapper that was there is there again


def test_the_model_returns_logits_again_after_being_scored_even_after_an_error() -> None:
    model = tiny_qwen2()
    batch = collate(PROMPTS, RESPONSES, 0)
    before = model(batch["input_ids"]).logits
    score_responses(model, **batch)
    with pytest.raises(ValueError, match="labels go from 1007 to 1014, .* has 37 tokens"):
        score_responses(model, **{**batch, "labels": batch["labels"] + 1000})
    assert torch.equal(model(batch["input_ids"]).logits, before)


def test_labels_that_are_no_tokens_are_refused_whatever_the_model() -> None:
    batch = collate(PROMPTS, RESPONSES, 0)
    ignored = batch["labels"].masked_fill(~batch["response_mask"], -100)
    for model in (tiny_qwen2(), BigramModel()):
        # With a mask they are not looked at; without one they cannot be scored.
        found = score_responses(model, batch["input_ids"], ignored, batch["response_mask"])
        assert torch.equal(found["log_probs"], score_responses(model, **batch)["log_probs"])
        with pytest.raises(ValueError, match="labels go from -100 to 14, .* not -100"):
            get_response_log_probs(model, batch["input_ids"], ignored)


def test_inputs_of_different_shapes_are_refused() -> None:
    batch = collate(PROMPTS, RESPONSES, 0)
    with pytest.raises(ValueError, match=r"^input_ids \(3, 6\) and labels \(3, 5\) must have the"):
        get_response_log_probs(tiny_qwen2(), batch["input_ids"], batch["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"input_ids \(3, 6\) and response_mask \(6,\) must have"):
        score_responses(tiny_qwen2(), **{**batch, "response_mask": batch["response_mask"][0]})


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 1, 5)])
def test_inputs_that_are_no_rows_are_refused(shape: tuple[int, ...]) -> None:
    ids = torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids have shape .*: expected \(B, T\) with B of 1"):
        get_response_log_probs(tiny_qwen2(), ids, ids)


def test_tokens_outside_the_mask_have_exactly_zero() -> None:
    batch = collate(PROMPTS, RESPONSES, 0)
    found = score_responses(tiny_qwen2(), **batch, with_entropy=True)
    for values in found.values():
        assert (values[~batch["response_mask"]] == 0).all()
        assert (values[batch["response_mask"]] != 0).all()


def test_a_batch_without_response_tokens_scores_zero_and_can_go_backward() -> None:
    model = tiny_qwen2()
    batch = collate([[1, 2, 3]], [[]], 0)
    found = score_responses(model, **batch)["log_probs"]
    assert found.tolist() == [[0.0, 0.0]]
    found.sum().backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()
    )


def test_the_entropy_has_a_gradient_only_when_asked_for() -> None:
    batch = collate(PROMPTS, RESPONSES, 0)
    assert not score_responses(tiny_qwen2(), **batch, with_entropy=True)[
        "token_entropy"
    ].requires_grad
    assert score_responses(tiny_qwen2(), **batch, with_entropy=True, entropy_gradient=True)[
        "token_entropy"
    ].requires_grad


def test_padding_changes_no_score_with_or_without_an_attention_mask() -> None:
    model = tiny_qwen2()
    together = collate(PROMPTS, RESPONSES, 0)
    lengths = [
        len(prompt) + len(response) - 1 for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    unmasked = score_responses(model, **together)["log_probs"]
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    masked = score_responses(model, **together, attention_mask=mask)["log_probs"]
    for row in range(3):
        alone = score_responses(model, **collate([PROMPTS[row]], [RESPONSES[row]], 0))["log_probs"]
        for padded in (unmasked, masked):
            torch.testing.assert_close(padded[row, : lengths[row]], alone[0], atol=1e-5, rtol=1e-5)


def test_packed_scores_equal_unpacked_ones() -> None:
    model = tiny_qwen2()
    plain = collate(PROMPTS, RESPONSES, 0)
    packed = collate_packed(PROMPTS, RESPONSES, [[0, 1], [2]], 0)
    expected = score_responses(model, **plain)["log_probs"][plain["response_mask"]]
    found = score_responses(model, **packed)["log_probs"][packed["response_mask"]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    del packed["position_ids"]
    leaking = score_responses(model, **packed)["log_probs"][packed["response_mask"]]
    assert (leaking - expected).abs().max() > 0.01


def test_a_bfloat16_model_is_scored_in_float32() -> None:
    model: Any = tiny_qwen2()
    model.to(torch.bfloat16)
    batch = collate(PROMPTS, RESPONSES, 0)
    found = score_responses(model, **batch)["log_probs"]
    assert found.dtype == torch.float32
    logits = model(batch["input_ids"]).logits.float()
    expected = torch.log_softmax(logits, -1).gather(-1, batch["labels"][..., None])[..., 0]
    mask = batch["response_mask"]
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-2, rtol=1e-2)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        score_responses(tiny_qwen2(), **collate(PROMPTS, RESPONSES, 0), temperature=0.0)


def test_get_response_log_probs_are_of_the_distribution_that_was_sampled_from() -> None:
    model, batch = tiny_qwen2(), collate(PROMPTS, RESPONSES, 0)
    found = get_response_log_probs(model, batch["input_ids"], batch["labels"], temperature=0.7)[
        "log_probs"
    ]
    expected = score_responses(model, **batch, temperature=0.7)["log_probs"]
    mask = batch["response_mask"]
    torch.testing.assert_close(found[mask], expected[mask])


def test_get_response_log_probs_scores_every_position() -> None:
    model = tiny_qwen2()
    batch = collate(PROMPTS, RESPONSES, 0)
    found = get_response_log_probs(
        model, batch["input_ids"], batch["labels"], return_token_entropy=True
    )
    everywhere = {**batch, "response_mask": torch.ones_like(batch["response_mask"])}
    log_probs, entropies = naive_scores(model, everywhere)
    torch.testing.assert_close(found["log_probs"], log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["token_entropy"], entropies, atol=1e-5, rtol=1e-5)
    assert set(get_response_log_probs(model, batch["input_ids"], batch["labels"])) == {"log_probs"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("kept", [0, 2**25])
def test_the_written_out_gradient_is_that_of_autograd_also_under_autocast(
    dtype: torch.dtype, entropy_gradient: bool, kept: int, cut: Callable[[int, int], None]
) -> None:
    model = tiny_qwen2(tie_word_embeddings=False)
    batch = collate(PROMPTS, RESPONSES, 0)
    cut(10, kept)
    found = []
    for wrapped in (False, True):
        if wrapped:  # another's forward goes through autograd
            model.lm_head.forward = model.lm_head.forward
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            scores = score_responses(
                model,
                **batch,
                temperature=0.7,
                with_entropy=True,
                entropy_gradient=entropy_gradient,
            )
        weights = torch.linspace(-1.0, 2.0, scores["log_probs"].numel()).view(3, -1)
        loss = (scores["log_probs"] * weights).sum()
        if entropy_gradient:
            loss = loss + (scores["token_entropy"] * weights**2).sum()
        found.append((scores, gradients(model, loss)))
    (scores, ours), (twin_scores, twins) = found
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in scores:
        torch.testing.assert_close(scores[name], twin_scores[name], atol=tolerance, rtol=tolerance)
    for name in twins:
        scale = float(twins[name].abs().max())
        torch.testing.assert_close(
            ours[name], twins[name], atol=tolerance * max(scale, 1.0), rtol=tolerance, msg=name
        )


def test_a_frozen_output_layer_gets_no_gradient_and_passes_on_the_same_one(
    cut: Callable[[int, int], None],
) -> None:
    cut(10, 0)
    model = tiny_qwen2(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    assert_same_scores(model, 0.7)
    assert model.lm_head.weight.grad is None


def test_the_first_logits_are_made_once_and_the_others_again_for_the_backward_pass(
    cut: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    matmul_transposed = scoring.matmul_transposed
    width = tiny_qwen2().config.hidden_size

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[-1] == width:  # hidden states, by a block of the output layer
            made.append(len(b))
        return matmul_transposed(a, b)

    monkeypatch.setattr(scoring, "matmul_transposed", counted)
    # 8 response tokens, blocks of 20 and 17
    for kept, again in ((8 * 37, []), (8 * 37 - 1, [17]), (8 * 20 - 1, [20, 17])):
        cut(20, kept)
        made.clear()
        found = score_responses(tiny_qwen2(), **collate(PROMPTS, RESPONSES, 0))["log_probs"]
        found.sum().backward()
        assert made == [20, 17, *again]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("with_entropy", "dtype"), [(True, torch.float32), (False, torch.bfloat16)]
)
def test_what_is_compiled_for_a_gpu_gives_what_each_operation_does(
    with_entropy: bool, dtype: torch.dtype
) -> None:
    """The compiler's kernels for a CPU; tests/gpu has those for a GPU."""
    torch.manual_seed(0)
    statistics, gradient = (
        torch.compile(function, dynamic=True, fullgraph=True)
        for function in (scoring._block_statistics, scoring._block_gradient)
    )
    for rows, width in ((5, 128), (9, 64)):
        logits = (3 * torch.randn(rows, width)).to(dtype)
        log_sum, constant, slope = torch.randn(3, rows) + 4.0
        options = log_sum, constant, slope if with_entropy else None
        torch.testing.assert_close(
            statistics(logits, 0.7, with_entropy),
            scoring._block_statistics(logits, 0.7, with_entropy),
        )
        torch.testing.assert_close(
            gradient(logits, 0.7, *options), scoring._block_gradient(logits, 0.7, *options)
        )


def test_a_gpu_without_a_compiler_scores_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "compile_error", lambda _: "Python.h: No such file")
    scoring._fused.cache_clear()
    assert scoring._fused(scoring._block_gradient, "cuda") is scoring._block_gradient
    assert scoring._logits_per_block("cuda") == scoring.LOGITS_KEPT
    assert "Python.h: No such file" in caplog.text
    scoring._fused.cache_clear()


@pytest.mark.slow
def test_whether_torch_compile_works_is_found_by_trying(tmp_path: Path) -> None:
    assert (compile_error("cpu") is None) == (shutil.which("g++") is not None)
    # It is asked once in each process.
    program = "from gsm8k_core.compiling import compile_error; print(compile_error('cpu'))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        # With a cache in which nothing is yet.
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout.strip()
    assert answer not in ("", "None")


def test_blocks_begin_where_a_gpu_reads_at_its_best() -> None:
    for positions in (1, 7, 2047, 13_001, 10**6):
        blocks = scoring._blocks(50_257, positions, scoring.LOGITS_PER_BLOCK_OF_OTHERS)
        assert all(block.start % 64 == 0 for block in blocks)
        assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
        assert blocks[0].start == 0 and blocks[-1].stop == 50_257


# ----------------------------------------------------------------------------------------- entropy


def test_the_entropy_of_a_uniform_distribution_is_the_log_of_its_size() -> None:
    assert compute_entropy(torch.zeros(2, 3, 8)).tolist() == [[pytest.approx(math.log(8))] * 3] * 2


@pytest.mark.parametrize(
    "logits",
    [[0.0, 1000.0, -1000.0], [3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [0.0, -math.inf, 0.0]],
)
def test_the_entropy_and_its_gradient_are_finite_for_extreme_logits(logits: list[float]) -> None:
    tensor = torch.tensor(logits, requires_grad=True)
    entropy = compute_entropy(tensor)
    entropy.backward()
    # the share of the largest logit, equal ones sharing it: log of how many there are
    num_largest = sum(value == max(logits) for value in logits)
    assert entropy.item() == pytest.approx(math.log(num_largest), abs=1e-6)
    assert tensor.grad is not None
    assert tensor.grad.isfinite().all()


@settings(max_examples=40)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6),
    shift=st.floats(-1000, 1000, width=32),
)
def test_the_entropy_equals_its_definition_and_does_not_change_with_a_shift(
    logits: list[float], shift: float
) -> None:
    total = math.fsum(math.exp(value) for value in logits)
    probs = [math.exp(value) / total for value in logits]
    expected = -math.fsum(p * math.log(p) for p in probs if p > 0)
    tensor = torch.tensor(logits, dtype=torch.float64)
    assert compute_entropy(tensor).item() == pytest.approx(expected, abs=1e-9)
    assert compute_entropy(tensor + shift).item() == pytest.approx(expected, abs=1e-9)


def test_half_precision_logits_are_taken_to_float32() -> None:
    assert scoring.compute_entropy(torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.float32
