"""Figures of a comparison: accuracy by method, accuracy against cost, curves of training.

They are the report's charts, side by side in one picture: a panel for each model (columns) and each
suite or curve (rows). Same numbers, same bytes, for the fonts that count are the renderer's own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from gsm8k_core.charts import (
    COSTS,
    CURVES,
    accuracy_layers,
    accuracy_rows,
    cost_layers,
    cost_rows,
    decodings_of,
    learning_layers,
    learning_rows,
    themes,
)
from gsm8k_core.config import Comparison
from gsm8k_core.files import Json, atomic_path, write_text
from gsm8k_core.layout import run_dir
from gsm8k_core.metrics import smoothed_curve
from gsm8k_core.tables import (
    MAX_BANDS,
    all_on_gpus,
    counted,
    has_clusters,
    level_text,
    problems_text,
    read_metrics,
    read_training_logs,
    rows_of,
)

NOTHING_TRAINED = "no method of this study trains anything"
LIGHT = themes()["light"]
CONFIG: Json = {
    **LIGHT,
    "background": "white",
    # The renderer brings the first; texts are drawn by the SVG's viewer, and the next two, of which
    # every system has one, are as wide to the last pixel.
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "aria": False,
    "padding": 10,
    "axis": {**LIGHT["axis"], "labelLimit": 0},
    "legend": {
        **LIGHT["legend"],
        "orient": "bottom",
        "labelLimit": 0,
        "symbolLimit": 0,
        "symbolOpacity": 1,
        "columnPadding": 16,
    },
    "title": {
        "anchor": "start",
        "frame": "group",
        "color": LIGHT["text"]["color"],
        "subtitleColor": LIGHT["axis"]["labelColor"],
        "fontSize": 13,
        "subtitleFontSize": 12,
        "fontWeight": "normal",
        "limit": 0,
    },
}
WIDE, NARROW = 560, 320  # of one panel, and of each of several
CHARACTER = 6.2  # pixels, about
REWARDS = ("answer_reward_mean", "reward_mean")
LOSSES = ("loss", "margin")


def save_figure(figure: Any, *paths: Path) -> None:
    """Write each of `paths`: one that ends in .svg as such, others as PNG of twice its pixels."""
    svg = vl_convert.vegalite_to_svg(figure.to_dict(validate=False))
    for path in paths:
        if path.suffix == ".svg":
            write_text(path, svg)
        else:
            with atomic_path(path) as temporary:
                temporary.write_bytes(vl_convert.svg_to_png(svg, scale=2))


def plot_accuracy(study: Comparison, study_dir: Path, comparison: pl.DataFrame) -> Any:
    """Accuracy by method with intervals.

    Circles are greedy accuracy, diamonds the mean over samples (pass@1); small ticks are single
    seeds. Raises DataError when the comparison lacks a row of the study.
    """
    panels: list[tuple[Any, list[Json], list[Json]]] = []
    for suite in study.suites:
        for model in study.models:
            runs = {
                method: {
                    seed: read_metrics(
                        run_dir(study_dir, model, method, seed) / "metrics" / f"{suite}.json"
                    )
                    for seed in study.seeds_of(method)
                }
                for method in study.methods
            }
            rows = rows_of(study, comparison, model, suite)
            panels.append((_panel_title(rows[0]), *accuracy_rows(rows, runs)))
    legend = alt.Legend(values=decodings_of([row for _, rows, _ in panels for row in rows]))
    charts = [
        accuracy_layers(rows, seeds, study.methods, legend).properties(title=title)
        for title, rows, seeds in panels
    ]
    level = level_text(study.confidence)
    caption = f"One seed, with its {level} interval over {_drawn(comparison)} alone"
    if any(len(study.seeds_of(method)) > 1 for method in study.methods):
        caption = (
            f"Mean over {_seeds_text(study, study.methods)}, {level} interval over seeds and "
            f"{_drawn(comparison)}; ticks: seeds"
        )
    # The same spot is the same accuracy everywhere.
    return _figure(study, "accuracy by method", caption, charts, "x")


def plot_cost(study: Comparison, comparison: pl.DataFrame) -> Any:
    """Accuracy against the training that led to it.

    Cost is the GPU time of the method and the stages before it where all that trains used GPUs,
    else the time. Bars are intervals over seeds and problems. Raises DataError when the comparison
    lacks a row of the study.
    """
    panels = {
        (suite, model): rows_of(study, comparison, model, suite)
        for suite in study.suites
        for model in study.models
    }
    everything = [row for rows in panels.values() for row in rows]
    gpu_time, time = "gpu_seconds_training_with_parents", "train_seconds_with_parents"
    key = gpu_time if all_on_gpus(everything) else time
    trained = [method for method in study.methods if study.parent_of(method) is not None]
    if not any(row[key] for row in everything):
        return _empty_figure(study, "no time of training is known" if trained else NOTHING_TRAINED)
    charts = []
    legend = _legend(study, study.methods)
    for rows in panels.values():
        # Of what trains, that without a time is not known to cost nothing.
        known = [row | {key: row[key] or 0.0} for row in rows
                 if row[key] or row["method"] not in trained]  # fmt: skip
        chart = cost_layers(cost_rows(known, key), study.methods, COSTS[key][1], legend)
        charts.append(chart.properties(title=_panel_title(rows[0])))
    level, drawn = level_text(study.confidence), _drawn(comparison)
    caption = f"One seed; bars: {level} intervals over {drawn} alone"
    if any(len(study.seeds_of(method)) > 1 for method in trained):
        seeds = _seeds_text(study, trained)
        caption = f"Mean over {seeds}; bars: {level} intervals over seeds and {drawn}"
    if len(trained) < len(study.methods):
        caption += "; dashed: no training"
    return _figure(study, "accuracy against cost", caption, charts, "y")


def plot_reward(study: Comparison, study_dir: Path) -> Any:
    """Correct completions over the steps of every method that samples.

    That is the reward of the answer alone: methods have other penalties, and their sums would not
    compare. The reward of what logs no answers has a row of its own, and so has the validated
    accuracy. A study without rewards shows the training loss instead, and the margin of what learns
    from pairs, whose loss is in other units; one that trains nothing says so.
    """
    logs = {model: read_training_logs(study, study_dir, model) for model in study.models}

    def curves(keys: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, list[Json]]]:
        found = {
            key: {model: learning_rows(logs[model], list(methods), key) for model in study.models}
            for key in keys
        }
        return {key: rows for key, rows in found.items() if any(rows.values())}

    # With rewards to show, the losses and validations of other methods are on other steps.
    shown = curves(REWARDS, study.methods) or curves(LOSSES, study.methods)
    drawn = {row["method"] for rows in shown.values() for one in rows.values() for row in one}
    methods = [method for method in study.methods if method in drawn]
    if not methods:
        return _empty_figure(study, NOTHING_TRAINED)
    shown |= curves(["validation_accuracy"], methods)
    windows = [
        smoothed_curve(logs[model].get(method, []), key)[2]
        for key in shown for model in study.models for method in methods
    ]  # fmt: skip
    caption, has_bands = "One seed", len(methods) <= MAX_BANDS
    several = any(len(study.seeds_of(method)) > 1 for method in methods)
    if several:
        caption = f"Mean over {_seeds_text(study, methods)}"
    if max(windows) > 1:
        caption += f", running mean of up to {max(windows)} steps"
    if several:
        caption += (
            "; band: smallest to largest seed"
            if has_bands
            else f"; no bands of seeds with more than {MAX_BANDS} methods"
        )
    panels = []
    steps = _span(row["x"] for rows in shown.values() for one in rows.values() for row in one)
    legend = _legend(study, methods, symbolType="stroke", symbolSize=900, rowPadding=-12)
    for key, by_model in shown.items():
        every = [row for rows in by_model.values() for row in rows]
        values = _span(row[end] for row in every for end in ("low", "high"))
        for model, rows in by_model.items():
            chart = learning_layers(rows, study.methods, key, legend, has_bands)
            for layer in chart.layer:
                layer.encoding.x.scale = alt.Scale(domain=steps, nice=False)
                layer.encoding.y.scale = alt.Scale(domain=values, nice=True)
            title = alt.TitleParams(model, subtitle=CURVES[key][0] if len(shown) > 1 else "")
            panels.append(chart.properties(title=title))
    subject = CURVES[next(iter(shown))][0]
    return _figure(study, subject[0].lower() + subject[1:], caption, panels)


# ------------------------------------------------------------------------------------------- shared


def _figure(
    study: Comparison, subject: str, caption: str, panels: list[Any], shared: str = ""
) -> Any:
    """Panels by row and column; `shared`: the axis on which the same spot is the same in all."""
    columns = len(study.models)
    for panel in panels:
        panel.width = WIDE if columns == 1 else NARROW
    line = int(_width(study) / CHARACTER)
    title = alt.TitleParams(
        textwrap.wrap(f"{study.name}: {subject}", line * 3 // 4),
        subtitle=textwrap.wrap(caption, line),
        fontSize=17,
        fontWeight="bold",
        subtitleFontSize=13,
        frame="bounds",
        offset=16,
    )
    figure = alt.concat(*panels, columns=columns, title=title, spacing=24)
    scales: Any = {"yOffset": "independent"} | ({shared: "shared"} if shared else {})
    return figure.resolve_scale(**scales).configure(**CONFIG)


def _width(study: Comparison) -> int:
    """Pixels of a figure, about."""
    columns = len(study.models)
    return columns * ((WIDE if columns == 1 else NARROW) + 50)  # with the labels of the axis


def _empty_figure(study: Comparison, why: str) -> Any:
    mark = alt.Chart(alt.Data(values=[{}])).mark_text(text=f"{study.name}: {why}")
    return mark.properties(width=WIDE, height=60).configure(**CONFIG)


def _legend(study: Comparison, methods: list[str], **look: Any) -> Any:
    """Of the methods drawn: as many columns as fit, and no more than its rows then need."""
    fitting = max(1, int(_width(study) / (48 + CHARACTER * max(map(len, methods)))))
    columns = ceil(len(methods) / ceil(len(methods) / fitting))
    return alt.Legend(values=methods, columns=columns, **look)


def _span(values: Any) -> list[float]:
    found = list(values)
    return [min(found), max(found)]


def _panel_title(row: Json) -> Any:
    size = problems_text(row["num_problems"], row["num_clusters"])
    title = f"{row['model']} on {row['suite']}"
    if len(title) * CHARACTER > NARROW:
        return alt.TitleParams([row["model"], f"on {row['suite']}"], subtitle=size)
    return alt.TitleParams(title, subtitle=size)


def _drawn(comparison: pl.DataFrame) -> str:
    """What is taken as drawn independently."""
    sizes = comparison.select("num_problems", "num_clusters").iter_rows()
    return "clusters of problems" if any(has_clusters(*row) for row in sizes) else "problems"


def _seeds_text(study: Comparison, methods: Sequence[str]) -> str:
    """`3 seeds`; `3 seeds (base: 1)` where one of them is not trained; `1 seed` of single runs."""
    if all(len(study.seeds_of(method)) == 1 for method in methods):
        return counted(1, "seed")
    once = [f"{method}: 1" for method in methods if study.parent_of(method) is None]
    return counted(len(study.seeds), "seed") + (f" ({', '.join(once)})" if once else "")
