"""Fixtures of several test files: settings, the tiny model, and one that has learned a bit."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from script_modules import load_script

from gsm8k_core.config import Config, RunSettings, dump, load_config, merge

ROOT = Path(__file__).resolve().parent.parent

gc.disable()  # while the modules of tests and what they import are loaded

# Two spinning OpenMP threads a test collapse on a machine with few cores; tiny models gain nothing.
os.environ["OMP_NUM_THREADS"] = "1"

# An example may take long because the machine is busy: that is no failure. Whoever looks for new
# ones says `--hypothesis-profile=new`; a change is judged by the same ones every time.
hypothesis.settings.register_profile(
    "new", hypothesis.settings.get_profile("default"), deadline=None
)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")

LONGEST = (
    "slurm", "test_workflow", "workflow", "test_trace_collection", "test_report_browser",
    "test_resume", "test_evaluate", "test_distributed", "test_train_scripts",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders and modules that take minutes go first: begun last, one would work alone."""

    def place(item: pytest.Item) -> int:
        names = (item.path.parent.name, item.path.stem)
        return min((LONGEST.index(name) for name in names if name in LONGEST), default=len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is loaded stays: no collection looks through it again
    gc.enable()


@pytest.fixture(scope="session")
def config() -> Config:
    """The repository's own config.yaml."""
    return load_config(ROOT / "config.yaml")


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    return load_script


@pytest.fixture(scope="session")
def run_json(config: Config) -> Callable[..., str]:
    """`run_json(method, seed=0, **overrides)`: settings of a tiny-qwen2 run, as the workflow's.

    But for the length of what is generated for the log: it would take longer than the steps.
    """

    def build(method: str, seed: int = 0, **overrides: Any) -> str:
        settings = config.run_settings("tiny-qwen2", method, seed)
        raw = json.loads(dump(settings))
        overrides = {"validation_max_new_tokens": 16, **overrides}
        raw["method_settings"] = merge(raw["method_settings"], overrides)
        return dump(RunSettings.model_validate(raw))

    return build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, prepared."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    arguments = ["--model-name", "tiny-qwen2", "--config", str(ROOT / "config.yaml")]
    load_script("prepare_model").main([*arguments, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def arithmetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small arithmetic dataset."""
    folder = tmp_path_factory.mktemp("data") / "arithmetic"
    settings = {"kind": "arithmetic", "num_train": 1000, "num_val": 20, "num_test": 40}
    load_script("prepare_data").main(
        ["--dataset", "arithmetic", "--settings", json.dumps(settings), "--output-dir", str(folder)]
    )
    return folder


@pytest.fixture(scope="session")
def sft_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    arithmetic_folder: Path,
    run_json: Callable[..., str],
) -> Path:
    """The embedded model after a short SFT: some of its samples are right, most are wrong."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    load_script("train_sft").main(
        [
            "--settings",
            run_json("sft", num_steps=200, batch_size=16, checkpoint_every_steps=1000),
            "--starting-model",
            str(tiny_folder),
            "--data",
            str(arithmetic_folder / "train.jsonl"),
            "--output-dir",
            str(output),
        ]
    )
    return output / "model"


@pytest.fixture
def examples() -> Callable[[str], list[str]]:
    """`examples(page)`: the Python of a page, block by block."""

    def read(page: str) -> list[str]:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
        return [textwrap.dedent(block) for block in blocks]

    return read


@pytest.fixture
def library_loop(
    examples: Callable[[str], list[str]],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What the loop of docs/usage.md leaves behind after two steps, by its names."""
    loop, *_ = examples("docs/usage.md")
    assert loop.count('"num_steps": 40') == 1
    loop = loop.replace('"num_steps": 40', '"num_steps": 2')
    folder = tmp_path / "artifacts" / "experiments" / "default" / "tiny-qwen2" / "sft" / "seed0"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(sft_folder)
    (tmp_path / "artifacts" / "arithmetic").symlink_to(arithmetic_folder)
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    names: dict[str, Any] = {}
    exec(loop, names)
    return names
