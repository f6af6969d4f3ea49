"""Offline DPO (Rafailov et al. 2023) on pairs of correct and incorrect completions.

The reference is the starting model. Departures from the paper: pairs come from grading the parent's
own completions, not from people; there is no SFT on the chosen completions first.

    python scripts/train_dpo.py --model-name tiny-qwen2 --method dpo --seed 0 \\
        --starting-model /tmp/sft/model --data /tmp/dpo/round1/pairs.jsonl --output-dir /tmp/dpo

Started again after a kill, it resumes from its last checkpoint. On several GPUs:
`torchrun --standalone --nproc-per-node 4 scripts/train_dpo.py …`
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import itertools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gsm8k_core.cli import leave, run_script, run_settings_from, training_parser
from gsm8k_core.config import DpoMethod, PromptSettings
from gsm8k_core.distributed import add, own_microbatches
from gsm8k_core.dpo import dpo_loss
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl, read_json, seed_from
from gsm8k_core.masking import masked_sum
from gsm8k_core.models import max_positions, num_embeddings
from gsm8k_core.problems import checked_text
from gsm8k_core.prompts import encode_prompts
from gsm8k_core.records import sampling_cost
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import checked_token_ids, collate, pad_token_id
from gsm8k_core.training import TrainingRun, disable_dropout, endless_order, leave_out_long, take

log = logging.getLogger("train_dpo")


@dataclass(frozen=True)
class Pair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer completion."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def length(self) -> int:
        """Positions of both rows, padding included."""
        return 2 * (self.longest - 1)


def load_pairs(
    path: Path,
    prompt: PromptSettings,
    tokenizer: Any,
    vocab_size: int,
    num_positions: int | None = None,
) -> list[Pair]:
    """Pairs that select_pairs.py wrote, with their prompts tokenized.

    Those longer than the model's `num_positions` are left out and counted: generate.py cuts a
    prompt that leaves no room for a completion. Raises DataError that names file and row for every
    fault, and where there is no pair.
    """
    questions, responses = [], []
    for number, row in enumerate(iter_jsonl(path), start=1):
        where = f"{path}, row {number}"
        questions.append(checked_text(row.get("question"), f"{where}: 'question'"))
        responses.append(
            [
                checked_token_ids(row, key, where, vocab_size)
                for key in ("chosen_ids", "rejected_ids")
            ]
        )
    if not questions:
        raise DataError(f"{path}: holds no pair")
    prompts = encode_prompts(questions, prompt, tokenizer)
    pairs = [
        Pair(prompt_ids, chosen, rejected)
        for prompt_ids, (chosen, rejected) in zip(prompts, responses, strict=True)
    ]
    if num_positions is None:
        return pairs
    bound = f"the model's {num_positions} positions"
    lengths = [pair.longest for pair in pairs]
    fitting = leave_out_long(pairs, lengths, num_positions, "pairs", bound)
    if not fitting:
        raise DataError(
            f"{path}: none of its {len(pairs)} pairs is within {bound}; take a model with more"
        )
    return fitting


def sequence_log_probs(
    run: TrainingRun, model: torch.nn.Module, pairs: list[Pair], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the chosen and of the rejected completions, (B,) each."""
    batch = collate(
        [pair.prompt_ids for pair in pairs] * 2,
        [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs],
        pad_id,
    )
    on_device = {name: tensor.to(run.device) for name, tensor in batch.items()}
    with run.autocast():
        log_probs = score_responses(model, **on_device)["log_probs"]
    chosen, rejected = masked_sum(log_probs, on_device["response_mask"], dim=-1).chunk(2)
    return chosen, rejected


def main(argv: list[str] | None = None) -> int:
    arguments = training_parser(__doc__)
    arguments.add_argument(
        "--sampling-stats", type=Path, help="what sampling the pairs cost (generate.py's --stats)"
    )
    args = arguments.parse_args(argv)
    run_settings = run_settings_from(args)
    settings = run_settings.of_kind(DpoMethod)
    run = TrainingRun.from_arguments(args, run_settings)
    disable_dropout(run.model)
    reference = run.load_reference()
    pad_id = pad_token_id(run.tokenizer, num_embeddings(run.model))
    config = run.model.config
    pairs = load_pairs(
        args.data, run_settings.prompt, run.tokenizer, config.vocab_size, max_positions(run.model)
    )
    steps_done, _ = run.resume()
    run.say_passes(len(pairs), settings.batch_size)
    order = endless_order(len(pairs), seed_from(run_settings.seed, "pairs"))
    order = itertools.islice(order, steps_done * settings.batch_size, None)

    run.model.train()
    if steps_done == 0:
        run.validate_start()
        run.log_generations(0)
    for step in run.steps_after(steps_done, "DPO"):
        started = time.perf_counter()
        chosen_pairs = take(pairs, order, settings.batch_size)
        sums: dict[str, float] = {}
        lengths = [pair.length for pair in chosen_pairs]
        groups = own_microbatches(lengths, run.tokens_per_microbatch)
        parts = [
            [chosen_pairs[index] for index in group or [lengths.index(min(lengths))]]
            for group in groups
        ]
        with run.as_reference(reference):
            ref_sums = [sequence_log_probs(run, reference, part, pad_id) for part in parts]
        for group, part, (ref_chosen, ref_rejected) in zip(groups, parts, ref_sums, strict=True):
            chosen, rejected = sequence_log_probs(run, run.model, part, pad_id)
            losses, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, settings.beta)
            nll = -chosen / torch.tensor([len(pair.chosen_ids) for pair in part], device=run.device)
            metrics["chosen_nll"] = nll.detach()
            losses = losses + settings.nll_coefficient * nll
            # Of a group that is empty, the pair that stands in for it has no part in the loss.
            (losses[: len(group)].sum() / len(chosen_pairs)).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach()[: len(group)].sum())
        sums = add(sums)
        updated = run.update(step - 1)
        num_tokens = sum(
            2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
            for pair in chosen_pairs
        )
        run.progress["num_tokens"] += num_tokens
        seconds = time.perf_counter() - started
        run.log_generations(step)
        run.end_step(
            step,
            {
                **{name: total / len(chosen_pairs) for name, total in sums.items()},
                **updated,
                "seconds_updating": round(seconds, 4),
                "tokens_per_second": round(num_tokens / seconds, 1),
            },
        )
        if step % 50 == 0 or step == run.num_steps:
            log.info("step %d/%d: loss %.4f", step, run.num_steps, sums["loss"] / len(chosen_pairs))
    summary: Json = {"num_examples": len(pairs)}
    if args.sampling_stats is not None:
        summary |= sampling_cost([read_json(args.sampling_stats)])
    run.finish(summary)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
