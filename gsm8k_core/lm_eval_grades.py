"""The two grades of lm-evaluation-harness' tasks `gsm8k` and `gsm8k_cot`, version 0.4.13.

The tasks differ in what `strict-match` looks for. Where the prompt's answers stand after `The
answer is` it is that of `gsm8k_cot`; after any other marker that of `gsm8k`, which wants `#### `
whatever the prompt. `flexible-extract` and the comparison are the same in both.

The harness compares texts: `18.00` is not `18`, `1,8` is, and where a text has no number of the
asked form it answers `[invalid]`, which is never right. Published GSM8K figures mostly come from
these grades, so they are kept as they are, faults included; `gsm8k_core.answers` has the project's
own. What the harness cuts before it grades (`Question:`, `</s>`, `<|im_end|>`) is generation and
belongs to the suite's `stop`.

The harness' regular expressions for ignored text take quadratic time; here all is linear.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

LmEvalMode = Literal["lm_eval_strict", "lm_eval_flexible"]

GSM8K_COT_MARKER = "The answer is"

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
# The last point is any character, the number's own last digit where nothing else follows it: of a
# completion that ends in `The answer is 18` the harness reads 1.
_STRICT_COT = re.compile(r"The answer is (-?[0-9.,]+).")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_FINAL_POINT = re.compile(r"\.$")


def lm_eval_answer(text: str | None, mode: LmEvalMode, marker: str = "####") -> str | None:
    """The text that the harness compares with the gold answer's; None for its `[invalid]`.

    `lm_eval_strict` takes what follows the first `#### `, or the first `The answer is ` where that
    is the `marker`; `lm_eval_flexible` the last run of digits, `$`, `.` and `,`. Never raises for
    any `text`. Raises ValueError for an unknown mode.
    """
    if mode not in get_args(LmEvalMode):
        choices = " or ".join(map(repr, get_args(LmEvalMode)))
        raise ValueError(f"mode {mode!r} is unknown: take {choices}")
    if text is None:
        return None
    found = None
    if mode == "lm_eval_strict":
        strict = _STRICT_COT if marker == GSM8K_COT_MARKER else _STRICT
        match = strict.search(text)
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


def lm_eval_correct(text: str | None, gold: str, mode: LmEvalMode, marker: str = "####") -> bool:
    """Whether the harness grades the completion right; `gold` as in `lm_eval_gold`."""
    return lm_eval_answer(text, mode, marker) == lm_eval_gold(gold)
