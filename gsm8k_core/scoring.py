"""Log-probabilities and entropies of given tokens, without the whole (B, T, V) logits.

Shapes: `B` rows, `T` positions, `V` vocabulary, `H` hidden width, `M` positions that are scored.

With a vocabulary of 150 000, the logits of one batch take more memory than the rest of a training
step. So the output layer runs inside the model's own forward, but only on the positions that count
and for a block of the vocabulary at a time, small enough for the processor's cache; its logits are
computed again for the backward pass, but for those of the first blocks, as many as may be kept.
Whole logits are computed once, and read and written in main memory many times (docs/benchmarks.md
compares).
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gsm8k_core import onednn
from gsm8k_core.compiling import compile_error
from gsm8k_core.masking import at_least_float32
from gsm8k_core.models import avoid_cudnn_attention, max_positions, spread_over_devices
from gsm8k_core.onednn import OneDnnLinear, matmul_transposed
from gsm8k_core.shared_prompts import SharedRow

log = logging.getLogger(__name__)

# Of all positions and a block of the vocabulary: 4 MiB in float32, for a CPU's cache. A GPU wants
# few blocks: starting their kernels takes longer than small ones run (docs/experiments.md).
LOGITS_PER_BLOCK = {"cpu": 2**20}
LOGITS_PER_BLOCK_OF_OTHERS = 2**26
# So narrow a block makes the matrix products slow, and takes no more than the hidden states do.
MIN_BLOCK_WIDTH = 256
# A GPU's matrix products want rows that begin at multiples of 16 bytes: others take several times
# as long (docs/experiments.md).
BLOCK_STEP = 64
# Held while an output layer is replaced, which all threads see.
_SCORING = threading.RLock()
# Output layers whose models change logits afterwards: these are asked for logits at once.
_OF_CHANGED_LOGITS: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
# Up to so many logits (64 MiB in float32) are kept for the backward pass.
LOGITS_KEPT = 2**24


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy -Σ p·log p in nats of softmax(logits) over the last dimension.

    Finite, with a finite gradient, for any finite logits and for logits of -inf (probability 0),
    as long as one of them is finite. Half-precision logits are taken to float32.
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=-1)
    # 0·log 0 is 0 here; without the clamp it would be 0·(-inf), which is NaN.
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def get_response_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool = False,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Log-probability in nats of every label given the tokens before it.

    `input_ids` and `labels` are (B, T), right-padded; `labels[b, t]` is the token that follows
    `input_ids[b, t]`, as `tokenize_prompt_and_output` shifts them. Returns `log_probs` (B, T), of
    float32 at least, at every position (prompt and padding too: the caller masks), and
    `token_entropy` (B, T) if asked for. Both carry gradients. Logits are divided by `temperature`:
    for tokens that the model has sampled, give theirs, or these are log-probs of another
    distribution than an engine's. Dropout is the caller's: put the model in eval mode. Raises
    ValueError for a label that is no token (-100 too: what stands in the padding must be one,
    whichever) and for shapes that differ.
    """
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    return score_responses(
        model,
        input_ids,
        labels,
        everywhere,
        temperature=temperature,
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
    shared_row: SharedRow | None = None,
) -> dict[str, torch.Tensor]:
    """Log-probability of the labels where `response_mask` is true, 0 elsewhere.

    `input_ids`, `labels` and `response_mask` are (B, T); `attention_mask` and `position_ids`, if
    given, too: rows that are padded on the left want both. With a `shared_row` (`shared_prompts`)
    all are of that row, (1, S), which has its own mask and positions. Returns `log_probs` (B, T),
    of float32 at least, and, `with_entropy`, `token_entropy` (B, T) in nats; under autocast, of
    logits that its type has rounded. Logits are divided by `temperature`, the one that the tokens
    were sampled with, so that these are log-probs of the distribution sampled from. The entropy
    carries a gradient only with `entropy_gradient`: most callers log it, and its gradient costs as
    much as that of the log-prob.

    For causal models of transformers, with or without PEFT adapters or FSDP2, the logits that exist
    at once are `LOGITS_KEPT` and a few blocks of `LOGITS_PER_BLOCK`, on other devices than a CPU
    `LOGITS_PER_BLOCK_OF_OTHERS` (more only with over 100 000 positions). Any other module, and any
    model that changes its logits after the output layer (Gemma's soft-capping, Cohere's scale) or
    is spread over devices, is asked for plain logits. On a GPU the process does without cuDNN's
    attention from then on (`avoid_cudnn_attention`). Raises ValueError for a label outside the
    vocabulary where the mask is true, and for shapes that differ.
    """
    avoid_cudnn_attention(input_ids.device)
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    if input_ids.ndim != 2 or len(input_ids) == 0:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}: expected (B, T) with B of 1 or more; "
            "input_ids[None] for one row"
        )
    for name, tensor in (("labels", labels), ("response_mask", response_mask)):
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and {name} {tuple(tensor.shape)} must have "
                "the same shape"
            )
    head = _output_layer(model)
    num_positions = input_ids.shape[-1]
    # How long rows may be made: those with a mask or positions of their own stay as they are.
    has_own_mask = attention_mask is not None or position_ids is not None
    longest: float = 0 if has_own_mask else max_positions(model) or 0
    if shared_row is not None:
        attention_mask, position_ids = shared_row.attention_mask, shared_row.source_columns
        longest = math.inf  # its parts are as long as the model allows, not it
    more = _width_to_compute(head, num_positions, longest) - num_positions
    if more:  # `pad` copies even where it adds nothing
        input_ids, labels, response_mask = (
            functional.pad(tensor, (0, more)) for tensor in (input_ids, labels, response_mask)
        )
        if position_ids is not None:
            position_ids = functional.pad(position_ids, (0, more))
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if shared_row is not None:
        inputs["shared_row"] = shared_row
    scores = None
    if head is not None:
        # A cache is useless here, and with one transformers does not read packing off position_ids.
        inputs["use_cache"] = False
        with (
            _SCORING,
            _scoring_in_place_of_logits(
                head, labels, response_mask, temperature, with_entropy, entropy_gradient
            ) as computed,
        ):
            scores = model(**inputs).logits
        if not _as_computed(scores, computed):
            scores = None
            computed.clear()  # or what that forward keeps for its backward would stay
            _OF_CHANGED_LOGITS.add(head)
    if scores is None:
        logits, mask = model(**inputs).logits, response_mask.bool()
        targets = labels[mask]
        _check_labels(targets, logits.shape[-1])
        selected = _score_logits(logits[mask], targets, temperature, with_entropy, entropy_gradient)
        scores = _scatter(selected, response_mask)
    scores = scores[:, :num_positions]
    result = {"log_probs": scores[..., 0]}
    if with_entropy:
        result["token_entropy"] = scores[..., 1] if entropy_gradient else scores[..., 1].detach()
    return result


def _output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The layer that makes logits from hidden states, of a transformers causal model.

    None where scores cannot take the place of its logits: they are changed later, or made on
    another GPU than that of the input.
    """
    find = getattr(model, "get_output_embeddings", None)
    if find is None or spread_over_devices(model):
        return None
    head: torch.nn.Module = find()
    return None if head in _OF_CHANGED_LOGITS else head


def _width_to_compute(head: torch.nn.Module | None, width: int, longest: float) -> int:
    """Positions of rows, rounded up so that shapes repeat and oneDNN uses its kernels again."""
    if not isinstance(head, OneDnnLinear) or not onednn.applies_to(head.weight, head.weight):
        return width
    padded = onednn.repeating_size(width)
    return padded if padded <= longest else width


def _check_labels(labels: torch.Tensor, vocabulary: int) -> None:
    if bool(((labels < 0) | (labels >= vocabulary)).any()):
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but the vocabulary has "
            f"{vocabulary} tokens (where nothing counts, put any token and mask it: not -100)"
        )


def _as_computed(returned: torch.Tensor, computed: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether the model returned the output layer's result itself, and as it was.

    An equal tensor will not do: logits that are cut to a part of the vocabulary leave scores alone.
    """
    if len(computed) != 1:
        return False
    tensor, version = computed[0]
    return returned is tensor and tensor._version == version


@contextmanager
def _scoring_in_place_of_logits(
    head: torch.nn.Module,
    labels: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Let `head` return scores (B, T, 1 or 2) instead of logits (B, T, V) within the block.

    For this thread: others get logits, and wait with scoring of their own.

    The model's own forward is used, rather than its decoder and its head one after the other,
    because FSDP2 gathers the parameters that no block owns (embedding, norm, head) around it.
    Yields a list that receives what the head returned, with its version: how often it has been
    changed in place.
    """
    computed: list[tuple[torch.Tensor, int]] = []
    replaced = head.__dict__.get("forward")  # set where another library has wrapped it already
    make_logits = head.forward
    thread = threading.get_ident()

    def score_chunk(hidden: torch.Tensor, chunk_labels: torch.Tensor) -> torch.Tensor:
        logits = make_logits(hidden)
        return _score_logits(logits, chunk_labels, temperature, with_entropy, entropy_gradient)

    def score(hidden_states: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() != thread:
            return make_logits(hidden_states)
        mask = response_mask.bool()
        hidden, targets = hidden_states[mask], labels[mask]
        vocabulary = len(head.weight)  # type: ignore[arg-type]  # a tensor, in any output layer
        _check_labels(targets, vocabulary)
        if type(head) in (torch.nn.Linear, OneDnnLinear) and head.bias is None and replaced is None:
            count = len(hidden)
            more = onednn.repeating_size(count) - count
            if more and onednn.applies_to(hidden, head.weight):
                hidden = functional.pad(hidden, (0, 0, 0, more))
                targets = functional.pad(targets, (0, more))
            selected = _LinearScores.apply(
                hidden, head.weight, targets, temperature, with_entropy, entropy_gradient
            )[:count]
        elif hidden.shape[0] * vocabulary <= LOGITS_KEPT:
            selected = score_chunk(hidden, targets)
        else:
            size = max(1, LOGITS_KEPT // vocabulary)
            chunks = zip(hidden.split(size), targets.split(size), strict=True)
            selected = torch.cat(
                [
                    checkpoint(
                        score_chunk,
                        *chunk,
                        use_reentrant=False,
                        preserve_rng_state=head.training,  # an adapter may have dropout
                    )
                    for chunk in chunks
                ]
            )
        scores = _scatter(selected, mask)
        if scores.is_inference():  # of which changes are not counted
            with torch.inference_mode(False):
                scores = scores.clone()
        computed.append((scores, scores._version))
        return scores

    head.forward = score
    try:
        yield computed
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


class _LinearScores(torch.autograd.Function):
    """`_score_logits(hidden @ weight.T, …)`, one block of the vocabulary after the other.

    Within a block b, let Z_b be the sum of exp(logit) and H_b the entropy of softmax(logits of b).
    With w_b = Z_b / ΣZ, the log-prob of y is its logit - log ΣZ and the entropy Σ w_b·(H_b -
    log w_b). With p the softmax of all logits, the gradient of the log-prob with respect to the
    scaled logits is onehot(y) - p, that of the entropy H is -p·(log p + H).

    The gradient of a block's rows of `weight` is written once, that of `hidden` (M, H) is added up
    over the blocks, in float32 at least.
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
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            ctx.dtype = torch.get_autocast_dtype(device)
        ctx.temperature = temperature
        ctx.entropy_gradient = with_entropy and entropy_gradient
        ctx.blocks = _blocks(len(weight), len(hidden), _logits_per_block(device))
        # The first blocks, for the backward pass; of the others the logits are made again.
        num_kept = LOGITS_KEPT // max(1, len(hidden)) if any(ctx.needs_input_grad) else 0
        rows = hidden.to(ctx.dtype)
        kept = []
        # Made before the loop: a small tensor that outlives its turn would cut the place of a block
        # in two, and the memory would grow by a block each turn.
        chosen, log_sums, entropies = (
            torch.zeros(shape, dtype=at_least_float32(rows[:0]).dtype, device=hidden.device)
            for shape in [(len(hidden),), *[(len(ctx.blocks), len(hidden))] * 2]
        )
        statistics_of = _fused(_block_statistics, device)
        for number, block in enumerate(ctx.blocks):
            logits = matmul_transposed(rows, weight[block].to(ctx.dtype))
            places, here = _places(labels, block)
            log_sums[number], entropy = statistics_of(logits, temperature, with_entropy)
            if entropy is not None:
                entropies[number] = entropy
            found = _scaled(logits.gather(-1, places)[:, 0], temperature)
            chosen += torch.where(here, found, 0.0)
            if block.stop <= num_kept:
                kept.append(logits)
            del logits  # before those of the next block are made
        log_sum = log_sums.logsumexp(dim=0)
        columns = [chosen - log_sum]
        if with_entropy:
            log_weights = log_sums - log_sum
            columns.append((log_weights.exp() * (entropies - log_weights)).sum(dim=0))
        scores = torch.stack(columns, dim=-1)
        ctx.save_for_backward(hidden, weight, labels, scores, log_sum, *kept)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, scores, log_sum, *kept = ctx.saved_tensors
        device = hidden.device.type
        rows = hidden.to(ctx.dtype)
        hidden_gradient = torch.zeros_like(at_least_float32(hidden))
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_label = gradient[:, 0] / ctx.temperature
        # p·(constant + slope·log p) is minus the gradient of the logits, but for the label's own.
        constant, slope = of_label, None
        if ctx.entropy_gradient:
            slope = gradient[:, 1] / ctx.temperature
            constant = of_label + slope * scores[:, 1]
        of_label = of_label + _gradient_of_logits_(scores[:, 0].clone(), constant, slope)
        gradient_of = _fused(_block_gradient, device)
        for number, block in enumerate(ctx.blocks):
            matrix = weight[block].to(ctx.dtype)
            logits = kept[number] if number < len(kept) else matmul_transposed(rows, matrix)
            of_logits = gradient_of(logits, ctx.temperature, log_sum, constant, slope)
            places, here = _places(labels, block)
            others = of_logits.gather(-1, places)
            own = of_label[:, None].to(others.dtype)
            of_logits.scatter_(-1, places, torch.where(here[:, None], own, others))
            hidden_gradient += matmul_transposed(of_logits, matrix.T)
            if weight_gradient is not None:
                weight_gradient[block] = matmul_transposed(of_logits.T, rows.T)
            del logits, of_logits
        return hidden_gradient.to(hidden.dtype), weight_gradient, None, None, None, None


def _block_statistics(
    logits: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log Z_b and, if asked for, H_b, each (M,), of a block's unscaled logits (M, width)."""
    scaled = _scaled(logits, temperature)
    largest = scaled.amax(dim=-1)
    scaled = scaled - largest[:, None]
    exponentials = scaled.exp()
    total = exponentials.sum(dim=-1)
    log_total = total.log()
    entropy = None
    if with_entropy:
        entropy = log_total - exponentials.mul_(scaled).sum(dim=-1) / total
    return log_total + largest, entropy


def _block_gradient(
    logits: torch.Tensor,
    temperature: float,
    log_sum: torch.Tensor,
    constant: torch.Tensor,
    slope: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a block's unscaled logits (M, width), as if no label were in it."""
    log_probs = _scaled(logits, temperature) - log_sum[:, None]
    columns = None if slope is None else slope[:, None]
    return _gradient_of_logits_(log_probs, constant[:, None], columns).to(logits.dtype)


def _gradient_of_logits_(
    log_probs: torch.Tensor, constant: torch.Tensor, slope: torch.Tensor | None
) -> torch.Tensor:
    """-p·(constant + slope·log p); overwrites `log_probs`."""
    probabilities = log_probs.exp()
    if slope is None:
        return probabilities.mul_(-constant)
    return probabilities.mul_(log_probs.mul_(-slope).sub_(constant))


def _places(labels: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the labels within a block, (M, 1), and whether they are there at all, (M,)."""
    places = labels - block.start
    last = block.stop - block.start - 1
    return places.clamp(0, last)[:, None], (places >= 0) & (places <= last)


@functools.cache
def _fused(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` through torch.compile on a GPU, where each operation would read and write all the
    logits; as it is on a CPU, and with a warning where torch.compile does not work.
    """
    if device == "cpu":
        return function
    problem = compile_error(device)
    if problem is not None:
        log.warning("torch.compile does not work here, so scoring is slower: %s", problem)
        return function
    return torch.compile(function, dynamic=True)


def _logits_per_block(device: str) -> int:
    if device in LOGITS_PER_BLOCK:
        return LOGITS_PER_BLOCK[device]
    # Without fused kernels, several float32 copies of a block's logits exist at once.
    return LOGITS_PER_BLOCK_OF_OTHERS if compile_error(device) is None else LOGITS_KEPT


def _blocks(vocabulary: int, num_positions: int, logits_per_block: int) -> list[slice]:
    """The vocabulary, cut into blocks of so many logits of all positions."""
    width = logits_per_block // max(1, num_positions)
    width = max(width - width % BLOCK_STEP, MIN_BLOCK_WIDTH)
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _score_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> torch.Tensor:
    """Log-prob of `labels` (M,) and, if asked for, the entropy, from logits (M, V): (M, 1 or 2)."""
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, labels[:, None]).squeeze(-1)
    columns = [chosen - torch.logsumexp(scaled, dim=-1)]
    if with_entropy:
        columns.append(compute_entropy(scaled if entropy_gradient else scaled.detach()))
    return torch.stack(columns, dim=-1)


def _scatter(selected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows (M, C) to the true places of `mask` (B, T), 0 elsewhere: (B, T, C)."""
    scattered = selected.new_zeros((*mask.shape, selected.shape[-1]))
    return scattered.masked_scatter(mask.bool()[..., None].expand_as(scattered), selected)


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits over the temperature, in float32 at least."""
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits / temperature
