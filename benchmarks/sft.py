"""SFT: non-pad tokens per second, ours against TRL's SFTTrainer.

Both train the same weights on the same token ids, in the same order, on the response tokens alone,
with the same optimizer, rate and examples per step, each in a process of its own; they take turns,
a turn being `--steps` optimizer steps. The losses of all steps are compared. For TRL tokens
are made beforehand; it has no worker processes and logs to nothing. Its microbatch and gradient
checkpointing are options: what it comes with, and what is fastest.

    python benchmarks/sft.py --model artifacts/models/tiny-qwen2 --model-name tiny-qwen2 \\
        --data $GSM8K_DIR/train.jsonl --batch-size 32 --steps 10
    python benchmarks/sft.py --model artifacts/models/smollm2-135m-instruct \\
        --model-name smollm2-135m-instruct --data $GSM8K_DIR/train.jsonl --batch-size 8 --steps 1

With `--packing` both pack rows of `--max-length`. TRL packs all its data at the start and has
`--trl-rows` rows a step, so the steps hold other examples and only the tokens are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Json,
    Turns,
    environment_line,
    plain_model,
    ratios,
    spread,
    start_sides,
    take_turns,
)
from gsm8k_core.cli import leave, parser, run_script

SEED = 0


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the starting weights")
    found.add_argument("--model-name", required=True, help="a model of the config: its prompt")
    found.add_argument("--config", type=Path, default=Path("config.yaml"))
    found.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    found.add_argument("--batch-size", type=int, default=32, help="examples of an optimizer step")
    found.add_argument("--steps", type=int, default=10, help="optimizer steps of a turn")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--max-length", type=int, default=1024)
    found.add_argument("--learning-rate", type=float, default=1e-4)
    found.add_argument("--tokens-per-microbatch", type=int, default=4096, help="ours")
    found.add_argument("--packing", action="store_true")
    found.add_argument("--trl-rows", type=int, default=8, help="packed rows of a step of TRL")
    found.add_argument(
        "--trl-accumulation", type=int, default=1, help="microbatches of a step of TRL, not packed"
    )
    found.add_argument(
        "--trl-checkpointing",
        action="store_true",
        help="gradient checkpointing in TRL: its default, and slower",
    )
    found.add_argument("--compile-layers", action="store_true", help="torch.compile in ours")
    found.add_argument("--trl-compile", action="store_true", help="torch.compile in TRL")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    return found


def run_settings(args: argparse.Namespace) -> Any:
    """The settings of our side, which TRL's are derived from."""
    from gsm8k_core.config import load_config

    run = load_config(args.config).run_settings(args.model_name, "sft", SEED)
    method = run.method_settings.model_copy(
        update={
            "num_steps": args.steps * (args.rounds + 1) + 1,
            "checkpoint_every_steps": 1_000_000,
            "validate_every_steps": 0,
            "keep_best": False,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            "packing": args.packing,
            "learning_rate": args.learning_rate,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "tokens_per_microbatch": args.tokens_per_microbatch,
        }
    )
    model = run.model_settings.model_copy(
        update={
            "gpus": 1 if args.device == "cuda" else 0,
            "dtype": args.dtype,
            "compile_layers": args.compile_layers,
        }
    )
    return run.model_copy(update={"method_settings": method, "model_settings": model})


# ------------------------------------------------------------------------------------------- ours


def our_side(args: argparse.Namespace) -> None:
    turns = Turns()
    import torch

    from gsm8k_core.config import dump
    from gsm8k_core.training import TrainingRun
    from scripts import train_sft

    torch.set_num_threads(args.threads)
    of_run, ended = TrainingRun.steps_after, TrainingRun.end_step
    losses: list[float] = []

    def end_step(run: TrainingRun, step: int, row: Json, **more: Any) -> None:
        losses.append(row["loss"])
        ended(run, step, row, **more)

    def steps_after(run: TrainingRun, steps_done: int, what: str) -> Any:
        """The loop's own steps, so many of them each time it is our turn."""
        turns.tell()
        tokens = 0
        for step in of_run(run, steps_done, what):
            if (step - 1) % args.steps == 0 and not turns.wait():
                os._exit(0)
            yield step
            if step % args.steps == 0:
                total = run.progress["num_tokens"]
                turns.tell(tokens=total - tokens, losses=losses[-args.steps :])
                tokens = total

    trained: Any = TrainingRun
    trained.steps_after, trained.end_step = steps_after, end_step
    train_sft.main(
        ["--settings", dump(run_settings(args)), "--starting-model", str(args.model),
         "--data", str(args.data), "--output-dir", tempfile.mkdtemp(prefix="sft-")]
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- TRL


def trl_side(args: argparse.Namespace) -> None:
    turns = Turns()
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from gsm8k_core.files import seed_from
    from gsm8k_core.models import load_tokenizer
    from gsm8k_core.training import endless_order, take
    from scripts.train_sft import load_examples

    torch.set_num_threads(args.threads)
    run = run_settings(args)
    method = run.method_settings
    tokenizer = load_tokenizer(args.model)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    examples = load_examples(
        args.data, run, tokenizer, len(tokenizer), config.max_position_embeddings
    )
    num_steps, num_steps_of_turn = method.num_steps, args.steps
    order = endless_order(len(examples), seed_from(SEED, run.method, run.round))
    # Packed rows hold several examples each; how many is not known beforehand.
    each = args.trl_rows * 8 if args.packing else args.batch_size
    chosen = take(examples, order, num_steps * each)
    accumulation = 1 if args.packing else args.trl_accumulation
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bfloat16",
        per_device_train_batch_size=(
            args.trl_rows if args.packing else args.batch_size // accumulation
        ),
        gradient_accumulation_steps=accumulation,
        max_steps=num_steps,
        max_length=args.max_length,
        packing=args.packing,
        completion_only_loss=True,
        learning_rate=method.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=method.adam_beta1,
        adam_beta2=method.adam_beta2,
        adam_epsilon=method.adam_epsilon,
        weight_decay=method.weight_decay,
        max_grad_norm=method.max_grad_norm,
        gradient_checkpointing=args.trl_checkpointing,
        torch_compile=args.trl_compile,
        train_sampling_strategy="sequential",
        seed=SEED,
        report_to=[],
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    rows = [
        {
            "input_ids": [*prompt, *response],
            "completion_mask": [0] * len(prompt) + [1] * len(response),
        }
        for prompt, response in chosen
    ]
    tokens_of_microbatch: list[int] = []
    trainer: Any = SFTTrainer(
        plain_model(args.model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens_of_microbatch.append(
            int(inputs["input_ids"].numel() if mask is None else mask.sum())
        )
        return step(model, inputs, *rest, **more)

    trainer.training_step = training_step

    class InTurns(TrainerCallback):
        losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.tell()
            turns.wait()

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if "loss" not in more["logs"]:
                return
            self.losses.append(float(more["logs"]["loss"]))
            del args, control
            if state.global_step % num_steps_of_turn:
                return
            count = slice(-num_steps_of_turn, None)
            tokens = sum(tokens_of_microbatch[-num_steps_of_turn * accumulation :])
            turns.tell(tokens=tokens, losses=self.losses[count])
            if not turns.wait():
                os._exit(0)

    trainer.add_callback(InTurns())
    trainer.train()


# ----------------------------------------------------------------------------------------- parent


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    if args.side:
        (our_side if args.side == "ours" else trl_side)(args)
        return 0
    packages = ("torch", "transformers", "trl")
    sys.stdout.write(environment_line(packages, args.threads, args.device) + "\n")
    command = ["-m", "benchmarks.sft", *argv]
    ours, theirs = sides = start_sides(("ours", "trl"), command, args)
    firsts = [side.turn(keep=False)["losses"][0] for side in sides]
    take_turns(sides, args.rounds, warm_up=0)
    for side in sides:
        side.end()
    rates = [
        [turn["tokens"] / s for turn, s in zip(side.turns, side.seconds, strict=True)]
        for side in sides
    ]
    lasts = [side.turns[-1]["losses"][-1] for side in sides]
    apart = max(
        abs(a - b)
        for turn, other in zip(ours.turns, theirs.turns, strict=True)
        for a, b in zip(turn["losses"], other["losses"], strict=True)
    )
    sys.stdout.write(
        f"{args.model_name}, {args.batch_size} examples a step, {args.dtype}, "
        f"{'packed' if args.packing else 'not packed'}; {args.rounds} rounds of {args.steps} "
        "steps: median (range)\n\n"
        "| side | tokens/s | s per step | ours is faster by | loss, first and last step "
        "| start s |\n|---|---|---|---|---|---|\n"
    )
    for side, rate, first, last in zip(sides, rates, firsts, lasts, strict=True):
        faster = spread(ratios(rates[0], rate)) if side is theirs else ""
        seconds = [s / args.steps for s in side.seconds]
        sys.stdout.write(
            f"| {side.name} | {spread(rate, 0)} | {spread(seconds, 3)} | {faster} "
            f"| {first:.5f}, {last:.5f} | {side.seconds_to_start:.1f} |\n"
        )
    if args.packing:
        return 0
    sys.stdout.write(f"\nlosses of the same step differ by at most {apart:.1e}\n")
    allowed = 1e-4 if args.dtype == "float32" else 2e-2
    tokens = [[turn["tokens"] for turn in side.turns] for side in sides]
    if abs(firsts[0] - firsts[1]) > allowed or tokens[0] != tokens[1]:
        raise RuntimeError(f"not the same work: first losses {firsts}, tokens {tokens}")
    return 0


if __name__ == "__main__":
    leave(run_script(main))
