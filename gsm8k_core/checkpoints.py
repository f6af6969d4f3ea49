"""Exact resume: all that a trainer needs to go on as if nobody had stopped it.

A checkpoint is a folder `step-00000050/` that appears whole or not at all: tensors in safetensors
(trained weights, optimizer moments, generator states), the rest in JSON. No pickle.
"""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gsm8k_core.errors import TrainingError
from gsm8k_core.files import Json, atomic_path, read_json, write_json

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Json,
    extra: Tensors | None = None,
    keep: int = 2,
) -> None:
    """Write `folder/step-XXXXXXXX` atomically, then drop all but the newest `keep`.

    `progress` is whatever the loop wants back as JSON; `extra` whatever it wants back as tensors.
    Raises TrainingError when it cannot be written.
    """
    with atomic_path(folder / f"step-{step:08d}") as temporary:
        temporary.mkdir()
        _save(_contiguous(trained_parameters(model)), temporary / "weights.safetensors")
        _save(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        _save(_generator_states(), temporary / "generators.safetensors")
        _save(_contiguous(extra or {}), temporary / "extra.safetensors")
        python_state = random.getstate()
        write_json(
            temporary / "progress.json",
            {
                **progress,
                "step": step,
                "python_generator": [python_state[0], list(python_state[1]), python_state[2]],
            },
        )
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Json, Tensors]:
    """Restore weights, optimizer and every generator in place; returns `progress` and `extra`.

    Raises TrainingError when the checkpoint is damaged or of another model.
    """
    device = str(next(model.parameters()).device)
    weights = _load(path / "weights.safetensors", device)
    parameters = trained_parameters(model)
    if {name: tensor.shape for name, tensor in weights.items()} != {
        name: parameter.shape for name, parameter in parameters.items()
    }:
        raise TrainingError(
            f"{path}: holds other parameters than this model trains; "
            "delete the folder to start this run afresh"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    # AdamW keeps its step counts on the CPU; load_state_dict moves the moments to the parameters.
    _restore_optimizer(optimizer, _load(path / "optimizer.safetensors"))
    _restore_generators(_load(path / "generators.safetensors"))
    progress = read_json(path / "progress.json")
    version, state, gauss = progress.pop("python_generator")
    random.setstate((version, tuple(state), gauss))
    return progress, _load(path / "extra.safetensors", device)


def _save(tensors: Tensors, path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise TrainingError(f"{path}: cannot be written ({error}); is the disk full?") from error


def _load(path: Path, device: str = "cpu") -> Tensors:
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: damaged ({error}); delete {path.parent} to go on from the one before"
        ) from error


def _contiguous(tensors: dict[str, Any]) -> Tensors:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().clone()
        for index, values in state.items()
        for name, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _generator_states() -> Tensors:
    states = {"cpu": torch.random.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def _restore_generators(states: Tensors) -> None:
    torch.random.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
