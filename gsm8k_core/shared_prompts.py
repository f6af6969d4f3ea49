"""Completions of one prompt in one forward, which computes the prompt once.

One row holds all prompts of a microbatch, each without its last token, and behind them all
completions, each as that last token and the completion but its last. No padding lies between them,
and every layer computes each token once. In attention, prompts attend to themselves, and every
completion to its prompt and to itself, at the positions it would have in a row of its own, so its
scores are those of that row. There, and only there, tokens are padded, and the keys and values of a
prompt repeated.

`use_in` teaches a model this attention, by transformers' own interface for it; `score_responses`
takes the row.

Shapes: `S` tokens of the row, `P` prompts, `N` completions, `W` tokens of the longest prompt, `C`
of the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gsm8k_core.models import SHARED_PROMPTS_ATTENTION, is_plain_decoder
from gsm8k_core.tokenization import longest_first


@dataclass(frozen=True)
class Places:
    """Where tokens that lie end to end stand in a table of rows padded on the right."""

    num_rows: int
    num_columns: int
    of_tokens: torch.Tensor
    """(tokens,), the place of each, counted row by row"""
    tokens: torch.Tensor
    """(places,), the token in each; in padding, another row's"""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Places:
        """A row for each of `lengths`."""
        sizes = torch.tensor(lengths)
        taken = (torch.arange(max(lengths)) < sizes[:, None]).flatten()
        tokens = (taken.cumsum(0) - 1).clamp(min=0)
        of_tokens = taken.nonzero()[:, 0]
        return cls(len(lengths), max(lengths), of_tokens.to(device), tokens.to(device))

    @property
    def are_full(self) -> bool:
        """Whether there is no padding."""
        return len(self.of_tokens) == len(self.tokens)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, width) to (rows, heads, columns, width)."""
        shape = (self.num_rows, self.num_columns, *values.shape[1:])
        if not self.are_full:
            values = _Move.apply(values.flatten(1), self.tokens, self.of_tokens)
        return values.reshape(shape).transpose(1, 2)

    def without_padding(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, columns, heads, width) to (tokens, heads, width)."""
        flat = values.flatten(0, 1)
        if self.are_full:
            return flat
        return _Take.apply(flat.flatten(1), self.of_tokens).view(-1, *values.shape[2:])


class _Move(torch.autograd.Function):
    """Rows `index` of `values`, where each row that counts is named once; `inverse` undoes it.

    So the backward pass gathers by the inverse, where autograd, which cannot know that the rows are
    distinct, would add them up one by one.
    """

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class _Take(torch.autograd.Function):
    """Rows `places` of `values`, each once; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        zeros = gradient.new_zeros((ctx.num_rows, *gradient.shape[1:]))
        return zeros.index_copy_(0, places, gradient), None


class _Repeat(torch.autograd.Function):
    """Row `owners[n]` of `values` for each n: (P, …) to (N, …).

    Gradients are added up by a matrix product, in the same order every time.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(owners)
        ctx.num_rows = len(values)
        return values.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (owners,) = ctx.saved_tensors
        numbers = torch.arange(ctx.num_rows, device=owners.device)
        membership = (numbers[:, None] == owners).to(gradient.dtype)
        return (membership @ gradient.flatten(1)).view(ctx.num_rows, *gradient.shape[1:]), None


@dataclass(frozen=True)
class SharedRow:
    """Where the tokens of a row come from, and what attends to what."""

    source_rows: torch.Tensor
    """(1, S), the row of each token among those of one completion each"""
    source_columns: torch.Tensor
    """(1, S), its column there, which is its position"""
    own: torch.Tensor
    """(1, S), bool: the token is a completion's own"""
    attention_mask: torch.Tensor
    """(N, 1, C, W + C), bool: whether a completion's token (third) attends to a place of its prompt
    or itself (fourth)"""
    owners: torch.Tensor
    """(N,), the prompt of each completion"""
    prompts: Places
    """(P, W)"""
    completions: Places
    """(N, C)"""


def pack_group(prompt_length: int, lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Which of a prompt's completions, by index, go together and share it.

    `lengths` in tokens of the completions. Padding them to the longest costs attention alone; a new
    pack begins where it would be more places than the prompt has tokens, which is then computed
    again, or where a row would be longer than `most_tokens`.
    """
    packs: list[list[int]] = []
    longest = width = 0
    for index in longest_first(lengths):
        length = lengths[index]
        if packs and longest - length <= prompt_length and width + length <= most_tokens:
            packs[-1].append(index)
            width += length
        else:
            packs.append([index])
            longest, width = length, prompt_length + length
    return packs


def shared_width(pack: Sequence[int], prompt_lengths: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a row that the rows of `pack` take together, which share their prompt."""
    prefix = prompt_lengths[pack[0]] - 1
    return prefix + sum(lengths[row] - prefix for row in pack)


def share_prompts(
    packs: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> SharedRow:
    """Lay the rows of all packs into one; those of a pack begin with the same prompt.

    `prompt_lengths` and `lengths` (in tokens of the input) are of all rows that packs name. A
    completion's own tokens start with the last one of the prompt, which predicts its first, and
    come in the order of the packs.
    """
    rows = [row for pack in packs for row in pack]
    prefixes = [prompt_lengths[pack[0]] - 1 for pack in packs]
    starts = [0] * len(packs) + [prompt_lengths[row] - 1 for row in rows]
    ends = prefixes + [lengths[row] for row in rows]
    sizes = torch.tensor(ends) - torch.tensor(starts)
    num_prompt_tokens = sum(prefixes)
    places = torch.arange(int(sizes.sum()))
    # From a token's place in the row to its column.
    shifts = sizes.cumsum(0) - torch.tensor(ends)
    owners = torch.arange(len(packs)).repeat_interleave(torch.tensor([*map(len, packs)]))

    prompts = Places.of(prefixes, device)
    completions = Places.of(sizes[len(packs) :].tolist(), device)
    in_prompt = torch.arange(prompts.num_columns) < torch.tensor(prefixes)[:, None]
    length = completions.num_columns
    of_prompt = in_prompt[owners][:, None].expand(-1, length, -1)
    of_own = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), -1, -1)
    return SharedRow(
        source_rows=torch.tensor([pack[0] for pack in packs] + rows)
        .repeat_interleave(sizes)[None]
        .to(device),
        source_columns=(places - shifts.repeat_interleave(sizes))[None].to(device),
        own=(places >= num_prompt_tokens)[None].to(device),
        attention_mask=torch.cat([of_prompt, of_own], dim=-1)[:, None].to(device),
        owners=owners.to(device),
        prompts=prompts,
        completions=completions,
    )


def use_in(model: Any) -> bool:
    """Let `model` take a `shared_row`, in place; False for one not known to be right with it."""
    if not is_plain_decoder(model):
        return False
    AttentionInterface.register(SHARED_PROMPTS_ATTENTION, _attention)
    AttentionMaskInterface.register(SHARED_PROMPTS_ATTENTION, sdpa_mask)
    model.set_attn_implementation(SHARED_PROMPTS_ATTENTION)
    return True


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_row: SharedRow | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, heads, T, width) to (B, T, heads, width).

    It is that of `sdpa` but for a shared row. What pads the row at its end (`onednn`) attends to
    nothing.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if shared_row is None:
        return attend(module, query, key, value, attention_mask, **options)
    prompts, completions = shared_row.prompts, shared_row.completions
    sizes = [len(prompts.of_tokens), len(completions.of_tokens)]
    sizes.append(query.shape[2] - sum(sizes))
    parts = [tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    of_prompts = [prompts.pad(part[0]) for part in parts]
    own = [completions.pad(part[1]) for part in parts]
    keys, values = (
        torch.cat([_Repeat.apply(of_prompt, shared_row.owners), of_completion], dim=2)
        for of_prompt, of_completion in zip(of_prompts[1:], own[1:], strict=True)
    )
    after_own, _ = attend(module, own[0], keys, values, attention_mask, **options)
    attended = [completions.without_padding(after_own)]
    if sizes[0]:
        after_prompts, _ = attend(module, *of_prompts, None, **options)
        attended.insert(0, prompts.without_padding(after_prompts))
    if sizes[2]:
        attended.append(query.new_zeros(sizes[2], *attended[0].shape[1:]))
    return torch.cat(attended)[None], None
