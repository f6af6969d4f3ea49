"""metrics.jsonl: appended and flushed, cut back to the checkpoint on resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gsm8k_core.errors import DataError
from gsm8k_core.files import read_jsonl
from gsm8k_core.tracking import MetricsLog


def write(path: Path, steps: range, last_step: int = 0) -> None:
    log = MetricsLog(path, last_step)
    for step in steps:
        log.append({"step": step, "loss": step / 2})


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)]


def test_a_row_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metrics.jsonl"
    log = MetricsLog(path, last_step=0)
    log.append({"step": 1, "loss": 0.5, "note": "−"})
    assert read_jsonl(path) == [{"step": 1, "loss": 0.5, "note": "−"}]


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 8), last_step=5)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]


def test_steps_that_are_not_logged_each_time_are_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(2, 12, 4))  # 2, 6, 10
    write(path, range(0), last_step=7)
    assert steps_of(path) == [2, 6]


def test_a_run_that_starts_afresh_has_no_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2), last_step=0)
    assert steps_of(path) == [1]


@pytest.mark.parametrize("num_whole", [0, 3])
def test_a_last_line_torn_by_a_kill_is_dropped(tmp_path: Path, num_whole: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, num_whole + 1))
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 4, "lo')
    write(path, range(num_whole + 1, num_whole + 2), last_step=num_whole)
    assert steps_of(path) == list(range(1, num_whole + 2))


def test_a_torn_row_before_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 2"):
        MetricsLog(path, last_step=3)


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0, "e": None})
    assert read_jsonl(path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.0, "e": None}]
    assert "NaN" not in path.read_text(encoding="utf-8")
