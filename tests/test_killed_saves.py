"""Killed while weights are written or removed: half of a model is never taken for one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsm8k_core.errors import ModelError
from gsm8k_core.files import atomic_path, read_json, write_text
from gsm8k_core.models import load_model, load_tokenizer, resolve_device
from gsm8k_core.training import TrainingRun

ROOT = Path(__file__).resolve().parent.parent
WRITE_HALF = """
import sys, time
from pathlib import Path
from gsm8k_core.files import atomic_path

with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    print("half", flush=True)
    time.sleep(600)
"""
# The real trainer, whose save stops where a kill would hit it.
TRAIN_AND_SAVE_HALF = """
import gc, sys, time
gc.disable()  # while modules are loaded
from gsm8k_core import training
from scripts import train_sft

def save_half(model, tokenizer, folder):
    model.save_pretrained(folder)
    print("half", flush=True)
    time.sleep(600)

training.save_model = save_half
train_sft.main(sys.argv[1:])
"""
# The real trainer, which stops while it removes its checkpoints.
TRAIN_AND_DROP_HALF = """
import gc, shutil, sys, time
gc.disable()  # while modules are loaded
from pathlib import Path
from scripts import train_sft

remove = shutil.rmtree

def remove_half(path, *others, **options):
    if Path(path).name == "state":
        print("half", flush=True)
        time.sleep(600)
    remove(path, *others, **options)

shutil.rmtree = remove_half
train_sft.main(sys.argv[1:])
"""
# As Snakemake removes a folder, one file at a time when it is told to.
REMOVE_SLOWLY = """
import os, shutil, sys

def unlink(path, *, dir_fd=None, unlink=os.unlink):
    sys.stdin.readline()
    unlink(path, dir_fd=dir_fd)
    print("removed", flush=True)

os.unlink = unlink
shutil.rmtree(sys.argv[1])
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_with(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_write_removes_what_a_killed_one_has_left_and_nothing_else(
    number: int, tmp_path: Path
) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    (tmp_path / ".model.ofauser").mkdir()
    alive = start(WRITE_HALF, str(other))
    process = start(WRITE_HALF, str(folder))
    assert next_line(alive) == next_line(process) == "half"
    end_with(process, number)
    assert not folder.exists() and list(tmp_path.glob(".model.*/model/half"))
    with atomic_path(folder) as temporary:
        write_text(tmp_path / "beside", "")  # does not take what this very process writes
        temporary.mkdir()
    assert folder.is_dir()
    assert [path.name for path in tmp_path.glob(".model.*")] == [".model.ofauser"]
    assert list(tmp_path.glob(".other.*/other/half"))
    end_with(alive, number)


@pytest.fixture
def short_run(
    run_json: Callable[..., str], tiny_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> tuple[Path, list[str]]:
    """The folder of a run of two steps, and the arguments that train it."""
    return tmp_path / "run", [
        "--settings", run_json("sft", num_steps=2, batch_size=2, checkpoint_every_steps=1),
        "--starting-model", str(tiny_folder), "--data", str(arithmetic_folder / "train.jsonl"),
        "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_trainer_killed_while_it_saves_leaves_no_model_and_its_half_goes_at_the_next_start(
    short_run: tuple[Path, list[str]],
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, arguments = short_run
    process = start(TRAIN_AND_SAVE_HALF, *arguments)
    assert next_line(process) == "half"
    end_with(process, signal.SIGKILL)
    assert not (run / "model").exists() and not (run / "train").exists()
    (half,) = run.glob(".model.*")
    assert (half / "model" / "model.safetensors").exists()

    steps_after, begins = TrainingRun.steps_after, []

    def without_the_half(*words: Any) -> Any:
        begins.append(not half.exists())
        return steps_after(*words)

    monkeypatch.setattr(TrainingRun, "steps_after", without_the_half)
    assert script("train_sft").main(arguments) == 0
    assert begins == [True]
    load_model(run / "model", resolve_device(0))
    names = {"model", "train", "settings.json", ".finished"}
    assert {path.name for path in run.iterdir()} == names


@pytest.mark.slow
def test_a_trainer_killed_while_its_checkpoints_go_need_not_train_again(
    short_run: tuple[Path, list[str]], script: Callable[[str], ModuleType]
) -> None:
    run, arguments = short_run
    process = start(TRAIN_AND_DROP_HALF, *arguments)
    assert next_line(process) == "half"
    end_with(process, signal.SIGKILL)
    assert not (run / "state").exists() and list(run.glob(".state.*/state/step-*"))
    weights = (run / "model" / "model.safetensors").read_bytes()
    summary = (run / "train" / "summary.json").read_bytes()
    # Snakemake takes the outputs of a failed job away.
    shutil.rmtree(run / "model")
    for name in ("train/summary.json", "train/metrics.jsonl", "settings.json"):
        (run / name).unlink()

    assert script("train_sft").main(arguments) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert (run / "train" / "summary.json").read_bytes() == summary
    assert not list(run.glob(".state.*"))


def test_weights_whose_removal_was_cut_short_are_refused_wherever_that_was(
    sft_folder: Path, tmp_path: Path
) -> None:
    names = {path.name for path in sft_folder.iterdir()}
    assert set(read_json(sft_folder.parent / "train" / "summary.json")["model_files"]) == names
    for num_removed in range(1, len(names)):
        run = tmp_path / str(num_removed)
        shutil.copytree(sft_folder.parent, run)
        load_tokenizer(run / "model")
        process = start(REMOVE_SLOWLY, str(run / "model"))
        assert process.stdin is not None
        for _ in range(num_removed):
            process.stdin.write("\n")
            process.stdin.flush()
            assert next_line(process) == "removed"
        end_with(process, signal.SIGKILL)
        assert len(list((run / "model").iterdir())) == len(names) - num_removed
        with pytest.raises(ModelError, match="delete the folder, and .finished"):
            load_tokenizer(run / "model")
        with pytest.raises(ModelError, match="is missing, so a removal"):
            load_model(run / "model", resolve_device(0))
