"""Sampling with a transformers model, in process: the weights are the trainer's own.

Three things set it apart from calling `model.generate`. A prompt is prefilled once for all its
completions; rows that have finished leave the batch; and every completion has its own random
stream, so it does not depend on what else is in the batch.

Shapes: `R` rows still decoding, `P` prompts, `T` time, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gsm8k_core.engines.base import (
    Completion,
    FinishReason,
    OnDone,
    Request,
    check_lengths,
    completion_text,
    in_order,
)
from gsm8k_core.models import load_plain_weights, stop_token_ids
from gsm8k_core.tokenization import split_by_token_budget

log = logging.getLogger(__name__)

# Dropping finished rows copies the key-value cache, so it waits until it saves this share of rows.
COMPACT_BELOW = 0.8
# Tokens that the key-value cache has room for before it is copied to a larger place.
CACHE_ROOM = 64
# Tokens of prompts in one forward, padding included. On a CPU, more of them do not fit its cache,
# and lie in memory that is mapped anew for every operation (docs/experiments.md).
PREFILL_TOKENS = {"cpu": 2048}
PREFILL_TOKENS_OF_OTHERS = 65_536


class RoomyLayer(DynamicLayer):
    """A layer's key-value cache with room for more tokens: DynamicLayer copies it for each.

    `keys` and `values` (R, heads, T, width) are views of the part in use.
    """

    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (R, heads, new, width) each; returns all so far."""
        # Under autocast the rotary embedding leaves keys in float32, which attention would take to
        # the dtype of the values again for every token.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        if self.room is None or length > self.room[0].shape[-2]:
            self.room = (
                self._larger(self.keys, key_states, length),
                self._larger(self.values, value_states, length),
            )
        keys, values = self.room
        keys[:, :, before:length] = key_states
        values[:, :, before:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def place(
        self, rows: list[int], keys: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
    ) -> None:
        """Fill some rows of a cache for `shape` = (rows, tokens), at their right end."""
        num_rows, length = shape
        if self.room is None:
            self.lazy_initialization(keys, values)
            heads, width = keys.shape[1], keys.shape[3]
            size = (num_rows, heads, length + CACHE_ROOM, width)
            self.room = (keys.new_zeros(size), values.new_zeros(size))
            self.keys, self.values = (part[:, :, :length] for part in self.room)
        start = length - keys.shape[-2]
        for part, given in zip(self.room, (keys, values), strict=True):
            part[rows, :, start:length] = given

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self.room = None

    def _larger(self, old: torch.Tensor | None, new: torch.Tensor, length: int) -> torch.Tensor:
        rows, heads, _, width = new.shape
        larger = new.new_empty((rows, heads, length + CACHE_ROOM, width))
        if old is not None and old.numel():
            larger[:, :, : old.shape[-2]] = old
        return larger


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache, with room in the layers that keep every token."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@dataclass
class _Row:
    """One completion while it is being decoded."""

    request: Request
    seed: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: Completion | None = None


class HfEngine:
    """The Engine of a transformers model. `batch_size` bounds the completions decoded at once.

    `generate` takes `gsm8k_core.engines.base.Request`s and gives `Completion`s of the same module.
    Of the model's generation config only the EOS ids are used: no top-p, top-k or penalty.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        forward_context: Callable[[], Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.forward_context = forward_context or torch.no_grad
        self.stop_ids = set(stop_token_ids(model, tokenizer))
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.max_length = getattr(model.config, "max_position_embeddings", None)

    def generate(
        self, requests: list[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Dropout is off meanwhile; the model's mode is put back after."""
        check_lengths(requests, self.max_length)
        was_training = self.model.training
        self.model.eval()
        done: list[dict[int, Completion]] = [{} for _ in requests]
        try:
            for batch in self._batches(requests):
                with _keys_shared_by_heads():
                    rows = self._decode_batch([request for _, _, request in batch])
                for (index, first, _), group in zip(batch, rows, strict=True):
                    for k, row in enumerate(group, start=first):
                        assert row.finished is not None
                        done[index][k] = row.finished
                    if on_done and len(done[index]) == len(requests[index].seeds):
                        on_done(index, in_order(done[index]))
        finally:
            self.model.train(was_training)
        return [in_order(group) for group in done]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy into the model. Not called where that is the one in training: it has them."""
        load_plain_weights(self.model, weights)

    def sleep(self) -> None:
        """Nothing to give back: the key-value cache is gone with each batch."""

    def wake(self) -> None:
        """Nothing to do: see `sleep`."""

    def close(self) -> None:
        """Nothing to free beyond the model, which is its owner's."""

    def _batches(self, requests: list[Request]) -> list[list[tuple[int, int, Request]]]:
        """(index, first seed, request), alike in prompt length, up to `batch_size` rows a batch.

        A request for more completions than that is split.
        """
        pieces = [
            (index, start, replace(request, seeds=request.seeds[start : start + self.batch_size]))
            for index, request in enumerate(requests)
            for start in range(0, len(request.seeds), self.batch_size)
        ]
        batches: list[list[tuple[int, int, Request]]] = []
        num_rows = self.batch_size
        for index, first, request in sorted(pieces, key=lambda piece: len(piece[2].prompt_ids)):
            if num_rows + len(request.seeds) > self.batch_size:
                batches.append([])
                num_rows = 0
            batches[-1].append((index, first, request))
            num_rows += len(request.seeds)
        return batches

    def _decode_batch(self, requests: list[Request]) -> list[list[_Row]]:
        rows = [[_Row(request, seed) for seed in request.seeds] for request in requests]
        with torch.no_grad(), self.forward_context():
            self._decode(requests, [row for group in rows for row in group])
        return rows

    def _decode(self, requests: list[Request], rows: list[_Row]) -> None:
        device = self.model.device
        logits, mask, position, cache = self._prefill([r.prompt_ids for r in requests])

        # One row a completion: each prompt's cache stands once for every seed of it.
        counts = torch.tensor([len(request.seeds) for request in requests], device=device)
        expand = torch.repeat_interleave(torch.arange(len(requests), device=device), counts)
        if len(expand) != len(requests):
            cache.batch_select_indices(expand)
        logits, mask, position = logits[expand], mask[expand], position[expand]
        temperatures = torch.tensor([row.request.temperature for row in rows], device=device)
        uniforms = _uniforms(rows).to(device)
        active = rows

        for step in range(uniforms.shape[1]):
            tokens, log_probs = _sample(logits, temperatures, uniforms[:, step])
            for row, token, log_prob in zip(
                active, tokens.tolist(), log_probs.tolist(), strict=True
            ):
                if row.finished is None:
                    row.token_ids.append(token)
                    row.log_probs.append(log_prob)
                    row.finished = self._finish(row)
            keep = [i for i, row in enumerate(active) if row.finished is None]
            if not keep:
                return
            if len(keep) < COMPACT_BELOW * len(active):
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                active = [active[i] for i in keep]
                tokens, mask, position = tokens[kept], mask[kept], position[kept]
                temperatures, uniforms = temperatures[kept], uniforms[kept]
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]  # (R, V)

    def _prefill(
        self, prompts: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DynamicCache]:
        """Last logits (P, V), attention mask (P, T), last position (P,) and cache of prompts."""
        device = self.model.device
        budget = PREFILL_TOKENS.get(device.type, PREFILL_TOKENS_OF_OTHERS)
        groups = split_by_token_budget([len(prompt) for prompt in prompts], budget)
        mask = _left_pad(prompts, self.pad_id, device)[1]
        cache = _new_cache(self.model)
        # What keeps less than every token has a shape of its own.
        if len(groups) == 1 or not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
            return self._forward_prompts(prompts, cache), mask, mask.sum(-1) - 1, cache
        logits: list[torch.Tensor] = []
        for group in groups:
            part = _new_cache(self.model)
            logits.append(self._forward_prompts([prompts[row] for row in group], part))
            layers: Any = zip(cache.layers, part.layers, strict=True)
            for layer, of_part in layers:
                layer.place(group, of_part.keys, of_part.values, tuple(mask.shape))
        order = torch.tensor([row for group in groups for row in group], device=device).argsort()
        return torch.cat(logits)[order], mask, mask.sum(-1) - 1, cache

    def _forward_prompts(self, prompts: list[list[int]], cache: DynamicCache) -> torch.Tensor:
        """Last logits (P, V) of prompts, which the empty cache takes up."""
        input_ids, mask = _left_pad(prompts, self.pad_id, self.model.device)
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _finish(self, row: _Row) -> Completion | None:
        """The completion, if its last token ended it."""
        if row.token_ids[-1] in self.stop_ids:
            return self._completion(row, "stop")
        for stop in row.request.stop:
            # A stop text spans at most as many tokens as it has bytes, plus the one that begins it.
            tail = row.token_ids[-len(stop.encode("utf-8")) - 1 :]
            if stop in completion_text(self.tokenizer, tail, []):
                return self._completion(row, "stop")
        if len(row.token_ids) == row.request.max_new_tokens:
            return self._completion(row, "length")
        return None

    def _completion(self, row: _Row, reason: FinishReason) -> Completion:
        text = completion_text(self.tokenizer, row.token_ids, row.request.stop)
        return Completion(row.token_ids, row.log_probs, reason, text)


def _uniforms(rows: list[_Row]) -> torch.Tensor:
    """Draws from [0, 1) by each row's seed, one a token, (R, longest limit), float64."""
    uniforms = np.zeros((len(rows), max(row.request.max_new_tokens for row in rows)))
    for row, of_row in zip(rows, uniforms, strict=True):
        if row.request.temperature > 0.0:
            generator = np.random.Generator(np.random.Philox(key=row.seed))
            limit = row.request.max_new_tokens
            of_row[:limit] = generator.random(limit)
    return torch.from_numpy(uniforms)


def _left_pad(
    prompts: list[list[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (P, T) int64."""
    width = max(map(len, prompts))
    input_ids = [[pad_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def _sample(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token and its log-prob for each row, both (R,), by its draw in `uniforms` (R,).

    Inverse-CDF sampling with the row's own draw: the same seed takes the same token whatever the
    batch. Greedy rows take the argmax; their log-prob is that of the unscaled distribution.
    """
    greedy = temperatures == 0.0
    scaled = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
    log_probs = torch.log_softmax(scaled, dim=-1)  # (R, V)
    if bool(greedy.all()):
        tokens = log_probs.argmax(-1)
    else:
        cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
        # Scaled by the last entry, since a sum of rounded probabilities is not exactly 1.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=log_probs.shape[-1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, log_probs.argmax(-1), tokens)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


@contextlib.contextmanager
def _keys_shared_by_heads() -> Iterator[None]:
    """Let `sdpa` on a CPU read keys and values that several heads share as they are.

    Where there is a mask, transformers copies them for each head: with prompts of a thousand tokens
    four fifths of a decoding step (docs/experiments.md). What is computed is the same.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, heads, T, width) to (B, T, heads, width)."""
    if query.device.type != "cpu" or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None
