"""The report as a file: its words, numbers, bounds, and what keeps it shut."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import vl_convert
from report_study import (
    ATTACK,
    HOSTILE,
    HOSTILE_ID,
    METHODS,
    NUM_PROBLEMS,
    is_right,
    make_study,
    report_arguments,
)

from gsm8k_core.charts import (
    PALETTES,
    SURFACES,
    _difference_lines,
    _lines,
    _methods,
    accuracy_chart,
    agreement_charts,
    difference_chart,
    learning_charts,
    learning_curve,
    length_chart,
    pass_at_k_chart,
)
from gsm8k_core.cli import run_script
from gsm8k_core.config import Comparison
from gsm8k_core.errors import DataError
from gsm8k_core.files import read_json, write_json
from gsm8k_core.metrics import paired_difference
from gsm8k_core.report import (
    Sources,
    Subject,
    _context,
    _cost_charts,
    _cost_note,
    _difference_point,
    _findings,
    _headline,
    _leads,
    _learning_note,
    _p_cell,
    _parent_finding,
    _provenance,
    _rank,
    _table_note,
    build_report,
    either_way,
    json_for_script,
    script_text,
)
from gsm8k_core.report_browser import Graded, locate_answer, stratified_order
from gsm8k_core.tables import (
    OTHER_PAIRS,
    SCHEMA,
    Cell,
    compare_pairs,
    correct_pairs,
    p_text,
)

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "gsm8k_core" / "report_assets"


class Page(HTMLParser):
    """The parts of a page, as a browser would take them apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.policy = self.style = self.text = ""
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._in = tag
        if tag == "script":
            self.scripts.append((found, ""))
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._in = "" if tag == self._in else self._in
        if tag in ("p", "li", "td", "th", "h1", "h2"):
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif self._in == "style":
            self.style += data
        else:
            self.text += data.replace("\u00a0", " ")

    @property
    def data(self) -> Any:
        return json.loads(next(text for found, text in self.scripts if found.get("id") == "data"))

    @property
    def records(self) -> list[Any]:
        packed = [
            json.loads(text)
            for found, text in self.scripts
            if (found.get("id") or "").startswith("record-")
        ]
        return [json.loads(gzip.decompress(base64.b64decode(record))) for record in packed]


Paths = dict[str, Path]


@pytest.fixture(scope="module", autouse=True)
def bundle() -> Iterator[Any]:
    """What draws the charts is the same for all: to bundle it takes most of a report's time."""
    kept = functools.cache(vl_convert.javascript_bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", kept)
        yield kept


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, script: Callable[[str], ModuleType]) -> Paths:
    made = make_study(tmp_path_factory.mktemp("report"), script)
    assert script("report").main(report_arguments(made)) == 0
    return made


@pytest.fixture(scope="module")
def html(paths: Paths) -> str:
    return paths["output"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def squeezed(text: str) -> str:
    return re.sub(r"[ \n]+", " ", text)


def number_of(problem_id: str) -> int:
    return 0 if problem_id == HOSTILE_ID else int(problem_id.removeprefix("test-"))


# -------------------------------------------------------------------------------------- the answer


def test_a_significant_difference_is_told_with_interval_p_and_n(page: Page) -> None:
    assert re.search(
        r"grpo beats sft by \+\d+\.\d points \[\+\d+\.\d, \+\d+\.\d\], p [<=] 0\.\d+ "
        r"\(Holm-corrected\), n = 40 problems × 2 seeds\.",
        squeezed(page.text),
    )
    assert "p-values are two-sided and Holm-corrected within a model" in squeezed(page.text)


def test_a_difference_that_is_none_is_told_to_be_none(page: Page) -> None:
    words = squeezed(page.text)
    assert re.search(r"twin against sft: not significant, \+0\.0 points \[−\d", words)
    assert "twin beats" not in words and "twin does worse" not in words


def test_the_headline_names_the_best_method_and_the_table_is_ranked(page: Page) -> None:
    assert "grpo is best: 87.5 % of test right" in squeezed(page.text)
    order = [page.text.index(f"\n{place}\n{name}") for place, name in
             ((1, "grpo"), (2, "sft"), (2, "twin"), (4, "base"))]  # fmt: skip
    assert order == sorted(order)


def subject_of(right: dict[str, int], **tested: float) -> Subject:
    """Methods, with how many of the first of 100 problems each gets right; one seed for three.

    All but `base` are trained from it; `tested` has the comparison's Holm-corrected p-values.
    """
    study = Comparison(
        name="demo", models=["m"], methods=list(right), suites=["test"],
        seeds=[0],
        chains={name: ["base", name][name == "base" :] for name in right}, confidence=0.95,
    )  # fmt: skip
    rows = []
    for name, count in right.items():
        row = dict.fromkeys(SCHEMA) | {"model": "m", "method": name, "suite": "test"}
        row |= {"accuracy": count / 100, "num_seeds": 3, "num_problems": 100, "num_samples": 0}
        if name != "base":
            row |= {"parent": "base", "base": "base"}
        if name in tested:
            for other in ("parent", "base"):
                bounds = {"": count / 100 - 0.1, "_ci_low": 0.0, "_ci_high": 1.0}
                row |= {f"delta_vs_{other}{end}": value for end, value in bounds.items()}
                row |= {f"p_value_vs_{other}": 0.03, f"p_value_vs_{other}_holm": tested[name]}
        rows.append(row)
    cells = {name: cell_of(np.arange(100)[None] < count) for name, count in right.items()}
    return Subject(study, "m", "test", rows, cells, [], {}, 0, [])


def cell_of(right: np.ndarray[Any, Any]) -> Cell:
    """Greedy completions alone, (S, P)."""
    metrics = [{"accuracy": float(share), "grading": "strict"} for share in right.mean(axis=1)]
    return Cell(right.astype(np.float64), None, 0, {}, metrics, [], [], None)


def paired(*suites: Subject) -> list[Subject]:
    """With the pairs that compare.py would have made of their cells and rows."""
    pairs, rows = [], []
    for one in suites:
        found = compare_pairs(one.cells, one.study.confidence)
        pairs += [{**pair, "suite": one.suite} for pair in found]
        rows += [{**row, "suite": one.suite} for row in one.rows]
    correct_pairs(pairs, rows)
    number = sum(pair["family"] == OTHER_PAIRS for pair in pairs)
    of = {one.suite: [pair for pair in pairs if pair["suite"] == one.suite] for one in suites}
    return [replace(one, pairs=either_way(of[one.suite]), num_other_pairs=number) for one in suites]


def headline(subject: Subject, *other_suites: Subject) -> str:
    return _headline(paired(subject, *other_suites)[0])


def findings(subject: Subject, *other_suites: Subject) -> list[Any]:
    return _findings(paired(subject, *other_suites)[0])


def test_charts_cells_and_findings_go_by_the_corrected_p_value() -> None:
    subject = subject_of({"grpo": 60, "base": 50}, grpo=0.06)  # 0.03 alone
    row = subject.rows[0]
    for reference in ("parent", "base"):
        point = _difference_point(subject, row, reference)
        assert point["significant"] is False
        assert point["significance"].replace("\u00a0", " ") == "not significant, p = 0.060"
        assert _p_cell(reference)(row)["main"] == "0.060"
    assert _parent_finding(subject, row)["kind"] == "open"


def test_charts_and_problems_show_the_shares_of_the_comparison(page: Page, paths: Paths) -> None:
    def values(title: str) -> list[Any]:
        (found,) = [
            chart["spec"]["data"]["values"]
            for chart in page.data["charts"].values()
            if chart["title"].startswith(title)
        ]
        return list(found)

    rows = {row["method"]: row for row in pl.read_parquet(paths["comparison"]).to_dicts()}
    columns = {"greedy": "accuracy", "sampled, pass@1": "pass_at_1"}
    for title, name in (
        ("Accuracy by method", None),
        ("Accuracy against training time", "accuracy"),
        ("Differences to the parent", "delta_vs_parent"),
        ("Differences to the base model", "delta_vs_base"),
    ):
        for shown in values(title):
            column = name or columns[shown["decoding"]]
            expected = [rows[shown["method"]][column + e] for e in ("", "_ci_low", "_ci_high")]
            found = [shown["mean"] / 100, shown["low"] / 100, shown["high"] / 100]
            assert found == pytest.approx(expected, abs=1e-5)
    # Greedy ones alone: of 40 problems, and of 80 completions where there are two seeds.
    lengths = values("Length of completions")
    right = {row["method"]: row["completions"] for row in lengths if row["outcome"] == "right"}
    wrong = {row["method"]: row["completions"] for row in lengths if row["outcome"] == "wrong"}
    assert right == {"base": 4, "sft": 32, "grpo": 70, "twin": 32}
    assert wrong == {"base": 36, "sft": 48, "grpo": 10, "twin": 48}
    assert {row["value"] for row in values("Completions cut off")} == {10.0}
    (view,) = page.data["views"]
    for problem in view["browser"]["problems"]:
        number = number_of(problem["id"])
        solved = [is_right(METHODS[place], number) for place, _ in view["browser"]["runs"]]
        if number >= len(HOSTILE):
            assert problem["greedy"] == list(map(int, solved))
        assert problem["sampled"] == [0.667 * one for one in solved]


def test_differences_of_pass_at_1_stand_in_a_table_of_their_own(page: Page, paths: Paths) -> None:
    text = squeezed(page.text)
    assert "Differences of pass@1, the mean over samples" in text
    assert "Decide before the study which of them is the question" in text
    table = page.text.partition("Differences of pass@1, the mean")[2].partition("Decide before")[0]
    lines = [line.strip() for line in table.split("\n")]
    for row in pl.read_parquet(paths["comparison"]).iter_rows(named=True):
        if row["method"] == "base":
            assert "base" not in lines
            continue
        at = lines.index(row["method"])
        pass_at_1, parent, p_parent, base, p_base, _ = lines[at + 1 : at + 7]
        assert pass_at_1.startswith(f"{100 * row['pass_at_1']:.1f} % [")
        for kind, shown, p_value in (("parent", parent, p_parent), ("base", base, p_base)):
            numbers = [
                row[f"delta_pass_at_1_vs_{kind}{end}"] for end in ("", "_ci_low", "_ci_high")
            ]
            delta, low, high = (f"{100 * one:+.1f}".replace("-", "−") for one in numbers)
            assert shown.startswith(f"{delta} [{low}, {high}]")
            assert p_value == p_text(row[f"p_value_pass_at_1_vs_{kind}_holm"])


def test_every_difference_of_the_page_is_that_of_the_comparison(page: Page, paths: Paths) -> None:
    table = page.text.partition("B − A, points")[2]
    lines = [line.strip() for line in table.split("\n") if line.strip()]
    rows = {row["method"]: row for row in pl.read_parquet(paths["comparison"]).to_dicts()}
    num_compared = 0
    for at in range(len(lines) - 9):
        other, method = lines[at : at + 2]
        for kind in ("parent", "base"):
            if method in rows and rows[method][kind] == other:
                ends = ("", "_ci_low", "_ci_high")
                numbers = [rows[method][f"delta_vs_{kind}{end}"] for end in ends]
                delta, low, high = (f"{100 * one:+.1f}".replace("-", "−") for one in numbers)
                assert lines[at + 9] == f"{delta} [{low}, {high}]"
                num_compared += 1
    assert num_compared == 6  # sft twice: its parent is the base


def test_every_pair_has_its_corrected_p_value_beside_its_agreement(
    page: Page, paths: Paths
) -> None:
    table = page.text.partition("B − A, points")[2]
    assert table.lstrip().startswith("p\n")
    lines = [line.strip() for line in table.split("\n") if line.strip()]
    pairs = pl.read_csv(paths["comparison"].with_name("pairs.csv"))
    assert pairs.height == 6
    for row in pairs.iter_rows(named=True):
        at = next(
            at for at in range(len(lines)) if lines[at : at + 2] == [row["other"], row["method"]]
        )
        assert lines[at + 10] == p_text(row["p_value_holm"])
    assert "all other pairs, on all suites of the model, are one family" in squeezed(page.text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "pairs.csv: no such file; run compare.py for it"),
        (lambda path: path.write_text("a\n1\n"), "pairs.csv: not differences of pairs of methods"),
        (
            lambda path: pl.read_csv(path).filter(method="twin").write_csv(path),
            "pairs.csv has no row for base and sft of m1 on test: it belongs to another study",
        ),
    ],
)
def test_a_report_without_the_pairs_of_its_study_is_refused(
    paths: Paths, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(paths["comparison"].parent, tmp_path / "results")
    comparison = tmp_path / "results" / "comparison.parquet"
    change(comparison.with_name("pairs.csv"))
    study = Comparison.model_validate(read_json(paths["study"]))
    with pytest.raises(DataError, match=message):
        build_report(study, Sources(paths["study_dir"], comparison, {}), 10**6)


def test_a_difference_to_what_was_run_once_is_that_of_the_comparison() -> None:
    # Each of five runs has one problem of a hundred right, another one each; the base model none.
    subject = subject_of({"grpo": 1, "base": 0})
    subject.cells["grpo"] = cell_of(np.eye(5, 100))
    expected = paired_difference(np.eye(5, 100), np.zeros((1, 100)))
    columns = ("delta", "delta_ci_low", "delta_ci_high", "p_value")
    pairs = paired(subject)[0].pairs
    found, turned = (
        [pairs[pair][name] for name in columns] for pair in (("grpo", "base"), ("base", "grpo"))
    )
    assert found == pytest.approx(expected[:4]) and found[3] > 0.3
    assert turned == pytest.approx([-found[0], -found[2], -found[1], found[3]])


def test_one_and_two_seeds_are_told_to_be_few(page: Page) -> None:
    assert "Trained with two seeds: intervals are wide" in squeezed(page.text)
    for num_seeds, words in ((1, "one seed"), (2, "two seeds"), (3, None)):
        subject = subject_of({"grpo": 60, "base": 10}, grpo=0.01)
        for row in subject.rows:
            row["num_seeds"] = num_seeds
        texts = [str(one["text"]) for one in findings(subject)]
        told = [text for text in texts if text.startswith("Trained with")]
        assert [text.startswith(f"Trained with {words}:") for text in told] == [True] * bool(words)


def test_of_one_run_of_each_method_no_more_is_said_than_that() -> None:
    subject = subject_of({"grpo": 60, "base": 10}, grpo=1e-9)
    assert headline(subject) == "grpo is best: 60.0\u00a0% of test right"
    assert "grpo</strong> beats <strong>base" in str(findings(subject)[0]["text"])
    for row in subject.rows:
        row["num_seeds"] = 1
    assert headline(subject).startswith("In one run of each method grpo comes")
    finding = str(findings(subject)[0]["text"])
    assert "grpo</strong> is ahead of <strong>base" in finding
    assert "over problems alone; differences are paired by problem" in _context(subject)
    subject.rows[0]["num_seeds"] = 3
    assert "over seeds and problems; differences are paired by seed and" in _context(subject)


@pytest.mark.parametrize(
    ("right", "parents", "first"),
    [
        # The runner-up is the first one's child, its parent, or the base model's grandchild.
        ({"sft": 60, "grpo": 50, "base": 10}, {"grpo": "sft"}, "grpo does worse than sft"),
        ({"grpo": 60, "sft": 50, "base": 10}, {"grpo": "sft"}, "grpo beats sft"),
        ({"base": 60, "grpo": 50, "sft": 10}, {"grpo": "sft"}, "base beats grpo"),
    ],
)
def test_the_lead_over_the_runner_up_is_told_once(
    right: dict[str, int], parents: dict[str, str], first: str
) -> None:
    subject = subject_of(right, **dict.fromkeys(set(right) - {"base"}, 1e-9))
    for row in subject.rows:
        row["parent"] = parents.get(row["method"], row["parent"])
        if row["delta_vs_parent"] is not None and row["parent"] is not None:
            row["delta_vs_parent"] = (right[row["method"]] - right[row["parent"]]) / 100
    best, second, *_ = right
    texts = [re.sub("<.*?>", "", str(one["text"])) for one in findings(subject)]
    told = [text for text in texts if {best, second} <= set(text.split(" by ")[0].split())]
    assert len(told) == 1 and told[0].startswith(first)


def test_methods_that_are_equal_are_called_so() -> None:
    for num_right, wanted in (
        ({"dpo": 50, "grpo": 50, "sft": 50}, "dpo, grpo and sft are equal: 50.0"),
        ({"dpo": 50, "grpo": 50, "sft": 40}, "dpo and grpo come first together: 50.0"),
        (
            {"dpo": 50, "grpo": 50, "sft": 49, "rft": 48, "base": 10},
            "dpo and grpo come first together with 50.0\u00a0% of test right, but their lead over "
            "sft and rft may be chance",
        ),
    ):
        subject = subject_of(num_right, **dict.fromkeys(set(num_right) - {"base"}, 1e-9))
        subject.rows.sort(key=lambda row: (-row["accuracy"], row["method"]))
        assert headline(subject).startswith(wanted)


def test_equal_methods_share_a_rank() -> None:
    subject = subject_of({"dpo": 50, "grpo": 50, "sft": 49, "base": 49})
    subject.rows[1]["accuracy"] += 1e-16  # as means over seeds differ
    assert [_rank(row, subject.rows) for row in subject.rows] == [1, 1, 3, 3]


def test_the_ranking_has_numbers_of_seeds_and_every_seed_stands_below_it(page: Page) -> None:
    words = squeezed(page.text)
    assert "#\nmethod\nseeds\nright\n" in page.text
    assert re.search(r" 1 grpo ⚑ 2 87\.5 %", words) and re.search(r" 4 base 1 10\.0 %", words)
    assert "method completions seed 0 seed 1 " in words
    assert "grpo greedy 85.0 % 90.0 % grpo sampled, pass@1 60.0 % 60.0 % " in words
    assert "base greedy 10.0 % base sampled, pass@1 6.7 %" in words


@pytest.mark.parametrize("memory", [None, 700.0])
def test_what_peak_memory_is_stands_where_it_is_shown(memory: float | None) -> None:
    row = {"peak_memory_mb_training": None, "peak_memory_mb_generating": memory}
    note = _cost_note([{**row, "parent": None, "num_seeds": 1}], has_curves=False)
    assert ("of the whole process" in note) == (memory is not None)


def test_notes_speak_of_what_the_page_shows_alone(
    page: Page, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    words = squeezed(page.text)
    told = (
        "bands go from the smallest to the largest seed. With more",
        "The bands of pass@k",
        "“Training”, which is without validation,",
        "the stages that it starts from. All are means over seeds. Generating is",
        "over seeds and problems; differences are paired by seed and problem.",
    )
    for note in told:
        assert note in words
    made = make_study(tmp_path, script, num_samples=0)
    assert script("report").main(report_arguments(made)) == 0
    assert "pass@k" not in Page(made["output"].read_text(encoding="utf-8")).text
    subject = subject_of({"base": 50})
    assert _context(subject).endswith("over seeds and problems.")
    subject.rows[0]["num_seeds"] = 1
    assert _context(subject).endswith("over problems alone.")
    assert _learning_note(subject.study) == "Lines are running means."
    note = _cost_note(subject.rows, has_curves=False)
    assert note.startswith("Generating is for one evaluation.") and "pass@k" not in note


def test_leads_over_clones_are_those_of_their_clusters_and_the_page_says_how_many() -> None:
    plain, clones = (subject_of({"grpo": 60, "dpo": 50}) for _ in range(2))
    assert headline(plain).startswith("grpo is best")
    names = pl.Series([f"c{number // 10}" for number in range(100)])
    for method, cell in clones.cells.items():
        clones.cells[method] = replace(cell, clusters=names)
    for row in clones.rows:
        row |= {"suite": "test", "num_problems": 100, "num_clusters": 10}
    assert "its lead over dpo may be chance" in headline(clones)  # one cluster
    for row in clones.rows:
        row["parent"] = "sft"
    finding = str(findings(clones)[0]["text"])
    assert "n = 100 problems in 10 clusters × 1 seed" in finding
    assert "m, 100 problems in 10 clusters, 3 seeds a method" in _context(clones)
    assert "over seeds and clusters; differences are paired" in _context(clones)
    assert "test: 100 problems in 10 clusters. Problems of one cluster" in _table_note(clones)


def test_few_seeds_are_a_flag_but_do_not_pass_for_rows_that_were_not_made_alike(
    page: Page, paths: Paths, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    words = squeezed(page.text)
    assert "What makes a comparison doubtful" in words and "grpo: 2 seeds" in words
    assert "Not all was made alike" not in words
    made = {**paths, "comparison": tmp_path / "comparison.parquet", "output": tmp_path / "r.html"}
    for name in ("pass_at_k.csv", "pairs.csv"):
        shutil.copyfile(paths["comparison"].with_name(name), tmp_path / name)
    flags = (
        pl.when(pl.col("method") == "sft")
        .then(pl.lit("2 seeds; parent: engine"))
        .when(pl.col("method") == "twin")
        .then(pl.lit("2 seeds; prompts cut: 93 %"))
    )
    table = pl.read_parquet(paths["comparison"])
    table.with_columns(flags=flags.otherwise("flags")).write_parquet(made["comparison"])
    assert script("report").main(report_arguments(made)) == 0
    words = squeezed(Page(made["output"].read_text(encoding="utf-8")).text)
    assert "Not all was made alike: see the flags of sft below" in words
    assert "Some numbers need a second look: see the flags of twin below" in words
    assert "twin: 2 seeds; prompts cut: 93 %" in words
    assert "flag “prompts cut”: so many prompts were too long" in words
    assert "sft: 2 seeds; parent: engine" in words


@pytest.mark.slow
def test_without_its_script_the_page_shows_the_answers_and_tables_of_every_view(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script, num_samples=0, models=("m1", "m2"))
    assert script("report").main(report_arguments(made)) == 0
    page = Page(made["output"].read_text(encoding="utf-8"))
    views = [value for _, name, value in page.attributes if name == "data-view"]
    assert [views.count(f"{number}") for number in (0, 1)] == [3, 3]  # answer, cost, agreement
    hidden = [tag for tag, name, _ in page.attributes if name == "hidden"]
    assert sorted(hidden) == ["div", "p"]  # a problem that is shown or missing
    names = [value for _, name, value in page.attributes if value == "view-name"]
    assert len(names) == 6  # of the learning curves, cost and agreement of each


def test_a_lead_over_many_is_corrected_for_all_pairs_and_says_so() -> None:
    # Five problems of a hundred: t = 0.05 / √(0.05·0.95 / 99 + 0.01²) = 2.08, p = 0.0404 for each
    two = subject_of({"grpo": 60, "dpo": 55})
    assert headline(two).startswith("grpo is best")
    assert "p = 0.040 (uncorrected)" in str(findings(two)[0]["text"]).replace("\u00a0", " ")
    four = subject_of({"grpo": 60, "dpo": 55, "rft": 55, "sft": 55})
    p_values = [lead["p_value_holm"] for lead in _leads(paired(four)[0])]
    assert p_values == pytest.approx([6 * 0.040438] * 3, rel=0.01)
    assert "its lead over dpo, rft and sft may be chance" in headline(four)
    finding = squeezed(str(findings(four)[0]["text"]).replace("\u00a0", " "))
    assert "not significant" in finding
    assert "p = 0.243 (Holm-corrected over the 6 pairs that the table does not test)" in finding
    assert "Alone, without the correction, it would be: p = 0.040." in finding
    # One is far behind, and is no part of the doubt.
    five = subject_of({"grpo": 60, "dpo": 55, "rft": 55, "sft": 55, "base": 10}, grpo=1e-9)
    assert "its lead over dpo, rft and sft may be chance" in headline(five)
    six = subject_of({"grpo": 60, "a": 57, "b": 57, "c": 57, "d": 57})
    assert "its lead over every other method may be chance" in headline(six)
    seven = subject_of({"grpo": 60, "a": 57, "b": 57, "c": 57, "d": 57, "e": 1})
    assert "its lead over 4 of the others may be chance" in headline(seven)


def test_a_suite_on_which_a_sibling_came_first_by_chance_does_not_make_it_best() -> None:
    tested = {"grpo": 1e-9, "dpo": 1e-9}
    lucky = subject_of({"grpo": 60, "dpo": 55, "base": 10}, **tested)  # p = 0.040 alone
    assert headline(lucky).startswith("grpo is best")
    other = subject_of({"dpo": 57, "grpo": 56, "base": 10}, **tested)
    other = replace(other, suite="other")
    lucky.study.suites.append("other")
    assert "its lead over dpo may be chance" in headline(lucky, other)
    p_values = [lead["p_value_holm"] for lead in _leads(paired(lucky, other)[0])]
    assert p_values == pytest.approx([2 * 0.040438, 1e-9], rel=0.01)
    finding = str(findings(lucky, other)[0]["text"])
    assert "over the 2 pairs that the table does not test, of all suites)" in finding


def test_of_equal_siblings_one_is_seldom_best_on_any_of_six_suites() -> None:
    rng = np.random.default_rng(0)
    num_wrong = 0
    for _ in range(60):
        suites = []
        for number in range(6):
            subject = subject_of({"grpo": 60, "dpo": 60})
            for row in subject.rows:
                right = rng.random(100) < 0.6
                subject.cells[row["method"]] = cell_of(right[None])
                row["accuracy"] = right.mean()
            subject.rows.sort(key=lambda row: -row["accuracy"])
            suites.append(replace(subject, suite=f"suite{number}"))
        heads = [_headline(subject) for subject in paired(*suites)]
        num_wrong += any("is best" in head for head in heads)
    assert num_wrong <= 6  # 3 are expected; without the other suites' pairs it is 18


@pytest.mark.parametrize("methods", [("grpo", "base"), ("base", "grpo"), ("grpo", "sft", "base")])
def test_the_headline_takes_the_corrected_p_value_of_the_comparison(
    methods: tuple[str, ...],
) -> None:
    # Also where the best is the parent itself, or the parent comes third.
    right = dict(zip(methods, (60, 45, 40), strict=False))
    for p_value, wanted in ((0.3, "lead over {} may be chance"), (0.01, "{} is best")):
        tested = {name: p_value for name in methods if name != "base"}
        subject = subject_of(right, **tested)
        other = ("grpo" if methods[0] == "base" else "base") if p_value > 0.05 else methods[0]
        assert wanted.format(other) in headline(subject)


@pytest.mark.slow
def test_the_headline_does_not_contradict_the_finding_below_it(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script, num_samples=0)
    table = pl.read_parquet(made["comparison"])
    holm = pl.when(pl.col("method") == "grpo").then(0.3).otherwise("p_value_vs_parent_holm")
    table.with_columns(p_value_vs_parent_holm=holm).write_parquet(made["comparison"])
    path = made["comparison"].with_name("pairs.csv")
    pairs = pl.read_csv(path)
    holm = pl.when(method="grpo", other="sft").then(0.3).otherwise("p_value_holm")
    pairs.with_columns(p_value_holm=holm).write_csv(path)
    assert script("report").main(report_arguments(made)) == 0
    words = squeezed(Page(made["output"].read_text(encoding="utf-8")).text)
    assert "grpo comes first with 87.5 % of test right, but its lead over sft may be" in words
    assert "grpo against sft: not significant" in words and "grpo is best" not in words
    assert "A method is called best where it is ahead of every other significantly" in words


@pytest.mark.parametrize("name", ["pass_at_k", "maj_at_k"])
def test_bands_of_repeated_sampling_are_the_intervals_of_the_comparison(
    page: Page, paths: Paths, name: str
) -> None:
    title = name.removesuffix("_at_k") + "@k:"
    (chart,) = (one for one in page.data["charts"].values() if one["title"].startswith(title))
    shown = [
        [row[key] for key in ("method", "k", "mean", "low", "high")]
        for row in chart["spec"]["data"]["values"]
    ]
    curves = pl.read_csv(paths["comparison"].with_name("pass_at_k.csv")).drop_nulls(name)
    ends = [f"{name}{end}" for end in ("", "_ci_low", "_ci_high")]
    expected = curves.select("method", "k", *ends).rows()
    assert len(shown) == len(expected) > 0
    for row, (method, k, *bounds) in zip(shown, expected, strict=True):
        assert row[:2] == [method, k]
        assert row[2:] == pytest.approx([100 * bound for bound in bounds], abs=0.001)
    assert {row[1] for row in shown} == ({1, 2, 3} if name == "pass_at_k" else {1, 2})


def test_the_ranking_shows_the_majority_of_samples_with_its_interval(
    page: Page, paths: Paths
) -> None:
    assert "sampled pass@1\nmaj@2\nflexible\nin format\n" in page.text
    row = pl.read_parquet(paths["comparison"]).filter(pl.col("method") == "grpo").to_dicts()[0]
    low, high = (f"{100 * row[f'maj_at_n_ci_{end}']:.1f}" for end in ("low", "high"))
    shares = f"{100 * row['accuracy_flexible']:.1f} % {100 * row['format_fraction']:.1f} %"
    assert f"90.0 % [{low}, {high}] {shares}" in squeezed(page.text)


def test_agreement_tells_the_same_wrong_answer_from_another_one_and_from_none(page: Page) -> None:
    words = squeezed(page.text)
    # Same answer; both right; both wrong: the same, others, none; only A, only B.
    # sft is right on 0 to 15; twin on those but 3, and on 30. Of 23 that both get wrong, twin
    # answers 5 by itself.
    assert "sft twin 82.5 % 37.5 % 45.0 % 12.5 % 0.0 % 2.5 % 2.5 % +0.0" in words
    # Of 80: grpo gives no answer to 6 with seed 0, which base gets wrong, nor to 1, which base
    # gets right.
    assert "base grpo 18.8 % 8.8 % 10.0 % 0.0 % 1.2 % 1.2 % 78.8 % +77.5" in words


def test_the_charts_of_agreement_are_the_same_from_either_side(page: Page) -> None:
    charts = {one["title"]: one for one in page.data["charts"].values()}
    chart = charts["Share of problems to which two methods give the same answer, %"]
    rows = {(row["a"], row["b"]): row for row in chart["spec"]["data"]["values"]}
    assert len(rows) == 12
    assert rows["sft", "twin"]["same_answer"] == rows["twin", "sft"]["same_answer"] == 82.5
    assert rows["base", "grpo"]["only_b"] == rows["grpo", "base"]["only_a"] == 78.8


def test_answers_are_compared_as_numbers_across_runs_and_as_texts_where_they_are_none() -> None:
    def run(answers: list[str | None]) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "problem_id": [f"p{number}" for number in range(len(answers))],
                "decoding": "sample",
                "sample_index": 0,
                "correct": [answer == "18" for answer in answers],
                "extracted": pl.Series(answers, dtype=pl.String),
            }
        )

    tables = [run(["18", "1/2", "x", None]), run(["7", "0.5", "x", None])]
    graded = Graded([("a", 0), ("b", 0)], tables, ["p0", "p1", "p2", "p3"], ["strict"])
    answers = graded.answers("sample")
    (first, right), (second, _) = answers["a"], answers["b"]
    assert (first == second).tolist() == [[[False], [True], [True], [True]]]
    assert first[0, 3] == -1 and (first[0, :3] >= 0).all()
    assert right.tolist() == [[[True], [False], [False], [False]]]


def test_provenance_names_commit_command_settings_and_files(page: Page, paths: Paths) -> None:
    digest = hashlib.sha256(paths["comparison"].read_bytes()).hexdigest()
    for fact in ("abc123", "snakemake --cores 1", '"learning_rate": 0.1', digest, "transformers"):
        assert fact in page.text


def test_what_the_study_chose_for_each_suite_is_no_warning_and_what_it_did_not_is(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    paths = make_study(tmp_path, script)
    study = Comparison.model_validate({**read_json(paths["study"]), "suites": ["test", "other"]})
    sources = Sources(paths["study_dir"], paths["comparison"], {})
    runs = sorted(paths["study_dir"].glob("*/*/seed*"))

    def write(suite: str, run: Path, **facts: Any) -> None:
        metrics = read_json(run / "metrics" / "test.json")
        write_json(run / "metrics" / f"{suite}.json", {**metrics, **facts})

    def warned_of() -> list[str]:
        return [fact["name"] for fact in _provenance(study, sources)["facts"] if fact["differs"]]

    for run in runs:
        shutil.copy(run / "grades" / "test.parquet", run / "grades" / "other.parquet")
        write("other", run, marker="boxed", grading="flexible", engine="vllm")
    assert warned_of() == []
    write("other", runs[0], marker="####", grading="flexible", engine="vllm")
    write("test", runs[1], provenance={"git": {"commit": "other"}})
    assert warned_of() == ["answer marker", "commit"]


@pytest.mark.slow
def test_provenance_names_what_training_ran_on_where_it_is_not_what_evaluation_did(
    page: Page, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    assert "in training" not in page.text
    made = make_study(tmp_path, script, num_samples=0)
    path = made["study_dir"] / "m1" / "sft" / "seed0" / "train" / "summary.json"
    summary = read_json(path)
    write_json(path, {**summary, "provenance": {"git": {"commit": "older"}}})
    assert script("report").main(report_arguments(made)) == 0
    text = Page(made["output"].read_text(encoding="utf-8")).text
    assert "commit, in training" in text and "older (1 run)" in text


def test_no_two_of_many_methods_look_alike() -> None:
    methods = [f"method {number}" for number in range(13)]
    scales = _methods(methods)
    colours = PALETTES["light"] * 2
    for kind in ("shape", "dash"):
        marks = map(str, scales[kind].range)
        assert len(set(zip(colours, marks, strict=False))) == 13, kind


def test_the_learning_curve_is_the_mean_over_seeds_at_the_steps_that_all_have() -> None:
    runs = [
        [{"step": step, "reward_mean": float(step)} for step in (1, 2, 3)],
        [{"step": step, "reward_mean": step + 2.0} for step in (1, 2)],
    ]
    rows = learning_curve(runs, "reward_mean", "grpo", 1.0)
    assert [(row["x"], row["mean"], row["low"], row["high"]) for row in rows] == [
        (1, 2.0, 1.0, 3.0),
        (2, 3.0, 2.0, 4.0),
    ]
    assert learning_curve([[], []], "reward_mean", "grpo", 1.0) == []


def test_the_shares_of_many_pairs_keep_a_field_each_and_scroll() -> None:
    parts = ("same_answer", "both_right", "same_wrong", "other_wrong", "no_answer")
    for number, width in ((6, "container"), (13, {"step": 46})):
        methods = [f"method {place}" for place in range(number)]
        rows = [
            {"a": a, "b": b, **dict.fromkeys((*parts, "only_a", "only_b"), 12.5)}
            for a in methods
            for b in methods
            if a != b
        ]
        charts = agreement_charts(rows, methods)
        assert [chart["spec"]["width"] for chart in charts] == [width] * 2
        assert [chart["scrolls"] for chart in charts] == [number == 13] * 2


@pytest.mark.parametrize(("num_samples", "ticks"), [(4, [1, 2, 4]), (12, [1, 2, 4, 8, 12])])
def test_the_axis_of_repeated_sampling_has_doublings_and_its_end(
    num_samples: int, ticks: list[int]
) -> None:
    rows = [{"method": "grpo", "k": k, "mean": 1.0, "low": 0.5, "high": 2.0}
            for k in range(1, num_samples + 1)]  # fmt: skip
    spec = pass_at_k_chart(rows, ["grpo"], "pass@k")["spec"]
    assert [layer["encoding"]["x"]["axis"]["values"] for layer in spec["layer"]] == [ticks] * 4


def test_the_points_of_a_curve_of_few_are_drawn() -> None:
    logs = {
        method: [[{"step": step, "reward_mean": 0.5} for step in range(num_steps)]]
        for method, num_steps in (("one", 1), ("few", 25), ("many", 26))
    }
    (chart,) = learning_charts(logs, list(logs))
    spec = chart["spec"]
    (dots,) = [layer["transform"][0]["filter"] for layer in spec["layer"] if "transform" in layer]
    assert dots == {"field": "method", "oneOf": ["one", "few"]}
    svg = vl_convert.vegalite_to_svg({**spec, "width": 300})
    marks = [group.partition("</g>")[0] for group in svg.split("mark-symbol role-mark")[1:]]
    assert [group.count("<path") for group in marks] == [26, 52]  # drawn, and to be pointed at


@pytest.mark.parametrize(("number", "shows_all"), [(4, True), (5, False)])
def test_of_many_methods_bands_show_of_those_picked_alone(number: int, shows_all: bool) -> None:
    methods = [f"method {place}" for place in range(number)]
    rows = [{"method": name, "k": k, "mean": 1.0, "low": 0.5, "high": 2.0}
            for name in methods for k in (1, 2)]  # fmt: skip
    layers = pass_at_k_chart(rows, methods, "pass@k")["spec"]["layer"]
    band, line = (layer["encoding"]["opacity"]["condition"]["test"] for layer in layers[:2])
    assert ("length(picked) == 0" in band) == shows_all
    assert "length(picked) == 0" in line


def test_a_legend_names_the_methods_of_its_chart_with_their_looks() -> None:
    methods = [f"method {place}" for place in range(9)]
    rows = [{"method": name, "k": k, "mean": 1.0, "low": 0.5, "high": 2.0}
            for name in methods[1:] for k in (1, 2)]  # fmt: skip
    legend = pass_at_k_chart(rows, methods, "pass@k")["legend"]
    assert [entry["method"] for entry in legend] == methods[1:]
    assert [entry["colour"] for entry in legend] == [1, 2, 3, 4, 5, 6, 0, 1]
    assert [entry["dash"] for entry in legend] == _methods(methods)["dash"].range[1:]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("dr_grpo", ["dr_grpo"]),
        (
            "method_number_9_with_a_rather_long_name",
            ["method_number_9_with_", "a_rather_long_name"],
        ),
        ("x" * 50, ["x" * 22, "x" * 22, "x" * 6]),
    ],
)
def test_a_long_name_beside_a_chart_is_whole_in_several_lines(name: str, lines: list[str]) -> None:
    assert _lines(name) == lines
    label = f"{name} − sft"
    assert _difference_lines(label)[-1].endswith("− sft")
    row = {"label": label, "method": name, "mean": 1.0, "low": 0.5, "high": 2.0}
    row |= {"significant": True, "significance": ""}
    axis = difference_chart([row], [name], "")["spec"]["layer"][1]["encoding"]["y"]["axis"]
    assert json.dumps({label: _difference_lines(label)}) in axis["labelExpr"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(-12.0, 83.0, [0, 20, 40, 60, 80]), (-70.0, -30.0, [-60, -40, -20, 0]), (0.0, 0.0, [0])],
)
def test_the_axis_of_differences_has_a_zero(low: float, high: float, ticks: list[float]) -> None:
    rows = [{"label": "a − b", "method": "a", "mean": low, "low": low, "high": high,
             "significant": True, "significance": ""}]  # fmt: skip
    axis = difference_chart(rows, ["a"], "")["spec"]["layer"][1]["encoding"]["x"]["axis"]
    assert axis["values"] == ticks and axis["labelOverlap"] is False


def cost_charts_of(**costs: tuple[float, float]) -> list[Any]:
    """Of methods with seconds of training and of GPUs, both with their parents."""
    subject = subject_of(dict.fromkeys(costs, 50))
    for row in subject.rows:
        row |= {"accuracy_ci_low": 0.4, "accuracy_ci_high": 0.6}
        row["train_seconds_with_parents"] = costs[row["method"]][0]
        row["gpu_seconds_training_with_parents"] = costs[row["method"]][1]
    return _cost_charts(subject)


def test_costs_far_apart_stand_on_a_logarithm_that_has_a_zero() -> None:
    for longest, scale in ((600.0, None), (36_000.0, "symlog")):
        (chart,) = cost_charts_of(base=(0.0, 0.0), sft=(60.0, 0.0), grpo=(longest, 0.0))
        x = chart["spec"]["layer"][0]["encoding"]["x"]
        assert x["scale"].get("type") == scale
    # Beyond the scale's constant a tenfold time is a step of the same width.
    assert x["scale"]["constant"] == pytest.approx(1 / 60)
    assert x["scale"]["domain"][0] < 0 < 10 < x["scale"]["domain"][1]
    hours = [0, *(time / 3600 for time in (60, 180, 600, 1800, 3600, 10_800, 36_000))]
    assert x["axis"]["values"] == pytest.approx(hours)
    for label in ("0", "1 min", "30 min", "10 h"):
        assert f'"{label}"' in x["axis"]["labelExpr"]
    rows = chart["spec"]["data"]["values"]
    assert [row["cost"] for row in rows] == pytest.approx([0, 1 / 60, 10], rel=1e-4)


def test_gpu_time_is_drawn_where_all_that_trains_has_some() -> None:
    titles = [
        [chart["title"] for chart in cost_charts_of(base=(0.0, 0.0), sft=sft, grpo=(90.0, 90.0))]
        for sft in ((60.0, 60.0), (60.0, 0.0))
    ]
    assert titles == [
        [
            "Accuracy against training time; dashed: no training",
            "Accuracy against GPU time; dashed: no training",
        ],
        ["Accuracy against training time; dashed: no training"],
    ]


def test_a_chart_of_one_seed_a_method_has_no_layer_of_seeds() -> None:
    row = {"method": "a", "decoding": "greedy", "mean": 1.0, "low": 0.5, "high": 2.0}
    seed = {"method": "a", "decoding": "greedy", "seed": 0, "value": 1.0}
    one, two = (accuracy_chart([row], seeds, ["a"]) for seeds in ([], [seed]))
    assert [len(chart["spec"]["layer"]) for chart in (one, two)] == [2, 3]
    assert ["seeds" in chart["title"] for chart in (one, two)] == [False, True]


def test_lengths_stand_with_the_number_of_completions_that_they_are_of() -> None:
    quantiles = dict.fromkeys(("q05", "q25", "q50", "q75", "q95"), 7.0)
    rows = [{"method": "a", "outcome": "wrong", "completions": 1, **quantiles}]
    layers = length_chart(rows, ["a"])["spec"]["layer"]
    assert layers[3]["encoding"]["text"]["field"] == "completions"
    assert "completions" in [one["field"] for one in layers[1]["encoding"]["tooltip"]]
    assert layers[1]["encoding"]["stroke"]["field"] == "method"  # an outline in full strength


def test_the_page_says_when_bands_show(page: Page) -> None:
    note = "With more than 4 methods, bands show of those picked in the legend alone."
    assert squeezed(page.text).count(note) == 2


def test_a_method_is_drawn_by_its_answers_else_its_reward_its_margin_or_its_loss() -> None:
    step = {"step": 1, "loss": 0.1, "reward_mean": -0.5}
    logs = {
        "grpo": [[{**step, "answer_reward_mean": 0.25}]],
        "other": [[step]],
        "sft": [[{"step": 1, "loss": 3.0}]],
        "dpo": [[{"step": 1, "loss": 0.6, "margin": 2.0}]],
    }
    charts = learning_charts(logs, list(logs))
    drawn = [chart["spec"]["data"]["values"] for chart in charts]
    assert [(row["method"], row["mean"]) for rows in drawn for row in rows] == [
        ("grpo", 25.0),
        ("other", -0.5),
        ("sft", 3.0),
        ("dpo", 2.0),
    ]
    ys = [chart["spec"]["layer"][1]["encoding"]["y"] for chart in charts]
    assert [y["title"] for y in ys] == [
        "% right", "mean reward of a step", "nats a token", "margin (DPO)",
    ]  # fmt: skip


# ------------------------------------------------------------------------------- shut, and the same


def test_nothing_in_the_page_is_fetched_from_anywhere(page: Page) -> None:
    assert page.policy.startswith("default-src 'none';")
    assert "unsafe" not in page.policy and "http" not in page.policy
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "data", "srcset", "poster"):
            assert value.startswith("#") or (tag, value) == ("link", "data:,"), (tag, name, value)
        assert not name.startswith("on") and name != "style"
    assert "@import" not in page.style and "url(" not in page.style


def test_the_policy_lets_the_two_scripts_run_and_no_other(page: Page) -> None:
    running = [text for found, text in page.scripts if found.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert len(running) == 2
    allowed = re.search(r"script-src ([^;]*);", page.policy)
    assert allowed is not None
    assert allowed.group(1).split() == [f"'sha256-{each}'" for each in hashes]


def test_hostile_texts_are_data_and_come_back_character_by_character(page: Page) -> None:
    assert page.tags["img"] == page.tags["iframe"] == 0
    assert page.tags["script"] == 3 + NUM_PROBLEMS
    (view,) = page.data["views"]
    index = view["browser"]
    place = {problem["id"]: number for number, problem in enumerate(index["problems"])}
    run = index["runs"].index([2, 0])
    for number, text in enumerate(HOSTILE.values()):
        problem = HOSTILE_ID if number == 0 else f"test-{number}"
        assert page.records[place[problem]]["runs"][run][0][2] == text
    assert index["problems"][place["test-1"]]["question"].startswith(ATTACK)


def test_json_cannot_end_its_script_element() -> None:
    text = json_for_script({"a": "</script><!--<script>", "b": "\u2028\ud800é"})
    assert "<" not in text and text.isascii()
    assert json.loads(text) == {"a": "</script><!--<script>", "b": "\u2028\ud800é"}
    assert "</script" not in script_text('x = "</script>"; y = "<!--"\r\n')


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes(
    paths: Paths, html: str, script: Callable[[str], ModuleType], tmp_path: Path, bundle: Any
) -> None:
    bundle.cache_clear()
    again = {**paths, "output": tmp_path / "again.html"}
    assert script("report").main(report_arguments(again)) == 0
    assert again["output"].read_text(encoding="utf-8") == html


# --------------------------------------------------------------------------------------- size bound


def right_methods(number: int) -> tuple[str, ...]:
    return tuple(method for method in METHODS if is_right(method, number))


def test_past_its_bound_the_page_keeps_a_part_of_every_group_and_says_so(
    paths: Paths, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    small = {**paths, "output": tmp_path / "small.html"}
    arguments = [*report_arguments(small), "--max-megabytes", "0.012"]
    assert script("report").main(arguments) == 0
    part = Page(small["output"].read_text(encoding="utf-8"))
    (view,) = part.data["views"]
    kept = view["browser"]["problems"]
    assert 5 <= len(kept) < NUM_PROBLEMS
    assert f"holds {len(kept)} of {NUM_PROBLEMS} problems" in view["kept"]
    assert "stratified" in view["kept"]
    size = sum(len(text) for found, text in part.scripts if str(found.get("id"))[:3] == "rec")
    assert size <= 12_000
    # Right by: all; base, sft, grpo; sft, grpo, twin; grpo; grpo and twin; none.
    all_patterns = {right_methods(number) for number in range(NUM_PROBLEMS)}
    assert {right_methods(number_of(problem["id"])) for problem in kept} == all_patterns
    assert len(all_patterns) == 6
    assert "grpo is best: 87.5 %" in squeezed(part.text)  # tables are of all problems


def test_the_size_of_the_page_is_that_of_the_study_unless_it_is_asked_for_otherwise(
    paths: Paths, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    def num_kept(*options: str) -> int:
        assert script("report").main([*report_arguments(made), *options]) == 0
        (view,) = Page(made["output"].read_text(encoding="utf-8")).data["views"]
        return len(view["browser"]["problems"])

    made = {**paths, "study": tmp_path / "study.json", "output": tmp_path / "report.html"}
    write_json(made["study"], {**read_json(paths["study"]), "report_megabytes": 0.012})
    assert num_kept() < NUM_PROBLEMS
    assert num_kept("--max-megabytes", "20") == NUM_PROBLEMS


def test_every_beginning_of_the_stratified_order_is_in_proportion() -> None:
    groups = ["common"] * 600 + ["some"] * 300 + ["rare"] * 100 + ["single"]
    random.Random(0).shuffle(groups)
    names = [f"p{number}" for number in range(len(groups))]
    group_of = dict(zip(names, groups, strict=True))
    order = stratified_order(names, groups)
    assert sorted(order) == sorted(names)
    assert {group_of[name] for name in order[:4]} == {"common", "some", "rare", "single"}
    for size in (50, 200, 500, 900):
        counts = Counter(group_of[name] for name in order[:size])
        assert counts["common"] == pytest.approx(0.6 * size, abs=4)
        assert counts["rare"] == pytest.approx(0.1 * size, abs=4)
    assert order == stratified_order(list(names), list(groups))


def test_a_problem_of_huge_completions_does_not_keep_the_others_out(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script, num_samples=0)
    path = made["study_dir"] / "m1" / "sft" / "seed0" / "completions" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    noise = random.Random(0).randbytes(60_000).hex()
    rows[0]["completion"] = noise
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert script("report").main([*report_arguments(made), "--max-megabytes", "0.06"]) == 0
    (view,) = Page(made["output"].read_text(encoding="utf-8")).data["views"]
    kept = {problem["id"] for problem in view["browser"]["problems"]}
    assert len(kept) == NUM_PROBLEMS - 1 and HOSTILE_ID not in kept


# -------------------------------------------------------------------------- where the answer stands


@pytest.mark.parametrize(
    ("text", "extracted", "grading", "marker", "marked"),
    [
        ("5 + 13 = 18.\n#### 18", "18", "strict", "####", "18"),
        ("#### $1,000.00 dollars", "1000", "strict", "####", "$1,000.00"),
        ("#### 5 + 13 = 18", "18", "strict", "####", "18"),
        ("#### heading\ntext\n#### 7\n#### 8", "7", "strict", "####", "7"),
        ("#### −5", "-5", "strict", "####", "−5"),
        ("so -$5 it is", "-5", "flexible", "####", "-$5"),
        (r"thus \boxed{\frac{1}{2}}", "1/2", "strict", "boxed", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{\$1{,}000}", "1000", "strict", "boxed", r"\$1{,}000"),
        ("The answer is 37/2.", "37/2", "strict", "The answer is", "37/2"),
        ("7, then 18. And 7.", "7", "lm_eval_flexible", "####", "7"),
        ("😀 #### 7", "7", "strict", "####", "7"),
    ],
)
def test_the_place_of_an_answer_is_found(
    text: str, extracted: str, grading: str, marker: str, marked: str
) -> None:
    place = locate_answer(text, extracted, grading, marker)
    assert place is not None
    assert text[slice(*place)] == marked


def test_the_place_is_the_one_that_the_grade_reads() -> None:
    assert locate_answer("7 apples\n#### 7", "7", "strict", "####") == (14, 15)
    assert locate_answer("7 or 7 or 7", "7", "flexible", "####") == (10, 11)
    assert locate_answer("#### 8", "7", "strict", "####") is None
    assert locate_answer("7", None, "strict", "####") is None
    # math-verify reads more than what follows the marker, and the harness no other marker.
    assert locate_answer("The result is $18$.", "18", "math_verify", "####") == (14, 17)
    assert locate_answer("#### 18", "18", "lm_eval_strict", "boxed") == (5, 7)


@pytest.mark.parametrize(
    "text", ["9" * 1_000_000, "#### x " * 150_000, "1," * 500_000, "{" * 10**6]
)
def test_a_megabyte_is_searched_at_once(text: str) -> None:
    started = time.perf_counter()
    for grading, marker in (("strict", "####"), ("strict", "boxed"), ("flexible", "####")):
        locate_answer(text, "7", grading, marker)
    assert time.perf_counter() - started < 20.0  # squared, it would be hours


def test_marks_are_counted_as_javascript_counts(page: Page) -> None:
    (view,) = page.data["views"]
    index = view["browser"]
    place = [problem["id"] for problem in index["problems"]].index("test-5")  # the emoji
    row = page.records[place]["runs"][index["runs"].index([2, 0])][0]
    units = row[2].encode("utf-16-le")
    start, end = row[8]
    assert units[2 * start : 2 * end].decode("utf-16-le") == "7"


# -------------------------------------------------------------------------------------------- looks


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_marks_stand_out_from_the_page(theme: str) -> None:
    css = (ASSETS / "report.css").read_text(encoding="utf-8")
    pairs = dict(re.findall(r"--([a-z]+): light-dark\((#\w{6}, #\w{6})\)", css))
    colours = {name: pair.split(", ")[theme == "dark"] for name, pair in pairs.items()}
    assert colours["page"] == SURFACES[theme]["page"]
    for name in ("ink", "quiet", "accent", "right", "wrong"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    assert contrast(colours["quiet"], colours["tint"]) >= 4.5
    assert contrast(colours["control"], colours["page"]) >= 3.0
    for colour in PALETTES[theme]:
        assert contrast(colour, colours["page"]) >= 3.0, colour


# Machado, Oliveira and Fernandes 2009, severity 1.0; applied to linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                        [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                        [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                        [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def lab(colour: str, seen_as: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as an eye sees it."""
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen_as @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                    [0.0193, 0.1192, 0.9505]]) @ linear  # fmt: skip
    scaled = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_methods_can_be_told_apart_with_every_common_colour_blindness(
    theme: str, blindness: str
) -> None:
    seen = [lab(colour, BLINDNESS[blindness]) for colour in PALETTES[theme]]
    distances = {
        (PALETTES[theme][a], PALETTES[theme][b]): float(np.linalg.norm(seen[a] - seen[b]))
        for a in range(len(seen))
        for b in range(a)
    }
    nearest = min(distances, key=lambda pair: distances[pair])
    assert distances[nearest] >= 15, (nearest, distances[nearest])


# ----------------------------------------------------------------------------------- command line


def test_help_tells_what_the_script_does() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "report.py"), "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    for words in ("opens from disk and needs no network", "--max-megabytes", "SUITE=FILE"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--problems", "file.jsonl"), ("--max-megabytes", "0")]
)
def test_a_bad_option_is_named(
    paths: Paths, script: Callable[[str], ModuleType], option: str, value: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        script("report").main([*report_arguments(paths), option, value])
    assert f"{option}: expected" in capsys.readouterr().err


def test_a_missing_completion_is_named(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    made = make_study(tmp_path, script, num_samples=0)
    path = made["study_dir"] / "m1" / "sft" / "seed0" / "completions" / "test.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join(lines[:-2]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no completion of problem 'test-39'.*grade.py again"):
        script("report").main(report_arguments(made))
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        script("report").main(report_arguments(made))


def test_without_problems_the_ids_stand_for_the_questions(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script, num_samples=0)
    arguments = report_arguments(made)
    at = arguments.index("--problems")
    assert script("report").main(arguments[:at] + arguments[at + 2 :]) == 0
    (view,) = Page(made["output"].read_text(encoding="utf-8")).data["views"]
    assert {problem["question"] for problem in view["browser"]["problems"]} == {""}


def test_a_suite_of_samples_alone_has_a_report(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script, num_samples=2, greedy=False)
    assert script("report").main(report_arguments(made)) == 0
    page = Page(made["output"].read_text(encoding="utf-8"))
    assert "grpo is best: 90.0 % of test right" in squeezed(page.text)
    assert "sampled completions" in page.text
    (problem, *_) = page.data["views"][0]["browser"]["problems"]
    assert problem["greedy"] is None and problem["sampled"] == [1.0] * 7


def test_a_study_of_the_base_model_alone_has_a_report(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = make_study(tmp_path, script)
    study = json.loads(made["study"].read_text(encoding="utf-8")) | {"methods": ["base"]}
    study["chains"] = {"base": ["base"]}
    made["study"].write_text(json.dumps(study), encoding="utf-8")
    arguments = report_arguments(made)
    compare = [*arguments[:4], "--output-dir", str(made["comparison"].parent)]
    assert script("compare").main(compare) == 0
    assert script("report").main(arguments) == 0
    words = squeezed(Page(made["output"].read_text(encoding="utf-8")).text)
    assert "base gets 10.0 % of test right" in words
    assert "The study has one method only." in words and "Learning curves" not in words
    assert "p-values are two-sided" not in words
    for note in ("starts from", "paired by", "means over seeds"):
        assert note not in words


def test_problems_of_a_suite_that_the_study_does_not_have_are_refused(
    paths: Paths, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.replace("test=", "tset=") for word in report_arguments(paths)]
    assert run_script(lambda: script("report").main(arguments)) == 1
    assert "--problems: no suite tset in the study; there are: test" in capsys.readouterr().err
