"""`--sdm apptainer`: what Snakemake asks Apptainer for. Apptainer itself is a stand-in here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import make_workspace

# Says its version, notes what it is asked for, and runs that as in the image: with the image's own
# variables and its own `python`.
STAND_IN = """#!/bin/bash
[ "$1" = --version ] && { echo "apptainer version 1.3.4"; exit; }
printf '%s\\n' "$@" > asked.txt
export GSM8K_CONTAINER=1 PATH="$IMAGE_BIN:/usr/bin:/bin"
exec "${@: -3}"
"""

pytestmark = pytest.mark.slow


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def test_a_job_runs_in_the_named_image_with_the_python_of_the_image(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    image, in_image = tmp_path / "gsm8k.sif", tmp_path / "image"
    image.touch()
    write_program(tmp_path / "host" / "apptainer", STAND_IN)
    write_program(in_image / "python", f'#!/bin/bash\ntouch used\nexec {sys.executable} "$@"\n')
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "artifacts/arithmetic/test.jsonl", "--cores", "1",
         "--sdm", "apptainer", "--apptainer-args", "--nv --bind /scratch"],
        cwd=workspace,
        env={**os.environ, "GSM8K_IMAGE": str(image), "IMAGE_BIN": str(in_image),
             "PATH": f"{tmp_path / 'host'}:{os.environ['PATH']}", "PYTHONPATH": str(workspace)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    asked = (workspace / "asked.txt").read_text(encoding="utf-8").split("\n")
    assert asked[0] == "exec"
    assert asked[asked.index("--home") + 1] == str(workspace)
    assert "--nv" in asked and asked[asked.index("/scratch") - 1] == "--bind"
    assert asked[asked.index(str(image)) + 1 :][:2] == ["bash", "-c"]
    assert (workspace / "artifacts/arithmetic/test.jsonl").exists()
    assert (workspace / "used").exists()  # not the host's environment
