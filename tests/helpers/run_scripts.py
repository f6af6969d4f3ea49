"""Several training runs in one process, one after the other: to start Python takes longer.

    torchrun … run_scripts.py JOBS.json    [["train_sft", ["--settings", …], null or a step], …]

A run with a step is stopped after it, as a kill would, and leaves its checkpoints.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # while modules are loaded; `run_script` enables it

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from script_modules import load_script

from gsm8k_core import scoring
from gsm8k_core.cli import leave, run_script
from gsm8k_core.training import TrainingRun


def cut_vocabulary(patch: Callable[[object, str, object], None]) -> None:
    """Let a small batch of a small model take several blocks, with no logits kept for backward."""
    patch(scoring, "LOGITS_PER_BLOCK", {"cpu": 0})
    patch(scoring, "MIN_BLOCK_WIDTH", 64)
    patch(scoring, "LOGITS_KEPT", 0)


class Stopped(BaseException):
    """Stands for the end of the process."""


def run_until(module: ModuleType, arguments: list[str], last_step: int | None) -> None:
    """`main` of a training script, stopped after `last_step`."""
    end_step = TrainingRun.end_step

    def end_step_or_stop(self: TrainingRun, step: int, row: Any, **options: Any) -> None:
        end_step(self, step, row, **options)
        if step == last_step:
            raise Stopped

    TrainingRun.end_step = end_step_or_stop  # type: ignore[method-assign,assignment]
    try:
        module.main(arguments)
    except Stopped:
        pass
    finally:
        TrainingRun.end_step = end_step  # type: ignore[method-assign]


def main() -> int:
    cut_vocabulary(setattr)
    for name, arguments, last_step in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_until(sys.modules.get(name) or load_script(name), arguments, last_step)
    return 0


if __name__ == "__main__":
    leave(run_script(main))
