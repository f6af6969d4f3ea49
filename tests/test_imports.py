"""What may import what: the torch-free part stays so, and the public names are there."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gsm8k_core

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "gsm8k_core"

# Torch takes seconds to import: all but these do without, what is new among them.
WITH_TORCH = (
    "advantages", "checkpoints", "compiling", "distributed", "dpo", "engines.base",
    "engines.hf_engine", "engines.start", "engines.vllm_engine", "generation", "grpo", "losses",
    "masking", "models", "onednn", "scoring", "sft", "shared_prompts", "tokenization", "training",
)  # fmt: skip
SCRIPTS_WITH_TORCH = (
    "generate", "prepare_model", "train_dpo", "train_grpo", "train_sft",
)  # fmt: skip
HEAVY = ("torch", "transformers", "datasets", "vllm", "peft")

CONTRACT = (
    "tokenize_prompt_and_output", "compute_entropy", "get_response_log_probs", "masked_normalize",
    "masked_mean", "sft_microbatch_train_step", "compute_group_normalized_rewards",
    "compute_naive_policy_gradient_loss", "compute_grpo_clip_loss", "compute_policy_gradient_loss",
    "grpo_microbatch_train_step", "log_generations",
)  # fmt: skip

IMPORT_EACH = """
import importlib, json, runpy, sys
names, heavy = json.loads(sys.argv[1])
for name in names:
    if name.endswith(".py"):
        runpy.run_path(name, run_name="imported")
    else:
        importlib.import_module(name)
    loaded = [module for module in heavy if module in sys.modules]
    if loaded:
        sys.exit(f"{name} imports {', '.join(loaded)}")
"""


# What an import could change for the process that imports, one line each.
STATE_AROUND_THE_IMPORT = """
import gc, json, logging, os, signal, sys, threading, warnings
gc.disable()  # while modules are loaded
import torch, transformers
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import Qwen2ForCausalLM  # with what it imports, which changes the environment
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as of_transformers

def state():
    return {
        "environment": dict(os.environ),
        "logging": (list(logging.root.handlers), logging.root.level),
        "transformers' logging": of_transformers.get_verbosity(),
        "progress bars": (
            of_transformers.is_progress_bar_enabled(), are_progress_bars_disabled()
        ),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": (threading.active_count(), torch.get_num_threads()),
        "generator": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "attention": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS},
    }

before = state()
import gsm8k_core
for name in gsm8k_core.__all__:
    getattr(gsm8k_core, name)
after = state()
print(json.dumps([part for part in before if before[part] != after[part]]))
from gsm8k_core import tracking, training
print("wandb" in sys.modules)
"""


def import_in_a_new_process(names: list[str], heavy: tuple[str, ...]) -> str:
    """What the first of `names` to import one of `heavy` did; empty if none does."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps([names, heavy])],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return result.stderr.strip()


def light_modules() -> list[str]:
    """The modules of the library that are not in WITH_TORCH, which must all be there."""
    names = {
        ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__")
        for path in LIBRARY.rglob("*.py")
    }
    assert names >= set(WITH_TORCH)
    return sorted(f"gsm8k_core.{name}".rstrip(".") for name in names.difference(WITH_TORCH))


def test_only_modules_that_compute_import_torch() -> None:
    assert import_in_a_new_process(light_modules(), HEAVY) == ""


def test_the_libraries_of_charts_wait_for_one() -> None:
    drawing = {"gsm8k_core.charts", "gsm8k_core.figures", "gsm8k_core.report"}
    names = [name for name in light_modules() if name not in drawing]
    assert import_in_a_new_process(names, ("altair", "vl_convert")) == ""


def test_only_scripts_that_need_a_model_import_torch() -> None:
    paths = {path.stem: str(path) for path in (ROOT / "scripts").glob("*.py")}
    assert paths.keys() >= set(SCRIPTS_WITH_TORCH)
    names = sorted(path for name, path in paths.items() if name not in SCRIPTS_WITH_TORCH)
    assert import_in_a_new_process(names, HEAVY) == ""


@pytest.mark.slow
def test_the_check_itself_sees_torch() -> None:
    assert import_in_a_new_process(["gsm8k_core.masking"], HEAVY) == (
        "gsm8k_core.masking imports torch"
    )


def test_importing_the_library_imports_nothing_of_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c",
         "import sys, gsm8k_core; print([m for m in sys.modules if m.startswith('gsm8k_core.')])"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_all_leaves_the_process_as_it_was_and_wandb_waits_for_a_run() -> None:
    result = subprocess.run(
        [sys.executable, "-c", STATE_AROUND_THE_IMPORT],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.split("\n") == ["[]", "False", ""]


@pytest.mark.parametrize("name", sorted({*CONTRACT, *gsm8k_core.__all__}))
def test_every_public_name_can_be_imported_from_the_package(name: str) -> None:
    assert callable(getattr(gsm8k_core, name))
    assert name in gsm8k_core.__all__ and name in dir(gsm8k_core)


def test_type_checkers_are_told_of_the_same_names_from_the_same_modules() -> None:
    assert (LIBRARY / "py.typed").is_file()
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        (alias.asname, f"{node.module}")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert told == {(name, f"gsm8k_core.{home}") for name, home in gsm8k_core._HOME.items()}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gsm8k_core.nothing


def imports_of(path: Path) -> Iterator[str]:
    """What is imported anywhere in a file: modules, and names of modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers_of(module: str) -> set[str]:
    """The files of library and scripts that import `module` or from it."""
    return {
        str(path.relative_to(ROOT))
        for folder in (LIBRARY, ROOT / "scripts")
        for path in folder.rglob("*.py")
        if any(f"{name}.".startswith(f"{module}.") for name in imports_of(path))
    }


def test_vllm_is_imported_by_its_engine_alone() -> None:
    assert importers_of("vllm") <= {"gsm8k_core/engines/vllm_engine.py"}


def test_what_trains_is_imported_by_trainers_alone() -> None:
    trainers = {f"scripts/train_{kind}.py" for kind in ("sft", "dpo", "grpo")}
    assert importers_of("gsm8k_core.training") == trainers


def test_the_library_prints_nothing() -> None:
    printing = [
        f"{path.name}: {line.strip()}"
        for path in LIBRARY.rglob("*.py")
        for line in path.read_text(encoding="utf-8").split("\n")
        if line.strip().startswith("print(")
    ]
    assert printing == []


def test_the_library_example_of_the_readme_runs(
    examples: Callable[[str], list[str]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (example,) = examples("README.md")
    (tmp_path / "artifacts" / "models").mkdir(parents=True)
    (tmp_path / "artifacts" / "models" / "tiny-qwen2").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["rewards"].tolist() == [1.0, 1.0, 0.0, 0.0]
    learnt = names["batch"]["labels"].masked_fill(~names["batch"]["response_mask"], -1)
    assert (learnt == names["tokenizer"].eos_token_id).sum(dim=-1).tolist() == [1, 1, 1, 1]
    gradients = [parameter.grad for parameter in names["model"].parameters()]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_the_loop_of_the_usage_page_needs_public_names_alone(
    examples: Callable[[str], list[str]],
) -> None:
    loop, *_ = examples("docs/usage.md")
    assert loop.count("gsm8k_core") == 1  # `import gsm8k_core as core`
    assert {*re.findall(r"\bcore\.(\w+)", loop)} <= {*gsm8k_core.__all__}


def test_the_loop_of_the_usage_page_samples_learns_and_evaluates(
    library_loop: dict[str, Any], sft_folder: Path, tmp_path: Path
) -> None:
    metrics = library_loop["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["num_completions"] == 16 * 8
    gradients = [parameter.grad for parameter in library_loop["model"].parameters()]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (sft_folder, tmp_path / "my-grpo")
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)
    mean, low, high = library_loop["pass_at_1"](library_loop["test"])
    assert 0.0 <= low <= mean < high <= 1.0
