"""Two processes never write the same run: the second stops with one line."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gsm8k_core.errors import BusyError, Gsm8kError
from gsm8k_core.files import lock, read_jsonl, unlock

ROOT = Path(__file__).resolve().parent.parent
HOLD = (
    "import sys, time; from pathlib import Path; from gsm8k_core.files import lock\n"
    "lock(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(30)\n"
)


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that has taken the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with hold(path) as holder:
        with pytest.raises(BusyError, match=f"the run: process {holder.pid} on .* is writing it"):
            lock(path, "the run")
        holder.kill()
    os.close(lock(path, "the run"))


def test_a_lock_ends_with_its_process_even_by_a_kill(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock") as holder:
        holder.send_signal(signal.SIGKILL)
    os.close(lock(tmp_path / ".lock", "the run"))


def test_a_lock_that_was_given_back_is_free_and_leaves_no_file(tmp_path: Path) -> None:
    unlock(tmp_path / ".lock", lock(tmp_path / ".lock", "the run"))
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / ".lock") as holder:
        holder.kill()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def lockf(_descriptor: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(Gsm8kError) as caught:
        lock(tmp_path / ".lock", "the run")
    assert str(caught.value).startswith(f"{tmp_path / '.lock'}: the file system gives no locks (")
    assert "-o flock" in str(caught.value)


def as_the_holder_gives_it_back(
    monkeypatch: pytest.MonkeyPatch, path: Path, then: Callable[[], None] = lambda: None
) -> None:
    """`path` is removed after `lock` has opened it and before it locks it; and then `then`."""
    really = fcntl.lockf

    def lockf(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "lockf", really)
        path.unlink()
        then()
        really(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    as_the_holder_gives_it_back(monkeypatch, path)
    descriptor = lock(path, "the run")
    assert path.stat().st_ino == os.fstat(descriptor).st_ino
    unlock(path, descriptor)


def test_a_file_that_was_removed_and_a_newcomers_file_are_not_two_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    newcomers: list[subprocess.Popen[str]] = []
    as_the_holder_gives_it_back(monkeypatch, path, lambda: newcomers.append(hold(path)))
    with pytest.raises(BusyError, match="the run: process [0-9]+ on .* is writing it"):
        lock(path, "the run")
    (newcomer,) = newcomers
    with newcomer:
        newcomer.kill()


@pytest.mark.slow
def test_a_trainer_beside_another_one_of_the_same_run_stops_and_leaves_it_alone(
    tmp_path: Path,
    tiny_folder: Path,
    arithmetic_folder: Path,
    run_json: Callable[..., str],
    script: Callable[[str], ModuleType],
) -> None:
    output = tmp_path / "run"
    words = [
        "--settings", run_json("sft", num_steps=400, batch_size=4, checkpoint_every_steps=400),
        "--starting-model", str(tiny_folder), "--data", str(arithmetic_folder / "train.jsonl"),
        "--output-dir", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/train_sft.py", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not (output / "state" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(BusyError) as caught:
            script("train_sft").main(words)
        first.send_signal(signal.SIGCONT)
        assert str(caught.value).startswith(f"{output}: process {first.pid} on ")
        assert first.wait(timeout=300) == 0
    rows = read_jsonl(output / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 401))
