"""The contract between what asks for completions and what samples them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol

import torch

from gsm8k_core.errors import ModelError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt, and a seed for each completion that is wanted of it.

    - `prompt_ids`: of its tokens;
    - `seeds`: one completion a seed; what is sampled depends on the seed, not on the batch;
    - `temperature`: logits are divided by it; 0 is greedy;
    - `max_new_tokens`: most tokens of a completion;
    - `stop`: texts at which it ends; its text is cut before them, its tokens are kept;
    - `top_p`: sample among the likeliest tokens that have this probability together (Holtzman et
      al. 2020); 1: among all;
    - `top_k`: sample among so many of the likeliest tokens, before `top_p` applies; 0: among all.
    """

    prompt_ids: list[int]
    seeds: list[int]
    temperature: float
    max_new_tokens: int
    stop: list[str] = field(default_factory=list)
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """What was sampled of a prompt with a seed.

    - `token_ids`: sampled ids, with the EOS that ended them. Train on these: never on re-tokenized
      text;
    - `log_probs`: of each of them, in nats, of the distribution that it was sampled from;
    - `finish_reason`: `stop`, an EOS or a stop text; `length`, cut at max_new_tokens;
    - `text`: decoded, without special tokens, cut before the stop text.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    text: str


OnDone = Callable[[int, list[Completion]], None]
"""Told of a request, by its index, once all of its completions are there."""


class Engine(Protocol):
    """Samples completions from a model of its own or from the one in training.

    Around an optimizer step: `sleep()`, the update, `load_weights(...)`, `wake()`. An engine with
    nothing to give back or to copy does nothing there.
    """

    name: str
    """`transformers` or `vllm`, as the settings call it."""
    tokenizer: Any
    """Of the model."""
    max_length: int | None
    """Most tokens of a prompt and its completion together; None where the model has no limit."""

    @property
    def drops_weights(self) -> bool:
        """Whether it has no weights after `sleep`, until they are loaded again."""
        ...

    def generate(
        self, requests: Iterable[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """Completions in the order of the requests and of their seeds.

        `on_done` hears of each request as it finishes, in any order. Raises ModelError for a
        request that is empty or too long, ValueError for one whose settings make no sense.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, given under their names in the transformers model, tied ones once.

        What the engine had cached of the old weights is dropped. Allowed while it sleeps.
        """
        ...

    def sleep(self) -> None:
        """Give back what memory can be given back until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready to generate; after `sleep`, if it `drops_weights`, load them first."""
        ...

    def close(self) -> None:
        """Free memory, ports and processes. The engine is of no use afterwards."""
        ...


def check_requests(
    requests: Iterable[Request], max_length: int | None, num_embeddings: int | None = None
) -> list[Request]:
    """The requests as a list. Raises ModelError for an empty one and one too long for the model.

    Raises ValueError for a temperature below 0 or not finite, a top_p or top_k that leaves no
    token, no new tokens, an empty stop text, a seed that is no integer from 0 on, and a prompt id
    that the model does not know; TypeError for prompt ids that are no integers, and for one stop
    text or one request in place of a list of them.
    """
    if isinstance(requests, Request):
        raise TypeError("requests is one Request: give a list of them")
    requests = list(requests)
    for request in requests:
        if isinstance(request.prompt_ids, str):
            raise TypeError(f"prompt_ids is the text {request.prompt_ids[:40]!r}: tokenize it")
        if isinstance(request.stop, str):
            raise TypeError(f"stop is the text {request.stop!r}: give a list of texts")
        # Of a tensor, or what a tokenizer returns, the items are something else.
        for token_id in request.prompt_ids:
            if not (type(token_id) is int or isinstance(token_id, Integral)) or token_id < 0:
                raise TypeError(
                    f"prompt_ids holds {token_id!r:.40}, expected whole numbers from 0 on: give "
                    "tokenizer(text)['input_ids'], one list for one prompt"
                )
        if num_embeddings is not None and max(request.prompt_ids, default=0) >= num_embeddings:
            raise ValueError(
                f"prompt_ids holds {max(request.prompt_ids)}, but the model has {num_embeddings} "
                "tokens: take the model's own tokenizer"
            )
        for seed in request.seeds:
            if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
                raise ValueError(f"a seed is {seed!r}: take an integer, 0 or above")
        if not 0.0 <= request.temperature < math.inf:
            raise ValueError(
                f"temperature is {request.temperature}: take 0 (greedy) or a number above 0"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}: take 1 or more")
        if not 0.0 < request.top_p <= 1.0:
            raise ValueError(f"top_p is {request.top_p}: take 1 (all tokens) or less, above 0")
        if request.top_k < 0:
            raise ValueError(f"top_k is {request.top_k}: take 0 (all tokens) or more")
        if "" in request.stop:
            raise ValueError("a stop text is empty, and would end every completion: leave it out")
        needed = len(request.prompt_ids) + request.max_new_tokens
        if not request.prompt_ids:
            raise ModelError("a prompt of no tokens cannot be continued")
        if max_length is not None and needed > max_length:
            raise ModelError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.max_new_tokens} "
                f"new ones need {needed} positions, but the model has {max_length}: "
                "lower max_new_tokens"
            )
    return requests


def in_order(completions: dict[int, Completion]) -> list[Completion]:
    """Completions of one request by the place of their seed."""
    return [completions[k] for k in sorted(completions)]


def completion_text(tokenizer: Any, token_ids: list[int], stop: list[str]) -> str:
    """Decoded without special tokens, cut where the first of the stop texts begins."""
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    # Of whole text: one token can hold several, and one stop text a part of another.
    begins = [text.find(stop_text) for stop_text in stop]
    return text[: min((place for place in begins if place >= 0), default=len(text))]
