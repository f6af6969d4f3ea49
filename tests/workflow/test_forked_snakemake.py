"""The Snakemake that tests fork is the one that users start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_snakemake import run_snakemake
from workspace import make_workspace, write_overlay

SEES = """
import os, sys

print(sys.path, sys.argv, os.getcwd(), dict(os.environ), sys.stdin.read())
print("gsm8k_core" in sys.modules, "polars" in sys.modules, file=sys.stderr)


rule all:
"""
# What differs between two calls, and the folder that a process began in.
OWN = re.compile(r"(?:Date|Workflow ID|Run directory): .*|\[.* \d{4}\]")


@pytest.mark.slow
def test_a_fork_says_and_returns_what_a_process_of_its_own_does(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    environment = {**os.environ, "HF_TOKEN": "a-secret-0123456789"}
    secret = {"gsm8k": {"path": environment["HF_TOKEN"]}}
    bad = write_overlay(workspace, "bad.yaml", {"datasets": secret})
    (workspace / "sees.smk").write_text(SEES, encoding="utf-8")
    target = "artifacts/arithmetic/test.jsonl"
    for words, code in (
        (["-n", "--cores", "1", "--configfile", bad], 1),
        (["-n", "--cores", "1", "no/file"], 1),
        (["-n", "--cores", "1", target, "--quiet"], 0),
        (["-n", "--cores", "1", "--snakefile", "sees.smk"], 0),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "snakemake", *words], cwd=workspace, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        fork = run_snakemake(workspace, *words, environment=environment)
        assert fork.returncode == process.returncode == code
        assert OWN.sub("", fork.stdout) == OWN.sub("", process.stdout)
