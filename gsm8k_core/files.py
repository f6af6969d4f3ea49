"""Files that are either whole or absent: atomic writes, JSON and JSONL, digests.

JSONL is split at "\n" alone. `str.splitlines` also splits at U+2028, which one GSM8K train
question holds, and would tear that row in two.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from gsm8k_core.errors import BusyError, DataError, Gsm8kError

Json = dict[str, Any]
Value = TypeVar("Value")
# What is read of a model's folder, at its top: safe weights, settings, tokenizer; nothing pickled.
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model"]
WRITER = ".writer"
"""In the temporary folder of `atomic_path`: names its writer's host; locked while that lives."""

FINISHED = ".finished"
"""Beside the `model/` of a finished run: links to all that it wrote (`TrainingRun.finish`)."""

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds.

    Works for a file or a directory (the block creates either). On any exception the temporary is
    removed and `path` is left as it was. Of several processes that write `path` at once each
    succeeds, and what the last one wrote remains. What a process that was killed has left is
    removed by the next one that writes into the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with _holder_beside(path) as holder:
        temporary = holder / path.name
        yield temporary
        _sync(temporary)
        for attempt in itertools.count():
            if _moved_into_place(temporary, path, holder / f"replaced{attempt}"):
                break


def encodable(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold: halves of surrogate pairs, which JSON can
    escape, and bytes of a file's name.
    """
    return text.encode("utf-8", errors="replace").decode("utf-8")


def remove_folder(path: Path) -> None:
    """Remove a folder at once: of one that is killed meanwhile, nothing stays under the name.

    What does stay goes with `remove_leftovers`. A file that cannot be removed costs disk, not the
    job: on a network file system one that is open somewhere keeps its folder.
    """
    with _holder_beside(path) as holder:
        path.rename(holder / path.name)
        shutil.rmtree(holder / path.name, ignore_errors=True)


def drop_finished(model: Path) -> None:
    """Remove the links that a finished run has left beside its `model`.

    To be called by whoever reads the model: Snakemake has accepted it then, and may drop it later,
    when links would keep it on the disk.
    """
    kept = model.resolve().parent / FINISHED
    with contextlib.suppress(OSError):  # another reader was faster, or the run is somebody else's
        if (kept / "run.json").is_file():
            remove_folder(kept)
        remove_leftovers(kept.parent)  # of a reader that was killed while it did so


def partials(completions: Path) -> list[Path]:
    """Where generate.py keeps finished problems: those of `completions`, and those of others.

    Others are what it was at before with another engine, say, and may go on with.
    """
    ends = (".partial", ".other.partial")
    return [completions.with_name(completions.name + end) for end in ends]


def lock_of(completions: Path) -> Path:
    """Its lock: there while generate.py is at work, and where that was killed."""
    return completions.with_name(f".{completions.name}.lock")


def attempts_of(completions: Path) -> Path:
    """The calls that have worked on the completions."""
    return completions.with_name(f".{completions.name}.attempts")


def drop_partials(completions: Path) -> None:
    """Remove what generate.py has kept for the case that Snakemake rejects `completions`.

    To be called by whoever has read them: Snakemake has accepted them then.
    """
    attempts = attempts_of(completions)
    # Without them the others are not generate.py's; with a lock they are being generated again.
    if attempts.exists() and not lock_of(completions).exists():
        with contextlib.suppress(OSError):  # they may be somebody else's
            for path in [*partials(completions), attempts]:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _holder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, removed in the end; of a killed process by others."""
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        writer = _mark_as_alive(holder)
        try:
            yield holder
        finally:
            os.close(writer)  # first: a network file system keeps an open file in its folder
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _mark_as_alive(holder: Path) -> int:
    """Lock WRITER in `holder` until the returned descriptor is closed, or this process ends."""
    unlocked = holder / f"{WRITER}.new"
    descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    os.write(descriptor, platform.node().encode())
    # On a file system without locks there is no WRITER, and nothing passes for a leftover.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(holder / WRITER)
    return descriptor


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this host that were killed had begun to write (`atomic_path`).

    Some file systems keep such locks to one host (NFS and Lustre, as mounted), where a living
    writer on another one would pass for a dead one.
    """
    for mark in folder.glob(f".*/{WRITER}"):
        with contextlib.suppress(OSError):  # its writer is alive, or has just ended
            descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.read(descriptor, 1000) != platform.node().encode():
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
            shutil.rmtree(mark.parent, ignore_errors=True)


def _moved_into_place(temporary: Path, path: Path, replaced: Path) -> bool:
    """Whether `temporary` is now `path`; not if another process has just put a folder there."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, replaced)  # rename cannot replace a directory that has files
    try:
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if replaced.exists():
            os.rename(replaced, path)
        raise
    return True


def _sync(path: Path) -> None:
    """Flush a file, or every file below a directory, to the disk before it gets its name."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """A hard link costs no disk; not every file system has them. Returns `target`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return str(target)


def model_files(folder: Path) -> list[Path]:
    """The files in a model's folder that MODEL_FILES names, sorted; none without a folder.

    Without the manifest of one that was prepared here: it tells of the folder and is no part.
    """
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name != "manifest.json")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Json]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:
            for row in rows:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataError that names the file if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def read_record(path: Path) -> Json:
    """A JSON object; {} where the file is missing, or holds none that can be read.

    For reports that may leave out what is missing. Where a damaged file would change a result, see
    `read_optional`.
    """
    try:
        record = read_json(path)
    except DataError:
        return {}
    return record if isinstance(record, dict) else {}


def read_optional(path: Path) -> Json:
    """A JSON object; {} where the file is missing. Raises DataError when it is malformed."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {content!r:.80}")
    return content


def packaged_json(name: str) -> Any:
    """The JSON file `name` of gsm8k_core/resources."""
    path = resources.files("gsm8k_core").joinpath("resources", name)
    return json.loads(path.read_text(encoding="utf-8"))


def iter_jsonl(path: Path | str) -> Iterator[Json]:
    """Yield the objects of a JSONL file, one at a time.

    Raises DataError that names file and row (from 1) when the file cannot be read, or a row is not
    UTF-8 or not a JSON object (as the last one of a file that was cut short is not).
    """
    yield from parse_jsonl(read_lines(path), str(path))


def read_lines(path: Path | str) -> Iterator[bytes]:
    """Yield the lines of a file. Raises DataError that names the file when it cannot be read."""
    try:
        handle = Path(path).open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    with handle:
        yield from handle


def parse_jsonl(lines: Iterable[bytes], source: str, first_row: int = 1) -> Iterator[Json]:
    """Yield the objects of the lines of a binary stream; errors as `iter_jsonl`'s.

    `first_row` is the number of the first line in the whole file.
    """
    for row_number, line in enumerate(lines, start=first_row):
        where = f"{source}, row {row_number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, 5,000 "["
            if not line.strip():
                raise DataError(f"{where}: an empty line") from error
            if line.startswith(codecs.BOM_UTF8):
                raise DataError(
                    f"{where}: begins with a byte order mark: save it without"
                ) from error
            cut = "" if line.endswith(b"\n") else " and ends without a newline: cut short?"
            raise DataError(f"{where}: not valid JSON ({error}){cut}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield row


def cut_torn_line(path: Path) -> int:
    """Cut off what stands behind the last newline; returns the number of bytes."""
    with path.open("rb+") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size == 0:
            return 0
        with mmap.mmap(handle.fileno(), size, prot=mmap.PROT_READ) as content:
            whole = content.rfind(b"\n") + 1
        if whole < size:  # else its time would be another one
            handle.truncate(whole)
    return size - whole


def read_jsonl(path: Path | str) -> list[Json]:
    """`iter_jsonl` as a list."""
    return list(iter_jsonl(path))


def required(row: Json, key: str, kind: type[Value], where: str) -> Value:
    """The value of `key` in a row. Raises DataError that says `where` unless it is a `kind`."""
    if key not in row:
        raise DataError(f"{where}: '{key}' is missing")
    value = row[key]
    if not isinstance(value, kind):
        found = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: '{key}': expected {kind.__name__}, found {found}")
    return value


def lock(path: Path, what: str) -> int:
    """Keep other processes from writing `what` until `unlock`, or the end of this one.

    `path` is the lock file; it holds who has it, and stays where the process is killed. Raises
    BusyError that says who, or Gsm8kError on a file system without locks. Returns what `unlock`
    wants.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode("utf-8", errors="replace").strip()
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                raise Gsm8kError(
                    f"{path}: the file system gives no locks ({error.strerror}); mount it with "
                    "them (Lustre: -o flock; NFS: with lockd), or put the clone on another one"
                ) from None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise BusyError(
                f"{what}: {holder or 'another process'} is writing it; wait for it, or stop it"
            ) from None
        # Given back, and so removed, between the two calls: others lock the file that comes next.
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def unlock(path: Path, descriptor: int) -> None:
    """Give back what `lock` took, and remove its file."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone: not on call order, nor on Python's hash seed.

    Used for (run seed, step, draw, sample), so a resumed run samples what it would have sampled.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
