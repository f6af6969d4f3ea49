from __future__ import annotations

import itertools
import re
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest
import vl_convert
from script_modules import load_script

from gsm8k_core.charts import DASHES, PALETTES
from gsm8k_core.config import Comparison, dump
from gsm8k_core.errors import DataError
from gsm8k_core.figures import _seeds_text, plot_accuracy, plot_cost, plot_reward, save_figure
from gsm8k_core.files import Json, write_json, write_jsonl
from gsm8k_core.tables import PAIRS_SCHEMA, PASS_AT_K_SCHEMA, SCHEMA, Tables, write_comparison

STUDY = Comparison(
    name="demo",
    models=["m1", "m2"],
    methods=["base", "grpo"],
    suites=["test", "samples"],
    seeds=[0, 1],
    chains={"base": ["base"], "grpo": ["base", "grpo"]},
    confidence=0.9,
)
REST: dict[str, Any] = dict.fromkeys(
    (
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
        "truncated_fraction",
        "seconds_generating",
        "num_samples",
    )
)


class Drawn:
    """A figure as Vega-Lite, and as what is drawn of it."""

    def __init__(self, figure: Any) -> None:
        self.spec: Json = figure.to_dict(validate=False)
        self.panels: list[Json] = self.spec.get("concat", [])

    @cached_property
    def svg(self) -> str:
        return vl_convert.vegalite_to_svg(self.spec)

    def rows(self, panel: int) -> list[Json]:
        # What all panels share stands above them.
        return (self.panels[panel].get("data") or self.spec["data"])["values"]

    def titles(self) -> list[str]:
        """A title with the one below it, for each panel."""
        return [
            " ".join([*listed(panel["title"]["text"]), *listed(panel["title"].get("subtitle"))])
            for panel in self.panels
        ]

    def caption(self) -> str:
        return " ".join(self.spec["title"]["subtitle"])

    def axis(self, panel: int, name: str) -> Json:
        return self.panels[panel]["layer"][0]["encoding"][name]["axis"]

    def legend(self, panel: int) -> list[str]:
        return self.panels[panel]["layer"][0]["encoding"]["color"]["legend"]["values"]

    def texts(self) -> list[tuple[str, float, float, float]]:
        """What is written, but for titles that stand upright: text, ends and height, about."""
        found: list[tuple[str, float, float, float]] = []

        def walk(element: ElementTree.Element, x: float, y: float) -> None:
            moved = re.search(r"translate\(([-\d.]+),([-\d.]+)\)", element.get("transform", ""))
            if moved:
                x, y = x + float(moved[1]), y + float(moved[2])
            if element.tag.endswith("}text") and "rotate" not in element.get("transform", ""):
                anchor = {"end": 1.0, "middle": 0.5}.get(element.get("text-anchor", ""), 0.0)
                for line in [*element] or [element]:
                    y += float(line.get("dy", "0"))
                    width = 0.5 * len(line.text or "") * float(element.get("font-size", "")[:-2])
                    found.append((line.text or "", x - anchor * width, x + (1 - anchor) * width, y))
                return
            for child in element:
                walk(child, x, y)

        walk(ElementTree.fromstring(self.svg), 0.0, 0.0)
        return found

    def size(self) -> tuple[float, float]:
        picture = ElementTree.fromstring(self.svg)
        return float(picture.get("width", "")), float(picture.get("height", ""))


def listed(text: Any) -> list[str]:
    return [text] if isinstance(text, str) else text or []


def row_of(model: str, method: str, suite: str) -> dict[str, Any]:
    numbers: dict[str, Any] = dict.fromkeys(SCHEMA)
    numbers |= {"accuracy": 0.4, "accuracy_ci_low": 0.3, "accuracy_ci_high": 0.5}
    numbers |= {"pass_at_1": 0.2, "pass_at_1_ci_low": 0.1, "pass_at_1_ci_high": 0.3}
    numbers |= {"num_problems": 50, "num_seeds": 2, "num_samples": 4 * (suite == "samples")}
    return {**numbers, "model": model, "method": method, "suite": suite}


def write_runs(folder: Path, log: list[dict[str, Any]], study: Comparison = STUDY) -> pl.DataFrame:
    """Summaries and training logs of every run; returns the comparison."""
    for model in study.models:
        for method in study.methods:
            for seed in study.seeds_of(method):
                run = folder / model / method / f"seed{seed}"
                scores = {"accuracy": 0.35 + 0.1 * seed, "pass_at_1": 0.2}
                for suite in study.suites:
                    write_json(run / "metrics" / f"{suite}.json", {**REST, **scores})
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
    figure = Drawn(plot_accuracy(STUDY, tmp_path, write_runs(tmp_path, REWARDS)))
    assert figure.titles() == [
        "m1 on test 50 problems", "m2 on test 50 problems",
        "m1 on samples 50 problems", "m2 on samples 50 problems",
    ]  # fmt: skip
    assert figure.spec["columns"] == 2
    greedy = {"decoding": "greedy", "mean": 40.0, "low": 30.0, "high": 50.0}
    sampled = {"decoding": "sampled, pass@1", "mean": 20.0, "low": 10.0, "high": 30.0}
    for panel, shown in ((0, [greedy]), (3, [greedy, sampled])):
        assert figure.rows(panel) == [
            {"method": method, **numbers} for method in ("base", "grpo") for numbers in shown
        ]
    _, seeds, _ = figure.panels[0]["layer"]
    assert [(row["method"], row["value"]) for row in seeds["data"]["values"]] == [
        ("grpo", 35.0), ("grpo", 45.0),
    ]  # fmt: skip
    assert figure.panels[0]["layer"][0]["encoding"]["y"]["sort"] == ["base", "grpo"]
    assert "90 % interval" in figure.caption()


def test_circles_are_greedy_and_diamonds_sampled_in_every_panel(tmp_path: Path) -> None:
    figure = Drawn(plot_accuracy(STUDY, tmp_path, write_runs(tmp_path, REWARDS)))
    for panel in figure.panels:
        shape = panel["layer"][-1]["encoding"]["shape"]
        assert dict(zip(shape["scale"]["domain"], shape["scale"]["range"], strict=True)) == {
            "greedy": "circle", "sampled, pass@1": "diamond",
        }  # fmt: skip
    written = [text for text, *_ in figure.texts()]
    assert written.count("greedy") == written.count("sampled, pass@1") == 1  # the legend's


def test_a_comparison_of_another_study_is_refused(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS).filter(pl.col("method") != "grpo")
    with pytest.raises(DataError, match="m1 on test with grpo: it belongs to another"):
        plot_accuracy(STUDY, tmp_path, comparison)


def means(figure: Drawn, panel: int, method: str = "grpo") -> list[float]:
    return [row["mean"] for row in figure.rows(panel) if row["method"] == method]


def test_reward_and_validation_are_drawn_over_steps(tmp_path: Path) -> None:
    write_runs(tmp_path, REWARDS)
    figure = Drawn(plot_reward(STUDY, tmp_path))
    assert figure.titles() == [
        "m1 Reward", "m2 Reward", "m1 Validation accuracy", "m2 Validation accuracy",
    ]  # fmt: skip
    assert means(figure, 0) == pytest.approx([step / 10 for step in range(1, 11)])
    assert [(row["x"], row["mean"]) for row in figure.rows(2)] == [(5, 50.0), (10, 50.0)]
    # Steps and values are in one place in all panels of a column, and of a row.
    scales = [panel["layer"][1]["encoding"] for panel in figure.panels]
    assert [one["x"]["scale"]["domain"] for one in scales] == [[1, 10]] * 4
    assert [one["y"]["scale"]["domain"] for one in scales[:2]] == [[0.1, 1.0]] * 2


def test_methods_with_other_penalties_are_compared_by_their_answers(tmp_path: Path) -> None:
    log = [{**row, "answer_reward_mean": row["reward_mean"] / 2} for row in REWARDS]
    write_runs(tmp_path, log)
    figure = Drawn(plot_reward(STUDY, tmp_path))
    assert figure.titles()[::2] == [
        "m1 Correct completions while training", "m1 Validation accuracy",
    ]  # fmt: skip
    assert means(figure, 0) == pytest.approx([5.0 * n for n in range(1, 11)])
    assert figure.panels[0]["layer"][1]["encoding"]["y"]["title"] == "% right"
    assert figure.spec["title"]["text"] == ["demo: correct completions while training"]


def test_the_reward_of_a_method_that_logs_no_answers_has_a_row_of_its_own(tmp_path: Path) -> None:
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
    figure = Drawn(plot_reward(study, tmp_path))
    assert figure.titles()[::2] == [
        "m1 Correct completions while training", "m1 Reward", "m1 Validation accuracy",
    ]  # fmt: skip
    assert {row["method"] for row in figure.rows(0)} == {"grpo"}
    assert {row["method"] for row in figure.rows(2)} == {"other"}
    assert means(figure, 2, "other")[-1] == pytest.approx(1.0)


def test_the_line_is_the_mean_over_seeds_and_the_band_reaches_their_extremes(
    tmp_path: Path,
) -> None:
    write_runs(tmp_path, REWARDS)
    other = [{**row, "reward_mean": row["reward_mean"] + 0.2} for row in REWARDS]
    write_jsonl(tmp_path / "m1" / "grpo" / "seed1" / "train" / "metrics.jsonl", other)
    rows = Drawn(plot_reward(STUDY, tmp_path)).rows(0)
    assert rows[0]["mean"] == pytest.approx(0.2)  # (0.1 + 0.3) / 2
    assert min(row["low"] for row in rows) == pytest.approx(0.1)
    assert max(row["high"] for row in rows) == pytest.approx(1.2)


def test_a_study_without_rewards_shows_the_loss(tmp_path: Path) -> None:
    write_runs(tmp_path, [{"step": step, "loss": 1 / step} for step in range(1, 6)])
    figure = Drawn(plot_reward(STUDY, tmp_path))
    assert figure.panels[0]["layer"][1]["encoding"]["y"]["title"] == "nats a token"
    assert means(figure, 0) == pytest.approx([1 / step for step in range(1, 6)], rel=1e-4)


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
    figure = Drawn(plot_reward(study, tmp_path))
    y_titles = [panel["layer"][1]["encoding"]["y"]["title"] for panel in figure.panels[::2]]
    assert y_titles == ["nats a token", "margin (DPO)"]
    for panel, method, value in ((0, "sft", 3.0), (2, "dpo", 2.0)):
        assert {row["method"] for row in figure.rows(panel)} == {method}
        assert means(figure, panel, method) == [value] * 5


def test_a_study_that_trains_nothing_says_so(tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"methods": ["base"]})
    comparison = write_runs(tmp_path, REWARDS)
    for figure in (plot_reward(study, tmp_path), plot_cost(study, comparison)):
        (text,) = Drawn(figure).texts()
        assert text[0] == "demo: no method of this study trains anything"


def with_costs(comparison: pl.DataFrame, **costs: list[float | None]) -> pl.DataFrame:
    """Values of the rows' columns: base on both suites, grpo on both, of m1 and then of m2."""
    return comparison.with_columns(**{name: pl.Series(costs[name]) for name in costs})


def test_accuracy_stands_over_the_time_of_training_with_parents(tmp_path: Path) -> None:
    seconds: list[float | None] = [0.0, 0.0, 90.0, 90.0, 0.0, 0.0, 50.0, 50.0]
    comparison = with_costs(write_runs(tmp_path, REWARDS), train_seconds_with_parents=seconds)
    figure = Drawn(plot_cost(STUDY, comparison))
    assert figure.titles() == [
        "m1 on test 50 problems", "m2 on test 50 problems",
        "m1 on samples 50 problems", "m2 on samples 50 problems",
    ]  # fmt: skip
    numbers = {"mean": 40.0, "low": 30.0, "high": 50.0}
    assert figure.rows(0) == [
        {"method": "base", "cost": 0.0, **numbers}, {"method": "grpo", "cost": 90.0, **numbers},
    ]  # fmt: skip
    assert figure.axis(2, "x")["title"] == "time of training with parents, seconds"
    assert "type" not in figure.panels[0]["layer"][0]["encoding"]["x"]["scale"]


def test_gpu_time_is_the_cost_where_gpus_were_used(tmp_path: Path) -> None:
    hours: list[float | None] = [0.0, 0.0, 7200.0, 7200.0] * 2
    comparison = with_costs(
        write_runs(tmp_path, REWARDS),
        gpu_seconds_training_with_parents=hours,
        train_seconds_with_parents=[None if hour == 0.0 else 1.0 for hour in hours],
    )
    figure = Drawn(plot_cost(STUDY, comparison))
    assert figure.axis(2, "x")["title"] == "GPU time of training with parents, minutes"
    assert [row["cost"] for row in figure.rows(0)] == [0.0, 120.0]


def test_a_linear_axis_of_time_has_round_numbers_of_one_unit(tmp_path: Path) -> None:
    seconds: list[float | None] = [0.0, 0.0, 4200.0, 4200.0, 0.0, 0.0, 70.0, 70.0]
    comparison = with_costs(write_runs(tmp_path, REWARDS), train_seconds_with_parents=seconds)
    figure = Drawn(plot_cost(STUDY, comparison))
    axes = [figure.axis(panel, "x") for panel in (2, 3)]
    assert [axis["values"] for axis in axes] == [[0, 20, 40, 60]] * 2
    assert [axis["title"].split(", ")[1] for axis in axes] == ["minutes", "seconds"]


def test_a_method_that_was_trained_without_a_gpu_does_not_vanish(tmp_path: Path) -> None:
    comparison = with_costs(
        write_runs(tmp_path, REWARDS),
        gpu_seconds_training_with_parents=[0.0, 0.0, 7200.0, 7200.0, 0.0, 0.0, 0.0, 0.0],
        train_seconds_with_parents=[0.0, 0.0, 3600.0, 3600.0, 0.0, 0.0, 600.0, 600.0],
    )
    figure = Drawn(plot_cost(STUDY, comparison))
    assert figure.axis(2, "x")["title"] == "time of training with parents, minutes"
    assert [figure.rows(panel)[1]["cost"] for panel in (0, 1)] == [60.0, 10.0]


def test_what_trains_and_has_no_time_is_not_said_to_cost_nothing(tmp_path: Path) -> None:
    comparison = with_costs(
        write_runs(tmp_path, REWARDS),
        train_seconds_with_parents=[0.0, 0.0, None, None, 0.0, 0.0, 600.0, 600.0],
    )
    figure = Drawn(plot_cost(STUDY, comparison))
    shown = [[row["method"] for row in figure.rows(panel)] for panel in range(4)]
    assert shown == [["base"], ["base", "grpo"]] * 2
    assert figure.svg
    without_base = STUDY.model_copy(update={"methods": ["grpo"]})
    figure = Drawn(plot_cost(without_base, comparison.filter(pl.col("method") == "grpo")))
    assert [figure.rows(panel) != [] for panel in range(4)] == [False, True] * 2
    assert figure.svg


def test_a_method_whose_time_nobody_knows_is_not_drawn_as_one_that_costs_nothing(
    tmp_path: Path,
) -> None:
    rows = write_runs(tmp_path, REWARDS)
    of_base = pl.col("method") == "base"
    none = with_costs(rows, train_seconds_with_parents=[0.0, 0.0, None, None] * 2)
    assert "no time of training is known" in Drawn(plot_cost(STUDY, none)).svg
    added = {"methods": ["base", "grpo", "ext"],
             "chains": {**STUDY.chains, "ext": ["base", "ext"]}}  # fmt: skip
    some = with_costs(rows, train_seconds_with_parents=[0.0, 0.0, 60.0, 60.0] * 2)
    other = some.filter(~of_base).with_columns(
        method=pl.lit("ext"), train_seconds_with_parents=pl.lit(None, pl.Float64)
    )
    figure = Drawn(plot_cost(STUDY.model_copy(update=added), pl.concat([some, other])))
    assert [row["method"] for row in figure.rows(0)] == ["base", "grpo"]


def test_a_method_has_one_colour_in_all_figures_which_is_that_of_the_report(
    tmp_path: Path,
) -> None:
    added = {"methods": ["base", "sft", "grpo"],
             "chains": {**STUDY.chains, "sft": ["base", "sft"]}}  # fmt: skip
    study = STUDY.model_copy(update=added)
    rows = write_runs(tmp_path, REWARDS)
    sft = rows.filter(pl.col("method") == "grpo").with_columns(method=pl.lit("sft"))
    for model in study.models:
        for seed in study.seeds:
            run = tmp_path / model / "sft" / f"seed{seed}"
            write_jsonl(run / "train" / "metrics.jsonl", [])  # no reward: not in that figure
            for suite in study.suites:
                write_json(
                    run / "metrics" / f"{suite}.json",
                    {**REST, "accuracy": 0.4, "pass_at_1": 0.2},
                )
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(90.0)
    comparison = pl.concat([rows, sft]).with_columns(train_seconds_with_parents=cost)
    accuracy = Drawn(plot_accuracy(study, tmp_path, comparison))
    cost_figure, reward = Drawn(plot_cost(study, comparison)), Drawn(plot_reward(study, tmp_path))
    for figure in (accuracy, cost_figure, reward):
        assert figure.spec["config"]["range"]["category"] == PALETTES["light"]
        for panel in figure.panels:
            for layer in panel["layer"]:
                if colour := layer["encoding"].get("color"):
                    assert colour["scale"]["domain"] == study.methods
    assert cost_figure.legend(0) == study.methods and reward.legend(0) == ["grpo"]
    for figure in (cost_figure, reward):
        assert PALETTES["light"][2] in figure.svg  # grpo's
    assert PALETTES["light"][1] not in reward.svg  # sft's


def test_the_figures_say_how_many_seeds_problems_and_clusters_they_stand_on(
    tmp_path: Path,
) -> None:
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        num_problems=pl.lit(1319), num_clusters=pl.lit(81), train_seconds_with_parents=cost
    )
    accuracy = Drawn(plot_accuracy(STUDY, tmp_path, comparison))
    spent = Drawn(plot_cost(STUDY, comparison))
    for figure in (accuracy, spent):
        assert figure.titles()[0] == "m1 on test 1,319 problems in 81 clusters"
    over = "over seeds and clusters of problems"
    assert f"Mean over 2 seeds (base: 1), 90 % interval {over}; ticks: seeds" in accuracy.caption()
    assert f"Mean over 2 seeds; bars: 90 % intervals {over}; dashed" in spent.caption()
    assert "Mean over 2 seeds;" in Drawn(plot_reward(STUDY, tmp_path)).caption()


def test_single_seeds_are_told(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        train_seconds_with_parents=pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    )
    once = STUDY.model_copy(update={"seeds": [0]})
    cost = Drawn(plot_cost(once, comparison)).caption()
    assert "One seed; bars: 90 % intervals over problems alone" in cost
    reward = Drawn(plot_reward(once, tmp_path)).caption()
    assert "One seed" in reward and "band" not in reward
    assert _seeds_text(STUDY, STUDY.methods) == "2 seeds (base: 1)"
    assert _seeds_text(STUDY, ["base"]) == "1 seed"


def test_a_dashed_line_leads_from_what_is_not_trained(tmp_path: Path) -> None:
    cost = pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    comparison = write_runs(tmp_path, REWARDS).with_columns(train_seconds_with_parents=cost)
    figure = Drawn(plot_cost(STUDY, comparison))
    assert figure.legend(0) == ["base", "grpo"]
    assert figure.svg.count('stroke-dasharray="4,3"') == 4  # one a panel
    assert "dashed: no training" in figure.caption()


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
    unvalidated = [
        {key: value for key, value in row.items() if key != "validation_accuracy"}
        for row in REWARDS
    ]
    for name in names:
        for seed in (0, 1):
            log = unvalidated if name == "m0" else REWARDS
            write_jsonl(tmp_path / "m1" / name / f"seed{seed}" / "train/metrics.jsonl", log)
    figure = Drawn(plot_reward(study, tmp_path))
    assert len(figure.panels) == 2  # the second of validation, which one method less has
    opacities = re.findall(r'class="mark-area.*?opacity="([\d.]+)"', figure.svg)
    assert opacities
    assert {float(one) > 0 for one in opacities} == {has_bands}
    assert ("band: smallest to largest seed" in figure.caption()) == has_bands
    assert ("no bands of seeds with more than 4 methods" in figure.caption()) != has_bands


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
    figure = Drawn(plot_cost(study, comparison))
    assert figure.panels[1]["layer"][0]["encoding"]["x"]["scale"]["type"] == "symlog"
    written = [text for text, *_ in figure.texts()]
    for label in ("0", "1 min", "3 min", "10 min", "30 min", "1 h", "3 h", "10 h"):
        assert written.count(label) == 2, label  # one a panel


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
    figure = Drawn(
        {
            "accuracy": lambda: plot_accuracy(study, tmp_path, comparison),
            "cost": lambda: plot_cost(study, comparison),
            "reward": lambda: plot_reward(study, tmp_path),
        }[name]()
    )
    texts = figure.texts()
    written = {text for text, *_ in texts}
    assert {*study.models} <= written and not any("…" in text for text in written)
    ends = ("with_", "a_rather_long_name_") if name == "accuracy" else ("with_a_rather_long_name_",)
    assert {f"method_number_{number}_{ends[0]}" for number in range(10)} | {*ends[1:]} <= written
    width, height = figure.size()
    assert all(0 <= left < right <= width and 0 < y < height for _, left, right, y in texts)
    for (text, left, right, y), (other, start, end, z) in itertools.combinations(texts, 2):
        assert abs(y - z) > 8 or right <= start or end <= left, (text, other)


def test_a_figure_grows_with_the_lines_of_its_legend(tmp_path: Path) -> None:
    write_runs(tmp_path, REWARDS, long_names())
    write_runs(tmp_path / "few", REWARDS)
    few, many = (
        Drawn(plot_reward(study, folder))
        for study, folder in ((STUDY, tmp_path / "few"), (long_names(), tmp_path))
    )
    assert few.panels[0]["height"] == many.panels[0]["height"]
    assert many.size()[1] > few.size()[1] + 60  # five lines of names for one


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
    for figure in (
        Drawn(plot_accuracy(STUDY, tmp_path, comparison)),
        Drawn(plot_cost(STUDY, comparison)),
    ):
        written = [text for text, *_ in figure.texts()]
        assert {written.count(label) for label in ("0 %", "20 %", "40 %")} == {4}


def test_texts_of_an_svg_are_as_wide_where_its_viewer_lacks_the_font(tmp_path: Path) -> None:
    figure = Drawn(plot_accuracy(STUDY, tmp_path, write_runs(tmp_path, REWARDS)))
    fonts = set(re.findall(r'font-family="([^"]*)"', figure.svg))
    assert fonts == {"Liberation Sans, Arial, Helvetica, sans-serif"}


def test_a_figure_is_on_white_and_lines_of_the_first_methods_differ_in_more_than_colour(
    tmp_path: Path,
) -> None:
    write_runs(tmp_path, REWARDS)
    methods = ["base", "grpo", "dapo"]
    study = STUDY.model_copy(
        update={"methods": methods, "chains": {**STUDY.chains, "dapo": ["base", "dapo"]}}
    )
    for model in study.models:
        for seed in study.seeds:
            run = tmp_path / model / "dapo" / f"seed{seed}" / "train" / "metrics.jsonl"
            write_jsonl(run, REWARDS)
    svg = Drawn(plot_reward(study, tmp_path)).svg
    assert 'fill="white"' in svg.partition("<g")[0]
    lines = re.findall(r'class="mark-line.*?</g>', svg, re.DOTALL)
    drawn = {(re.findall(r'stroke-dasharray="([^"]*)"', line) or [""])[0] for line in lines}
    assert len(drawn) == 2
    assert len(set(map(str, DASHES[:4]))) == 4


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    comparison = write_runs(tmp_path, REWARDS).with_columns(
        train_seconds_with_parents=pl.when(pl.col("method") == "base").then(0.0).otherwise(60.0)
    )
    figures = {
        "accuracy": plot_accuracy(STUDY, tmp_path, comparison),
        "cost": plot_cost(STUDY, comparison),
        "reward": plot_reward(STUDY, tmp_path),
    }
    # In another order: Vega numbers what it gives ids, in all that a process draws.
    for folder, names in (("one", list(figures)), ("two", [*figures][::-1])):
        for name in names:
            save_figure(
                figures[name], *(tmp_path / folder / f"{name}.{kind}" for kind in ("svg", "png"))
            )
    for name in (f"{name}.{suffix}" for name in figures for suffix in ("svg", "png")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_plot_script_writes_each_figure_twice(tmp_path: Path) -> None:
    curves, pairs = (pl.DataFrame(schema=schema) for schema in (PASS_AT_K_SCHEMA, PAIRS_SCHEMA))
    rows = write_runs(tmp_path, REWARDS).with_columns(study=pl.lit("demo"), confidence=0.9)
    tables = Tables(rows, curves, pairs)
    write_comparison(tables, tmp_path / "results")
    comparison = str(tmp_path / "results" / "comparison.csv")
    arguments = ["--study", dump(STUDY), "--study-dir", str(tmp_path)]
    output = ["--comparison", comparison, "--output-dir", str(tmp_path / "figures")]
    assert load_script("plot").main([*arguments, *output]) == 0
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        "accuracy.png", "accuracy.svg", "cost.png", "cost.svg", "reward.png", "reward.svg",
    ]  # fmt: skip
