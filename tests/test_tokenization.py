"""Prompt and response tokens to input_ids, labels and response_mask; microbatches and packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from gsm8k_core.tokenization import (
    collate,
    collate_packed,
    pack_examples,
    pad_token_id,
    split_by_token_budget,
    tokenize_prompt_and_output,
)

TOKEN_LISTS = st.lists(st.integers(1, 30), max_size=6)
PAIRS = st.lists(st.tuples(TOKEN_LISTS, TOKEN_LISTS), min_size=1, max_size=5).filter(
    lambda pairs: any(prompt or response for prompt, response in pairs)
)
LENGTHS = st.lists(st.integers(1, 40), max_size=25)


def word_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """Words to ids; adds <bos> in front when asked for special tokens, as Llama's does."""
    words = ["<bos>", "<eos>", "<pad>", "<unk>", "two", "plus", "is", "four", "five"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def test_prompt_and_output_are_joined_padded_on_the_right_and_shifted() -> None:
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="<eos>")
    batch = tokenize_prompt_and_output(
        ["two plus two is", "five is"], ["four <eos>", "five"], tokenizer
    )
    # joined: [4 5 4 6 7 1] and [8 6 8]; padded with 2 to 6; shifted to 5 positions
    assert batch["input_ids"].tolist() == [[4, 5, 4, 6, 7], [8, 6, 8, 2, 2]]
    assert batch["labels"].tolist() == [[5, 4, 6, 7, 1], [6, 8, 2, 2, 2]]
    assert batch["response_mask"].tolist() == [
        [False, False, False, True, True],  # 'four' and the EOS: it is learned too
        [False, True, False, False, False],
    ]
    assert batch["response_mask"].dtype == torch.bool
    assert set(batch) == {"input_ids", "labels", "response_mask"}


def test_no_special_token_is_added_to_prompt_or_output() -> None:
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<bos>")
    assert tokenizer("two")["input_ids"] == [0, 4]  # it would, if asked
    batch = tokenize_prompt_and_output(["<bos> two"], ["four"], tokenizer)
    assert batch["input_ids"].tolist() == [[0, 4]]  # the one BOS that the prompt holds
    assert batch["labels"].tolist() == [[4, 7]]


def test_the_pad_id_falls_back_to_eos_and_then_to_zero() -> None:
    assert pad_token_id(word_tokenizer(pad_token="<pad>", eos_token="<eos>")) == 2
    assert pad_token_id(word_tokenizer(eos_token="<eos>")) == 1
    assert pad_token_id(word_tokenizer()) == 0
    added = word_tokenizer(pad_token="<pad>", eos_token="<eos>")
    assert pad_token_id(added, num_embeddings=3) == 2
    assert pad_token_id(added, num_embeddings=2) == 1, "the model has no such token"
    assert pad_token_id(added, num_embeddings=1) == 0


def test_padding_with_the_eos_id_leaves_the_real_eos_in_the_mask() -> None:
    batch = collate([[5], [5, 6]], [[7, 1], [7, 8, 1]], pad_id=1)
    # rows [5 7 1 1 1] and [5 6 7 8 1]: the first 1 of row 0 is its EOS, the rest is padding
    assert batch["labels"].tolist() == [[7, 1, 1, 1], [6, 7, 8, 1]]
    assert batch["response_mask"].tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]


@settings(max_examples=60)
@given(pairs=PAIRS)
def test_collate_equals_a_loop_over_the_tokens(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = collate([prompt for prompt, _ in pairs], [response for _, response in pairs], 99)
    width = max(len(prompt) + len(response) for prompt, response in pairs) - 1
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(pairs), width)}
    for row, (prompt, response) in enumerate(pairs):
        joined = prompt + response
        for position in range(width):
            before = joined[position] if position < len(joined) else 99
            after = joined[position + 1] if position + 1 < len(joined) else 99
            in_response = len(prompt) <= position + 1 < len(joined)
            assert batch["input_ids"][row, position] == before
            assert batch["labels"][row, position] == after
            assert batch["response_mask"][row, position] == in_response


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1]], [[1], [2]], "1 prompts but 2 responses"),
        ([], [], "no tokens"),
        ([[], []], [[], []], "no tokens"),
    ],
)
def test_lists_that_do_not_match_or_hold_nothing_are_refused(
    prompts: list[list[int]], responses: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collate(prompts, responses, 0)
    with pytest.raises(ValueError, match="2 prompts but 1 outputs"):
        tokenize_prompt_and_output(["two", "two"], ["four"], word_tokenizer())


def test_one_text_in_place_of_a_list_is_refused_and_not_read_letter_by_letter() -> None:
    for prompts, outputs in (("two", "six"), (["two"], "s"), ("t", ["six"])):
        with pytest.raises(ValueError, match="lists of texts, found one text"):
            tokenize_prompt_and_output(prompts, outputs, word_tokenizer())


def test_texts_may_come_from_generators() -> None:
    texts = ["two", "four"]
    batch = tokenize_prompt_and_output(iter(texts), iter(texts), word_tokenizer())
    assert batch["response_mask"].tolist() == [[True], [True]]


# ------------------------------------------------------------------------------------ microbatches


def test_microbatches_hold_rows_of_similar_length_and_the_longest_come_first() -> None:
    # 10 alone would leave room for nothing (2·10 > 16); then 8 + 8 (16), then 3 + 2 + 1 (3·3 = 9)
    assert split_by_token_budget([3, 8, 1, 10, 8, 2], 16) == [[3], [1, 4], [0, 5, 2]]


@settings(max_examples=80)
@given(lengths=LENGTHS, budget=st.integers(1, 120))
def test_microbatches_hold_every_row_once_and_keep_to_the_budget(
    lengths: list[int], budget: int
) -> None:
    groups = split_by_token_budget(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded_tokens = len(group) * max(lengths[index] for index in group)
        assert padded_tokens <= budget or len(group) == 1
    assert groups == split_by_token_budget(list(lengths), budget)


# ----------------------------------------------------------------------------------------- packing


def test_packing_puts_each_example_in_the_first_row_with_room() -> None:
    # by length: 7 → row 0, 5 → row 1, 4 → row 1 (5 + 4 = 9), 3 → row 0 (7 + 3 = 10), 1 → row 1
    assert pack_examples([3, 7, 5, 1, 4], 10) == [[1, 0], [2, 4, 3]]


@settings(max_examples=80)
@given(lengths=LENGTHS, max_length=st.integers(40, 80))
def test_packed_rows_hold_every_example_once_and_never_too_many_tokens(
    lengths: list[int], max_length: int
) -> None:
    rows = pack_examples(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(tokens <= max_length for tokens in filled)
    # First fit: no two rows could have been one, so at most one row is half empty or more.
    assert sum(tokens * 2 <= max_length for tokens in filled) <= 1


def test_an_example_too_long_for_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="example 1 has 9 tokens, a row holds 8"):
        pack_examples([3, 9], 8)


def test_packed_examples_are_shifted_by_themselves_and_their_positions_restart() -> None:
    batch = collate_packed([[1, 2], [5], [7]], [[3], [6, 8], [9]], [[0, 1], [2]], pad_id=0)
    # example 0: 1 2 3, example 1: 5 6 8, example 2: 7 9; no label crosses from one to the next
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 6, 8], [9, 0, 0, 0]]
    assert batch["response_mask"].tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_logits_equal_unpacked_ones(attention: str) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "initializer_range": 0.5})).eval()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    prompts, responses = [[1, 2, 3], [4], [6, 7], [8]], [[9, 10, 11, 12], [13], [14, 15, 16], [17]]
    rows = [[0, 2, 1], [3]]
    packed = collate_packed(prompts, responses, rows, pad_id=0)
    plain = collate(prompts, responses, pad_id=0)
    with torch.no_grad():
        expected = model(plain["input_ids"]).logits
        inputs = {"input_ids": packed["input_ids"], "use_cache": False}
        found = model(**inputs, position_ids=packed["position_ids"]).logits
        leaking = model(**inputs).logits
    start = 0
    for index in rows[0]:
        length = len(prompts[index]) + len(responses[index]) - 1
        in_row = found[0, start : start + length]
        torch.testing.assert_close(in_row, expected[index, :length], atol=1e-5, rtol=1e-5)
        start += length
    torch.testing.assert_close(found[1, 0], expected[3, 0], atol=1e-5, rtol=1e-5)
    # Without position ids the examples see each other: the comparison can fail.
    assert (leaking[0, 6:9] - expected[2, :3]).abs().max() > 0.1
