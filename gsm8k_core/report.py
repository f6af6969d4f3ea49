"""The report of a study: one HTML file that needs no network, from what the runs left behind.

The answer in words, as a table and as a plot; learning curves, cost, repeated sampling, lengths and
agreement; the completions themselves; where everything came from. Charts are Vega-Lite, whose
library is put into the page. A content security policy forbids the page any request, and lets no
script run but its own two, known by their hashes. What models wrote is data, shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gsm8k_core.charts import (
    COSTS,
    MINUS,
    accuracy_chart,
    accuracy_rows,
    agreement_charts,
    cost_chart,
    cost_rows,
    decodings,
    difference_chart,
    learning_charts,
    length_chart,
    pass_at_k_chart,
    scaled,
    themes,
    truncation_chart,
)
from gsm8k_core.config import Comparison
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, read_json, read_record, sha256_file
from gsm8k_core.layout import run_dir
from gsm8k_core.metrics import (
    agreement,
    is_significant,
    powers_up_to,
)
from gsm8k_core.problems import read_problems
from gsm8k_core.report_browser import Browser, Codes, Graded, build_browser, read_graded
from gsm8k_core.tables import (
    COST_COLUMNS,
    DOUBTS,
    MAX_BANDS,
    MEASURES,
    OTHER_PAIRS,
    PASS_AT_1_NOTE,
    Cell,
    all_on_gpus,
    bounds,
    compared_by_pass_at_1,
    counted,
    detectable,
    has_clusters,
    level_text,
    notes_on,
    notes_on_clusters,
    p_text,
    percent,
    points,
    problems_text,
    read_cells,
    read_comparison,
    read_pairs,
    read_pass_at_k,
    read_training_logs,
    rows_of,
)

SPACE = "\u00a0"
BANDS_NOTE = f"With more than {MAX_BANDS} methods, bands show of those picked in the legend alone."
SNIPPET = "window.vegaEmbed = vegaEmbed;"


@dataclass(frozen=True)
class Sources:
    """Where a report reads."""

    study_dir: Path
    comparison: Path
    problems: dict[str, Path]  # suite → problems, JSONL
    runs_dir: Path | None = None  # manifests of the calls of snakemake


@dataclass(frozen=True)
class Subject:
    """One model on one suite: a view of the page."""

    study: Comparison
    model: str
    suite: str
    rows: list[Json]  # of the comparison, most accurate first
    cells: dict[str, Cell]  # by method, in the order of the study
    pass_at_k: list[Json]  # rows of pass_at_k.csv
    pairs: dict[tuple[str, str], Json]  # rows of pairs.csv by `method` and `other`, either way
    num_other_pairs: int  # of the model, on all suites, that no column of the comparison tests
    flag_notes: list[str]  # what its flags mean


def build_report(study: Comparison, sources: Sources, max_bytes: int) -> str:
    """The page. `max_bytes` bounds the problems and completions that it holds, shared by the views.

    Raises DataError when a file that a study must have is missing or malformed.
    """
    comparison = read_comparison(sources.comparison)
    curves = read_pass_at_k(sources.comparison.with_name("pass_at_k.csv"))
    pairs = read_pairs(sources.comparison.with_name("pairs.csv"))
    problems = {suite: read_problems(path) for suite, path in sources.problems.items()}
    charts: Json = {}
    learning = {
        model: _add(charts, learning_charts(read_training_logs(study, sources.study_dir, model),
                                            study.methods))
        for model in study.models
    }  # fmt: skip
    num_views = len(study.models) * len(study.suites)
    views, browsers = [], []
    for model in study.models:
        for suite in study.suites:
            subject = _read_subject(
                study, sources.study_dir, comparison, curves, pairs, model, suite
            )
            # Every completion's grades: those of one suite at a time are in memory.
            graded = read_graded(study, sources.study_dir, model, subject.suite)
            by_id = {problem.id: problem for problem in problems.get(subject.suite, [])}
            browser = build_browser(
                study,
                sources.study_dir,
                model,
                subject.suite,
                graded,
                subject.cells,
                by_id,
                max_bytes // num_views,
            )
            view = _view(subject, graded, charts)
            address = "v/" + "/".join(quote(part, safe="") for part in (model, subject.suite))
            views.append(
                view | {"browser": browser.index, "kept": _kept(browser), "address": address}
            )
            browsers.append(browser)
    data = {
        "themes": themes(),
        "charts": charts,
        "views": [
            {key: view[key] for key in ("model", "suite", "browser", "kept", "compared", "ranked")}
            for view in views
        ],
    }
    records = [
        (f"record-{place}-{number}", record)
        for place, browser in enumerate(browsers)
        for number, record in enumerate(browser.records)
    ]
    provenance = _provenance(study, sources)
    return _render(study, views, charts, learning, provenance, data, records)


def _render(
    study: Comparison,
    views: list[Json],
    charts: Json,
    learning: dict[str, list[str]],
    provenance: Json,
    data: Json,
    records: list[tuple[str, str]],
) -> str:
    environment = Environment(
        loader=PackageLoader("gsm8k_core", "report_assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def asset(name: str) -> str:
        source, _, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
        return source

    vega, javascript = script_text(vl_convert.javascript_bundle(SNIPPET)), asset("report.js")
    css = asset("report.css")
    html = environment.get_template("report.html.jinja").render(
        study=study,
        views=views,
        charts=charts,
        learning=learning,
        learning_note=_learning_note(study),
        provenance=provenance,
        records=[(name, Markup(record)) for name, record in records],
        data=Markup(json_for_script(data)),
        vega=Markup(vega),
        javascript=Markup(javascript),
        css=Markup(css),
        script_hashes=Markup(f"{_csp_hash(vega)} {_csp_hash(javascript)}"),
        style_hash=Markup(_csp_hash(css)),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def json_for_script(value: Any) -> str:
    """JSON that cannot end the script element that holds it, nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def script_text(code: str) -> str:
    """JavaScript that can stand in a script element, with the line ends that its hash will see."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _add(charts: Json, made: list[Json]) -> list[str]:
    """Give charts their ids on the page."""
    ids = [f"chart-{len(charts) + place}" for place in range(len(made))]
    charts |= dict(zip(ids, made, strict=True))
    return ids


# ------------------------------------------------------------------------------------------ reading


def _read_subject(
    study: Comparison,
    study_dir: Path,
    comparison: pl.DataFrame,
    curves: pl.DataFrame,
    pairs: pl.DataFrame,
    model: str,
    suite: str,
) -> Subject:
    ranked = sorted(rows_of(study, comparison, model, suite), key=lambda row: -row["accuracy"])
    is_here = (pl.col("model") == model) & (pl.col("suite") == suite)
    cells = read_cells(study, study_dir, model, suite, {})
    compared = either_way(pairs.filter(is_here).to_dicts())
    for pair in itertools.permutations(study.methods, 2):
        if pair not in compared:
            raise DataError(
                f"pairs.csv has no row for {' and '.join(pair)} of {model} on {suite}: it belongs "
                "to another study; run compare.py again"
            )
    others = pairs.filter((pl.col("model") == model) & (pl.col("family") == OTHER_PAIRS))
    pass_at_k = curves.filter(is_here).to_dicts()
    notes = [note for note in notes_on(comparison.filter(is_here)) if note.startswith("flag ")]
    return Subject(study, model, suite, ranked, cells, pass_at_k, compared, others.height, notes)


def either_way(pairs: Sequence[Json]) -> dict[tuple[str, str], Json]:
    """Rows of pairs.csv by `method` and `other`, and the same seen from `other`."""
    found = {}
    for row in pairs:
        method, other = row["method"], row["other"]
        found[method, other] = row
        found[other, method] = row | {
            "method": other,
            "other": method,
            "delta": -row["delta"],
            "delta_ci_low": -row["delta_ci_high"],
            "delta_ci_high": -row["delta_ci_low"],
        }
    return found


def _kept(browser: Browser) -> str:
    num_kept = len(browser.records)
    if num_kept == browser.num_problems:
        return f"All {num_kept:,} problems, with every completion of every method and seed."
    return (
        f"To stay within its size this page holds {num_kept:,} of {browser.num_problems:,} "
        f"problems: a sample stratified by which methods get a problem right "
        f"({browser.num_groups:,} groups; one problem of each group first, then the same share of "
        "each). Tables and charts above are of all problems. To hold more, raise "
        "study.report_megabytes, or --max-megabytes of scripts/report.py."
    )


# --------------------------------------------------------------------------------------- the answer


def _view(subject: Subject, graded: Graded, charts: Json) -> Json:
    study, rows = subject.study, subject.rows
    methods = study.methods
    decoding = _compared_decoding(subject)
    pairs = _pairs(subject, graded.answers(decoding))
    sampling = _sampling_charts(subject)
    return {
        "model": subject.model,
        "suite": subject.suite,
        "headline": _headline(subject),
        "context": _context(subject),
        "findings": _findings(subject),
        "table": _table(subject),
        "pass_at_1_table": _pass_at_1_table(subject),
        "seed_table": _seed_table(subject),
        "cost_table": _cost_table(subject),
        "flagged": any(_flags(row) for row in rows),
        "flag_notes": [note.replace("`", "") for note in subject.flag_notes],
        "table_note": _table_note(subject),
        "compared": _compared(subject),
        "ranked": [methods.index(row["method"]) for row in rows],
        "cost_note": _cost_note(rows, bool(sampling)),
        "agreement_note": (
            "The answer is what the grade that counts has read, compared as an exact number. "
            "Seeds are compared with the same seed of the other method, and shares are means over "
            "seeds and problems"
            + (
                "."
                if decoding == "greedy"
                else ", and over every sample of one with every sample of the other."
            )
            + " Intervals of B − A are paired, each for itself. p is Holm-corrected: of a method "
            "and its parent or base it is that of the table at the top; all other pairs, on all "
            "suites of the model, are one family. Both stand in pairs.csv in full."
        ),
        "pairs": [_pair_cells(pair) for pair in pairs],
        "charts": {
            "accuracy": _add(charts, [_accuracy_chart(subject)])[0],
            "differences": _add(charts, _difference_charts(subject)),
            "cost": _add(charts, _cost_charts(subject)),
            "sampling": _add(charts, sampling),
            "length": _add(charts, [_length_chart(subject, graded)])[0],
            "truncation": _add(charts, [_truncation_chart(subject, graded)])[0],
            "agreement": _add(
                charts, agreement_charts(_both_ways(pairs), methods) if pairs else []
            ),
        },
    }


def _headline(subject: Subject) -> str:
    best = subject.rows[0]
    name, score = best["method"], _share(best["accuracy"])
    if len(subject.rows) == 1:
        return f"{name} gets {score} of {subject.suite} right"
    unsure = [
        lead["other"]
        for lead in _leads(subject)
        if lead["delta"] <= 0 or not _is_significant(lead["p_value_holm"], subject.study)
    ]
    if not unsure and _has_one_run(subject):
        return f"In one run of each method {name} comes first: {score} of {subject.suite} right"
    if not unsure:
        return f"{name} is best: {score} of {subject.suite} right"
    equal = [row["method"] for row in subject.rows if not _is_ahead(best, row)]
    unsure = [other for other in unsure if other not in equal]
    if len(equal) == len(subject.rows):
        return f"{_list(equal)} are equal: {score} of {subject.suite} right"
    first, its = f"{name} comes first", "its"
    if len(equal) > 1:
        first, its = f"{_list(equal)} come first together", "their"
    if not unsure:
        return f"{first}: {score} of {subject.suite} right"
    over = _list(unsure) if len(unsure) <= 3 else f"{len(unsure)} of the others"
    if len(unsure) > 3 and len(unsure) == len(subject.rows) - 1:
        over = "every other method"
    return (
        f"{first} with {score} of {subject.suite} right, but {its} lead over {over} may be chance"
    )


def _is_ahead(row: Json, other: Json) -> bool:
    """Whether a row's accuracy is above another's by more than means of floats are off."""
    return bool(row["accuracy"] > other["accuracy"] + 1e-9)


def _rank(row: Json, rows: list[Json]) -> int:
    """A row's place; equal ones share theirs."""
    return 1 + sum(_is_ahead(other, row) for other in rows)


def _has_one_run(subject: Subject) -> bool:
    """Whether a method was trained with one seed, of which tests say nothing."""
    return any(row["num_seeds"] == 1 and row["parent"] is not None for row in subject.rows)


def _context(subject: Subject) -> str:
    row, summary = subject.rows[0], subject.cells[subject.rows[0]["method"]].metrics[0]
    decoding = "sampled completions" if summary["accuracy"] is None else "greedy completions"
    seeds = sorted({entry["num_seeds"] for entry in subject.rows})
    level = level_text(subject.study.confidence)
    sizes = row["num_problems"], row["num_clusters"]
    drawn = "clusters" if has_clusters(*sizes) else "problems"
    over, pairs = f"over seeds and {drawn}", "seed and problem"
    if max(seeds) == 1:
        over, pairs = f"over {drawn} alone", "problem"
    if len(subject.rows) > 1:
        over += f"; differences are paired by {pairs}"
    return (
        f"{subject.model}, {problems_text(*sizes)}, "
        f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'} a method, "
        f"{decoding}, graded {summary['grading']}. Intervals are {level}, "
        f"{over}."
    )


def _leads(subject: Subject) -> list[Json]:
    """The first method against each of the others, the runner-up first: rows of pairs.csv."""
    best, *others = subject.rows
    return [subject.pairs[best["method"], row["method"]] for row in others]


def _correction(subject: Subject, pair: Json) -> str:
    """What the p-value of a pair is corrected for, in words."""
    if pair["family"] != OTHER_PAIRS:
        return "Holm-corrected"
    if subject.num_other_pairs == 1:
        return "uncorrected"  # of one pair there is nothing to correct for
    of_all_suites = ", of all suites" if len(subject.study.suites) > 1 else ""
    return (
        f"Holm-corrected over the {subject.num_other_pairs} pairs that the table does not test"
        f"{of_all_suites}"
    )


def _findings(subject: Subject) -> list[Json]:
    """Sentences, most accurate method first, each with how sure it is."""
    findings = []
    # What one of the first two was trained from is told of with its child.
    related = any(
        row["parent"] == other["method"]
        for row, other in itertools.permutations(subject.rows[:2], 2)
    )
    if len(subject.rows) > 1 and not related:
        findings.append(_lead_finding(subject))
    for row in subject.rows:
        if row["parent"] is not None and row["delta_vs_parent"] is not None:
            findings.append(_parent_finding(subject, row))
    if _has_one_run(subject):
        findings.append(
            {
                "kind": "caution",
                "text": "Trained with one seed: intervals and tests say nothing of what another "
                "seed would have given.",
            }
        )
    elif any(row["num_seeds"] == 2 and row["parent"] is not None for row in subject.rows):
        findings.append(
            {
                "kind": "caution",
                "text": "Trained with two seeds: intervals are wide, and of differences that are "
                "none up to 7 in a hundred come out as significant at 5\u00a0%. From three seeds "
                "on it is 6 at most.",
            }
        )
    # Few seeds have been told of.
    for starts, told in (
        (("seeds: ", "parent: ", "base: "), "Not all was made alike"),
        (tuple(DOUBTS), "Some numbers need a second look"),
    ):
        flagged = [
            row["method"]
            for row in subject.rows
            if any(flag.startswith(starts) for flag in _flags(row))
        ]
        if flagged:
            text = f"{told}: see the flags of {_list(flagged)} below the table."
            findings.append({"kind": "caution", "text": text})
    return findings


def _parent_finding(subject: Subject, row: Json) -> Json:
    numbers = {
        "delta": row["delta_vs_parent"],
        "low": row["delta_vs_parent_ci_low"],
        "high": row["delta_vs_parent_ci_high"],
        "p": row["p_value_vs_parent_holm"],
        "p_alone": row["p_value_vs_parent"],
    }
    return _difference_words(
        subject,
        row["method"],
        row["parent"],
        numbers,
        "Holm-corrected",
        row["smallest_detectable_delta"],
    )


def _lead_finding(subject: Subject) -> Json:
    """The first method against the runner-up."""
    lead = _leads(subject)[0]
    numbers = {
        "delta": lead["delta"],
        "low": lead["delta_ci_low"],
        "high": lead["delta_ci_high"],
        "p": lead["p_value_holm"],
        "p_alone": lead["p_value"],
    }
    correction = _correction(subject, lead)
    return _difference_words(subject, lead["method"], lead["other"], numbers, correction)


def _difference_words(
    subject: Subject,
    method: str,
    other: str,
    numbers: Json,
    correction: str,
    smallest: float | None = None,
) -> Json:
    """One difference in words; `kind` is `better`, `worse` or `open`."""
    num_seeds = max(len(subject.study.seeds_of(name)) for name in (method, other))
    sizes = subject.rows[0]["num_problems"], subject.rows[0]["num_clusters"]
    evidence = (
        f"{points(numbers['delta'])} points {_bounds(numbers['low'], numbers['high'], points)}, "
        f"{_p(numbers['p'])} ({correction}), "
        f"n = {problems_text(*sizes)} × {counted(num_seeds, 'seed')}"
    )
    name, reference = (Markup("<strong>{}</strong>").format(text) for text in (method, other))
    if not _is_significant(numbers["p"], subject.study):
        text = Markup("{} against {}: not significant, {}.").format(name, reference, evidence)
        if _is_significant(numbers["p_alone"], subject.study):
            text += f" Alone, without the correction, it would be: {_p(numbers['p_alone'])}."
        if smallest is not None:
            text += (
                " So few seeds and problems show no difference reliably."
                if smallest > 1
                else f" A true one of {percent(smallest)} points would be found four times in "
                "five, before the correction."
            )
        return {"kind": "open", "text": text}
    better = numbers["delta"] > 0
    verb = "beats" if better else "does worse than"
    if _has_one_run(subject):
        verb = "is ahead of" if better else "is behind"
    text = Markup("{} {} {} by {}.").format(name, verb, reference, evidence)
    return {"kind": "better" if better else "worse", "text": text}


def _is_significant(p_value: float, study: Comparison) -> bool:
    return is_significant(p_value, study.confidence)


def _flags(row: Json) -> list[str]:
    """What makes a row's comparison doubtful."""
    return row["flags"].split("; ") if row["flags"] else []


def _compared(subject: Subject) -> list[int]:
    """Which two methods the completions browser compares at first: the best and its parent."""
    methods, best = subject.study.methods, subject.rows[0]
    parent = best["parent"] if best["parent"] in methods else subject.rows[-1]["method"]
    return [methods.index(parent), methods.index(best["method"])]


def _table(subject: Subject) -> Json:
    rows = subject.rows
    columns: list[tuple[str, Any]] = [("seeds", _seeds_cell), ("right", _accuracy_cell)]
    columns += _difference_columns(rows, MEASURES["accuracy"])
    if any(row["num_samples"] for row in rows):
        columns.append(("sampled pass@1", _sampled_cell("pass_at_1")))
    largest = {powers_up_to(row["num_samples"])[-1] for row in rows if row["num_samples"]}
    if largest - {1}:
        title = f"maj@{max(largest)}" if len(largest) == 1 else "maj@n"
        columns.append((title, _sampled_cell("maj_at_n")))
    for name, title in (("accuracy_flexible", "flexible"), ("format_fraction", "in format")):
        if any(row[name] is not None for row in rows):
            columns.append((title, _share_cell(name)))
    if any(row["smallest_detectable_delta"] is not None for row in rows):
        columns.append(("detectable from", _detectable_cell(MEASURES["accuracy"])))
    return {
        "columns": [title for title, _ in columns],
        "rows": [
            {
                "rank": _rank(row, rows),
                "method": row["method"],
                "flags": _flags(row),
                "cells": [make(row) for _, make in columns],
            }
            for row in rows
        ],
    }


def _pass_at_1_table(subject: Subject) -> Json:
    """Differences of sampled pass@1; without rows where they are those of accuracy."""
    rows = compared_by_pass_at_1(subject.rows)
    of = MEASURES["pass_at_1"]
    columns: list[tuple[str, Any]] = [("sampled pass@1", _sampled_cell("pass_at_1"))]
    columns += _difference_columns(rows, of)
    columns.append(("detectable from", _detectable_cell(of)))
    return {
        "columns": [title for title, _ in columns],
        "rows": [
            {"method": row["method"], "cells": [make(row) for _, make in columns]} for row in rows
        ],
        "note": PASS_AT_1_NOTE,
    }


def _seed_table(subject: Subject) -> Json:
    """Accuracy of every seed; greedy and sampled where there are both."""
    seeds_of = subject.study.seeds_of
    seeds = sorted({seed for row in subject.rows for seed in seeds_of(row["method"])})
    rows = []
    for row in subject.rows:
        method = row["method"]
        runs = dict(zip(seeds_of(method), subject.cells[method].metrics, strict=True))
        for decoding, name in decodings(row, subject.cells[method].metrics):
            shares = [runs[seed][name] if seed in runs else None for seed in seeds]
            rows.append(
                {"method": method, "decoding": decoding, "cells": list(map(_share, shares))}
            )
    return {"seeds": seeds, "rows": rows}


def _cell(main: str, detail: str = "", against: str = "") -> Json:
    return {"main": main, "detail": detail, "against": against}


def _seeds_cell(row: Json) -> Json:
    return _cell(str(row["num_seeds"]))


def _accuracy_cell(row: Json) -> Json:
    return _cell(_share(row["accuracy"]), _interval(row, "accuracy"))


def _sampled_cell(name: str) -> Any:
    def make(row: Json) -> Json:
        if not row["num_samples"]:
            return _cell("")
        return _cell(_share(row[name]), _interval(row, name))

    return make


def _share_cell(name: str) -> Any:
    def make(row: Json) -> Json:
        return _cell(_share(row[name]))

    return make


def _difference_columns(rows: list[Json], of: str) -> list[tuple[str, Any]]:
    """Differences to the parent and to the base with their p-values; `of` as in `MEASURES`."""
    columns: list[tuple[str, Any]] = []
    for reference, title in (("parent", "against its parent"), ("base", "against base")):
        if any(row[f"delta{of}_vs_{reference}"] is not None for row in rows):
            columns.append((f"{title}, points", _difference_cell(reference, of)))
            columns.append(("p", _p_cell(reference, of)))
    return columns


def _difference_cell(reference: str, of: str) -> Any:
    def make(row: Json) -> Json:
        name = f"delta{of}_vs_{reference}"
        if row[name] is None:
            return _cell("")
        against = row["parent"] if reference == "parent" else ""
        return _cell(points(row[name]), _interval(row, name, points), against)

    return make


def _p_cell(reference: str, of: str = "") -> Any:
    def make(row: Json) -> Json:
        return _cell(p_text(row[f"p_value{of}_vs_{reference}_holm"]))

    return make


def _detectable_cell(of: str) -> Any:
    def make(row: Json) -> Json:
        return _cell(detectable(row[f"smallest_detectable_delta{of}"]))

    return make


def _table_note(subject: Subject) -> str:
    notes = []
    tested = [row[f"p_value_vs_{name}_holm"] for row in subject.rows for name in ("parent", "base")]
    if any(p_value is not None for p_value in tested):
        notes.append(
            "p-values are two-sided and Holm-corrected within a model: one family against parents, "
            "another against a base that is not the parent."
        )
    if len(subject.rows) > 1:
        notes.append(
            "A method is called best where it is ahead of every other significantly: by the "
            "p-values here of what it was trained from or what was trained from it, else by one "
            "that is Holm-corrected over all pairs of methods without a p-value here, on all "
            "suites of the model."
        )
    if any(row["accuracy_flexible"] is not None for row in subject.rows):
        notes.append(
            "“Flexible”: right where the last number counts, wherever it stands; “in "
            "format”: the answer stands where the prompt asked for it."
        )
    if any(row["smallest_detectable_delta"] is not None for row in subject.rows):
        notes.append(
            "“Detectable from”: the smallest difference to the parent, in points, that as many "
            "problems and seeds would show four times in five, before the correction."
        )
    notes += notes_on_clusters(subject.rows)
    return " ".join(notes)


def _learning_note(study: Comparison) -> str:
    if len(study.seeds) == 1:
        return "Lines are running means."
    return (
        "Lines are means over seeds of a running mean, bands go from the smallest to the largest "
        f"seed. {BANDS_NOTE}"
    )


def _cost_note(rows: list[Json], has_curves: bool) -> str:
    """What the table and charts of cost show; `has_curves`: those of pass@k are among them."""
    notes = []
    if any(row["parent"] is not None for row in rows):
        notes.append(
            "“Training”, which is without validation, tokens and peak memory are of the method's "
            "own stage; “with parents” and the charts add the stages that it starts from."
        )
    if any(row["num_seeds"] > 1 for row in rows):
        notes.append("All are means over seeds.")
    notes.append(
        "Generating is for one evaluation. Times are of the machines that ran: compare them within "
        "a study only."
    )
    memory = ("peak_memory_mb_training", "peak_memory_mb_generating")
    if any(row[name] is not None for row in rows for name in memory):
        notes.append(
            "Peak memory on a CPU is that of the whole process, on a GPU what torch had allocated."
        )
    if has_curves:
        notes.append(
            f"The bands of pass@k and maj@k are their intervals, as in the table. {BANDS_NOTE}"
        )
    return " ".join(notes)


def _cost_table(subject: Subject) -> Json:
    """The comparison's own columns of cost, without those that are empty here."""
    columns = {
        title: [render(row) for row in subject.rows]
        for title, render in COST_COLUMNS.items()
        if title not in ("model", "suite", "method")
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [
        {"method": row["method"], "cells": [cells[place] for cells in columns.values()]}
        for place, row in enumerate(subject.rows)
    ]
    return {"columns": list(columns), "rows": rows}


# --------------------------------------------------------------------------------- charts' numbers


def _accuracy_chart(subject: Subject) -> Json:
    methods = subject.study.methods
    runs = {
        method: dict(zip(subject.study.seeds_of(method), cell.metrics, strict=True))
        for method, cell in subject.cells.items()
    }
    return accuracy_chart(*accuracy_rows(subject.rows, runs), methods)


def _difference_charts(subject: Subject) -> list[Json]:
    """Against parents; and against the base model, where that is another comparison."""
    titles = {"parent": "Differences to the parent", "base": "Differences to the base model"}
    rows = {
        reference: [
            _difference_point(subject, row, reference)
            for row in subject.rows
            if row[f"delta_vs_{reference}"] is not None
        ]
        for reference in titles
    }
    if all(row["parent"] in (None, row["base"]) for row in subject.rows):
        rows["base"] = []
    return [
        difference_chart(
            rows[reference],
            subject.study.methods,
            f"{title}: filled where significant, hollow where not",
        )
        for reference, title in titles.items()
        if rows[reference]
    ]


def _difference_point(subject: Subject, row: Json, reference: str) -> Json:
    name = f"delta_vs_{reference}"
    p_value = row[f"p_value_vs_{reference}_holm"]
    significant = _is_significant(p_value, subject.study)
    words = "significant" if significant else "not significant"
    return {
        "label": f"{row['method']} {MINUS} {row[reference]}",
        "method": row["method"],
        "significant": significant,
        "significance": f"{words}, {_p(p_value)}",
    } | scaled(row, name)


def _cost_charts(subject: Subject) -> list[Json]:
    charts = []
    for name in COSTS:
        values = [row[name] for row in subject.rows]
        if any(value is None for value in values) or not any(values):
            continue
        if name.startswith("gpu_") and not all_on_gpus(subject.rows):
            continue
        charts.append(cost_chart(cost_rows(subject.rows, name), subject.study.methods, name))
    return charts


def _sampling_charts(subject: Subject) -> list[Json]:
    methods = subject.study.methods
    titles = {
        "pass_at_k": "pass@k: one of k samples is right",
        "maj_at_k": "maj@k: the most frequent of k answers is right",
    }
    charts = []
    for name, title in titles.items():
        rows = [
            {"method": row["method"], "k": row["k"]} | scaled(row, name)
            for row in subject.pass_at_k
            if row[name] is not None
        ]
        if len({row["k"] for row in rows}) > 1:
            charts.append(pass_at_k_chart(rows, methods, title))
    return charts


def _main_completions(graded: Graded, method: str) -> pl.DataFrame:
    """Greedy completions of all seeds, or the samples where there are no greedy ones."""
    columns = ("decoding", "correct", "num_tokens", "truncated")
    table = pl.concat(each.select(columns) for each in graded.tables_of(method))
    greedy = table.filter(pl.col("decoding") == "greedy")
    return greedy if greedy.height else table


def _length_chart(subject: Subject, graded: Graded) -> Json:
    rows = []
    for method in subject.study.methods:
        table = _main_completions(graded, method)
        for outcome, right in (("right", True), ("wrong", False)):
            tokens = table.filter(pl.col("correct") == right)["num_tokens"].to_numpy()
            if tokens.size:
                quantiles = np.quantile(tokens, (0.05, 0.25, 0.5, 0.75, 0.95))
                names = ("q05", "q25", "q50", "q75", "q95")
                rows.append(
                    {"method": method, "outcome": outcome, "completions": int(tokens.size)}
                    | dict(zip(names, map(float, quantiles), strict=True))
                )
    return length_chart(rows, subject.study.methods)


def _truncation_chart(subject: Subject, graded: Graded) -> Json:
    rows = []
    for method in subject.study.methods:
        share = float(
            _main_completions(graded, method)["truncated"].cast(pl.Float64).to_numpy().mean()
        )
        rows.append({"method": method, "value": round(100 * share, 3), "label": _share(share)})
    return truncation_chart(rows, subject.study.methods)


# ---------------------------------------------------------------------------------------- agreement


def _compared_decoding(subject: Subject) -> str:
    """`greedy` where every method has it, else `sample`: answers are compared with their like."""
    cells = subject.cells.values()
    if all(cell.greedy is not None for cell in cells):
        return "greedy"
    if all(cell.num_samples for cell in cells):
        return "sample"
    raise DataError(
        f"{subject.model} on {subject.suite}: the runs have neither all a greedy completion of "
        "each problem nor all samples; generate them again with one suite"
    )


def _pairs(subject: Subject, answers: dict[str, tuple[Codes, Codes]]) -> list[Json]:
    """What every two methods answer to the same problems at the same seeds."""
    pairs = []
    for a, b in itertools.combinations(subject.study.methods, 2):
        # One that was run once, (1, P, n), stands for every seed.
        num_seeds = max(len(answers[name][0]) for name in (a, b))
        sides = [
            np.broadcast_to(part, (num_seeds, *part.shape[1:])).reshape(-1, part.shape[2])
            for name in (a, b)
            for part in answers[name]  # answers, and whether they are right
        ]
        pairs.append(
            {"a": a, "b": b, "shares": agreement(*sides), "difference": subject.pairs[b, a]}
        )
    return pairs


def _pair_cells(pair: Json) -> Json:
    shares, difference = pair["shares"], pair["difference"]
    return {
        "a": pair["a"],
        "b": pair["b"],
        "same_answer": _share(shares.same_answer),
        **{name: _share(share) for name, share in shares._asdict().items()},
        "difference": points(difference["delta"]),
        "interval": bounds(difference["delta_ci_low"], difference["delta_ci_high"], points),
        "p": p_text(difference["p_value_holm"]),
    }


def _both_ways(pairs: Sequence[Json]) -> list[Json]:
    rows = []
    for pair in pairs:
        shares = {"same_answer": pair["shares"].same_answer, **pair["shares"]._asdict()}
        # As in the table: left to themselves, charts round 1.25 to 1.3.
        shown = {name: round(100 * share, 1) for name, share in shares.items()}
        swapped = {**shown, "only_a": shown["only_b"], "only_b": shown["only_a"]}
        rows.append({"a": pair["a"], "b": pair["b"], **shown})
        rows.append({"a": pair["b"], "b": pair["a"], **swapped})
    return rows


# --------------------------------------------------------------------------------------- provenance

FACTS = (
    ("engine", ("engine",)),
    ("device", ("device",)),
    ("data type", ("dtype",)),
    ("grading", ("grading",)),
    ("answer marker", ("marker",)),
    ("commit", ("provenance", "git", "commit")),
    ("uncommitted changes", ("provenance", "git", "diff_sha256")),
    ("code digest", ("provenance", "code_digest")),
    ("Python", ("provenance", "python")),
    ("packages", ("provenance", "packages")),
    ("platform", ("provenance", "platform")),
    ("processor", ("provenance", "processor")),
)
# A study gives each model and suite its own.
CHOSEN = {"engine", "data type", "grading", "answer marker"}
FACTS_OF_TRAINING = tuple(
    (name, path) for name, path in FACTS if name == "device" or path[0] == "provenance"
)
MAX_VALUES = 6
MAX_FILES = 200


def _provenance(study: Comparison, sources: Sources) -> Json:
    runs = [
        (model, method, seed)
        for model in study.models
        for method in study.methods
        for seed in study.seeds_of(method)
    ]
    evaluations = [(run, suite) for run in runs for suite in study.suites]
    cells = [(model, suite) for (model, _, _), suite in evaluations]
    metrics = [
        read_json(run_dir(sources.study_dir, *run) / "metrics" / f"{suite}.json")
        for run, suite in evaluations
    ]
    paths = {run: run_dir(sources.study_dir, *run) / "train" / "summary.json" for run in runs}
    summaries = {run: read_json(path) for run, path in paths.items() if path.exists()}
    facts = [
        _fact(
            name,
            [_dig(row, path) for row in metrics],
            "evaluation",
            cells if name in CHOSEN else None,
        )
        for name, path in FACTS
        if any(_dig(row, path) is not None for row in metrics)
    ]
    for name, path in FACTS_OF_TRAINING:
        fact = _fact(f"{name}, in training", [_dig(row, path) for row in summaries.values()], "run")
        if fact["shown"] not in [one["shown"] for one in facts if one["name"] == name]:
            facts.append({**fact, "differs": True})  # else what stands there is true of both
    written = [str(_dig(row, ("provenance", "written")) or "") for row in metrics]
    facts.append(
        {"name": "completions made", "shown": _span(sorted(filter(None, written))),
         "differs": False}
    )  # fmt: skip
    # The target before --configfile, which takes all that follows for files.
    command = f"snakemake artifacts/results/{study.name}/overlap.md --cores 1"
    if study.name != "default":
        command += " --configfile FILE, where FILE is the study's (or files, one after another)"
    facts.append(
        {"name": "test problems in the training data", "differs": False,
         "shown": [f"listed by: {command}"]}
    )  # fmt: skip
    details = [
        ("Settings of training runs", _training_settings(study, sources.study_dir)),
        ("Settings of evaluations", _evaluation_settings(study, sources.study_dir)),
        ("Commands", _commands(study, sources.runs_dir)),
        ("Files, by SHA-256", _hashes(study, sources, runs, summaries)),
    ]
    return {
        "facts": [fact for fact in facts if fact["shown"]],
        "details": [(title, items) for title, items in details if items],
        "note": "This page was put together from the files of the study alone; it asks the network "
        "for nothing. Charts: Vega-Lite, whose BSD-3-Clause library is part of this file.",
    }


def _dig(row: Json, path: tuple[str, ...]) -> Any:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _fact(
    name: str, values: list[Any], noun: str, cells: list[tuple[str, str]] | None = None
) -> Json:
    """Distinct values of a fact, with how many of what they are of have each where they differ.

    With `cells`, the model and suite of each, values of different ones may differ: chosen so.
    """
    texts = ["" if value is None else _fact_text(value) for value in values]
    counts = Counter(texts)
    if len(counts) == 1:
        return {"name": name, "shown": [text for text in counts if text], "differs": False}
    most = counts.most_common(MAX_VALUES)
    shown = [f"{text or 'none'} ({counted(n, noun)})" for text, n in most]
    if len(counts) > MAX_VALUES:
        shown.append(f"and {len(counts) - MAX_VALUES} more")
    differs = cells is None or len(set(zip(cells, texts, strict=True))) > len(set(cells))
    return {"name": name, "shown": shown, "differs": differs}


def _fact_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in sorted(value.items()))
    return str(value)


def _span(sorted_times: list[str]) -> list[str]:
    if not sorted_times:
        return []
    first, last = sorted_times[0], sorted_times[-1]
    return [first if first == last else f"{first} to {last}"]


def _training_settings(study: Comparison, study_dir: Path) -> list[tuple[str, str]]:
    """Settings of every trained model × method, of its first seed."""
    found = []
    for model in study.models:
        for method in study.methods:
            run = run_dir(study_dir, model, method, study.seeds_of(method)[0])
            if (run / "settings.json").exists():
                settings = read_json(run / "settings.json")
                settings.pop("seed", None)
                found.append((f"{model} / {method}", _pretty(settings)))
    return found


def _evaluation_settings(study: Comparison, study_dir: Path) -> list[tuple[str, str]]:
    """Settings of every model × suite, of the first method and seed."""
    found = []
    first = study.methods[0]
    for model in study.models:
        for suite in study.suites:
            run = run_dir(study_dir, model, first, study.seeds_of(first)[0])
            path = run / "completions" / f"{suite}.stats.json"
            settings = read_json(path).get("settings") if path.exists() else None
            if settings:
                found.append((f"{model} / {suite}", _pretty(settings)))
    return found


def _commands(study: Comparison, runs_dir: Path | None) -> list[tuple[str, str]]:
    """The calls of snakemake for this study, newest first."""
    found = []
    for path in sorted(runs_dir.glob("*/run_manifest.json")) if runs_dir else []:
        manifest = read_record(path)  # one that another study's call left damaged is not told of
        if manifest.get("study") == study.name:
            commit = _dig(manifest, ("git", "commit")) or "no commit"
            state = manifest.get("state")
            text = f"{' '.join(manifest.get('command', []))}\ncommit {commit}"
            found.append(
                (
                    f"{manifest.get('started')}: "
                    + (
                        "not finished when this page was made" if state == "running" else str(state)
                    ),
                    text,
                )
            )
    return found[::-1]


def _hashes(
    study: Comparison,
    sources: Sources,
    runs: list[tuple[str, str, int]],
    summaries: dict[tuple[str, str, int], Json],
) -> list[tuple[str, str]]:
    results = [sources.comparison, *dict.fromkeys(sources.problems.values())]
    grades = [
        run_dir(sources.study_dir, *run) / "grades" / f"{suite}.parquet"
        for run in runs
        for suite in study.suites
    ]
    texts = [("Tables and problems", _hash_lines(results)), ("Grades", _hash_lines(grades))]
    weights = [
        f"{model} / {method} / seed {seed}: starting weights "
        f"{summary.get('starting_weights')}, data {summary.get('data_sha256')}"
        for (model, method, seed), summary in summaries.items()
    ]
    if weights:
        lines = _with_number_left(weights[:MAX_FILES], len(weights))
        texts.append(("Starting weights and training data", lines))
    return texts


def _hash_lines(paths: Sequence[Path]) -> str:
    shown = [f"{sha256_file(path)}  {path}" for path in paths[:MAX_FILES]]
    return _with_number_left(shown, len(paths))


def _with_number_left(shown: list[str], number: int) -> str:
    """Lines, the first of `number`, and how many there are besides."""
    left = number - len(shown)
    return "\n".join([*shown, f"and {left} more"] if left else shown)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


# ------------------------------------------------------------------------------------------ wording


def _share(value: float | None) -> str:
    return "" if value is None else f"{percent(value)}{SPACE}%"


def _interval(row: Json, name: str, text: Callable[[float], str] = percent) -> str:
    return _bounds(row[f"{name}_ci_low"], row[f"{name}_ci_high"], text)


def _bounds(low: float, high: float, text: Callable[[float], str]) -> str:
    return bounds(low, high, text).replace(" ", SPACE)


def _p(p_value: float) -> str:
    """`p = 0.034` or `p < 0.001`."""
    text = p_text(p_value)
    sign = "<" if text.startswith("<") else "="
    return SPACE.join(("p", sign, text.removeprefix("<")))


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
