"""The contract between what asks for completions and what samples them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt, and a seed for each completion that is wanted of it."""

    prompt_ids: list[int]
    seeds: list[int]
    """One completion a seed; what is sampled depends on the seed, not on the batch."""
    temperature: float
    """Logits are divided by it; 0 is greedy."""
    max_new_tokens: int
    stop: list[str] = field(default_factory=list)
    """Texts at which the completion ends; its text is cut before them, its tokens are kept."""


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    """Sampled ids, with the EOS that ended them. Train on these: never on re-tokenized text."""
    log_probs: list[float]
    """Of each sampled token, in nats, of the distribution that it was sampled from."""
    finish_reason: FinishReason
    """`stop`: an EOS or a stop text. `length`: cut at max_new_tokens."""
    text: str
    """Decoded, without special tokens, cut before the stop text."""


class Engine(Protocol):
    """Samples completions. The weights are those of the model it was built on."""

    def generate(self, requests: list[Request]) -> list[list[Completion]]:
        """Completions in the order of the requests and of their seeds."""
        ...
