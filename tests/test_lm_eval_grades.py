"""The harness' grades: equal to lm-evaluation-harness' own filters and metric, run beside them on
its own task files, on every completion."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import lm_eval
import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters import build_filter_ensemble

from gsm8k_core.config import Config
from gsm8k_core.lm_eval_grades import (
    GSM8K_COT_MARKER,
    LmEvalMode,
    lm_eval_answer,
    lm_eval_correct,
    lm_eval_gold,
)
from gsm8k_core.problems import gold_answer

TASK_FILES = {"####": "gsm8k.yaml", "The answer is": "gsm8k-cot.yaml"}
"""The harness' task for each marker of a prompt."""
TASKS: dict[str, dict[str, Any]] = {
    marker: yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / name).read_text(encoding="utf-8")
    )
    for marker, name in TASK_FILES.items()
}
NAMES: dict[LmEvalMode, str] = {
    "lm_eval_strict": "strict-match",
    "lm_eval_flexible": "flexible-extract",
}
MODES: tuple[LmEvalMode, ...] = get_args(LmEvalMode)


def harness_filters(task: dict[str, Any]) -> dict[str, Callable[[str], str]]:
    """A task's chain of filters by name, as the evaluator applies them to one response."""

    def chain(steps: list[dict[str, Any]]) -> Callable[[str], str]:
        components = [
            (step["function"], {k: v for k, v in step.items() if k != "function"} or None)
            for step in steps
        ]
        filters = [make() for make in build_filter_ensemble("chain", components).filters]

        def apply(response: str) -> str:
            responses: Any = [[response]]
            for one in filters:
                responses = one.apply(responses, [{}])
            return list(responses)[0]

        return apply

    return {entry["name"]: chain(entry["filter"]) for entry in task["filter_list"]}


FILTERS = {marker: harness_filters(task) for marker, task in TASKS.items()}
METRICS = {
    marker: {
        key: task["metric_list"][0][key]
        for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    }
    for marker, task in TASKS.items()
}


def harness(text: str, gold: str, mode: LmEvalMode, marker: str) -> bool:
    """What lm-evaluation-harness says of one completion; `gold` is the dataset's worked answer."""
    answer = FILTERS[marker][NAMES[mode]](text)
    metric = METRICS[marker]
    score = exact_match_hf_evaluate(predictions=[answer], references=[gold], **metric)
    return bool(score["exact_match"] == 1.0)


def assert_equal(text: str, gold: str) -> None:
    for marker in TASKS:
        for mode in MODES:
            ours = lm_eval_correct(text, gold, mode, marker)
            assert ours == harness(text, gold, mode, marker), (marker, mode, text, gold)


def test_the_harness_is_the_version_that_the_module_names() -> None:
    assert metadata.version("lm_eval") == "0.4.13"
    for task in TASKS.values():
        assert task["metadata"]["version"] == 3.0
        assert task["metric_list"][0]["metric"] == "exact_match"
    assert [task["task"] for task in TASKS.values()] == ["gsm8k", "gsm8k_cot"]


def test_the_suites_that_follow_the_harness_have_the_marker_of_its_task(config: Config) -> None:
    assert config.suites["gsm8k_8shot_cot"].marker == GSM8K_COT_MARKER
    assert config.suites["gsm8k_lm_eval"].marker is None  # of the prompt, ####
    assert config.prompts["lm_eval_5shot"].answer_marker == "####"


TEXTS = [
    "18",
    "#### 18",
    "####18",
    "#### 18.",
    "#### 18.0",
    "#### 18.00",
    "#### $18",
    "#### -18",
    "#### −18",
    "#### 1,8",
    "#### 1, 18",
    "#### 18,",
    "####  18",
    "#### \n18",
    "#### 018",
    "#### 18\n\nQuestion: 3?\nAnswer: #### 3",
    "x #### y #### 18",
    "#### 18 #### 19",
    "#### 18..",
    "#### .",
    "It is 18.",
    "It is $18.",
    "It is $18.00",
    "$ 18",
    "18$",
    "$18$",
    "18, 19",
    "18,",
    "18 .",
    "18 ..",
    "18 ,",
    "18 $",
    "18 $$",
    "18 $.",
    "-18",
    "--18",
    "- 18",
    "5-18",
    "-$18",
    "$-18",
    "1-8",
    "1e18",
    "١٨",
    "１８",
    "18²",
    "½",
    "1 8",
    "",
    " ",
    ".",
    "..",
    ",,",
    "$$",
    "-",
    "-.",
    "[invalid]",
    "no number",
    "\\boxed{18}",
    "\\boxed{1{,}8}",
    "18\0",
    "\0",
    "\ud800 18",
    "18\u200e",
    "#### 18\u2028",
    "1\u202f8",
    "#### " * 50 + "18",
    "9" * 500,
    "#### " + "9" * 500,
    "$" * 300 + "18",
    "18" + "." * 300,
    "18.\n",
    "18\n.",
    "18 .\n",
    "#### -",
    "#### -,18",
    "#### ,18",
    "#### ..18",
    "#### 1.8.",
    "#### 18-",
]
TEXTS += [text.replace("#### ", "The answer is ") for text in TEXTS if "#### " in text] + [
    "The answer is 18.\n\nQ: 3?\nA: The answer is 3.", "The answer is 1800", "The answer is 180",
    "the answer is 18.", "The answer is $18.", "The answer is: 18.", "The answer is 18\n",
    "The answer is 18 eggs", "The answer is 5\nThe answer is 18.", "The answer is -18 ",
    "The answer is 18\0", "The answer is 180\n", "The answer is 18.0", "The answer is 18.00.",
    "The answer is 18!", "The answer is 1,8.\n", "The answer is 18. #### 7", "#### 18. It is 7.",
]  # fmt: skip
GOLDS = [
    "#### 18", "9 * 2 = 18\n#### 18", "#### -18", "#### 1,8", "18", "1,000", "$18", "18.", "18.0",
    "18\0", "18\n", "18.\n", "#### 18\0", "#### 18.", "x #### y #### 18", "####18", "[INVALID]x",
    ".5", "#### 18 ", "K18", "1\0.\0",
]  # fmt: skip


@pytest.mark.parametrize("gold", GOLDS)
def test_every_form_is_graded_as_the_harness_grades_it(gold: str) -> None:
    for text in TEXTS:
        assert_equal(text, gold)


def test_the_forms_are_right_by_each_grade_and_wrong_by_each() -> None:
    for marker in TASKS:
        for mode in MODES:
            right = [text for text in TEXTS if harness(text, "#### 18", mode, marker)]
            assert 10 < len(right) < len(TEXTS) - 10, (marker, mode)


NUMBER_LIKE = st.text(alphabet="0123456789.,$-# \n", max_size=40)
TEXT = st.lists(
    st.sampled_from(
        [
            "#### ",
            "####",
            "The answer is ",
            "18",
            "1,800",
            "$",
            ".",
            ",",
            "-",
            " ",
            "\n",
            "0",
            "7.5",
            "−",
        ]
    )
    | st.text(max_size=4),
    max_size=12,
).map("".join)
GOLD_NUMBERS = st.integers(-2000, 2_000_000).map(lambda n: f"so <<1+1=2>>2\n#### {n:,}")


@given(NUMBER_LIKE | TEXT | st.text(), GOLD_NUMBERS | st.sampled_from(GOLDS))
@example("#### 18\ud800", "#### 18")
@settings(max_examples=500)
def test_any_text_is_graded_as_the_harness_grades_it(text: str, gold: str) -> None:
    assert_equal(text, gold)


@given(st.integers(-(10**7), 10**7), st.data())
@settings(max_examples=300)
def test_a_completion_that_states_the_gold_number_is_graded_as_the_harness_grades_it(
    n: int, data: st.DataObject
) -> None:
    # Random text is seldom right: here half of the completions are, by one grade or both.
    form = data.draw(
        st.sampled_from(["{}", "{:,}", "${}", "{}.", "{:,}.00", "{}.5", "0{}", "{} eggs", "**{}**"])
    ).format(n)
    before = data.draw(
        st.sampled_from(["#### ", "####", "So it is ", "\\boxed{", "= ", "-", "The answer is "])
    )
    after = data.draw(st.sampled_from(["", ".", "}", "\n", " of 7", ",", "\0", "\n#### 5"]))
    assert_equal(f"5 + 5 = 10. {before}{form}{after}", f"9\n#### {n:,}")


@given(st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=300)
def test_any_gold_is_read_as_the_harness_reads_it(before: str, after: str) -> None:
    gold = f"{before}18{after}"
    prediction = lm_eval_gold(gold)
    # The metric treats predictions as it treats golds: it must leave this one as it is to tell.
    if lm_eval_gold(prediction) == prediction:
        for metric in METRICS.values():
            score = exact_match_hf_evaluate(predictions=[prediction], references=[gold], **metric)
            assert score["exact_match"] == 1.0


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR: folder with the real GSM8K")
def test_golds_of_the_real_gsm8k_are_what_the_harness_reads_in_the_worked_answers() -> None:
    worked = [
        json.loads(line)["answer"]
        for split in ("train", "test")
        for line in (Path(os.environ["GSM8K_DIR"]) / f"{split}.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")
        if line
    ]
    assert len(worked) == 7473 + 1319
    golds = [gold_answer(answer) for answer in worked]
    # The grader has the number alone, the harness the worked answer.
    assert [lm_eval_gold(gold) for gold in golds] == [lm_eval_gold(answer) for answer in worked]
    for metric in METRICS.values():
        score = exact_match_hf_evaluate(predictions=golds, references=worked, **metric)
        assert score["exact_match"] == 1.0
    rng = np.random.default_rng(0)
    for answer in rng.choice(np.array(worked, dtype=object), 300, replace=False):
        other = str(rng.choice(np.array(worked, dtype=object)))
        for text in (answer, answer + ".", answer.replace("####", "The answer is"), other):
            assert_equal(text, answer)


def test_what_the_harness_gets_wrong_stays_wrong() -> None:
    assert not lm_eval_correct("#### 18.00", "18", "lm_eval_strict")
    assert not lm_eval_correct("It is 18.00.", "18", "lm_eval_flexible")
    assert lm_eval_correct("#### 1,8", "18", "lm_eval_strict")
    assert lm_eval_answer("no number", "lm_eval_flexible") is None
    # gsm8k_cot wants one more character after the number, and takes the last digit for it.
    assert not lm_eval_correct("The answer is 18", "18", "lm_eval_strict", "The answer is")
    assert lm_eval_correct("The answer is 18", "1", "lm_eval_strict", "The answer is")


def test_another_marker_is_graded_as_the_task_gsm8k() -> None:
    for marker in ("boxed", "The answer is:", "Answer:"):
        assert lm_eval_answer("The answer is 7. #### 18", "lm_eval_strict", marker) == "18"


def test_an_unknown_mode_is_an_error_that_names_it() -> None:
    for mode in ("strict", "lm_eval"):
        with pytest.raises(ValueError, match=f"mode '{mode}' is unknown: take 'lm_eval_strict' or"):
            lm_eval_answer("#### 18", mode)  # type: ignore[arg-type]


def test_nothing_is_never_right() -> None:
    for mode in MODES:
        assert lm_eval_answer(None, mode) is None
        assert not lm_eval_correct(None, "18", mode)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 200_000,
        "#### " * 40_000,
        "-" * 200_000,
        "$" * 200_000,
        "#### -" * 30_000,
        "The answer is -" * 15_000,
        "The answer is " + "9" * 200_000 + "\n",
        "\0" * 200_000,
    ],
)
def test_no_shape_of_text_costs_more_than_its_length(text: str) -> None:
    started = time.process_time()
    for marker in TASKS:
        for mode in MODES:
            lm_eval_correct(text, "18", mode, marker)
    assert time.process_time() - started < 1.0
