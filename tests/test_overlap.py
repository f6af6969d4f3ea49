"""Test questions in training data: 13 words in a row, near-duplicates, and who is named."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm8k_core.config import Gsm8kDataset
from gsm8k_core.data import make_gsm8k
from gsm8k_core.errors import DataError
from gsm8k_core.files import read_json, write_jsonl
from gsm8k_core.overlap import find_overlap, ngrams, shingles, texts_in, words
from gsm8k_core.problems import Problem, write_problems

LONG = "Ann has 3 red apples and Bob has 4 green pears; how many fruits do they have in all?"
"""19 words."""


def problem(question: str, problem_id: str = "test-0") -> Problem:
    return Problem(problem_id, question, "#### 1", "1")


def overlap(question: str, *rows: dict[str, Any], min_jaccard: float = 0.3) -> dict[str, Any]:
    report = find_overlap({"test": [problem(question)]}, [("train", rows)], min_jaccard)
    (test,) = report["tests"]
    return test


# Words


def test_a_word_is_lower_case_without_punctuation() -> None:
    assert words("He's got $1,000.50 — “HALF” of it_all!\nÉté\u2028x") == [
        "hes", "got", "100050", "half", "of", "itall", "été", "x",
    ]  # fmt: skip


def test_ngrams_are_the_runs_of_words() -> None:
    assert ngrams(["a", "b", "c"], 2) == ["a b", "b c"]
    assert ngrams(["a"], 2) == []


def test_shingles_mask_numbers_and_a_short_text_is_one() -> None:
    assert shingles(words("a b 12 c 3rd d")) == {"a b 0 c 0", "b 0 c 0 d"}
    assert shingles(["a", "7"]) == {"a 0"}
    assert shingles([]) == set()


def test_every_text_of_a_row_counts_however_nested() -> None:
    row = {"id": "a", "messages": [{"role": "b", "content": "c"}, ["d", 1, None]], "e": {"f": "g"}}
    assert list(texts_in(row)) == ["a", "b", "c", "d", "g"]
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert list(texts_in(deep)) == ["x"]


# Shared words


def test_thirteen_words_in_a_row_are_shared_and_twelve_are_not() -> None:
    thirteen, twelve = " ".join(LONG.split()[2:15]), " ".join(LONG.split()[2:14])
    found = overlap(LONG, {"id": "train-9", "question": f"Now: {thirteen.upper()}, then."})
    assert found["num_sharing"] == 1
    assert found["sharing"][0]["rows"] == [
        {
            "file": "train", "row": 1, "id": "train-9",
            "ngram": "3 red apples and bob has 4 green pears how many fruits do",
        }
    ]  # fmt: skip
    assert overlap(LONG, {"question": f"Now: {twelve}, then."})["num_sharing"] == 0


def test_a_question_of_fewer_words_is_shared_when_all_of_it_is() -> None:
    found = overlap("What is 2 + 2, Ann?", {"a": "So what is 2 2 ann asked"}, {"a": "what is 2"})
    assert (found["num_shorter"], found["num_sharing"]) == (1, 1)
    assert [row["row"] for row in found["sharing"][0]["rows"]] == [1]
    assert overlap("?!", {"a": "?!"})["num_sharing"] == 0


def test_words_of_two_texts_are_not_joined() -> None:
    first, second = " ".join(LONG.split()[:9]), " ".join(LONG.split()[9:])
    assert overlap(LONG, {"question": first, "answer": second})["num_sharing"] == 0


def test_a_text_with_the_very_same_words_is_identical() -> None:
    assert overlap(LONG, {"x": LONG.upper() + "!!"})["num_identical"] == 1
    assert overlap(LONG, {"x": LONG + " And?"})["num_identical"] == 0
    # Another text of as many words does not take it back.
    alike = LONG.replace("in all", "in total")
    assert overlap(LONG, {"x": LONG}, {"x": alike})["num_identical"] == 1


def test_all_rows_are_counted_and_the_first_five_listed() -> None:
    found = overlap(LONG, *({"id": f"t{i}", "x": LONG, "again": LONG} for i in range(7)))
    assert found["sharing"][0]["num_rows"] == found["near"][0]["num_rows"] == 7
    assert found["num_sharing"] == found["num_near"] == 1  # problems
    assert [row["row"] for row in found["sharing"][0]["rows"]] == [1, 2, 3, 4, 5]
    first_of_seven = "ann has 3 red apples and bob has 4 green pears how many"
    assert {row["ngram"] for row in found["sharing"][0]["rows"]} == {first_of_seven}
    assert [row["row"] for row in found["near"][0]["rows"]] == [1, 2, 3, 4, 5]


# Near-duplicates


def test_the_same_story_with_other_numbers_is_a_near_duplicate() -> None:
    found = overlap(LONG, {"question": LONG.replace("3", "12").replace("4", "1,000")})
    assert found["num_sharing"] == 0 and found["num_identical"] == 0
    assert found["near"][0]["rows"][0]["jaccard"] == 1.0


def test_the_similarity_is_jaccards_and_the_most_similar_row_comes_first() -> None:
    # 19 words have 15 runs of five. Two more words: 15 of 17 are shared; two fewer: 13 of 15.
    shorter = LONG.rpartition(" in all")[0]
    found = overlap(LONG, {"x": "other words " + LONG}, {"x": shorter}, {"x": LONG})
    assert [row["jaccard"] for row in found["near"][0]["rows"]] == [1.0, 0.882, 0.867]
    assert [row["row"] for row in found["near"][0]["rows"]] == [3, 1, 2]
    assert overlap(LONG, {"x": shorter}, min_jaccard=0.87)["num_near"] == 0


SENTENCES = st.lists(st.sampled_from("a b c d 1 22".split()), max_size=20).map(" ".join)


@settings(max_examples=60)
@given(tests=st.lists(SENTENCES, max_size=4), train=st.lists(SENTENCES, max_size=4))
def test_the_index_finds_what_comparing_all_pairs_finds(tests: list[str], train: list[str]) -> None:
    problems = [problem(text, str(i)) for i, text in enumerate(tests)]
    rows = [{"x": text} for text in train]
    (report,) = find_overlap({"t": problems}, [("f", rows)], 0.3)["tests"]
    sharing, near = set(), set()
    for i, test in enumerate(tests):
        own = test.split()
        for text in train:
            size = min(13, len(own))
            runs = [own[k : k + size] for k in range(len(own) - size + 1)] if own else []
            other = text.split()
            if any(other[k : k + size] == run for run in runs for k in range(len(other))):
                sharing.add(str(i))
            a, b = shingles(own), shingles(other)
            if a & b and len(a & b) / len(a | b) >= 0.3:
                near.add(str(i))
    assert {entry["id"] for entry in report["sharing"]} == sharing
    assert {entry["id"] for entry in report["near"]} == near


# The command line


def run(script: Callable[[str], ModuleType], tmp_path: Path, *extra: str) -> tuple[dict, str]:
    arguments = ["--output", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")]
    assert script("check_overlap").main([*arguments, *extra]) == 0
    return read_json(tmp_path / "o.json"), (tmp_path / "o.md").read_text(encoding="utf-8")


def test_the_report_names_problem_file_and_row_and_shows_no_markup(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    question = LONG + " <script>alert(1)</script> ![](https://host/x.png)"
    write_problems(tmp_path / "test.jsonl", [problem("What else?", "a"), problem(question, "b")])
    write_jsonl(tmp_path / "one.jsonl", [{"x": "nothing"}])
    write_jsonl(tmp_path / "two.jsonl", [{"x": "nothing"}, {"messages": [{"content": question}]}])
    report, page = run(
        script, tmp_path, "--test", str(tmp_path / "test.jsonl"),
        "--train", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"),
    )  # fmt: skip
    assert [one["num_rows"] for one in report["training"]] == [1, 2]
    two = str(tmp_path / "two.jsonl")
    (near,) = report["tests"][0]["near"]
    assert (near["id"], near["rows"][0]["file"], near["rows"][0]["row"]) == ("b", two, 2)
    assert f"| `{tmp_path / 'test.jsonl'}` | 2 | 1 | 1 | 1 | 1 |" in page
    assert f"in `{two}`, row 2" in page and f"1.00 with `{two}`, row 2" in page
    assert page.count(f": `{question}`\n") == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see ![](https://host/x.png)\n\n# [b](c)", "`see ![](https://host/x.png) # [b](c)`"),
        ("a `b` ``c ![](d)", "```a `b` ``c ![](d)```"),
        ("`![](d)", "`` `![](d) ``"),
        ("<img src=d>`", "`` <img src=d>` ``"),
        ("", "`  `"),
    ],
)
def test_what_a_text_holds_is_code_and_no_markup(
    script: Callable[[str], ModuleType], text: str, shown: str
) -> None:
    assert script("check_overlap")._quoted(text) == shown


def test_half_a_surrogate_pair_in_a_training_row_is_shown_as_a_question_mark(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    write_problems(tmp_path / "test.jsonl", [problem(LONG, "a")])
    row = {"id": "\ud83d", "question": LONG + " \ud83d"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    report, page = run(
        script, tmp_path, "--test", str(tmp_path / "test.jsonl"),
        "--train", str(tmp_path / "train.jsonl"),
    )  # fmt: skip
    (near,) = report["tests"][0]["near"]
    assert near["rows"][0]["id"] == "?" and near["rows"][0]["excerpt"].endswith(" ?")
    assert "1.00 with" in page


def test_a_faulty_training_row_is_named(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    write_problems(tmp_path / "test.jsonl", [problem(LONG)])
    (tmp_path / "train.jsonl").write_text('{"x": 1}\n{"x": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: not valid JSON .* cut short\?"):
        run(script, tmp_path, "--test", str(tmp_path / "test.jsonl"),
            "--train", str(tmp_path / "train.jsonl"))  # fmt: skip
    assert not (tmp_path / "o.json").exists()


def test_a_training_file_without_a_row_is_refused_by_name(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    write_problems(tmp_path / "test.jsonl", [problem(LONG)])
    write_jsonl(tmp_path / "train.jsonl", [{"x": 1}])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=rf"^{tmp_path}/empty\.jsonl: holds no row"):
        run(script, tmp_path, "--test", str(tmp_path / "test.jsonl"),
            "--train", str(tmp_path / "train.jsonl"), str(tmp_path / "empty.jsonl"))  # fmt: skip
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("value", ["0", "1.5", "nan"])
def test_a_similarity_out_of_range_is_refused(
    script: Callable[[str], ModuleType], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--train", "a", "--test", "b", "--output", "c", "--markdown", "d"]
    with pytest.raises(SystemExit):
        script("check_overlap").main([*arguments, "--min-jaccard", value])
    assert f"expected a number above 0 and at most 1, found {value}" in capsys.readouterr().err


# The real thing

REAL = os.environ.get("GSM8K_DIR")


def test_training_rows_may_be_lists() -> None:
    question = " ".join(f"word{n}" for n in range(20))
    problem = Problem(id="p", question=question, answer="#### 1", gold="1")
    (test,) = find_overlap({"t": [problem]}, [("f", [[question]])])["tests"]  # type: ignore[list-item]
    assert test["sharing"][0]["rows"][0]["id"] is None


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="set GSM8K_DIR to a folder with GSM8K to look for its overlap")
def test_three_of_gsm8ks_1319_test_questions_share_13_words_with_its_train_split() -> None:
    problems, _ = make_gsm8k(Gsm8kDataset(kind="gsm8k", path=REAL))
    rows = [one.to_row() for split in ("train", "val") for one in problems[split]]
    random.Random(0).shuffle(rows)  # the order is of no account
    (test,) = find_overlap({"test": problems["test"]}, [("train", rows)])["tests"]
    assert (test["num_problems"], test["num_shorter"], test["num_identical"]) == (1319, 0, 0)
    assert [entry["id"] for entry in test["sharing"]] == ["test-581", "test-602", "test-632"]
    assert [(entry["id"], entry["rows"][0]["jaccard"]) for entry in test["near"]] == [
        ("test-602", 0.826),
        ("test-632", 0.552),
        ("test-974", 0.429),
        ("test-824", 0.393),
    ]
    json.dumps(test)
