"""Who made a result, with what and where. Never the whole environment, so never a secret."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from gsm8k_core.config import Config
from gsm8k_core.files import sha256_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
TRACKED_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "polars", "snakemake", "peft")
SECRET_OPTION = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
ALLOWED_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "GSM8K_LOG_LEVEL",
    "HF_HUB_OFFLINE",
    "LANG",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "SLURM_JOB_ID",
)


def utc_now() -> str:
    """Now, in UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_command(*command: str, cwd: Path = ROOT) -> str | None:
    """Standard output of a command, stripped; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )
    return result.stdout.strip() if result.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit, and a digest of what differs from it (null commit outside a checkout)."""
    commit = run_command("git", "rev-parse", "HEAD")
    difference = run_command("git", "diff", "HEAD") if commit else None
    return {
        "commit": commit,
        "dirty": bool(run_command("git", "status", "--porcelain")) if commit else False,
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }


@functools.cache
def code_digest() -> str:
    """SHA-256 over the library and the scripts, by name and content."""
    digest = hashlib.sha256()
    for folder in (ROOT / "gsm8k_core", ROOT / "scripts"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    versions = {}
    for name in TRACKED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def host_facts() -> dict[str, Any]:
    """Machine, memory and GPUs, as the operating system and the driver tell them."""
    gpus = run_command(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    return {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus.split("\n") if gpus else [],
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """What stands in every stage's own manifest: code, packages, machine, time."""
    return {
        "written": utc_now(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(),
        "code_digest": code_digest(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "environment": {k: os.environ[k] for k in ALLOWED_ENVIRONMENT if k in os.environ},
    }


def installed_packages() -> list[str]:
    """`name==version` of everything installed, sorted."""
    pairs = {
        f"{distribution.metadata['Name']}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    return sorted(pairs, key=str.lower)


def redacted(command: list[str]) -> list[str]:
    """A command line without the values of options whose names speak of secrets."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and SECRET_OPTION.search(name) is not None
        if secret and equals:
            shown.append(f"{name}=***")
        else:
            shown.append("***" if hide_next else word)
        hide_next = secret and not equals
    return shown


class Invocation:
    """The manifest of one call of snakemake: `<runs>/<UTCSTAMP>_<gitsha>/`.

    `sys/host.json`, `locks/requirements.lock.txt` (what is installed), `locks/uv.lock` and
    `run_manifest.json` (command, commit, settings, start, end, state). The state stays `running`
    where snakemake itself was killed.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.folder: Path | None = None
        self.manifest: dict[str, Any] = {}
        self.started = time.monotonic()

    def start(self, config: Config) -> None:
        """Create the folder and say what begins."""
        git = git_state()
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"{stamp}_{(git['commit'] or 'nogit')[:8]}"
        self.folder = _unused(self.runs_dir / name)
        self.started = time.monotonic()
        self.manifest = {
            "state": "running",
            "study": config.study.name,
            "command": redacted([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": utc_now(),
            "git": git,
            "code_digest": code_digest(),
            "config_sha256": sha256_json(config.model_dump(mode="json", by_alias=True)),
            "config": config.model_dump(mode="json", by_alias=True),
        }
        write_json(self.folder / "sys" / "host.json", host_facts())
        write_text(
            self.folder / "locks" / "requirements.lock.txt", "\n".join(installed_packages()) + "\n"
        )
        if (ROOT / "uv.lock").exists():
            write_text(
                self.folder / "locks" / "uv.lock", (ROOT / "uv.lock").read_text(encoding="utf-8")
            )
        write_json(self.folder / "run_manifest.json", self.manifest)

    def finish(self, state: str) -> None:
        """Say how it ended: `succeeded` or `failed`."""
        if self.folder is None:
            return
        self.manifest |= {
            "state": state,
            "ended": utc_now(),
            "seconds_wall": round(time.monotonic() - self.started, 1),
        }
        write_json(self.folder / "run_manifest.json", self.manifest)


def _unused(path: Path) -> Path:
    """`path`, or with a number behind it: two invocations may begin in the same second."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("itertools.count does not end")
