"""Store a model's completions on a suite: tokens, text, finish reason. grade.py grades them.

Every completion's random stream depends on (seed, suite, problem, sample) alone. Finished problems
are kept in `<output>.partial` until the completions are graded or selected from, so a job that was
killed, or whose outputs Snakemake rejected, resumes where it was; to generate anew, delete it. With
`--round` in place of `--suite`, what is stored is what the method learns from.

    python scripts/generate.py --model-name tiny-qwen2 --method grpo --suite arithmetic --seed 0 \\
        --model /tmp/grpo/model --data artifacts/arithmetic/test.jsonl \\
        --output /tmp/grpo/completions/arithmetic.jsonl --stats /tmp/grpo/arithmetic.stats.json

    python scripts/generate.py --model-name tiny-qwen2 --method rft --round 1 --seed 0 \\
        --model /tmp/sft/model --data artifacts/arithmetic/train.jsonl \\
        --output /tmp/rft/round1/completions.jsonl --stats /tmp/rft/round1/completions.stats.json
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import argparse
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsm8k_core.cli import (
    add_engine_arguments,
    add_settings_arguments,
    check_known,
    check_round,
    config_from,
    given_settings,
    leave,
    non_negative,
    parser,
    positive,
    run_script,
    with_engine_arguments,
)
from gsm8k_core.config import EvaluationSettings, SuiteSettings
from gsm8k_core.engines.base import Completion, Engine, Request
from gsm8k_core.engines.start import choose_engine, close_engine, engine_dtype, start_engine
from gsm8k_core.errors import ConfigError
from gsm8k_core.files import (
    Json,
    attempts_of,
    cut_torn_line,
    drop_finished,
    iter_jsonl,
    lock,
    lock_of,
    partials,
    read_lines,
    read_record,
    seed_from,
    sha256_file,
    sha256_json,
    unlock,
    write_json,
    write_jsonl,
)
from gsm8k_core.layout import RUNS
from gsm8k_core.manifest import Attempts, code_digest, provenance, provenance_at_end
from gsm8k_core.models import (
    device_name,
    peak_memory_mb,
    resolve_device,
    tokenizer_digest,
    weights_digest,
)
from gsm8k_core.problems import Problem, read_problems
from gsm8k_core.progress import progress_bar
from gsm8k_core.prompts import prompt_token_ids, render_prompt

log = logging.getLogger("generate")


def select_problems(path: Path, suite: SuiteSettings) -> list[Problem]:
    """The suite's problems: shuffled if it says so, then the first `limit`."""
    problems = read_problems(path)
    if suite.shuffle_seed is not None:
        random.Random(suite.shuffle_seed).shuffle(problems)
    return problems[: suite.limit]


def warn_of_other_run(model: Path, settings: EvaluationSettings) -> None:
    """Say so where the weights are those of another run than the completions will be kept for."""
    of_run = read_record(model.resolve().parent / "settings.json")
    # A round is sampled from the parent's weights, or the round's before.
    fitting: dict[str, list[Any]] = {
        "method": [settings.method, settings.parent],
        "seed": [settings.seed],
    }
    for key, values in fitting.items():
        if key in of_run and of_run[key] not in values:
            log.warning("%s is of %s %s, not %s", model, key, of_run[key], values[0])


def requests_for(problem: Problem, settings: EvaluationSettings, tokenizer: Any) -> list[Request]:
    """The greedy completion and the samples that the suite asks of one problem."""
    suite = settings.suite_settings
    text = render_prompt(problem.question, settings.prompt, tokenizer, problem.examples)
    (prompt_ids,) = prompt_token_ids([text], settings.prompt, tokenizer)
    seeds = [
        seed_from(settings.seed, settings.suite, problem.id, k) for k in range(suite.num_samples)
    ]
    requests = []
    if suite.greedy:
        requests.append(Request(prompt_ids, [0], 0.0, suite.max_new_tokens, suite.stop))
    if seeds:
        requests.append(
            Request(
                prompt_ids,
                seeds,
                suite.temperature,
                suite.max_new_tokens,
                suite.stop,
                suite.top_p,
                suite.top_k,
            )
        )
    return requests


def completion_rows(
    problem: Problem, requests: list[Request], completions: list[list[Completion]]
) -> list[Json]:
    return [
        {
            "problem_id": problem.id,
            "decoding": "greedy" if request.temperature == 0.0 else "sample",
            "sample_index": sample_index,
            "gold": problem.gold,
            **({} if problem.cluster is None else {"cluster": problem.cluster}),
            "completion": completion.text,
            "token_ids": completion.token_ids,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for request, group in zip(requests, completions, strict=True)
        for sample_index, completion in enumerate(group)
    ]


def generate_problems(
    problems: list[Problem],
    settings: EvaluationSettings,
    engine: Engine,
    save: Callable[[Json], None],
) -> None:
    """Ask the engine for all of a suite at once; `save` a problem when it has all it asks for.

    A prompt that leaves no room for max_new_tokens loses its beginning, which is counted.
    """
    asked = [requests_for(problem, settings, engine.tokenizer) for problem in problems]
    room = None
    if engine.max_length is not None:
        room = engine.max_length - settings.suite_settings.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"suites.{settings.suite}.max_new_tokens leaves no room for a prompt: the model "
                f"has {engine.max_length} positions"
            )
    owners, requests = [], []
    for place, group in enumerate(asked):
        for k, request in enumerate(group):
            owners.append((place, k))
            prompt_ids = request.prompt_ids if room is None else request.prompt_ids[-room:]
            requests.append(replace(request, prompt_ids=prompt_ids))
    found: list[dict[int, list[Completion]]] = [{} for _ in problems]
    started = time.perf_counter()

    def on_done(index: int, completions: list[Completion]) -> None:
        place, k = owners[index]
        found[place][k] = completions
        if len(found[place]) < len(asked[place]):
            return
        num_prompt_tokens = len(asked[place][0].prompt_ids)
        groups = [found[place][k] for k in range(len(asked[place]))]
        save(
            {
                "problem_id": problems[place].id,
                "seconds_total": time.perf_counter() - started,
                "num_prompt_tokens": num_prompt_tokens,
                "prompt_truncated": room is not None and num_prompt_tokens > room,
                "rows": completion_rows(problems[place], asked[place], groups),
            }
        )

    engine.generate(requests, on_done)


def choose_partial(output: Path, header: Json) -> tuple[Path, dict[str, Json]]:
    """The file that finished problems are to be kept in, and those that are in it, by id.

    It is one that begins with `header`, or a free one. Problems that were generated with another
    header (other settings, engine, model or problems) stay where they are, and may be gone on
    with; where neither file is free, the older one is dropped. Warnings say so. Cuts off a torn
    last line.
    """
    kept: dict[Path, Json] = {}
    num_done: dict[Path, int] = {}
    there = filter(Path.exists, partials(output))
    for path in sorted(there, key=lambda path: path.stat().st_mtime_ns):  # cutting is a change too
        cut_torn_line(path)
        num_done[path] = sum(1 for _ in read_lines(path)) - 1
        if num_done[path] > 0:
            kept[path] = next(iter_jsonl(path))
    fitting = [path for path in kept if kept[path] == header]
    free = [path for path in partials(output) if path not in kept]
    chosen = [*fitting, *free, *kept][0]
    for path, before in kept.items():
        if before != header:
            keys = sorted(key for key in {*before, *header} if before.get(key) != header.get(key))
            log.warning(
                "%s: %s %d finished problems, which were generated with other %s",
                path,
                "dropping" if path == chosen else "leaving aside",
                num_done[path],
                ", ".join(keys),
            )
    if not fitting:
        chosen.unlink(missing_ok=True)
        return chosen, {}
    rows = iter_jsonl(chosen)
    next(rows)
    return chosen, {row["problem_id"]: row for row in rows}


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """The settings that the arguments name."""
    settings: EvaluationSettings | None = given_settings(args, EvaluationSettings)
    if settings is None:
        if not (args.model_name and args.method and bool(args.suite) != bool(args.round)):
            raise ConfigError(
                "say what to generate: --settings, or --model-name, --method and either --suite or "
                "--round"
            )
        config = config_from(args)
        check_known("--model-name", args.model_name, config.models)
        check_known("--method", args.method, config.methods)
        seed = args.seed or 0
        if args.suite:
            check_known("--suite", args.suite, config.suites)
            settings = config.evaluation_settings(args.model_name, args.method, seed, args.suite)
        else:
            check_round(args, config.methods[args.method].sampling_rounds)
            settings = config.round_generation_settings(
                args.model_name, args.method, seed, args.round
            )
    model_settings = with_engine_arguments(settings.model_settings, args)
    return settings.model_copy(update={"model_settings": model_settings})


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_settings_arguments(arguments)
    arguments.add_argument("--model-name", help="a model of the config")
    arguments.add_argument("--method", help="the method that trained it")
    arguments.add_argument("--suite", help="a suite of the config")
    arguments.add_argument(
        "--round",
        type=positive,
        help="instead of a suite: a round of expert iteration or DPO (1), from train problems",
    )
    arguments.add_argument("--seed", type=non_negative, help="seed of the run (default: 0)")
    arguments.add_argument("--model", type=Path, required=True, help="folder of the model")
    arguments.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    arguments.add_argument("--output", type=Path, required=True, help="completions, JSONL")
    arguments.add_argument("--stats", type=Path, required=True, help="seconds, tokens, JSON")
    add_engine_arguments(arguments)
    args = arguments.parse_args(argv)

    settings = settings_of(args)
    problems = select_problems(args.data, settings.suite_settings)
    device = resolve_device(settings.model_settings.gpus)
    made_by = provenance()

    lock_path = lock_of(args.output)
    held = lock(lock_path, str(args.output))
    engine_name = choose_engine(settings.model_settings, args.model, device)
    header = {
        "settings": settings.without_resources().model_dump(mode="json", by_alias=True),
        "engine": engine_name,
        "weights": weights_digest(args.model),
        "tokenizer": tokenizer_digest(args.model),
        "problems": sha256_file(args.data),
    }
    num_gpus = settings.model_settings.vllm.tensor_parallel if engine_name == "vllm" else 1
    attempts = Attempts(
        attempts_of(args.output), sha256_json(header), num_gpus if device.type == "cuda" else 0
    )
    partial, done = choose_partial(args.output, header)
    code = code_digest()
    has_ended = attempts.state_before == "finished" and len(done) == len(problems)
    changed = any(entry["code"] != code for entry in done.values())
    if has_ended and (changed or args.output.exists()):
        done = {}  # nothing was taken away, or not by a rejection: it is to be done again
        partial.unlink()
    if done:
        log.info("resuming after %d of %d problems, from %s", len(done), len(problems), partial)
    warn_of_other_run(args.model, settings)
    if not args.output.is_relative_to(RUNS):  # an `eval` writes nothing beside what it reads
        drop_finished(args.model)
    seconds_before = max((entry["seconds_total"] for entry in done.values()), default=0.0)
    loading_before = max((entry["seconds_loading"] for entry in done.values()), default=0.0)
    left = [problem for problem in problems if problem.id not in done]
    started = time.perf_counter()
    engine = None
    if left:
        engine = start_engine(args.model, settings.model_settings, device, engine_name)
    seconds_loading = loading_before + time.perf_counter() - started
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8", newline="\n") as handle:
        if not done:
            handle.write(json.dumps(header) + "\n")
        with progress_bar("generating", len(problems), len(done)) as bar:

            def save(entry: Json) -> None:
                """Keep a finished problem: a killed job goes on after it."""
                entry["seconds_total"] += seconds_before
                entry["seconds_loading"] = seconds_loading
                entry["peak_memory_mb"] = peak_memory_mb(device)
                entry["code"] = code
                done[entry["problem_id"]] = entry
                handle.write(json.dumps(entry, ensure_ascii=False) + "\n")
                handle.flush()
                bar.update()
                if len(done) * 10 // len(problems) > (len(done) - 1) * 10 // len(problems):
                    log.info("%d of %d problems", len(done), len(problems))
                    attempts.note()

            if engine is not None:
                generate_problems(left, settings, engine, save)

    rows = [row for problem in problems for row in done[problem.id]["rows"]]
    write_jsonl(args.output, rows)
    seconds_generating = max(entry["seconds_total"] for entry in done.values())
    num_truncated = sum(done[problem.id]["prompt_truncated"] for problem in problems)
    if num_truncated:
        log.warning(
            "%d of %d prompts were too long for the model and lost their beginning",
            num_truncated,
            len(problems),
        )
    num_tokens = sum(row["num_tokens"] for row in rows)
    # Of all calls: the last one may have found all problems done.
    peak = max(entry["peak_memory_mb"] for entry in done.values())
    write_json(
        args.stats,
        {
            "model": settings.model,
            "method": settings.method,
            "parent": settings.parent,
            "seed": settings.seed,
            "suite": settings.suite,
            "engine": engine_name,
            "device": device_name(device),
            "dtype": engine_dtype(settings.model_settings, device, engine_name),
            "problems_sha256": header["problems"],
            "weights": header["weights"],
            "completions_sha256": sha256_file(args.output),
            "num_problems": len(problems),
            "num_completions": len(rows),
            "num_prompt_tokens": sum(done[p.id]["num_prompt_tokens"] for p in problems),
            "num_prompts_truncated": num_truncated,
            "num_completion_tokens": num_tokens,
            "seconds_loading": round(seconds_loading, 3),
            "seconds_generating": round(seconds_generating, 3),
            "tokens_per_second": round(num_tokens / seconds_generating, 1),
            # Of processes that share a model, this one has none of it.
            "peak_memory_mb": None if num_gpus > 1 else peak,
            "settings": settings.model_dump(mode="json", by_alias=True),
            **attempts.as_finished(),
            "provenance": provenance_at_end(made_by),
        },
    )
    if engine is not None:
        close_engine(engine)
    # `partial` stays: Snakemake may not accept the outputs, and then removes them.
    attempts.finish()
    unlock(lock_path, held)
    log.info(
        "%d completions, %d tokens in %.1f s (%.0f tokens/s)",
        len(rows),
        num_tokens,
        seconds_generating,
        num_tokens / seconds_generating,
    )
    return 0


if __name__ == "__main__":
    leave(run_script(main))
