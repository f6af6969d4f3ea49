"""Find, read and compare a numeric answer.

A number is an exact `fractions.Fraction`: no float, no rounding, nothing is evaluated. Every step
is one pass over the text, so a completion of any shape costs time linear in its length.

Two ways to find the answer:

- `strict` reads it after the marker that the prompt asked for. For `####` it is the first marker
  that a number follows, as in lm-evaluation-harness: a base model that runs on into the next
  question answers that one after a second marker. Markers that words follow are markdown headings
  and are passed over, and so are numbered ones (`#### 1. Find the eggs`) where another marker has
  the answer. For `\\boxed{}` it is the last one, as in the MATH literature: boxes are also
  used for intermediate results. A box that is never closed was cut short and is no answer. Any
  other marker (`The answer is`) is text, read as `####` is. A thought is not the answer: of a text
  with `</think>` only what follows the last one is read, and a `<think>` that is never closed has
  no answer behind it. (Where the prompt opens it, a text that is cut before its end shows no tag.)
- `flexible` is the last number of the text.

What surrounds the number must leave it what it is. `18 dollars`, `18%`, `18.00`, `18 cm²` and
`18元` are 18; `18 million`, `$18m`, `18x`, `18²`, `18:00`, `18-20`, `1, 18`, `10,00`, `10 000` and
`- 18` are read as no answer at all rather than as one of their parts. (In running text a sign apart
from its number may be a dash: to `flexible`, `is - 18` and `#### - 18` are no answer, `Answer - 18`
is 18.) A line with several numbers counts only as an equation, whose last side is the answer
(`5 + 13 = 18`). Where a number stands before that equation, parted from it by a comma or brackets,
the number is the answer (`18 dollars, which leaves 20 - 18 = 2`).

A fraction is a number only in lowest terms: `7/3` and `1/2` are, `36/2` and `18/1` are divisions
that were left undone, and no answer. Who writes them has not done the last step, which is a
division in one problem of GSM8K out of seven.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, get_args

from gsm8k_core.errors import DataError

Mode = Literal["strict", "flexible"]
Marker = str
"""`boxed` for `\\boxed{}`; anything else is the text that the answer follows, such as `####`."""

MAX_DIGITS = 1000
"""A number of more significant digits is refused: Python's own limit for int(str) is 4300."""

FOREIGN = "\x1a"
"""Stands for a character that is a number but no digit: ½, ⁵, Ⅷ, ①."""
THIN_SPACE = "\u2009"
"""Stands for every space that may group digits: thin, no-break, LaTeX's `\\,` and `\\;`."""


# Fraction slash; Arabic decimal point and thousands; the powers of units; dots that multiply.
_LOOK_ALIKES = {"\u2044": "/", "\u066b": ".", "\u066c": ",", "²": "^2", "³": "^3"}
_LOOK_ALIKES |= dict.fromkeys("\u2027\u2219\u22c5", "·")


class _Normalize(dict[int, str]):
    """A table for str.translate that works out each character once."""

    def __missing__(self, code: int) -> str:
        self[code] = text = _normalize_character(chr(code))
        return text


def _normalize_character(char: str) -> str:
    if char in "\n\t":
        return char
    if char in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d":
        return "-"
    if char in "\u00a0\u2007\u2009\u202f":
        return THIN_SPACE
    if char in _LOOK_ALIKES:
        return _LOOK_ALIKES[char]
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category in ("No", "Nl"):
        return FOREIGN
    if category in ("Cf", "Mn", "Me"):  # direction marks, zero-width joiners, keycaps
        return ""
    if category in ("Cc", "Zs", "Zl", "Zp"):
        return " "
    if "\uff01" <= char <= "\uff5e":  # full-width ASCII
        return chr(ord(char) - 0xFEE0)
    return char


_NORMALIZE = _Normalize()

_CURRENCY = (
    r"(?:(?:US ?|AU?|CA?|HK|NZ|S)?[$€£¥₹¢₩₽₺₫₱₪₦฿]"
    r"|(?<![^\W_])(?:Rs\.?|USD|EUR|GBP|INR|AUD|CAD|JPY|CNY))"
)
_DIGIT = rf"[0-9{FOREIGN}]"
_INTEGER = rf"(?:[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:{THIN_SPACE}[0-9]{{3}})+)(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?")
# The second currency is that of `$-\\$5$`, whose first dollar opens mathematics.
_BEFORE = rf"(-|\+)?(?:(?:{_CURRENCY})+\s*)?(-|\+)?(?:{_CURRENCY}\s*)?"
_SIGN = re.compile(rf"{_BEFORE}(?=\.?{_DIGIT})")
_PREFIX = re.compile(rf"{_BEFORE}\Z")
# Digits joined by anything that makes them one thing: a date, a time, a range, a product.
_RUN = re.compile(rf"\.?{_DIGIT}(?:[0-9{FOREIGN}{THIN_SPACE}.,:/'_^*+×÷·~-]*{_DIGIT})?")

# All of it is optional, so it always matches and never has to go back.
_DECORATION = re.compile(
    r"[\s_`\"'~≈:;#(\[“”‘’]*(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is)?[\s:_~≈\"'(\[]*)?"
    r"(?:(?:about|approximately|around|roughly|exactly)\b[\s_~≈\"'(\[]*)?",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"[\s_$(\[]*(?:[a-zA-Z]\b\s*)?=\s*")
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[^\W\d_])|。|<\||</|<[a-z]")
_NUMBERED_HEADING = re.compile(r"[\s#]*\(?([0-9]{1,2})(?:[.):]|\s+-)\s+[^\W\d_]")
_NEW_QUESTION = re.compile(r"^[ \t#*]*(?:Question|Q)[ \t*]*:", re.MULTILINE)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_EMPHASIS = re.compile(r"\*(?![\w.(])|(?<![\w.)])\*")

_SUFFIX = re.compile(r"[^\W\d_]+")
_UNIT_LETTERS = frozenset("mglLhs")
_NOT_UNITS = frozenset(
    "st nd rd th bn mn mil pi 千 千元 兆 천 만 억 조 천원 만원 억원 조원".split()
)
# Between Cyrillic and the letters of mathematics (𝑥): scripts that put no blank around a number.
_OTHER_SCRIPTS = "\u0530-\U0001d3ff"
_OTHER_SCRIPT = re.compile(f"[{_OTHER_SCRIPTS}]")
_COUNT = "an?|one|two|three|four|five|six|seven|eight|nine"
_PART = (
    "half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    "|hundredths?"
)
_CHANGES_THE_NUMBER = re.compile(
    r"[\s-]*(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?\b"
    r"|[\s-]*(?:lakhs?|crores?|bn|mn|mil|squared|cubed|factorial)\b|\s*[十百万萬亿億半]"
    rf"|[\s-]*and[\s-]+(?:(?:{_COUNT})[\s-]+)?(?:{_PART})\b"
    rf"|\s+point\s+(?:zero|{_COUNT})\b"
    r"|\s+(?:st|nd|rd|th)\b|\s+(?-i:[xyznkKMBπ])\b|\s*[+^×÷·\\]|\s*\*\s*[\w(]|\s*/\s*[(\\]",
    re.IGNORECASE,
)
# After a currency `m` is a million; in `$18 m$` the dollars enclose mathematics, and it is metres.
_MULTIPLIES_MONEY = re.compile(r"\s*(?:mm?|b|k|grand)\b(?!\s*\.?\s*\$)", re.IGNORECASE)
_POWER_OF_A_UNIT = re.compile(
    r"(?<![a-zA-Z])([cdkm]?m|in|inch(?:es)?|ft|feet|foot|yd|yards?|mi|miles?|met(?:er|re)s?|units?"
    r"|s|sec)\s*\^\s*[23]",
    re.IGNORECASE,
)
_CUT_OFF = re.compile(r"[^\w=≈]*[=≈]\W*\Z")  # 7/3 = and no more
_DIVISION = re.compile(r"(?<=[0-9.])\s*/\s*(?=\.?[0-9])")

# What stands before a number in running text. `\Z` and not `$`: a new line is no join.
_NEGATED = re.compile(r"(?:\b(?:minus|negative)|[负負]|マイナス|마이너스)\s*\Z", re.IGNORECASE)
_SIGN_APART = re.compile(r"(?:\A|[\n=≈:(\[$#]|\b(?:is|are|was|equals)|[是为為])\s*-\s+\Z")
_JOINED_BEFORE = re.compile(
    rf"{_DIGIT}\s*[,/]\s*\Z|\^\s*\Z|(?:(?![{_OTHER_SCRIPTS}])[^\W_]_?|[)\\.√∛±]|\\sqrt\s*)\Z"
    rf"|(?:[第点點比之十百千万萬亿億兆천만억조]|{_DIGIT}(?:[年月时時分]|분의 ?))\Z"
)
_WHOLE_BEFORE = re.compile(rf"{_DIGIT}(?: +and)? +\Z")  # of a mixed number: 18 1/2
_GROUPS_BEFORE = re.compile(rf"{_DIGIT}(?: |{THIN_SPACE} | {THIN_SPACE})\Z")  # of 1 000
_LAST_GROUP = re.compile(r"[0-9]{3}(?![0-9])")

# What a side of an equation may hold besides: commas, names of what comes next, brackets.
_EQUALS = re.compile(r"[=≈]")
_NAME = re.compile(r"(?<=[0-9])[\s\\]+(?![mglLhs]\b)[a-zA-Z][\s&]*\Z")  # 18 y = 3
_ANOTHER_STATEMENT = re.compile(
    rf"[,;](?![0-9])|\b(?:and|or)\b|{_NAME.pattern}|(?<=[0-9])[\s\\]+[A-Z][a-z]+[\s&]*\Z"
)
_CLAUSE = re.compile(  # a comma that groups no digits, or a word
    r"[,;](?![0-9]{3}(?![0-9]))|\b(?:because|since)\b|\b(?:and|or)\b(?=\s+[a-zA-Z][\s&]*\Z)"
)
_BRACKET = re.compile(r"[()\[\]]")
_BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")

BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNREAD_FRACTION = r"\\[cdt]?frac(?:\s*(?:\{[^{}]*\}|[0-9])){0,2}"
_MIXED_FRACTION = re.compile(rf"(?<=[0-9])\s*{_UNREAD_FRACTION}")
# Blanks around the digits are not \s: that would overlap THIN_SPACE, and cost cubic time.
_BRACED_NUMBER = rf"\{{[ \n\t]*(-?[0-9.][0-9.,{THIN_SPACE}]*)[ \n\t]*\}}"
_FRACTION = re.compile(
    rf"\\[cdt]?frac\s*(?:{_BRACED_NUMBER}\s*{_BRACED_NUMBER}"
    r"|\s([0-9])\s*([0-9])(?![0-9])|([0-9])\s*([0-9])(?![0-9]))"
)
_OTHER_FRACTION = re.compile(_UNREAD_FRACTION)
_INVISIBLE_COMMAND = re.compile(
    r"\^\s*(?:\{\s*)?\\circ\b|\\(?:boxed|text[a-z]*|math[a-z]+|mbox|left|right|displaystyle|q?quad"
    r"|degree|underline|fbox|hbox|bm|boldsymbol)(?![a-zA-Z])|\\[ ()\[\]]"
)
_ABOUT_EQUAL = re.compile(r"\\(?:approx|simeq|sim)(?![a-zA-Z])")
_LATEX_SPACE = re.compile(r"\\[,;:]")


def parse_number(text: str | None) -> Fraction | None:
    """The number that `text` states, or None where it states none, or more than one.

    `text` is an answer by itself, such as `$1,000.00`, `18 dollars`, `\\frac{1}{2}` or `x = 18`.
    Percent signs and units are dropped (`18%` is 18).
    """
    return None if text is None else _read_line(_clean(text))


def check_marker(marker: str) -> str:
    """The marker. Raises ValueError for an empty one, and for `\\boxed{}` written out."""
    if not marker:
        raise ValueError(
            f"marker {marker!r} is empty: use 'boxed', or the text that the answer follows, such "
            "as '####'"
        )
    if marker.startswith("\\boxed") or (marker.lower() == "boxed" != marker):
        raise ValueError("the marker of \\boxed{} is called 'boxed'")
    return marker


def extract_answer(text: str | None, mode: Mode, marker: Marker = "####") -> Fraction | None:
    """The answer that a completion gives, or None where it gives none.

    Never raises for any text. `marker` matters to `strict` alone; see the top of this module.
    Raises ValueError for an unknown mode, and for a marker as `check_marker` does; TypeError for a
    `text` that is none, such as the NaN of a table's empty cell.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is unknown: take {' or '.join(map(repr, get_args(Mode)))}")
    if mode == "strict":
        check_marker(marker)
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"a completion should be text or None, found {type(text).__name__}")
    if mode == "flexible":
        return _last_number(_clean(text))
    answer = _without_thought(text)
    return _in_last_box(answer) if marker == "boxed" else _after_marker(answer, marker)


def contradicts_itself(text: str, marker: Marker = "####") -> bool:
    """Whether a marker after the one that `strict` reads states another number.

    Before a new question begins, that is: a line with `Question:` or `Q:`. Of several boxes the
    last is the answer, so they contradict nothing.
    """
    answer = _without_thought(text)
    if marker == "boxed" or answer.count(marker) < 2:
        return False
    values = [_read_line(line) for line in _answer_lines(answer, marker)]
    return any(value not in (None, values[0]) for value in values[1:])


def is_correct(
    text: str | None, gold: str | int | Fraction, mode: Mode, marker: Marker = "####"
) -> bool:
    """Whether the completion's answer equals `gold` exactly.

    Raises DataError when `gold` is text that states no number, or neither text nor an exact number;
    ValueError as `extract_answer` does.
    """
    return extract_answer(text, mode, marker) == parse_gold(gold)


def parse_gold(gold: str | int | Fraction) -> Fraction:
    """The reference answer as a number; text may be a worked answer that ends in `#### 18`.

    A fraction must be in lowest terms. Raises DataError when it is text that states no number, or
    neither text nor an exact number.
    """
    if not isinstance(gold, str | int | Fraction):
        raise DataError(
            f"gold answer {gold!r:.80} is not a number: it is of type {type(gold).__name__}, "
            "expected text such as '18', an int or a Fraction (a float is not exact)"
        )
    if isinstance(gold, int | Fraction):
        return Fraction(gold)
    value = parse_number(gold.rpartition("####")[2])
    if value is None:
        raise DataError(
            f"gold answer {gold[:80]!r} is not a number: fix the dataset, nothing can be "
            "graded against it"
        )
    return value


# -------------------------------------------------------------------------------- finding the place


def _without_thought(text: str) -> str:
    """What comes after the thought of a reasoning model; all of a text without one."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _after_marker(text: str, marker: str) -> Fraction | None:
    """The number after the first `marker` that a number follows."""
    line = next(_answer_lines(text, marker), None)
    return None if line is None else _read_line(line)


def _answer_lines(text: str, marker: str) -> Iterator[str]:
    """What follows each `marker` that a number follows, until another question begins.

    Headings that count up (`#### 1. Find the eggs`) are passed over where there is anything else.
    """
    headings: list[str] = []
    found = False
    for segment in text.split(marker)[1:]:
        line = _clean(segment.lstrip().partition("\n")[0])
        if _number_begins(line):
            heading = None if marker.strip("#") else _NUMBERED_HEADING.match(line)
            if heading and int(heading.group(1)) == len(headings) + 1:
                headings.append(line)
            else:
                found = True
                yield line
        if (found or headings) and _NEW_QUESTION.search(segment):
            break
    if headings and not found:
        yield headings[0]


def _in_last_box(text: str) -> Fraction | None:
    """The number inside the last `\\boxed{}`."""
    start = None
    for match in BOX.finditer(text):
        start = match.end()
    end = None if start is None else closing_brace(text, start)
    return None if end is None else parse_number(text[start:end])


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed, if it is."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _last_number(text: str) -> Fraction | None:
    """The last number of a cleaned text."""
    run = None
    for match in _RUN.finditer(text):
        run = match
    if run is None:
        return None
    number = _NUMBER.fullmatch(text, run.start(), run.end())
    before = text[max(0, run.start() - 32) : run.start()]
    prefix = _PREFIX.search(before)
    if number is None or prefix is None:
        return None
    outside = before[: prefix.start()]
    starts_anew = re.match(_CURRENCY, prefix.group())
    if _NEGATED.search(outside) or (_JOINED_BEFORE.search(outside) and not starts_anew):
        return None
    if number.group(2) and _WHOLE_BEFORE.search(outside):
        return None
    if _LAST_GROUP.match(number.group()) and _GROUPS_BEFORE.search(before):
        return None
    if _SIGN_APART.search(outside):
        return None
    if number.group(2) and _CUT_OFF.match(text, number.end()):
        return None
    return _value(prefix, number, text)


# ------------------------------------------------------------------------------- reading the number


def _read_line(line: str) -> Fraction | None:
    """The one number of a cleaned line: its first sentence, the last side of an equation.

    Or what stands before the equation: `18, which leaves 20 - 18 = 2`, `18 (20 - 18 = 2)`.
    """
    # A full stop ends the answer only after it: "Rs. 5" and "No. 5" have not begun.
    first_digit = re.search(_DIGIT, line)
    if first_digit is None:
        return None
    end = _SENTENCE_END.search(line, first_digit.end())
    sentence = line[: end.start()] if end else line
    if re.search(r"[<>!]=|[≠≤≥±]", sentence):
        return None
    sentence = _without_asides(sentence, first_digit.end())
    *before, side = _EQUALS.split(sentence)
    if not before:
        return _only_number(side)
    # Not the last of two statements: x = 18, y = 3.
    one = not (_NAME.search(before[0]) or any(map(_ANOTHER_STATEMENT.search, before[1:])))
    answer = _only_number(side) if one else None
    first = _BRACKETED.sub(lambda match: " " * len(match.group()), before[0])
    clause = _CLAUSE.search(first, first_digit.end())
    if clause is None or not _sign(first):
        return answer
    stated = _only_number(before[0][: clause.start()])
    return stated if stated == answer or not _number_begins(sentence, clause.end()) else None


def _without_asides(text: str, start: int) -> str:
    """Without the brackets after `start` that hold an equation; nothing if one is never closed.

    After an operator, a bracket that is never closed is arithmetic with a slip.
    """
    if not _EQUALS.search(text):
        return text
    kept: list[str] = []
    depth = end = 0
    opened = start
    for bracket in _BRACKET.finditer(text, start):
        if bracket.group() in "([":
            opened = opened if depth else bracket.start()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0 and _EQUALS.search(text, opened, bracket.end()):
                kept.append(text[end:opened])
                end = bracket.end()
    if depth and _EQUALS.search(text, opened) and text[:opened].rstrip()[-1:] not in "+-*/×÷·":
        return ""
    return " ".join([*kept, text[end:]])


def _only_number(side: str) -> Fraction | None:
    """The number that a text begins with, where it is the only one."""
    sign = _sign(side)
    number = _NUMBER.match(side, sign.end()) if sign else None
    if sign is None or number is None or re.search(_DIGIT, side[number.end() :]):
        return None
    return _value(sign, number, side)


def _number_begins(text: str, start: int = 0) -> bool:
    """Whether a number begins at `start`, or what is assigned one: `x = 18` is as good as `18`."""
    assigned = _ASSIGNED.match(text, start)
    return _sign(text, assigned.end() if assigned else start) is not None


def _sign(text: str, start: int = 0) -> re.Match[str] | None:
    """The signs and currencies of a number that begins at `start`, but for decoration."""
    return _SIGN.match(text, _DECORATION.match(text, start).end())  # type: ignore[union-attr]


def _value(sign: re.Match[str], number: re.Match[str], text: str) -> Fraction | None:
    """The value of a matched number, unless its signs or what follows it make it another thing."""
    rest = text[number.end() : number.end() + 64]
    suffix = _SUFFIX.match(rest)
    if suffix is not None:
        letters = suffix.group()
        one = len(letters) == 1 and not _OTHER_SCRIPT.match(letters)
        if one and letters not in _UNIT_LETTERS or letters.lower() in _NOT_UNITS:
            return None
    if _CHANGES_THE_NUMBER.match(rest) or (sign.group(1) and sign.group(2)):
        return None
    if _MULTIPLIES_MONEY.match(rest) and re.search(_CURRENCY, sign.group()):
        return None
    value = _decimal(number.group(1))
    if number.group(2) is not None:
        value = _fraction(value, _decimal(number.group(2)))
    if value is None:
        return None
    return -value if "-" in (sign.group(1), sign.group(2)) else value


def _fraction(numerator: Fraction | None, denominator: Fraction | None) -> Fraction | None:
    """The fraction, where it is in lowest terms; else it is a division that was left undone."""
    if numerator is None or not denominator:
        return None
    value = numerator / denominator
    in_lowest_terms = (value.numerator, value.denominator) == (numerator, denominator)
    return value if in_lowest_terms and denominator > 1 else None


def _decimal(text: str) -> Fraction | None:
    """Digits with at most one point and well-formed grouping; None beyond MAX_DIGITS digits."""
    whole, _, decimals = text.replace(",", "").replace(THIN_SPACE, "").partition(".")
    whole, decimals = whole.lstrip("0"), decimals.rstrip("0")
    if len(whole) + len(decimals) > MAX_DIGITS:
        return None
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def _clean(text: str) -> str:
    """Unicode look-alikes, LaTeX and markdown reduced to plain ASCII around the digits."""
    text = text.translate(_NORMALIZE)
    if "\\" in text or "{" in text:
        text = text.replace("{,}", ",").replace("\\!", "")
        text = text.replace("\\$", "$").replace("\\%", "%")
        text = _ABOUT_EQUAL.sub("≈", _LATEX_SPACE.sub(THIN_SPACE, text))
        text = _MIXED_FRACTION.sub(FOREIGN, text)
        text = _FRACTION.sub(_plain_fraction, text)
        text = _OTHER_FRACTION.sub(FOREIGN, text)
        text = _INVISIBLE_COMMAND.sub(" ", text)
        text = text.replace("{", " ").replace("}", " ")
    text = _CALCULATOR.sub(" ", text)
    text = _EMPHASIS.sub(" ", text.replace("**", " "))
    if "^" in text:
        text = _POWER_OF_A_UNIT.sub(r"\1", text)
    return _DIVISION.sub("/", text) if "/" in text else text


def _plain_fraction(match: re.Match[str]) -> str:
    numerator, denominator = (part for part in match.groups() if part is not None)
    if denominator.startswith("-"):
        numerator, denominator = f"-{numerator}".removeprefix("--"), denominator[1:]
    return f"{numerator}/{denominator}"
