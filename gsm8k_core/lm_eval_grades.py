"""The two grades of lm-evaluation-harness' `gsm8k` task, version 0.4.13.

The harness compares texts: `18.00` is not `18`, `1,8` is, and where a text has no number of the
asked form it answers `[invalid]`, which is never right. Published GSM8K figures mostly come from
these grades, so they are kept as they are, faults included; `gsm8k_core.answers` has the project's
own. What the harness cuts before it grades (`Question:`, `</s>`, `<|im_end|>`) is generation and
belongs to the suite's `stop`.

The harness' regular expressions for ignored text take quadratic time; here all is linear.
"""

from __future__ import annotations

import re
from typing import Literal

LmEvalMode = Literal["lm_eval_strict", "lm_eval_flexible"]

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_FINAL_POINT = re.compile(r"\.$")


def lm_eval_answer(text: str | None, mode: LmEvalMode) -> str | None:
    """The text that the harness compares with the gold answer's; None for its `[invalid]`.

    `lm_eval_strict` takes what follows the first `#### `, `lm_eval_flexible` the last run of
    digits, `$`, `.` and `,`. Never raises for any `text`.
    """
    if text is None:
        return None
    found = None
    if mode == "lm_eval_strict":
        match = _STRICT.search(text)
        found = None if match is None else match.group(1)
    else:
        for match in _FLEXIBLE.finditer(text):
            found = match.group()
    return None if found is None else found.replace(",", "").replace("$", "").removesuffix(".")


def lm_eval_gold(gold: str) -> str:
    """A gold answer (`1,000`, or a worked answer that ends in `#### 1,000`) as it is compared."""
    text = gold.replace(",", "").replace("$", "").rpartition("#### ")[2]
    # The harness keeps texts in numpy arrays, which drop trailing NULs.
    return _FINAL_POINT.sub("", text.rstrip("\0")).rstrip("\0")


def lm_eval_correct(text: str | None, gold: str, mode: LmEvalMode) -> bool:
    """Whether the harness grades the completion right; `gold` as in `lm_eval_gold`."""
    return lm_eval_answer(text, mode) == lm_eval_gold(gold)
