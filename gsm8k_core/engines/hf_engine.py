"""Sampling with a transformers model, in process: the weights are the trainer's own.

Three things set it apart from calling `model.generate`. A prompt is prefilled once for all its
completions; rows that have finished leave the batch; and every completion has its own random
stream, so it does not depend on what else is in the batch.

Shapes: `R` rows still decoding, `P` prompts, `T` time, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gsm8k_core.engines.base import (
    Completion,
    OnDone,
    Request,
    check_requests,
    completion_text,
    in_order,
)
from gsm8k_core.errors import ModelError
from gsm8k_core.models import (
    avoid_cudnn_attention,
    in_eval_mode,
    is_plain_decoder,
    load_plain_weights,
    max_positions,
    num_embeddings,
    spread_over_devices,
    stop_token_ids,
)
from gsm8k_core.tokenization import collate_prompts, pad_token_id, split_by_token_budget

log = logging.getLogger(__name__)

# Dropping finished rows copies the key-value cache, so it waits until it saves this share of rows.
COMPACT_BELOW = 0.8
# Tokens that the key-value cache has room for before it is copied to a larger place.
CACHE_ROOM = 64
# Tokens that gather before they are copied to the others, or an eighth of these if that is more.
# Attention reads so many at once: PyTorch multiplies smaller matrices without MKL, and slowly
# (docs/experiments.md).
MIN_NEWEST = 16
# Tokens of prompts in one forward, padding included. On a CPU, more of them do not fit its cache,
# and lie in memory that is mapped anew for every operation (docs/experiments.md).
PREFILL_TOKENS = {"cpu": 2048}
PREFILL_TOKENS_OF_OTHERS = 65_536

_ATTENTION_LOCK = threading.Lock()


class RoomyLayer(DynamicLayer):
    """A layer's key-value cache with room for more tokens: DynamicLayer copies it for each.

    `keys` and `values` (R, heads, T, width) are views of the part in use; the rest of `room` holds
    zeros.
    """

    def __init__(self, tokens_of_room: int = CACHE_ROOM) -> None:
        super().__init__()
        self.tokens_of_room = tokens_of_room
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

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

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self.room = None

    def _larger(self, old: torch.Tensor | None, new: torch.Tensor, length: int) -> torch.Tensor:
        rows, heads, _, width = new.shape
        larger = new.new_zeros((rows, heads, length + self.tokens_of_room, width))
        if old is not None and old.numel():
            larger[:, :, : old.shape[-2]] = old
        return larger


class TwoPartLayer(DynamicLayer):
    """A layer's key-value cache on a CPU: most tokens without a gap, the newest with room for more.

    A cache with room has gaps between its rows, and over these a CPU reads more slowly, at worst at
    less than half the speed (docs/experiments.md). So `keys` and `values` (R, heads, T, width) have
    none, and new tokens gather in `newest` until they are worth a copy of all. `_attend` reads both
    parts, and of the newer one places that are not taken yet: they hold zeros, and are masked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.newest = RoomyLayer(MIN_NEWEST)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (R, heads, new, width) each; returns the part that they went to."""
        if not self.get_seq_length():
            return super().update(key_states, value_states)
        if self.newest.get_seq_length() >= self.newest.tokens_of_room:
            self._join()
        return self.newest.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens in both parts."""
        return super().get_seq_length() + self.newest.get_seq_length()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._join()
        super().batch_select_indices(indices)

    def _join(self) -> None:
        keys, values = self.newest.keys, self.newest.values
        if keys is not None and values is not None:
            super().update(keys, values)
            self.newest = RoomyLayer(max(MIN_NEWEST, super().get_seq_length() // 8))


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache, with room in the layers that keep every token."""
    cache = DynamicCache(config=model.config)
    layer_class: type[DynamicLayer] = RoomyLayer
    # In bfloat16 `_attend` would round its scores, where PyTorch's kernel does not.
    in_float32 = model.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if model.device.type == "cpu" and in_float32 and is_plain_decoder(model):
        layer_class = TwoPartLayer
    cache.layers = [
        layer_class() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _check_model(model: PreTrainedModel) -> None:
    """Raise ModelError for a model of whose batch rows cannot be chosen.

    It keeps more than a cache of keys and values between tokens, or has that on several devices.
    """
    layers = DynamicCache(config=model.config).layers
    if getattr(model, "_is_stateful", False) or not all(
        hasattr(layer, "batch_select_indices") for layer in layers
    ):
        raise ModelError(
            f"{type(model).__name__}: the transformers engine samples from models with attention "
            "alone, and layers of this one keep a state; set engine: vllm (models.<name>.engine)"
        )
    if spread_over_devices(model):
        raise ModelError(
            f"{type(model).__name__}: the transformers engine samples from a model on one device, "
            "and this one is spread over several (device_map); vLLM shares one over GPUs "
            "(vllm.tensor_parallel)"
        )


def _has_two_parts(cache: DynamicCache) -> bool:
    """Whether its layers are `TwoPartLayer`s: all of them are, or none is."""
    return bool(cache.layers) and isinstance(cache.layers[0], TwoPartLayer)


class HfEngine:
    """The Engine of a transformers model. `batch_size` bounds the completions decoded at once.

    `generate` takes a list of `Request`s and returns for each a list of `Completion`s, in the order
    of its seeds. It raises ModelError for a prompt that is empty or too long for the model,
    ValueError and TypeError for requests that make no sense; so does the engine itself for a model
    that it cannot sample from (ModelError) and a `batch_size` below 1 (ValueError).

    The model lies on a CPU or an NVIDIA GPU. Of its generation config only the EOS ids are used: no
    top-p, top-k or penalty. On a GPU the process does without cuDNN's attention from then on
    (`avoid_cudnn_attention`).
    """

    name = "transformers"
    drops_weights = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        forward_context: Callable[[], Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: take 1 or more")
        _check_model(model)
        avoid_cudnn_attention(model.device)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.forward_context = forward_context or torch.no_grad
        self.stop_ids = set(stop_token_ids(model, tokenizer))
        self.pad_id = pad_token_id(tokenizer, num_embeddings(model))
        self.max_length = max_positions(model)

    def generate(
        self, requests: Iterable[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Dropout is off meanwhile; each part has its mode back after."""
        requests = check_requests(requests, self.max_length, num_embeddings(self.model))
        done: list[dict[int, Completion]] = [{} for _ in requests]
        with in_eval_mode(self.model):
            for batch in self._batches(requests):
                completions = iter(self._decode([request for _, _, request in batch]))
                for index, first, request in batch:
                    for k in range(first, first + len(request.seeds)):
                        done[index][k] = next(completions)
                    if on_done and len(done[index]) == len(requests[index].seeds):
                        on_done(index, in_order(done[index]))
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

    @torch.no_grad()
    def _decode(self, requests: list[Request]) -> list[Completion]:
        """A completion for every seed of every request, decoded as one batch."""
        device = self.model.device
        owners = [request for request in requests for _ in request.seeds]
        limits = torch.tensor([request.max_new_tokens for request in owners], device=device)
        temperatures = torch.tensor([request.temperature for request in owners])
        # Asked of the GPU at every token, it would wait each time.
        greedy = (bool((temperatures == 0.0).any()), bool((temperatures == 0.0).all()))
        temperatures = temperatures.to(device)
        nucleus = None
        if any(request.top_p < 1.0 or request.top_k for request in owners):
            nucleus = torch.tensor([(r.top_p, r.top_k) for r in owners], device=device)
        uniforms = _uniforms(requests).to(device)
        stop_ids = torch.tensor(sorted(self.stop_ids), device=device)
        # A stop text spans at most as many tokens as it has bytes, plus the one that begins it.
        num_bytes = [len(stop.encode("utf-8")) for owner in owners for stop in owner.stop]
        longest_stop = max(num_bytes, default=0)

        token_ids = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
        log_probs = torch.zeros(uniforms.shape, device=device)
        lengths, stopped = limits.clone(), torch.zeros_like(limits, dtype=torch.bool)
        active = torch.arange(len(owners), device=device)  # the rows that are decoded
        running = torch.ones_like(stopped)  # which of these have not finished

        with self.forward_context():
            logits, mask, position, cache = self._prefill([r.prompt_ids for r in requests])
            # One row a completion: each prompt's cache stands once for every seed of it.
            counts = torch.tensor([len(request.seeds) for request in requests], device=device)
            expand = torch.repeat_interleave(torch.arange(len(requests), device=device), counts)
            if len(expand) != len(requests):
                cache.batch_select_indices(expand)
            logits, mask, position = logits[expand], mask[expand], position[expand]

            for step in range(uniforms.shape[1]):
                tokens, chosen = _sample(logits, temperatures, greedy, uniforms[:, step], nucleus)
                token_ids[active, step], log_probs[active, step] = tokens, chosen
                ends = (tokens[:, None] == stop_ids).any(dim=-1)
                if longest_stop:
                    tail = token_ids[active, max(0, step - longest_stop) : step + 1]
                    ends |= self._ends_in_a_stop_text([owners[i] for i in active.tolist()], tail)
                ends &= running
                # Not `active[ends]`: to pick by a mask, the GPU would be waited for.
                stopped[active] |= ends
                lengths[active] = torch.where(ends, step + 1, lengths[active])
                running &= ~ends & (limits[active] > step + 1)
                num_running = int(running.sum())
                if not num_running:
                    break
                if num_running < COMPACT_BELOW * len(active):
                    kept = running.nonzero()[:, 0]
                    cache.batch_select_indices(kept)
                    active, running, tokens = active[kept], running[kept], tokens[kept]
                    mask, position = mask[kept], position[kept]
                    temperatures, uniforms = temperatures[kept], uniforms[kept]
                    nucleus = None if nucleus is None else nucleus[kept]
                position = position + running  # those done may have reached the model's last
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                logits = self._forward(cache, tokens[:, None], mask, position[:, None])

        if bool(log_probs.isnan().any()):
            raise ModelError(
                "the model's logits are NaN, so nothing can be sampled: its weights hold NaN or "
                "infinity (training has diverged?), or the prompt overflows its compute type"
            )
        return [
            Completion(
                ids[:length],
                of_tokens[:length],
                "stop" if has_stopped else "length",
                completion_text(self.tokenizer, ids[:length], request.stop),
            )
            for request, ids, of_tokens, length, has_stopped in zip(
                owners,
                token_ids.tolist(),
                log_probs.tolist(),
                lengths.tolist(),
                stopped.tolist(),
                strict=True,
            )
        ]

    def _forward(
        self,
        cache: DynamicCache,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Last logits (R, V) after `input_ids` (R, new), which the cache takes up.

        `mask` (R, T) is of all tokens, those in the cache too.
        """
        of_queries = mask
        if input_ids.shape[1] == 1 and _has_two_parts(cache):
            # Of four dimensions: transformers takes it as it is.
            of_queries = mask.bool()[:, None, None]
        with _attention_from(cache):
            return self.model(
                input_ids=input_ids,
                attention_mask=of_queries,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _prefill(
        self, prompts: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DynamicCache]:
        """Last logits (P, V), attention mask (P, T), last position (P,) and cache of prompts."""
        device = self.model.device
        budget = PREFILL_TOKENS.get(device.type, PREFILL_TOKENS_OF_OTHERS)
        groups = split_by_token_budget([len(prompt) for prompt in prompts], budget)
        mask = collate_prompts(prompts, self.pad_id, device)[1]
        cache = _new_cache(self.model)
        # Layers that drop tokens (a sliding window's) cannot be joined.
        whole = all(isinstance(layer, RoomyLayer | TwoPartLayer) for layer in cache.layers)
        if len(groups) == 1 or not whole:
            return self._forward_prompts(prompts, cache), mask, mask.sum(-1) - 1, cache
        logits: list[torch.Tensor] = []
        caches = []
        for group in groups:
            caches.append(_new_cache(self.model))
            logits.append(self._forward_prompts([prompts[row] for row in group], caches[-1]))
        order = torch.tensor([row for group in groups for row in group], device=device).argsort()
        for layer in cache.layers:
            parts: list[Any] = [part.layers.pop(0) for part in caches]  # none is kept for longer
            keys, values = (
                torch.cat(
                    [functional.pad(t, (0, 0, mask.shape[1] - t.shape[-2], 0)) for t in tensors]
                )[order]
                for tensors in ([part.keys for part in parts], [part.values for part in parts])
            )
            layer.update(keys, values)  # type: ignore[union-attr]  # these all take them
        return torch.cat(logits)[order], mask, mask.sum(-1) - 1, cache

    def _forward_prompts(self, prompts: list[list[int]], cache: DynamicCache) -> torch.Tensor:
        """Last logits (P, V) of prompts, which the empty cache takes up."""
        input_ids, mask = collate_prompts(prompts, self.pad_id, self.model.device)
        return self._forward(cache, input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))

    def _ends_in_a_stop_text(self, owners: list[Request], tail: torch.Tensor) -> torch.Tensor:
        """Whether the last of a row's newest tokens, `tail` (R, n), completes a stop text: (R,)."""
        found = [
            any(
                stop in completion_text(self.tokenizer, ids[-len(stop.encode("utf-8")) - 1 :], [])
                for stop in owner.stop
            )
            for owner, ids in zip(owners, tail.tolist(), strict=True)
        ]
        return torch.tensor(found, device=tail.device)


def _uniforms(requests: list[Request]) -> torch.Tensor:
    """Draws from [0, 1) by each seed, one a token, (R, longest limit), float64."""
    rows = [(request, seed) for request in requests for seed in request.seeds]
    uniforms = np.zeros((len(rows), max(request.max_new_tokens for request in requests)))
    for (request, seed), of_row in zip(rows, uniforms, strict=True):
        if request.temperature > 0.0:
            generator = np.random.Generator(np.random.Philox(key=seed))
            of_row[: request.max_new_tokens] = generator.random(request.max_new_tokens)
    return torch.from_numpy(uniforms)


def _likeliest(probabilities: torch.Tensor, nucleus: torch.Tensor) -> torch.Tensor:
    """The distributions (R, V) cut to their likeliest tokens by rows of top_p and top_k (R, 2)."""
    top_p, top_k = nucleus[:, :1], nucleus[:, 1:]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.where((top_k == 0) | (ranks < top_k), 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    likelier = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.where((top_p == 1.0) | (likelier < top_p), 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return kept.where((top_p < 1.0) | (top_k > 0), probabilities)


def _sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    any_and_all_greedy: tuple[bool, bool],
    uniforms: torch.Tensor,
    nucleus: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token and its log-prob for each row, both (R,), by its draw in `uniforms` (R,).

    Inverse-CDF sampling with the row's own draw: the same seed takes the same token whatever the
    batch. Greedy rows take the argmax; their log-prob is that of the unscaled distribution.
    `any_and_all_greedy`: whether any of the rows may be greedy, and whether all are. `nucleus` as
    in `_likeliest`.
    """
    any_greedy, all_greedy = any_and_all_greedy
    greedy = temperatures == 0.0
    scaled = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
    probabilities = scaled.softmax(dim=-1)  # (R, V)
    if nucleus is not None:
        probabilities = _likeliest(probabilities, nucleus)
    if all_greedy:
        tokens = scaled.argmax(-1)
    else:
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        # Scaled by the last entry, since a sum of rounded probabilities is not exactly 1.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=scaled.shape[-1] - 1)
        if any_greedy:
            tokens = torch.where(greedy, scaled.argmax(-1), tokens)
    chosen = probabilities.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()


@contextlib.contextmanager
def _attention_from(cache: DynamicCache) -> Iterator[None]:
    """Let `sdpa` on a CPU read `cache` as it lies, where transformers would copy keys and values.

    With a mask, transformers repeats those that several heads share for each of them: with prompts
    of a thousand tokens four fifths of a decoding step (docs/experiments.md). What is computed is
    the same. Other threads keep what there was, and one engine at a time may do so.
    """
    with _ATTENTION_LOCK:
        before = ALL_ATTENTION_FUNCTIONS["sdpa"]
        own = functools.partial(_attention, cache, threading.get_ident(), before)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _attention(
    cache: DynamicCache,
    thread: int,
    before: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, heads, T, width) to (B, T, heads, width).

    `before` computes what is not of `thread`, not on a CPU, or without a mask.
    """
    if threading.get_ident() != thread or query.device.type != "cpu" or attention_mask is None:
        return before(module, query, key, value, attention_mask, scaling=scaling, **options)
    if _has_two_parts(cache):
        number: Any = module.layer_idx
        layer: Any = cache.layers[number]
        if layer.newest.get_seq_length():
            return _attend(query, layer, attention_mask, scaling), None
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    layer: TwoPartLayer,
    attention_mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one token a row, (R, heads, 1, width), to both parts of a layer's cache.

    Gives (R, 1, heads, width). Over keys without gaps PyTorch's own kernel for CPUs takes up to
    twice as long for one token.
    """
    rows, heads, _, width = query.shape
    older: list[Any] = [layer.keys, layer.values]
    room: Any = layer.newest.room
    num_read = -(-layer.newest.get_seq_length() // MIN_NEWEST) * MIN_NEWEST
    newer = [tensor[:, :, :num_read] for tensor in room]
    # Heads that share keys lie next to each other.
    query = query.reshape(rows, older[0].shape[1], -1, width) * (scaling or width**-0.5)
    scores = torch.cat([query @ older[0].mT, query @ newer[0].mT], dim=-1)
    not_taken = scores.shape[-1] - attention_mask.shape[-1]
    scores.masked_fill_(~functional.pad(attention_mask, (0, not_taken)), -torch.inf)
    weights = scores.softmax(-1).split([older[0].shape[2], newer[0].shape[2]], dim=-1)
    return (weights[0] @ older[1] + weights[1] @ newer[1]).view(rows, 1, heads, width)
