"""An update of GRPO with prompts shared by their group, and with a row for each completion.

The forwards, entropies included, and backwards of one minibatch, cut into microbatches as training
cuts it. Tokens are random, and every completion has an advantage. Both ways train the same model,
and take turns on the same completions, others in every turn; log-probs and gradients are compared.
Extra memory is the most that a turn takes above what was there before it, gradients included.

    python -m benchmarks.shared_prompts --model MODEL --device cuda --dtype bfloat16
    python -m benchmarks.shared_prompts --model MODEL --prompts 2 --group-size 8 \\
        --completion-tokens 10 96 --rounds 3
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import Json, environment_line, ratios, settle, spread
from benchmarks.scoring import ExtraMemory
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.config import load_config
from gsm8k_core.engines.base import Completion
from gsm8k_core.models import autocast, compile_layers, load_model
from gsm8k_core.shared_prompts import use_in
from scripts.train_grpo import Group, Rollouts, own_packs, score_packs, to_tensors

WAYS = ("shared prompts", "a row each")


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the model")
    found.add_argument("--prompts", type=int, default=32)
    found.add_argument("--group-size", type=int, default=16)
    found.add_argument("--prompt-tokens", type=int, nargs=2, default=[60, 140], help="from, to")
    found.add_argument("--completion-tokens", type=int, nargs=2, default=[30, 256])
    found.add_argument("--tokens-per-microbatch", type=int, default=32_768)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--compile-layers", action="store_true")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return found


class Minibatches:
    """A model, and minibatches of random tokens for it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.model: Any = load_model(args.model, self.device)
        if not use_in(self.model):
            raise ValueError(f"{args.model}: a model whose prompts cannot be shared")
        if args.compile_layers:
            compile_layers(self.model)
        self.settings = load_config(Path("config.yaml")).run_settings("tiny-qwen2", "grpo", 0)
        self.run: Any = SimpleNamespace(  # what the trainer's functions take of a run
            tokens_per_microbatch=args.tokens_per_microbatch,
            run_settings=self.settings,
            autocast=lambda: autocast(self.device, args.dtype),
        )
        self.memory = ExtraMemory(args.device)
        self.random = random.Random(0)

    def tokens(self, shortest: int, longest: int) -> list[int]:
        number = self.random.randint(shortest, longest)
        return [self.random.randrange(self.model.config.vocab_size) for _ in range(number)]

    def draw(self) -> dict[str, Rollouts]:
        """A minibatch for each way, of the same completions."""
        groups = []
        for _ in range(self.args.prompts):
            ids = [self.tokens(*self.args.completion_tokens) for _ in range(self.args.group_size)]
            completions = [Completion(one, [-1.0] * len(one), "stop", "") for one in ids]
            rewards = [{"reward": 0.0}] * len(ids)
            prompt = self.tokens(*self.args.prompt_tokens)
            groups.append(Group(prompt, completions, rewards, True, "", 0))
        method: Any = self.settings.method_settings.model_copy(
            update={"group_size": self.args.group_size}
        )
        most = (self.args.tokens_per_microbatch, None)
        return {
            way: to_tensors(groups, 0, method, self.device, most_tokens)
            for way, most_tokens in zip(WAYS, most, strict=True)
        }

    def turn(self, rollouts: Rollouts, weights: torch.Tensor) -> Json:
        """Forwards and backwards of a minibatch; `weights` (N,) stand for advantages."""
        self.model.zero_grad(set_to_none=True)
        log_probs = torch.zeros_like(rollouts.sampler_log_probs)
        settle(self.device.type)
        self.memory.start()
        started, cpu_started = time.perf_counter(), time.process_time()
        for packs in own_packs(self.run, rollouts, rollouts.packs):
            rows, scores = score_packs(
                self.run, self.model, rollouts, packs, with_entropy=True, entropy_gradient=False
            )
            found = scores["log_probs"]
            mask = rollouts.response_mask[rows, : found.shape[1]]
            (found * mask * weights[rows, None]).sum().backward()
            log_probs[rows, : found.shape[1]] = found.detach() * mask
        settle(self.device.type)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        mib = self.memory.mib()
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        return {
            "seconds": ended - started,
            "cpu": cpu_ended - cpu_started,
            "mib": mib,
            "tokens": sum(rollouts.lengths),
            "log_probs": log_probs,
            "gradient": gradient,
        }


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    minibatches = Minibatches(args)
    turns: dict[str, list[Json]] = {way: [] for way in WAYS}
    furthest = {"log_probs": 0.0, "gradient": 0.0}
    for number in range(-1, args.rounds):
        drawn = minibatches.draw()
        weights = torch.randn(args.prompts * args.group_size).to(args.device)
        found: dict[str, Json] = {}
        for way in WAYS if number % 2 else reversed(WAYS):
            found[way] = minibatches.turn(drawn[way], weights)
        for key, distance in furthest.items():
            values = [found[way].pop(key) for way in WAYS]
            furthest[key] = max(distance, apart(*values))
        if number >= 0:
            for way in WAYS:
                turns[way].append(found[way])

    sys.stdout.write(
        environment_line(("torch", "transformers"), torch.get_num_threads(), args.device)
        + f"\n{args.prompts} prompts of {args.prompt_tokens[0]} to {args.prompt_tokens[1]} tokens, "
        f"{args.group_size} completions each of {args.completion_tokens[0]} to "
        f"{args.completion_tokens[1]}, {args.dtype}, at most {args.tokens_per_microbatch} tokens a "
        f"microbatch{', compiled layers' * args.compile_layers}; {args.rounds} rounds: median "
        "(range)\n\n| way | s a minibatch | share of its time with a row each | of processor time "
        "| tokens/s, prompts counted in every row | extra MiB |\n|---|---|---|---|---|---|\n"
    )

    def of(way: str, key: str) -> list[float]:
        return [turn[key] for turn in turns[way]]

    for way in WAYS:
        seconds, cpu = (
            spread(ratios(of(way, key), of(WAYS[1], key))) for key in ("seconds", "cpu")
        )
        rates = ratios(of(way, "tokens"), of(way, "seconds"))
        sys.stdout.write(
            f"| {way} | {spread(of(way, 'seconds'), 3)} | {seconds} | {cpu} | {spread(rates, 0)} "
            f"| {spread(of(way, 'mib'), 0)} |\n"
        )
    sys.stdout.write(
        f"\nlog-probs differ by {furthest['log_probs']:.1e}, gradients by "
        f"{furthest['gradient']:.1e}\n"
    )
    allowed = 1e-4 if args.dtype == "float32" else 5e-2
    if not max(furthest.values()) <= allowed:  # nor NaN
        raise RuntimeError(f"not the same log-probs and gradients: {furthest}")
    return 0


if __name__ == "__main__":
    leave(run_script(main))
