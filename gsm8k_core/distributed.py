"""Several processes that train one model: torchrun starts one for each GPU, and they meet here.

A process is a *rank*. Each holds a part of each parameter, gradient and moment (FSDP2), works
on its share of each step's examples, and knows the numbers of the whole step. With one rank nothing
here does anything: there is no process group, and the model stays a plain one.

Ranks must do the same things in the same order wherever they talk to each other, and every forward
and backward of a sharded model is such a place. So `own_work` gives each rank the same number of
microbatches, empty ones where there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gsm8k_core.files import atomic_path
from gsm8k_core.ranks import is_main, rank, world_size
from gsm8k_core.tokenization import longest_first, split_by_token_budget

Value = TypeVar("Value")
Work = TypeVar("Work")

# A rank that is through with its rollouts waits so long for the slowest. One that has died is seen
# at once by torchrun, which ends the others.
TIMEOUT = datetime.timedelta(minutes=30)


def start(device: torch.device) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs. Nothing with one rank."""
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(launcher: int) -> None:
    """End when torchrun has gone: nobody would end the other ranks when one of them fails."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def end() -> None:
    """Leave the other ranks, where there are any. A single one's group is vLLM's, which ends it."""
    if world_size() > 1 and dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- messages


def gather(value: Value) -> list[Value]:
    """What every rank gave, by rank. Waits for all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """What rank 0 gave."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    gather(None)


def add(values: dict[str, float]) -> dict[str, float]:
    """Sums over ranks, name by name; the same on all, to the last bit."""
    parts = gather(values)
    return {name: sum(part[name] for part in parts) for name in values}


def add_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`files.atomic_path` of a folder that all ranks write into; it is there when they go on."""
    with contextlib.ExitStack() as stack:
        temporary = None
        if is_main():
            temporary = stack.enter_context(atomic_path(path))
            temporary.mkdir()
        temporary = broadcast(temporary)
        assert temporary is not None
        yield temporary
        wait_for_all()
    wait_for_all()


# ----------------------------------------------------------------------------------- shares of work


def shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The indices of `lengths` dealt out to ranks, with about as many tokens for each.

    Every index is in exactly one share, in ascending order. The longest go first, each to the rank
    with the least so far (Graham 1969); ties are broken by index and rank.
    """
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in longest_first(lengths):
        least = min(range(num_ranks), key=lambda number: (tokens[number], len(parts[number])))
        parts[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(part) for part in parts]


def own_work(
    lengths: Sequence[int], cut: Callable[[list[int]], list[list[Work]]]
) -> list[list[Work]]:
    """This rank's microbatches: `cut` of its share of `lengths`, as many as any rank has.

    Where another rank has more, empty ones are added: for those, what the others do, a forward or a
    forward and a backward, must be done without a loss.
    """
    by_rank = [cut(share) for share in shares(lengths, world_size())]
    own = by_rank[rank()]
    return own + [[] for _ in range(max(map(len, by_rank)) - len(own))]


def own_microbatches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """`own_work` cut by `split_by_token_budget`: indices of what goes through together."""

    def cut(share: list[int]) -> list[list[int]]:
        groups = split_by_token_budget([lengths[index] for index in share], tokens_per_microbatch)
        return [[share[place] for place in group] for group in groups]

    return own_work(lengths, cut)


# ----------------------------------------------------------------------------------------- sharding


def shard(model: Any, device: torch.device) -> Any:
    """Spread the model over the ranks with FSDP2, in place, on `device`; itself with one rank.

    Each decoder layer is gathered for its own forward and backward and given back after it, and so
    is what no layer owns (embedding, norm, head). Parameters and the sums of gradients stay float32
    (`models.autocast` computes in bfloat16, as with one rank). Gradients are summed, not averaged:
    losses are shares of the whole step's. The weights are those of rank 0, sent one parameter at a
    time: other ranks may come with parameters on the device `meta`, which take no memory.
    """
    if world_size() == 1:
        return model
    of_rank_0 = {name: parameter.detach() for name, parameter in model.named_parameters()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (world_size(),))
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in [*layers, model]:
        # Also of the root: after a forward without a backward, the parameters are the sharded ones.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # all that gloo has
    if hasattr(model, "peft_config"):
        # LoRA's wrapper generates with the forward of the model in it, and would gather nothing.
        register_fsdp_forward_method(model, "generate")
    give_memory(model, device)
    for name, parameter in model.named_parameters():
        if is_main():
            weights = of_rank_0.pop(name).to(device)
        else:
            weights = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        dist.broadcast(weights, src=0)
        load_whole_tensors(model, {name: weights})
    return model


def give_memory(model: torch.nn.Module, device: torch.device) -> None:
    """Put parameters that are on the device `meta` on `device`, with no values yet."""
    given: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if parameter not in given:
                    given[parameter] = torch.nn.Parameter(
                        torch.empty_like(parameter, device=device), parameter.requires_grad
                    )
                module.register_parameter(name, given[parameter])


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds only some rows of the tensor."""
    return hasattr(tensor, "to_local")


def own_rows(tensor: Any) -> torch.Tensor:
    """The rows of a sharded tensor that this rank holds; all of any other. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> torch.Tensor:
    """All rows of a sharded tensor, on every rank, which all must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First row that this rank holds, and the one after its last."""
    num_rows = len(tensor)
    if not is_sharded(tensor):
        return 0, num_rows
    rows_per_rank = -(-num_rows // world_size())  # as torch.chunk cuts, which FSDP2 does
    start = min(rank() * rows_per_rank, num_rows)
    return start, min(start + rows_per_rank, num_rows)


@torch.no_grad()
def load_whole_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into the parameters of those names, of each the rows of this rank."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        start, stop = rows_of(parameters[name])
        own_rows(parameters[name]).copy_(tensor[start:stop])


def like(parameter: Any, rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows as a tensor that is spread over the ranks as the sharded parameter is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
