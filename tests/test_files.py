"""Files that are whole or absent, JSONL that is split at newlines alone, seeds that never move."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.cli import run_script
from gsm8k_core.errors import DataError
from gsm8k_core.files import (
    atomic_path,
    iter_jsonl,
    read_json,
    read_jsonl,
    read_optional,
    read_record,
    remove_folder,
    remove_leftovers,
    required,
    seed_from,
    sha256_file,
    sha256_json,
    write_json,
    write_jsonl,
    write_text,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(autouse=True)
def hooks_as_they_were() -> Iterator[None]:
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)


# atomic writes


def test_a_file_appears_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "hello\n")
    assert path.read_bytes() == b"hello\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        raise RuntimeError("halfway")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_fail_halfway_leave_nothing_behind(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "rows.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_not_touched_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"


def test_a_directory_replaces_a_directory_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "stale").touch()
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "fresh").touch()
    assert [file.name for file in path.iterdir()] == ["fresh"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_fails_and_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("dear", encoding="utf-8")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert (path / "weights").read_text(encoding="utf-8") == "dear"
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").touch()

    def fail(*_paths: object) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"), atomic_path(path) as temporary:
        temporary.mkdir()
    assert [file.name for file in path.iterdir()] == ["weights"]


def test_a_full_disk_is_one_line_exit_code_1_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    write_text(path, "old\n")

    def full(*_args: object, **_kwargs: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dumps", full)  # inside the open file's block, as a write would fail
    assert run_script(lambda: write_jsonl(path, [{"a": 1}])) == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert path.read_text(encoding="utf-8") == "old\n"
    assert list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from gsm8k_core.cli import run_script
from gsm8k_core.files import write_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(run_script(lambda: write_jsonl(Path(sys.argv[1]), ({"row": i} for i in range(10_000)))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as Linux has it")
def test_a_write_that_the_system_refuses_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "error: File too large\n")
    assert list(tmp_path.iterdir()) == []


# JSON and JSONL


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), max_size=4))
def test_jsonl_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_a_row_with_another_line_separator_stays_one_row(tmp_path: Path, separator: str) -> None:
    # Written raw, as GSM8K's own file has it: json.dumps with ensure_ascii=False escapes none.
    path = tmp_path / "rows.jsonl"
    text = json.dumps({"question": f"one{separator}two"}, ensure_ascii=False)
    path.write_text(text + "\n" + '{"question": "next"}\n', encoding="utf-8", newline="\n")
    assert [row["question"] for row in iter_jsonl(path)] == [f"one{separator}two", "next"]


@pytest.mark.parametrize(
    ("second_row", "message"),
    [
        (b'{"a": 1', "row 2: not valid JSON .* ends without a newline: cut short"),
        (b"[1, 2]\n", "row 2: expected a JSON object, found list"),
        (b"3\n", "row 2: expected a JSON object, found int"),
        (b"\n", "row 2: an empty line"),
        (b"\xef\xbb\xbf{}\n", "row 2: begins with a byte order mark"),
        (b'{"a": "\xff"}\n', "row 2: not valid JSON .*utf-8"),
        (b"[" * 100_000 + b"\n", "row 2: not valid JSON .*recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "row 2: not valid JSON .*4300 digits"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(
    tmp_path: Path, second_row: bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + second_row)
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, ")


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\nnot JSON\n')
    assert next(iter_jsonl(path)) == {"a": 1}  # the fault behind it is not reached


def test_a_last_row_without_a_newline_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match="no such file"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(path)
    for content in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not valid JSON") as caught:
            read_json(path)
        assert str(caught.value).startswith(str(path))


def test_a_record_is_read_where_there_is_one_and_what_is_optional_is_read_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.json"
    assert read_record(path) == read_optional(path) == {}
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_record(path) == read_optional(path) == {"a": 1}
    path.write_text("[1]", encoding="utf-8")
    assert read_record(path) == {}
    with pytest.raises(DataError, match=r"x.json: expected a JSON object, found \[1\]"):
        read_optional(path)
    path.write_text('{"a":', encoding="utf-8")
    assert read_record(path) == {}
    with pytest.raises(DataError, match="not valid JSON"):
        read_optional(path)


def test_rows_that_cannot_be_read_are_named_by_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_jsonl(tmp_path)
    assert str(caught.value) == f"{tmp_path}: Is a directory"


def test_rows_may_be_named_by_a_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert read_jsonl(str(tmp_path / "rows.jsonl")) == [{"a": 1}]
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_jsonl(str(tmp_path / "none.jsonl"))


def test_json_is_written_as_utf_8_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": "−5"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": "−5"\n}\n'.encode()


def test_what_a_row_lacks_is_named_with_its_place() -> None:
    assert required({"a": 1}, "a", int, "x.jsonl, row 1") == 1
    for row, fault in (
        ({}, "'a' is missing"),
        ({"a": None}, "'a': expected int, found null"),
        ({"a": "1"}, "'a': expected int, found str"),
    ):
        with pytest.raises(DataError, match=f"^x.jsonl, row 3: {fault}$"):
            required(row, "a", int, "x.jsonl, row 3")


# digests and seeds


def test_sha256_of_a_file_and_of_a_value(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected
    assert sha256_json({"a": 1, "b": {"c": 2, "d": 3}}) == sha256_json(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_seeds_never_move() -> None:
    # A change of these values makes every finished run unrepeatable.
    assert seed_from(0) == 6711488920161924273
    assert seed_from(0, "arithmetic", "test-7", 3) == 3644805476915244557


def test_seeds_tell_apart_order_grouping_and_type() -> None:
    parts: list[tuple[int | str, ...]] = [
        (1, 2), (2, 1), (12,), ("12",), ("1", "2"), (1, "2"), ("a", "bc"), ("ab", "c"), ("abc",),
        ("", "abc"), ("abc", ""), (),
    ]  # fmt: skip
    assert len({seed_from(*group) for group in parts}) == len(parts)


@settings(max_examples=100)
@given(st.lists(st.integers() | st.text(), max_size=4))
def test_a_seed_fits_in_63_bits_and_repeats(parts: list[int | str]) -> None:
    assert 0 <= seed_from(*parts) < 2**63
    assert seed_from(*parts) == seed_from(*parts)


def test_what_another_host_writes_is_no_leftover_since_its_locks_may_not_be_seen_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "elsewhere")
        elsewhere.setattr(fcntl, "flock", lambda *_: None)
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("1", encoding="utf-8")
            elsewhere.setattr(platform, "node", lambda: "here")
            write_text(tmp_path / "b.json", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_folder_that_a_file_cannot_leave_is_gone_from_its_name_and_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()

    def not_empty(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    monkeypatch.setattr(shutil, "rmtree", not_empty)
    remove_folder(folder)
    assert not folder.exists()


def test_a_folder_whose_removal_is_killed_is_gone_and_its_rest_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    (folder / "step-1").mkdir(parents=True)
    (folder / "step-1" / "weights").write_text("w", encoding="utf-8")

    def killed(_: Path, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.rglob("weights"))) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "a")
    assert list(tmp_path.iterdir()) == []
