"""What the command lines share: one-line errors, exit codes, settings from JSON or files."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gsm8k_core.cli import (
    SNAKEMAKE_VARIABLE,
    add_run_arguments,
    parser,
    run_script,
    run_settings_from,
    training_parser,
    with_engine_arguments,
)
from gsm8k_core.config import Config, ModelSettings, RunSettings, dump, load_config, settings_from
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.progress import progress

ROOT = Path(__file__).resolve().parent.parent
NOISY = ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec", "datasets")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in (*NOISY, "huggingface_hub")}
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("train.jsonl, row 3: bad"), 1, "error: train.jsonl, row 3: bad\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"),
            1,
            "error: /x/y: No such file or directory\n",
        ),
        (OSError("a fault without a number"), 1, "error: a fault without a number\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert run_script(raising(error)) == code
    assert capsys.readouterr().err == line


def test_a_level_of_logging_that_there_is_not_is_told_and_not_taken() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "verify.py"), "--study", "none"]
    environment = {**os.environ, "GSM8K_LOG_LEVEL": "verbose"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "GSM8K_LOG_LEVEL: no level VERBOSE; there are: CRITICAL" in found.stderr
    assert "Traceback" not in found.stderr


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


REMEDIES = (
    "lower tokens_per_microbatch (or, if it was generating, completions_per_batch), or set "
    "gradient_checkpointing: true; with vLLM lower vllm.rollout_gpu_memory_fraction (or "
    "vllm.kv_cache_gib, where it is set). The run resumes from its last checkpoint, and finished "
    "ones stay as they are. Weights, gradients and AdamW's moments alone take 16 bytes per "
    "parameter: if these do not fit, set lora, or more gpus"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("Tried to allocate 2.00 GiB.\nMore."), "Tried to allocate 2.00 GiB."),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (RuntimeError("CUDA out of memory. " + "x" * 500), "CUDA out of memory. " + "x" * 140),
    ],
)
def test_too_little_memory_is_one_line_with_what_helps(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    said: str,
) -> None:
    assert run_script(raising(error)) == 1
    assert capsys.readouterr().err == f"error: out of memory ({said}): {REMEDIES}\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_script(raising(error)) == 1
    assert capsys.readouterr().err == f"[rank 1] error: out of memory ({said}): {REMEDIES}\n"


@pytest.mark.parametrize(
    ("allocate", "remedies"),
    [(torch.empty, REMEDIES), (np.empty, "this machine, or what the job may take of it, has too")],
)
def test_more_memory_than_the_machine_has_is_one_line(
    allocate: Any, remedies: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(lambda: allocate(2**50)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and "llocate" in said and remedies in said


def test_another_runtime_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(raising(RuntimeError("shapes do not fit")))


def test_a_rank_that_loses_another_says_so_before_anything_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsm8k_core.cli.SECONDS_TO_BE_ENDED", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="gloo"):
        run_script(raising(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")))
    assert capsys.readouterr().err == "[rank 0] lost contact with another rank\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError("a bug")))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_mains(returned: int | None, code: int) -> None:
    assert run_script(lambda: returned) == code


# Settings


def test_settings_come_from_json_a_json_file_or_a_yaml_file(tmp_path: Path) -> None:
    expected = ModelSettings(source="embedded", prompt="plain", threads=3)
    text = dump(expected)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    (tmp_path / "a.yaml").write_text(
        "source: embedded\nprompt: plain\nthreads: 3\n", encoding="utf-8"
    )
    for given in (text, str(tmp_path / "a.json"), str(tmp_path / "a.yaml")):
        assert settings_from(given, ModelSettings) == expected


def test_every_mistake_in_settings_is_listed_by_key() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from('{"source": "embedded", "threads": 0, "thread": 1}', ModelSettings)
    message = str(caught.value)
    assert message.startswith("--settings: ")
    assert all(key in message for key in ("prompt: ", "threads: ", "thread: "))
    assert "thread: Extra inputs are not permitted; did you mean 'threads'?" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such/file.json", "--settings: neither JSON nor a file: no/such/file.json"),
        ('{"source": "embedded"', "--settings: not valid JSON"),
        ('{"source": "' + "x" * 5000, "--settings: not valid JSON"),  # longer than a path may be
        ("'{" + "x" * 5000 + "}'", "--settings: neither JSON nor a file: '{xxx"),
        ("3", "--settings: "),
        ("[1]", "--settings: "),
    ],
)
def test_settings_that_are_none_say_so(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from(text, ModelSettings)
    assert str(caught.value).startswith(message)


def test_a_malformed_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("source: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.yaml: not valid YAML"):
        settings_from(str(tmp_path / "a.yaml"), ModelSettings)
    (tmp_path / "b.yaml").write_text("source: hub\nprompt: p\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.yaml: .*source: hub needs hub_id, revision"):
        settings_from(str(tmp_path / "b.yaml"), ModelSettings)


def test_mistakes_name_the_argument_that_holds_them() -> None:
    with pytest.raises(ConfigError, match=r"^--study: not valid JSON"):
        settings_from("{bad", ModelSettings, "--study")
    model = ModelSettings(source="embedded", prompt="plain")
    for value, message in (
        ("0", r"flags: vllm\.max_sequences: "),
        (": [", "--vllm-max-sequences: "),
    ):
        args = training_parser("").parse_args(
            ["--starting-model", "m", "--data", "d", "--output-dir", "o"]
            + ["--vllm-max-sequences", value]
        )
        with pytest.raises(ConfigError, match=message):
            with_engine_arguments(model, args)


def run_arguments(*arguments: str) -> argparse.Namespace:
    arguments_parser = parser("what it does")
    add_run_arguments(arguments_parser)
    return arguments_parser.parse_args(arguments)


def test_a_seed_below_0_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_arguments("--seed", "-1")
    assert "--seed: expected 0 or more, found -1" in capsys.readouterr().err


CONFIG = ("--config", str(ROOT / "config.yaml"))


def test_a_cell_of_the_config_and_its_settings_are_the_same_run() -> None:
    cell = ("--model-name", "tiny-qwen2", "--method", "grpo", "--seed", "2")
    by_name = run_settings_from(run_arguments(*CONFIG, *cell))
    assert (by_name.method, by_name.seed, by_name.parent) == ("grpo", 2, "sft")
    assert run_settings_from(run_arguments("--settings", dump(by_name))) == by_name


def test_a_round_of_expert_iteration_is_named_as_the_workflow_trains_it(config: Config) -> None:
    for method, given, number in (
        ("expert_iteration", ("--round", "2"), 2),
        ("expert_iteration", (), 1),
        ("sft", (), 0),
    ):
        cell = ("--model-name", "tiny-qwen2", "--method", method, "--seed", "3")
        named = run_settings_from(run_arguments(*CONFIG, *cell, *given))
        assert named == config.run_settings("tiny-qwen2", method, 3, number)


@pytest.mark.parametrize(
    "cell",
    [
        ("--seed", "0"),
        ("--round", "1"),
        ("--model-name", "tiny-qwen2"),
        ("--method", "sft"),
        CONFIG,
    ],
)
def test_a_cell_named_beside_its_settings_is_refused(cell: tuple[str, str]) -> None:
    settings = dump(load_config(ROOT / "config.yaml").run_settings("tiny-qwen2", "grpo", 2))
    with pytest.raises(ConfigError, match=f"{cell[0]} repeats what --settings says"):
        run_settings_from(run_arguments("--settings", settings, *cell))


def test_a_cell_of_a_real_model_is_told_what_is_made_for_a_toy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_settings_from(run_arguments(*CONFIG, "--model-name", "tiny-qwen2", "--method", "sft"))
    assert not caplog.text
    real = ("--model-name", "qwen2.5-1.5b-instruct", "--method", "sft")
    run_settings_from(run_arguments(*CONFIG, *real))
    assert "defaults.sft.learning_rate (0.004): made for the embedded model" in caplog.text


def test_a_whole_config_of_ones_own_has_inherited_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.yaml"
    own.write_bytes((ROOT / "config.yaml").read_bytes())
    real = ("--model-name", "qwen2.5-1.5b-instruct", "--method", "sft")
    run_settings_from(run_arguments("--config", str(own), *real))
    assert not caplog.text


def test_overlays_of_the_config_apply(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("methods: {sft: {num_steps: 3}}\n", encoding="utf-8")
    given = run_arguments(
        *CONFIG, str(tmp_path / "o.yaml"), "--model-name", "tiny-qwen2", "--method", "sft"
    )
    assert run_settings_from(given).method_settings.num_steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to train: --settings, or --model-name and --method"),
        (("--model-name", "tiny-qwen2"), "say what to train"),
        (
            ("--model-name", "tiny", "--method", "sft"),
            "--model-name: no 'tiny' in the config; there are: tiny-qwen2, ",
        ),
        (("--model-name", "tiny-qwen2", "--method", "x"), "--method: no 'x' in the config"),
        (
            ("--model-name", "tiny-qwen2", "--method", "base"),
            "methods.base: kind base trains nothing",
        ),
        (
            ("--model-name", "tiny-qwen2", "--method", "rft", "--round", "2"),
            "--round: no round 2 of rft: its last is 1",
        ),
        (
            ("--model-name", "tiny-qwen2", "--method", "sft", "--round", "1"),
            "--round: no round 1 of sft: it has no rounds here",
        ),
    ],
)
def test_a_run_that_is_not_named_well_says_what_there_is(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_settings_from(run_arguments(*CONFIG, *arguments))
    assert str(caught.value).startswith(message)


def test_every_trainer_takes_these_arguments(run_json: Callable[..., str]) -> None:
    given = training_parser("docs").parse_args(
        ["--settings", run_json("sft"), "--starting-model", "m", "--data", "d",
         "--output-dir", "o", "--max-steps", "5"]
    )  # fmt: skip
    assert (given.starting_model, given.val_data, given.max_steps) == (Path("m"), None, 5)
    for wrong in ("0", "-3", "x"):
        with pytest.raises(SystemExit):
            training_parser("").parse_args(
                ["--starting-model", "m", "--data", "d", "--output-dir", "o", "--max-steps", wrong]
            )
    assert isinstance(run_settings_from(given), RunSettings)


# Logs and help


def test_progress_gives_every_item_and_draws_nothing_in_a_log_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress(range(5), "counting", total=7, start=2)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


# Those that import neither torch nor transformers: the others' help takes as long as their import.
@pytest.mark.parametrize("name", ["prepare_data.py", "select_completions.py", "finish_rounds.py"])
def test_help_is_the_scripts_own_docstring(name: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), "--help"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == 0
    source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    assert source.split("\n", 1)[0].removeprefix('"""') in result.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_flag_of_a_script_is_explained(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    unexplained: list[str] = []

    def look(parser: argparse.ArgumentParser, _: object = None) -> None:
        unexplained.extend(action.dest for action in parser._actions if not action.help)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", look)
    with pytest.raises(KeyboardInterrupt):
        script(name).main([])
    assert unexplained == []


def test_an_error_of_a_script_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--dataset", "d",
         "--settings", json.dumps({"kind": "arithmetic", "num_val": 100_000}),
         "--output-dir", str(tmp_path / "d")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("error: arithmetic: no more than about ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "d").exists()


LEAVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from gsm8k_core.cli import leave
class Part:
    def __del__(self):
        print("taken apart")
part = Part()
pool = ThreadPoolExecutor()
pool.submit(print, "of a pool")
threading.Thread(target=lambda: time.sleep(0.3) or print("of a thread")).start()
atexit.register(print, "at exit")
sys.modules |= dict.fromkeys(sys.argv[1:])
leave(3)
"""


@pytest.mark.parametrize("imported", [[], ["torch"]])
def test_a_script_that_ends_waits_for_threads_and_exit_functions_but_does_not_take_torch_apart(
    imported: list[str],
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LEAVING, *imported],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (3, "")
    lines = ["of a pool", "of a thread", "at exit", *([] if imported else ["taken apart"])]
    assert result.stdout.splitlines() == lines


# Jobs end with snakemake

JOB = (
    "import sys, time\nfrom gsm8k_core.cli import run_script\n"
    "run_script(lambda: print('at work', flush=True) or time.sleep(60))\n"
)


def start_job(pid: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOB],
        cwd=ROOT,
        env={**os.environ, SNAKEMAKE_VARIABLE: f"{platform.node()} {pid}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_ends_when_its_snakemake_is_killed_even_where_nobody_has_waited_for_that() -> None:
    # It need not be called so: Snakemake also has an interface for Python.
    sleeper = [sys.executable, "-c", "import time; time.sleep(120)"]
    with subprocess.Popen(sleeper) as snakemake, start_job(snakemake.pid) as job:
        assert job.stdout is not None and job.stdout.readline() == "at work\n"
        assert job.poll() is None
        os.kill(snakemake.pid, signal.SIGKILL)  # a zombie until it is waited for
        _, log = job.communicate(timeout=60)
        assert job.returncode == -signal.SIGTERM
        assert f"the caller of this job (process {snakemake.pid}) has ended" in log


def test_a_job_whose_snakemake_has_gone_before_it_began_does_not_begin() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as snakemake:
        pass
    with start_job(snakemake.pid) as job:
        output, log = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGTERM
    assert output == "" and "has ended" in log


def test_a_process_that_began_later_under_its_number_is_not_its_snakemake() -> None:
    code = (
        "import os, platform, subprocess\n"
        "later = subprocess.Popen(['sleep', '120'], stderr=subprocess.DEVNULL)\n"
        f"os.environ[{SNAKEMAKE_VARIABLE!r}] = f'{{platform.node()}} {{later.pid}}'\n{JOB}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    ) as job:
        try:
            _, log = job.communicate(timeout=60)
        finally:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == -signal.SIGTERM and b"has ended" in log


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_container_that_does_not_see_snakemake_goes_on(is_taken: bool) -> None:
    """Its number may be another process within."""
    with subprocess.Popen(["sleep", "120"]) as other:
        if not is_taken:
            other.kill()
            other.wait()
        with start_job(other.pid, GSM8K_CONTAINER="1") as job:
            assert job.stdout is not None and job.stdout.readline() == "at work\n"
            job.kill()
        other.kill()
