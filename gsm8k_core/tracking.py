"""How a training run is followed: train/metrics.jsonl always, W&B when asked.

metrics.jsonl has one JSON object a step (and one of step 0 where a run validates), appended and
flushed, and is cut back exactly on resume. W&B gets the same rows, the run's settings and samples
of completions (and of a study its comparison), from a thread of its own behind a bounded queue:
where W&B fails, hangs or is slow, rows are dropped with one warning and training goes on. Only rank
0 has a tracker.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from gsm8k_core import ranks
from gsm8k_core.config import TrackingSettings, settings_from
from gsm8k_core.files import Json, cut_torn_line, iter_jsonl, required, write_jsonl
from gsm8k_core.redaction import redact

log = logging.getLogger(__name__)

TRACKING_VARIABLE = "GSM8K_TRACKING"
MAX_QUEUED = 1000
MAX_START_ATTEMPTS = 3
# What W&B may take at the end of a run to write, or upload, what is left.
FINISH_SECONDS = 60.0
# The service, and what it measures the machine with (under its older name too).
SERVICE_NAMES = ("wandb-core", "wandb-symon", "gpu_stats")
COMPLETION_COLUMNS = ("step", "prompt", "completion", "gold", "reward", "num_tokens", "truncated")


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

    def sync(self) -> None:
        """Flush the rows to the disk: after a power cut no checkpoint is to be ahead of them."""
        with self.path.open("rb") as handle:
            os.fsync(handle.fileno())


def _rows_until(path: Path, last_step: int) -> Iterator[Json]:
    """Rows of steps up to `last_step`; a line torn by a kill can only come after them.

    Where not every step has a row, that line may be the next one.
    """
    if last_step == 0 or not path.exists():
        return
    cut_torn_line(path)
    for number, row in enumerate(iter_jsonl(path), start=1):
        step = required(row, "step", int, f"{path}, row {number}")
        if step > last_step:
            return
        yield row
        if step == last_step:
            return


def _finite(row: Json) -> Json:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


# -------------------------------------------------------------------------------------------- W&B


def tracking_settings() -> TrackingSettings:
    """The config's `tracking`, as the workflow hands it on in $GSM8K_TRACKING; off without.

    It travels beside the settings of a run: following a run does not change it.
    """
    text = os.environ.get(TRACKING_VARIABLE)
    if text is None:
        return TrackingSettings()
    return settings_from(text, TrackingSettings, f"${TRACKING_VARIABLE}")


def completions_due(settings: TrackingSettings, step: int) -> bool:
    """Whether a sample of completions is due: at step 1 and every so many."""
    every = settings.completions_every_steps
    return every > 0 and (step == 1 or step % every == 0)


def generations_due(settings: TrackingSettings, step: int, num_steps: int) -> bool:
    """Whether SFT or DPO is to show what the model writes after `step` (0: before the first)."""
    every = settings.generations_every_steps
    return step in (0, num_steps) or (every > 0 and step % every == 0)


def wandb_mode(settings: TrackingSettings) -> str:
    """`disabled`, `offline` or `online`; never online without a key, which W&B would ask for."""
    if settings.project is None or settings.mode == "disabled":
        return "disabled"
    if settings.mode == "online" and not _has_key():
        log.warning(
            "W&B: no key ($WANDB_API_KEY, $NETRC, ~/.netrc), so offline; `wandb sync` uploads"
        )
        return "offline"
    return settings.mode or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        # As W&B does: $NETRC in place of ~/.netrc.
        file = os.environ.get("NETRC") or None
        return netrc.netrc(file and os.path.expanduser(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@dataclass(frozen=True)
class TrackedRun:
    """What W&B is told of a run at its start."""

    id: str
    name: str
    group: str
    config: Json
    rows_before: Iterable[Json] = ()
    """Rows up to the checkpoint that it goes on from: W&B keeps the last ones of a killed run in
    memory, and they die with it."""


def new_run_id() -> str:
    """A name for the run at W&B: kept in its checkpoints, so that a resumed run goes on in it."""
    return uuid.uuid4().hex[:16]


def start_tracker(folder: Path, run: TrackedRun) -> Tracker | None:
    """The tracker of a run whose folder is `folder`; None where W&B is off or on other ranks."""
    settings = tracking_settings()
    mode = wandb_mode(settings)
    if mode == "disabled" or not ranks.is_main():
        return None
    return Tracker(settings, mode, folder, run)


class Tracker:
    """Hands rows to W&B. No call waits, but for `finish`: FINISH_SECONDS at most, or twice that."""

    def __init__(
        self, settings: TrackingSettings, mode: str, folder: Path, run: TrackedRun
    ) -> None:
        self.settings = settings
        self.num_dropped = 0
        self._queue: queue.Queue[Json | None] = queue.Queue(MAX_QUEUED)
        self._has_failed = False
        # Caches and staged files would lie in the home directory.
        for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder.resolve() / "wandb" / "cache"))
        # Not in the thread: imports of two threads can meet half-made modules of each other.
        with contextlib.suppress(Exception):  # the thread will say why it fails
            importlib.import_module("wandb")
        self._thread = threading.Thread(
            target=self._work, args=(mode, folder, run), name="wandb", daemon=True
        )
        self._thread.start()

    def log(self, row: Json) -> None:
        """Log the row of a step; `step` in it is W&B's own."""
        self._put(row)

    def log_completions(self, step: int, completions: list[Json]) -> None:
        """Log a table of a sample (COMPLETION_COLUMNS but the step)."""
        chosen = [{"step": step, **row} for row in completions]
        rows = [[row.get(name) for name in COMPLETION_COLUMNS] for row in chosen]
        self.log_table("completions", COMPLETION_COLUMNS, rows, step)

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int = 0
    ) -> None:
        """Log a table of texts and numbers."""
        self._put({"step": step, "table": name, "columns": list(columns), "rows": list(rows)})

    def finish(self, summary: Json) -> None:
        """Set the run's summary, and wait until W&B has all that is queued, or for long enough."""
        if self._has_failed:
            self._thread.join(FINISH_SECONDS)  # it may still be saying so
            # Its service may be what hangs.
            ending = threading.Thread(target=_end_service, name="wandb-end", daemon=True)
            ending.start()
            ending.join(FINISH_SECONDS)
            if ending.is_alive():
                _kill_service()
            return
        deadline = time.monotonic() + FINISH_SECONDS
        try:
            self._queue.put({"summary": summary}, timeout=FINISH_SECONDS)
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("W&B: not done after %.0f s; the run ends without it", FINISH_SECONDS)
            _kill_service()
        elif self.num_dropped:
            log.warning("W&B: %d rows were dropped; metrics.jsonl has all", self.num_dropped)

    def _put(self, item: Json) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            if self.num_dropped == 0 and not self._has_failed:
                log.warning("W&B: too slow, so rows are dropped; metrics.jsonl has all")
            self.num_dropped += 1

    def _work(self, mode: str, folder: Path, run: TrackedRun) -> None:
        try:
            self._send_all(mode, folder, run)
        # W&B may ask to exit (SystemExit) as well as fail, and neither is the run's concern.
        except BaseException as error:
            self._has_failed = True
            lines = str(error).strip().split("\n")
            log.warning("W&B: %s: %s; continuing without", type(error).__name__, redact(lines[0]))

    def _start(self, **settings: Any) -> Any:
        """`wandb.init`, tried again when its local service is slow to come up on a busy machine."""
        import wandb

        for attempt in range(1, MAX_START_ATTEMPTS):
            try:
                return wandb.init(**settings)
            except Exception as error:  # the last attempt is not caught
                log.info("W&B: start %d failed: %s; trying again", attempt, redact(str(error)))
        return wandb.init(**settings)

    def _send_all(self, mode: str, folder: Path, run: TrackedRun) -> None:
        import wandb

        started = self._start(
            project=self.settings.project,
            entity=self.settings.entity,
            mode=mode,
            dir=str(folder.resolve()),  # a W&B service started elsewhere may write the files
            id=run.id,
            name=run.name,
            group=run.group,
            config=run.config,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins by the id
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                disable_git=True,  # the remote's URL may hold a password
                save_code=False,
                silent=True,
                x_disable_meta=True,  # the command line, the user, the host
                finish_timeout=FINISH_SECONDS,
            ),
        )
        for row in run.rows_before:
            if row["step"] >= started.step:  # of the server's run online; 0 in a new file offline
                started.log(_fields(row), step=row["step"])
        while (item := self._queue.get()) is not None:
            if "summary" in item:
                started.summary.update(item["summary"])
            elif "table" in item:
                table = wandb.Table(columns=item["columns"], data=item["rows"])
                started.log({item["table"]: table}, step=item["step"])
            else:
                started.log(_fields(item), step=item["step"])
        started.finish()


def _end_service() -> None:
    """What W&B's own hook does at the end of Python, while that can still be waited for."""
    with contextlib.suppress(Exception):  # W&B has failed, and that was said
        importlib.import_module("wandb").teardown()


def _kill_service() -> None:
    """Kill the processes that W&B has started from this one.

    Its own hook at the end of Python waits for them, for ever where they hang.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            name = child.name()
            if any(known in name for known in SERVICE_NAMES):
                log.warning("W&B: killing %s (process %d)", name, child.pid)
                child.kill()


def _fields(row: Json) -> Json:
    """What W&B is told of a row: all that is known, but for the step, which it takes apart."""
    return {key: value for key, value in row.items() if key != "step" and value is not None}
