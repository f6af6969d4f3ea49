"""Exact resume: all that a trainer needs to go on as if nobody had stopped it.

A checkpoint is a folder `step-00000050/` that appears whole or not at all: tensors in safetensors
(trained weights, optimizer moments, generator states), the rest in JSON. No pickle.

    weights.safetensors         of rank 0, and likewise optimizer, extra, generators
    weights.rank1.safetensors   of rank 1: its rows of each tensor that is spread over ranks
    progress.json               with `num_ranks`

The rows of a tensor come in the order of the ranks, so any number of ranks can read what any other
number has written, and each reads no more than its own rows.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gsm8k_core import distributed, ranks
from gsm8k_core.errors import TrainingError
from gsm8k_core.files import Json, read_json, remove_folder, write_json

STEP = re.compile(r"step-\d+")

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

    `progress` is whatever the loop wants back as JSON (its `step` and `num_ranks` are set here);
    `extra` whatever it wants back as tensors. Called by all ranks. Raises TrainingError when it
    cannot be written, and where the optimizer keeps something else than tensors; ValueError for a
    `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: take 1 or more")
    with distributed.atomic_folder(folder / f"step-{step:08d}") as temporary:
        _save(_own(trained_parameters(model)), temporary, "weights")
        _save(_own(_optimizer_tensors(optimizer)), temporary, "optimizer")
        _save(_generator_states(), temporary, "generators")
        _save(_own(extra or {}), temporary, "extra")
        if ranks.is_main():
            python_state = random.getstate()
            write_json(
                temporary / "progress.json",
                {
                    **progress,
                    "step": step,
                    "num_ranks": ranks.world_size(),
                    "python_generator": [python_state[0], list(python_state[1]), python_state[2]],
                },
            )
    if ranks.is_main():
        for old in list_checkpoints(folder)[:-keep]:
            remove_folder(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(
        path for path in folder.glob("step-*") if path.is_dir() and STEP.fullmatch(path.name)
    )


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Json, Tensors]:
    """Restore weights, optimizer state and generators in place; returns `progress` and `extra`.

    The optimizer keeps its own settings, such as its learning rate. Generators are torch's and
    Python's. Buffers of the model, NumPy's generator and others are the caller's.

    `extra` are whole tensors, on the CPU: they may be a model that is spread over many GPUs because
    it fits on none. With another number of ranks than it was written by, generators of ranks that
    were not there stay as they are. Raises TrainingError when the checkpoint is damaged or of
    another model.
    """
    progress = read_json(path / "progress.json")
    num_ranks = progress.pop("num_ranks", 1)
    parameters = trained_parameters(model)
    with _opened(path, "weights", num_ranks) as weights:
        if {name: weights.shape(name) for name in weights.names()} != {
            name: list(parameter.shape) for name, parameter in parameters.items()
        }:
            raise TrainingError(
                f"{path}: holds other parameters than this model trains; "
                "delete the folder to start this run from scratch"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                rows = weights.rows(name, *distributed.rows_of(parameter))
                distributed.own_rows(parameter).copy_(rows)
    with _opened(path, "optimizer", num_ranks) as moments:
        _restore_optimizer(optimizer, moments)
    with _opened(path, "extra", num_ranks) as tensors:
        extra = {name: tensors.whole(name) for name in tensors.names()}
    if (generators := _file(path, "generators", ranks.rank())).exists():
        with _damage_named(generators):
            state = load_file(generators)
        _restore_generators(state)
    version, state, gauss = progress.pop("python_generator")
    random.setstate((version, tuple(state), gauss))
    return progress, extra


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / (f"{kind}.rank{rank}.safetensors" if rank else f"{kind}.safetensors")


def _save(tensors: Tensors, folder: Path, kind: str) -> None:
    path = _file(folder, kind, ranks.rank())
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise TrainingError(f"{path}: cannot be written ({error}); is the disk full?") from error


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: damaged ({error}); delete {path.parent} to resume from the one before"
        ) from error


class _Parts:
    """The files of all ranks of one kind, read as if they were one.

    What it gives are copies: safetensors' own tensors are views of the mapped file, and a network
    file system cannot remove the folder of a file that is still mapped.
    """

    def __init__(self, files: list[Any]) -> None:
        self.files = files
        self.names_of = [set(file.keys()) for file in files]

    def names(self) -> list[str]:
        # What is not spread over ranks is in the file of rank 0 alone, and the rest in each.
        return list(self.files[0].keys())

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        shapes = [part.get_shape() for part in self._slices(name)]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the whole tensor."""
        pieces, first = [], 0
        for part in self._slices(name):
            num_rows = part.get_shape()[0]
            low, high = (min(max(end - first, 0), num_rows) for end in (start, stop))
            pieces.append(part[low:high])
            first += num_rows
        return torch.cat(pieces)

    def whole(self, name: str) -> torch.Tensor:
        parts = [file.get_tensor(name) for file in self._holding(name)]
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def _slices(self, name: str) -> list[Any]:
        return [file.get_slice(name) for file in self._holding(name)]

    def _holding(self, name: str) -> list[Any]:
        return [
            file for file, names in zip(self.files, self.names_of, strict=True) if name in names
        ]


@contextmanager
def _opened(folder: Path, kind: str, num_ranks: int) -> Iterator[_Parts]:
    paths = [_file(folder, kind, number) for number in range(num_ranks)]
    with ExitStack() as stack:
        files = []
        for path in paths:
            with _damage_named(path):
                files.append(stack.enter_context(safe_open(path, framework="pt")))
        yield _Parts(files)


def _own(tensors: dict[str, Any]) -> Tensors:
    """What this rank writes: its rows of what is spread over ranks; rank 0 the rest as well."""
    return {
        name: distributed.own_rows(tensor).detach().contiguous()
        for name, tensor in tensors.items()
        if ranks.is_main() or distributed.is_sharded(tensor)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The moments themselves, not copies: those would be twice the weights more on the device."""
    tensors: Tensors = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise TrainingError(
                    f"the optimizer keeps {name} as {type(value).__name__}: only tensors can be "
                    "saved, so a run with it could not be resumed; take another, such as AdamW"
                )
            tensors[f"{index}.{name}"] = value.detach()
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: _Parts) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for key in saved.names():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if distributed.is_sharded(parameter) and saved.shape(key) == list(parameter.shape):
            value = distributed.like(parameter, saved.rows(key, *distributed.rows_of(parameter)))
        else:
            value = saved.whole(key)
        state.setdefault(int(index), {})[name] = value
    # load_state_dict moves the moments to the parameters, and step counts where AdamW wants them.
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _generator_states() -> Tensors:
    states = {"cpu": torch.random.get_rng_state()}
    # A run on the CPU leaves the GPUs alone that it sees: asking for a state would start CUDA.
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        states[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def _restore_generators(states: Tensors) -> None:
    torch.random.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
