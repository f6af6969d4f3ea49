"""Supervised fine-tuning on demonstrations: cross-entropy on the response tokens alone.

Also one round of expert iteration, whose demonstrations are the model's own correct completions
(`--data` is then what scripts/select_completions.py wrote). The loss is a mean over the response
tokens of the whole optimizer step, so it does not depend on the microbatch size.

    python scripts/train_sft.py --model-name tiny-qwen2 --method sft --seed 0 \\
        --starting-model artifacts/models/tiny-qwen2 --data artifacts/arithmetic/train.jsonl \\
        --output-dir /tmp/sft

    python scripts/train_sft.py --model-name tiny-qwen2 --method rft --round 1 --seed 0 \\
        --starting-model /tmp/sft/model --data /tmp/rft/round1/demonstrations.jsonl \\
        --output-dir /tmp/rft/round1

Started again after a kill, it resumes from its last checkpoint. On several GPUs:
`torchrun --standalone --nproc-per-node 4 scripts/train_sft.py …`
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import itertools
import logging
import math
import time
from pathlib import Path
from typing import Any

from gsm8k_core.cli import leave, run_script, run_settings_from, training_parser
from gsm8k_core.config import ExpertIterationMethod, RunSettings, SftSettings
from gsm8k_core.distributed import gather, own_work
from gsm8k_core.errors import DataError
from gsm8k_core.files import iter_jsonl, seed_from
from gsm8k_core.models import max_positions, num_embeddings
from gsm8k_core.problems import checked_text, read_problems
from gsm8k_core.prompts import demonstration, encode_prompts
from gsm8k_core.scoring import score_responses
from gsm8k_core.sft import check_packing, sft_loss
from gsm8k_core.tokenization import (
    Batch,
    checked_token_ids,
    collate,
    collate_packed,
    pack_examples,
    pad_token_id,
    split_by_token_budget,
)
from gsm8k_core.training import TrainingRun, endless_order, leave_out_long, take

log = logging.getLogger("train_sft")
Example = tuple[list[int], list[int]]


def load_examples(
    path: Path,
    run_settings: RunSettings,
    tokenizer: Any,
    vocab_size: int,
    num_positions: int | None = None,
) -> list[Example]:
    """(prompt ids, response ids) of every demonstration within `max_length` and `num_positions`.

    The latter are the model's: generate.py cuts a prompt that leaves no room for a completion, so
    what was sampled may be too long together with the whole of it. Demonstrations in words get an
    EOS. What a model sampled is kept as its token ids: decoding and tokenizing again need not give
    them back. Raises DataError that names file and row for every fault, and where no demonstration
    is left.
    """
    settings = run_settings.of_kind(SftSettings)
    if isinstance(settings, ExpertIterationMethod):
        questions, responses = [], []
        for number, row in enumerate(iter_jsonl(path), start=1):
            where = f"{path}, row {number}"
            questions.append(checked_text(row.get("question"), f"{where}: 'question'"))
            responses.append(checked_token_ids(row, "response_ids", where, vocab_size))
    else:
        problems = read_problems(path)
        questions = [problem.question for problem in problems]
        texts = [demonstration(problem, run_settings.prompt) for problem in problems]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        responses = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    prompt_ids = encode_prompts(questions, run_settings.prompt, tokenizer)
    longest, bound, advice = settings.max_length, f"max_length {settings.max_length}", "raise it"
    if num_positions is not None and num_positions < longest:
        longest, bound = num_positions, f"the model's {num_positions} positions"
        advice = "take a model with more"
    every = list(zip(prompt_ids, responses, strict=True))
    lengths = [len(prompt) + len(response) for prompt, response in every]
    examples = leave_out_long(every, lengths, longest, "demonstrations", bound)
    if not examples:
        raise DataError(
            f"{path}: none of its {len(questions)} demonstrations is within {bound}; {advice} (or "
            "the parent solved no problem)"
        )
    return examples


def microbatches(
    examples: list[Example], settings: SftSettings, tokens_per_microbatch: int, pad_id: int
) -> list[Batch]:
    """This rank's part of one optimizer step's examples, cut (or packed) to the token budget."""
    prompts, responses = [e[0] for e in examples], [e[1] for e in examples]
    lengths = [len(p) + len(r) - 1 for p, r in examples]

    def cut(share: list[int]) -> list[list[list[int]]]:
        """The microbatches of some examples, as rows of one or (packed) several of them."""
        rows = [[place] for place in range(len(share))]
        if settings.packing:
            rows = pack_examples([lengths[index] for index in share], settings.max_length)
        rows = [[share[place] for place in row] for row in rows]
        widths = [sum(lengths[index] for index in row) for row in rows]
        groups = split_by_token_budget(widths, tokens_per_microbatch)
        return [[rows[place] for place in group] for group in groups]

    batches = []
    for rows in own_work(lengths, cut):
        has_work = bool(rows)
        rows = rows or [[lengths.index(min(lengths))]]
        if settings.packing:
            batch = collate_packed(prompts, responses, rows, pad_id)
        else:
            own = [index for row in rows for index in row]
            batch = collate([prompts[i] for i in own], [responses[i] for i in own], pad_id)
        batch["response_mask"] &= has_work
        batches.append(batch)
    return batches


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__).parse_args(argv)

    run_settings = run_settings_from(args)
    settings = run_settings.of_kind(SftSettings)
    run = TrainingRun.from_arguments(args, run_settings)
    pad_id = pad_token_id(run.tokenizer, num_embeddings(run.model))
    config = run.model.config
    examples = load_examples(
        args.data, run_settings, run.tokenizer, config.vocab_size, max_positions(run.model)
    )
    if settings.packing:
        check_packing(run.model)
    steps_done, _ = run.resume()
    run.say_passes(len(examples), settings.batch_size)
    order = endless_order(
        len(examples), seed_from(run_settings.seed, run_settings.method, run_settings.round)
    )
    order = itertools.islice(order, steps_done * settings.batch_size, None)

    run.model.train()
    if steps_done == 0:
        run.validate_start()
        run.log_generations(0)
    for step in run.steps_after(steps_done, "SFT"):
        started = time.perf_counter()
        chosen = take(examples, order, settings.batch_size)
        batches = microbatches(chosen, settings, run.tokens_per_microbatch, pad_id)
        num_own_tokens = sum(int(batch["response_mask"].sum()) for batch in batches)
        num_response_tokens = sum(gather(num_own_tokens))
        loss = 0.0
        for batch in batches:
            on_device = {name: tensor.to(run.device) for name, tensor in batch.items()}
            with run.autocast():
                log_probs = score_responses(run.model, **on_device)["log_probs"]
            share = sft_loss(log_probs, on_device["response_mask"], num_response_tokens)
            share.backward()
            loss += float(share.detach())
        loss = sum(gather(loss))
        updated = run.update(step - 1)
        num_tokens = sum(len(prompt) + len(response) for prompt, response in chosen)
        run.progress["num_tokens"] += num_tokens
        seconds = time.perf_counter() - started
        run.log_generations(step)
        run.end_step(
            step,
            {
                "loss": loss,
                "perplexity": math.exp(min(loss, 50.0)),
                "num_response_tokens": num_response_tokens,
                **updated,
                "seconds_updating": round(seconds, 4),
                "tokens_per_second": round(num_tokens / seconds, 1),
            },
        )
        if step % 50 == 0 or step == run.num_steps:
            log.info("step %d/%d: loss %.4f", step, run.num_steps, loss)
    last_loss = loss if run.num_steps > steps_done else None
    run.finish({"num_examples": len(examples), "loss": last_loss})
    return 0


if __name__ == "__main__":
    leave(run_script(main))
