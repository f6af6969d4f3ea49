"""The settings in force, as a script prints them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from gsm8k_core.config import Config, load_config, parse_config
from gsm8k_core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted(path.name for path in (ROOT / "studies").glob("*.yaml"))


@pytest.fixture
def show(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Any]:
    """`show(*files, key=)`: what is printed for config.yaml with studies laid over it."""
    monkeypatch.chdir(ROOT)

    def call(*files: str, key: str | None = None) -> Any:
        words = ["--config", "config.yaml", *(str(ROOT / "studies" / name) for name in files)]
        script("show_settings").main([*words, *(["--key", key] if key else [])])
        return yaml.safe_load(capsys.readouterr().out)

    return call


def cells(config: Config) -> list[object]:
    """The settings of all that a study does but preparing."""
    found: list[object] = [config.comparison(), config.tracking]
    for model in config.study.models:
        methods = [name for name in config.stages() if config.methods[name].trains]
        found += [config.run_settings(model, method, 0) for method in methods]
        for suite in config.study.suites:
            found.append(config.evaluation_settings(model, "base", 0, suite))
            found.append(config.grading_settings(model, suite))
    return found


@pytest.mark.parametrize("study", [None, *STUDIES])
def test_what_is_printed_is_a_config_of_the_same_runs(
    show: Callable[..., Any], study: str | None
) -> None:
    files = [study] if study else []
    config = load_config(ROOT / "config.yaml", [ROOT / "studies" / name for name in files])
    printed = show(*files)
    again = parse_config(printed)
    assert cells(again) == cells(config)
    for name in again.datasets:
        assert again.datasets[name] == config.datasets[name]
    for name in again.traces:
        assert again.traces[name] == config.traces[name]
    assert list(printed["models"]) == [name for name in config.models if name in again.study.models]
    assert set(printed["methods"]) == set(config.stages())
    assert not {"defaults", "engine", "vllm"} & set(printed)


def test_what_a_method_starts_from_is_printed_with_it(
    show: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "alone.yaml").write_text("study: {methods: [grpo]}", encoding="utf-8")
    assert list(show(str(tmp_path / "alone.yaml"))["methods"]) == ["base", "sft", "grpo"]


def test_a_part_is_printed_alone_of_the_study_or_not(show: Callable[..., Any]) -> None:
    study = "qwen2.5-gsm8k.yaml"
    config = load_config(ROOT / "config.yaml", [ROOT / "studies" / study])
    assert "dapo" not in config.stages()
    dapo = config.methods["dapo"].model_dump(mode="json", by_alias=True)
    assert show(study, key="methods.dapo") == dapo
    assert show(key="methods.grpo.num_steps") == 80  # by `defaults:` of config.yaml
    assert show(study, key="methods.grpo.num_steps") == 200
    assert show(key="models.qwen2.5-0.5b-instruct.vllm.max_sequences") == 256


def test_a_part_that_is_not_there_is_named_with_those_that_are(show: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"--key: no 'nothing' among base, sft, "):
        show(key="methods.nothing")
    with pytest.raises(ConfigError, match=r"--key: no 'steps' among study, datasets, "):
        show(key="steps")
    with pytest.raises(ConfigError, match=r"--key: no 'seeds.0' among name, "):
        show(key="study.seeds.0")
