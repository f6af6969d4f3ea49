"""scripts/with_gpus.py: every job has GPUs of its own, and gives them back however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gsm8k_core import gpus

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "scripts" / "with_gpus.py")
# Says which GPUs it has, and ends when its standard input does.
JOB = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); sys.stdin.read()"

OWN_DEVICES = {"SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID", "GSM8K_SNAKEMAKE"}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(count, CUDA_VISIBLE_DEVICES="4,7", …)`: a job under way, told by pipes."""
    jobs: list[subprocess.Popen[str]] = []

    def run(count: int = 1, **variables: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in OWN_DEVICES}
        environment = {"CUDA_VISIBLE_DEVICES": "4,7", "PYTHONPATH": str(ROOT), **variables}
        with (tmp_path / f"job{len(jobs)}.log").open("w") as log:
            job = subprocess.Popen(
                [sys.executable, SCRIPT, str(count), sys.executable, "-c", JOB],
                env=inherited | environment | {"TMPDIR": str(tmp_path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        jobs.append(job)
        return job

    yield run
    for job in jobs:
        job.kill()
        job.communicate()


def gpus_of(job: subprocess.Popen[str]) -> str:
    """What it has; waits until it has it."""
    assert job.stdout is not None
    return job.stdout.readline().strip()


def log_of_waiting(path: Path) -> str:
    """The log of a job, once it says something."""
    deadline = time.monotonic() + 30
    while not (text := path.read_text("utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return text


def test_jobs_side_by_side_have_different_gpus_and_one_too_many_waits(
    start: Start, tmp_path: Path
) -> None:
    jobs = [start(), start()]
    assert {gpus_of(job) for job in jobs} == {"4", "7"}
    third = start()
    assert "waiting until 1 of the GPUs 4,7 are free" in log_of_waiting(tmp_path / "job2.log")
    jobs[0].communicate("")
    assert gpus_of(third) in ("4", "7")
    assert (tmp_path / "job2.log").read_text("utf-8").count("\n") == 1


def test_the_gpu_of_a_killed_job_is_free_again(start: Start) -> None:
    job = start(CUDA_VISIBLE_DEVICES="GPU-5ebe")
    assert gpus_of(job) == "GPU-5ebe"
    job.kill()
    job.wait()
    assert gpus_of(start(CUDA_VISIBLE_DEVICES="GPU-5ebe")) == "GPU-5ebe"


def test_a_job_that_waits_for_two_holds_none_meanwhile(start: Start, tmp_path: Path) -> None:
    first = start()
    held = gpus_of(first)
    both = start(2)
    assert "waiting until 2 of" in log_of_waiting(tmp_path / "job1.log")
    single = start()
    assert {held, gpus_of(single)} == {"4", "7"}
    first.communicate("")
    single.communicate("")
    assert gpus_of(both) == "4,7"


def test_more_gpus_than_there_are_means_all_of_them(start: Start) -> None:
    assert gpus_of(start(3)) == "4,7"


@pytest.mark.parametrize(
    ("count", "variables"),
    [
        (1, {"SLURM_JOB_ID": "12"}),
        (1, {"LSB_JOBID": "12"}),
        (1, {"PBS_JOBID": "12"}),
        (1, {"JOB_ID": "12", "SGE_TASK_ID": "undefined"}),
        (0, {}),
    ],
)
def test_a_schedulers_job_and_one_without_a_gpu_keep_their_environment(
    start: Start, tmp_path: Path, count: int, variables: dict[str, str]
) -> None:
    assert gpus_of(start(count, **variables)) == "4,7"
    assert not list(tmp_path.glob("gsm8k-gpus-*"))


def test_a_job_id_that_is_no_schedulers_changes_nothing(start: Start) -> None:
    assert gpus_of(start(1, JOB_ID="12")) == "4"


def test_where_no_gpu_may_be_seen_none_is_waited_for(start: Start) -> None:
    assert gpus_of(start(CUDA_VISIBLE_DEVICES="")) == ""


@pytest.mark.slow
def test_what_a_command_gives_is_what_comes_back(tmp_path: Path) -> None:
    for words, code in (
        (["1", sys.executable, "-c", "raise SystemExit(7)"], 7),
        (["1", "no-such-command"], 1),
        (["1", sys.executable, "--version"], 0),
        (["1"], 2),
        (["python"], 2),
        (["--help"], 0),
    ):
        result = subprocess.run(
            [sys.executable, SCRIPT, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("named", "devices"),
    [
        ("4,7", ["4", "7"]),
        (" 1, 0 ,1", ["1", "0"]),
        ("0,-1,2", ["0"]),
        ("NoDevFiles", []),
        ("-1", []),
        ("", []),
    ],
)
def test_the_pool_is_what_cuda_would_see(
    monkeypatch: pytest.MonkeyPatch, named: str, devices: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.visible_gpus() == devices


def test_without_the_variable_the_machine_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert gpus.gpus_of_machine(tmp_path) == 0
    listed = tmp_path / "proc" / "driver" / "nvidia" / "gpus"
    for name in ("0000:07:00.0", "0000:0f:00.0", "0000:47:00.0"):
        (listed / name).mkdir(parents=True)
    assert gpus.gpus_of_machine(tmp_path) == 3
    (tmp_path / "dev").mkdir()
    for name in ("nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert gpus.gpus_of_machine(tmp_path) == 2  # a container sees those alone, numbered from 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "gpus_of_machine", lambda: 2)
    assert gpus.visible_gpus() == ["0", "1"]


def test_it_starts_without_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code, SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
