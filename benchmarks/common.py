"""What all comparisons share: two sides in processes of their own that take turns, and the table.

A side is a Python program that reads a line before each turn and writes one JSON object after it.
While one works, the other waits on a pipe and uses no processor, so both see the same machine; each
has its own peak of memory, and may have its own environment.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from gsm8k_core.manifest import processor_name

ROOT = Path(__file__).resolve().parents[1]
# Of each of two vLLM engines on one GPU. With it nothing is measured, so both can start at once.
GPU_KV_CACHE_GIB = 10
Json = dict[str, Any]


def environment_line(packages: Sequence[str], threads: int, device: str) -> str:
    """Date, machine, threads, and versions of the packages that are installed."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {device_name(device)}, {threads} "
        f"threads, load {os.getloadavg()[0]:.1f} at the start; python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{processor_name()} ({psutil.cpu_count()} cores)"


def settle(device: str) -> None:
    """Wait until the device has done what it was told: before every reading of the clock."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the range in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as long they took, turn by turn."""
    return [t / o for t, o in zip(theirs, ours, strict=True)]


class Side:
    """One of the two: a process that does a turn when told to."""

    def __init__(self, name: str, command: Sequence[str], threads: int, wait: bool = True) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.turns: list[Json] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        self._started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": visible[0],  # of several, transformers' Trainer takes all
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
            },
        )
        self._usage = psutil.Process(self.process.pid)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it is ready. Sides that are waited for after all have begun start side by side."""
        self.ready = self._read()
        self.seconds_to_start = time.perf_counter() - self._started

    def _read(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}, see above")
        return json.loads(line)

    def turn(self, keep: bool = True) -> Json:
        """One turn, timed from here; what is not kept was a warm-up.

        Seconds of the processor are counted too: beside other work they say more than the clock.
        """
        assert self.process.stdin is not None
        used = sum(self._usage.cpu_times()[:2])
        started = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        told = self._read()
        seconds = time.perf_counter() - started
        if keep:
            self.seconds.append(seconds)
            self.cpu_seconds.append(sum(self._usage.cpu_times()[:2]) - used)
            self.turns.append(told)
        return told

    def end(self) -> None:
        """Let the process finish."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def start_sides(
    names: Sequence[str], command: Sequence[str], args: argparse.Namespace
) -> list[Side]:
    """A side of `command` for each of `names`: one after another on a CPU, together on a GPU.

    There starting is waiting and compiling, for which such a machine has the processors.
    """
    on_cpu = args.device == "cpu"
    sides = [Side(name, [*command, "--side", name], args.threads, wait=on_cpu) for name in names]
    if not on_cpu:
        for side in sides:
            side.wait()
    return sides


def take_turns(sides: Sequence[Side], rounds: int, warm_up: int = 1) -> None:
    """Every side once a round; who begins changes from round to round."""
    for turn in range(-warm_up, rounds):
        first = turn % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            side.turn(keep=turn >= 0)


def plain_model(folder: Path) -> Any:
    """The peer's model, as its users load it: in float32, without what `load_model` changes."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False)


class Turns:
    """The other end of `Side`, in its process: standard output is kept for what is told."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to standard error

    def tell(self, **facts: Any) -> None:
        """Say that it is ready, or what the turn did."""
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def wait(self) -> bool:
        """Until told to go; False where there is no further turn."""
        return bool(sys.stdin.readline())


def run_turns(turns: Turns, work: Callable[[], Json], **ready: Any) -> None:
    """Serve turns of a function until there are no more."""
    turns.tell(**ready)
    while turns.wait():
        turns.tell(**work())
