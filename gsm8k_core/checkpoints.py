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
    """
    with atomic_path(folder / f"step-{step:08d}") as temporary:
        temporary.mkdir()
        save_file(_contiguous(trained_parameters(model)), temporary / "weights.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        save_file(_generator_states(), temporary / "generators.safetensors")
        save_file(_contiguous(extra or {}), temporary / "extra.safetensors")
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

    Raises TrainingError when the checkpoint is of another model.
    """
    device = str(next(model.parameters()).device)
    weights = load_file(path / "weights.safetensors", device=device)
    parameters = trained_parameters(model)
    if weights.keys() != parameters.keys():
        raise TrainingError(
            f"{path}: holds other parameters than this model trains; "
            "delete the folder to start this run afresh"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors", device=device))
    _restore_generators(load_file(path / "generators.safetensors"))
    progress = read_json(path / "progress.json")
    version, state, gauss = progress.pop("python_generator")
    random.setstate((version, tuple(state), gauss))
    return progress, load_file(path / "extra.safetensors", device=device)


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
