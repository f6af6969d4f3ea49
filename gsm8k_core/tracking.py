"""metrics.jsonl: one JSON object a step, appended and flushed, cut back exactly on resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gsm8k_core.files import Json, iter_jsonl, write_jsonl


class MetricsLog:
    """Appends rows to a JSONL file. On resume, rows after the checkpoint are dropped first."""

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        write_jsonl(path, _rows_until(path, last_step))

    def append(self, row: Json) -> None:
        """Write one row. NaN and infinities become null: JSON has no others."""
        with self.path.open("a", encoding="utf-8", newline="\n") as handle:
            handle.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")


def _rows_until(path: Path, last_step: int) -> list[Json]:
    """Rows of steps up to `last_step`; a line torn by a kill can only come after them."""
    rows: list[Json] = []
    if last_step == 0 or not path.exists():
        return rows
    for row in iter_jsonl(path):
        if row["step"] > last_step:
            break
        rows.append(row)
        if row["step"] == last_step:
            break
    return rows


def _finite(row: Json) -> Json:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
