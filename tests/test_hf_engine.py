"""The transformers engine: what it samples, and that nothing but prompt and seed decides it."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    MambaConfig,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gsm8k_core.engines import hf_engine
from gsm8k_core.engines.base import Completion, Request
from gsm8k_core.engines.hf_engine import CACHE_ROOM, MIN_NEWEST, HfEngine, RoomyLayer, TwoPartLayer
from gsm8k_core.errors import ModelError
from gsm8k_core.models import plain_weights, tiny_model, tiny_tokenizer

LENGTHS = (3, 40, 7, 7, 1, 25, 12, 60)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Qwen2ForCausalLM:
    """The tiny model with weights so large that its choices are neither uniform nor all alike."""
    model = tiny_model(tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0 if "embed" in name else 6.0)
    return model


@pytest.fixture
def engine(model: Qwen2ForCausalLM, tokenizer: Any) -> HfEngine:
    return HfEngine(model, tokenizer, batch_size=64)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(2, 453) for _ in range(length)] for length in lengths]


def greedy(prompt: list[int], max_new_tokens: int = 20) -> Request:
    return Request(prompt, [0], 0.0, max_new_tokens)


def sampled(seeds: list[int], temperature: float = 1.0, max_new_tokens: int = 20) -> list[Request]:
    return [Request(prompt, seeds, temperature, max_new_tokens) for prompt in prompts()]


def reference_greedy(
    model: Any, prompt: list[int], max_new_tokens: int, eos: list[int]
) -> list[int]:
    """transformers' own greedy search on one prompt, without padding."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=1,
    )
    return output[0, len(prompt) :].tolist()


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in completions]


# Against transformers


def test_greedy_is_transformers_own_token_for_token(
    engine: HfEngine, model: Qwen2ForCausalLM
) -> None:
    completions = engine.generate([greedy(prompt) for prompt in prompts()])
    for prompt, (completion,) in zip(prompts(), completions, strict=True):
        assert completion.token_ids == reference_greedy(model, prompt, 20, [0])
    assert len({tuple(group[0].token_ids) for group in completions}) > len(prompts()) // 2


def test_greedy_with_more_stop_ids_is_transformers_own_too(
    model: Qwen2ForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [reference_greedy(model, prompt, 20, [0]) for prompt in prompts()]
    stop_ids = [0, free[0][3], free[1][8], free[5][1]]  # ids that greedy search does reach
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop_ids)
    completions = HfEngine(model, tokenizer).generate([greedy(prompt) for prompt in prompts()])
    for prompt, (completion,) in zip(prompts(), completions, strict=True):
        assert completion.token_ids == reference_greedy(model, prompt, 20, stop_ids)
        ended = completion.token_ids[-1] in stop_ids
        assert completion.finish_reason == ("stop" if ended else "length")
    lengths = {len(group[0].token_ids) for group in completions}
    assert len(lengths) > 2, "rows end at different steps, so finished ones leave the batch"


def test_positions_count_from_the_first_real_token(tokenizer: Any) -> None:
    # Rotary positions are relative: a shift by the padding would go unseen. GPT-2's are absolute.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    completions = HfEngine(model, tokenizer).generate([greedy(prompt) for prompt in prompts()])
    for prompt, (completion,) in zip(prompts(), completions, strict=True):
        assert completion.token_ids == reference_greedy(model, prompt, 20, [0])


def log_probs_by_a_full_forward(
    model: Qwen2ForCausalLM, request: Request, completion: Completion
) -> torch.Tensor:
    ids = [*request.prompt_ids, *completion.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
    scaled = logits.double() / (request.temperature or 1.0)
    chosen = torch.tensor(completion.token_ids)
    return torch.log_softmax(scaled, -1).gather(-1, chosen[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_log_probs_are_those_of_a_full_forward_at_the_sampling_temperature(
    engine: HfEngine, model: Qwen2ForCausalLM, temperature: float
) -> None:
    requests = sampled([1, 2], temperature)
    for request, group in zip(requests, engine.generate(requests), strict=True):
        for completion in group:
            expected = log_probs_by_a_full_forward(model, request, completion)
            actual = torch.tensor(completion.log_probs, dtype=torch.float64)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# Seeds


@pytest.mark.slow
def test_what_is_sampled_does_not_depend_on_the_batch(
    model: Qwen2ForCausalLM, tokenizer: Any
) -> None:
    requests = sampled([11, 12, 13])
    together = tokens(HfEngine(model, tokenizer, batch_size=64).generate(requests))
    assert tokens(HfEngine(model, tokenizer, batch_size=1).generate(requests)) == together
    assert tokens(HfEngine(model, tokenizer, batch_size=5).generate(requests)) == together
    assert tokens(HfEngine(model, tokenizer).generate(requests[::-1])) == together[::-1]
    alone = [tokens(HfEngine(model, tokenizer).generate([r]))[0] for r in requests]
    assert alone == together


def test_a_seed_samples_the_same_whatever_its_place_and_its_neighbours(engine: HfEngine) -> None:
    one, other = tokens(engine.generate([sampled([5, 6, 7])[0], sampled([7, 5])[0]]))
    assert other == [one[2], one[0]]
    assert one[0] != one[1] != one[2] != one[0]


def test_greedy_and_sampled_requests_share_a_batch(engine: HfEngine) -> None:
    mixed = [greedy(prompts()[0]), sampled([1])[0], sampled([1], 0.5)[0]]
    assert tokens(engine.generate(mixed)) == [
        tokens(engine.generate([request]))[0] for request in mixed
    ]


def test_a_longer_limit_goes_on_from_the_shorter_completion(engine: HfEngine) -> None:
    short, long = (sampled([3], max_new_tokens=n)[0] for n in (5, 15))
    ((one,), (other,)) = engine.generate([short, long])
    assert other.token_ids[: len(one.token_ids)] == one.token_ids
    assert len(one.token_ids) <= 5 < len(other.token_ids)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_follow_the_softmax(
    engine: HfEngine, model: Qwen2ForCausalLM, temperature: float
) -> None:
    num_seeds = 4000
    prompt = prompts()[1]
    request = Request(prompt, list(range(num_seeds)), temperature, 1)
    engine.batch_size = num_seeds
    drawn = [completion.token_ids[0] for completion in engine.generate([request])[0]]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, -1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    # Pool what is expected fewer than 10 times; χ² with one degree of freedom less than bins.
    common = probabilities * num_seeds >= 10
    assert int(common.sum()) > 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    expected = [*probabilities[common].tolist(), float(probabilities[~common].sum())]
    result = stats.chisquare(observed, [p * num_seeds for p in expected])
    assert result.pvalue > 1e-3


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.05, 0), (1.0, 5), (0.8, 20), (1.0, 1)])
def test_tokens_come_from_the_likeliest_as_transformers_chooses_them(
    engine: HfEngine, model: Qwen2ForCausalLM, top_p: float, top_k: int
) -> None:
    num_seeds = 2000
    prompt = prompts()[1]
    request = Request(prompt, list(range(num_seeds)), 0.7, 1, top_p=top_p, top_k=top_k)
    engine.batch_size = num_seeds
    drawn = engine.generate([request])[0]
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[:, -1].double() / 0.7
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores)[0]
    expected = scores.log_softmax(-1)
    assert {one.token_ids[0] for one in drawn} <= set(scores.isfinite().nonzero()[:, 0].tolist())
    for one in drawn:
        assert one.log_probs[0] == pytest.approx(expected[one.token_ids[0]].item(), abs=1e-5)
    counts = torch.bincount(
        torch.tensor([one.token_ids[0] for one in drawn]), minlength=len(scores)
    )
    common = expected.exp() * num_seeds >= 10
    if int(common.sum()) > 1:
        observed = [*counts[common].tolist(), int(counts[~common].sum())]
        wanted = [*expected.exp()[common].tolist(), float(expected.exp()[~common].sum())]
        pairs = [(o, w * num_seeds) for o, w in zip(observed, wanted, strict=True) if w > 0]
        result = stats.chisquare([o for o, _ in pairs], [w for _, w in pairs])
        assert result.pvalue > 1e-3


def test_rows_of_one_batch_have_their_own_nucleus(engine: HfEngine) -> None:
    wide = Request(prompts()[0], [1, 2, 3], 1.0, 12)
    narrow = replace(wide, top_p=0.3)
    only = replace(wide, top_k=1)
    together = engine.generate([wide, narrow, only, greedy(prompts()[0])])
    alone = [engine.generate([one])[0] for one in (wide, narrow, only)]
    for found, wanted in zip(together, alone, strict=False):
        assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    assert len({tuple(c.token_ids) for c in together[2]}) == 1  # the likeliest is greedy
    assert together[2][0].token_ids == together[3][0].token_ids[:12]
    assert together[0][0].token_ids != together[1][0].token_ids


# Ends


def test_a_completion_cut_by_its_limit_says_length(engine: HfEngine) -> None:
    ((completion,),) = engine.generate([greedy(prompts()[0], max_new_tokens=4)])
    assert (len(completion.token_ids), completion.finish_reason) == (4, "length")
    assert len(completion.log_probs) == 4


def test_each_request_has_its_own_limit(engine: HfEngine) -> None:
    limits = [1, 17, 5, 2, 9, 30, 3, 12]
    requests = [greedy(p, limit) for p, limit in zip(prompts(), limits, strict=True)]
    completions = engine.generate(requests)
    for request, (completion,) in zip(requests, completions, strict=True):
        (alone,) = engine.generate([request])[0]
        assert completion.token_ids == alone.token_ids
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == request.max_new_tokens


def test_the_eos_is_kept_in_the_tokens_and_left_out_of_the_text(
    model: Qwen2ForCausalLM, tokenizer: Any
) -> None:
    class EndsAtOnce(Qwen2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits[..., 0] = 1e4
            return output

    ending = EndsAtOnce(model.config).eval()
    ((completion,),) = HfEngine(ending, tokenizer).generate([greedy([5, 6])])
    assert completion == Completion([0], [0.0], "stop", "")


def readable_pair(engine: HfEngine, tokenizer: Any) -> tuple[Request, Completion, int, str]:
    """A completion with two readable tokens side by side: where, and the text across them."""
    for seed in range(200):
        request = sampled([seed], max_new_tokens=30)[1]
        ((free,),) = engine.generate([request])
        texts = [tokenizer.decode([token]) for token in free.token_ids]
        for position in range(4, len(texts) - 2):
            pair = texts[position] + texts[position + 1]
            stop = texts[position][-1:] + texts[position + 1][:1]
            if pair.isascii() and len(stop) == 2 and free.text.count(stop) == 1:
                return request, free, position, stop
    raise AssertionError("the model writes nothing readable")


def test_a_stop_text_across_two_tokens_ends_the_completion_and_is_cut(
    engine: HfEngine, tokenizer: Any
) -> None:
    request, free, position, stop = readable_pair(engine, tokenizer)
    ((cut,),) = engine.generate([replace(request, stop=["never written", stop])])
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    # Tokens are kept up to the one that ended it: what was sampled is what is trained on.
    assert cut.token_ids == free.token_ids[: position + 2]
    assert cut.log_probs == free.log_probs[: position + 2]


def test_of_two_stop_texts_in_one_token_the_earlier_cuts(engine: HfEngine, tokenizer: Any) -> None:
    request = sampled(list(range(20)), max_new_tokens=30)[1]
    (completions,) = engine.generate([request])
    seed, free, position, text = next(
        (seed, free, position, text)
        for seed, free in enumerate(completions)
        for position, token in enumerate(free.token_ids)
        if token not in tokenizer.all_special_ids  # of which the text has nothing
        for text in [tokenizer.decode([token])]
        if len(set(text)) >= 3 and text.isascii()
    )
    request = replace(request, seeds=[seed])
    before = tokenizer.decode(free.token_ids[:position])
    for stops in ([text[1:], text], [text, text[1:]]):
        assert not any(stop in before for stop in stops)
        ((cut,),) = engine.generate([replace(request, stop=stops)])
        assert cut.text == before
        assert cut.token_ids == free.token_ids[: position + 1]


# Limits of the batch and of the model


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_no_more_rows_than_the_batch_size_are_decoded_at_once(
    model: Qwen2ForCausalLM, tokenizer: Any, batch_size: int
) -> None:
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        requests = sampled([1, 2, 3, 4, 5], max_new_tokens=2)
        completions = HfEngine(model, tokenizer, batch_size).generate(requests)
    finally:
        handle.remove()
    assert max(sizes) <= batch_size
    assert [len(group) for group in completions] == [5] * len(LENGTHS)


def test_engines_in_two_threads_do_not_meet(tokenizer: Any) -> None:
    request = Request([5] * 30, [0], 0.0, 40)
    engines = []
    for seed in range(2):
        torch.manual_seed(seed)
        engines.append(HfEngine(Qwen2ForCausalLM(tiny_model(tokenizer).config), tokenizer))
        engines[-1].stop_ids = {10**6}
    alone = [tokens(engine.generate([request])) for engine in engines]
    assert alone[0] != alone[1]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            beside = list(pool.map(lambda engine: tokens(engine.generate([request])), engines))
        assert beside == alone


def test_attention_that_the_user_has_put_in_place_stays_there(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*given: Any, **options: Any) -> Any:
        return sdpa_attention.sdpa_attention_forward(*given, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    engine.generate([greedy([5, 6, 7])])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_no_requests_and_no_seeds_give_no_completions(engine: HfEngine) -> None:
    assert engine.generate([]) == []
    assert engine.generate([Request([5], [], 1.0, 4)]) == [[]]
    assert [len(group) for group in engine.generate([Request([5], [], 1.0, 4), greedy([5])])] == [
        0,
        1,
    ]


def test_a_prompt_that_does_not_fit_is_an_error_that_says_by_how_much(engine: HfEngine) -> None:
    fits, too_long = Request([5] * 508, [0], 0.0, 4), Request([5] * 509, [0], 0.0, 4)
    assert engine.generate([fits])
    with pytest.raises(ModelError, match="509 tokens and 4 new ones need 513 .* the model has 512"):
        engine.generate([too_long])
    with pytest.raises(ModelError, match="a prompt of no tokens"):
        engine.generate([greedy([])])


def test_a_batch_of_no_completions_and_a_prompt_of_text_are_refused(engine: HfEngine) -> None:
    with pytest.raises(ValueError, match="batch_size is 0: take 1 or more"):
        HfEngine(engine.model, engine.tokenizer, 0)
    with pytest.raises(TypeError, match="prompt_ids is the text 'What is': tokenize it"):
        engine.generate([replace(greedy([5]), prompt_ids="What is")])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stop is the text 'ab': give a list of texts"):
        engine.generate([replace(greedy([5]), stop="ab")])  # type: ignore[arg-type]


def test_requests_may_come_from_a_generator_but_not_alone(engine: HfEngine) -> None:
    requests = [greedy([5]), greedy([6])]
    assert engine.generate(iter(requests)) == engine.generate(requests)
    with pytest.raises(TypeError, match="requests is one Request: give a list of them"):
        engine.generate(requests[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [torch.tensor([5, 6]), torch.tensor([[5, 6]]), [[5, 6]], [-1]])
def test_prompt_ids_that_are_no_list_of_whole_numbers_are_refused(
    engine: HfEngine, wrong: Any
) -> None:
    with pytest.raises(TypeError, match="expected whole numbers from 0 on: give tokenizer"):
        engine.generate([replace(greedy([5]), prompt_ids=wrong)])
    assert engine.generate([greedy([5, 6])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1: take 0 \(greedy\) or a number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1: take 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ["\n", ""]}, "a stop text is empty, .*: leave it out"),
        ({"seeds": [1, -1]}, "a seed is -1: take an integer, 0 or above"),
        ({"seeds": [None]}, "a seed is None"),
        ({"seeds": [True]}, "a seed is True"),
        ({"seeds": [1.5]}, "a seed is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0: take 1"),
        ({"top_p": 1.1}, "top_p is 1.1: take 1"),
        ({"top_k": -1}, "top_k is -1: take 0"),
    ],
)
def test_settings_of_a_request_that_make_no_sense_are_refused(
    engine: HfEngine, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate([greedy([5]), replace(greedy([5]), **changes)])


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MambaConfig, {}),
        (RecurrentGemmaConfig, {}),
        (Lfm2Config, {"layer_types": ["full_attention", "conv", "conv"]}),
    ],
)
def test_a_model_whose_layers_keep_a_state_is_refused(
    tokenizer: Any, config: type, changes: dict[str, Any]
) -> None:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(config(**sizes, eos_token_id=0, **changes))
    with pytest.raises(ModelError, match="layers of this one keep a state; set engine: vllm"):
        HfEngine(model, tokenizer)


def test_a_model_spread_over_devices_is_refused(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    model.hf_device_map = {"model": 0, "lm_head": 1}  # type: ignore[assignment]
    with pytest.raises(ModelError, match="one device, and this one is spread over several"):
        HfEngine(model, tokenizer)


def test_a_completion_that_is_done_does_not_run_past_the_models_last_position(
    tokenizer: Any,
) -> None:
    # Learned positions: there is none beyond the last.
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=32, eos_token_id=0)).eval()
    long = Request([5] * 30, [0], 1.0, 2)
    short = [Request([5, 6, 7, 8 + k], [k], 1.0, 20) for k in range(9)]
    completions = HfEngine(model, tokenizer).generate([long, *short])
    alone = [HfEngine(model, tokenizer).generate([request])[0] for request in [long, *short]]
    assert tokens(completions) == tokens(alone)
    assert max(len(group[0].token_ids) for group in completions[1:]) > 4


# The model around it


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back_and_dropout_is_off_meanwhile(
    tokenizer: Any, training: bool
) -> None:
    model = tiny_model(tokenizer)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    engine = HfEngine(model, tokenizer)
    once, again = (engine.generate([greedy(prompts()[1])]) for _ in range(2))
    assert once == again
    assert model.training is training


def test_parts_that_were_in_another_mode_than_the_model_stay_in_it(tokenizer: Any) -> None:
    model = tiny_model(tokenizer).train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    HfEngine(model, tokenizer).generate([greedy([5], 2)])
    assert [part.training for part in model.modules()] == modes


def test_the_mode_is_put_back_after_a_failure_too(tokenizer: Any) -> None:
    model = tiny_model(tokenizer).train()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="logits are NaN, so nothing can be sampled"):
        HfEngine(model, tokenizer).generate([greedy([5])])
    assert model.training


def test_a_prompt_of_another_tokenizer_is_refused(engine: HfEngine) -> None:
    with pytest.raises(ValueError, match=r"prompt_ids holds 10000, but the model has 453 tokens"):
        engine.generate([greedy([5, 10_000])])


def test_the_engine_samples_from_the_weights_as_they_are_now(
    tokenizer: Any,
) -> None:
    model = tiny_model(tokenizer)
    engine = HfEngine(model, tokenizer)
    before = engine.generate([greedy(prompts()[1])])
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.copy_(embeddings.roll(1, dims=0))
    assert engine.generate([greedy(prompts()[1])]) != before


def test_nothing_is_drawn_from_torchs_generator(engine: HfEngine) -> None:
    state = torch.random.get_rng_state()
    engine.generate(sampled([1, 2]))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loaded_weights_are_those_that_it_samples_from(tokenizer: Any) -> None:
    source, target = tiny_model(tokenizer), tiny_model(tokenizer)
    torch.manual_seed(0)
    for parameter in source.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    requests = [greedy(prompt) for prompt in prompts()]
    wanted = HfEngine(source, tokenizer).generate(requests)
    engine = HfEngine(target, tokenizer)
    assert engine.generate(requests) != wanted
    engine.load_weights(plain_weights(source))
    assert engine.generate(requests) == wanted


# The key-value cache with room


def test_the_cache_with_room_holds_what_transformers_own_holds() -> None:
    theirs, ours = DynamicLayer(), RoomyLayer()
    generator = torch.Generator().manual_seed(0)
    num_rows = 6
    # A prompt, single tokens past the room that there is, a prompt in pieces, rows that leave.
    for new, kept in [(5, None), *[(1, None)] * (CACHE_ROOM + 3), (9, [4, 0, 0, 2]), (1, None)]:
        shape = (num_rows, 2, new, 32)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        for found, expected in zip(
            ours.update(keys, values), theirs.update(keys, values), strict=True
        ):
            assert torch.equal(found, expected)
        if kept is not None:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor(kept))
            num_rows = len(kept)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_the_cache_in_two_parts_holds_what_transformers_own_holds() -> None:
    theirs, ours = DynamicLayer(), TwoPartLayer()
    generator = torch.Generator().manual_seed(0)
    num_rows = 6
    # A prompt, single tokens until they are copied twice, rows that leave, and come to be copied.
    for new, kept in [(5, None), *[(1, None)] * (2 * MIN_NEWEST + 3), (1, [4, 0, 0, 2]), (1, None)]:
        shape = (num_rows, 2, new, 32)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        expected = theirs.update(keys, values)
        ours.update(keys, values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for name, whole in zip(("keys", "values"), expected, strict=True):
            parts = [getattr(part, name) for part in (ours, ours.newest)]
            assert parts[0].is_contiguous()
            assert torch.equal(torch.cat([p for p in parts if p is not None], dim=2), whole)
        if kept is not None:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor(kept))
            num_rows = len(kept)


@pytest.mark.parametrize("num_heads", [2, 6])
def test_attention_to_both_parts_is_pytorchs_over_the_whole(num_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer, rows, heads = TwoPartLayer(), 3, 2
    shapes = [(rows, heads, new, 8) for new in (7, 1, 1)]
    states = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    for keys, values in zip(*states, strict=True):
        layer.update(keys, values)
    keys, values = (torch.cat(parts, dim=2) for parts in states)
    query = torch.randn(rows, num_heads, 1, 8, generator=generator)
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [8]]))[:, None, None]
    for scaling in (None, 0.7):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        found = hf_engine._attend(query, layer, mask, scaling)
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_the_cache_is_in_two_parts_only_for_models_that_read_it_so(tokenizer: Any) -> None:
    def kinds(model: Any) -> set[type]:
        return {type(layer) for layer in hf_engine._new_cache(model).layers}

    model = tiny_model(tokenizer)
    assert kinds(model) == {TwoPartLayer}
    assert kinds(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))) == {RoomyLayer}
    with torch.autocast("cpu", torch.bfloat16):
        assert kinds(model) == {RoomyLayer}
    assert kinds(model.bfloat16()) == {RoomyLayer}
    model.float().set_attn_implementation("eager")
    assert kinds(model) == {RoomyLayer}


@pytest.mark.parametrize("kind", [TwoPartLayer, RoomyLayer])
def test_completions_do_not_depend_on_how_many_prompts_are_prefilled_at_once(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setattr(hf_engine, "is_plain_decoder", lambda _: kind is TwoPartLayer)
    assert {type(layer) for layer in hf_engine._new_cache(engine.model).layers} == {kind}
    requests = sampled([1, 2, 3], max_new_tokens=CACHE_ROOM + 20)
    widths: list[int] = []
    forward = HfEngine._forward_prompts

    def counted(self: HfEngine, texts: list[list[int]], cache: DynamicCache) -> torch.Tensor:
        widths.append(len(texts))
        return forward(self, texts, cache)

    monkeypatch.setattr(HfEngine, "_forward_prompts", counted)
    found = []
    for budget in (10_000, 64, 1):
        monkeypatch.setattr(hf_engine, "PREFILL_TOKENS", {"cpu": budget})
        found.append(engine.generate(requests))
    # lengths 60, 40, 25, 12, 7, 7, 3, 1: as many of like length as 64 tokens hold; one by one
    assert widths == [8, 1, 1, 2, 4, *[1] * 8]
    for group, others in zip(found[0], zip(*found[1:], strict=True), strict=True):
        for other in others:
            assert [c.token_ids for c in group] == [c.token_ids for c in other]
            for one, two in zip(group, other, strict=True):
                assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)


def test_completions_and_log_probs_are_those_with_transformers_own_cache(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sampled([1, 2], max_new_tokens=CACHE_ROOM + 8)
    found = engine.generate(requests)
    monkeypatch.setattr(hf_engine, "_new_cache", lambda model: DynamicCache(config=model.config))
    expected = engine.generate(requests)
    assert tokens(found) == tokens(expected)
    for group, other in zip(found, expected, strict=True):
        for one, two in zip(group, other, strict=True):
            # Sums are in another order, and -6 alone is rounded by up to 2.4e-7.
            assert one.log_probs == pytest.approx(two.log_probs, abs=3e-6)


def test_keys_that_heads_share_are_not_copied_and_nothing_else_changes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = tiny_model(tokenizer).config
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    shared = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.mul_(4.0)
    wanted = [reference_greedy(shared, prompt, 8, [0]) for prompt in prompts()]

    def refuse(*_: Any) -> None:
        raise AssertionError("keys or values were copied")

    before = dict(ALL_ATTENTION_FUNCTIONS)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    engine = HfEngine(shared, tokenizer, batch_size=64)
    found = [group[0] for group in tokens(engine.generate([greedy(p, 8) for p in prompts()]))]
    assert found == wanted
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    with pytest.raises(AssertionError, match="were copied"):  # the check sees a copy
        shared(torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.tensor([[1, 1], [0, 1]]))


def test_layers_that_read_the_keys_of_others_decode_as_transformers_does(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64,
        vocab_size_per_layer_input=len(tokenizer), hidden_size_per_layer_input=8,
        altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
        eos_token_id=0, bos_token_id=0, pad_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config).eval()
    found = HfEngine(model, tokenizer).generate([greedy(prompt, 8) for prompt in prompts()])
    for prompt, (completion,) in zip(prompts(), found, strict=True):
        assert completion.token_ids == reference_greedy(model, prompt, 8, [0])


def test_cached_keys_have_the_dtype_that_attention_reads() -> None:
    """Under autocast keys come in float32, from the rotary embedding, and values in bfloat16."""
    layer = RoomyLayer()
    for _ in range(2):
        keys, values = layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).bfloat16())
        assert keys.dtype == values.dtype == torch.bfloat16
    assert keys.shape == (1, 2, 6, 4)


class ReadsOfNumbers(TorchDispatchMode):
    """Counts how often numbers or masks of tensors are asked for: a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten.index_put_.default):
            self.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func is aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_one_number_a_token_is_read_from_the_device(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch, temperatures: tuple[float, float]
) -> None:
    monkeypatch.setattr(engine, "stop_ids", set())
    counts = []
    for num_tokens in (8, 24):
        with ReadsOfNumbers() as reads:
            engine.generate([Request([5, 6], [0], value, num_tokens) for value in temperatures])
        counts.append(reads.count)
    assert counts[1] - counts[0] == 24 - 8
