"""All grades of a completion, and the one of them that counts.

| grade | reads | compares |
|---|---|---|
| `strict` | after the marker that the prompt asked for | exact rational numbers |
| `flexible` | the last number | exact rational numbers |
| `lm_eval_strict`, `lm_eval_flexible` | as lm-evaluation-harness does* | texts, as it does |
| `math_verify` | as the package math-verify does | expressions, by sympy |

* As its task `gsm8k_cot` does where the marker is `The answer is`, else as its task `gsm8k`.

The first four cost some 0.1 ms together and are always there. `math_verify` costs 2 ms and a child
process; it is taken where the settings ask for it or make it the grade that counts, else null.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import get_args

from gsm8k_core.answers import Marker, contradicts_itself, extract_answer, parse_gold
from gsm8k_core.config import Grade, GradingSettings, RewardGrade
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.extras import HOW_TO_INSTALL, is_installed
from gsm8k_core.files import Json
from gsm8k_core.lm_eval_grades import lm_eval_answer, lm_eval_gold
from gsm8k_core.math_verifier import MathVerifier

GRADES: tuple[Grade, ...] = get_args(Grade)


@dataclass(frozen=True)
class Gold:
    """A reference answer, as each grade compares it."""

    value: Fraction
    lm_eval: str


def read_gold(text: str) -> Gold:
    """The reference answer in `text`: a number, or a worked answer that ends in `#### 18`.

    Raises DataError when it states no number, or is no text.
    """
    if not isinstance(text, str):
        raise DataError(
            f"gold answer {text!r:.80} is of type {type(text).__name__}, expected text such as '18'"
        )
    return _read_gold(text)


@lru_cache(maxsize=4096)
def _read_gold(text: str) -> Gold:
    return Gold(value=parse_gold(text.rpartition("####")[2]), lm_eval=lm_eval_gold(text))


def is_right(text: str, gold: str, grade: RewardGrade, marker: Marker) -> bool:
    """One of the grades that need no other process. Raises DataError for a `gold` of no number."""
    reference = read_gold(gold)
    if grade == "strict" or grade == "flexible":
        return extract_answer(text, grade, marker) == reference.value
    return lm_eval_answer(text, grade, marker) == reference.lm_eval


class Grader:
    """Grades completions; a context manager, for math-verify runs in a process of its own.

    Raises ConfigError when the settings ask for `math_verify` and the package is missing.
    """

    def __init__(self, settings: GradingSettings) -> None:
        self.settings = settings
        self._verifier: MathVerifier | None = None
        if settings.grading != "math_verify" and not settings.math_verify:
            return
        if not is_installed("math_verify"):
            raise ConfigError(
                "the grade math_verify needs the package math-verify: "
                f"{HOW_TO_INSTALL['math_verify']}, or do without this grade"
            )
        self._verifier = MathVerifier()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._verifier is not None:
            self._verifier.close()

    @property
    def num_killed(self) -> int | None:
        """Completions that math-verify did not end with in time; None where it does not run."""
        return None if self._verifier is None else self._verifier.num_killed

    def grade(self, text: str | None, gold: Gold) -> Json:
        """One boolean (or None) for each of `GRADES`, and besides:

        `correct` (the grade that counts), `extracted` (the answer that it read, or None),
        `has_format` (a number follows the marker, right or wrong) and `contradicted` (right by
        `strict`, but another number follows a later marker).
        """
        strict = extract_answer(text, "strict", self.settings.marker)
        flexible = extract_answer(text, "flexible")
        lm_eval_strict = lm_eval_answer(text, "lm_eval_strict", self.settings.marker)
        lm_eval_flexible = lm_eval_answer(text, "lm_eval_flexible")
        verified, verified_answer = None, None
        if self._verifier is not None:
            verified, verified_answer = self._verifier.grade(text, str(gold.value))
        grades: dict[str, bool | None] = {
            "strict": strict == gold.value,
            "flexible": flexible == gold.value,
            "lm_eval_strict": lm_eval_strict == gold.lm_eval,
            "lm_eval_flexible": lm_eval_flexible == gold.lm_eval,
            "math_verify": verified,
        }
        answers: dict[str, Fraction | str | None] = {
            "strict": strict,
            "flexible": flexible,
            "lm_eval_strict": lm_eval_strict,
            "lm_eval_flexible": lm_eval_flexible,
            "math_verify": verified_answer,
        }
        primary = self.settings.grading
        extracted = answers[primary]
        return {
            **grades,
            "correct": grades[primary],
            "extracted": None if extracted is None else str(extracted),
            "has_format": strict is not None,
            "contradicted": (
                text is not None
                and grades["strict"] is True
                and contradicts_itself(text, self.settings.marker)
            ),
        }
