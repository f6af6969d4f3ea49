"""Figures of a comparison: accuracy by method, accuracy against cost, reward over training.

Drawn without pyplot, so nothing is shown and no global state is kept; SVG files are the same bytes
for the same numbers. Matplotlib is imported by this module alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from gsm8k_core.config import Comparison
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, atomic_path
from gsm8k_core.layout import run_dir
from gsm8k_core.metrics import smoothed_curve
from gsm8k_core.report_charts import MAX_MARKED, PALETTES
from gsm8k_core.tables import (
    MAX_BANDS,
    all_on_gpus,
    are_far_apart,
    counted,
    has_clusters,
    level_text,
    problems_text,
    read_metrics,
    read_training_logs,
    round_times,
    short_time,
    time_unit,
)

PALETTE = PALETTES["light"]  # a method has the same colour as in the report
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
GREEDY, SAMPLED = "#333333", "#858585"  # no colours: these are the methods'
GREY = "#666666"

STYLE: dict[Any, Any] = {
    # Ships with matplotlib; texts in an SVG are drawn by its viewer, which may lack the font.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # of about the same width
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gsm8k_core",
}

PERCENT = FuncFormatter(lambda value, _: f"{value:g} %")


def save_figure(figure: Figure, output_dir: Path, name: str) -> None:
    """Write `name`.svg and `name`.png (150 dots per inch) with no date in them."""
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        for suffix, options in (
            ("svg", {"metadata": {"Date": None}}),
            ("png", {"dpi": 150, "metadata": {"Software": None}}),
        ):
            with atomic_path(output_dir / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, **options)


# ----------------------------------------------------------------------------------------- accuracy


def plot_accuracy(study: Comparison, study_dir: Path, comparison: pl.DataFrame) -> Figure:
    """Accuracy by method with intervals; one panel per suite (rows) × model (columns).

    Filled circles are greedy accuracy, open diamonds the mean over samples (pass@1); small dots are
    single seeds. Raises DataError when the comparison lacks a row of the study.
    """
    models, suites, methods = study.models, study.suites, study.methods
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        # One axis for all panels: the same spot is the same accuracy everywhere.
        grid = figure.subplots(len(suites), len(models), squeeze=False, sharex=True, sharey=True)
        drawn: set[str] = set()
        for axes_row, suite in zip(grid, suites, strict=True):
            for axes, model in zip(axes_row, models, strict=True):
                drawn |= _accuracy_panel(axes, study, study_dir, comparison, model, suite)
        low, high = grid[0, 0].get_xlim()
        grid[0, 0].set_xlim(max(low, -2.0), min(high, 102.0))
        for axes in grid[-1]:
            axes.set_xlabel("Correct answers")
        _finish(
            figure,
            grid,
            title=f"{study.name}: accuracy by method",
            caption=_accuracy_caption(study, comparison),
            handles=_accuracy_legend(drawn),
            titles=_panel_titles(study, comparison),
            panel=(4.2, 0.95 + 0.45 * len(methods)),
            beside=0.4 + max(_text_width(method, 10.0) for method in methods),
        )
    return figure


def _accuracy_panel(
    axes: Axes, study: Comparison, study_dir: Path, comparison: pl.DataFrame, model: str, suite: str
) -> set[str]:
    """Draw one panel; returns the decodings that it shows."""
    drawn: set[str] = set()
    for position, method in enumerate(study.methods):
        row = _comparison_row(comparison, model, method, suite)
        runs = [
            read_metrics(run_dir(study_dir, model, method, seed) / "metrics" / f"{suite}.json")
            for seed in study.seeds_of(method)
        ]
        shown = [
            decoding
            for decoding, present in (
                ("greedy", runs[0]["accuracy"] is not None),
                ("sampled", row["num_samples"] > 0),
            )
            if present
        ]
        for decoding in shown:
            offset = 0.0 if len(shown) == 1 else -0.17 if decoding == "greedy" else 0.17
            _accuracy_mark(axes, row, runs, decoding, position + offset)
        drawn |= set(shown)
    axes.set_yticks(range(len(study.methods)), study.methods)
    axes.set_ylim(len(study.methods) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_tick_params(labelbottom=True)
    return drawn


def _accuracy_mark(axes: Axes, row: Json, runs: list[Json], decoding: str, y: float) -> None:
    """Mean, interval and single seeds of one method."""
    name, colour, marker = {
        "greedy": ("accuracy", GREEDY, "o"),
        "sampled": ("pass_at_1", SAMPLED, "D"),
    }[decoding]
    face = colour if decoding == "greedy" else "white"
    mean, low, high = (100 * row[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high"))
    axes.plot([low, high], [y, y], color=colour, linewidth=2.0, solid_capstyle="butt", zorder=2)
    axes.plot(
        [mean],
        [y],
        marker,
        markersize=7,
        color=colour,
        markerfacecolor=face,
        markeredgewidth=1.6,
        zorder=4,
    )
    if len(runs) > 1:
        seeds = [100 * run[name] for run in runs]
        axes.plot(
            seeds, [y + 0.13] * len(seeds), ".", markersize=4.5, color=colour, alpha=0.65, zorder=3
        )


def _comparison_row(comparison: pl.DataFrame, model: str, method: str, suite: str) -> Json:
    found = comparison.filter(
        (pl.col("model") == model) & (pl.col("method") == method) & (pl.col("suite") == suite)
    )
    if found.height != 1:
        raise DataError(
            f"the comparison has {found.height} rows for {model} / {method} / {suite}, expected "
            "1: it belongs to another study; run compare.py again"
        )
    return found.row(0, named=True)


def _accuracy_caption(study: Comparison, comparison: pl.DataFrame) -> str:
    level = level_text(study.confidence)
    if all(len(study.seeds_of(method)) == 1 for method in study.methods):
        return f"One seed, with its {level} interval over {_drawn(comparison)} alone"
    return (
        f"Mean over {_seeds_text(study, study.methods)}, {level} interval over seeds and "
        f"{_drawn(comparison)}; dots: seeds"
    )


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


def _accuracy_legend(drawn: set[str]) -> list[Line2D]:
    marks = {
        "greedy": Line2D([], [], color=GREEDY, marker="o", linewidth=2, label="greedy"),
        "sampled": Line2D(
            [],
            [],
            color=SAMPLED,
            marker="D",
            markerfacecolor="white",
            linewidth=2,
            label="sampled, pass@1",
        ),
    }
    return [mark for name, mark in marks.items() if name in drawn]


# --------------------------------------------------------------------------------------------- cost


UNTRAINED: Json = {"color": GREY, "linestyle": "--", "linewidth": 1.2}


def plot_cost(study: Comparison, comparison: pl.DataFrame) -> Figure:
    """Accuracy against the training that led to it; one panel per suite (rows) × model (columns).

    Cost is the GPU time of the method and the stages before it where all that trains used GPUs,
    else the time. The base model costs nothing and is a dashed line. Bars are intervals over seeds
    and problems. Raises DataError when the comparison lacks a row of the study.
    """
    rows = {
        (model, method, suite): _comparison_row(comparison, model, method, suite)
        for model in study.models
        for method in study.methods
        for suite in study.suites
    }
    gpu_time, time = "gpu_seconds_training_with_parents", "train_seconds_with_parents"
    key, name = (gpu_time, "GPU time") if all_on_gpus(rows.values()) else (time, "Time")
    trained = [
        method
        for method in study.methods
        if any(row[key] for (_, other, _), row in rows.items() if other == method)
    ]
    if not trained:
        return _empty_figure(f"{study.name}: no method of this study trains anything")
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        grid = figure.subplots(
            len(study.suites), len(study.models), squeeze=False, sharex="col", sharey=True
        )
        for axes_row, suite in zip(grid, study.suites, strict=True):
            axes_row[0].set_ylabel("Correct answers")
            for axes, model in zip(axes_row, study.models, strict=True):
                for index, method in enumerate(study.methods):
                    place = index if method in trained else None
                    _cost_mark(axes, rows[model, method, suite], key, place)
                unit = _finish_cost_panel(axes)
                if suite == study.suites[-1]:
                    axes.set_xlabel(f"{name} of training with parents{unit}")
        low, high = grid[0, 0].get_ylim()
        grid[0, 0].set_ylim(max(low, -2.0), min(high, 102.0))
        _finish(
            figure,
            grid,
            title=f"{study.name}: accuracy against cost",
            caption=_cost_caption(study, comparison, trained),
            handles=[
                _cost_handle(method, index if method in trained else None)
                for index, method in enumerate(study.methods)
            ],
            titles=_panel_titles(study, comparison),
            panel=(4.6, 3.2),
            beside=1.0,
        )
    return figure


def _cost_mark(axes: Axes, row: Json, key: str, index: int | None) -> None:
    """One method's mean and interval; a line where it has no `index` for it trains nothing."""
    mean, low, high = (100 * row[f"accuracy{end}"] for end in ("", "_ci_low", "_ci_high"))
    if index is None:
        axes.axhline(mean, zorder=1, **UNTRAINED)
    elif row[key]:
        axes.plot([row[key]] * 2, [low, high], color=PALETTE[index % len(PALETTE)], linewidth=1.6)
        axes.plot([row[key]], [mean], markersize=8, **_cost_look(index))


def _cost_look(index: int) -> Json:
    # Moved on by one with each time round the colours: no two methods look alike.
    marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
    colour = PALETTE[index % len(PALETTE)]
    return {"color": colour, "marker": marker, "linestyle": "none", "markeredgecolor": "white"}


def _cost_caption(study: Comparison, comparison: pl.DataFrame, trained: list[str]) -> str:
    level, drawn = level_text(study.confidence), _drawn(comparison)
    dashed = "; dashed: no training" if len(trained) < len(study.methods) else ""
    if all(len(study.seeds_of(method)) == 1 for method in trained):
        return f"One seed; bars: {level} intervals over {drawn} alone{dashed}"
    seeds = _seeds_text(study, trained)
    return f"Mean over {seeds}; bars: {level} intervals over seeds and {drawn}{dashed}"


def _cost_handle(method: str, index: int | None) -> Line2D:
    if index is None:
        return Line2D([], [], label=method, **UNTRAINED)
    return Line2D([], [], label=method, markersize=8, **_cost_look(index))


def _finish_cost_panel(axes: Axes) -> str:
    """The axes; returns `, minutes` or the like where all ticks are in one unit."""
    axes.grid()
    axes.yaxis.set_major_formatter(PERCENT)
    # A logarithm where costs are far apart, with room beside the outermost marks.
    costs = [float(np.max(line.get_xdata())) for line in axes.lines if line.get_marker() != "None"]
    if are_far_apart(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
        axes.xaxis.set_major_locator(FixedLocator(round_times(min(costs), max(costs))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: short_time(seconds)))
    elif costs:
        unit, size = time_unit(max(costs))
        axes.set_xlim(0, max(costs) * 1.15)
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(0, max(costs) * 1.15 / size)
        axes.xaxis.set_major_locator(FixedLocator([size * tick for tick in ticks]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / size:g}"))
        return f", {unit}"
    return ""


# ------------------------------------------------------------------------------------------- reward


# What the first row shows: the name of its axis, and in the title.
CURVES = {
    "answer_reward_mean": ("Correct completions", "correct completions"),
    "reward_mean": ("Mean reward", "reward"),
    "loss": ("Loss, nats a token", "loss"),
    "margin": ("Margin of pairs", "margin"),
}
IN_PERCENT = ("answer_reward_mean", "validation_accuracy")


def plot_reward(study: Comparison, study_dir: Path) -> Figure:
    """Correct completions over the steps of every method that samples; one column per model.

    That is the reward of the answer alone: methods have other penalties, and their sums would not
    compare. Where a log lacks it, the whole reward is drawn of all. The line is the mean over
    seeds, the band their smallest and largest, which many methods would cover each other with. A
    second row shows the validated accuracy where a method validates. A study without rewards shows
    the training loss instead, and the margin of what learns from pairs, whose loss is in other
    units; one that trains nothing says so.
    """
    logs = {model: read_training_logs(study, study_dir, model) for model in study.models}
    curves = {
        (model, method): [
            [_without_loss_of_pairs(row) for row in run] for run in logs[model].get(method, [])
        ]
        for model in study.models
        for method in study.methods
    }
    rewarded = _methods_with(curves, study, "reward_mean")
    # With rewards to show, the losses and validations of other methods are on other steps.
    keys = ["reward_mean"] if rewarded else ["loss", "margin"]
    if rewarded and rewarded == _methods_with(curves, study, "answer_reward_mean"):
        keys = ["answer_reward_mean"]
    shown = {key: _methods_with(curves, study, key) for key in keys}
    trained = [name for name in study.methods if any(name in some for some in shown.values())]
    if not trained:
        return _empty_figure(f"{study.name}: no method of this study trains anything")
    rows = [(key, CURVES[key][0]) for key, methods in shown.items() if methods]
    if set(_methods_with(curves, study, "validation_accuracy")) & set(trained):
        rows.append(("validation_accuracy", "Validation accuracy"))
    return _curves_figure(study, curves, trained, rows)


def _without_loss_of_pairs(row: Json) -> Json:
    """A row of a training log; the loss of pairs does not compare with that of tokens."""
    return {name: value for name, value in row.items() if name != "loss" or "margin" not in row}


def _curves_figure(
    study: Comparison,
    curves: dict[tuple[str, str], list[list[Json]]],
    methods: list[str],
    rows: list[tuple[str, str]],
) -> Figure:
    models, has_bands = study.models, len(methods) <= MAX_BANDS
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        grid = figure.subplots(len(rows), len(models), squeeze=False, sharex="col", sharey="row")
        window = 1
        for axes_row, (key, label) in zip(grid, rows, strict=True):
            axes_row[0].set_ylabel(label)
            for axes, model in zip(axes_row, models, strict=True):
                for method in methods:
                    look = _look(study.methods.index(method))
                    used = _curve(axes, curves[model, method], key, look, has_bands)
                    window = max(window, used)
                axes.grid(axis="y")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                if key in IN_PERCENT:
                    axes.yaxis.set_major_formatter(PERCENT)
        for axes in grid[-1]:
            axes.set_xlabel("Training step")
        figure.align_ylabels()
        subject = CURVES[rows[0][0]][1]
        smoothed = f", running mean of up to {window} steps" if window > 1 else ""
        seeds, bands = f"Mean over {_seeds_text(study, methods)}", ""
        if all(len(study.seeds_of(method)) == 1 for method in methods):
            seeds = "One seed"
        elif has_bands:
            bands = "; band: smallest to largest seed"
        else:
            bands = f"; no bands of seeds with more than {MAX_BANDS} methods"
        _finish(
            figure,
            grid,
            title=f"{study.name}: {subject} during training",
            caption=f"{seeds}{smoothed}{bands}",
            handles=[Line2D([], [], label=m, **_look(study.methods.index(m))) for m in methods],
            titles=[[[model] for model in models]],
            panel=(4.6, 3.0),
            beside=1.0,
        )
    return figure


def _methods_with(
    curves: dict[tuple[str, str], list[list[Json]]], study: Comparison, key: str
) -> list[str]:
    return [
        method
        for method in study.methods
        if any(key in row for model in study.models for run in curves[model, method] for row in run)
    ]


def _curve(axes: Axes, runs: Sequence[list[Json]], key: str, look: Json, has_band: bool) -> int:
    """Draw one method; returns the number of steps of its running mean."""
    steps, values, window = smoothed_curve(runs, key)
    if not steps:
        return 1
    if key in IN_PERCENT:
        values = 100 * values
    marker = "o" if len(steps) <= MAX_MARKED else ""
    axes.plot(steps, values.mean(axis=0), marker=marker, markersize=3.5, **look)
    if has_band and len(values) > 1:
        axes.fill_between(
            steps,
            values.min(axis=0),
            values.max(axis=0),
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
    return window


def _look(index: int) -> Json:
    """Colour and dash of a line: 28 combinations, and neighbours differ in both."""
    style = LINE_STYLES[index % len(LINE_STYLES)]
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": style, "linewidth": 1.8}


def _empty_figure(text: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    return figure


# ------------------------------------------------------------------------------------------- shared


LINE = 1.2 / 72  # inches between two lines of text for each point of its size
TITLE, PANEL_TITLE, CAPTION, LABEL = 13.0, 11.0, 9.5, 10.0  # sizes in points


def _panel_titles(study: Comparison, comparison: pl.DataFrame) -> list[list[list[str]]]:
    """By suite and model: the parts of a title, between which it may be broken."""
    titles = []
    for suite in study.suites:
        row = _comparison_row(comparison, study.models[0], study.methods[0], suite)
        size = f"({problems_text(row['num_problems'], row['num_clusters'])})"
        titles.append([[model, f"on {suite}", size] for model in study.models])
    return titles


def _finish(
    figure: Figure,
    grid: Any,
    *,
    title: str,
    caption: str,
    handles: list[Line2D],
    titles: list[list[list[str]]],
    panel: tuple[float, float],
    beside: float,
) -> None:
    """Titles and legend, and a size of the figure in which all of them fit.

    `titles` are those of the panels, by row and column, each in parts; rows below them have none.
    `panel` is the least width and the height of one, `beside` the room to the left of them. In
    inches.
    """
    num_rows, num_columns = grid.shape
    parts = [part for row in titles for one in row for part in one]
    column = max(panel[0], 0.3 + max(_text_width(part, PANEL_TITLE) for part in parts))
    label = LEGEND_MARK + max(_text_width(str(one.get_label()), LABEL) for one in handles)
    words = max(_text_width(word, TITLE, "bold") for word in title.split())
    width = max(7.0, beside + num_columns * column, 0.3 + label, 0.3 + words)
    column = (width - beside) / num_columns

    title_lines = _wrapped(title.split(), width - 0.3, TITLE, "bold")
    caption_lines = _wrapped(caption.split(), width - 0.3, CAPTION)
    height = 1.4 + num_rows * panel[1]
    height += LINE * (TITLE * (len(title_lines) - 1) + CAPTION * (len(caption_lines) - 1))
    for axes_row, titles_row in zip(grid, titles, strict=False):
        texts = [_wrapped(one, column - 0.3, PANEL_TITLE) for one in titles_row]
        for axes, lines in zip(axes_row, texts, strict=True):
            axes.set_title("\n".join(lines))
        height += LINE * PANEL_TITLE * (max(map(len, texts)) - 1)

    # As many columns as fit, and no more than the rows of the legend then need.
    num_lines = ceil(len(handles) / max(1, int((width - 0.3) / label)))
    height += LEGEND_LINE * (num_lines - 1)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=ceil(len(handles) / num_lines),
        handlelength=2.4,
    )
    figure.set_size_inches(width, height)
    _title(figure, title_lines, caption_lines)


# Of the legend, in inches: what stands before a label and between two, and the height of a line.
LEGEND_MARK, LEGEND_LINE = 0.75, 0.21


def _title(figure: Figure, title: list[str], caption: list[str]) -> None:
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(h_pad=0.09, w_pad=0.09)  # type: ignore[call-arg]
    text = "\n".join([*title, *[""] * len(caption)])
    figure.suptitle(text, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
    # The lines below the title, in another weight: suptitle reserves the room for both.
    figure.text(
        0.01,
        1 - (0.14 + LINE * TITLE * len(title)) / figure.get_figheight(),
        "\n".join(caption),
        ha="left",
        va="top",
        fontsize=CAPTION,
        color=GREY,
    )


def _wrapped(parts: Sequence[str], width: float, size: float, weight: str = "normal") -> list[str]:
    """Lines of at most `width` inches, broken between `parts` alone."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} {part}" if lines else part
        if lines and _text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches of a line of `size` points."""
    font = FontProperties(family=STYLE["font.family"], size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72
