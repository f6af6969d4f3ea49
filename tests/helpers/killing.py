"""Studies that are killed at random moments or stopped, and what they leave.

That is held against one that nobody disturbs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import polars as pl
import psutil

from gsm8k_core.files import Json, read_json, read_jsonl

Until = Callable[[], bool]

NUM_KILLS = 3
# Not `**`, which fails on a temporary folder that goes while it looks.
BENCHMARKS = (
    "benchmarks/*/*.tsv",
    "experiments/*/*/*/*/benchmarks/*.tsv",
    "experiments/*/*/*/*/round*/benchmarks/*.tsv",
    "results/*/benchmarks/*.tsv",
)
WEIGHTS = ("*/*/*/*/model/model.safetensors", "*/*/*/*/round*/model/model.safetensors")


def num_finished(workspace: Path) -> int:
    """Jobs that have ended well: Snakemake then writes their benchmark."""
    artifacts = workspace / "artifacts"
    return sum(len(list(artifacts.glob(pattern))) for pattern in BENCHMARKS)


def trained_weights(workspace: Path) -> dict[str, Path]:
    """The files of trained weights that are there, by their path below experiments/."""
    folder = workspace / "artifacts" / "experiments"
    found = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): path for path in found}


def link_weights(workspace: Path, links: Path) -> None:
    """Give trained weights another name, `links`/path/inode: it stays when they are dropped."""
    for name, path in trained_weights(workspace).items():
        (links / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.link(path, links / name / str(path.stat().st_ino))


def moments_of_kills(num_jobs: int, seed: int) -> list[tuple[int, float]]:
    """After so many jobs have ended, so many seconds: one moment in each part of the study."""
    draw = random.Random(seed)
    ends = [round(number * (num_jobs - 2) / NUM_KILLS) for number in range(NUM_KILLS + 1)]
    return [(draw.randrange(*part), draw.uniform(0.0, 3.0)) for part in pairwise(ends)]


def watch(process: subprocess.Popen[str], workspace: Path, links: Path, until: Until) -> None:
    """Until `until()`, or the end of `process`: link the weights of `workspace` into `links`."""
    deadline = time.monotonic() + 600
    while not until() and process.poll() is None:
        assert time.monotonic() < deadline
        link_weights(workspace, links)
        time.sleep(0.02)


def kill_at(
    moment: tuple[int, float], call: int, num_jobs: int,
    process: subprocess.Popen[str], workspace: Path, links: Path,
) -> None:  # fmt: skip
    """Kill the `call`th call of a study of `num_jobs` at the moment, and wait for its jobs."""
    count, seconds = moment
    manifests = workspace / "artifacts" / "runs"

    def enough_have_ended_and_those_of_this_call_begun() -> bool:
        num_begun = len(list(manifests.glob("*/run_manifest.json")))
        return num_begun == call and num_finished(workspace) >= count

    with process:
        watch(process, workspace, links, enough_have_ended_and_those_of_this_call_begun)
        end = time.monotonic() + seconds
        watch(
            process, workspace, links,
            lambda: time.monotonic() >= end or num_finished(workspace) >= num_jobs - 2,
        )  # fmt: skip
        assert process.poll() is None, "the study has ended before it was killed"
        process.kill()
    deadline = time.monotonic() + 120  # two seconds; more while torch is being loaded
    while orphans := processes_in(workspace):
        assert time.monotonic() < deadline, orphans
        time.sleep(0.1)


def stopped(
    workspace: Path,
    first_sign: str,
    words: list[str],
    stop: Callable[[subprocess.Popen[bytes]], None],
) -> None:
    """Call snakemake, and `stop` it once the workspace has files `first_sign`; wait for its end."""
    output = workspace.with_name("output.txt")
    with (
        output.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-m", "snakemake", *words],
            cwd=workspace, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            # A shell has what it starts with `&` ignore the signal, tests too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while not list(workspace.glob(first_sign)):
                assert process.poll() is None and time.monotonic() < deadline, output.read_text()
                time.sleep(0.02)
            stop(process)
            process.wait(timeout=120)
            assert processes_in(workspace) == []
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, output.read_text()


def states_of_calls(workspace: Path) -> list[str]:
    """How the calls of snakemake ended, by their manifests, in their order."""
    manifests = sorted((workspace / "artifacts" / "runs").glob("*/run_manifest.json"))
    return [read_json(path)["state"] for path in manifests]


def processes_in(workspace: Path) -> list[psutil.Process]:
    """Jobs and shells that run in `workspace`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and Path(process.cwd()) == workspace:
                found.append(process)
    return found


def outputs(workspace: Path) -> set[Path]:
    """Files under the names that jobs declare; not logs, and not what a job keeps for going on."""
    aside = {"state", "logs", "benchmarks", "runs"}
    paths = (path for path in (workspace / "artifacts").rglob("*") if path.is_file())
    names = {path.relative_to(workspace) for path in paths if path.suffix != ".partial"}
    return {
        name
        for name in names
        if not any(part in aside or part.startswith(".") for part in name.parts)
    }


def _without_costs(rows: list[Json]) -> list[Json]:
    """Rows of a log without time and memory."""
    costs = ("second", "memory")
    return [
        {key: value for key, value in row.items() if not any(cost in key for cost in costs)}
        for row in rows
    ]


def assert_whole(path: Path, same: Path) -> None:
    """That nothing is missing of a file; `same` is that of the undisturbed study."""
    if path.suffix == ".safetensors":
        assert path.read_bytes() == same.read_bytes(), path
        beside = [{one.name for one in file.parent.glob("[!.]*")} for file in (path, same)]
        assert beside[0] == beside[1], path
    elif path.suffix == ".json":
        read_json(path)
    elif path.name == "metrics.jsonl":
        assert _without_costs(read_jsonl(path)) == _without_costs(read_jsonl(same)), path
    elif path.suffix == ".jsonl":
        assert path.read_bytes() == same.read_bytes(), path
    elif path.suffix == ".parquet" and path.parent.name == "grades":
        assert pl.read_parquet(path).equals(pl.read_parquet(same)), path
