"""What the report's completions browser holds: problems, completions, grades, where answers stand.

Every problem is one record, compressed by itself, so that a page opens at once and unpacks what is
looked at. Where all would be more than the page may hold, a stratified part is kept.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gsm8k_core.answers import parse_number
from gsm8k_core.config import Comparison
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, iter_jsonl
from gsm8k_core.grading import GRADES
from gsm8k_core.layout import run_dir
from gsm8k_core.lm_eval_grades import GSM8K_COT_MARKER
from gsm8k_core.metrics import Floats
from gsm8k_core.problems import Problem
from gsm8k_core.tables import Cell, reading_grades

GRADE_COLUMNS = ("problem_id", "decoding", "sample_index", "correct", "extracted")
COUNTED = ("num_tokens", "truncated")

BYTES_PER_TOKEN = 4
"""Of text, about; only says how many problems are worth reading before any is compressed."""
BYTES_READ = 12
"""Bytes of text, about, read for a byte of the page: far more than has been seen to fit."""


Codes = NDArray[Any]
Texts = dict[Any, str]
"""Completions of one problem by (decoding, sample_index), and its `gold`."""


@dataclass(frozen=True)
class Graded:
    """The graded completions of one model × suite: a table for every run, sorted alike."""

    runs: list[tuple[str, int]]  # (method, seed)
    tables: list[pl.DataFrame]
    problem_ids: list[str]
    gradings: Sequence[str]  # `strict`, `flexible`, …: every grade that was taken

    def tables_of(self, method: str) -> list[pl.DataFrame]:
        """Those of a method, in the order of its seeds."""
        runs = zip(self.runs, self.tables, strict=True)
        return [table for (name, _), table in runs if name == method]

    def answers(self, decoding: str) -> dict[str, tuple[Codes, Codes]]:
        """For each method its answers and whether they are right, (S, P, n) each.

        An answer is a whole number, the same in all runs for the same rational number (or the same
        text, where it is none), and −1 for no answer.
        """
        code_of: dict[Fraction | str, int] = {}
        found = {}
        for method in dict.fromkeys(name for name, _ in self.runs):
            rows = pl.concat(
                table.filter(pl.col("decoding") == decoding)
                .sort("problem_id", "sample_index")
                .select("extracted", "correct")
                for table in self.tables_of(method)
            )
            codes = [-1 if text is None else code_of.setdefault(_value(text), len(code_of))
                     for text in rows["extracted"]]  # fmt: skip
            shape = (len(self.tables_of(method)), len(self.problem_ids), -1)
            found[method] = (np.reshape(codes, shape), rows["correct"].to_numpy().reshape(shape))
        return found


def read_graded(study: Comparison, study_dir: Path, model: str, suite: str) -> Graded:
    """Read the grades of every run of a model on a suite, which are of the same problems.

    Raises DataError when one is missing or malformed.
    """
    runs = [(m, seed) for m in study.methods for seed in study.seeds_of(m)]
    tables = [
        _read_table(run_dir(study_dir, model, *run) / "grades" / f"{suite}.parquet") for run in runs
    ]
    problem_ids = tables[0]["problem_id"].unique(maintain_order=True).to_list()
    gradings = [name for name in GRADES if any(table[name].count() for table in tables)]
    return Graded(runs, tables, problem_ids, gradings)


def _read_table(path: Path) -> pl.DataFrame:
    with reading_grades(path):
        table = pl.read_parquet(path, columns=[*GRADE_COLUMNS, *COUNTED, *GRADES])
    return table.sort("problem_id", "decoding", "sample_index")


# ------------------------------------------------------------------------------ what the page holds


@dataclass(frozen=True)
class Browser:
    """One model × suite, ready for the page."""

    index: Json  # what lists, filters and searches; every kept problem
    records: list[str]  # base64 of gzip of JSON, one for each kept problem
    num_problems: int  # of the suite
    num_groups: int  # of problems that the same methods get right


def build_browser(
    study: Comparison,
    study_dir: Path,
    model: str,
    suite: str,
    graded: Graded,
    cells: dict[str, Cell],
    problems: dict[str, Problem],
    max_bytes: int,
) -> Browser:
    """Pack the problems of a model × suite into at most `max_bytes`.

    `cells` are those of the study's methods, in their order. `problems` by id give questions and
    reference solutions (a problem that is not there shows its id alone).
    """
    summary = cells[study.methods[0]].metrics[0]
    grading = (summary["grading"], summary["marker"])  # the one that counts
    groups = _groups(cells)
    order = stratified_order(graded.problem_ids, groups)
    chosen = _worth_reading(order, graded, max_bytes)
    texts = _read_completions(study_dir, model, suite, graded, set(chosen))
    greedy = _of_runs([cell.greedy for cell in cells.values()])
    samples = _of_runs([cell.measured("pass_at_1") for cell in cells.values()])
    place_of = {problem_id: place for place, problem_id in enumerate(graded.problem_ids)}
    grades = [_by_problem(table, graded.gradings, set(chosen)) for table in graded.tables]

    kept: dict[str, tuple[Json, str]] = {}
    room = max_bytes
    for problem_id in chosen:
        at, problem = place_of[problem_id], problems.get(problem_id)
        completions = [
            _completions(grades[run][problem_id], texts[run].get(problem_id, {}), grading)
            for run in range(len(graded.runs))
        ]
        entry = {
            "id": problem_id,
            "question": "" if problem is None else problem.question,
            "gold": texts[0][problem_id]["gold"],
            "greedy": None if greedy is None else [int(value) for value in greedy[:, at]],
            "sampled": None if samples is None else [round(float(v), 3) for v in samples[:, at]],
        }
        record = pack({"answer": "" if problem is None else problem.answer, "runs": completions})
        size = len(record) + len(json.dumps(entry))
        if size > room:
            # One problem of huge completions is passed over; else the page is full.
            if size > max_bytes / 20:
                continue
            break
        kept[problem_id] = (entry, record)
        room -= size
    ordered = [kept[problem_id] for problem_id in _natural_order(kept)]
    index = {
        "methods": study.methods,
        "runs": [[study.methods.index(method), seed] for method, seed in graded.runs],
        "gradings": graded.gradings,
        "problems": [entry for entry, _ in ordered],
    }
    records = [record for _, record in ordered]
    return Browser(index, records, len(graded.problem_ids), len(set(groups)))


def _of_runs(values: Sequence[Floats | None]) -> Floats | None:
    """(runs, P) of the (S, P) of every method; None where one has none."""
    known = [one for one in values if one is not None]
    return np.concatenate(known) if len(known) == len(values) else None


def _groups(cells: dict[str, Cell]) -> list[str]:
    """For each problem, which methods get it right: on half of their seeds or more."""
    by_method = [cell.accuracy.mean(axis=0) >= 0.5 for cell in cells.values()]
    return ["".join("1" if right else "0" for right in column) for column in np.array(by_method).T]


def stratified_order(problem_ids: Sequence[str], groups: Sequence[str]) -> list[str]:
    """An order of which every beginning is a stratified sample.

    One problem of each group comes first, large groups before small ones; then every group is
    used up at the same rate. Within a group, problems are in the order of a digest of their id.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for problem_id, group in zip(problem_ids, groups, strict=True):
        members[group].append(problem_id)
    keys: dict[str, tuple[float, int, str]] = {}
    for group, names in members.items():
        names.sort(key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).hexdigest())
        for rank, name in enumerate(names):
            keys[name] = (rank / len(names), -len(names), group)
    return sorted(keys, key=lambda name: (*keys[name], name))


def _worth_reading(order: list[str], graded: Graded, max_bytes: int) -> list[str]:
    """The beginning of `order` that could fit; a study's completions may be more than memory."""
    tokens: dict[str, int] = defaultdict(int)
    for table in graded.tables:
        for problem_id, count in (
            table.group_by("problem_id").agg(pl.col("num_tokens").sum()).iter_rows()
        ):
            tokens[problem_id] += count
    room = max_bytes * BYTES_READ
    for place, problem_id in enumerate(order):
        room -= tokens[problem_id] * BYTES_PER_TOKEN
        if room < 0:
            return order[: place + 1]
    return order


def _natural_order(problem_ids: Sequence[str] | dict[str, tuple[Json, str]]) -> list[str]:
    """test-2 before test-10."""

    def key(name: str) -> list[tuple[int, int, str]]:
        # ASCII digits alone: int() refuses ², which isdigit() takes for one.
        parts = re.split(r"([0-9]{1,18})", name)
        return [(0, int(p), "") if k % 2 else (1, 0, p) for k, p in enumerate(parts)]

    return sorted(problem_ids, key=key)


def _read_completions(
    study_dir: Path, model: str, suite: str, graded: Graded, wanted: set[str]
) -> list[dict[str, Texts]]:
    """For each run, problem → {(decoding, sample_index): text, "gold": gold answer}."""
    found = []
    for method, seed in graded.runs:
        path = run_dir(study_dir, model, method, seed) / "completions" / f"{suite}.jsonl"
        texts: dict[str, Texts] = {}
        for number, row in enumerate(iter_jsonl(path), start=1):
            try:
                if row["problem_id"] in wanted:
                    text = texts.setdefault(row["problem_id"], {"gold": str(row["gold"])})
                    text[row["decoding"], row["sample_index"]] = row["completion"] or ""
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}, row {number}: not a completion ({error!r})") from None
        missing = wanted - texts.keys()
        if missing:
            raise DataError(
                f"{path}: no completion of problem {min(missing)!r}, which has grades; run "
                "grade.py again"
            )
        found.append(texts)
    return found


def _by_problem(
    table: pl.DataFrame, gradings: Sequence[str], wanted: set[str]
) -> dict[str, list[tuple[object, ...]]]:
    """Problem → rows (decoding, sample_index, correct, extracted, tokens, truncated, grades …)."""
    columns = ["decoding", "sample_index", "correct", "extracted", *COUNTED]
    rows: dict[str, list[tuple[object, ...]]] = defaultdict(list)
    for problem_id, *row in table.select("problem_id", *columns, *gradings).iter_rows():
        if problem_id in wanted:
            rows[problem_id].append(tuple(row))
    return rows


def _completions(
    rows: list[tuple[object, ...]], texts: Texts, grading: tuple[str, str]
) -> list[list[object]]:
    """One run's completions of one problem, as lists: thousands of keys would only be repeated."""
    packed: list[list[object]] = []
    for decoding, sample, correct, extracted, tokens, truncated, *grades in rows:
        text = texts.get((decoding, sample))
        if text is None:
            raise DataError(
                f"a graded {decoding} completion {sample} is not among the completions; run "
                "grade.py again"
            )
        answer = None if extracted is None else str(extracted)
        place = locate_answer(text, answer, *grading)
        packed.append(
            [
                0 if decoding == "greedy" else 1,
                sample,
                text,
                int(bool(correct)),
                answer,
                tokens,
                int(bool(truncated)),
                [None if grade is None else int(bool(grade)) for grade in grades],
                None if place is None else [_utf16_length(text[:end]) for end in place],
            ]
        )
    return packed


def _utf16_length(text: str) -> int:
    """Length as JavaScript counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def pack(value: object) -> str:
    """JSON, gzip, base64: the same text for the same value. ASCII JSON can hold half a pair."""
    raw = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


# ------------------------------------------------------------------ where in the text it was found

_CURRENCY = "$€£¥₹¢"
_MINUS = "\\-\u2010-\u2013\u2212\ufe63\uff0d"
_BRACED = r"\{[^{}\n]{0,80}\}"
_NUMBER_LIKE = re.compile(
    rf"(?:[+{_MINUS}]\s?)?(?:\\?[{_CURRENCY}]\s?)?[+{_MINUS}]?"
    rf"(?:\\[dt]?frac\s*(?:{_BRACED}\s*{_BRACED}|\d\s*\d)"
    r"|(?:\.?\d(?:[\d.,/\u2044\u00a0\u2007\u2009\u202f]|\{,\}|\\[,!])*))%?"
)
_TRAILING = re.compile(r"[.,/\u2044\u00a0\u2007\u2009\u202f]+\Z")
MAX_CANDIDATES = 40
"""Numbers looked at around the place where an answer is to be: enough for any equation."""
MAX_LINE = 2000


_number = lru_cache(maxsize=65536)(parse_number)  # the same few answers come again and again


def _value(answer: str) -> Fraction | str:
    """What an extracted answer is compared by: `18.0` of lm-eval's grades is 18."""
    value = _number(answer)
    return answer if value is None else value


def locate_answer(
    text: str, extracted: str | None, grading: str, marker: str
) -> tuple[int, int] | None:
    """Where in `text` the extracted answer stands, or None where no number there has its value.

    For people to see; grades never depend on it. Looks where `grading` looks: after the marker for
    a strict one, from the end for a flexible one, and for math-verify in both places.
    """
    if extracted is None:
        return None
    value = _number(extracted)
    if grading == "lm_eval_strict" and marker != GSM8K_COT_MARKER:
        marker = "####"  # whatever the prompt asks for
    stretches: list[tuple[int, int]] = []
    if not grading.endswith("flexible"):
        stretches += islice(_strict_places(text, marker), MAX_CANDIDATES)
    if grading.endswith("flexible") or grading == "math_verify":
        stretches.append((max(0, len(text) - MAX_LINE), len(text)))
    for start, end in stretches:
        place = _last_with_value(text, start, end, extracted, value)
        if place is not None:
            return place
    return None


def _strict_places(text: str, marker: str) -> Iterator[tuple[int, int]]:
    """Stretches of text in which a strict grader reads the answer, in its order."""
    if marker == "boxed":
        at = text.rfind("\\boxed")
        if at >= 0:
            yield at + len("\\boxed"), min(len(text), at + MAX_LINE)
        return
    for match in re.finditer(re.escape(marker), text):
        start = match.end()
        while start < len(text) and text[start].isspace():
            start += 1
        stop = min(len(text), start + MAX_LINE)
        newline = text.find("\n", start, stop)
        following = text.find(marker, start, stop)
        yield start, min(place for place in (newline, following, stop) if place >= 0)


def _last_with_value(
    text: str, start: int, end: int, extracted: str, value: Fraction | None
) -> tuple[int, int] | None:
    """The last number of a stretch that has the value, or else that has it but for its sign."""
    spans = [_trimmed(match) for match in _NUMBER_LIKE.finditer(text, start, end)]
    without_sign = None
    for first, last in reversed(spans[-MAX_CANDIDATES:]):
        shown = text[first:last]
        if shown == extracted:
            return first, last
        found = _number(shown)
        if found is None or value is None:
            continue
        if found == value:
            return first, last
        if abs(found) == abs(value) and without_sign is None:
            without_sign = (first, last)
    return without_sign


def _trimmed(match: re.Match[str]) -> tuple[int, int]:
    """A match without the full stop or comma that ends a sentence, not a number."""
    trailing = _TRAILING.search(match.group())
    return match.start(), match.end() - (len(trailing.group()) if trailing else 0)
