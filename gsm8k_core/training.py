"""What every trainer does besides its loss: set up, step, log, validate, checkpoint, resume, save.

The loops themselves stand in `scripts/train_*.py`. A run's folder:

    settings.json        all that decides the run
    model/               the trained weights and tokenizer
    train/metrics.jsonl  one row a step, and one of step 0 where the run validates
    train/completions.jsonl  what the model wrote now and then (`tracking`): GRPO a sample of its
                         rollouts, SFT and DPO greedy completions of some problems of `val`
    train/summary.json   seconds, tokens, peak memory, provenance
    state/               of an unfinished run: checkpoints, and metrics.jsonl and completions.jsonl
                         so far; gone when it has finished
    .finished/           of a finished run: links to all of the above, until its model is read
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from gsm8k_core import checkpoints, distributed, ranks
from gsm8k_core.config import (
    GrpoMethod,
    PromptSettings,
    RewardGrade,
    RunSettings,
    TrainedMethod,
    TrainSettings,
)
from gsm8k_core.engines.base import Engine, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.engines.start import choose_engine, close_engine, engine_dtype
from gsm8k_core.engines.vllm_engine import VllmEngine
from gsm8k_core.errors import ConfigError, TrainingError, first_line
from gsm8k_core.files import (
    FINISHED,
    Json,
    atomic_path,
    drop_finished,
    iter_jsonl,
    link_or_copy,
    lock,
    read_json,
    read_record,
    remove_folder,
    remove_leftovers,
    seed_from,
    sha256_file,
    sha256_json,
    unlock,
    write_json,
)
from gsm8k_core.generation import log_generations
from gsm8k_core.grading import is_right
from gsm8k_core.manifest import Attempts, code_digest, provenance, provenance_at_end
from gsm8k_core.models import (
    autocast,
    compile_layers,
    compute_dtype,
    device_name,
    empty_model,
    in_eval_mode,
    load_model,
    load_plain_weights,
    load_tokenizer,
    max_positions,
    peak_memory_mb,
    plain_weights,
    resolve_device,
    save_model,
    set_up_process,
    tokenizer_digest,
    weights_digest,
)
from gsm8k_core.problems import Problem, read_problems
from gsm8k_core.progress import progress
from gsm8k_core.prompts import encode_prompts, prompt_token_ids, render_prompt
from gsm8k_core.rewards import gsm8k_reward, reward_code
from gsm8k_core.tracking import (
    MetricsLog,
    TrackedRun,
    Tracker,
    completions_due,
    generations_due,
    new_run_id,
    start_tracker,
    tracking_settings,
)

log = logging.getLogger(__name__)
Item = TypeVar("Item")

# What larger microbatches compute leaves a CPU's cache, in memory that is mapped anew each time:
# 1.2 to 1.8 times as slow (docs/experiments.md).
CPU_TOKENS_PER_MICROBATCH = 2048
# Entries of a checkpoint's progress that must agree for a run to go on from it.
SAME_RUN = ("settings", "starting_weights", "data", "reward_code")
# What a finished run has, and Snakemake removes where it does not accept it.
OUTPUTS = ("model", "train/metrics.jsonl", "train/summary.json", "settings.json")


def learning_rate_at(update: int, num_updates: int, settings: TrainSettings) -> float:
    """The learning rate of optimizer step `update` (from 0) of `num_updates`.

    A pure function of the step, so a resumed run needs no scheduler state: linear warm-up, then
    constant, linear or cosine decay (Loshchilov & Hutter 2017, eq. 5) to the minimum.
    """
    num_warmup = round(settings.warmup_fraction * num_updates)
    if update < num_warmup:
        return settings.learning_rate * (update + 1) / num_warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (update - num_warmup) / max(1, num_updates - num_warmup)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    floor = settings.min_learning_rate_fraction
    return settings.learning_rate * (floor + (1.0 - floor) * left)


def endless_order(num_items: int, seed: int) -> Iterator[int]:
    """Indices of a shuffled list, shuffled anew each time round; the same for the same seed."""
    epoch = 0
    while True:
        order = list(range(num_items))
        random.Random(seed_from(seed, "order", epoch)).shuffle(order)
        yield from order
        epoch += 1


def take(items: Sequence[Item], order: Iterator[int], count: int) -> list[Item]:
    """The next `count` items in `order`."""
    return [items[next(order)] for _ in range(count)]


def leave_out_long(
    items: Sequence[Item], lengths: Sequence[int], longest: int, what: str, bound: str
) -> list[Item]:
    """The `items` of at most `longest` tokens; a warning counts the others.

    `what` names items and `bound` the limit in the warning.
    """
    kept = [item for item, length in zip(items, lengths, strict=True) if length <= longest]
    if len(kept) < len(items):
        log.warning(
            "%d of %d %s are longer than %s and are left out",
            len(items) - len(kept),
            len(items),
            what,
            bound,
        )
    return kept


def build_optimizer(model: torch.nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only."""
    parameters = list(checkpoints.trained_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        # On a GPU, what PyTorch takes by itself needs another copy of the weights for each step.
        fused=all(parameter.is_cuda for parameter in parameters) or None,
    )


def add_lora(model: PreTrainedModel, settings: TrainSettings) -> Any:
    """The model with low-rank adapters, which alone are trained; itself without `lora`.

    Raises ConfigError for `target_modules` that the model has not (peft leaves out those that it
    does not find beside others), or that can have no adapters: of a matrix that embeddings and head
    share there is one, and an adapter of either could not be merged into it.
    """
    if settings.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    targets = settings.lora.target_modules
    layers = dict(model.named_modules())
    tied = _layers_of_one_matrix(layers)
    linear = {
        name.rpartition(".")[2]
        for name, layer in layers.items()
        if isinstance(layer, torch.nn.Linear) and name not in tied
    }
    named = [] if targets == "all-linear" else targets
    lost = [target for target in named if not _layers_named(target, layers)]
    refused = [target for target in named if _layers_named(target, tied)]
    where = "methods.<name>.lora.target_modules"
    there_are = f"there are: {', '.join(sorted(linear))}"
    if lost:
        raise ConfigError(f"{where}: the model has no layer {', '.join(lost)}; {there_are}")
    if refused:
        raise ConfigError(
            f"{where}: {' and '.join(sorted(tied))} of this model are one matrix, which an adapter "
            f"of either would change for both: leave out {', '.join(refused)}; {there_are}"
        )
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=settings.lora.rank,
                lora_alpha=settings.lora.alpha,  # type: ignore[arg-type]  # it may be a float
                lora_dropout=settings.lora.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {first_line(error)}; {there_are}") from error


def _layers_named(target: str, names: Iterable[str]) -> list[str]:
    """Those of the names that peft takes for `target`: it, or what ends in it after a dot."""
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _layers_of_one_matrix(layers: dict[str, torch.nn.Module]) -> set[str]:
    """Names of layers whose weight is that of another layer, too."""
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


class TrainingRun:
    """Everything around one run's loop. The loop calls `resume`, `update`, `end_step`, `finish`."""

    def __init__(
        self,
        settings: RunSettings,
        starting_model: Path,
        data: Path,
        output_dir: Path,
        num_updates: int,
        num_steps: int,
        val_problems: list[Problem] | None = None,
    ) -> None:
        self.made_by = provenance()
        self.run_settings = settings
        self.settings: TrainedMethod = settings.method_settings
        self.output_dir = output_dir
        self.num_updates = num_updates
        self.num_steps = num_steps
        self.device = resolve_device(settings.model_settings.gpus)
        distributed.start(self.device)
        self.tokens_per_microbatch = self.settings.tokens_per_microbatch
        if self.device.type == "cpu":
            self.tokens_per_microbatch = min(self.tokens_per_microbatch, CPU_TOKENS_PER_MICROBATCH)
        self.starting_model = starting_model
        self.tokenizer = load_tokenizer(starting_model)
        model = self._load_starting_model()
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(seed_from(settings.seed, "lora"))
        self.model = distributed.shard(add_lora(model, self.settings), self.device)
        # Dropout (LoRA's, or a model's own) is the only draw that is not seeded by name. Ranks have
        # other examples, and need other draws. Seeding reaches the generators of all devices, so
        # this comes after any other.
        part = (ranks.rank(),) if ranks.rank() else ()
        torch.manual_seed(seed_from(settings.seed, settings.method, settings.round, *part))
        self.optimizer = build_optimizer(self.model, self.settings)
        self.progress: Json = {
            "settings": sha256_json(settings.without_resources().model_dump(mode="json")),
            "starting_weights": weights_digest(starting_model),
            "data": sha256_file(data),
            "reward_code": reward_code(settings.method_settings),
            "num_updates_done": 0,
            "num_tokens": 0,
            "seconds": 0.0,
            "seconds_validating": 0.0,
            "best_validation": None,
        }
        self.started = time.perf_counter()
        self._has_resumed = False
        self._is_brought_back = False
        self.metrics: MetricsLog | None = None
        """Of rank 0, which logs for all; and so are `samples`, `tracker` and `attempts`."""
        self.samples: MetricsLog | None = None
        self.tracker: Tracker | None = None
        self.attempts: Attempts | None = None
        self._engine: Engine | None = None
        self._num_updates_sampled_with = 0
        self.val_problems = self.with_room(
            (val_problems or [])[: self.settings.num_validation_problems],
            self.settings.validation_max_new_tokens,
            "validation problems",
        )
        if val_problems and not self.val_problems and self.settings.validate_every_steps:
            raise ConfigError(
                "validate_every_steps: no validation problem leaves room for "
                f"validation_max_new_tokens {self.settings.validation_max_new_tokens}; lower it"
            )

    def with_room(self, problems: list[Problem], max_new_tokens: int, what: str) -> list[Problem]:
        """The problems whose prompts leave room for a completion; a warning counts the others.

        No engine generates beyond the model's positions, nor vLLM beyond `max_model_length`. That
        counts wherever vLLM may be chosen, so that a run has the same problems with both engines.
        """
        model_settings = self.run_settings.model_settings
        may_be_vllm = model_settings.engine != "transformers"
        of_vllm = model_settings.vllm.max_model_length if may_be_vllm else None
        limits = {
            "the model's {} positions": max_positions(self.model),
            "vllm.max_model_length {}": of_vllm,
        }
        known = [(limit, bound) for bound, limit in limits.items() if limit is not None]
        if not problems or not known:
            return problems
        limit, bound = min(known)
        prompt = self.run_settings.prompt
        questions = [problem.question for problem in problems]
        lengths = [
            len(ids) + max_new_tokens for ids in encode_prompts(questions, prompt, self.tokenizer)
        ]
        what = f"{what} with {max_new_tokens} new tokens"
        return leave_out_long(problems, lengths, limit, what, bound.format(limit))

    @classmethod
    def from_arguments(
        cls, arguments: argparse.Namespace, settings: RunSettings, updates_per_step: int = 1
    ) -> TrainingRun:
        """The run that a trainer's arguments (`cli.training_parser`) ask for."""
        num_steps = settings.method_settings.num_steps
        if settings.method_settings.validate_every_steps and arguments.val_data is None:
            raise ConfigError("validate_every_steps needs --val-data: problems to validate on")
        return cls(
            settings,
            arguments.starting_model,
            arguments.data,
            arguments.output_dir,
            num_updates=num_steps * updates_per_step,
            num_steps=min(num_steps, arguments.max_steps or num_steps),
            val_problems=read_problems(arguments.val_data) if arguments.val_data else None,
        )

    def _load_starting_model(self) -> PreTrainedModel:
        set_up_process(self.device)
        if ranks.world_size() == 1:
            model = load_model(self.starting_model, self.device)
            if self.run_settings.model_settings.compile_layers:
                compile_layers(model)
            return model
        if self.run_settings.model_settings.compile_layers and ranks.is_main():
            log.warning("compile_layers works on one GPU only: with several it is ignored")
        if ranks.is_main():  # to be spread over the ranks: it need not fit on one GPU
            return load_model(self.starting_model, torch.device("cpu"))
        return empty_model(self.starting_model)

    def load_reference(self) -> Any:
        """The starting model, not to be trained, spread over the ranks as the trained one is.

        To be used within `as_reference`: with LoRA it is the trained model itself, whose adapters
        are off there. Not so with several ranks: FSDP2 keeps of the first forward which gathered
        weights have a gradient, and those of adapters that are off have none.
        """
        if self.settings.lora is not None and ranks.world_size() == 1:
            return self.model
        reference = self._load_starting_model().requires_grad_(False)
        return distributed.shard(reference, self.device)

    @contextlib.contextmanager
    def as_reference(self, reference: Any) -> Iterator[None]:
        """Within the block what `load_reference` gave computes as the starting model does.

        No gradient may be on its way through the model meanwhile.
        """
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            if reference is self.model:
                contexts.enter_context(in_eval_mode(reference))
                # What PEFT's own `disable_adapter` does, but for asking each layer first: 45 ms.
                reference.base_model.disable_adapter_layers()
                contexts.callback(reference.base_model.enable_adapter_layers)
            yield

    # ------------------------------------------------------------------------------------ resume

    @property
    def state_dir(self) -> Path:
        return self.output_dir / "state"

    @property
    def _lock_path(self) -> Path:
        return self.output_dir / ".lock"

    def resume(self) -> tuple[int, checkpoints.Tensors]:
        """Go on from the newest checkpoint of the same settings and parent, if there is one.

        Returns the number of steps done (0: from scratch) and the tensors that the loop had saved.
        All steps are done where this very run had finished and only its outputs were taken away:
        they are back then, and `finish` writes nothing.
        """
        if ranks.is_main():
            # A job goes on when snakemake is killed, and must not meet the one that redoes it.
            self._lock = lock(self._lock_path, str(self.output_dir))
            for folder in (self.output_dir, self.state_dir):  # a save of weights that was cut short
                remove_leftovers(folder)
            drop_finished(self.starting_model)
        self.tracking = tracking_settings()
        self._has_resumed = True
        self._is_brought_back = distributed.broadcast(ranks.is_main() and self._bring_back())
        if self._is_brought_back:
            return self.num_steps, {}
        found = distributed.broadcast(checkpoints.list_checkpoints(self.state_dir))
        extra: checkpoints.Tensors = {}
        step = 0
        if found:
            progress = read_json(found[-1] / "progress.json")
            if all(progress.get(key) == self.progress[key] for key in SAME_RUN):
                if progress["step"] > self.num_steps:
                    raise ConfigError(
                        f"--max-steps {self.num_steps}: {found[-1]} has done more; give at least "
                        f"{progress['step']}, or another --output-dir"
                    )
                self.progress, extra = checkpoints.load_checkpoint(
                    found[-1], self.model, self.optimizer
                )
                step = self.progress["step"]
                log.info("resuming after step %d of %d", step, self.num_steps)
            else:
                others = [key for key in SAME_RUN if progress.get(key) != self.progress[key]]
                log.warning(
                    "%s was made with different %s: deleting its checkpoints (%d steps) and "
                    "starting from scratch",
                    self.state_dir,
                    " and ".join(others).replace("_", " "),
                    progress["step"],
                )
                distributed.wait_for_all()  # who has read it
                if ranks.is_main():
                    remove_folder(self.state_dir)
        if ranks.is_main():
            self.metrics = MetricsLog(self.state_dir / "metrics.jsonl", last_step=step)
            last = max((row["step"] for row in iter_jsonl(self.metrics.path)), default=0)
            if last != step:
                log.warning(
                    "%s ends at step %d: rows up to that of the checkpoint, %d, are lost",
                    self.metrics.path,
                    last,
                    step,
                )
            self.samples = MetricsLog(self.state_dir / "completions.jsonl", last_step=step)
            self.tracker = start_tracker(self.output_dir, self._tracked_run(self.metrics))
            self.attempts = Attempts(
                self.state_dir / "attempts.json",
                sha256_json({key: self.progress.get(key) for key in SAME_RUN}),
                num_gpus=ranks.world_size() if self.device.type == "cuda" else 0,
            )
        self.started = time.perf_counter() - self.progress["seconds"]
        return step, extra

    def _identity(self) -> Json:
        """What tells this run from others that may have finished in its folder.

        More than a checkpoint asks: what has changed meanwhile may be why it is to be done again.
        """
        return {
            **{key: self.progress.get(key) for key in SAME_RUN},
            "num_steps": self.num_steps,
            "tokenizer": tokenizer_digest(self.starting_model),
            "val": sha256_json([problem.to_row() for problem in self.val_problems]),
            "code": code_digest(),
        }

    def _keep_links(self) -> None:
        """Link all outputs into FINISHED: Snakemake may not accept them, and then removes them."""
        try:
            with atomic_path(self.output_dir / FINISHED) as kept:
                for name in ("model", "train"):
                    shutil.copytree(self.output_dir / name, kept / name, copy_function=os.link)
                os.link(self.output_dir / "settings.json", kept / "settings.json")
                write_json(kept / "run.json", self._identity())
        except OSError as error:  # copies would cost as much disk as the model again
            log.info("%s: no links to what was written (%s)", self.output_dir / FINISHED, error)

    def _bring_back(self) -> bool:
        """Put back what this very run had written when it finished, if outputs are missing.

        Whatever else is kept of an earlier run is removed.
        """
        kept = self.output_dir / FINISHED
        if not kept.is_dir():
            return False
        is_whole = all((self.output_dir / name).exists() for name in OUTPUTS)
        if is_whole or read_record(kept / "run.json") != self._identity():
            remove_folder(kept)
            return False
        for path in kept.rglob("*"):  # outputs must not be older than inputs
            os.utime(path)
        with atomic_path(self.output_dir / "model") as temporary:
            shutil.copytree(kept / "model", temporary, copy_function=link_or_copy)
        of_train = (path for path in (kept / "train").glob("[!.]*") if path.is_file())
        for path in [*of_train, kept / "settings.json"]:
            with atomic_path(self.output_dir / path.relative_to(kept)) as temporary:
                link_or_copy(path, temporary)
        log.info(
            "the run had finished, but its outputs were removed: they are brought back from %s "
            "and nothing is trained (delete that folder to train anew)",
            kept,
        )
        return True

    def _tracked_run(self, metrics: MetricsLog) -> TrackedRun:
        settings = self.run_settings
        run_id = self.progress.setdefault("wandb_run", new_run_id())
        cell = f"{settings.model}/{settings.method}"
        part = f"/round{settings.round}" if settings.round else ""
        return TrackedRun(
            id=run_id,
            name=f"{cell}/seed{settings.seed}{part}",
            group=f"{settings.study}/{cell}",
            config={
                **settings.model_dump(mode="json", by_alias=True),
                "data_sha256": self.progress["data"],
                "starting_weights": self.progress["starting_weights"],
                "reward_code": self.progress.get("reward_code"),
                "provenance": self.made_by,
            },
            # Those there are now, up to the checkpoint; W&B may take them when the run has ended.
            rows_before=list(iter_jsonl(metrics.path)),
        )

    # -------------------------------------------------------------------------------------- steps

    def steps_after(self, steps_done: int, what: str) -> Iterator[int]:
        """The steps left, from 1, with a progress bar called `what`."""
        steps = range(steps_done + 1, self.num_steps + 1)
        return progress(steps, what, self.num_steps, steps_done)

    def autocast(self, keep_casts: bool | None = None) -> Any:
        """The context that forwards run in.

        `keep_casts`: see `models.autocast`. Unset: not those of a sharded model, which would be
        those of all its layers, on every GPU.
        """
        if keep_casts is None:
            keep_casts = ranks.world_size() == 1
        return autocast(self.device, self.run_settings.model_settings.dtype, keep_casts)

    def update(self, number: int) -> dict[str, float]:
        """One optimizer step on the accumulated gradient; returns learning rate and gradient norm.

        `number`: which of the run's planned updates it is, from 0; those that are skipped have
        their place in the learning rate's schedule too. Raises TrainingError on a gradient that is
        not finite, before it reaches the weights.
        """
        rate = learning_rate_at(number, self.num_updates, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = list(checkpoints.trained_parameters(self.model).values())
        norm = clip_gradient(parameters, self.settings.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of update {self.progress['num_updates_done'] + 1} is not finite "
                f"({norm}): lower learning_rate, or look at the last rows of "
                f"{self.state_dir / 'metrics.jsonl'}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress["num_updates_done"] += 1
        return {"learning_rate": rate, "grad_norm": norm}

    def end_step(
        self,
        step: int,
        row: Json,
        extra: Callable[[], checkpoints.Tensors] | None = None,
        completions: Callable[[], list[Json]] | None = None,
    ) -> None:
        """Validate if due, log `row` as that of `step` (from 1), checkpoint if due.

        `completions` gives what the step was trained on; a sample is kept now and then.
        """
        assert self._has_resumed, "call resume() before the first step"
        every = self.settings.validate_every_steps
        if self._validates and (step % every == 0 or step == self.num_steps):
            row = {**row, "validation_accuracy": self._validate(step)}
        self._log(step, row)
        if self.samples and completions is not None and completions_due(self.tracking, step):
            sample = completions()[: self.tracking.num_completions]
            self.samples.append({"step": step, "completions": sample})
            if self.tracker is not None:
                self.tracker.log_completions(step, sample)
        if step % self.settings.checkpoint_every_steps == 0 and step < self.num_steps:
            for rows in filter(None, (self.metrics, self.samples)):
                rows.sync()
            checkpoints.save_checkpoint(
                self.state_dir,
                step,
                self.model,
                self.optimizer,
                self.progress,
                extra=extra() if extra else None,
                keep=self.settings.keep_checkpoints,
            )
            cpu_seconds = sum(distributed.gather(time.process_time()))
            if self.attempts is not None:
                self.attempts.note(cpu_seconds=cpu_seconds)
                self._drop_older_bests()

    def validate_start(self) -> None:
        """Where validation is on, log that of the starting weights as step 0.

        To be called before the first step of a run that begins.
        """
        if self._validates:
            self._log(0, {"validation_accuracy": self._validate(0)})

    @property
    def _validates(self) -> bool:
        return self.settings.validate_every_steps > 0 and bool(self.val_problems)

    def say_passes(self, num_examples: int, batch_size: int) -> None:
        """Log how often each example is learned from: few that were selected, many times over."""
        passes = self.num_steps * batch_size / num_examples
        log.info("%d examples, %.3g passes in %d steps", num_examples, passes, self.num_steps)

    def _log(self, step: int, row: Json) -> None:
        """Write `row` as that of `step`, with what the run has taken so far."""
        self.progress["seconds"] = time.perf_counter() - self.started
        row = {
            "step": step,
            **row,
            "num_tokens_total": self.progress["num_tokens"],
            "seconds_total": round(self.progress["seconds"], 3),
            "peak_memory_mb": max(distributed.gather(peak_memory_mb(self.device))),
        }
        if self.metrics is not None:
            self.metrics.append(row)
        if self.tracker is not None:
            self.tracker.log(row)

    def log_generations(self, step: int) -> None:
        """Keep what the model writes to the first problems of `val` after `step`, if that is due.

        Greedy, so that no random number is drawn; training goes on as if nothing had been asked.
        To be called before `end_step`, whose checkpoint is to come after the row.
        Ranks generate the same together, since the model is spread over them, and rank 0 keeps it.
        """
        problems = self.val_problems[: self.tracking.num_generations]
        if not problems or not generations_due(self.tracking, step, self.num_steps):
            return
        prompt, num_tokens = self.run_settings.prompt, self.settings.validation_max_new_tokens
        texts = [render_prompt(problem.question, prompt, self.tokenizer) for problem in problems]
        ids = prompt_token_ids(texts, prompt, self.tokenizer)
        golds = [problem.gold for problem in problems]
        with self._sampling_context():
            rows, _ = log_generations(
                self.model,
                self.tokenizer,
                texts,
                golds,
                functools.partial(
                    gsm8k_reward, marker=prompt.answer_marker, grading=self.settings.grading
                ),
                num_tokens,
                temperature=0.0,
                prompt_ids=ids,
                on_all_ranks=ranks.world_size() > 1,
            )
        if self.samples is None:
            return
        names = {"response": "completion", "ground_truth": "gold", "length": "num_tokens"}
        sample = [
            {names.get(key, key): value for key, value in row.items() if key != "response_ids"}
            for row in rows
        ]
        self.samples.append({"step": step, "completions": sample})
        if self.tracker is not None:
            self.tracker.log_completions(step, sample)

    def _drop_older_bests(self) -> None:
        """Keep the best weights so far, and those that a kept checkpoint names."""
        paths = checkpoints.list_checkpoints(self.state_dir)
        kept = [self.progress, *(read_json(path / "progress.json") for path in paths)]
        named = {
            f"best-{best['step']}"
            for progress in kept
            if (best := progress["best_validation"]) is not None
        }
        for folder in self.state_dir.glob("best-*"):
            if folder.name not in named:
                remove_folder(folder)

    def _validate(self, step: int) -> float:
        started = time.perf_counter()
        own = self.val_problems[ranks.rank() :: ranks.world_size()]
        with self.sampling() as engine:
            if isinstance(self.settings, GrpoMethod):
                started = time.perf_counter()  # its rollouts start and fill the engine as well
            num_right = num_greedy_right(
                engine,
                own,
                self.run_settings.prompt,
                self.tokenizer,
                max_new_tokens=self.settings.validation_max_new_tokens,
                grading=self.settings.grading,
            )
        accuracy = sum(distributed.gather(num_right)) / len(self.val_problems)
        best = self.progress["best_validation"]
        if self.settings.keep_best and (best is None or accuracy > best["accuracy"]):
            self.progress["best_validation"] = {"step": step, "accuracy": accuracy}
            # A folder for each step: a checkpoint before it may still name an earlier one.
            self._save_weights(self.state_dir / f"best-{step}")
            if ranks.is_main():
                self._drop_older_bests()
        # A checkpoint of an older commit counts it as training up to there.
        before = self.progress.get("seconds_validating", 0.0)
        self.progress["seconds_validating"] = before + time.perf_counter() - started
        return accuracy

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Engine]:
        """The engine with the weights in training: awake inside the block, asleep after it.

        Started at first use. Weights are copied into it where it has its own and they have moved.
        """
        if self._engine is None:
            self._engine = self._start_engine()
            before = self.progress.setdefault("engine", self._engine.name)
            if before != self._engine.name:
                log.warning(
                    "the run was begun with engine: %s and continues with %s, so from here on it "
                    "samples other completions",
                    before,
                    self._engine.name,
                )
        engine = self._engine
        if getattr(engine, "model", None) is not self.model:
            if engine.drops_weights or self._num_updates_sampled_with != self._num_updates:
                engine.load_weights(plain_weights(self.model))
                self._num_updates_sampled_with = self._num_updates
        engine.wake()
        yield engine
        engine.sleep()

    @property
    def samples_with_itself(self) -> bool:
        """Whether the engine is the model in training, in float32.

        Log-probs of its completions are then what scoring them would give, but for rounding.
        """
        dtype = compute_dtype(self.device, self.run_settings.model_settings.dtype)
        return getattr(self._engine, "model", None) is self.model and dtype == "float32"

    @property
    def _num_updates(self) -> int:
        return int(self.progress["num_updates_done"])

    def _start_engine(self) -> Engine:
        model_settings = self.run_settings.model_settings
        chosen = choose_engine(model_settings, self.starting_model, self.device)
        if chosen == "transformers":
            # A sharded model decodes badly: every token would gather every layer. What samples is a
            # plain copy then, which fits where vLLM's would. Its weights stay ones that could be
            # trained: of others, autocast keeps no bfloat16 copy and makes one for every token.
            plain: Any = self.model
            if ranks.world_size() > 1:
                plain = empty_model(self.starting_model)
                distributed.give_memory(plain, self.device)
                plain.to(self.device)  # its buffers
                load_plain_weights(plain, plain_weights(self.model))
                self._num_updates_sampled_with = self._num_updates
            return HfEngine(
                plain,
                self.tokenizer,
                model_settings.completions_per_batch,
                forward_context=functools.partial(self._sampling_context, keep_casts=True),
            )
        return VllmEngine(
            self.starting_model,
            # Shared GPUs are for evaluation: a rank of a trainer samples on its own.
            model_settings.vllm.model_copy(update={"tensor_parallel": 1}),
            engine_dtype(model_settings, self.device, chosen),
            self.device,
            model_settings.vllm.rollout_gpu_memory_fraction,
            colocated=True,
        )

    @contextlib.contextmanager
    def _sampling_context(self, keep_casts: bool | None = None) -> Iterator[None]:
        """Autocast; compiled layers are not for a cache that grows by a token at a time.

        Autocast keeps the casts of weights that can be trained, and casts others for every token:
        beside LoRA's adapters, all pass for such weights here.
        """
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        with contextlib.ExitStack() as contexts:
            for parameter in frozen if self.device.type == "cuda" else []:
                parameter.requires_grad_(True)
                contexts.callback(parameter.requires_grad_, False)
            contexts.enter_context(self.autocast(keep_casts))
            if self.run_settings.model_settings.compile_layers:
                contexts.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    # -------------------------------------------------------------------------------------- finish

    def _save_weights(self, folder: Path) -> None:
        if not ranks.is_main():
            for _ in plain_weights(self.model):
                pass  # this rank's rows of each are handed in
            return
        model = self.model
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            # Adapters are merged on the CPU: a GPU need not hold the model twice.
            if ranks.world_size() > 1 or self.settings.lora is not None:
                model = load_model(self.starting_model, torch.device("cpu"))
                load_plain_weights(model, plain_weights(self.model))
            save_model(model, self.tokenizer, temporary)

    def finish(self, summary: Json) -> None:
        """Write model, metrics, summary and settings, then drop the checkpoints.

        Last of all: a job that is killed while W&B or vLLM ends has failed, and goes on from them.
        What Snakemake removes after that comes back from links (`resume`).
        """
        if not self._is_brought_back:
            self._write_outputs(summary)
        if ranks.is_main():
            if self.state_dir.exists():
                remove_folder(self.state_dir)
            unlock(self._lock_path, self._lock)

    def _write_outputs(self, summary: Json) -> None:
        if self.progress["best_validation"] is None:
            self._save_weights(self.output_dir / "model")
        measured = distributed.gather(
            {
                "peak_memory_mb": peak_memory_mb(self.device),
                "provenance": provenance_at_end(self.made_by),
            }
        )
        if ranks.is_main():
            self._write_results(summary, measured)
        distributed.wait_for_all()
        if self._engine is not None:
            close_engine(self._engine)  # vLLM takes the process group down with it
        if ranks.is_main():
            self._keep_links()

    def _write_results(self, summary: Json, measured: list[Json]) -> None:
        """All files of a finished run but the weights; `measured` by each rank."""
        assert self.metrics is not None and self.samples is not None and self.attempts is not None
        best = self.progress["best_validation"]
        if best is not None:
            log.info("keeping step %d: validation accuracy %.3f", best["step"], best["accuracy"])
            with atomic_path(self.output_dir / "model") as temporary:
                shutil.copytree(self.state_dir / f"best-{best['step']}", temporary)
        with atomic_path(self.output_dir / "train" / "metrics.jsonl") as temporary:
            shutil.copyfile(self.metrics.path, temporary)
        samples = self.output_dir / "train" / "completions.jsonl"
        samples.unlink(missing_ok=True)  # of an earlier run, which may have logged some
        if self.samples.path.stat().st_size > 0:
            with atomic_path(samples) as temporary:
                shutil.copyfile(self.samples.path, temporary)
        # Validation is no part of what a method costs: how often it is done is the study's choice.
        validating = self.progress.get("seconds_validating", 0.0)
        training = time.perf_counter() - self.started - validating
        settings = self.run_settings
        made = settings.model_dump(by_alias=True)
        made["method_settings"]["num_steps"] = self.num_steps  # fewer by --max-steps: another run
        write_json(self.output_dir / "settings.json", made)
        made_by = measured[0]["provenance"]
        made_by["cpu_seconds"] = sum(one["provenance"]["cpu_seconds"] for one in measured)
        summary = {
            "model": settings.model,
            "method": settings.method,
            "parent": settings.parent,
            "seed": settings.seed,
            "round": settings.round,
            "num_steps": self.num_steps,
            "num_updates": self.progress["num_updates_done"],
            "num_tokens": self.progress["num_tokens"],
            # What was sampled to train on is part of what training costs.
            "seconds_training": round(training + summary.get("seconds_sampling", 0.0), 3),
            "seconds_validating": round(validating, 3),
            "peak_memory_mb": max(
                row["peak_memory_mb"]
                for row in [*measured, *iter_jsonl(self.metrics.path)]  # these of earlier calls too
            ),
            "device": device_name(self.device),
            "num_ranks": len(measured),
            "engine": self._engine.name if self._engine else self.progress.get("engine"),
            "best_validation": best,
            # Weights can be dropped, and that be cut short: who loads them looks here.
            "model_files": sorted(path.name for path in (self.output_dir / "model").iterdir()),
            "data_sha256": self.progress["data"],
            "starting_weights": self.progress["starting_weights"],
            "reward_code": self.progress.get("reward_code"),
            **summary,
            **self.attempts.as_finished(made_by["cpu_seconds"]),
            "provenance": made_by,
        }
        write_json(self.output_dir / "train" / "summary.json", summary)
        if self.tracker is not None:
            self.tracker.finish(summary)


def clip_gradient(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to `max_norm`; returns its norm from before, over all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = distributed.whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def disable_dropout(model: torch.nn.Module) -> None:
    """Make every forward deterministic, also in train mode (which gradient checkpointing needs).

    All rates are set to 0 that a module or the config keeps as a number under a name with `drop`.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for part in [*model.modules(), config]:
        for name, value in list(getattr(part, "__dict__", {}).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(part, name, 0.0)


def num_greedy_right(
    engine: Engine,
    problems: list[Problem],
    prompt: PromptSettings,
    tokenizer: Any,
    max_new_tokens: int,
    grading: RewardGrade = "strict",
) -> int:
    """How many of `problems` have a greedy completion that is right by `grading`."""
    questions = [problem.question for problem in problems]
    requests = [
        Request(prompt_ids, seeds=[0], temperature=0.0, max_new_tokens=max_new_tokens)
        for prompt_ids in encode_prompts(questions, prompt, tokenizer)
    ]
    completions = engine.generate(requests)
    return sum(
        is_right(completion.text, problem.gold, grading, prompt.answer_marker)
        for problem, (completion,) in zip(problems, completions, strict=True)
    )
