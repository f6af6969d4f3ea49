"""metrics.jsonl always, cut back on resume; W&B beside it, which must never be in the way.

W&B runs in its real offline mode, and what it wrote is read back from its own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from gsm8k_core import tracking
from gsm8k_core.config import TrackingSettings
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import Json, iter_jsonl, read_jsonl, write_jsonl
from gsm8k_core.tracking import (
    MetricsLog,
    TrackedRun,
    Tracker,
    completions_due,
    new_run_id,
    start_tracker,
    tracking_settings,
    wandb_mode,
)

RUN = TrackedRun("run-1", "tiny/grpo/seed0", "study/tiny/grpo", {"seed": 0, "lr": 0.5})


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


def test_a_row_without_its_step_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl, row 2: 'step' is missing"):
        MetricsLog(path, last_step=3)


@pytest.mark.parametrize("num_whole", [0, 3])
def test_a_last_line_torn_by_a_kill_is_dropped(tmp_path: Path, num_whole: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, num_whole + 1))
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 4, "lo')
    write(path, range(num_whole + 1, num_whole + 2), last_step=num_whole)
    assert steps_of(path) == list(range(1, num_whole + 2))


def test_a_torn_last_line_is_dropped_where_not_every_step_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    write(path, range(1, 6, 4))  # 1, 5
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 10, "prom')
    write(path, range(10, 11), last_step=8)
    assert steps_of(path) == [1, 5, 10]


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


# W&B: where and whether


@pytest.fixture(autouse=True)
def no_key_and_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    # The tracker sets these if nobody has; undone after the test.
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "run" / "wandb" / "cache"))
    monkeypatch.delenv("GSM8K_TRACKING", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    yield
    os.environ.pop("WANDB_SERVICE", None)  # W&B's own: children of this process would take it over


@pytest.mark.parametrize(
    ("settings", "has_key", "mode"),
    [
        ({}, True, "disabled"),
        ({"mode": "online"}, True, "disabled"),
        ({"project": "p"}, False, "offline"),
        ({"project": "p"}, True, "online"),
        ({"project": "p", "mode": "offline"}, True, "offline"),
        ({"project": "p", "mode": "disabled"}, True, "disabled"),
        ({"project": "p", "mode": "online"}, True, "online"),
        ({"project": "p", "mode": "online"}, False, "offline"),
    ],
)
def test_the_mode_follows_from_project_key_and_setting(
    monkeypatch: pytest.MonkeyPatch, settings: Json, has_key: bool, mode: str
) -> None:
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(TrackingSettings(**settings)) == mode


def test_a_key_in_netrc_is_a_key(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password k\n", encoding="utf-8")
    netrc.chmod(0o600)
    assert wandb_mode(TrackingSettings(project="p")) == "online"
    netrc.write_text("machine elsewhere login user password k\n", encoding="utf-8")
    assert wandb_mode(TrackingSettings(project="p")) == "offline"


def test_a_key_in_the_file_that_netrc_names_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "home" / "elsewhere"
    other.parent.mkdir()
    other.write_text("machine api.wandb.ai login user password k\n", encoding="utf-8")
    assert wandb_mode(TrackingSettings(project="p")) == "offline"
    for path in (str(other), "~/elsewhere"):
        monkeypatch.setenv("NETRC", path)
        assert wandb_mode(TrackingSettings(project="p")) == "online"


def test_without_a_project_and_on_other_ranks_there_is_no_tracker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert start_tracker(tmp_path, RUN) is None
    monkeypatch.setenv("GSM8K_TRACKING", '{"project": "p"}')
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start_tracker(tmp_path, RUN) is None
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_settings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSM8K_TRACKING", '{"project": "p", "mode": "sometimes", "projekt": 1}')
    with pytest.raises(ConfigError, match=r"\$GSM8K_TRACKING: mode: .*; projekt: "):
        tracking_settings()


def test_run_ids_differ() -> None:
    assert len({new_run_id() for _ in range(100)}) == 100


# W&B: a fake that misbehaves


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Json]]:
    """`fake_wandb(init=…, log=…)`: a wandb whose parts do that; returns what it was given."""

    def install(
        init: Callable[[], None] = lambda: None,
        log: Callable[[], None] = lambda: None,
        step: int = 0,
    ) -> list[Json]:
        logged: list[Json] = []

        def started(**_options: Any) -> Any:
            init()

            def log_row(row: Json, step: int) -> None:
                log()
                logged.append({"step": step, **row})

            return SimpleNamespace(log=log_row, summary={}, finish=lambda: None, step=step)

        module = SimpleNamespace(init=started, Settings=dict, Table=dict)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return logged

    return install


def start(tmp_path: Path, **settings: Any) -> Tracker:
    return Tracker(TrackingSettings(project="p", **settings), "offline", tmp_path / "run", RUN)


def fail(error: BaseException) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


@pytest.mark.parametrize("where", ["init", "log"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no planted-key-x here"), SystemExit(1), KeyboardInterrupt()]
)
def test_a_failure_of_wandb_is_one_warning(
    fake_wandb: Callable[..., list[Json]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-x")
    fake_wandb(**{where: fail(error)})
    tracker = start(tmp_path)
    for step in range(1, 5):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish({"loss": 1.0})
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"W&B: {type(error).__name__}: ")
    assert "planted-key-x" not in warnings[0]


def test_wandb_is_told_nothing_of_the_machine_the_user_or_the_remote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: Json = {}

    def init(**options: Any) -> Any:
        told.update(options)
        return SimpleNamespace(log=None, summary={}, finish=lambda: None, step=0)

    module = SimpleNamespace(init=init, Settings=dict, Table=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    start(tmp_path).finish({})
    kept_off = {"x_disable_meta": True, "disable_git": True, "save_code": False, "console": "off"}
    assert told["settings"].items() >= kept_off.items()


def test_a_wandb_that_is_not_installed_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = start(tmp_path)
    tracker.finish({})
    assert "W&B: ModuleNotFoundError" in caplog.text


def test_a_slow_wandb_slows_no_step_and_loses_rows_with_one_warning(
    fake_wandb: Callable[..., list[Json]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "MAX_QUEUED", 10)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.3)
    fake_wandb(log=lambda: time.sleep(120))
    tracker = start(tmp_path)
    began = time.perf_counter()
    for step in range(1, 1001):
        tracker.log({"step": step})
    assert tracker.num_dropped >= 1000 - 12
    tracker.finish({})
    assert time.perf_counter() - began < 60  # not one of them was waited for
    assert caplog.text.count("too slow") == 1
    assert "not done after" in caplog.text


def test_a_wandb_that_hangs_at_its_start_holds_nobody(
    fake_wandb: Callable[..., list[Json]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    fake_wandb(init=lambda: time.sleep(120))
    began = time.perf_counter()
    tracker = start(tmp_path)
    tracker.log({"step": 1})
    tracker.finish({})
    assert time.perf_counter() - began < 60


def test_a_queue_that_keeps_up_loses_nothing(
    fake_wandb: Callable[..., list[Json]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged = fake_wandb()
    tracker = start(tmp_path)
    for step in range(1, 501):
        tracker.log({"step": step, "loss": step / 2, "nothing": None})
    tracker.log_completions(500, [{"completion": str(k), "gold": "1"} for k in range(2)])
    tracker.finish({})
    assert logged[:500] == [{"step": step, "loss": step / 2} for step in range(1, 501)]
    table = logged[500]["completions"]
    assert [row[:4] for row in table["data"]] == [[500, None, "0", "1"], [500, None, "1", "1"]]
    assert caplog.records == []


@pytest.mark.parametrize(("servers_step", "sent"), [(0, [1, 2, 3, 4]), (3, [3, 4]), (9, [4])])
def test_rows_that_a_killed_run_took_with_it_are_sent_when_it_goes_on(
    fake_wandb: Callable[..., list[Json]], tmp_path: Path, servers_step: int, sent: list[int]
) -> None:
    logged = fake_wandb(step=servers_step)
    run = dataclasses.replace(RUN, rows_before=[{"step": step} for step in (1, 2, 3)])
    tracker = Tracker(TrackingSettings(project="p"), "offline", tmp_path / "run", run)
    tracker.log({"step": 4})
    tracker.finish({})
    assert [row["step"] for row in logged] == sent


@pytest.mark.parametrize(
    ("every", "wanted"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [1, 3, 6]), (10, [1])]
)
def test_completions_are_sampled_every_so_many_steps(every: int, wanted: list[int]) -> None:
    settings = TrackingSettings(completions_every_steps=every)
    assert [step for step in range(1, 7) if completions_due(settings, step)] == wanted


# W&B: the real one, offline


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, 7 bytes of header, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):  # still being written
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_wandb(path: Path) -> Json:
    """Run, config, rows and summary of a finished .wandb file.

    W&B's service closes the file a moment after `finish` (or at the end of the process).
    """
    found: Json = {"config": {}, "rows": [], "summary": {}}
    deadline = time.monotonic() + 120
    records = list(wandb_records(path))
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} is never finished"
        time.sleep(0.1)
        records = list(wandb_records(path))
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {
                "id": record.run.run_id,
                "project": record.run.project,
                "name": record.run.display_name,
                "group": record.run.run_group,
            }
            for item in record.run.config.update:
                found["config"][item.key] = json.loads(item.value_json)
        elif kind == "history":
            row = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found["rows"].append({k: v for k, v in row.items() if not k.startswith("_")})
            found["rows"][-1]["step"] = record.history.step.num
        elif kind == "summary":
            for item in record.summary.update:
                found["summary"][item.key or ".".join(item.nested_key)] = json.loads(
                    item.value_json
                )
    return found


@pytest.mark.slow
def test_what_the_real_wandb_writes_offline_is_what_was_logged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = TrackingSettings(project="maths")
    tracker = Tracker(settings, "offline", folder, RUN)
    for step in range(1, 301):
        tracker.log({"step": step, "loss": step / 4, "reward": 1 - 1 / step, "best": None})
        if completions_due(settings, step):
            row = {"prompt": "1 + 1 =", "completion": f" 2 #### {step}", "gold": "2", "reward": 1.0}
            tracker.log_completions(step, [row])
    tracker.finish({"num_steps": 300, "provenance": {"commit": "abc"}})
    (file,) = folder.glob("wandb/offline-run-*/run-run-1.wandb")
    found = read_wandb(file)
    assert (found["id"], found["project"]) == ("run-1", "maths")
    assert (found["name"], found["group"]) == (RUN.name, RUN.group)
    assert {key: found["config"][key] for key in RUN.config} == RUN.config
    rows = [
        {key: value for key, value in row.items() if not key.startswith("completions")}
        for row in found["rows"]
    ]
    assert rows == [
        {"step": step, "loss": step / 4, "reward": 1 - 1 / step} for step in range(1, 301)
    ]
    sampled = [row["step"] for row in found["rows"] if "completions.path" in row]
    assert sampled == [1, *range(10, 301, 10)]
    media = folder / file.parent / "files" / found["rows"][9]["completions.path"]
    table = json.loads(media.read_text(encoding="utf-8"))
    assert table["columns"] == list(tracking.COMPLETION_COLUMNS)
    assert table["data"] == [[10, "1 + 1 =", " 2 #### 10", "2", 1.0, None, None]]
    assert found["summary"]["num_steps"] == 300
    assert list((tmp_path / "home").glob("**/*")) == []


HANG = """
import os, signal, sys, time
from pathlib import Path
import psutil
from gsm8k_core import tracking
from gsm8k_core.config import TrackingSettings
tracking.FINISH_SECONDS = 1.0
folder = Path(sys.argv[1])
run = tracking.TrackedRun("run-1", "a", "b", {})
tracker = tracking.Tracker(TrackingSettings(project="p"), "offline", folder, run)
tracker.log({"step": 1, "loss": 1.0})
while not list(folder.glob("wandb/offline-run-*/*.wandb")) or tracker._queue.qsize():
    time.sleep(0.05)  # `init` waits for an answer of the service, this row does not
(core,) = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
core.send_signal(signal.SIGSTOP)
print(core.pid, flush=True)
if sys.argv[2] == "failed":
    tracker.log({"step": "none"})
    while not tracker._has_failed:
        time.sleep(0.05)
tracker.finish({})
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["at work", "failed"])
def test_a_process_whose_wandb_hangs_ends_all_the_same(tmp_path: Path, before: str) -> None:
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", HANG, str(tmp_path), before], cwd=root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            _, said = process.communicate(timeout=240)  # a loaded machine takes its time
        except subprocess.TimeoutExpired:
            process.kill()
            os.kill(pid, signal.SIGKILL)
            raise
    assert process.returncode == 0
    assert f"W&B: killing wandb-core (process {pid})" in said
    deadline = time.monotonic() + 60  # who is killed is there until it has been waited for
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_goes_on_in_the_same_wandb_run(
    tmp_path: Path,
    tiny_folder: Path,
    arithmetic_folder: Path,
    run_json: Callable[..., str],
    script: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "run"
    settings = run_json(
        "grpo", num_steps=6, prompts_per_step=4, group_size=2, minibatches=1, max_new_tokens=8,
        checkpoint_every_steps=2, validate_every_steps=3, num_validation_problems=2,
    )  # fmt: skip
    words = [
        "--settings", settings, "--starting-model", str(tiny_folder),
        "--data", str(arithmetic_folder / "train.jsonl"),
        "--val-data", str(arithmetic_folder / "val.jsonl"), "--output-dir",
    ]  # fmt: skip
    killer = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from gsm8k_core import tracking\n"
        "append = tracking.MetricsLog.append\n"
        "def stop(log, row):\n"
        "    append(log, row)\n"
        "    if row['step'] < 5: return\n"
        "    for _ in range(600):\n"  # until W&B has begun
        f"        if list(Path({str(output)!r}).glob('wandb/offline-run-*/*.wandb')): break\n"
        "        time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "tracking.MetricsLog.append = stop\n"
        "sys.path.insert(0, 'scripts'); import train_grpo; train_grpo.main(sys.argv[1:])\n"
    )
    monkeypatch.setenv("GSM8K_TRACKING", '{"project": "maths"}')
    root = Path(__file__).resolve().parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", killer, *words, str(output)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -9
    with caplog.at_level(logging.INFO):
        script("train_grpo").main([*words, str(output)])
    assert "resuming after step 4" in caplog.text and "W&B:" not in caplog.text

    runs = sorted(output.glob("wandb/offline-run-*/*.wandb"))
    found = read_wandb(runs[-1])
    assert [row["step"] for row in found["rows"]] == [0, 1, 2, 3, 4, 5, 6]
    # offline-run-SECOND-ID, and a number where two have begun in the same second
    ids = [path.parent.name.split("-")[3] for path in runs]
    assert len(ids) == 2 and set(ids) == {found["id"]}
    assert found["config"]["method_settings"]["num_steps"] == 6
    rows = read_jsonl(output / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    logged = found["rows"][-1]
    assert {key: logged[key] for key in ("reward_mean", "loss")} == {
        key: rows[-1][key] for key in ("reward_mean", "loss")
    }

    # Followed or not, it is the same run: the same weights.
    monkeypatch.delenv("GSM8K_TRACKING")
    script("train_grpo").main([*words, str(tmp_path / "plain")])
    weights = "model/model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (output / weights).read_bytes()
    assert not (tmp_path / "plain" / "wandb").exists()


def test_following_a_run_is_no_setting_of_it(config: Any) -> None:
    followed = config.model_copy(update={"tracking": TrackingSettings(project="p")})
    for method in ("sft", "grpo"):
        assert followed.run_settings("tiny-qwen2", method, 0) == config.run_settings(
            "tiny-qwen2", method, 0
        )


def test_a_long_log_is_cut_back_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_jsonl(path, ({"step": step, "text": "x" * 10_000} for step in range(1, 2001)))
    tracemalloc.start()
    MetricsLog(path, last_step=1900)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(1 for _ in iter_jsonl(path)) == 1900
    assert peak < 1e6 < path.stat().st_size / 10
