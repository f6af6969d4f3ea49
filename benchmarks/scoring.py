"""Log-probs with entropy, forward and backward: ours against whole logits and against TRL's head.

A model without layers, so that the output layer is all there is: embedding (frozen), norm, head.
Each way is a process of its own; they take turns on the same inputs. Log-probs, entropies and
gradients (of the norm, and of the head along random directions) of all are compared. Extra memory
is the most that one turn takes above what was there before it, gradients included: resident memory
on a CPU (the kernel's own high-water mark, reset before each turn), allocated memory on a GPU.

    python benchmarks/scoring.py --threads 1
    python benchmarks/scoring.py --device cuda --dtype bfloat16

Liger and cut-cross-entropy give the log-probs alone, so they take part with `--without-entropy`,
on a GPU, where they are installed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Json,
    Side,
    Turns,
    environment_line,
    ratios,
    run_turns,
    settle,
    spread,
    start_sides,
)
from benchmarks.common import take_turns as take_turns_of
from gsm8k_core.cli import leave, parser, run_script

Scores = tuple[Any, Any]


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--hidden", type=int, default=896)
    found.add_argument("--vocabulary", type=int, default=151_936)
    found.add_argument("--rows", type=int, default=4)
    found.add_argument("--tokens", type=int, default=512, help="of each row")
    found.add_argument("--without-entropy", action="store_true")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--side", help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return found


def ways(args: argparse.Namespace) -> list[str]:
    """Those that can run here, ours first."""
    found = ["ours", "whole logits"]
    if importlib.util.find_spec("trl") is not None:
        found.append("TRL's head")
    if args.device == "cuda" and args.without_entropy:
        packages = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
        found += [name for name, package in packages.items() if importlib.util.find_spec(package)]
    return found


# ------------------------------------------------------------------------------------ in a process


def scorer(name: str, model: Any, with_entropy: bool) -> Callable[[Any, Any], Scores]:
    """A function from inputs and labels (B, T) to log-probs and entropies (or None), (B, T)."""
    import torch

    from gsm8k_core.scoring import get_response_log_probs

    def ours(input_ids: Any, labels: Any) -> Scores:
        found = get_response_log_probs(model, input_ids, labels, with_entropy)
        return found["log_probs"], found.get("token_entropy")

    def whole(input_ids: Any, labels: Any) -> Scores:
        log_probs = torch.log_softmax(model(input_ids, use_cache=False).logits.float(), dim=-1)
        chosen = log_probs.gather(-1, labels[..., None])[..., 0]
        return chosen, -(log_probs.exp() * log_probs).sum(-1) if with_entropy else None

    def trl_head(input_ids: Any, labels: Any) -> Scores:
        outputs = model(input_ids, shift_labels=labels, use_cache=False, fused_lm_head=True)
        return outputs.log_probs, outputs.entropy if with_entropy else None

    def liger(input_ids: Any, labels: Any) -> Scores:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        hidden = model.model(input_ids).last_hidden_state.flatten(0, 1)
        loss = liger_fused_linear_cross_entropy(
            hidden, model.lm_head.weight, labels.flatten(), reduction="none"
        )
        return -loss.view(labels.shape), None

    def cut(input_ids: Any, labels: Any) -> Scores:
        from cut_cross_entropy import linear_cross_entropy

        hidden = model.model(input_ids).last_hidden_state
        return -linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="none"), None

    if name == "TRL's head":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy")[: 1 + with_entropy])
    return {
        "ours": ours,
        "whole logits": whole,
        "TRL's head": trl_head,
        "Liger": liger,
        "cut-cross-entropy": cut,
    }[name]


class ExtraMemory:
    """The most memory taken since `start`, above what there was."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0

    def start(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", "ascii")
            self.before = self._resident("VmRSS")

    def mib(self) -> float:
        import torch

        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        return (peak - self.before) / 2**20

    @staticmethod
    def _resident(entry: str) -> int:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def one_side(args: argparse.Namespace) -> None:
    """Serve turns of one way."""
    turns = Turns()
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        num_hidden_layers=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.device(args.device):
        model: Any = Qwen2ForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight, std=2.0 / args.hidden**0.5)
    tokens = torch.randint(args.vocabulary, (args.rows, args.tokens + 1))
    weights = torch.randn(2, args.rows, args.tokens)
    directions = torch.randn(args.hidden, 2)
    model.to(args.device, getattr(torch, args.dtype)).train()
    input_ids, labels = (part.to(args.device) for part in (tokens[:, :-1], tokens[:, 1:]))
    weights = weights.to(args.device)
    score = scorer(args.side, model, not args.without_entropy)
    memory = ExtraMemory(args.device)

    def synchronise() -> float:
        settle(args.device)
        return time.perf_counter()

    def turn() -> Json:
        model.zero_grad()
        memory.start()
        started, cpu_started = synchronise(), time.process_time()
        log_probs, entropies = score(input_ids.contiguous(), labels.contiguous())
        loss = (log_probs * weights[0]).sum()
        if entropies is not None:
            loss = loss + (entropies * weights[1]).sum()
        forward = synchronise()
        loss.backward()
        ended, cpu_ended = synchronise(), time.process_time()
        extra = memory.mib()
        path = args.folder / f"{args.side}.safetensors"
        if not path.exists():
            values = {"log_probs": log_probs.detach(), "norm": model.model.norm.weight.grad}
            values["head"] = model.lm_head.weight.grad.float() @ directions.to(args.device)
            if entropies is not None:
                values["entropies"] = entropies.detach()
            save_file({k: v.float().cpu().contiguous() for k, v in values.items()}, path)
        return {
            "forward": forward - started,
            "backward": ended - forward,
            "cpu": cpu_ended - cpu_started,
            "mib": extra,
        }

    run_turns(turns, turn)


# ----------------------------------------------------------------------------------------- parent


def differences(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Relative distance of every way's results from those of whole logits."""
    from safetensors.torch import load_file

    results = {name: load_file(folder / f"{name}.safetensors") for name in names}
    return {
        name: {
            key: float((value - expected).norm() / expected.norm())
            for key, expected in results["whole logits"].items()
            for value in [results[name][key]]
        }
        for name in names
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    if args.side:
        one_side(args)
        return 0
    packages = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    sys.stdout.write(environment_line(packages, args.threads, args.device) + "\n")
    names = ways(args)
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "benchmarks.scoring", *argv, "--folder", folder]
        sides = start_sides(names, command, args)
        take_turns_of(sides, args.rounds)
        for side in sides:
            side.end()
        apart = differences(Path(folder), names)
    sys.stdout.write(
        f"hidden {args.hidden}, vocabulary {args.vocabulary}, B={args.rows}, T={args.tokens}, "
        f"{args.dtype}, {'without' if args.without_entropy else 'with'} entropy; {args.rounds} "
        "rounds: median (range)\n\n"
        "| way | forward s | backward s | time / whole logits | processor time / whole logits "
        "| extra MiB | memory / whole logits | differs by |\n|---|---|---|---|---|---|---|---|\n"
    )

    def of(side: Side, *keys: str) -> list[float]:
        return [sum(turn[key] for key in keys) for turn in side.turns]

    for side in sides:
        time_ratio, cpu_ratio, memory_ratio = (
            spread(ratios(of(side, *keys), of(sides[1], *keys)), digits)
            for keys, digits in ((("forward", "backward"), 2), (("cpu",), 2), (("mib",), 3))
        )
        sys.stdout.write(
            f"| {side.name} | {spread(of(side, 'forward'))} | {spread(of(side, 'backward'))} "
            f"| {time_ratio} | {cpu_ratio} | {spread(of(side, 'mib'), 0)} | {memory_ratio} "
            f"| {max(apart[side.name].values()):.1e} |\n"
        )
    allowed = 1e-4 if args.dtype == "float32" else 5e-2
    wrong = [name for name in names if max(apart[name].values()) > allowed]
    if wrong:
        raise RuntimeError(f"not the same values or gradients as with whole logits: {apart}")
    return 0


if __name__ == "__main__":
    leave(run_script(main))
