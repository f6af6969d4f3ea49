"""A training step's seconds: plain, with compiled layers, and with cuDNN's attention.

Forward with entropies, backward, clipping and AdamW, on rows of random tokens; all ways take turns
on the same rows. Every turn has rows of another length, as training has; then one length comes
again and again. The losses must agree. cuDNN's attention is what PyTorch takes on some GPUs where
nothing is said; training switches it off. Operations are 6·N a token, of the output layer for
the half of the tokens that is scored, and 6·layers·width·length of attention.

    python -m benchmarks.training_step --model MODEL --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Json, environment_line, ratios, settle, spread
from gsm8k_core import scoring
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.compiling import compile_error
from gsm8k_core.models import autocast, compile_layers, load_model
from gsm8k_core.scoring import score_responses

SAME_LENGTH_TURNS = 3


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the model")
    found.add_argument("--rows", type=int, default=64)
    found.add_argument("--shortest", type=int, default=256, help="tokens of the first rows")
    found.add_argument("--longer-by", type=int, default=13, help="tokens from turn to turn")
    found.add_argument("--rounds", type=int, default=12)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return found


class Way:
    """A model and its optimizer, and the steps that they took."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.dtype, self.device = name, args.dtype, torch.device(args.device)
        self.model: Any = load_model(args.model, self.device)
        if name == "compiled layers":
            compile_layers(self.model)
        fused = self.device.type == "cuda" or None  # as in training
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=fused)
        self.steps: list[Json] = []

    def step(self, input_ids: torch.Tensor) -> Json:
        """One step; the second half of each row (B, T) is its response."""
        torch.backends.cuda.enable_cudnn_sdp(self.name == "cuDNN attention")
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        mask[:, input_ids.shape[1] // 2 :] = True
        settle(self.device.type)
        started = time.perf_counter()
        with autocast(self.device, self.dtype):
            scores = score_responses(
                self.model, input_ids, input_ids.roll(-1, 1), mask, with_entropy=True
            )
        loss = -scores["log_probs"].sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        settle(self.device.type)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": input_ids.numel(), "loss": loss.item()}


def flops(model: Any, length: int) -> int:
    """Floating-point operations of a token's forward and backward in rows of `length`."""
    config = model.config
    attention = 6 * config.num_hidden_layers * config.hidden_size * length
    layers = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    return int(6 * (layers + config.vocab_size * config.hidden_size / 2) + attention)


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    torch.manual_seed(0)
    # Each way says by itself whether to.
    scoring.avoid_cudnn_attention = lambda device: None  # noqa: ARG005
    problem = compile_error(args.device)
    names = ["plain"]
    if problem is None:
        names.append("compiled layers")
    else:
        sys.stdout.write(f"no compiled layers: {problem}\n")
    names += ["cuDNN attention"] * (args.device == "cuda")
    ways = [Way(name, args) for name in names]
    vocabulary = ways[0].model.config.vocab_size

    def rows(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (args.rows, length)).to(args.device)

    Way("plain", args).step(rows(args.shortest))  # starts CUDA, and compiles what all score with
    warm_up = [rows(args.shortest), rows(args.shortest + 1)]
    for way in ways:
        way.steps = [way.step(inputs) for inputs in warm_up]
    lengths = [args.shortest + args.longer_by * turn for turn in range(args.rounds)]
    for turn, length in enumerate([*lengths, *[lengths[-1]] * SAME_LENGTH_TURNS]):
        inputs = rows(length)
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            way.steps.append(way.step(inputs))
    for way in ways[1:]:
        for one, other in zip(way.steps[2:], ways[0].steps[2:], strict=True):
            if not abs(one["loss"] - other["loss"]) <= 0.005 * abs(other["loss"]):  # nor NaN
                raise RuntimeError(
                    f"{way.name}: loss {one['loss']}, {ways[0].name} {other['loss']}"
                )

    sys.stdout.write(
        environment_line(("torch", "transformers"), torch.get_num_threads(), args.device)
        + f"\n{args.rows} rows of {lengths[0]} to {lengths[-1]} tokens, {args.dtype}; "
        f"{args.rounds} rounds: median (range)\n\n"
        "| way | first two steps, s | ms a step | plain takes longer by | tokens/s | TFLOP/s "
        "| ms, same length again |\n|---|---|---|---|---|---|---|\n"
    )

    def milliseconds(way: Way, part: slice) -> list[float]:
        return [1e3 * step["seconds"] for step in way.steps[part]]

    changing, same = slice(2, 2 + args.rounds), slice(-SAME_LENGTH_TURNS, None)
    for way in ways:
        rates = [step["tokens"] / step["seconds"] for step in way.steps[changing]]
        work = [rate * flops(way.model, t) / 1e12 for rate, t in zip(rates, lengths, strict=True)]
        slower = ratios(milliseconds(ways[0], changing), milliseconds(way, changing))
        first = sum(step["seconds"] for step in way.steps[:2])
        sys.stdout.write(
            f"| {way.name} | {first:.1f} | {spread(milliseconds(way, changing), 0)} "
            f"| {spread(slower)} | {statistics.median(rates):,.0f} "
            f"| {statistics.median(work):.1f} | {spread(milliseconds(way, same), 0)} |\n"
        )
    return 0


if __name__ == "__main__":
    leave(run_script(main))
