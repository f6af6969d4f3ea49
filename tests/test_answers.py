"""What counts as an answer, and what does not. Every case stands by itself, after the marker, at
the end of a sentence, and on a last line of its own."""

from __future__ import annotations

import re
import sys
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gsm8k_core.answers import (
    Mode,
    check_marker,
    contradicts_itself,
    extract_answer,
    is_correct,
    parse_gold,
    parse_number,
)
from gsm8k_core.errors import DataError

MODES: list[tuple[Mode, str, str]] = [
    ("strict", "####", "So she pays 7.\n#### {}"),
    ("strict", "boxed", "So 7, \\boxed{{{}}}."),
    ("strict", "The answer is", "So she pays 7. The answer is {}"),
    ("flexible", "####", "So of 7, it is {}"),
    ("flexible", "####", "So she sold 7 of them.\n{}"),
    ("flexible", "####", "Total cost (USD)\n{}"),
]

EIGHTEEN = [
    "18", "18.00", "018", "18.", "$18", "$18.00", "+18", "18 dollars", "18%", "18 %", "18\\%",
    "**18**", "*18*", "`18`", "\"18\"", "_18_", "(18)", "\\boxed{18}", "\\text{18}", "$18$",
    "$$18$$", "\\(18\\)", "\\$18", "18\\text{ dollars}", "18^\\circ", "18 °C", "18€", "€18",
    "€ 18", "US$18", "5 + 13 = 18", "36/2 = 18", "\\frac{36}{2} = 18", "18!",
    "18,", "18;", "18...", "18, of course", "18-inch", "18km", "18 m", "18m", "$18/hour", "~18",
    "１８", "18\u200e", "\u200f18", "18\u200b", "\u206618\u2069", "18\0", "\ufeff18", "18\ud800",
    "18<|im_end|>", "18</s>", "**18** dollars", "*18* dollars", "Answer: 18", "the answer is 18",
    "\\textbf{18}", "\\mathbf{18}", "18\\ dollars", "18 USD", "$18.00 USD", "\\approx 18",
    "1️⃣8️⃣", "١٨", "18\u2028", "18\x7f", "٠18", "\\boxed{\\boxed{18}}", "18 cm^2", "18cm²",
    "18 m²", "18 m³", "18 ft^2", "18\\text{ cm}^2", "18\\,\\text{m}^{2}", "18 m/s^2", "18 units^2",
    "18 cm^2.", "Rs. 18", "Rs 18", "\\text{USD }18", "USD 18", "US $18", "A$18", "₩18", "= 18",
    "x = 18", "x = $18", "\\underline{18}", "\\fbox{18}", "\\sim 18", "about 18",
    "approximately $18", "$18\\text{ m}$", "$18 m$", "$18\\text{ m}.$", "18 mm", "18 miles",
    "18 points", "18 the", "18 square feet", "18 squares", "18元", "18円", "18個", "18원", "18千克",
    "18 元", "18人，谢谢", "18元。", "18ก",
]  # fmt: skip
OTHERS = [
    ("-$5", -5),
    ("−5", -5),
    ("–5", -5),
    ("$-5", -5),
    ("-5.0", -5),
    ("1,000", 1000),
    ("$1,234,567.50", Fraction(2469135, 2)),
    ("\\$1{,}000", 1000),
    ("1\\,000", 1000),
    ("1\u202f000", 1000),
    ("1\u00a0000", 1000),
    ("\\frac{1}{2}", Fraction(1, 2)),
    ("-\\frac{1}{2}", Fraction(-1, 2)),
    ("\\frac12", Fraction(1, 2)),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("0.1", Fraction(1, 10)),
    ("0", 0),
    ("-0", 0),
    ("3/4", Fraction(3, 4)),
    ("-7/3", Fraction(-7, 3)),
    ("1,001/2", Fraction(1001, 2)),
    ("\\frac{-7}{-3}", Fraction(7, 3)),
    ("\\dfrac{7}{3}", Fraction(7, 3)),
    ("1/ 3", Fraction(1, 3)),
    ("1 /3", Fraction(1, 3)),
    ("1\u2009/\u20093", Fraction(1, 3)),
    ("1. / 3", Fraction(1, 3)),
    ("1/3 cup", Fraction(1, 3)),
    ("\\$1{,}000.50", Fraction(2001, 2)),
    ("\\frac{1}{-2}", Fraction(-1, 2)),
    ("\\tfrac{1,000}{ 3 }", Fraction(1000, 3)),
    ("1,000,000", 1_000_000),
    ("\u22121,000", -1000),
    ("-18%", -18),
    ("$-\\$5$", -5),
    ("18\\;000", 18000),
    ("1\\:234\\:567", 1234567),
    ("1٬000", 1000),
    ("١٬٠٠٠٫٥", Fraction(2001, 2)),
    ("1٫5", Fraction(3, 2)),
    ("\\cfrac{1}{3}", Fraction(1, 3)),
    ("1 / 3", Fraction(1, 3)),
    ("-A$5", -5),
    ("Rs. 1,000", 1000),
    ("$-Rs. 5$", -5),
]
REFUSED = [
    "18½", "18 ½", "½", "18²", "18^2", "18^{2}", "①", "1, 18", "1,18,", "10,00", "1,0000",
    "0,500", "1,000,00", "1.000,50", "18:00", "18-20", "18 million", "18 thousand", "18k", "18M",
    "18x", "18 x", "18*x", "18 * x", "18th", "2nd", "18 and a half", "18.5.2", "9/11/2001", "1/0",
    "36/0.0", "1e5", "18e3", "1.8e1", "--5", "-$-5", "x18", "2\\frac{1}{2}", "18\\pi", "18 + x",
    "negative 18", "minus 18", "18\\sqrt{2}", "18 1/2", "18 ½ cups", "±18", "√18", "18万", "18'6",
    "0x18", "1_000", "1'000", "1,00,000", "18B", "18-07", "18÷2", "\\frac{x}{18}", "\\frac3{18}",
    "\\frac{\\frac{36}{2}}{18}", "-\\frac{-36}{2}", "1\0" "8 18½",
    "36/2", "84/12", "2/4", "18/1", "0/18", "-36/2", "36 / 2", "\\frac{36}{2}", "\\dfrac{36}{2}",
    "\\cfrac{36}{2}", "\\frac{-36}{-2}", "\\frac{18}{1}", "4.5/1", "1.5/2", "1/0.5", "1,000/2",
    "7/3 =", "7/3 = ?", "\\frac{7}{3} =", "7/3 ≈",
    "1 000", "10 000", "1 234 567", "1 234\u2009567", "1\u2009 000", "10\\ 000", "1~000",
    "1 000.50", "1·5", "1⋅5", "- 18", "– 18", "= - 18", "- $18", "36 / 2 / 1", "36/0 ", "1 36 / 2",
    "18 and 3/4",
    "18 and three quarters", "18 and two thirds", "18 and half", "18 and a fifth", "18 point five",
    "18 squared", "18 cubed", "18 factorial", "18 lakh", "18 lakhs", "18 crore", "$18 bn", "$18 B",
    "$18 b", "$1.8 mil", "$18m", "$18 m", "US$18m", "€18 m", "Rs. 18 m", "\\$18k", "$18 grand",
    "18 th", "18 B", "18 millions", "18 thousandths", "x^18", "x²", "18²", "18 x^2", "18x²",
    "18 cm^2.5", "18 cm^23", "18 sum^2", "1 \u2009000", "18万元", "18 万", "18億円", "18千",
    "18만원", "18半", "负18", "マイナス18", "第18", "4分之18", "3点18", "3月18日", "18π", "π18",
    "18𝑥", "𝑥18", "18к", "18，19", "百18", "18é", "é18",
]  # fmt: skip
MIRRORS = [  # what is right for a gold answer, and what looks like it and is not
    ("18", "18.00", "18.01"),
    ("18", "018", "180"),
    ("18", "18.", ".18"),
    ("18", "18..", "1.8."),
    ("18", "$18", "-$18"),
    ("18", "$18", "18 cents and $1"),
    ("-5", "-$5", "$5"),
    ("-5", "$-5", "$5-"),
    ("-5", "−5", "5"),
    ("5", "5", "−5"),
    ("1000", "1,000", "10,00"),
    ("1000", "1,000", "1,00"),
    ("1000", "1,000", "1, 000"),
    ("1000", "\\$1{,}000", "\\$1{,}00"),
    ("1000", "1\u202f000", "1\u202f00"),
    ("18", "**18**", "**18**2"),
    ("18", "**18**", "18**2"),
    ("18", "18 dollars", "18 thousand dollars"),
    ("18", "18 dollars", "18 and a half dollars"),
    ("18", "18%", "0.18"),
    ("18", "18 m", "18 M"),
    ("18", "18-inch", "18-20"),
    ("18", "18", "18½"),
    ("18", "18", "18²"),
    ("18", "18", "1, 18"),
    ("18", "18", "18:00"),
    ("18", "36/2 = 18", "36/2"),
    ("7", "84/12 = 7", "84/12 ="),
    ("0.75", "3/4", "4/3"),
    ("0.75", "3/4", "3/0"),
    ("0.75", "3/4", "3/4/1"),
    ("0.75", "3/4", "1 3/4"),
    ("0.75", "3/4", "6/8"),
    ("0.75", "3 / 4", "4 / 3"),
    ("2", "2", "18 cm^2"),
    ("0", "0", "18 000"),
    ("567", "567", "1 234 567"),
    ("18", "18", "- 18"),
    ("18", "18 m", "$18 m"),
    ("18", "$18 m$", "$18 m"),
    ("18", "18 cm²", "18²"),
    ("18", "18 and the rest", "18 and half"),
    ("0.5", "\\frac{1}{2}", "1\\frac{1}{2}"),
    ("0.5", "\\frac{1}{2}", "\\frac{2}{1}"),
    ("0.5", "\\frac12", "\\frac123"),
    ("18", "\\boxed{18}", "\\boxed{1}8"),
    ("18", "5 + 13 = 18", "18 = 5 + 13"),
    ("18", "x = 18", "x = 18, y = 3"),
    ("18", "18\0", "1\08"),
    ("18", "18\u200e", "18\u200e½"),
    ("18", "18</s>", "18</s>9"),
]


@pytest.mark.parametrize("text", EIGHTEEN)
def test_what_a_person_would_read_as_eighteen_is_eighteen(text: str) -> None:
    assert parse_number(text) == 18
    for mode, marker, sentence in MODES:
        assert extract_answer(sentence.format(text), mode, marker) == 18, (mode, marker)


@pytest.mark.parametrize(("text", "value"), OTHERS)
def test_signs_separators_and_fractions_are_read_exactly(text: str, value: Fraction) -> None:
    assert parse_number(text) == value
    for mode, marker, sentence in MODES:
        assert extract_answer(sentence.format(text), mode, marker) == value, (mode, marker)


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_single_number_is_no_answer(text: str) -> None:
    assert parse_number(text) is None
    for mode, marker, sentence in MODES:
        assert extract_answer(sentence.format(text), mode, marker) is None, (mode, marker)


@pytest.mark.parametrize(("gold", "right", "wrong"), MIRRORS)
def test_every_accepted_form_has_a_neighbour_that_is_not(gold: str, right: str, wrong: str) -> None:
    for mode, marker, sentence in MODES:
        assert is_correct(sentence.format(right), gold, mode, marker), (mode, marker)
        if wrong == "18</s>9" and mode == "strict":
            continue  # strict stops at the end token
        assert not is_correct(sentence.format(wrong), gold, mode, marker), (mode, marker)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # What stands before an equation is the answer, where it is one by itself.
        ("18 dollars, which leaves 20 - 18 = 2", 18),
        ("18 (check: 18 - 16 = 2)", 18),
        ("18 [20 - 18 = 2 are left]", 18),
        ("18 (check: 18 - (8 + 8) = 2)", 18),
        ("18 (x = 2) dollars", 18),
        ("18 (= 9 + 9)", 18),
        ("$1,800, so that 2,000 - 1,800 = 200", 1800),
        ("18 since he has 20 - 18 = 2", 18),
        ("18, as 9 + 9 = 18", 18),
        ("x = 18 (check: 18 - 16 = 2)", 18),
        ("5 + 13 = 18 (check: 20 - 18 = 2)", 18),
        ("18 dollars, which is 2 * 9 = 18, so 20 - 18 = 2", 18),
        # Never one of several.
        ("18, y = 3", None),
        ("18; y = 3", None),
        ("18 y = 3", None),
        ("18 and y = 3", None),
        ("18, 19, 20 = 21", None),
        ("18,19,20 = 21", None),
        ("T=18 A=20", None),
        ("T = 18 \\\\ A = 20", None),
        ("Tom = 18 Ann = 20", None),
        ("x = 18 y = 3", None),
        ("18 because 20 - 18 = 2", None),
        ("9 + 9, which leaves 20 - 18 = 2", None),
        ("18 (check: 18 - 16 = 2", None),  # cut short
        ("18 (20 - 18 = 2) of 20", None),
        # An equation all the same.
        ("18, 5 + 13 = 18", 18),
        ("2 + (4 * (2 + 2) = 18", 18),
        ("18 because 36/2 = 18", 18),
        ("5 boxes of 3 and 3 more so 5 * 3 + 3 = 18", 18),
        ("2(9) = 18", 18),
        ("3 (4 + 2) = 18", 18),
        ("5 (eggs) + 13 (eggs) = 18", 18),
        ("5 (old, brown) + 13 = 18", 18),
        ("5 eggs and 13 eggs = 18 eggs", 18),
        ("(5 + 13 = 18)", 18),
        ("2 (so 9 + 9 = 18) + 16 = 18", 18),
        ("1,000 - 982 = 18", 18),
        ("0.3 hours = 18 minutes", 18),
        ("x = 0.3 hours = 18 minutes", 18),
        ("x = 2 s * 9 m/s = 18 m", 18),
    ],
)
def test_an_equation_beside_the_answer_is_not_taken_for_it(text: str, value: int | None) -> None:
    assert parse_number(text) == value
    for mode, marker, sentence in MODES:
        if mode == "strict":
            assert extract_answer(sentence.format(text), mode, marker) == value, marker


@pytest.mark.parametrize("text", ["", "####", "no number", "\\boxed{}", "#### \n", "-", "$", None])
def test_a_text_without_a_number_has_no_answer(text: str | None) -> None:
    assert parse_number(text) is None
    for mode, marker, _ in MODES:
        assert extract_answer(text, mode, marker) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("####18", 18),
        ("#### 18", 18),
        ("####\n18", 18),
        ("**#### 18**", 18),
        ("#### 18\n\nQuestion: 5 + 5?\nAnswer: #### 10", 18),  # runs on into another question
        ("#### Step 1: 9 eggs\n#### Step 2: 2 dollars\n#### 18", 18),  # markdown headings
        ("#### Final answer: 18", 18),
        ("#### 18. She keeps 3.", 18),
        ("#### 18元。她还剩3个。", 18),
        ("18", None),
        ("\\boxed{18}", None),
        ("### 18", None),
        ("#### 18 or 20", None),
        ("#### 1, 18\n#### 18", None),  # the first number given is not the one to pass over
        ("#### \\boxed{18}", 18),
        ("#### = 18", 18),
        ("#### **x = 18**", 18),
        ("#### x = 18, y = 3", None),
        ("##### 1. Find the eggs\n9 * 2 = 18\n#### 18", 18),
        ("#### 1: eggs\n9 * 2 = 18\n#### 18", 18),
        ("#### 1 - eggs\n9 * 2 = 18\n#### 18", 18),
        ("#### (1) eggs\n9 * 2 = 18\n#### 18", 18),
        ("#### 18: that is all", 18),
        ("#### 1. Find the eggs left\n16 - 7 = 9\n#### 2. Multiply\n9 * 2 = 18\n#### 18", 18),
        ("#### **1) Find**\n#### 2) Multiply\n#### 18. She keeps 3.", 18),
        ("#### 1. She keeps one.", 1),
        ("#### 1. Find\n#### 2. Multiply", 1),  # nothing but headings
        ("#### 1. She keeps one.\n\nQuestion: 5 + 5?\nAnswer: #### 10", 1),
        ("#### 1. One.\n\nQ: 5 + 5?\nA: #### 10", 1),
        ("#### 18. She keeps 3.\n#### 3. She sells them.", 18),  # no heading: nothing counts up
        ("#### 1.5 eggs\n#### 18", Fraction(3, 2)),
        ("#### $1. So\n#### 18", 1),
        ("#### Let x = 5\n#### x 5\n#### 18", 18),  # headings
        ("#### - 18\n#### 7", 7),  # no number follows, a list begins
    ],
)
def test_strict_reads_after_the_first_marker_that_a_number_follows(
    text: str, value: Fraction | None
) -> None:
    assert extract_answer(text, "strict") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\boxed{7} then \\boxed{18}", 18),
        ("\\boxed {18}", 18),
        ("\\boxed{\\frac{36}{2}}", None),
        ("\\boxed{\\frac{37}{2}}", Fraction(37, 2)),
        ("\\boxed{x = 18}", 18),
        ("\\boxed{x = 18, y = 3}", None),
        ("\\boxed{x = 18 and y = 3}", None),
        ("\\boxed{9 + 9 = 1{,}8 = 18}", 18),
        ("\\boxed{With 3 in each of 6 boxes, there are 3 * 6 = 18}", 18),
        ("\\boxed{18 \\text{ eggs}} in 2 days", 18),
        ("\\boxed{\\boxed{18}}", 18),
        ("\\boxed{7} then \\boxed{18", None),  # cut short
        ("#### 18", None),
        ("18", None),
    ],
)
def test_strict_with_boxes_reads_the_last_closed_box(text: str, value: Fraction | None) -> None:
    assert extract_answer(text, "strict", "boxed") == value


@pytest.mark.parametrize(
    ("marker", "text", "value"),
    [
        ("The answer is", "The answer is 18. The answer is 7.", 18),
        ("The answer is", "The answer is not 7. The answer is: **$18**", 18),
        ("The answer is", "The answer is\n18", 18),
        ("The answer is", "The answer is 1. She keeps it. The answer is 7.", 1),  # no heading
        ("The answer is", "The answer is about $18.", 18),
        ("The answer is", "The answer is about twice as much, 18", None),
        ("The answer is", "the answer is 18", None),
        ("The answer is", "#### 18", None),
        ("<answer>", "<think>7</think><answer>18</answer>", 18),
        ("A.*", "AB 7. A.* 18", 18),  # a text, not a pattern
    ],
)
def test_strict_with_a_configured_marker_reads_after_the_first_that_a_number_follows(
    marker: str, text: str, value: int | None
) -> None:
    assert extract_answer(text, "strict", marker) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\nI would end with #### 9. Wait.\n</think>\n\nShe sells 18.\n#### 18", 18),
        ("I would end with #### 9. Wait.\n</think>\n#### 18", 18),  # the prompt has opened it
        ("<think>#### 9</think>#### 7<think>no</think>#### 18", 18),
        ("<think>\n#### 18\nHmm, let me check again", None),  # cut short before any answer
        ("<think>#### 18</think>She sells 18.", None),
        ("#### 18\n<think>Was that right? #### 9", 18),
        ("<think>#### 9</think>Hm. <think>#### 7", None),
    ],
)
@pytest.mark.parametrize("marker", ["####", "boxed", "The answer is"])
def test_strict_reads_the_answer_of_a_reasoning_model_behind_its_thought(
    text: str, value: int | None, marker: str
) -> None:
    asked_for = r"\\boxed{\1}" if marker == "boxed" else rf"{marker} \1"
    text = re.sub(r"#### (\d+)", asked_for, text)
    assert extract_answer(text, "strict", marker) == value
    assert not contradicts_itself(text, marker)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 18\n#### 19", True),
        ("#### 18\nNo, wait.\n#### 18\n#### 19", True),
        ("#### 18\n#### 18.00", False),
        ("#### 18\n#### that is it", False),
        ("#### 18\n\nQuestion: And two more?\n#### 20", False),
        ("#### 18 or 19", False),
    ],
)
def test_a_later_mark_with_another_number_contradicts_the_answer(text: str, expected: bool) -> None:
    assert contradicts_itself(text) == expected
    assert contradicts_itself(text.replace("####", "The answer is"), "The answer is") == expected
    assert not contradicts_itself(re.sub(r"#### (\d+)", r"\\boxed{\1}", text), "boxed")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 eggs and sells 18.", 18),
        ("It costs $18, she said", 18),
        ("10-5=5", 5),
        ("10 - 5", 5),
        ("48/2 = <<48/2=24>>24 clips", 24),
        ("from 9 to 18:00", None),
        ("the options are 1, 18", None),
        ("18\n\n", 18),
        ("3, 5, and 18", 18),
        ("The total is\n18", 18),
        ("She sold 5 eggs.\n18", 18),
        ("Total cost (USD)\n18", 18),
        ("18 eggs\n18", 18),
        ("of 7 \n37/2", Fraction(37, 2)),  # no mixed number
        ("so that's 84/12 = ", None),  # cut off before the quotient
        ("so that's 7/3 = ", None),
        ("so that's $\\frac{7}{3} = $", None),
        ("so half a cup, 1/2 = a half", Fraction(1, 2)),
        ("9 + 9 =", 9),
        ("the options are 1,\n18", None),
        ("in 5\n100", 100),  # no group of 5 100
        ("5 * 100", 100),
        ("in 7 1800", 1800),  # four digits are no group
        ("The answer is - 18", None),
        ("The answer is: - 18", None),
        ("The answer is \\( - 18 \\)", None),
        ("- 18 eggs", None),
        ("#### - 18", None),
        ("Answer - 18", 18),  # a dash
        ("of 25 eggs - 18", 18),
        ("The area is 18 cm^2, that is to say 18 square cm", 18),
        ("The area is 18 cm^2, not cm^3.", 18),
        ("It costs 1,\u202f$18", 18),
        ("xUSD18", None),
        ("答案是18。", 18),
        ("答えは18円です。", 18),
        ("답은 18원입니다.", 18),
        ("她一共赚了18元，谢谢", 18),
        ("答案是-18。", -18),
        ("答案是 - 18", None),
        ("答案是负18。", None),
    ],
)
def test_flexible_reads_the_last_number(text: str, value: Fraction | None) -> None:
    assert extract_answer(text, "flexible") == value


def test_numbers_are_exact() -> None:
    # As floats 0.1 + 0.2 != 0.3 and 2**53 + 1 == 2**53.
    assert is_correct("#### 0.3", "0.30", "strict")
    assert not is_correct("#### 9007199254740993", "9007199254740992", "strict")
    assert not is_correct("#### 0.333333333333333333333", Fraction(1, 3), "strict")
    assert is_correct("#### 1/3", Fraction(1, 3), "strict")


@pytest.mark.parametrize("gold", ["", "eighteen", "1, 18", "10,00", "18:00", "nan", "inf"])
def test_a_gold_answer_that_is_no_number_is_an_error_and_not_a_wrong_answer(gold: str) -> None:
    with pytest.raises(DataError, match="is not a number"):
        is_correct("#### 18", gold, "strict")


def test_a_gold_answer_may_be_a_worked_one() -> None:
    for gold in ("5 + 13 = 18, so 18\n#### 18", "#### 18", "of 7 ####18\n"):
        assert parse_gold(gold) == 18
        assert is_correct("#### 18", gold, "strict")
        assert not is_correct("#### 7", gold, "flexible")
    with pytest.raises(DataError, match="'18 #### none' is not a number"):
        parse_gold("18 #### none")


def test_a_gold_answer_may_be_a_whole_number() -> None:
    for mode, marker, sentence in MODES:
        assert is_correct(sentence.format("18.0"), 18, mode, marker)
        assert not is_correct(sentence.format("18.0"), 19, mode, marker)
    assert parse_gold(-18) == -18


@pytest.mark.parametrize("gold", [18.0, np.int64(18), ["18"], None])
def test_a_gold_answer_that_is_neither_text_nor_exact_is_an_error_that_says_so(gold: Any) -> None:
    with pytest.raises(DataError, match=f"of type {type(gold).__name__}, expected text such as"):
        is_correct("#### 18", gold, "strict")


@pytest.mark.parametrize("mode", ["Strict", "", "lm_eval_strict", None])
def test_an_unknown_mode_is_an_error_that_names_it(mode: Any) -> None:
    for text in ("#### 18", None):
        with pytest.raises(ValueError, match=f"mode {mode!r} is unknown: take 'strict' or 'flexi"):
            extract_answer(text, mode)
        with pytest.raises(ValueError, match="is unknown"):
            is_correct(text, "18", mode)


@pytest.mark.parametrize("mode", ["strict", "flexible"])
def test_a_completion_that_is_no_text_is_an_error_that_says_so(mode: Any) -> None:
    with pytest.raises(TypeError, match="a completion should be text or None, found float"):
        extract_answer(float("nan"), mode)  # type: ignore[arg-type]


def test_an_empty_marker_is_an_error_that_says_what_to_take() -> None:
    for text in ("#### 18", None):
        with pytest.raises(ValueError, match="marker '' is empty: use 'boxed', or the text"):
            extract_answer(text, "strict", "")
    assert extract_answer("It is 18", "flexible", "") == 18  # which reads no marker


@pytest.mark.parametrize("marker", ["\\boxed{}", "\\boxed"])
def test_the_marker_of_a_box_is_known_by_its_name_alone(marker: str) -> None:
    assert is_correct("\\boxed{18}", "18", "strict", "boxed")
    with pytest.raises(ValueError, match=r"the marker of \\boxed\{\} is called 'boxed'"):
        is_correct("\\boxed{18}", "18", "strict", marker)


def test_nothing_is_never_right() -> None:
    assert not is_correct(None, "0", "strict")
    assert not is_correct("", "0", "flexible")


# ------------------------------------------------------------------------------------- round trips

GROUPINGS = [None, ",", "{,}", "\\,", "\\;", "\u202f", "\u00a0", "٬"]
CURRENCIES = ["", "$", "\\$", "€", "£", "US$", "US $", "A$", "₩", "Rs. ", "USD "]
FULLWIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
DIGITS = [{}, FULLWIDTH, ARABIC]
WRAPPERS = [
    "{}", "{},", "{};", "{}!", "**{}**", "*{}*", "`{}`", "_{}_", "({})", '"{}"', "${}$", "$${}$$",
    "\\({}\\)", "\\boxed{{{}}}", "\\text{{{}}}", "\\mathbf{{{}}}", "{} dollars", "{} eggs", "{}%",
    "{} %", "{}\\%", "{}km", "{}-inch", "{}€", "{}\\text{{ cups}}", "{}\0", "{}\u200e",
    "\u2066{}\u2069", "\ufeff{}", "{}\ud800", "{}</s>", "{}<|im_end|>", "{}\n", "{}, of course",
    "~{}", "answer: {}", "{} cm^2", "{}\\text{{ cm}}^2", "{} ft²", "\\underline{{{}}}",
    "\\sim {}", "x = {}",
]  # fmt: skip


FRACTIONS = ["{}/{}", "{} / {}", "\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}"]


@st.composite
def rendered_numbers(draw: st.DrawFn) -> tuple[Fraction, str]:
    """An integer or decimal, and one of the ways in which people and models write it."""
    places = draw(st.integers(0, 5))
    digits = draw(st.integers(-(10**12), 10**12))
    value = Fraction(digits, 10**places)
    if draw(st.booleans()):
        text = plain_number(draw, abs(digits), places)
    else:
        # In lowest terms, with a denominator: else it is a division that was left undone.
        denominator = draw(st.integers(2, 10**5))
        value = Fraction(digits, denominator)
        assume(value.denominator == denominator)
        text = draw(st.sampled_from(FRACTIONS)).format(abs(digits), denominator)
    sign = draw(st.sampled_from(["-", "\u2212", "\u2013"] if digits < 0 else ["", "", "+"]))
    currency = draw(st.sampled_from(CURRENCIES))
    text = draw(st.sampled_from([f"{sign}{currency}{text}", f"{currency}{sign}{text}"]))
    return value, draw(st.sampled_from(WRAPPERS)).format(text)


def plain_number(draw: st.DrawFn, digits: int, places: int) -> str:
    whole, rest = divmod(digits, 10**places)
    grouping = draw(st.sampled_from(GROUPINGS))
    if grouping is None:
        text = "0" * draw(st.integers(0, 2)) + str(whole)
    else:
        text = f"{whole:,}".replace(",", grouping)
    decimals = (f"{rest:0{places}d}" if places else "") + "0" * draw(st.integers(0, 3))
    point = "." if decimals or draw(st.booleans()) else ""
    return f"{text}{point}{decimals}".translate(draw(st.sampled_from(DIGITS)))


@st.composite
def other_numbers(draw: st.DrawFn, value: Fraction) -> Fraction:
    """A number that is not `value`, mostly a near one: what slips in reading make of it."""
    near = [value + 1, value - 1, value * 10, value / 10, -value, value + Fraction(1, 10**6),
            value * 1000, value / 1000, value / 100]  # fmt: skip
    other = draw(st.sampled_from(near) | st.builds(Fraction, st.integers(), st.integers(1, 10**6)))
    assume(other != value)
    return other


@pytest.mark.slow
@given(st.data(), st.sampled_from(MODES))
@settings(max_examples=800)
def test_any_number_in_any_accepted_form_is_right_and_any_other_wrong(
    data: st.DataObject, mode: tuple[Mode, str, str]
) -> None:
    value, form = data.draw(rendered_numbers())
    name, marker, sentence = mode
    text = sentence.format(form)
    assert extract_answer(text, name, marker) == value, text
    assert parse_number(form) == value
    assert is_correct(text, value, name, marker)
    assert not is_correct(text, data.draw(other_numbers(value)), name, marker)


@given(
    st.integers(-(10**6), 10**6),
    st.integers(2, 1000),
    st.integers(2, 9),
    st.sampled_from(FRACTIONS),
    st.sampled_from(MODES),
)
@settings(max_examples=300)
def test_a_fraction_that_can_be_reduced_is_no_answer(
    numerator: int, denominator: int, factor: int, form: str, mode: tuple[Mode, str, str]
) -> None:
    name, marker, sentence = mode
    for parts in ((numerator * factor, denominator * factor), (numerator, 1)):
        text = sentence.format(form.format(*parts))
        assert extract_answer(text, name, marker) is None, text


@given(
    st.text(
        alphabet=st.sampled_from("0123456789,./-$#\\{}=*x ½²\n\0boxedfrac\ud800m~;^"), max_size=60
    )
)
@settings(max_examples=300)
def test_no_text_makes_the_grader_raise(text: str) -> None:
    for mode, marker, _ in MODES:
        answer = extract_answer(text, mode, marker)
        # What was extracted is written to the grades as text; it must read back as itself.
        assert answer is None or parse_gold(str(answer)) == answer


# ------------------------------------------------------------------------------------ hostile sizes

HOSTILE = {
    "nines": "#### {}" + "9" * 100_000,
    "markers": "#### " * 10_000,
    "markers_with_words": "#### x 5\n" * 10_000,
    "open_braces": "\\boxed" + "{" * 5_000,
    "open_boxes": "\\boxed{" * 20_000 + "18",
    "nul": "\0" * 100_000,
    "dots": "1" + "." * 100_000,
    "run": "1-" * 50_000,
    "list": "1," * 50_000,
    "groups": "#### 1" + ",000" * 30_000,
    "fractions": "\\frac{1" * 20_000,
    "spaces": "#### the" + " " * 100_000 + "1" + " " * 100_000 + "/",
    "angles": "<" * 100_000,
    "stars": "*" * 100_001,
    "signs": "-" * 100_000 + "x",
    "equations": "#### 1" + "=x" * 50_000,
    "currency": "#### " + "$" * 100_000,
    "words": "#### " + "a" * 100_000 + "5",
    "thin_spaces": "\\frac{" + "\u2009" * 100_000 + "18",
    "thin_spaces_in_a_number": "\\frac{1" + "\u2009" * 100_000 + "18",
    "degrees": "\\text{18}^" + " " * 100_000 + "18",
    "surrogates": "\ud800" * 100_000 + "18",
    "powers_of_units": "#### 18 m" + " " * 100_000 + "^" + " " * 100_000 + "x",
    "units": "#### 18 " + "m " * 50_000 + "^2",
    "divisions": "#### 36" + " " * 100_000 + "/" + " " * 100_000 + "x",
    "cut_off": "7/3" + " = " * 30_000 + "x",
    "quotients": "#### 36" + " / 2" * 30_000,
    "space_groups": "#### 1" + " 000" * 30_000,
    "signs_apart": "is" + " - " * 30_000 + "18",
    "rupees": "#### " + "Rs." * 30_000 + "18 m",
    "rupees_apart": "#### " + "US " * 30_000 + "$18",
    "assignments": "#### " + "x = " * 30_000 + "18",
    "blanks_and_a_letter": "#### " + "_" * 50_000 + "x" + " " * 50_000,
    "latex_spaces": "18" + "\\;" * 30_000 + "000",
    "asides": "#### 18" + " (x = 2)" * 20_000,
    "open_brackets": "#### 18 = " + "(" * 50_000 + "=" * 50_000,
    "brackets": "#### 18 = " + "([" * 30_000 + "=",
    "clauses": "#### 18" + ", 1" * 30_000 + " = 2",
    "names": "#### x" + " = 18 y" * 20_000 + " " * 50_000 + "x",
    "headings": "".join(f"#### {n}. Find\n" for n in range(1, 10_000)),
    "blank_lines": "#### 1. x" + "\n" * 100_000 + "#### 2",
    "similar": "\\sim" * 30_000 + "18",
    "tildes": "1~" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_shape_of_text_costs_more_than_its_length(name: str) -> None:
    # Quadratic work on 100,000 characters is at least tens of seconds; linear work is hundredths.
    started = time.process_time()
    for mode, marker, _ in MODES:
        extract_answer(HOSTILE[name], mode, marker)
        contradicts_itself(HOSTILE[name], marker)
    assert time.process_time() - started < 5.0


PIECES = st.sampled_from([
    "1", "0", "9", ".", ",", "-", "+", "/", "$", "#", "####", "\\boxed{", "{", "}", "\\frac",
    "\\frac{", "\\frac12", "\\text", "^", "\\circ", "*", "_", "`", " ", "\n", "\t", "\u2009",
    "\u00a0", "=", "≈", "<", "<<", ">>", "<|", "</", "x", "the ", "answer ", "is ", "and ", "½",
    "\\,", "\\!", "{,}", "\\$", "\\", "US$", "%", "e", "(", ")", "'", ":", "×", "minus ",
    "\u200e", "\0", "\ud800", "! a", "m", "cm", "²", "Rs.", "US ", "\\;", "~", "٬", "·",
    "about ", "\\sim", ", ", "[", "]", "because", " y = ", "元", "1. a", "Q:",
])  # fmt: skip


@pytest.mark.slow
@given(st.lists(PIECES, max_size=3), st.lists(PIECES, min_size=1, max_size=3), PIECES)
@settings(max_examples=150)
def test_no_repetition_costs_more_than_its_length(
    before: list[str], unit: list[str], after: str
) -> None:
    repeated = "".join(unit)
    text = "".join(before) + repeated * (20_000 // len(repeated)) + after
    started = time.process_time()
    for mode, marker, sentence in MODES:
        extract_answer(sentence.format(text), mode, marker)
        contradicts_itself(text, marker)
    assert time.process_time() - started < 1.0


def test_a_number_beyond_pythons_limit_is_refused_and_not_raised() -> None:
    text = "9" * (sys.get_int_max_str_digits() + 1)
    assert parse_number(text) is None
    assert parse_number(f"1/{text}") is None
    with pytest.raises(DataError):
        is_correct("#### 1", text, "strict")
    # Zeros that say nothing do not count as digits.
    assert parse_number("0" * 10_000 + "18." + "0" * 10_000) == 18


@pytest.mark.parametrize("marker", ["Boxed", "BOXED", "\\boxed{}"])
def test_the_marker_of_boxes_has_one_name(marker: str) -> None:
    with pytest.raises(ValueError, match="is called 'boxed'"):
        check_marker(marker)
