"""Snakemake, forked from a process that has loaded it: loading is two thirds of a dry run.

A fork has what `python -m snakemake` has: arguments, folder, environment, `sys.path`, exit status.
Only the seed of its hashes is that of the first process. That knows no code of this repository,
which each fork loads from its own folder, and nothing that has threads.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # while modules are loaded
    import smart_open  # noqa: F401
    import snakemake.cli
    import snakemake.report  # noqa: F401


@cache
def _server() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)  # closes its stdin, which ends it
    return process


def run_snakemake(
    workspace: Path, *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m snakemake` in `workspace`; `stdout` of what it returns has stderr in it.

    `environment` is all that it sees; by default what this process has.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        call = [words, str(workspace), dict(environment or os.environ), output.name]
        try:
            server.stdin.write(json.dumps(call) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
        except BaseException:  # a later call would take this one's answer for its own
            server.kill()
            server.communicate()
            _server.cache_clear()
            raise
        return subprocess.CompletedProcess(["snakemake", *words], code, output.read())


def _become(words: list[str], workspace: str, environment: dict[str, str], output: str) -> None:
    os.chdir(workspace)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(Path(snakemake.__file__).with_name("__main__.py")), *words]
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [workspace, *filter(None, folders)]
    for path, mode, numbers in ((os.devnull, os.O_RDONLY, [0]), (output, os.O_WRONLY, [1, 2])):
        file = os.open(path, mode)
        for number in numbers:
            os.dup2(file, number)
        os.close(file)


def _serve() -> None:
    gc.freeze()  # no collection of a fork looks through what is loaded
    gc.enable()
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
            snakemake.cli.main()  # raises SystemExit
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
