"""The grade of the package math-verify, taken in a process that can be killed.

math-verify builds and simplifies sympy expressions, so a completion can make it compute for hours
(`$9^{9^{9^{9}}}$`). Its own time limit is a signal, which works in a main thread alone and waits
for arithmetic in C to end. Here one long-lived child process does the work; where an answer does
not come in time it is killed, and another one is started. A completion that was not graded in time
is wrong, and counted.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from gsm8k_core.errors import ConfigError
from gsm8k_core.extras import HOW_TO_INSTALL
from gsm8k_core.files import encodable

log = logging.getLogger(__name__)

SECONDS_PER_COMPLETION = 5.0
"""math-verify's own limit; what is not hostile takes milliseconds."""
SECONDS_TO_START = 120.0
"""Importing sympy takes a second; a busy machine more."""
MAX_MEMORY_BYTES = 4 * 2**30
"""Address space of the child."""
MAX_SHOWN = 200
"""Characters of an extracted answer that are kept."""

Verdict = tuple[bool, str | None]
"""Whether it is right, and the answer that was found: where it is right, the gold answer's text."""


class MathVerifier:
    """Grades completions one by one; `close` ends the child process.

    A script that uses it must guard what it does by `if __name__ == "__main__"`, since the child
    imports it (multiprocessing's `spawn`). `num_killed` counts the completions that took longer
    than `seconds` or brought the child down.
    """

    def __init__(self, seconds: float = SECONDS_PER_COMPLETION) -> None:
        self.seconds = seconds
        self.num_killed = 0
        self._process: Any = None
        self._connection: Connection | None = None

    def grade(self, text: str | None, gold: str) -> Verdict:
        """Grade one completion against a number such as `18`, `-5` or `1/2`.

        Raises ConfigError when the child cannot start.
        """
        if text is None:
            return False, None
        if self._connection is None:
            self._connection = self._start()
        try:
            self._connection.send((text, gold))
            if self._connection.poll(self.seconds):
                verdict: Verdict = self._connection.recv()
                return verdict
        except (EOFError, OSError):  # it died: of memory, or of too deep a recursion in C
            pass
        self.close()
        self.num_killed += 1
        log.warning("math-verify gave no answer (limit %g s) to %.60r", self.seconds, text)
        return False, None

    def _start(self) -> Connection:
        # Not forked: polars' threads may hold locks that the child would wait for.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self.seconds), name="math-verify", daemon=True
        )
        self._process.start()
        theirs.close()
        remedy = HOW_TO_INSTALL["math_verify"]
        try:
            fault = ours.recv() if ours.poll(SECONDS_TO_START) else "it did not start in time"
        except (EOFError, OSError):
            fault = "its process ended at once, for a reason above this line"
            remedy = "in a script of your own, guard what it does by if __name__ == '__main__'"
        if fault is not None:
            ours.close()
            self.close()
            raise ConfigError(f"math-verify cannot be used ({fault}); {remedy}")
        return ours

    def close(self) -> None:
        """End the child process; the next completion starts another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None


# ------------------------------------------------------------------------------------ in the child


def _serve(connection: Connection, seconds: float) -> None:
    """Say None (or what is wrong), then answer each (text, gold) until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory()
    logging.disable(logging.CRITICAL)
    try:
        _verify("#### 1", "1")  # imports the package and builds its tables
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            text, gold = connection.recv()
        except EOFError:
            return
        # Should the parent die meanwhile, nobody would end this process: the system does.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        verdict = _verify(text, gold)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


def _limit_memory() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY_BYTES)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError):  # macOS has no such limit
        pass


def _verify(text: str, gold: str) -> Verdict:
    from math_verify import parse, verify

    # No time limits of the package's own: it would take them from SIGALRM.
    found = parse(text, parsing_timeout=None)
    if verify(_parse_gold(gold), found, timeout_seconds=None):
        return True, gold  # 18, 18\% and x = 18 are one answer, as a vote needs it
    return False, _shown(found[0]) if found else None


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> Any:
    from math_verify import parse

    return parse(gold, parsing_timeout=None)


def _shown(value: Any) -> str:
    """One text for equal numbers: 18, 18.0, 36/2 and x = 18 are `18`, as a vote needs it."""
    import sympy

    if isinstance(value, str):
        return encodable(value[:MAX_SHOWN])
    done = (value.rhs if isinstance(value, sympy.Eq) else value).doit()
    if isinstance(done, sympy.Float):
        done = sympy.Rational(str(done))
    return str(done)[:MAX_SHOWN]
