"""scripts/compare_studies.py and what it stands on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from script_modules import load_script

from gsm8k_core import studies
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import Json, write_json
from gsm8k_core.metrics import Floats, holm, paired_difference
from gsm8k_core.studies import SCHEMA, compare_studies, find_cells

RUNS = {("base", 0), ("sft", 0), ("sft", 1), ("sft", 2)}
compare_studies_script = load_script("compare_studies")


def write_run(
    run: Path, right: Floats, suite: str = "test", decoding: str = "greedy", first: int = 0
) -> None:
    """Grades of one completion per problem, or of several where `right` is (P, samples)."""
    rows = np.atleast_2d(right.T).T
    num_problems, num_samples = rows.shape
    names = [f"p{i + first:03d}" for i in range(num_problems)]
    frame = pl.DataFrame(
        {
            "problem_id": np.repeat(names, num_samples),
            "cluster": pl.Series([None] * rows.size, dtype=pl.String),
            "decoding": [decoding] * rows.size,
            "correct": rows.ravel().astype(bool),
        }
    )
    (run / "grades").mkdir(parents=True, exist_ok=True)
    frame.write_parquet(run / "grades" / f"{suite}.parquet")


def outcomes(chance: float, seed: int, num_problems: int = 200) -> Floats:
    random = np.random.default_rng(seed)
    return (random.random(num_problems) < chance).astype(np.float64)


Maker = Callable[[str, float], Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Write a study whose sft has this accuracy; returns its folder."""

    def write(name: str, chance: float) -> Path:
        for method, seed in RUNS:
            run = tmp_path / name / "m" / method / f"seed{seed}"
            write_run(run, outcomes(chance if method == "sft" else 0.2, seed))
            parent = None if method == "base" else "base"
            write_json(run / "metrics" / "test.json", {"parent": parent})
        return tmp_path / name

    return write


def test_a_study_is_the_same_as_itself(make: Maker) -> None:
    folder = make("old", 0.5)
    found = compare_studies(folder, folder)
    assert dict(found.rows.schema) == SCHEMA
    assert found.rows.select("method", "delta", "p_value", "verdict").rows() == [
        ("base", 0.0, 1.0, None),
        ("sft", 0.0, 1.0, None),
    ]
    assert (found.changes, found.left_out) == ({}, [])


def test_cells_are_paired_by_seed_and_problem_and_corrected_within_the_model(make: Maker) -> None:
    old, new = make("old", 0.6), make("new", 0.4)
    # Another order of rows, as another version might write them.
    path = new / "m" / "sft" / "seed1" / "grades" / "test.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    base, sft = compare_studies(old, new).rows.iter_rows(named=True)
    right = [np.stack([outcomes(chance, seed) for seed in range(3)]) for chance in (0.4, 0.6)]
    expected = paired_difference(right[0], right[1])
    assert [sft["delta"], sft["delta_ci_low"], sft["delta_ci_high"], sft["p_value"]] == (
        pytest.approx(list(expected[:4]))
    )
    assert [base["p_value_holm"], sft["p_value_holm"]] == holm([base["p_value"], sft["p_value"]])
    assert (base["verdict"], sft["verdict"]) == (None, "worse")
    assert compare_studies(new, old).rows["verdict"].to_list() == [None, "better"]


def test_each_model_is_a_family_of_its_own_at_the_level_that_is_asked_for(
    make: Maker, tmp_path: Path
) -> None:
    old, new = make("old", 0.6), make("new", 0.4)
    for folder in (old, new):
        shutil.copytree(folder / "m", folder / "n")
    arguments = ["--old", str(old), "--new", str(new), "--output-dir", str(tmp_path / "out")]
    assert compare_studies_script.main([*arguments, "--confidence", "0.99"]) == 0
    written = pl.read_csv(tmp_path / "out" / "studies.csv", schema=SCHEMA)
    assert written["delta_ci_low"].to_list() == pytest.approx(
        compare_studies(old, new, 0.99).rows["delta_ci_low"].to_list()
    )
    right = [np.stack([outcomes(chance, seed) for seed in range(3)]) for chance in (0.4, 0.6)]
    expected = paired_difference(right[0], right[1], 0.99)
    for model in ("m", "n"):
        base, sft = written.filter(pl.col("model") == model).iter_rows(named=True)
        assert [base["p_value_holm"], sft["p_value_holm"]] == pytest.approx(
            holm([base["p_value"], sft["p_value"]])
        )
        assert [sft["delta_ci_low"], sft["delta_ci_high"]] == pytest.approx(list(expected[1:3]))


@pytest.mark.parametrize("told_by", [("old",), ("new",), ("old", "new")])
def test_clones_are_paired_as_the_clusters_that_either_study_tells_of(
    make: Maker, told_by: tuple[str, ...]
) -> None:
    folders = {"old": make("old", 0.6), "new": make("new", 0.4)}
    clusters = [f"c{problem % 20}" for problem in range(200)]
    for name in told_by:
        for path in folders[name].glob("m/*/*/grades/test.parquet"):
            grades = pl.read_parquet(path)
            grades.with_columns(cluster=pl.Series(clusters)).write_parquet(path)
    found = compare_studies(folders["old"], folders["new"])
    row = found.rows.row(1, named=True)
    right = [np.stack([outcomes(chance, seed) for seed in range(3)]) for chance in (0.4, 0.6)]
    expected = paired_difference(right[0], right[1], 0.95, clusters)
    assert [row["delta"], row["delta_ci_low"], row["delta_ci_high"], row["p_value"]] == (
        pytest.approx(list(expected[:4]))
    )
    assert (row["num_problems"], row["num_clusters"]) == (200, 20)
    text = studies.to_markdown(found, folders["old"], folders["new"], 0.95)
    assert text.count("test: 200 problems in 20 clusters. ") == 1


def test_only_problems_and_seeds_that_both_have_are_compared(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    for seed in range(3):  # problems 50 to 249 instead of 0 to 199
        write_run(new / "m" / "sft" / f"seed{seed}", outcomes(0.5, seed), first=50)
    (new / "m" / "sft" / "seed2").rename(new / "m" / "sft" / "seed7")
    row = compare_studies(old, new).rows.row(1, named=True)
    assert (row["num_seeds"], row["num_problems"]) == (2, 150)
    right = [np.stack([outcomes(0.5, seed)[part] for seed in (0, 1)])
             for part in (slice(0, 150), slice(50, 200))]  # fmt: skip
    assert row["delta"] == pytest.approx(right[0].mean() - right[1].mean())
    assert compare_studies(old, new).left_out == [
        "m / sft / test: seeds 2, 7 are in one study only",
        "m / sft / test: 100 of 250 problems are not in every run of both",
    ]


def test_what_only_one_study_has_is_listed(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    write_run(new / "m" / "grpo" / "seed0", outcomes(0.5, 0))
    write_run(old / "m" / "base" / "seed0", outcomes(0.5, 0), suite="other", first=0)
    write_run(new / "m" / "base" / "seed0", outcomes(0.5, 0), suite="other", first=900)
    assert compare_studies(old, new).left_out == [
        f"m / grpo / test: only in {new}",
        "m / base / other: no problem was graded in both studies",
    ]


def test_samples_are_compared_by_their_share_and_not_with_greedy(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    samples = np.array([[1, 1, 0, 0], [1, 0, 0, 0.0]])
    write_run(old / "m" / "base" / "seed0", samples, "s", "sample")
    write_run(new / "m" / "base" / "seed0", 1 - samples, "s", "sample")
    row = compare_studies(old, new).rows.row(by_predicate=pl.col("suite") == "s", named=True)
    assert (row["accuracy_old"], row["accuracy_new"], row["num_problems"]) == (0.375, 0.625, 2)
    assert row["delta_pass_at_1"] == row["delta"] == 0.25
    # Of no cell it says more than accuracy.
    assert "pass@1" not in studies.to_markdown(compare_studies(old, new), old, new, 0.95)
    write_run(new / "m" / "base" / "seed0", outcomes(0.5, 0, 2), "s")
    found = compare_studies(old, new)
    assert "one study decoded greedily and the other sampled" in found.left_out[0]


def write_both(run: Path, greedy: Floats, samples: Floats) -> None:
    """Grades of a greedy completion and of samples (P, samples) of every problem."""
    path = run / "grades" / "test.parquet"
    parts = []
    for right, decoding in ((greedy, "greedy"), (samples, "sample")):
        write_run(run, right, decoding=decoding)
        parts.append(pl.read_parquet(path))
    pl.concat(parts).write_parquet(path)


def draws(chance: float, seed: int) -> Floats:
    """Which of four samples of 200 problems are right."""
    return outcomes(chance, seed, 800).reshape(200, 4)


def test_pass_at_1_is_compared_beside_accuracy_and_decides_where_it_is_asked_for(
    make: Maker, tmp_path: Path
) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    for folder, chance in ((old, 0.7), (new, 0.4)):
        for method, seed in RUNS:
            samples = draws(chance if method == "sft" else 0.5, seed)
            write_both(folder / "m" / method / f"seed{seed}", outcomes(0.5, seed), samples)
    found = compare_studies(old, new)
    base, sft = found.rows.iter_rows(named=True)
    before, after = (
        np.stack([draws(chance, seed).mean(axis=1) for seed in range(3)]) for chance in (0.7, 0.4)
    )
    shares = [sft["pass_at_1_old"], sft["pass_at_1_new"]]
    assert shares == pytest.approx([before.mean(), after.mean()])
    greedy = np.stack([outcomes(0.5, seed) for seed in range(3)])
    names = ("delta", "delta", "delta", "p_value", "smallest_detectable_delta")
    ends = ("", "_ci_low", "_ci_high", "", "")
    for of, difference in (
        ("", paired_difference(greedy, greedy)),
        ("_pass_at_1", paired_difference(after, before)),
    ):
        got = [sft[f"{name}{of}{end}"] for name, end in zip(names, ends, strict=True)]
        assert got == pytest.approx(list(difference))
        adjusted = holm([base[f"p_value{of}"], sft[f"p_value{of}"]])
        assert [base[f"p_value{of}_holm"], sft[f"p_value{of}_holm"]] == adjusted
    assert found.rows["verdict"].to_list() == [None, None]
    text = studies.to_markdown(found, old, new, 0.95)
    assert "pass@1 new − old, points" in text and "Verdicts are by accuracy." in text

    by_samples = compare_studies(old, new, measure="pass_at_1")
    assert by_samples.rows["verdict"].to_list() == [None, "worse"]
    assert "Verdicts are by pass@1." in studies.to_markdown(by_samples, old, new, 0.95)
    arguments = ["--old", str(old), "--new", str(new), "--output-dir", str(tmp_path / "out")]
    arguments += ["--fail-if-worse"]
    assert compare_studies_script.main(arguments) == 0
    assert compare_studies_script.main([*arguments, "--measure", "pass_at_1"]) == 3


def test_without_samples_pass_at_1_decides_nothing(make: Maker, tmp_path: Path) -> None:
    old, new = make("old", 0.6), make("new", 0.4)
    found = compare_studies(old, new, measure="pass_at_1")
    assert found.rows["verdict"].to_list() == [None, None]
    assert found.rows["p_value_pass_at_1_holm"].null_count() == 2
    assert sum("not sampled in both studies" in line for line in found.left_out) == 2
    assert "pass@1 new − old" not in studies.to_markdown(found, old, new, 0.95)
    arguments = ["--old", str(old), "--new", str(new), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(DataError, match="nothing in common with samples"):
        compare_studies_script.main([*arguments, "--fail-if-worse", "--measure", "pass_at_1"])


def test_what_differs_is_told_with_both_values_and_named_in_the_row(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    for folder, rate, torch in ((old, 1e-5, "2.12.0"), (new, 2e-5, "2.13.0")):
        for method, seed in RUNS:
            run = folder / "m" / method / f"seed{seed}"
            provenance = {"packages": {"torch": torch, "numpy": "2.0"}}
            write_json(run / "completions" / "test.stats.json", {"provenance": provenance})
            if method == "sft":
                settings = {"seed": seed, "method_settings": {"learning_rate": rate}}
                write_json(run / "settings.json", settings)
    found = compare_studies(old, new)
    assert found.rows["differs"].to_list() == ["packages", "packages, training settings"]
    assert found.changes == {
        "packages.torch: 2.12.0 → 2.13.0": ["m / base / test", "m / sft / test"],
        "training settings.method_settings.learning_rate: 1e-05 → 2e-05": ["m / sft / test"],
    }


def test_other_data_starting_weights_and_problems_are_told(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    for folder, letter in ((old, "a"), (new, "b")):
        for method, seed in RUNS:
            run = folder / "m" / method / f"seed{seed}"
            identity = {"method": method, "parent": None if method == "base" else "base"}
            # Trained weights are another draw each time; those of the base model are not.
            stats = {**identity, "weights": f"{letter}{method}", "problems_sha256": "p"}
            write_json(run / "completions" / "test.stats.json", stats)
            if method == "sft":
                began = {**identity, "data_sha256": "d", "starting_weights": letter}
                write_json(run / "train" / "summary.json", began)
    found = compare_studies(old, new)
    assert found.rows["differs"].to_list() == ["starting weights", "starting weights"]
    assert found.changes == {
        "starting weights: abase → bbase": ["m / base / test"],
        "starting weights: a → b": ["m / sft / test"],
    }
    for method, seed in RUNS:  # of the new study: the first study's weights, but other data
        run = new / "m" / method / f"seed{seed}"
        stats = {"method": method, "weights": "abase", "problems_sha256": "q"}
        write_json(run / "completions" / "test.stats.json", stats)
        if method == "sft":
            # Also what was sampled to train on is to be the same in both.
            summary: Json = {"data_sha256": "e", "starting_weights": "a", "seconds_sampling": 1.0}
            write_json(run / "train" / "summary.json", summary)
    assert compare_studies(old, new).rows["differs"].to_list() == [
        "problems",
        "problems, training data",
    ]


@pytest.mark.parametrize("which", ["both", "old", "new"])
def test_one_seed_of_a_trained_cell_is_no_verdict_and_no_failure(
    make: Maker, tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {"old": make("old", 0.6), "new": make("new", 0.4)}
    for name in folders if which == "both" else [which]:
        for seed in (1, 2):
            shutil.rmtree(folders[name] / "m" / "sft" / f"seed{seed}")
    out = tmp_path / "out"
    arguments = ["--old", str(folders["old"]), "--new", str(folders["new"])]
    arguments += ["--output-dir", str(out), "--fail-if-worse"]
    with caplog.at_level("WARNING"):
        assert compare_studies_script.main(arguments) == 0
    row = pl.read_csv(out / "studies.csv", schema=SCHEMA).row(1, named=True)
    assert (row["num_seeds"], row["verdict"], row["caution"]) == (1, None, "1 seed: no verdict")
    assert row["p_value"] < 0.01 and row["p_value_holm"] is None
    text = (out / "studies.md").read_text(encoding="utf-8")
    assert "| 1 seed: no verdict |" in text and "of what was trained neither p nor" in text
    assert "rows without a verdict: 1; one seed says nothing of another" in caplog.text


def test_a_cell_that_was_not_trained_has_a_verdict_of_its_one_run(make: Maker) -> None:
    old, new = make("old", 0.5), make("new", 0.5)
    for folder, chance in ((old, 0.6), (new, 0.3)):
        run = folder / "m" / "base" / "seed0"
        write_run(run, outcomes(chance, 0))
    row = compare_studies(old, new).rows.row(0, named=True)
    assert (row["method"], row["verdict"], row["caution"]) == ("base", "worse", None)
    # Without a word of it the run may have been trained.
    (new / "m" / "base" / "seed0" / "metrics" / "test.json").unlink()
    assert compare_studies(old, new).rows["verdict"].to_list()[0] is None


def test_what_can_have_no_verdict_takes_none_from_the_others() -> None:
    rows: list[Json] = [{"p_value": 0.03, "delta": -0.1}, {"p_value": 0.04, "delta": 0.1}]
    rows[1]["caution"] = studies.ONE_SEED
    studies._judge(rows, 0.95)
    assert [row["p_value_holm"] for row in rows] == [0.03, None]
    assert [row["verdict"] for row in rows] == ["worse", None]


def test_two_seeds_have_a_verdict_and_a_flag(make: Maker) -> None:
    old, new = make("old", 0.95), make("new", 0.05)
    shutil.rmtree(old / "m" / "sft" / "seed2")
    found = compare_studies(old, new)
    assert found.rows.row(1, named=True)["verdict"] == "worse"
    assert found.rows["caution"].to_list()[1] == "2 seeds"
    assert "| 2 seeds " in studies.to_markdown(found, old, new, 0.95)


def test_a_p_value_at_the_level_is_not_below_it() -> None:
    row: Json = {"p_value": 0.05, "delta": -0.1}
    studies._judge([row], 0.95)
    assert row["verdict"] is None
    row["p_value"] = 0.0499
    studies._judge([row], 0.95)
    assert row["verdict"] == "worse"


def test_the_verdict_is_that_of_the_corrected_p_value_at_the_level_that_is_asked_for() -> None:
    rows: list[Json] = [{"p_value": 0.03, "delta": -0.1}, {"p_value": 0.9, "delta": 0.1}]
    for confidence, verdicts in ((0.95, [None, None]), (0.9, ["worse", None])):
        studies._judge(rows, confidence)
        assert [row["p_value_holm"] for row in rows] == [0.06, 0.9]
        assert [row["verdict"] for row in rows] == verdicts


def test_the_script_writes_both_files_and_fails_only_when_asked_and_worse(
    make: Maker, tmp_path: Path
) -> None:
    old, new = make("old", 0.6), make("new", 0.4)

    def run(a: Path, b: Path, *options: str) -> int:
        arguments = ["--old", str(a), "--new", str(b), "--output-dir", str(tmp_path / "out")]
        return int(compare_studies_script.main([*arguments, *options]))

    assert run(old, new) == 0
    text = (tmp_path / "out" / "studies.md").read_text(encoding="utf-8")
    assert "| worse   |" in text and "95 % intervals" in text
    assert pl.read_csv(tmp_path / "out" / "studies.csv").height == 2
    assert run(old, new, "--fail-if-worse") == 3
    assert run(new, old, "--fail-if-worse") == 0
    assert run(old, old, "--fail-if-worse") == 0
    renamed = tmp_path / "renamed"
    shutil.copytree(old, renamed)
    for model in list(renamed.iterdir()):
        model.rename(model.with_name(f"{model.name}-2"))
    assert run(old, renamed) == 0
    with pytest.raises(DataError, match="nothing in common to compare"):
        run(old, renamed, "--fail-if-worse")
    with pytest.raises(ConfigError, match="--confidence"):
        run(old, new, "--confidence", "95")


def test_a_folder_without_grades_is_named(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no grades below it"):
        compare_studies(make("old", 0.5), tmp_path / "nothing")
    assert find_cells(tmp_path / "old") == {
        ("m", "base", "test"): [0],
        ("m", "sft", "test"): [0, 1, 2],
    }
