"""`--sdm apptainer`: jobs run in the image that `$GSM8K_IMAGE` names, with its Python.

Where there is no Apptainer, a stand-in says what Snakemake asks it for. Where there is one, it runs
a small study in a folder that serves as an image: this machine's files, and a Python of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_snakemake import run_snakemake
from workspace import ROOT, make_workspace, read_comparison

from gsm8k_core.files import read_json
from gsm8k_core.manifest import git_state

# Says its version, notes what it is asked for, and runs that as in the image: with the image's own
# variables and its own `python`, and without what git needs.
STAND_IN = """#!/bin/bash
[ "$1" = --version ] && { echo "apptainer version 1.3.4"; exit; }
printf '%s\\n' "$@" > asked.txt
export GSM8K_CONTAINER=1 GSM8K_COMMIT=0123456789abcdef PATH="$IMAGE_BIN:/usr/bin:/bin"
export GIT_DIR=/nonexistent
exec "${@: -3}"
"""
PYTHON_OF_IMAGE = f'#!/bin/bash\ntouch used\nexec {sys.executable} "$@"\n'
# As Apptainer writes the variables of a Dockerfile.
VARIABLES_OF_IMAGE = "export GSM8K_CONTAINER=1\nexport PATH=/opt/venv/bin:/usr/bin:/bin\n"
STUDY: dict[str, Any] = {
    "study": {"name": "contained", "methods": ["base", "sft"]},
    "datasets": {"arithmetic_debug": {"num_train": 200, "num_val": 10, "num_test": 20}},
    "methods": {"sft": {"num_steps": 20}},
    "suites": {"debug": {"limit": 5, "max_new_tokens": 8}},
}

pytestmark = pytest.mark.slow


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def snakemake(workspace: Path, *words: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(workspace), **environment}
    done = run_snakemake(workspace, *words, "--cores", "1", environment=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_job_runs_in_the_named_image_with_the_python_of_the_image(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    image, in_image = tmp_path / "gsm8k.sif", tmp_path / "image"
    image.touch()
    write_program(tmp_path / "host" / "apptainer", STAND_IN)
    write_program(in_image / "python", PYTHON_OF_IMAGE)
    snakemake(
        workspace, "artifacts/arithmetic/test.jsonl",
        "--sdm", "apptainer", "--apptainer-args", "--nv --bind /scratch",
        GSM8K_IMAGE=str(image), IMAGE_BIN=str(in_image),
        PATH=f"{tmp_path / 'host'}:{os.environ['PATH']}",
    )  # fmt: skip
    asked = (workspace / "asked.txt").read_text(encoding="utf-8").split("\n")
    assert asked[0] == "exec"
    assert asked[asked.index("--home") + 1] == str(workspace)
    assert "--nv" in asked and asked[asked.index("/scratch") - 1] == "--bind"
    assert asked[asked.index(str(image)) + 1 :][:2] == ["bash", "-c"]
    assert (workspace / "artifacts/arithmetic/test.jsonl").exists()
    assert (workspace / "used").exists()  # not the host's environment
    # The code is the clone's, so its commit is not the image's.
    manifest = read_json(workspace / "artifacts/arithmetic/manifest.json")
    assert manifest["provenance"]["environment"]["GSM8K_COMMIT"] == "0123456789abcdef"
    assert manifest["provenance"]["git"]["commit"] == git_state()["commit"]


def test_without_an_image_nothing_is_pulled_and_the_variable_is_named(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    write_program(tmp_path / "host" / "apptainer", STAND_IN)
    environment = {**os.environ, "PATH": f"{tmp_path / 'host'}:{os.environ['PATH']}"}
    environment.pop("GSM8K_IMAGE", None)
    done = run_snakemake(
        workspace, "artifacts/arithmetic/test.jsonl", "--cores", "1", "--sdm", "apptainer",
        environment=environment,
    )  # fmt: skip
    assert done.returncode != 0
    assert "name yours in GSM8K_IMAGE" in done.stdout, done.stdout
    assert not (workspace / "asked.txt").exists()


def make_image(folder: Path) -> tuple[Path, list[str]]:
    """A folder as an image, and what to bind to have this machine's programs in it."""
    for name in ("dev", "etc", "proc", "sys", "tmp", "usr", "var/tmp"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / name).symlink_to(f"usr/{name}")
    write_program(folder / ".singularity.d/env/10-docker2singularity.sh", VARIABLES_OF_IMAGE)
    write_program(folder / "opt/venv/bin/python", PYTHON_OF_IMAGE)
    python = Path(sys.executable).resolve().parent.parent
    bound = {"/usr", str(ROOT), str(Path(sys.prefix).resolve()), str(python)}
    return folder, sorted(bound)


@pytest.mark.skipif(shutil.which("apptainer") is None, reason="no Apptainer")
def test_a_study_in_a_container_has_the_results_of_one_without(tmp_path: Path) -> None:
    image, bound = make_image(tmp_path / "image")
    contained = make_workspace(tmp_path / "contained", STUDY)
    elsewhere = make_workspace(tmp_path / "elsewhere", STUDY)
    target = "artifacts/results/contained/comparison.csv"
    words = [target, "--configfile", "studies/debug.yaml", "study.yaml"]
    snakemake(
        contained, *words, "--sdm", "apptainer",
        f"--apptainer-args=--userns --nv --bind {','.join(bound)}", GSM8K_IMAGE=str(image),
    )  # fmt: skip
    snakemake(elsewhere, *words)

    tables = [read_comparison(workspace / target) for workspace in (contained, elsewhere)]
    assert tables[0].equals(tables[1])
    assert tables[0]["method"].to_list() == ["base", "sft"]
    # Every job: the image's Python, not the host's.
    written = list(contained.glob("artifacts/experiments/**/*.json"))
    provenances = [
        facts["provenance"] for path in written if "provenance" in (facts := read_json(path))
    ]
    assert len(provenances) >= 5
    assert {facts["environment"].get("GSM8K_CONTAINER") for facts in provenances} == {"1"}
    assert (contained / "used").exists()
