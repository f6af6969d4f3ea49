"""Log-probabilities and entropies of given tokens, without the whole (B, T, V) logits.

Shapes: `B` rows, `T` positions, `V` vocabulary, `H` hidden width, `M` positions that are scored.

With a vocabulary of 150 000, the logits of one batch take more memory than the rest of a training
step. So the output layer runs inside the model's own forward, but only on the positions that count
and a chunk of them at a time, and its logits are computed again for the backward pass (unless they
are a single chunk).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# 128 MiB in float32. Fewer make the matrix products slow, more take memory (docs/benchmarks.md).
LOGITS_PER_CHUNK = 2**25


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy -Σ p·log p in nats of softmax(logits) over the last dimension.

    Finite, with a finite gradient, for any finite logits and for logits of -inf (probability 0),
    as long as one of them is finite. Half-precision logits are taken to float32.
    """
    log_probs = torch.log_softmax(_at_least_float32(logits), dim=-1)
    # 0·log 0 is 0 here; without the clamp it would be 0·(-inf), which is NaN.
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def get_response_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool = False,
) -> dict[str, torch.Tensor]:
    """Log-probability of every label given the tokens before it.

    `input_ids` and `labels` are (B, T), right-padded. Returns `log_probs` (B, T), float32, at every
    position (prompt and padding too: the caller masks), and `token_entropy` (B, T) if asked for.
    Both carry gradients. Dropout is the caller's: put the model in eval mode.
    """
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    return score_responses(
        model,
        input_ids,
        labels,
        everywhere,
        with_entropy=return_token_entropy,
        entropy_gradient=return_token_entropy,
    )


def score_responses(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Log-probability of the labels where `response_mask` is true, 0 elsewhere.

    `input_ids`, `labels` and `response_mask` are (B, T); `attention_mask` and `position_ids`, if
    given, too. Returns `log_probs` (B, T) in float32 and, `with_entropy`, `token_entropy` (B, T) in
    nats. Logits are divided by `temperature`, the one that the tokens were sampled with, so that
    these are log-probs of the distribution sampled from. The entropy carries a gradient only with
    `entropy_gradient`: most callers log it, and its gradient costs as much as that of the log-prob.

    For causal models of transformers, with or without PEFT adapters or FSDP2, no more than
    `chunk_size` × V logits (without one, `LOGITS_PER_CHUNK`) are scored at once. Any other module,
    and any model that changes its logits after the output layer (Gemma's soft-capping, Cohere's
    scale), is asked for plain logits.
    """
    if temperature <= 0.0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    head = _output_layer(model)
    scores = None
    if head is not None:
        # A cache is useless here, and with one transformers does not read packing off position_ids.
        inputs["use_cache"] = False
        with _scoring_in_place_of_logits(
            head, labels, response_mask, temperature, with_entropy, entropy_gradient, chunk_size
        ) as computed:
            scores = model(**inputs).logits
        if not _same_tensor(scores, computed):
            scores = None
    if scores is None:
        logits = model(**inputs).logits
        selected = _score_logits(
            logits[response_mask.bool()],
            labels[response_mask.bool()],
            temperature,
            with_entropy,
            entropy_gradient,
        )
        scores = _scatter(selected, response_mask)
    result = {"log_probs": scores[..., 0]}
    if with_entropy:
        result["token_entropy"] = scores[..., 1] if entropy_gradient else scores[..., 1].detach()
    return result


def _output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The layer that makes logits from hidden states, of a transformers causal model."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _same_tensor(returned: torch.Tensor, computed: list[torch.Tensor]) -> bool:
    """Whether the model returned the output layer's result as it was."""
    if len(computed) != 1 or returned.dtype != computed[0].dtype:
        return False
    return returned is computed[0] or torch.equal(returned, computed[0])


@contextmanager
def _scoring_in_place_of_logits(
    head: torch.nn.Module,
    labels: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
    chunk_size: int | None,
) -> Iterator[list[torch.Tensor]]:
    """Let `head` return scores (B, T, 1 or 2) instead of logits (B, T, V) within the block.

    The model's own forward is used, rather than its decoder and its head one after the other,
    because FSDP2 gathers the parameters that no block owns (embedding, norm, head) around it.
    Yields a list that receives what the head returned.
    """
    computed: list[torch.Tensor] = []
    replaced = head.__dict__.get("forward")  # set where another library has wrapped it already
    make_logits = head.forward

    def score_chunk(hidden: torch.Tensor, chunk_labels: torch.Tensor) -> torch.Tensor:
        logits = make_logits(hidden)
        return _score_logits(logits, chunk_labels, temperature, with_entropy, entropy_gradient)

    def score(hidden_states: torch.Tensor) -> torch.Tensor:
        mask = response_mask.bool()
        hidden, targets = hidden_states[mask], labels[mask]
        vocabulary = len(head.weight)  # type: ignore[arg-type]  # a tensor, in any output layer
        size = chunk_size or max(1, LOGITS_PER_CHUNK // vocabulary)
        if len(hidden) <= size:
            selected = score_chunk(hidden, targets)
        elif type(head) is torch.nn.Linear and head.bias is None and replaced is None:
            selected = _LinearScores.apply(
                hidden, head.weight, targets, temperature, with_entropy, entropy_gradient, size
            )
        else:
            chunks = zip(hidden.split(size), targets.split(size), strict=True)
            selected = torch.cat(
                [
                    checkpoint(score_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
                    for chunk in chunks
                ]
            )
        computed.append(_scatter(selected, mask))
        return computed[-1]

    head.forward = score
    try:
        yield computed
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


class _LinearScores(torch.autograd.Function):
    """`_score_logits(hidden @ weight.T, …)`, chunk by chunk, with its gradient written out.

    With p the softmax and H its entropy, the gradient of the log-prob of y with respect to the
    scaled logits is onehot(y) - p, that of H is -p·(log p + H). What autograd would add for every
    chunk, a gradient of `weight` of its own, is here added up in place, in `weight`'s precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        entropy_gradient: bool,
        size: int,
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            ctx.dtype = torch.get_autocast_dtype(device)
        ctx.temperature, ctx.size = temperature, size
        ctx.entropy_gradient = with_entropy and entropy_gradient
        columns = []
        matrix = weight.to(ctx.dtype)
        for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
            log_probs = _log_probs(rows.to(ctx.dtype), matrix, temperature)
            found = [log_probs.gather(-1, targets[:, None]).squeeze(-1)]
            if with_entropy:
                log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)
                found.append(-log_probs.exp().mul_(log_probs).sum(dim=-1))
            columns.append(torch.stack(found, dim=-1))
        scores = torch.cat(columns)
        ctx.save_for_backward(hidden, weight, labels, scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, scores = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        matrix = weight.to(ctx.dtype)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            rows = hidden[part].to(ctx.dtype)
            log_probs = _log_probs(rows, matrix, ctx.temperature)
            of_log_prob = gradient[part, 0, None]
            probs = log_probs.exp()
            if ctx.entropy_gradient:
                of_entropy = gradient[part, 1, None]
                log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)
                log_probs.add_(scores[part, 1, None]).mul_(of_entropy).add_(of_log_prob)
                of_logits = probs.mul_(log_probs).neg_()
            else:
                of_logits = probs.mul_(-of_log_prob)
            of_logits.scatter_add_(-1, labels[part, None], of_log_prob)
            of_logits = of_logits.to(ctx.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = of_logits @ matrix
            if weight_gradient is not None:
                if weight_gradient.dtype == ctx.dtype:
                    weight_gradient.addmm_(of_logits.T, rows)
                else:
                    weight_gradient += of_logits.T @ rows
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _log_probs(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-softmax of the scaled logits (M, V), in float32 at least."""
    logits = _at_least_float32(hidden @ weight.T)
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=-1)


def _score_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> torch.Tensor:
    """Log-prob of `labels` (M,) and, if asked for, the entropy, from logits (M, V): (M, 1 or 2)."""
    scaled = _at_least_float32(logits)
    if temperature != 1.0:
        scaled = scaled / temperature
    chosen = scaled.gather(-1, labels[:, None]).squeeze(-1)
    columns = [chosen - torch.logsumexp(scaled, dim=-1)]
    if with_entropy:
        columns.append(compute_entropy(scaled if entropy_gradient else scaled.detach()))
    return torch.stack(columns, dim=-1)


def _scatter(selected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows (M, C) to the true places of `mask` (B, T), 0 elsewhere: (B, T, C)."""
    scattered = selected.new_zeros((*mask.shape, selected.shape[-1]))
    return scattered.masked_scatter(mask.bool()[..., None].expand_as(scattered), selected)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
