"""Flip a byte of every file of a finished study, and ask `verify` for each."""

from __future__ import annotations

import os
from pathlib import Path

from gsm8k_core.errors import DataError
from gsm8k_core.files import read_json
from gsm8k_core.records import SUMS, Differences, verify_sums

# Snakemake's time stamps, one in each folder that is an output: they are empty.
NOT_COVERED = {".snakemake_timestamp"}


def files_of(study: str) -> list[Path]:
    """Every file below artifacts/, of the working directory, but for those of other studies."""
    return [
        path
        for path in sorted(Path("artifacts").rglob("*"))
        if path.is_file() and path.name not in NOT_COVERED and not _is_of_another(path, study)
    ]


def _is_of_another(path: Path, study: str) -> bool:
    kind, name = path.parts[1:3]
    if kind == "runs":
        return bool(read_json(Path(*path.parts[:3], "run_manifest.json"))["study"] != study)
    return kind in ("experiments", "results") and name != study


def _names(differences: Differences, path: Path) -> bool:
    """Whether `path` is said to have changed, and nothing else but its own other names (links)."""
    others = [*differences.missing, *differences.new]
    same = all(Path(name).samefile(path) for name in differences.changed)
    return str(path) in differences.changed and same and not others


def unnoticed_flips(study: str) -> list[str]:
    """The files of which `verify` does not notice that one byte is another.

    An empty file gets a byte. The record itself may also be an error that names it.
    """
    record = Path("artifacts/results") / study / SUMS
    assert not verify_sums(record)
    unnoticed = []
    for path in files_of(study):
        before, times = path.read_bytes(), path.stat()
        flipped = bytearray(before or b"\0")
        flipped[len(before) // 2] ^= 1
        path.write_bytes(flipped)
        try:
            differences = verify_sums(record)
            noticed = bool(differences) if path == record else _names(differences, path)
        except DataError as error:
            noticed = str(record) in str(error)
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # or Snakemake would redo jobs
        if not noticed:
            unnoticed.append(str(path))
    assert not verify_sums(record)
    return unnoticed
