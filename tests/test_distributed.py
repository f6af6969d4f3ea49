"""Training on several processes under torchrun, over gloo: the same run as on one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_scripts import cut_vocabulary, run_until
from safetensors.torch import load_file
from script_modules import load_script

from gsm8k_core.distributed import own_microbatches, shares
from gsm8k_core.files import lock, read_json, read_jsonl, unlock, write_json, write_jsonl

ROOT = Path(__file__).resolve().parent.parent

# A step of AdamW is rate·m/(√v + ε). With ε far above the gradient and as large as the rate, it is
# the gradient itself: what the weights have moved by after one step is what must not differ.
PLAIN = {
    "learning_rate": 1e3,
    "adam_epsilon": 1e3,
    "max_grad_norm": 1e9,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "tokens_per_microbatch": 120,
    "checkpoint_every_steps": 2,
}
SFT = {**PLAIN, "num_steps": 1, "batch_size": 5}
GRPO = {
    **PLAIN,
    "num_steps": 1,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 16,
    "reward": {"length": 1.0, "length_shaping": {"start": 0, "end": 16}},
}
# Several updates: the first ones must stay small for the later ones to be of the same model.
UPDATES = {"learning_rate": 10.0, "minibatches": 2, "epochs_per_batch": 2}
ONE_STEP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("train_sft", "sft", {**SFT, "validate_every_steps": 1, "keep_best": True}),
    "dpo": ("train_dpo", "dpo", {**PLAIN, "num_steps": 1, "batch_size": 3}),
    "dapo": ("train_grpo", "dapo", {**GRPO, "minibatches": 1}),
    "grpo, 4 updates": ("train_grpo", "grpo", {**GRPO, **UPDATES, "kl_coefficient": 0.1}),
}  # fmt: skip
ON_TWO_RANKS_ALONE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "packed": ("train_sft", "sft", {**SFT, "packing": True, "max_length": 128,
                                    "gradient_checkpointing": True}),
    "lora": ("train_sft", "sft", {**SFT, "lora": {"rank": 2}, "gradient_checkpointing": True}),
    "reinforce_pp": ("train_grpo", "reinforce_pp",
                     {**GRPO, "minibatches": 1, "kl_coefficient": 0.1, "kl_placement": "reward",
                      "kl_estimator": "k1", "entropy_coefficient": 0.01}),
    "gspo": ("train_grpo", "gspo",
             {**GRPO, **UPDATES, "mask_truncated": True, "importance_correction": "sequence"}),
}  # fmt: skip
LONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "long sft": ("train_sft", "sft", {"num_steps": 10, "batch_size": 5,
                                      "learning_rate": 1e-3, "checkpoint_every_steps": 3}),
    "long grpo": ("train_grpo", "grpo",
                  {**GRPO, "num_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-3,
                   "minibatches": 2, "kl_coefficient": 0.1, "reference_refresh_steps": 1}),
}  # fmt: skip
RUNS = ONE_STEP | ON_TWO_RANKS_ALONE | LONG
STOP_AFTER = {"long sft": 7, "long grpo": 3}
BROUGHT_BACK = "sft, finished on one"
UNREPRODUCIBLE = {"peak_memory_mb", "tokens_per_second"}


@dataclass(frozen=True)
class Runs:
    """Folders of runs: `one` by one rank, `two` and `four`, by name; and what torchrun said."""

    one: Path
    two: Path
    four: Path
    output_of_two: str
    summary_on_one: dict[str, Any]
    """Of `two / BROUGHT_BACK`, which one rank finished and two brought back."""


def jobs_arguments(inputs: Callable[[str], list[str]], name: str, folder: Path) -> list[str]:
    return [*inputs(name), "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    run_json: Callable[..., str],
    tiny_folder: Path,
    arithmetic_folder: Path,
) -> Callable[[str], list[str]]:
    """Arguments of one of RUNS, but for its folder."""
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(
        pairs,
        [
            {"problem_id": str(n), "question": f"q {n}", "chosen_ids": [20 + n, *[7] * n, 0],
             "rejected_ids": [21 + n, 22, 0]}
            for n in range(6)
        ],
    )  # fmt: skip

    def build(name: str) -> list[str]:
        script_name, method, overrides = RUNS[name]
        data = pairs if script_name == "train_dpo" else arithmetic_folder / "train.jsonl"
        return [
            "--settings", run_json(method, **overrides), "--starting-model", str(tiny_folder),
            "--data", str(data), "--val-data", str(arithmetic_folder / "val.jsonl"),
        ]  # fmt: skip

    return build


def torchrun(num_ranks: int, script: Path, *arguments: str) -> subprocess.Popen[str]:
    """What rules/common.smk starts, with stderr to read."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", "0", "--nproc-per-node", str(num_ranks), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def run_on(num_ranks: int, folder: Path, jobs: list[tuple[str, list[str], int | None]]) -> str:
    """Run jobs of run_scripts.py; returns what they wrote on stderr."""
    write_json(folder / "jobs.json", [list(job) for job in jobs])
    process = torchrun(
        num_ranks, ROOT / "tests" / "helpers" / "run_scripts.py", str(folder / "jobs.json")
    )
    output = process.communicate()[1]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def runs(
    inputs: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """All runs on one and two ranks, and ONE_STEP on four; starting processes takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two, four = (folder / name for name in ("one", "two", "four"))

    def job(name: str, at: Path, stop: int | None = None) -> tuple[str, list[str], int | None]:
        return RUNS[name][0], jobs_arguments(inputs, name, at), stop

    def on_one(name: str, at: Path, stop: int | None = None) -> None:
        script_name, arguments, _ = job(name, at)
        with pytest.MonkeyPatch.context() as patched:  # as in the processes of several ranks
            cut_vocabulary(patched.setattr)
            run_until(load_script(script_name), arguments, stop)

    for name in RUNS:
        on_one(name, one / name)
    for name, stop in STOP_AFTER.items():
        on_one(name, folder / "stopped" / name, stop)
        # This process holds its lock.
        shutil.copytree(
            folder / "stopped" / name / "state", two / f"{name}, begun on one" / "state"
        )
    on_one("sft", two / BROUGHT_BACK)
    summary = read_json(two / BROUGHT_BACK / "train" / "summary.json")
    (two / BROUGHT_BACK / "train" / "summary.json").unlink()
    shutil.rmtree(two / BROUGHT_BACK / "model")
    jobs = [job(name, two / name) for name in RUNS]
    jobs.append(job("sft", two / BROUGHT_BACK))
    for name, stop in STOP_AFTER.items():
        jobs += [
            job(name, two / f"{name}, resumed", stop),
            job(name, two / f"{name}, resumed"),
            job(name, two / f"{name}, begun on one"),
            job(name, one / f"{name}, begun on two", stop),
        ]
    output = run_on(2, folder, jobs)
    for name in STOP_AFTER:
        on_one(name, one / f"{name}, begun on two")
    run_on(4, folder, [job(name, four / name) for name in ONE_STEP])
    yield Runs(one, two, four, output, summary)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rows_of(run: Path) -> list[dict[str, float]]:
    """What each step says, but for what time and memory it took."""
    return [
        {key: value for key, value in row.items()
         if "second" not in key and key not in UNREPRODUCIBLE and value is not None}
        for row in read_jsonl(run / "train" / "metrics.jsonl")
    ]  # fmt: skip


def assert_same_rows(run: Path, expected: Path, tolerance: float) -> None:
    found, wanted = rows_of(run), rows_of(expected)
    assert len(found) == len(wanted)
    for row, expected_row in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected_row, rel=tolerance, abs=tolerance)


# ---------------------------------------------------------------------------------- shares of work


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 8))
def test_shares_neither_overlap_nor_lose(lengths: list[int], num_ranks: int) -> None:
    parts = shares(lengths, num_ranks)
    assert len(parts) == num_ranks
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 8))
def test_no_share_has_more_tokens_than_another_by_more_than_one_row(
    lengths: list[int], num_ranks: int
) -> None:
    tokens = [sum(lengths[index] for index in part) for part in shares(lengths, num_ranks)]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 8))
def test_ranks_have_equally_many_microbatches_which_hold_every_row_once(
    lengths: list[int], num_ranks: int
) -> None:
    by_rank = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WORLD_SIZE", str(num_ranks))
        for number in range(num_ranks):
            patched.setenv("RANK", str(number))
            by_rank.append(own_microbatches(lengths, 400))
    assert len({len(microbatches) for microbatches in by_rank}) == 1
    rows = [row for microbatches in by_rank for rows in microbatches for row in rows]
    assert sorted(rows) == list(range(len(lengths)))


def test_one_rank_has_everything_in_order() -> None:
    assert shares([3, 9, 1], 1) == [[0, 1, 2]]


# ------------------------------------------------------------------------------------- the same run


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_STEP, *ON_TWO_RANKS_ALONE])
def test_a_step_on_two_ranks_has_the_gradient_and_the_metrics_of_one(runs: Runs, name: str) -> None:
    assert rows_of(runs.one / name)[-1]["grad_norm"] > 0.01
    assert largest_difference(runs.one / name, runs.two / name) < 1e-5
    assert_same_rows(runs.two / name, runs.one / name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_STEP)
def test_a_step_on_four_ranks_has_the_gradient_and_the_metrics_of_one(
    runs: Runs, name: str
) -> None:
    assert largest_difference(runs.one / name, runs.four / name) < 1e-5
    assert_same_rows(runs.four / name, runs.one / name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_run_that_changes_the_number_of_ranks_goes_on_with_the_same_curve(
    runs: Runs, name: str
) -> None:
    whole = runs.one / name
    for resumed in (runs.one / f"{name}, begun on two", runs.two / f"{name}, begun on one"):
        assert_same_rows(resumed, whole, 1e-4)
        assert largest_difference(whole, resumed) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_run_stopped_on_two_ranks_and_resumed_on_two_ends_the_same_to_the_byte(
    runs: Runs, name: str
) -> None:
    whole, resumed = runs.two / name, runs.two / f"{name}, resumed"
    assert rows_of(whole) == rows_of(resumed)
    files = [folder / "model" / "model.safetensors" for folder in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_several_ranks_leave_the_files_of_one(runs: Runs) -> None:
    for name in ("sft", "lora", "long grpo"):
        one, two = (
            {str(path.relative_to(folder)) for path in folder.rglob("*")}
            for folder in (runs.one / name, runs.two / name)
        )
        assert one == two
    summary = read_json(runs.four / "sft" / "train" / "summary.json")
    assert summary["num_ranks"] == 4
    config = "model/config.json"
    assert read_json(runs.one / "sft" / config) == read_json(runs.two / "sft" / config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "packed", "lora"])
def test_ranks_write_together_what_one_writes_by_itself(runs: Runs, name: str) -> None:
    def written(folder: Path) -> list[Any]:
        return [
            (row["step"], one["completion"], pytest.approx(one["mean_entropy"], rel=1e-4))
            for row in read_jsonl(folder / name / "train" / "completions.jsonl")
            for one in row["completions"]
        ]

    assert len(written(runs.one)) == 8
    assert written(runs.two) == written(runs.one)
    if name in ONE_STEP:
        assert written(runs.four) == written(runs.one)


@pytest.mark.slow
def test_rank_0_alone_reports_progress(runs: Runs) -> None:
    assert runs.output_of_two.count("INFO train_sft: step 1/1:") == 3
    assert "[rank 1] INFO" not in runs.output_of_two


@pytest.mark.slow
def test_two_ranks_bring_back_what_one_has_finished(runs: Runs) -> None:
    run = runs.two / BROUGHT_BACK
    assert runs.output_of_two.count("are brought back") == 1
    assert read_json(run / "train" / "summary.json") == runs.summary_on_one
    assert weights_of(run).keys() == weights_of(runs.one / "sft").keys()


# ----------------------------------------------------------------------------------------- failures


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_names_it_and_can_go_on(
    run_json: Callable[..., str], tiny_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = run_json("sft", num_steps=10_000, batch_size=2, checkpoint_every_steps=3)
    arguments = [
        "--settings", settings, "--starting-model", str(tiny_folder),
        "--data", str(arithmetic_folder / "train.jsonl"), "--output-dir", str(run),
    ]  # fmt: skip
    job = torchrun(2, ROOT / "scripts" / "train_sft.py", *arguments)

    def last_step() -> int:
        return max((int(path.name[5:]) for path in (run / "state").glob("step-*")), default=0)

    wait_until(lambda: last_step() >= 6 or job.poll() is not None, 300)
    (second,) = [
        process
        for process in psutil.Process(job.pid).children()
        if process.environ().get("RANK") == "1"
    ]
    # torchrun is held until the other rank has noticed: it might end that one first.
    job.send_signal(signal.SIGSTOP)
    second.send_signal(signal.SIGKILL)
    assert job.stderr is not None
    output = ""
    for line in job.stderr:
        output += line
        if line == "[rank 0] lost contact with another rank\n":
            break
    job.send_signal(signal.SIGCONT)
    output += job.communicate(timeout=300)[1]
    assert job.returncode != 0
    cause = output.split("Root Cause (first observed failure):")[1]
    assert "rank      : 1" in cause and "SIGKILL" in cause
    assert "[rank 0] lost contact with another rank" in output and "gloo" not in output
    wait_until(lambda: not processes_of(run), 60)

    # One rank goes on from what two have left.
    steps_done = last_step()
    arguments += ["--max-steps", str(steps_done + 1)]
    load_script("train_sft").main(arguments)
    summary = read_json(run / "train" / "summary.json")
    assert summary["num_updates"] == steps_done + 1 >= 7


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_ends_all_with_one_line(
    inputs: Callable[[str], list[str]], tmp_path: Path
) -> None:
    # Rank 0 alone takes the lock; the other waits for it.
    held = lock(tmp_path / "run" / ".lock", "the run")
    try:
        arguments = jobs_arguments(inputs, "sft", tmp_path / "run")
        job = torchrun(2, ROOT / "scripts" / "train_sft.py", *arguments)
        output = job.communicate(timeout=300)[1]
    finally:
        unlock(tmp_path / "run" / ".lock", held)
    assert job.returncode != 0
    assert f"[rank 0] error: {tmp_path / 'run'}: process {os.getpid()} on " in output
    assert "is writing it" in output
    assert output.count("Traceback") == 1  # torchrun's own
    wait_until(lambda: not processes_of(tmp_path / "run"), 60)
