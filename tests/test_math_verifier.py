"""math-verify in a process that can be killed: with the real package, on completions that really
hang it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from gsm8k_core.errors import ConfigError
from gsm8k_core.math_verifier import MathVerifier

ROOT = Path(__file__).resolve().parent.parent
HANGS = "So it is $9^{9^{9^{9}}}$."
HANGS_IN_C = "\\boxed{100000000!}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with closing(MathVerifier(seconds=20.0)) as one:  # a busy machine is no reason to fail
        yield one


@pytest.mark.parametrize(
    ("text", "gold", "right", "extracted"),
    [
        ("#### 18", "18", True, "18"),
        ("It costs $18.00.", "18", True, "18"),
        ("so 36/2", "18", True, "18"),
        ("\\boxed{\\frac{1}{2}}", "1/2", True, "1/2"),
        ("It is 0.5", "1/2", True, "1/2"),
        ("-5", "-5", True, "-5"),
        ("\\boxed{1{,}000}", "1000", True, "1000"),
        ("#### 19", "18", False, "19"),
        # Equal votes have one text: that of the gold answer, and of numbers where they are wrong.
        ("\\boxed{18\\%}", "18", True, "18"),
        ("\\boxed{x=18}", "18", True, "18"),
        ("\\boxed{0.50}", "1/2", True, "1/2"),
        ("\\boxed{19.0}", "18", False, "19"),
        ("\\boxed{38/2}", "18", False, "19"),
        ("\\boxed{x=19}", "18", False, "19"),
        ("\\boxed{x=38/2}", "18", False, "19"),
        ("\\boxed{x>19}", "18", False, "x > 19"),
        ("no number", "18", False, None),
        ("", "18", False, None),
        (None, "18", False, None),
        ("\ud800 \0 18", "18", True, "18"),
    ],
)
def test_grades_are_those_of_the_package(
    verifier: MathVerifier, text: str | None, gold: str, right: bool, extracted: str | None
) -> None:
    assert verifier.grade(text, gold) == (right, extracted)


@pytest.mark.slow
@pytest.mark.parametrize("text", [HANGS, HANGS_IN_C])
def test_a_completion_that_hangs_is_wrong_counted_and_does_not_hurt_the_next(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(MathVerifier(seconds=1.0)) as one:
        started = time.monotonic()
        assert one.grade(text, "18") == (False, None)
        assert time.monotonic() - started < 150.0
        assert one.num_killed == 1
        assert "gave no answer (limit 1 s)" in caplog.text
        one.seconds = 20.0
        assert one.grade("#### 18", "18") == (True, "18")
        assert one.num_killed == 1


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "9" * 100_000,
        "#### " * 10_000,
        "\\boxed" + "{" * 5_000,
        "\0" * 1000,
        "1," * 20_000,
    ],
    ids=["nines", "markers", "braces", "nul", "list"],
)
def test_hostile_text_gets_an_answer(verifier: MathVerifier, text: str) -> None:
    right, _ = verifier.grade(text, "18")
    assert not right


def test_one_child_serves_many_completions(verifier: MathVerifier) -> None:
    verifier.grade("1", "1")
    child = verifier._process.pid
    for n in range(50):
        assert verifier.grade(f"so {n} eggs, #### {n}", str(n)) == (True, str(n))
    assert verifier._process.pid == child


def test_it_works_from_a_thread_where_the_packages_own_limit_does_not(
    verifier: MathVerifier,
) -> None:
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(verifier.grade("#### 18", "18")))
    thread.start()
    thread.join(60)
    assert verdicts == [(True, "18")]


def test_a_child_that_dies_is_replaced(verifier: MathVerifier) -> None:
    verifier.grade("1", "1")
    os.kill(verifier._process.pid, signal.SIGKILL)
    before = verifier.num_killed
    assert verifier.grade("#### 18", "18") == (False, None)
    assert verifier.num_killed == before + 1
    assert verifier.grade("#### 18", "18") == (True, "18")


def test_closing_ends_the_child() -> None:
    one = MathVerifier()
    one.grade("1", "1")
    child = psutil.Process(one._process.pid)
    one.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not [p for p in multiprocessing.active_children() if p.pid == child.pid]


@pytest.mark.slow
def test_a_child_at_work_outlives_a_killed_parent_by_seconds_only() -> None:
    code = (
        "import sys\n"
        "from gsm8k_core.math_verifier import MathVerifier\n"
        "one = MathVerifier(seconds=5)\n"
        "one.grade('1', '1')\n"
        "sys.stdout.write(f'{one._process.pid}\\n')\n"
        "sys.stdout.flush()\n"
        f"one.grade({HANGS!r}, '1')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60.0
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child computes on with nobody to end it"
        time.sleep(0.1)


def test_a_package_that_cannot_be_imported_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr4')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)  # multiprocessing hands sys.path on
    with (
        caplog.at_level(logging.WARNING),
        closing(MathVerifier()) as one,
        pytest.raises(
            ConfigError, match=r"no antlr4\); run `uv sync --inexact --extra math-verify"
        ),
    ):
        one.grade("1", "1")


def test_looking_for_the_package_does_not_import_it() -> None:
    code = (
        "import sys; from gsm8k_core import extras; assert extras.is_installed('math_verify');"
        "assert not {'math_verify', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path: Path) -> None:
    script = tmp_path / "grade.py"
    script.write_text(
        "from gsm8k_core.math_verifier import MathVerifier\nMathVerifier().grade('1', '1')\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "guard what it does by if __name__ == '__main__'" in found.stderr
