"""From prompts and responses to the tensors that a causal language model is trained on.

Shapes: `B` rows, `T` positions after the shift (the longest row less one).

Everything stands on token ids: what was sampled is what is trained on. Text is tokenized in
`tokenize_prompt_and_output` alone, without special tokens, since a rendered prompt already holds
the ones it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, required

Batch = dict[str, Any]
"""Tensors by name; typed Any so that `**batch` passes as keyword arguments."""
TokenIds = Sequence[int]


def checked_token_ids(row: Json, key: str, where: str, vocab_size: int) -> list[int]:
    """The token ids of a response in a JSONL row. Raises DataError that begins with `where`."""
    ids = required(row, key, list, where)
    if not ids:
        raise DataError(f"{where}: '{key}' holds no token")
    for place, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise DataError(
                f"{where}: '{key}' should hold token ids from 0 to {vocab_size - 1}, found "
                f"{token_id!r:.40} at place {place}; was it made with another model?"
            )
    return ids


def pad_token_id(tokenizer: Any, num_embeddings: int | None = None) -> int:
    """The tokenizer's pad id; without one its EOS id; without either 0.

    Any token of the model will do: the mask, not this id, says what is padding. A pad token that
    was added to a tokenizer is one only after `model.resize_token_embeddings`: one that is not
    below `num_embeddings`, if given, is passed over.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and (num_embeddings is None or token_id < num_embeddings):
            return int(token_id)
    return 0


def tokenize_prompt_and_output(
    prompt_strs: Iterable[str], output_strs: Iterable[str], tokenizer: Any
) -> Batch:
    """Tokenize prompts and outputs separately, join each pair, pad on the right and shift.

    Returns `input_ids`, `labels` (int64) and `response_mask` (bool), each (B, T) with T the longest
    joined row less one; the mask is true where the label is a token of the output. No special token
    is added: an output that the model is to learn to end ends in `tokenizer.eos_token`. What a
    model has sampled goes to `collate`, as the ids that it sampled: some tokenizers put a space
    before every text. Raises ValueError if the two are no lists, differ in length or hold nothing.
    """
    if isinstance(prompt_strs, str) or isinstance(output_strs, str):
        raise ValueError("prompts and outputs are lists of texts, found one text")
    prompt_strs, output_strs = list(prompt_strs), list(output_strs)
    if len(prompt_strs) != len(output_strs):
        raise ValueError(f"{len(prompt_strs)} prompts but {len(output_strs)} outputs")
    prompt_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt_strs]
    output_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in output_strs]
    return collate(prompt_ids, output_ids, pad_token_id(tokenizer))


def collate(prompt_ids: Sequence[TokenIds], response_ids: Sequence[TokenIds], pad_id: int) -> Batch:
    """Join each prompt and response, pad on the right and shift by one.

    Both are B lists of token ids, as `encode_prompts` gives and `Completion.token_ids` holds them.
    `pad_id` may be any token of the model, such as its EOS: the mask says what is padding.

    Returns `input_ids`, `labels` (int64) and `response_mask` (bool), each (B, T) with T the longest
    joined row less one. A token at the very start of a row has nothing before it and is no label,
    even where the prompt is empty. A causal model needs no attention mask for such rows: no token
    of a response sees the padding after it. Raises ValueError if the lists differ in length or hold
    nothing.
    """
    _check_pairs(prompt_ids, response_ids)
    num_positions = max(
        len(prompt) + len(response)
        for prompt, response in zip(prompt_ids, response_ids, strict=True)
    )
    rows = torch.full((len(prompt_ids), num_positions), pad_id, dtype=torch.int64)
    in_response = torch.zeros(rows.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        end = len(prompt) + len(response)
        rows[row, :end] = torch.tensor([*prompt, *response], dtype=torch.int64)
        in_response[row, len(prompt) : end] = True
    return {
        "input_ids": rows[:, :-1].contiguous(),
        "labels": rows[:, 1:].contiguous(),
        "response_mask": in_response[:, 1:].contiguous(),
    }


def collate_prompts(
    prompts: Sequence[TokenIds], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T) int64: padded on the left, to be continued."""
    width = max(map(len, prompts))
    input_ids = [[pad_id] * (width - len(ids)) + [*ids] for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The indices of `lengths`, longest first; ties by index."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def split_by_token_budget(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group the indices of `lengths` into microbatches of at most so many tokens, padding included.

    `lengths` are of whole rows, prompt and response, in tokens. Rows of similar length go together;
    the longest come first, so that a run that does not fit in memory fails at its first microbatch.
    A row that is longer than the budget has a group of its own. Every index is in exactly one
    group; ties are broken by index.
    """
    groups: list[list[int]] = []
    width = 0
    for index in longest_first(lengths):
        if groups and (len(groups[-1]) + 1) * width <= tokens_per_microbatch:
            groups[-1].append(index)
        else:
            groups.append([index])
            width = lengths[index]
    return groups


def pack_examples(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Group the indices of `lengths` into rows of at most `max_length` tokens.

    First-fit decreasing; ties are broken by index. Raises ValueError that names the index of an
    example that is too long for any row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in longest_first(lengths):
        if lengths[index] > max_length:
            raise ValueError(
                f"example {index} has {lengths[index]} tokens, a row holds {max_length}: "
                "leave it out or raise max_length"
            )
        row = next((row for row, room in enumerate(free) if room >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(max_length)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def collate_packed(
    prompt_ids: Sequence[TokenIds],
    response_ids: Sequence[TokenIds],
    rows: Sequence[Sequence[int]],
    pad_id: int,
) -> Batch:
    """Lay the examples `rows[b]` end to end in row b, each shifted by itself.

    Returns what `collate` does and `position_ids` (B, T), which start at 0 for every example and
    for the padding. From them transformers builds a mask in which no example sees another, for the
    attention implementations eager and sdpa, as long as neither an attention mask nor a cache is
    given; flash_attention_2 does so only for a single row (B = 1).
    """
    _check_pairs(prompt_ids, response_ids)
    shifted = [
        [_shift(prompt_ids[index], response_ids[index]) for index in members] for members in rows
    ]
    width = max(sum(len(inputs) for inputs, _, _ in members) for members in shifted)
    shape = (len(rows), width)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "labels": torch.full(shape, pad_id, dtype=torch.int64),
        "response_mask": torch.zeros(shape, dtype=torch.bool),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
    }
    for row, members in enumerate(shifted):
        start = 0
        for inputs, labels, in_response in members:
            end = start + len(inputs)
            batch["input_ids"][row, start:end] = torch.tensor(inputs, dtype=torch.int64)
            batch["labels"][row, start:end] = torch.tensor(labels, dtype=torch.int64)
            batch["response_mask"][row, start:end] = torch.tensor(in_response, dtype=torch.bool)
            batch["position_ids"][row, start:end] = torch.arange(end - start)
            start = end
        batch["position_ids"][row, start:] = torch.arange(width - start)
    return batch


def _shift(prompt: TokenIds, response: TokenIds) -> tuple[list[int], list[int], list[bool]]:
    """Inputs, labels and response mask of one example, without padding."""
    ids = [*prompt, *response]
    in_response = [False] * len(prompt) + [True] * len(response)
    return ids[:-1], ids[1:], in_response[1:]


def _check_pairs(prompt_ids: Sequence[TokenIds], response_ids: Sequence[TokenIds]) -> None:
    if len(prompt_ids) != len(response_ids):
        raise ValueError(f"{len(prompt_ids)} prompts but {len(response_ids)} responses")
    if not any(len(ids) > 0 for ids in (*prompt_ids, *response_ids)):
        raise ValueError("no tokens: every prompt and every response is empty")
