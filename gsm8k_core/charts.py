"""The charts of the report and of the figures as Vega-Lite, and how they look in light and in dark.

A chart holds no colours of its own: the page hands it one of `themes`, and again when the theme
changes. Methods differ in colour and in shape or dash, for those who cannot tell the colours apart.
What the figures draw too comes in two steps: `*_layers` is the picture, and the `*_chart` of it is
as wide as its place on the page, whose legend is its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from gsm8k_core.files import Json
from gsm8k_core.metrics import powers_up_to, smoothed_curve
from gsm8k_core.tables import MAX_BANDS, are_far_apart, round_times, short_time, time_unit

# From the hues of Okabe and Ito (2008), moved until each has a contrast of 3:1 or more to the page
# and every two keep a distance of 15 or more (CIE76) under every common colour blindness (tested).
PALETTES = {
    "light": ["#0c53a1", "#e02b12", "#078157", "#c3509d", "#ba8346", "#4092dc", "#20384d"],
    "dark": ["#5fa9f1", "#ff8a4c", "#37daa3", "#f597ce", "#f0c93a", "#9bdeff", "#d3f3dd"],
}
SURFACES = {
    "light": {"page": "#ffffff", "ink": "#1b1f24", "quiet": "#57606a", "line": "#d8dee4"},
    "dark": {"page": "#12161b", "ink": "#e6e9ed", "quiet": "#a3adb8", "line": "#2e363f"},
}
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
DASHES = [[1, 0], [7, 3], [2, 2], [8, 2, 2, 2], [4, 4], [10, 3, 2, 3, 2, 3], [1, 3]]
DECODINGS = {"greedy": "circle", "sampled, pass@1": "diamond"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
MINUS = "\u2212"
OPACITY = {"right": 0.6, "wrong": 0.08}
SIGNED = "(datum.value > 0 ? '+' : '') + datum.label"
MAX_POINTS = 120
"""Points of a learning curve; more cannot be seen."""
MAX_MARKED = 25
"""Points of a curve that are drawn as such, here and in the figures."""
LINE_LENGTH = 22
"""Characters in a line of a name beside a chart."""
MAX_SQUEEZED = 6
"""Methods whose shares can be read in a table of pairs as narrow as a phone."""
PAIR_STEP = 46
"""Width of a field of a wider table of pairs, which scrolls in its place."""

# What a training log may hold, in the order of the page: title, axis.
CURVES = {
    "answer_reward_mean": ("Correct completions while training", "% right"),
    "reward_mean": ("Reward", "mean reward of a step"),
    "validation_accuracy": ("Validation accuracy", "% right"),
    "loss": ("Loss of methods without a reward", "nats a token"),
    "margin": ("Pairs: implicit reward of the chosen less the rejected", "margin (DPO)"),
    "completion_length_mean": ("Length of sampled completions", "tokens"),
    "entropy": ("Entropy of tokens in the batch that is trained on", "nats"),
}
IN_PERCENT = ("answer_reward_mean", "validation_accuracy")
# Not drawn of a method that logs one of the others: penalties differ between methods, answers
# compare; and the loss of pairs is in other units than that of tokens.
PREFERRED = {"reward_mean": ("answer_reward_mean",), "loss": ("reward_mean", "margin")}


def themes() -> Json:
    """Vega configurations by theme."""
    return {name: _theme(PALETTES[name], SURFACES[name]) for name in PALETTES}


def _theme(palette: list[str], surface: dict[str, str]) -> Json:
    axis = {
        "labelColor": surface["quiet"],
        "titleColor": surface["quiet"],
        "domainColor": surface["line"],
        "tickColor": surface["line"],
        "gridColor": surface["line"],
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 260,
    }
    return {
        "background": "transparent",
        "font": FONT,
        "axis": axis,
        "legend": {
            "labelColor": surface["ink"],
            "titleColor": surface["quiet"],
            "labelFontSize": 12,
            "orient": "top",
            "direction": "horizontal",
            "title": None,
            "symbolStrokeWidth": 2,
            "symbolBaseFillColor": surface["ink"],
            "symbolBaseStrokeColor": surface["ink"],
            "symbolSize": 90,
        },
        "text": {"color": surface["ink"], "fontSize": 12},
        "rule": {"color": surface["quiet"]},
        "view": {"stroke": None},
        "range": {"category": palette},
    }


def _methods(methods: Sequence[str]) -> dict[str, alt.Scale]:
    """Scales that give a method the same look in every chart."""
    # With each time round the colours, shapes and dashes move on by one: no two methods look alike.
    places = [place + place // len(SHAPES) for place in range(len(methods))]
    return {
        "colour": alt.Scale(domain=list(methods)),
        "shape": alt.Scale(domain=list(methods), range=[SHAPES[n % len(SHAPES)] for n in places]),
        "dash": alt.Scale(domain=list(methods), range=[DASHES[n % len(DASHES)] for n in places]),
    }


def _layer(rows: list[Json], *marks: Any) -> Any:
    return alt.layer(*marks, data=alt.Data(values=rows))


def _finish(
    chart: Any,
    title: str,
    step: int | None = None,
    legend: list[Json] | None = None,
    picks: bool = False,
) -> Json:
    """A specification without the colours of a theme, as wide as its place on the page.

    With a `step` between neighbours on the x-axis it is as wide as it has to be, and scrolls. The
    page draws a `legend` of methods: its names wrap, and are buttons where the chart `picks`.
    """
    spec = chart.properties(
        width="container" if step is None else alt.Step(step),
        description=title,
        autosize=alt.AutoSizeParams(type="fit-x" if step is None else "pad", contains="padding"),
    ).to_dict(validate=False)
    spec.pop("config", None)
    spec.pop("$schema", None)
    return {
        "title": title,
        "scrolls": step is not None,
        "legend": legend or [],
        "picks": picks,
        "spec": spec,
    }


def _legend(methods: list[str], shown: Sequence[str], kind: str) -> list[Json]:
    """Entries of a legend: name, place among the colours, and the method's `shape` or `dash`."""
    looks = _methods(methods)[kind].range
    return [
        {"method": method, "colour": place % len(PALETTES["light"]), kind: looks[place]}
        for place, method in enumerate(methods)
        if method in shown
    ]


def _lines(name: str) -> list[str]:
    """A name in lines that are not too long, broken where its words end."""
    lines = [""]
    for word in re.findall(r"[^ _-]*[ _-]?", name):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > LINE_LENGTH:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > LINE_LENGTH:
            lines[-1:] = [lines[-1][:LINE_LENGTH], lines[-1][LINE_LENGTH:]]
    return [line.strip() for line in lines if line.strip()]


def _names(labels: dict[str, list[str]], **properties: Any) -> Any:
    """An axis of names, each in its lines."""
    return alt.Axis(
        ticks=False,
        labelExpr=f"({json.dumps(labels)})[datum.value]",
        **{"title": None, **properties},
    )


def _step(labels: dict[str, list[str]], least: int) -> int:
    """Height of a row that has room for its name."""
    return max(least, 4 + 16 * max(len(lines) for lines in labels.values()))


def _percent(title: str) -> Any:
    label = "datum.value > 100 ? '' : datum.label + ' %'"
    return alt.Axis(title=title, labelExpr=label, tickCount=6)


def scaled(row: Json, name: str) -> Json:
    """A share of a row, with its interval, in percent."""
    ends = {"mean": "", "low": "_ci_low", "high": "_ci_high"}
    return {end: round(100 * row[f"{name}{suffix}"], 3) for end, suffix in ends.items()}


def decodings_of(rows: list[Json]) -> list[str]:
    present = {row["decoding"] for row in rows}
    return [decoding for decoding in DECODINGS if decoding in present]


def decodings(row: Json, runs: Sequence[Json]) -> list[tuple[str, str]]:
    """What a row has accuracies of: in words, and by its column. `runs`: its summaries."""
    shown = [("greedy", "accuracy")] if runs[0]["accuracy"] is not None else []
    return shown + ([("sampled, pass@1", "pass_at_1")] if row["num_samples"] else [])


def accuracy_rows(
    rows: list[Json], runs: dict[str, dict[int, Json]]
) -> tuple[list[Json], list[Json]]:
    """What `accuracy_layers` takes; `runs`: summaries by method and seed."""
    means, seeds = [], []
    for row in rows:
        summaries = runs[row["method"]]
        for decoding, name in decodings(row, list(summaries.values())):
            place = {"method": row["method"], "decoding": decoding}
            means.append(place | scaled(row, name))
            seeds += [
                place | {"seed": seed, "value": round(100 * run[name], 3)}
                for seed, run in summaries.items()
                if len(summaries) > 1 and run[name] is not None
            ]
    return means, seeds


def accuracy_layers(
    rows: list[Json], seeds: list[Json], methods: list[str], legend: Any = None
) -> Any:
    """Accuracy with its interval by method; small ticks are single seeds.

    `rows`: method, decoding, mean, low, high in percent, the methods from the top; `seeds`:
    method, decoding, seed, value.
    """
    ranked = list(dict.fromkeys(row["method"] for row in rows))
    scales = _methods(methods)
    labels = {method: _lines(method) for method in ranked}
    y = alt.Y("method:N", sort=ranked, axis=_names(labels, labelFontSize=13))
    shown = decodings_of(rows)
    offset = alt.YOffset("decoding:N", scale=alt.Scale(domain=shown))
    colour = alt.Color("method:N", scale=scales["colour"], legend=None)
    base = alt.Chart().encode(y=y, yOffset=offset, color=colour)
    intervals = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X("low:Q", scale=alt.Scale(zero=False, nice=True), axis=_percent("right answers")),
        x2="high:Q",
    )
    points = base.mark_point(size=110, filled=True, opacity=1, strokeWidth=2).encode(
        x="mean:Q",
        shape=alt.Shape(
            "decoding:N",
            scale=alt.Scale(domain=list(DECODINGS), range=list(DECODINGS.values())),
            legend=legend,
        ),
        tooltip=["method:N", "decoding:N", *_interval_tooltip("accuracy %")],
    )
    dots = (
        alt.Chart(alt.Data(values=seeds))
        .mark_tick(thickness=2, size=9, opacity=0.75)
        .encode(
            x="value:Q",
            y=y,
            yOffset=offset,
            color=colour,
            tooltip=["method:N", "decoding:N", "seed:N", alt.Tooltip("value:Q", format=".1f")],
        )
    )
    height = 26 + len(ranked) * _step(labels, 22 + 14 * len(shown))
    marks = (intervals, dots, points) if seeds else (intervals, points)
    return _layer(rows, *marks).properties(height=height)


def accuracy_chart(rows: list[Json], seeds: list[Json], methods: list[str]) -> Json:
    """`accuracy_layers`, best first: `rows` are in that order."""
    shown = decodings_of(rows)
    legend = alt.Legend(values=shown) if len(shown) > 1 else None
    chart = accuracy_layers(rows, seeds, methods, legend)
    title = "Accuracy by method, with intervals"
    return _finish(chart, f"{title}; small ticks are single seeds" if seeds else title)


def difference_chart(rows: list[Json], methods: list[str], title: str) -> Json:
    """Differences with their intervals around zero; hollow where they are not significant.

    `rows`: label, method, mean, low, high in points, significant.
    """
    labels = {row["label"]: _difference_lines(row["label"]) for row in rows}
    y = alt.Y("label:N", sort=list(labels), axis=_names(labels, labelFontSize=13))
    colour = alt.Color("method:N", scale=_methods(methods)["colour"], legend=None)
    base = alt.Chart().encode(y=y, color=colour)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q")
    intervals = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X(
            "low:Q",
            axis=alt.Axis(
                title="difference in percentage points",
                labelExpr=SIGNED,
                # Left to itself, it drops every other one where they are close: the zero at times.
                values=_ticks(
                    max(0, *(row["high"] for row in rows)), min(0, *(row["low"] for row in rows))
                ),
                labelOverlap=False,
            ),
        ),
        x2="high:Q",
    )
    tooltip = ["label:N", *_interval_tooltip("points"), "significance:N"]
    points = base.mark_point(size=110, strokeWidth=2, opacity=1).encode(
        x="mean:Q",
        fill=alt.condition(
            "datum.significant",
            alt.Color("method:N", scale=_methods(methods)["colour"], legend=None),
            alt.value("transparent"),
        ),
        tooltip=tooltip,
    )
    height = 26 + _step(labels, 34) * len(rows)
    chart = _layer(rows, zero, intervals, points)
    return _finish(chart.properties(height=height), title)


def _difference_lines(label: str) -> list[str]:
    """`a − b` in one line, or else a line or more for either."""
    if len(label) <= LINE_LENGTH:
        return [label]
    method, minus, other = label.partition(f" {MINUS} ")
    return _lines(method) + (_lines(f"{MINUS} {other}") if minus else [])


def _interval_tooltip(name: str, form: str = ".1f") -> list[Any]:
    return [
        alt.Tooltip("mean:Q", title=name, format=form),
        alt.Tooltip("low:Q", title="from", format=form),
        alt.Tooltip("high:Q", title="to", format=form),
    ]


def learning_charts(logs: dict[str, list[list[Json]]], methods: list[str]) -> list[Json]:
    """A chart for everything that a training log may hold and one does; `logs`: a list per seed."""
    charts = []
    for key, (title, _) in CURVES.items():
        if rows := learning_rows(logs, methods, key):
            present = {row["method"] for row in rows}
            shown = [method for method in methods if method in present]
            chart = _pointed_at(learning_layers(rows, methods, key))
            legend = _legend(methods, shown, "dash")
            charts.append(_finish(chart, title, legend=legend, picks=True))
    return charts


def learning_rows(logs: dict[str, list[list[Json]]], methods: list[str], key: str) -> list[Json]:
    """Curves of the methods that log `key`, and nothing that is preferred to it."""
    rows = []
    for method in methods:
        runs = logs.get(method, [])
        better = PREFERRED.get(key, ())
        if not any(name in row for name in better for run in runs for row in run):
            rows += learning_curve(runs, key, method, 100.0 if key in IN_PERCENT else 1.0)
    return rows


def learning_curve(runs: list[list[Json]], key: str, method: str, factor: float) -> list[Json]:
    """Mean over seeds of a running mean, with the smallest and the largest seed, by step."""
    steps, means, _ = smoothed_curve(runs, key)
    if not steps:
        return []
    means = means * factor
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).astype(int))
    return [
        {
            "method": method,
            "x": steps[place],
            "mean": float(f"{means[:, place].mean():.5g}"),
            "low": float(f"{means[:, place].min():.5g}"),
            "high": float(f"{means[:, place].max():.5g}"),
        }
        for place in shown
        if np.isfinite(means[:, place]).all()
    ]


def learning_layers(
    rows: list[Json],
    methods: list[str],
    key: str,
    legend: Any = None,
    has_bands: bool | None = None,
) -> Any:
    """`rows` of `learning_rows`; by default few methods have bands."""
    x_axis = alt.Axis(title="training step", grid=False, tickCount=6, tickMinStep=1)
    chart = _bands("x:Q", x_axis, CURVES[key][1], methods, rows, 0.16, legend, has_bands)
    return chart.properties(height=210)


def _bands(
    x: str,
    x_axis: Any,
    y_title: str,
    methods: list[str],
    rows: list[Json],
    band_opacity: float,
    legend: Any = None,
    has_bands: bool | None = None,
) -> Any:
    """Lines with bands; the page's legend says which are `picked`, and so brought forward.

    With many methods a band is to be seen only once its method is picked. Lines of few points show
    them: of one point there is no line.
    """
    num_points = Counter(row["method"] for row in rows)
    scales = _methods(methods)
    few = len(num_points) <= MAX_BANDS if has_bands is None else has_bands
    picked = alt.param(name="picked", value=[])
    is_picked = "indexof(picked, datum.method) >= 0"
    is_forward = f"length(picked) == 0 || {is_picked}"
    colour = alt.Color("method:N", scale=scales["colour"], legend=legend)
    base = alt.Chart().encode(x=alt.X(x, axis=x_axis, scale=alt.Scale(nice=False)))
    y = alt.Y("mean:Q", title=y_title, scale=alt.Scale(zero=False))
    band = base.mark_area().encode(
        y=alt.Y("low:Q", title=y_title, scale=alt.Scale(zero=False)),
        y2="high:Q",
        color=colour,
        opacity=alt.condition(
            is_forward if few else is_picked,
            alt.value(band_opacity),
            alt.value(0.02 if few else 0.0),
        ),
    )
    opacity = alt.condition(is_forward, alt.value(1.0), alt.value(0.15))
    line = base.mark_line(strokeWidth=2.2).encode(
        y=y,
        color=colour,
        strokeDash=alt.StrokeDash("method:N", scale=scales["dash"], legend=legend),
        opacity=opacity,
    )
    short = [method for method, number in num_points.items() if number <= MAX_MARKED]
    dots = (
        base.transform_filter(alt.FieldOneOfPredicate("method", short))
        .mark_point(size=28, filled=True)
        .encode(y=y, color=colour, opacity=opacity)
    )
    return _layer(rows, band, line, dots).add_params(picked)


def _pointed_at(chart: Any) -> Any:
    """`_bands` that tell the numbers of the point that the mouse is near."""
    x, y = chart.layer[1].encoding.x, chart.layer[1].encoding.y
    tooltip = [
        "method:N",
        alt.Tooltip(x["shorthand"], title="at"),
        *_interval_tooltip(y["title"], ".4~g"),
    ]
    return chart + alt.Chart().mark_point(size=120, opacity=0, filled=True).encode(
        x=x, y=y, tooltip=tooltip
    )


COSTS = {
    "train_seconds_with_parents": (
        "Accuracy against training time",
        "time of training with parents",
    ),
    "gpu_seconds_training_with_parents": (
        "Accuracy against GPU time",
        "GPU time of training with parents",
    ),
}


def cost_rows(rows: list[Json], name: str) -> list[Json]:
    """What `cost_layers` takes; `name`: one of COSTS."""
    return [
        {"method": row["method"], "seconds": row[name]} | scaled(row, "accuracy") for row in rows
    ]


def cost_layers(rows: list[Json], methods: list[str], axis: str, legend: Any = None) -> Any:
    """Accuracy against training time; `rows`: method, seconds, mean, low, high.

    From what costs nothing a dashed line leads to the others.
    """
    scales = _methods(methods)
    seconds = [row["seconds"] for row in rows] or [0.0]
    unit, size = time_unit(max(seconds))
    rows = [
        {"method": row["method"], "cost": float(f"{row['seconds'] / size:.5g}")}
        | {name: row[name] for name in ("mean", "low", "high")}
        for row in rows
    ]
    x = _cost_axis(seconds, axis)
    axis = f"{axis}, {unit}"
    y_axis = _percent("right answers")
    y_scale = alt.Scale(zero=False, padding=14)
    y = alt.Y("mean:Q", axis=y_axis, scale=y_scale)
    base = alt.Chart().encode(
        x=x, color=alt.Color("method:N", scale=scales["colour"], legend=legend)
    )
    intervals = base.mark_rule(strokeWidth=2, opacity=0.8).encode(
        y=alt.Y("low:Q", axis=y_axis, scale=y_scale), y2="high:Q"
    )
    untrained = alt.Chart().transform_filter("datum.cost == 0").mark_rule(strokeDash=[4, 3])
    points = base.mark_point(size=130, filled=True, opacity=1).encode(
        y=y,
        shape=alt.Shape("method:N", scale=scales["shape"], legend=legend),
        tooltip=[
            "method:N",
            alt.Tooltip("cost:Q", title=axis, format=",.4~r"),
            *_interval_tooltip("accuracy %"),
        ],
    )
    return _layer(rows, intervals, untrained.encode(y=y), points).properties(height=280)


def cost_chart(rows: list[Json], methods: list[str], name: str) -> Json:
    """`cost_layers` of one of COSTS."""
    title, axis = COSTS[name]
    if any(row["seconds"] == 0 for row in rows):
        title = f"{title}; dashed: no training"
    # Names beside the points would cover each other where methods cost and get alike.
    legend = _legend(methods, [row["method"] for row in rows], "shape")
    return _finish(cost_layers(rows, methods, axis), title, legend=legend)


def _cost_axis(seconds: list[float], title: str) -> Any:
    """Times, in the unit of the longest; on a logarithm that has room for 0 where far apart."""
    unit, size = time_unit(max(seconds))
    largest, paid = max(seconds) / size, [time / size for time in seconds if time]
    if not are_far_apart(paid):
        return alt.X(
            "cost:Q",
            axis=alt.Axis(title=f"{title}, {unit}", grid=False, values=_ticks(largest)),
            scale=alt.Scale(domain=[-0.03 * largest, 1.05 * largest], nice=False),
        )
    # Such a scale shows log(1 + cost / constant): the same room beside the marks as above.
    constant = min(paid)
    width = np.log1p(largest / constant)
    first, last = (constant * float(np.expm1(share * width)) for share in (0.03, 1.05))
    times = [
        time for time in round_times(min(paid) * size, max(paid) * size) if time <= last * size
    ]
    values, labels = [time / size for time in times], [short_time(time) for time in times]
    if min(seconds) == 0:
        values, labels = [0.0, *values], ["0", *labels]
    return alt.X(
        "cost:Q",
        axis=alt.Axis(
            title=title,
            grid=False,
            values=values,
            labelSeparation=8,
            labelExpr=f"({json.dumps(labels)})[indexof({json.dumps(values)}, datum.value)]",
        ),
        scale=alt.Scale(type="symlog", constant=constant, domain=[-first, last], nice=False),
    )


def _ticks(largest: float, smallest: float = 0.0) -> list[float]:
    """Round numbers from `smallest` to `largest`, four or so, with 0."""
    span = (largest - smallest) or 1.0
    step = 10.0 ** np.floor(np.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor * 6 >= span)
    first, last = int(np.ceil(smallest / step)), int(np.floor(largest / step))
    return [round(place * step, 9) for place in range(first, last + 1)]


def pass_at_k_chart(rows: list[Json], methods: list[str], title: str) -> Json:
    """`rows`: method, k, mean, low, high in percent."""
    largest = max(row["k"] for row in rows)
    ks = sorted({*powers_up_to(largest), largest})  # every k would not fit
    axis = alt.Axis(title="samples k", values=ks, format="d", grid=False)
    shown = [method for method in methods if any(row["method"] == method for row in rows)]
    chart = _pointed_at(_bands("k:Q", axis, "% of problems", methods, rows, 0.09))
    # Doublings of k are equal steps.
    for layer in chart.layer:
        layer.encoding.x.scale = alt.Scale(type="log", base=2, nice=False)
    legend = _legend(methods, shown, "dash")
    return _finish(chart.properties(height=270), title, legend=legend, picks=True)


def length_chart(rows: list[Json], methods: list[str]) -> Json:
    """Spread of completion lengths: 5 to 95 % as a line, quartiles as a bar, the median as a tick.

    `rows`: method, outcome, completions, q05, q25, q50, q75, q95 in tokens. Their number stands
    beside them: of one completion there is no spread.
    """
    present = {row["outcome"] for row in rows}
    outcomes = [outcome for outcome in ("right", "wrong") if outcome in present]
    labels = {method: _lines(method) for method in methods}
    colour = _methods(methods)["colour"]
    place = alt.Chart().encode(
        y=alt.Y("method:N", sort=methods, axis=_names(labels, labelFontSize=13)),
        yOffset=alt.YOffset("outcome:N", scale=alt.Scale(domain=outcomes)),
    )
    base = place.encode(color=alt.Color("method:N", scale=colour, legend=None))
    x_axis = alt.Axis(title="tokens of a completion", tickCount=6)
    tooltip = ["method:N", "outcome:N", alt.Tooltip("completions:Q", format=",")] + [
        alt.Tooltip(f"q{q}:Q", title=f"{int(q)} %", format=".0f")
        for q in ("05", "25", "50", "75", "95")
    ]
    whole = base.mark_rule(strokeWidth=1.6).encode(x=alt.X("q05:Q", axis=x_axis), x2="q95:Q")
    # Right is filled and wrong hollow: the outline has the contrast of the method's colour.
    fill = alt.FillOpacity(
        "outcome:N",
        sort=outcomes,
        scale=alt.Scale(domain=outcomes, range=[OPACITY[outcome] for outcome in outcomes]),
        legend=None,
    )
    middle = base.mark_bar(height=12, cornerRadius=2, strokeWidth=1.5).encode(
        x="q25:Q",
        x2="q75:Q",
        stroke=alt.Stroke("method:N", scale=colour, legend=None),
        fillOpacity=fill,
        tooltip=tooltip,
    )
    median = base.mark_tick(thickness=3, size=17).encode(x="q50:Q", tooltip=tooltip)
    number = place.mark_text(align="left", dx=6, fontSize=11).encode(
        x="q95:Q", text=alt.Text("completions:Q", format=",")
    )
    height = 40 + len(methods) * _step(labels, 22 * max(1, len(outcomes)))
    title = (
        "Length of completions that are right (filled) and wrong (hollow): 5 to 95 %, quartiles, "
        "median, and how many they are"
    )
    chart = _layer(rows, whole, middle, median, number)
    return _finish(chart.properties(height=height), title)


def truncation_chart(rows: list[Json], methods: list[str]) -> Json:
    """Share of completions that were cut off; `rows`: method, value in percent."""
    labels = {method: _lines(method) for method in methods}
    base = alt.Chart().encode(
        y=alt.Y("method:N", sort=methods, axis=_names(labels, labelFontSize=13)),
        x=alt.X(
            "value:Q",
            axis=_percent("cut off at the token limit"),
            scale=alt.Scale(domainMin=0, domainMax=max(1.0, *(1.2 * r["value"] for r in rows))),
        ),
    )
    bars = base.mark_bar(height=16, cornerRadiusEnd=3).encode(
        color=alt.Color("method:N", scale=_methods(methods)["colour"], legend=None),
        tooltip=["method:N", alt.Tooltip("value:Q", title="cut off %", format=".2f")],
    )
    shares = base.mark_text(align="left", dx=5).encode(text=alt.Text("label:N"))
    title = "Completions cut off at the token limit"
    height = 40 + _step(labels, 28) * len(rows)
    return _finish(_layer(rows, bars, shares).properties(height=height), title)


def agreement_charts(rows: list[Json], methods: list[str]) -> list[Json]:
    """How often two methods give the same answer, and how often only the row's one is right.

    `rows`: a, b, same_answer and the parts of `metrics.Agreement`, in percent.
    """
    same = _pair_chart(
        rows,
        methods,
        "same_answer",
        ("this one", "and this one"),
        "Share of problems to which two methods give the same answer, %",
    )
    only = _pair_chart(
        rows,
        methods,
        "only_a",
        ("this one is right …", "… where this one is wrong"),
        "Share of problems that one method gets right and another wrong, %",
    )
    return [same, only]


def _pair_chart(
    rows: list[Json], methods: list[str], shown: str, axes: tuple[str, str], title: str
) -> Json:
    """A field for every two methods, row and column, with the share `shown` in it."""
    labels = {method: _lines(method) for method in methods}
    angle = -30 if all(len(lines) == 1 for lines in labels.values()) else -60
    columns = _names(labels, title=axes[1], orient="top", labelAngle=angle, domain=False)
    base = alt.Chart().encode(
        x=alt.X("b:N", sort=methods, axis=columns),
        y=alt.Y("a:N", sort=methods, axis=_names(labels, title=axes[0], domain=False)),
    )
    tooltip = [
        alt.Tooltip("a:N", title="row"),
        alt.Tooltip("b:N", title="column"),
        *(
            alt.Tooltip(f"{name}:Q", title=title, format=".1f")
            for name, title in (
                ("same_answer", "same answer %"),
                ("both_right", "both right %"),
                ("same_wrong", "both wrong, same answer %"),
                ("other_wrong", "both wrong, other answers %"),
                ("no_answer", "both wrong, one or both without an answer %"),
                ("only_a", "only the row %"),
                ("only_b", "only the column %"),
            )
        ),
    ]
    # Ink stays readable on it in both themes: the colour goes to 60 % of its strength only.
    cells = base.mark_rect(cornerRadius=3, fill=PALETTES["dark"][0]).encode(
        opacity=alt.Opacity(f"{shown}:Q", scale=alt.Scale(range=[0.04, 0.6]), legend=None),
        tooltip=tooltip,
    )
    text = base.mark_text(fontSize=13).encode(text=alt.Text(f"{shown}:Q", format=".1f"))
    step = None if len(methods) <= MAX_SQUEEZED else PAIR_STEP
    height = 40 + _step(labels, 40) * len(methods)
    return _finish(_layer(rows, cells, text).properties(height=height), title, step)
