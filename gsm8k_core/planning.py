"""What a study will cost, before anything runs: jobs, files, bytes and seconds.

Seconds are measured where a finished run of the same model and method (or suite) left its records
below artifacts/experiments, in whatever study, and are scaled by steps or completions, and to the
GPUs that a job would have, as if twice as many took half the time. Else they are arithmetic: 6·N
FLOPs for each token that is trained on and 2·N for each that is read or sampled (Kaplan et al.
2020, §2.1; N parameters), over the device's FLOP/s times an assumed utilisation. Validation is
counted; what dynamic sampling samples again is not: nobody knows it before (`unknown_refills`).
Where N is not known nor is the time: it is None, never a guess.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gsm8k_core.config import (
    Config,
    DpoMethod,
    ExpertIterationMethod,
    GrpoMethod,
    Gsm8kDataset,
    SftMethod,
    SuiteSettings,
)
from gsm8k_core.files import Json, read_record
from gsm8k_core.layout import ARTIFACTS, Layout
from gsm8k_core.records import num_gpus, seconds_of_training_job

# Counted in finished runs of the default study: files of a run, of each of its suites and rounds.
# A model is config.json, generation_config.json, tokenizer (2), weights and Snakemake's time stamp.
FILES_OF_MODEL = 6
FILES_OF_RUN = 6  # settings, metrics, logged completions, summary, log, benchmark
FILES_OF_SUITE = 9  # completions, stats, metrics, grades and their record, two logs, two benchmarks
FILES_OF_SAMPLING = 7  # a round's completions, stats, selection, two logs, two benchmarks
FILES_OF_RESULTS = 24
BYTES_PER_PARAMETER = 4  # weights are saved in float32
STATE_BYTES_PER_PARAMETER = 12  # weights and AdamW's two moments
# A row of completions.jsonl (token ids, text, finish reason) and of grades in Parquet, as measured.
BYTES_OF_COMPLETION, BYTES_OF_TOKEN, BYTES_OF_GRADES = 180, 6, 4
BYTES_OF_RUN = 200_000  # metrics, logs, settings, tokenizer
# benchmarks/plan_scale.py, on two cores: 17,625 jobs in 41 s.
SECONDS_OF_START, SECONDS_PER_JOB = 3.0, 0.0022
# Problems that a suite reads where its dataset does not say how many (GSM8K's test split).
GSM8K_TEST_PROBLEMS = 1319
ARITHMETIC = "arithmetic"  # where seconds come from


def _assumed(value: Any, help_text: str) -> Any:
    """A field of `Assumptions` with its default and what its flag says."""
    return field(default=value, metadata={"help": help_text})


@dataclass(frozen=True)
class Assumptions:
    """What the arithmetic stands on where nothing was measured."""

    gpu_flops: float = _assumed(312e12, "peak FLOP/s of one GPU; bfloat16 of an A100, by its sheet")
    cpu_flops: float = _assumed(50e9, "peak FLOP/s of a job without a GPU")
    training_utilisation: float = _assumed(0.3, "share of the peak reached in training, 0 to 1")
    # Decoding waits for memory.
    sampling_utilisation: float = _assumed(0.1, "share of the peak reached in sampling, 0 to 1")
    # vLLM's Python (docs/experiments.md).
    sampling_seconds_per_token: float = _assumed(
        70e-6, "least seconds per sampled token on a GPU, however small the model"
    )
    engine_start_seconds: float = _assumed(
        60.0, "seconds that vLLM takes to start on a GPU, in each job that samples"
    )
    prompt_tokens: int = _assumed(150, "mean length of a prompt, in tokens")
    completion_tokens: int = _assumed(
        250, "mean length of a completion, in tokens; none is longer than its max_new_tokens"
    )
    parameters: dict[str, float] = field(default_factory=dict)
    """Parameters of models that are not on this machine, by name."""


@dataclass(frozen=True)
class Work:
    """One kind of work for one model and method: so many runs of so many seconds."""

    model: str
    method: str
    suite: str | None
    runs: int
    finished: int
    seconds: float | None
    """Of one run; None: not known."""
    source: str
    gpus: int


def jobs_by_rule(config: Config) -> dict[str, int]:
    """Jobs of the study from nothing to its report, as `snakemake -n` counts them."""
    jobs: Counter[str] = Counter({"compare": 1, "plot": 1, "report": 1, "all": 1})
    models, suites = len(config.study.models), len(config.study.suites)
    jobs["prepare_model"] = models
    datasets = {config.suites[name].dataset for name in config.study.suites}
    traces: set[str] = set()
    for method in config.stages():
        settings = config.methods[method]
        runs = models * len(config.seeds_of(method))
        if not settings.trains:
            continue
        datasets.add(config.study.dataset)  # for its `val` at least
        learned = config.dataset_of(method)
        (traces if learned in config.traces else datasets).add(learned)
        jobs["generate_round"] += runs * settings.sampling_rounds
        if isinstance(settings, ExpertIterationMethod):
            for rule in ("select_completions", "train_round"):
                jobs[rule] += runs * settings.rounds
            jobs["finish_rounds"] += runs
        else:
            jobs[f"train_{settings.kind}"] += runs
        if isinstance(settings, DpoMethod):
            jobs["select_pairs"] += runs
    for method in config.study.methods:
        runs = models * len(config.seeds_of(method)) * suites
        jobs["generate"] += runs
        jobs["grade"] += runs
    for rule in ("collect_traces", "select_traces"):
        jobs[rule] = len(traces)
    jobs["prepare_data"] = len(datasets | {config.traces[name].dataset for name in traces})
    return {rule: count for rule, count in jobs.items() if count}


def num_parameters(folder: Path) -> int | None:
    """Parameters of a model's folder, by the headers of its safetensors; None where unknown."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as tensors:
                names = tensors.keys()
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
        except SafetensorError:  # cut short: preparing the model says so
            return None
    return total or None


@dataclass
class Records:
    """What finished runs of all studies below artifacts/ tell of their time and length."""

    training: dict[tuple[str, str], list[Json]] = field(default_factory=lambda: defaultdict(list))
    generating: dict[tuple[str, str], list[Json]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def read() -> Records:
        records = Records()
        root = Path(ARTIFACTS) / "experiments"
        for path in sorted(root.glob("*/*/*/seed*/train/summary.json")):
            if summary := read_record(path):
                records.training[summary["model"], summary["method"]].append(summary)
        for path in sorted(root.glob("*/*/*/seed*/completions/*.stats.json")):
            if stats := read_record(path):
                records.generating[stats["model"], stats["suite"]].append(stats)
        return records


def parameters_of(config: Config, model: str, assumptions: Assumptions) -> float | None:
    """Parameters of a model: as given, or counted in artifacts/models or in a local folder."""
    if model in assumptions.parameters:
        return assumptions.parameters[model]
    path = config.models[model].path
    counted = num_parameters(Path(Layout(config).starting_weights(model)))
    return counted or (num_parameters(Path(path).expanduser()) if path else None)


def split_size(config: Config, name: str, split: str) -> int:
    """Problems of a split of a dataset.

    Rows of one's own are counted when they have been prepared; before, they count as GSM8K's.
    """
    dataset = config.datasets[name]
    prepared = read_record(Path(Layout(config).data(name), "manifest.json"))
    if split in prepared:
        return int(prepared[split]["num_problems"])
    if not isinstance(dataset, Gsm8kDataset):
        return {"train": dataset.num_train, "val": dataset.num_val, "test": dataset.num_test}[split]
    sizes = {"train": 7473 - dataset.num_val, "val": dataset.num_val}
    return sizes.get(split, GSM8K_TEST_PROBLEMS - (110 if dataset.platinum else 0))


def suite_size(config: Config, suite: SuiteSettings) -> tuple[int, int]:
    """Problems and completions of a suite."""
    num_problems = split_size(config, suite.dataset, suite.split)
    num_problems = min(num_problems, suite.limit or num_problems)
    return num_problems, num_problems * (suite.greedy + suite.num_samples)


def unknown_refills(config: Config, work: list[Work]) -> dict[str, int]:
    """Methods whose steps may sample so many rounds more than the arithmetic of `work` counts."""
    by_arithmetic = {item.method for item in work if not item.suite and item.source == ARITHMETIC}
    return {
        method: settings.max_refills
        for method in config.stages()
        if isinstance(settings := config.methods[method], GrpoMethod)
        and settings.dynamic_sampling
        and method in by_arithmetic
    }


def work_of(config: Config, records: Records, assumptions: Assumptions) -> list[Work]:
    """Training of every stage and generation of every cell, by model and method."""
    layout = Layout(config)
    work = []
    for model in config.study.models:
        gpus = config.models[model].gpus
        generating = config.models[model].gpus_generating
        for method in config.stages():
            if not config.methods[method].trains:
                continue
            seeds = config.seeds_of(method)
            seconds, source = _training_seconds(config, records, assumptions, model, method)
            done = sum(
                Path(layout.run(model, method, seed), "train", "summary.json").exists()
                for seed in seeds
            )
            work.append(Work(model, method, None, len(seeds), done, seconds, source, gpus))
        for method in config.study.methods:
            for suite in config.study.suites:
                seeds = config.seeds_of(method)
                seconds, source = _generation_seconds(config, records, assumptions, model, suite)
                done = sum(
                    Path(layout.run(model, method, seed), "metrics", f"{suite}.json").exists()
                    for seed in seeds
                )
                cell = Work(model, method, suite, len(seeds), done, seconds, source, generating)
                work.append(cell)
    return work


def _training_seconds(
    config: Config, records: Records, assumptions: Assumptions, model: str, method: str
) -> tuple[float | None, str]:
    settings = config.trained(method)
    rounds = max(1, settings.sampling_rounds)
    num_steps = settings.num_steps * rounds
    if measured := records.training.get((model, method)):
        gpus = config.models[model].gpus
        scaled = [
            seconds_of_training_job(one)
            * (num_steps / one["num_steps"])
            * (max(1, one.get("num_ranks", 1)) / max(1, gpus))
            for one in measured
        ]
        return statistics.median(scaled), f"measured, {len(measured)} runs"
    size = parameters_of(config, model, assumptions)
    if size is None:
        return None, "parameters unknown"
    a = assumptions
    gpus = config.models[model].gpus
    tokens = tokens_of_training(config, method, a)
    seconds = 6 * size * tokens.trained / (_flops(gpus, a) * a.training_utilisation)
    seconds += _sampling_seconds(size, tokens.sampled, gpus, a, rounds)
    # GRPO validates with the engine that samples; other trainers start one for it, in each round.
    starts = 0 if isinstance(settings, GrpoMethod) else rounds
    seconds += _sampling_seconds(size, tokens.validated, gpus, a, starts)
    return seconds, ARITHMETIC


@dataclass(frozen=True)
class Tokens:
    """What one training run computes on, by the arithmetic."""

    trained: float
    """Those that are only scored count a third."""
    sampled: float
    """To train on."""
    validated: float
    """Sampled in validation."""


def tokens_of_training(config: Config, method: str, a: Assumptions) -> Tokens:
    """Tokens of one run of a method that trains, all its rounds together."""
    settings = config.trained(method)
    rounds = max(1, settings.sampling_rounds)
    num_steps = settings.num_steps * rounds
    trained = sampled = validated = 0.0
    if isinstance(settings, SftMethod | ExpertIterationMethod):
        trained = num_steps * settings.batch_size * (a.prompt_tokens + a.completion_tokens)
    if isinstance(settings, DpoMethod):  # two completions, and as often the reference
        pairs = num_steps * settings.batch_size
        trained = pairs * 2 * (a.prompt_tokens + a.completion_tokens) * 4 / 3
    if isinstance(settings, ExpertIterationMethod | DpoMethod):
        completions = rounds * settings.prompts_per_round * settings.completions_per_prompt
        sampled = completions * min(a.completion_tokens, settings.max_new_tokens)
    elif isinstance(settings, GrpoMethod):
        completions = num_steps * settings.prompts_per_step * settings.group_size
        length = min(a.completion_tokens, settings.max_new_tokens)
        scored = 1 + (settings.kl_coefficient > 0)
        passes = settings.epochs_per_batch + scored / 3
        trained = completions * (a.prompt_tokens + length) * passes
        sampled = completions * length
    if every := settings.validate_every_steps:
        times = rounds * (1 + math.ceil(settings.num_steps / every))  # the start too, and the end
        num_val = split_size(config, config.study.dataset, "val")
        problems = min(num_val, settings.num_validation_problems)
        length = min(a.completion_tokens, settings.validation_max_new_tokens)
        validated = times * problems * length
    return Tokens(trained, sampled, validated)


def _generation_seconds(
    config: Config, records: Records, assumptions: Assumptions, model: str, suite: str
) -> tuple[float | None, str]:
    _, completions = suite_size(config, config.suites[suite])
    gpus = config.models[model].gpus_generating
    if measured := records.generating.get((model, suite)):
        seconds = [
            one["seconds_loading"]
            + one["seconds_generating"]
            * (completions / one["num_completions"])
            * (max(1, gpus if (held := num_gpus(one)) is None else held) / max(1, gpus))
            for one in measured
        ]
        return statistics.median(seconds), f"measured, {len(measured)} runs"
    size = parameters_of(config, model, assumptions)
    if size is None:
        return None, "parameters unknown"
    length = min(assumptions.completion_tokens, config.suites[suite].max_new_tokens)
    return _sampling_seconds(size, completions * length, gpus, assumptions), ARITHMETIC


def _sampling_seconds(
    size: float, tokens: float, gpus: int, assumptions: Assumptions, starts: int = 1
) -> float:
    """Seconds to sample `tokens` from a model of `size` parameters, in so many jobs; 0 for none."""
    if not tokens:
        return 0.0
    per_token = 2 * size / (_flops(gpus, assumptions) * assumptions.sampling_utilisation)
    if not gpus:
        return tokens * per_token
    per_token = max(per_token, assumptions.sampling_seconds_per_token / gpus)
    return tokens * per_token + starts * assumptions.engine_start_seconds


def _flops(gpus: int, assumptions: Assumptions) -> float:
    return gpus * assumptions.gpu_flops if gpus else assumptions.cpu_flops


def disk_use(
    config: Config, assumptions: Assumptions, gpus: int, cpu_jobs: int
) -> dict[str, float | None]:
    """Bytes by what they are; None: not known.

    Of a model, as many runs hold checkpoints at once as `gpus` allow, or `cpu_jobs` without one.
    `most at once` adds up what lies on the disk together; checkpoints that newer ones replace, and
    weights that are dropped, are written besides.
    """
    sizes = [parameters_of(config, model, assumptions) for model in config.study.models]
    known = [size for size in sizes if size is not None]
    rounds = runs = state = saves = 0  # the last two: bytes of a parameter
    sampled = 0.0
    for method in config.stages():
        settings = config.methods[method]
        if not settings.trains:
            continue
        seeds = len(config.seeds_of(method))
        runs += seeds
        times = max(1, settings.sampling_rounds)
        # One more is there while it is written. Each may name other best weights, as may the run.
        num_checkpoints = settings.keep_checkpoints + 1
        best = BYTES_PER_PARAMETER * (num_checkpoints + 1) if settings.keep_best else 0
        saved = 0 if settings.lora else STATE_BYTES_PER_PARAMETER  # of adapters it is little
        state = max(state, best + saved * num_checkpoints)
        every = settings.checkpoint_every_steps
        saves += seeds * times * saved * ((settings.num_steps - 1) // every)
        if isinstance(settings, ExpertIterationMethod):
            rounds += seeds * (settings.rounds - 1)  # the last one is linked, not copied
        if isinstance(settings, ExpertIterationMethod | DpoMethod):
            length = min(assumptions.completion_tokens, settings.max_new_tokens)
            rows = times * settings.prompts_per_round * settings.completions_per_prompt
            # The rows that are selected of them are written once more, without their tokens.
            sampled += 1.5 * seeds * rows * (BYTES_OF_COMPLETION + BYTES_OF_TOKEN * length)
    all_known = len(known) == len(sizes)
    of_job = [config.models[model].gpus for model in config.study.models]
    at_once = [
        (size or 0) * (max(1, gpus // each) if each else cpu_jobs)
        for size, each in zip(sizes, of_job, strict=True)
    ]
    weights = sum(known) * BYTES_PER_PARAMETER
    keep = config.study.keep_models
    evaluations = sum(len(config.seeds_of(method)) for method in config.study.methods)
    completions = grades = 0
    for name in config.study.suites:
        suite = config.suites[name]
        length = min(assumptions.completion_tokens, suite.max_new_tokens)
        rows = suite_size(config, suite)[1] * evaluations
        completions += rows * (BYTES_OF_COMPLETION + BYTES_OF_TOKEN * length)
        grades += rows * BYTES_OF_GRADES
    models = len(config.study.models)
    kept = {"none": 0, "final": runs, "all": runs + rounds}[keep]
    lying = {
        "starting weights": weights if all_known else None,
        "trained weights kept": weights * kept if all_known else (0.0 if keep == "none" else None),
        "checkpoints while running": max(at_once) * state if all_known else None,
        "completions": models * completions,
        "completions trained on": models * sampled,
        "grades": models * grades,
        "records and logs": models * runs * BYTES_OF_RUN,
    }
    sizes_known = [size for size in lying.values() if size is not None]
    return {
        **lying,
        "most at once": sum(sizes_known) if len(sizes_known) == len(lying) else None,
        "trained weights dropped": weights * (runs + rounds - kept) if all_known else None,
        "checkpoints written in all": sum(known) * saves if all_known else None,
    }


def num_files(config: Config) -> int:
    """Files below artifacts/ at the end, about; Snakemake keeps one more for each output itself."""
    models, keep = len(config.study.models), config.study.keep_models
    total = FILES_OF_RESULTS + models * FILES_OF_MODEL
    for method in config.stages():
        settings = config.methods[method]
        runs = models * len(config.seeds_of(method))
        if not settings.trains:
            continue
        total += runs * (FILES_OF_RUN + (FILES_OF_MODEL if keep != "none" else 0))
        total += runs * settings.sampling_rounds * FILES_OF_SAMPLING
        if isinstance(settings, ExpertIterationMethod):
            of_model = FILES_OF_MODEL if keep == "all" else 0
            total += runs * settings.rounds * (FILES_OF_RUN + of_model)
    cells = sum(len(config.seeds_of(method)) for method in config.study.methods)
    return total + models * cells * len(config.study.suites) * FILES_OF_SUITE
