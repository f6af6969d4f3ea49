"""What only a GPU shows. `pytest tests/gpu` in an environment with CUDA's torch (and vLLM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gsm8k_core.config import VllmSettings
from gsm8k_core.engines.vllm_engine import VllmEngine, vllm_build

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, and skip it, with the reason, where there is no GPU."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.serial)
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip("needs an NVIDIA GPU"))


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def start(cuda: torch.device) -> Iterator[Callable[..., Any]]:
    """`start(folder, dtype, **vllm settings)`: a vLLM engine, closed after the test.

    Of those that can sleep (`colocated`), vLLM allows one in a process at a time. Of a share of the
    GPU, the embedded model would make millions of blocks: the cache has 1 GiB, if nothing else is
    said.
    """
    if vllm_build() is None:
        pytest.skip("vLLM is not installed (extra vllm)")
    engines = []

    def build(
        folder: Path, dtype: str = "bfloat16", colocated: bool = False, **settings: Any
    ) -> VllmEngine:
        checked = VllmSettings.model_validate(
            {"max_sequences": 64, "kv_cache_gib": 1.0, **settings}
        )
        fraction = checked.rollout_gpu_memory_fraction
        engines.append(VllmEngine(folder, checked, dtype, cuda, fraction, colocated))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
