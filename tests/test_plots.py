from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from script_modules import load_script

from gsm8k_core.config import Comparison, dump
from gsm8k_core.errors import DataError
from gsm8k_core.files import write_json, write_jsonl
from gsm8k_core.plots import (
    GREEDY,
    PALETTE,
    SAMPLED,
    _cost_look,
    _look,
    _seeds_text,
    plot_accuracy,
    plot_cost,
    plot_reward,
    save_figure,
)
from gsm8k_core.report_charts import PALETTES
from gsm8k_core.tables import PASS_AT_K_SCHEMA, SCHEMA, write_comparison

STUDY = Comparison(
    name="demo",
    models=["m1", "m2"],
    methods=["base", "grpo"],
    suites=["test", "samples"],
    seeds=[0, 1],
    chains={"base": ["base"], "grpo": ["base", "grpo"]},
    confidence=0.9,
)


def points(line: Line2D, axis: str) -> list[float]:
    data = line.get_xdata() if axis == "x" else line.get_ydata()
    return list(np.asarray(data, dtype=np.float64))


def row_of(model: str, method: str, suite: str) -> dict[str, Any]:
    numbers: dict[str, Any] = dict.fromkeys(SCHEMA)
    numbers |= {"accuracy": 0.4, "accuracy_ci_low": 0.3, "accuracy_ci_high": 0.5}
    numbers |= {"pass_at_1": 0.2, "pass_at_1_ci_low": 0.1, "pass_at_1_ci_high": 0.3}
    numbers |= {"num_problems": 50, "num_seeds": 2, "num_samples": 4 * (suite == "samples")}
    return {**numbers, "model": model, "method": method, "suite": suite}


def write_runs(folder: Path, log: list[dict[str, Any]], study: Comparison = STUDY) -> pl.DataFrame:
    """Summaries and training logs of every run; returns the comparison."""
    keys = (
        "pass_at_k",
        "maj_at_k",
        "accuracy_flexible",
        "format_fraction",
        "mean_completion_tokens",
        "contradicted_fraction",
        "num_prompts_truncated",
        "math_verify_killed",
        "grading",
        "marker",
    )
    rest: dict[str, Any] = dict.fromkeys(
        (*keys, "truncated_fraction", "seconds_generating", "num_samples")
    )
    for model in study.models:
        for method in study.methods:
            for seed in study.seeds_of(method):
                run = folder / model / method / f"seed{seed}"
                scores = {"accuracy": 0.35 + 0.1 * seed, "pass_at_1": 0.2}
                for suite in study.suites:
                    write_json(run / "metrics" / f"{suite}.json", {**rest, **scores})
                if method != "base":
                    write_jsonl(run / "train" / "metrics.jsonl", log)
    rows = [
        row_of(model, method, suite)
        for model in study.models
        for method in study.methods
        for suite in study.suites
    ]
    return pl.DataFrame(rows, schema=SCHEMA)


REWARDS = [
    {"step": step, "reward_mean": step / 10, "loss": 0.0}
    | ({"validation_accuracy": 0.5} if step % 5 == 0 else {})
    for step in range(1, 11)
]


def test_there_is_one_accuracy_panel_per_model_and_suite_in_percent(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS)
    figure = plot_accuracy(STUDY, tmp_path, comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "m1 on test (50 problems)",
        "m2 on test (50 problems)",
        "m1 on samples (50 problems)",
        "m2 on samples (50 problems)",
    ]
    # base: interval, mean; grpo: interval, mean, two seeds. With samples, each of them twice.
    assert [len(axes.lines) for axes in figure.axes] == [5, 5, 10, 10]
    interval, mean, *_, seeds = figure.axes[0].lines
    assert points(interval, "x") == [30.0, 50.0]
    assert points(mean, "x") == [40.0]
    assert points(seeds, "x") == pytest.approx([35.0, 45.0])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["base", "grpo"]
    assert "90 % interval" in " ".join(text.get_text() for text in figure.texts)


def test_a_comparison_of_another_study_is_refused(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS).filter(pl.col("method") != "grpo")
    with pytest.raises(DataError, match="m1 / grpo / test"):
        plot_accuracy(STUDY, tmp_path, comparison)


def test_reward_and_validation_are_drawn_over_steps(tmp_path: Path) -> None:
    write_runs(tmp_path, REWARDS)
    figure = plot_reward(STUDY, tmp_path)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Mean reward", "", "Validation accuracy", "",
    ]  # fmt: skip
    reward, validation = figure.axes[0].lines[0], figure.axes[2].lines[0]
    assert points(reward, "y") == pytest.approx([step / 10 for step in range(1, 11)])
    assert (points(validation, "x"), points(validation, "y")) == ([5, 10], [50.0, 50.0])


def test_methods_with_other_penalties_are_compared_by_their_answers(tmp_path: Path) -> None:
    log = [{**row, "answer_reward_mean": row["reward_mean"] / 2} for row in REWARDS]
    write_runs(tmp_path, log)
    figure = plot_reward(STUDY, tmp_path)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "Correct completions", "Validation accuracy",
    ]  # fmt: skip
    assert points(figure.axes[0].lines[0], "y") == pytest.approx([5.0 * n for n in range(1, 11)])
    assert figure.axes[0].yaxis.get_major_formatter()(20) == "20 %"
    assert "correct completions during training" in figure.get_suptitle()


def test_where_a_method_logs_no_answers_the_whole_reward_is_drawn_of_all(tmp_path: Path) -> None:
    study = STUDY.model_copy(
        update={
            "methods": ["base", "grpo", "other"],
            "chains": {**STUDY.chains, "other": ["base", "other"]},
        }
    )
    write_runs(tmp_path, [{**row, "answer_reward_mean": 0.5} for row in REWARDS])
    for model in study.models:
        for seed in study.seeds:
            run = tmp_path / model / "other" / f"seed{seed}"
            write_jsonl(run / "train" / "metrics.jsonl", REWARDS)
    axes = plot_reward(study, tmp_path).axes[0]
    assert axes.get_ylabel() == "Mean reward"
    assert [points(line, "y")[-1] for line in axes.lines] == pytest.approx([1.0, 1.0])


def test_the_line_is_the_mean_over_seeds_and_the_band_reaches_their_extremes(
    tmp_path: Path,
) -> None:
    write_runs(tmp_path, REWARDS)
    other = [{**row, "reward_mean": row["reward_mean"] + 0.2} for row in REWARDS]
    write_jsonl(tmp_path / "m1" / "grpo" / "seed1" / "train" / "metrics.jsonl", other)
    axes = plot_reward(STUDY, tmp_path).axes[0]
    assert points(axes.lines[0], "y")[0] == pytest.approx(0.2)  # (0.1 + 0.3) / 2
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.1, 1.2))


def test_a_study_without_rewards_shows_the_loss(tmp_path: Path) -> None:
    write_runs(tmp_path, [{"step": step, "loss": 1 / step} for step in range(1, 6)])
    assert plot_reward(STUDY, tmp_path).axes[0].get_ylabel() == "Loss, nats a token"


def test_the_loss_of_pairs_has_no_axis_in_common_with_that_of_tokens(tmp_path: Path) -> None:
    study = STUDY.model_copy(
        update={
            "methods": ["sft", "dpo"],
            "seeds": [0],
            "chains": {"sft": ["base", "sft"], "dpo": ["base", "dpo"]},
        }
    )
    steps = range(1, 6)
    write_runs(tmp_path, [])
    for model, (method, more) in itertools.product(
        study.models, {"sft": {}, "dpo": {"margin": 2.0}}.items()
    ):
        log = [{"step": step, "loss": 3.0, **more} for step in steps]
        write_jsonl(tmp_path / model / method / "seed0" / "train" / "metrics.jsonl", log)
    axes = plot_reward(study, tmp_path).axes
    assert [one.get_ylabel() for one in axes[::2]] == ["Loss, nats a token", "Margin of pairs"]
    assert [points(line, "y") for line in axes[0].lines] == [[3.0] * 5]
    assert [points(line, "y") for line in axes[2].lines] == [[2.0] * 5]


def test_a_study_that_trains_nothing_says_so(tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"methods": ["base"]})
    comparison = write_runs(tmp_path, REWARDS)
    for figure in (plot_reward(study, tmp_path), plot_cost(study, comparison)):
        (text,) = figure.axes[0].texts
        assert "no method of this study trains anything" in text.get_text()


def with_costs(comparison: pl.DataFrame, **costs: list[float | None]) -> pl.DataFrame:
    """Values of the rows' columns: base on both suites, grpo on both, of m1 and then of m2."""
    return comparison.with_columns(**{name: pl.Series(costs[name]) for name in costs})


def test_accuracy_stands_over_the_time_of_training_with_parents(tmp_path: Path) -> None:
    seconds: list[float | None] = [0.0, 0.0, 90.0, 90.0, 0.0, 0.0, 50.0, 50.0]
    comparison = with_costs(write_runs(tmp_path, REWARDS), train_seconds_with_parents=seconds)
    figure = plot_cost(STUDY, comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "m1 on test (50 problems)", "m2 on test (50 problems)",
        "m1 on samples (50 problems)", "m2 on samples (50 problems)",
    ]  # fmt: skip
    base, interval, mean = figure.axes[0].lines
    assert points(base, "y") == [40.0, 40.0]
    assert (points(interval, "x"), points(interval, "y")) == ([90.0, 90.0], [30.0, 50.0])
    assert (points(mean, "x"), points(mean, "y")) == ([90.0], [40.0])
    assert figure.axes[2].get_xlabel() == "Time of training with parents, seconds"
    assert figure.axes[0].get_xscale() == "linear"


def test_gpu_time_is_the_cost_where_gpus_were_used(tmp_path: Path) -> None:
    hours: list[float | None] = [0.0, 0.0, 7200.0, 7200.0] * 2
    comparison = with_costs(
        write_runs(tmp_path, REWARDS),
        gpu_seconds_training_with_parents=hours,
        train_seconds_with_parents=[None if hour == 0.0 else 1.0 for hour in hours],
    )
    figure = plot_cost(STUDY, comparison)
    assert figure.axes[2].get_xlabel() == "GPU time of training with parents, minutes"
    assert points(figure.axes[0].lines[2], "x") == [7200.0]


def test_a_linear_axis_of_time_has_round_numbers_of_one_unit(tmp_path: Path) -> None:
    seconds: list[float | None] = [0.0, 0.0, 4200.0, 4200.0, 0.0, 0.0, 70.0, 70.0]
    comparison = with_costs(write_runs(tmp_path, REWARDS), train_seconds_with_parents=seconds)
    figure = plot_cost(STUDY, comparison)
    labels = []
    for axes in figure.axes[2:]:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        labels.append([axes.xaxis.get_major_formatter()(tick) for tick in ticks])
    assert labels == [["0", "20", "40", "60", "80"], ["0", "20", "40", "60", "80"]]
    assert [axes.get_xlabel().split(", ")[1] for axes in figure.axes[2:]] == ["minutes", "seconds"]


def test_a_method_that_was_trained_without_a_gpu_does_not_vanish(tmp_path: Path) -> None:
    comparison = with_costs(
        write_runs(tmp_path, REWARDS),
        gpu_seconds_training_with_parents=[0.0, 0.0, 7200.0, 7200.0, 0.0, 0.0, 0.0, 0.0],
        train_seconds_with_parents=[0.0, 0.0, 3600.0, 3600.0, 0.0, 0.0, 600.0, 600.0],
    )
    figure = plot_cost(STUDY, comparison)
    assert figure.axes[2].get_xlabel() == "Time of training with parents, minutes"
    assert [points(axes.lines[-1], "x") for axes in figure.axes[:2]] == [[3600.0], [600.0]]


def test_a_method_has_one_colour_in_all_figures_and_greedy_and_sampled_have_none(
    tmp_path: Path,
) -> None:
    added = {"methods": ["base", "sft", "grpo"],
             "chains": {**STUDY.chains, "sft": ["base", "sft"]}}  # fmt: skip
    study = STUDY.model_copy(update=added)
    rows = write_runs(tmp_path, REWARDS)
    sft = rows.filter(pl.col("method") == "grpo").with_columns(method=pl.lit("sft"))
    for model in study.models:  # no reward: not in that figure
        for seed in study.seeds:
            write_jsonl(tmp_path / model / "sft" / f"seed{seed}" / "train" / "metrics.jsonl", [])
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(90.0)
    comparison = pl.concat([rows, sft]).with_columns(train_seconds_with_parents=cost)
    figures = (plot_cost(study, comparison), plot_reward(study, tmp_path))
    colours = [
        dict(zip([text.get_text() for text in legend.get_texts()],
                 [line.get_color() for line in legend.get_lines()], strict=True))
        for legend in (figure.legends[0] for figure in figures)
    ]  # fmt: skip
    assert set(colours[0]) == {"base", "sft", "grpo"} and set(colours[1]) == {"grpo"}
    assert colours[0]["grpo"] == colours[1]["grpo"] != colours[0]["sft"]
    assert {GREEDY, SAMPLED}.isdisjoint(PALETTE)


def test_the_colours_of_the_figures_are_those_of_the_report() -> None:
    assert [_look(n)["color"] for n in range(7)] == PALETTES["light"]
    assert [_cost_look(n)["color"] for n in range(7)] == PALETTES["light"]


def captions(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_the_figures_say_how_many_seeds_problems_and_clusters_they_stand_on(
    tmp_path: Path,
) -> None:
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        num_problems=pl.lit(1319), num_clusters=pl.lit(81), train_seconds_with_parents=cost
    )
    accuracy, spent = plot_accuracy(STUDY, tmp_path, comparison), plot_cost(STUDY, comparison)
    for figure in (accuracy, spent):
        title = figure.axes[0].get_title(loc="left").replace("\n", " ")
        assert title == "m1 on test (1,319 problems in 81 clusters)"
    over = "over seeds and clusters of problems"
    assert f"Mean over 2 seeds (base: 1), 90 % interval {over}; dots: seeds" in captions(accuracy)
    assert f"Mean over 2 seeds; bars: 90 % intervals {over}; dashed" in captions(spent)
    assert "Mean over 2 seeds;" in captions(plot_reward(STUDY, tmp_path))


def test_single_seeds_are_told(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        train_seconds_with_parents=pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    )
    once = STUDY.model_copy(update={"seeds": [0]})
    assert "One seed; bars: 90 % intervals over problems alone" in captions(
        plot_cost(once, comparison)
    )
    reward = captions(plot_reward(once, tmp_path))
    assert "One seed" in reward and "band" not in reward
    assert _seeds_text(STUDY, STUDY.methods) == "2 seeds (base: 1)"
    assert _seeds_text(STUDY, ["base"]) == "1 seed"


def test_the_dashed_line_of_cost_has_the_name_of_what_is_not_trained(tmp_path: Path) -> None:
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    comparison = write_runs(tmp_path, REWARDS).with_columns(train_seconds_with_parents=cost)
    figure = plot_cost(STUDY, comparison)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "grpo"]
    assert [line.get_linestyle() for line in legend.get_lines()] == ["--", "None"]
    assert "dashed: no training" in captions(figure)


@pytest.mark.parametrize(("number", "has_bands"), [(4, True), (5, False)])
def test_bands_of_many_methods_do_not_cover_each_other(
    tmp_path: Path, number: int, has_bands: bool
) -> None:
    names = [f"m{place}" for place in range(number)]
    study = STUDY.model_copy(
        update={
            "models": ["m1"],
            "methods": names,
            "chains": {name: ["base", name] for name in names},
        }
    )
    for name in names:
        for seed in (0, 1):
            write_jsonl(tmp_path / "m1" / name / f"seed{seed}" / "train/metrics.jsonl", REWARDS)
    figure = plot_reward(study, tmp_path)
    assert len(figure.axes[0].collections) == (number if has_bands else 0)
    caption = " ".join(text.get_text() for text in figure.texts)
    assert ("band: smallest to largest seed" in caption) == has_bands
    assert ("no bands of seeds with more than 4 methods" in caption) != has_bands


def test_costs_far_apart_stand_on_a_logarithm_with_times_that_people_count_in(
    tmp_path: Path,
) -> None:
    study = STUDY.model_copy(
        update={
            "methods": ["base", "grpo", "dapo"],
            "models": ["m1"],
            "chains": {**STUDY.chains, "dapo": ["base", "dapo"]},
        }
    )
    rows = write_runs(tmp_path, REWARDS).filter(pl.col("model") == "m1")
    dapo = rows.filter(pl.col("method") == "grpo").with_columns(method=pl.lit("dapo"))
    comparison = pl.concat([rows, dapo]).with_columns(
        train_seconds_with_parents=pl.Series([0.0, 0.0, 60.0, 60.0, 36_000.0, 36_000.0])
    )
    axes = plot_cost(study, comparison).axes[1]
    assert axes.get_xscale() == "log"
    labels = [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()]
    assert labels == ["1 min", "3 min", "10 min", "30 min", "1 h", "3 h", "10 h"]


def texts_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """Everything that is written, with the pixels that it takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_text().strip() and text.get_visible()
    ]


def long_names() -> Comparison:
    methods = ["base", *(f"method_number_{n}_with_a_rather_long_name_" for n in range(10))]
    return STUDY.model_copy(
        update={
            "name": "a-study-with-a-long-name-of-gsm8k-2026",
            "models": ["DeepSeek-R1-Distill-Qwen-1.5B-instruct-v1", "Qwen2.5-0.5B-Instruct-GRPO-c"],
            "suites": ["gsm8k_platinum_8shot_cot_greedy", "gsm_symbolic_p2_main_sampled"],
            "methods": methods,
            "seeds": [0],
            "chains": {name: ["base"] if name == "base" else ["base", name] for name in methods},
        }
    )


@pytest.mark.parametrize("name", ["accuracy", "cost", "reward"])
def test_long_names_are_neither_cut_nor_printed_over_each_other(tmp_path: Path, name: str) -> None:
    study = long_names()
    comparison = write_runs(tmp_path, REWARDS, study).with_columns(
        train_seconds_with_parents=pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    )
    figure = {
        "accuracy": lambda: plot_accuracy(study, tmp_path, comparison),
        "cost": lambda: plot_cost(study, comparison),
        "reward": lambda: plot_reward(study, tmp_path),
    }[name]()
    texts = texts_of(figure)
    assert {*study.models} <= {line for text, _ in texts for line in text.split("\n")}
    drawn = figure.get_tightbbox()  # in inches
    assert drawn.x0 >= 0 and drawn.x1 <= figure.get_figwidth()
    assert drawn.y0 >= 0 and drawn.y1 <= figure.get_figheight()
    names = {*study.models, *study.methods}
    named = [(text, box) for text, box in texts if text.split("\n")[0] in names]
    assert len(named) >= 2 + 10
    for place, (text, box) in enumerate(named):
        for other, taken in named[:place]:
            assert not box.overlaps(taken), (text, other)


def test_a_figure_grows_with_the_lines_of_its_legend(tmp_path: Path) -> None:
    write_runs(tmp_path, REWARDS, long_names())
    write_runs(tmp_path / "few", REWARDS)
    heights = []
    for study, folder in ((STUDY, tmp_path / "few"), (long_names(), tmp_path)):
        figure = plot_reward(study, folder)
        texts_of(figure)  # lays it out
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_the_same_spot_is_the_same_accuracy_in_all_panels(tmp_path: Path) -> None:
    of_m1 = pl.col("model") == "m1"
    far_apart = [
        pl.when(of_m1).then(pl.col(name) / 20).otherwise(pl.col(name)).alias(name)
        for name in ("accuracy", "accuracy_ci_low", "accuracy_ci_high")
    ]
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        *far_apart, train_seconds_with_parents=cost
    )
    for figure, axis in (
        (plot_accuracy(STUDY, tmp_path, comparison), "x"),
        (plot_cost(STUDY, comparison), "y"),
    ):
        limits = {axes.get_xlim() if axis == "x" else axes.get_ylim() for axes in figure.axes}
        ((low, high),) = limits
        assert -2 <= low < 1.5 and 50 < high <= 102


def test_every_row_of_accuracies_has_its_numbers_below_it(tmp_path: Path) -> None:
    texts = texts_of(plot_accuracy(STUDY, tmp_path, write_runs(tmp_path, REWARDS)))
    assert len([text for text, _ in texts if text == "40 %"]) == 4


def test_texts_of_an_svg_are_sans_serif_where_its_viewer_lacks_the_font(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figure = plot_accuracy(STUDY, tmp_path, write_runs(tmp_path, REWARDS))
    save_figure(figure, tmp_path, "accuracy")
    svg = (tmp_path / "accuracy.svg").read_text(encoding="utf-8")
    fonts = set(re.findall(r'font-family: ([^;"]*)', svg))
    assert fonts == {"'DejaVu Sans', 'Verdana', sans-serif"}
    assert "findfont" not in caplog.text


def test_lines_of_the_first_methods_differ_in_more_than_colour() -> None:
    assert len({_look(number)["linestyle"] for number in range(4)}) == 4


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS)
    for folder in ("one", "two"):
        save_figure(plot_accuracy(STUDY, tmp_path, comparison), tmp_path / folder, "accuracy")
    for suffix in ("svg", "png"):
        files = [tmp_path / folder / f"accuracy.{suffix}" for folder in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert "<dc:date>" not in (tmp_path / "one" / "accuracy.svg").read_text(encoding="utf-8")


def test_the_plot_script_writes_each_figure_twice(tmp_path: Path) -> None:
    curves = pl.DataFrame(schema=PASS_AT_K_SCHEMA)
    write_comparison(write_runs(tmp_path, REWARDS), curves, tmp_path / "results", 0.95)
    comparison = str(tmp_path / "results" / "comparison.csv")
    arguments = ["--study", dump(STUDY), "--study-dir", str(tmp_path)]
    output = ["--comparison", comparison, "--output-dir", str(tmp_path / "figures")]
    assert load_script("plot").main([*arguments, *output]) == 0
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        "accuracy.png", "accuracy.svg", "cost.png", "cost.svg", "reward.png", "reward.svg",
    ]  # fmt: skip
