"""A folder in which the repository's workflow runs and writes artifacts/ of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
LINKED = ("Snakefile", "config.yaml", "rules", "scripts", "gsm8k_core", "studies", "profiles")


def make_workspace(folder: Path, study: dict[str, Any] | None = None) -> Path:
    """Link the workflow into `folder`; `study`, if given, stands in study.yaml there."""
    folder.mkdir(exist_ok=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    if study is not None:
        write_overlay(folder, "study.yaml", study)
    return folder


def read_comparison(path: Path) -> pl.DataFrame:
    """A comparison.csv without what varies from run to run: seconds and memory."""
    table = pl.read_csv(path)
    return table.drop([name for name in table.columns if "seconds" in name or "memory" in name])


def write_overlay(workspace: Path, name: str, settings: dict[str, Any]) -> str:
    """Write a file to be laid over config.yaml; returns its name."""
    (workspace / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return name
