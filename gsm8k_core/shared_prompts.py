"""Completions of one prompt in one row, so that a forward computes the prompt once.

A row is the prompt without its last token, then, for each completion, that last token and the
completion but its last. Every completion attends to the prompt and to itself, at the positions it
would have in a row of its own, so its scores are those of that row. What it costs is attention over
places that are then masked: `completions_per_row` says where it pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gsm8k_core.models import is_plain_decoder

# What is estimated to cost more than this share of a row for each completion is not worth it.
WORTH_IT = 0.9


@dataclass(frozen=True)
class ForwardCost:
    """Floating-point operations of a model's layers, up to a common factor."""

    per_token: float
    per_pair: float
    """Of a query and a key in attention."""

    @classmethod
    def of(cls, model: Any) -> ForwardCost | None:
        """None for a model that is not known to be right with prompts shared."""
        if not is_plain_decoder(model):
            return None
        config = model.config
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        kept = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
        parameters = sum(
            parameter.numel()
            for part in model.modules()
            if id(part) not in kept
            for parameter in part.parameters(recurse=False)
        )
        return cls(2.0 * parameters, 4.0 * config.num_hidden_layers * width)

    def of_row(self, length: int, causal: bool) -> float:
        """A causal kernel leaves out half of the pairs; one with a mask computes them all."""
        pairs = length * length / (2 if causal else 1)
        return length * self.per_token + pairs * self.per_pair


def completions_per_row(
    cost: ForwardCost | None,
    prompt_length: int,
    completion_lengths: Sequence[int],
    most_tokens: int,
) -> int:
    """How many of a prompt's completions should share it in one row; 1: none does.

    Lengths in tokens. The estimate takes all completions to be of their mean length, and so does
    the bound `most_tokens` of a row.
    """
    mean = sum(completion_lengths) / max(1, len(completion_lengths))
    fitting = int((most_tokens - prompt_length) / mean) if mean else 0
    number = min(len(completion_lengths), fitting)
    if cost is None or number < 2:
        return 1

    def estimate(count: int) -> float:
        length = round(prompt_length + count * mean)
        return cost.of_row(length, causal=count == 1) / count

    best = min(range(1, number + 1), key=estimate)
    return best if estimate(best) < WORTH_IT * estimate(1) else 1


@dataclass(frozen=True)
class SharedRows:
    """Where the tokens of shared rows come from; R rows of width W, on the right padded."""

    source_rows: torch.Tensor
    """(R, W), the row of each token among those of one completion each"""
    source_columns: torch.Tensor
    """(R, W), its column there, which is its position"""
    attention_mask: torch.Tensor
    """(R, 1, W, W), bool: whether a query (third) attends to a key (fourth)"""
    own: torch.Tensor
    """(R, W), bool: the token is a completion's own, neither prompt nor padding"""


def shared_width(rows: Sequence[int], prompt_length: int, lengths: Sequence[int]) -> int:
    """Tokens of a row in which completions `rows` share their prompt."""
    prefix = prompt_length - 1
    return prefix + sum(lengths[row] - prefix for row in rows)


def share_prompts(
    packs: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> SharedRows:
    """Lay the rows of each pack, which begin with the same prompt, into one row.

    `prompt_lengths` and `lengths` (in tokens of the input) are of all rows that packs name. A
    completion's own tokens start with the last one of the prompt, which predicts its first, and
    come in the order of the packs.
    """
    width = max(shared_width(pack, prompt_lengths[pack[0]], lengths) for pack in packs)
    shape = (len(packs), width)
    source_rows = torch.tensor([[pack[0]] for pack in packs]).repeat(1, width)
    source_columns = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1)  # -1 padding, 0 the prompt, 1 … the completions
    for place, pack in enumerate(packs):
        end = prompt_lengths[pack[0]] - 1
        source_columns[place, :end] = torch.arange(end)
        segments[place, :end] = 0
        for number, row in enumerate(pack, start=1):
            columns = torch.arange(prompt_lengths[row] - 1, lengths[row])
            start, end = end, end + len(columns)
            source_rows[place, start:end] = row
            source_columns[place, start:end] = columns
            segments[place, start:end] = number
    source_rows, source_columns, segments = (
        tensor.to(device) for tensor in (source_rows, source_columns, segments)
    )
    query, key = segments[:, :, None], segments[:, None, :]
    attends = (key == query) | ((key == 0) & (query > 0))
    attends &= source_columns[:, None, :] <= source_columns[:, :, None]
    return SharedRows(source_rows, source_columns, attends[:, None], segments > 0)
