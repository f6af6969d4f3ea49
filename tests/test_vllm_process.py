"""What the vLLM engine does to its process and how it ends: what of that needs no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gsm8k_core.engines.base import Request
from gsm8k_core.engines.vllm_engine import (
    ENVIRONMENT,
    VllmEngine,
    _check_arrival,
    _check_temperatures,
    _state_of_process_kept,
    _warn_once,
)
from gsm8k_core.errors import ModelError

# What a kernel is compiled with, and whether one compiled otherwise would be taken from the cache.
TRITON_SAYS = """
import json
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
print(json.dumps([knobs.language.fp32_default, get_cache_invalidating_env_vars()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux alone")
def test_triton_multiplies_float32_as_float32() -> None:
    name = "TRITON_F32_DEFAULT"
    environment = {**os.environ, name: ENVIRONMENT[name]}
    told = subprocess.run(
        [sys.executable, "-c", TRITON_SAYS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    precision, in_key_of_cache = json.loads(told.stdout)
    assert precision == "ieee"
    assert in_key_of_cache[name] == "ieee"


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with _state_of_process_kept():
        torch.set_num_threads(before + 1)  # as vLLM sets 1 on a GPU
    assert torch.get_num_threads() == before


class Llm:
    """Stands in for `vllm.LLM`: tells what is asked of it, and of its end."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        core = SimpleNamespace(shutdown=lambda: told.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake {' '.join(sorted(tags))}")

    def __del__(self) -> None:
        self.told.append("let go")


def test_a_push_that_did_not_arrive_is_told_by_one_matrix(caplog: pytest.LogCaptureFixture) -> None:
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    engine = torch.nn.ModuleDict({"down_proj": layer})
    exact = layer.weight.detach().to(torch.float32) * (1 + 1e-4)  # the same in bfloat16
    _check_arrival({"down_proj.weight": exact}, engine)
    with pytest.raises(ModelError, match=r"old weights after a push \(down_proj.weight differs"):
        _check_arrival({"down_proj.weight": exact * 1.01}, engine)
    assert not caplog.text
    _check_arrival({"down_proj.weight": exact[:2]}, engine)
    assert "vLLM holds down_proj.weight in another form than the trainer: push not" in caplog.text


def test_a_push_of_which_nothing_can_be_checked_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = torch.nn.ModuleDict({"wi": torch.nn.Linear(4, 4)})
    for _ in range(2):
        _check_arrival({}, engine)
    assert caplog.text.count("no weight is named *.down_proj.weight") == 1
    assert "push not checked" in caplog.text


@pytest.fixture(autouse=True)
def nothing_warned_of() -> None:
    _warn_once.cache_clear()


@pytest.mark.parametrize("temperature", [0.005, 2.1])
def test_a_temperature_that_vllm_does_not_sample_at_is_refused(temperature: float) -> None:
    fine = [Request([1], [0], value, 1) for value in (0.0, 0.01, 1.0, 2.0)]
    _check_temperatures(fine)
    with pytest.raises(ModelError, match=f"^temperature is {temperature}: vLLM samples at 0"):
        _check_temperatures([*fine, Request([1], [0], temperature, 1)])


@pytest.mark.parametrize("asleep", [True, False])
def test_an_engine_wakes_and_is_let_go_before_it_is_shut_down(
    monkeypatch: pytest.MonkeyPatch, asleep: bool
) -> None:
    told: list[str] = []
    distributed: Any = ModuleType("vllm.distributed")
    distributed.cleanup_dist_env_and_memory = lambda: told.append("clean up")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    engine = VllmEngine.__new__(VllmEngine)
    engine.llm = Llm(told)
    engine.asleep = {"weights", "kv_cache"} if asleep else set()
    engine.close()
    assert told == ["wake kv_cache weights"] * asleep + ["let go", "shutdown", "clean up"]
