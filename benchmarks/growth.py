"""Time and memory of scoring, a GRPO step, grading and compare against their size, as a plot.

Each is done at several sizes up to ten times the smallest, in a process of its own. Memory is what
a turn takes above what was there before it. The exponent is the slope of a straight line
through the logarithms: 1 is linear growth, less than that shows a fixed share. Memory of less than
5 MiB at every size has none: it is too little to tell growth from chance.

    python benchmarks/growth.py --model artifacts/models/tiny-qwen2 --output docs/figures/growth.svg
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from benchmarks.common import Json, Side, Turns, environment_line, run_turns
from benchmarks.scoring import ExtraMemory
from gsm8k_core.charts import PALETTES
from gsm8k_core.cli import leave, parser, run_script
from gsm8k_core.figures import CONFIG, save_figure

SIZES = {
    "scoring": [1024, 2048, 4096, 10_240],
    "GRPO step": [32, 64, 128, 320],
    "grading": [2000, 5000, 10_000, 20_000],
    "compare": [100, 200, 400, 1000],
}
UNITS = {"scoring": "tokens", "grading": "completions", "compare": "runs"}
SEED = 0
LEAST_MIB = 5.0


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of a small model")
    found.add_argument("--output", type=Path, required=True, help="figure to write (SVG or PNG)")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--smaller-by", type=int, default=1, help="divide all sizes by this")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--side", choices=SIZES, help=argparse.SUPPRESS)
    return found


def sizes(name: str, args: argparse.Namespace) -> list[int]:
    # A model of compare has 100 runs, a prompt of GRPO 8 completions: neither can be cut.
    least = {"compare": 100, "GRPO step": 8}.get(name, 1)
    return [max(least, size // args.smaller_by // least * least) for size in SIZES[name]]


# ------------------------------------------------------------------------------------ in a process


def scoring(args: argparse.Namespace) -> Callable[[int], object]:
    """Log-probs and entropy, forward and backward, of a vocabulary of 32,768."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from gsm8k_core.scoring import get_response_log_probs

    del args
    vocabulary, width = 32_768, 256
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width, num_hidden_layers=0
        )
    )

    def work(size: int) -> None:
        tokens = torch.randint(vocabulary, (1, size + 1))
        found = get_response_log_probs(model, tokens[:, :-1], tokens[:, 1:], True)
        (found["log_probs"] + found["token_entropy"]).sum().backward()
        model.zero_grad()

    return work


def grpo_step(args: argparse.Namespace) -> Callable[[int], object]:
    """Rollouts of 24 tokens in groups of 8, their scores, the loss, its gradient."""
    import torch

    from gsm8k_core.config import load_config
    from gsm8k_core.engines.base import Request
    from gsm8k_core.engines.hf_engine import HfEngine
    from gsm8k_core.grpo import PolicyBatch, policy_loss
    from gsm8k_core.losses import step_normalizer
    from gsm8k_core.models import load_model, load_tokenizer
    from gsm8k_core.scoring import score_responses
    from gsm8k_core.tokenization import collate, pad_token_id, split_by_token_budget

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, torch.device("cpu"))
    config = load_config(Path(__file__).resolve().parents[1] / "config.yaml")
    method: Any = config.run_settings(next(iter(config.models)), "grpo", SEED).method_settings
    engine = HfEngine(model, tokenizer, 256)
    prompt = tokenizer("What is 12 + 34?\n", add_special_tokens=False)["input_ids"]

    def work(size: int) -> None:
        requests = [Request(prompt, list(range(i, i + 8)), 1.0, 24) for i in range(0, size, 8)]
        rows = [completion.token_ids for group in engine.generate(requests) for completion in group]
        batch = collate([prompt] * size, rows, pad_token_id(tokenizer))
        norm = step_normalizer(method.aggregation, batch["response_mask"], 24)
        lengths = [len(prompt) + len(row) - 1 for row in rows]
        for places in split_by_token_budget(lengths, 4096):
            part = {name: tensor[places] for name, tensor in batch.items()}
            log_probs = score_responses(model, **part)["log_probs"]
            of_policy = PolicyBatch(torch.ones(len(places)), part["response_mask"])
            policy_loss(log_probs, None, of_policy, method, norm)[0].backward()
        model.zero_grad()

    return work


def grading(args: argparse.Namespace) -> Callable[[int], object]:
    """Completions of 150 words, checked, graded and summed up as scripts/grade.py does."""
    from gsm8k_core.config import GradingSettings
    from gsm8k_core.grading import Grader
    from scripts.grade import grade_rows, summarize

    del args

    def work(size: int) -> None:
        rows = (
            {
                "problem_id": f"p{index // 8:06}",
                "decoding": "sample",
                "sample_index": index % 8,
                "gold": str(index // 8),
                "completion": "She has 3 + 4 = 7 apples. " * 25 + f"#### {index // 8 + index % 2}",
                "token_ids": [1] * 200,
                "num_tokens": 200,
                "finish_reason": "stop",
            }
            for index in range(size // 8 * 8)
        )
        summarize(grade_rows(rows, "growth", Grader(GradingSettings())))

    return work


def compare(args: argparse.Namespace) -> Callable[[int], object]:
    """The tables of so many runs of 250 problems × 8 samples."""
    from benchmarks.compare_scale import make_study, write_run
    from gsm8k_core.config import Comparison
    from gsm8k_core.tables import build_comparison

    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    largest = max(sizes("compare", args)) // 100
    full: Comparison = make_study(largest)
    for model in full.models:
        for method in full.methods:
            for seed in full.seeds_of(method):
                run = folder / model / method / f"seed{seed}"
                write_run(run, method != "base", 250, 8, seed)

    return lambda size: build_comparison(make_study(size // 100), folder)


WORK = {"scoring": scoring, "GRPO step": grpo_step, "grading": grading, "compare": compare}


def one_side(args: argparse.Namespace) -> None:
    """Serve turns of one kind: each does all of its sizes."""
    turns = Turns()
    import torch

    torch.set_num_threads(args.threads)
    work = WORK[args.side](args)
    memory = ExtraMemory("cpu")

    def turn() -> Json:
        seconds, mib = [], []
        for size in sizes(args.side, args):
            memory.start()
            started = time.process_time()
            work(size)
            seconds.append(time.process_time() - started)
            mib.append(memory.mib())
        return {"seconds": seconds, "mib": mib}

    run_turns(turns, turn)


# ----------------------------------------------------------------------------------------- parent


def exponent(numbers: list[int], values: np.ndarray) -> float:
    """Slope of the line through the logarithms."""
    return float(np.polyfit(np.log(numbers), np.log(np.maximum(values, 1e-9)), 1)[0])


def grows(mib: np.ndarray) -> bool:
    """Whether memory is enough to tell its growth from chance."""
    return bool(mib.max() >= LEAST_MIB)


def panel(name: str, numbers: list[int], values: np.ndarray, label: str) -> Any:
    """One kind's seconds or MiB, both axes logarithmic.

    Memory that cannot be said to grow is drawn as points, from zero on and without an exponent.
    """
    trend = label != "MiB" or grows(values)
    told = f"exponent {exponent(numbers, values):.2f}" if trend else f"less than {LEAST_MIB:g} MiB"
    scale, ticks = alt.Scale(domain=[0, 4 * LEAST_MIB]), np.arange(0, 5) * LEAST_MIB
    if trend:
        values = np.maximum(values, 1e-3)  # a logarithm has no zero
        scale = alt.Scale(type="log", nice=False, padding=10)
        ticks = np.geomspace(values.min(), values.max(), 3)
    rows = [
        {"number": number, "value": float(value)}
        for number, value in zip(numbers, values, strict=True)
    ]
    axis = alt.Axis(title=label, values=ticks.tolist(), format=".3~g")
    marks = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "number:Q",
            axis=alt.Axis(
                title=UNITS.get(name, "completions"), values=numbers, format=",", grid=False
            ),
            scale=alt.Scale(type="log", nice=False, padding=10),
        ),
        y=alt.Y("value:Q", axis=axis, scale=scale),
        color=alt.value(PALETTES["light"][0]),
    )
    drawn = marks.mark_point(filled=True, opacity=1)
    layers = alt.layer(marks.mark_line(), drawn) if trend else alt.layer(drawn)
    return layers.properties(title=f"{name}: {told}", width=210, height=180)


def plot(found: dict[str, tuple[list[int], np.ndarray, np.ndarray]], path: Path) -> Any:
    """Write and return the figure: seconds above, MiB below, one column a kind."""
    panels = [
        panel(name, numbers, measured[place], label)
        for place, label in enumerate(("processor seconds", "MiB"))
        for name, (numbers, *measured) in found.items()
    ]
    figure = alt.concat(*panels, columns=len(found), spacing=24).configure(**CONFIG)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return figure


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    if args.side:
        one_side(args)
        return 0
    packages = ("torch", "transformers", "polars")
    sys.stdout.write(environment_line(packages, args.threads, "cpu") + "\n")
    found = {}
    for name in SIZES:
        side = Side(name, ["-m", "benchmarks.growth", *argv, "--side", name], args.threads)
        side.turn(keep=False)
        for _ in range(args.rounds):
            side.turn()
        side.end()
        seconds, mib = (np.median([t[key] for t in side.turns], axis=0) for key in side.turns[0])
        found[name] = (sizes(name, args), seconds, mib)
    sys.stdout.write(
        f"median of {args.rounds}\n\n| what | size | processor seconds | MiB | exponent of time "
        "| of memory |\n|---|---|---|---|---|---|\n"
    )
    for name, (numbers, seconds, mib) in found.items():
        for number, second, memory in zip(numbers, seconds, mib, strict=True):
            of_memory = f"{exponent(numbers, mib):.2f}" if grows(mib) else ""
            slopes = f"{exponent(numbers, seconds):.2f} | {of_memory}"
            last = slopes if number == numbers[-1] else " | "
            sys.stdout.write(
                f"| {name} | {number:,} {UNITS.get(name, 'completions')} | {second:.3f} "
                f"| {memory:.1f} | {last} |\n"
            )
    plot(found, args.output)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
