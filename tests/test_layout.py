"""Where things lie below artifacts/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gsm8k_core.config import Config, parse_config
from gsm8k_core.data import content_digest
from gsm8k_core.files import write_json, write_jsonl
from gsm8k_core.layout import Layout, one_of


def config(**iteration: Any) -> Config:
    return parse_config(
        {
            "study": {
                "name": "s", "dataset": "d", "models": ["m", "n"], "methods": ["base", "sft", "ei"],
                "seeds": [0, 3], "suites": ["t", "u"],
            },
            "datasets": {"d": {"kind": "arithmetic"}},
            "prompts": {"p": {}},
            "models": {name: {"source": "embedded", "prompt": "p"} for name in "mn"},
            "methods": {
                "base": {"kind": "base"},
                "sft": {"kind": "sft"},
                "ei": {"kind": "expert_iteration", "from": "sft", "rounds": 3, **iteration},
            },
            "suites": {"t": {"dataset": "d"}, "u": {"dataset": "d", "split": "val"}},
        }
    )  # fmt: skip


LAYOUT = Layout(config())
RUNS = "artifacts/experiments/s"


def test_a_cell_has_its_folder_and_takes_wildcards() -> None:
    assert LAYOUT.run("m", "sft", 3) == f"{RUNS}/m/sft/seed3"
    assert (
        LAYOUT.run("{model}", "{method}", "{seed}") == f"{RUNS}/{{model}}/{{method}}/seed{{seed}}"
    )
    assert LAYOUT.results == "artifacts/results/s"
    assert LAYOUT.problems("d", "test") == "artifacts/d/test.jsonl"
    assert LAYOUT.train_problems() == "artifacts/d/train.jsonl"
    assert LAYOUT.log("prepare_data", "{dataset}") == "artifacts/logs/prepare_data/{dataset}.log"


def test_a_method_trains_from_its_parents_model_of_the_same_seed() -> None:
    assert LAYOUT.parent_model("m", "sft", 3) == "artifacts/models/m"
    assert LAYOUT.parent_model("m", "ei", 3) == f"{RUNS}/m/sft/seed3/model"
    assert LAYOUT.trained_model("m", "base", 0) == "artifacts/models/m"
    assert LAYOUT.trained_model("m", "ei", 3) == f"{RUNS}/m/ei/seed3/model"


@pytest.mark.parametrize(
    ("restart", "trains_from"),
    [
        (False, [f"{RUNS}/m/sft/seed0/model", f"{RUNS}/m/ei/seed0/round1/model"]),
        (True, [f"{RUNS}/m/sft/seed0/model", f"{RUNS}/m/sft/seed0/model"]),
    ],
)
def test_a_round_samples_from_the_last_and_trains_from_it_or_from_the_parent(
    restart: bool, trains_from: list[str]
) -> None:
    layout = Layout(config(restart_from_parent=restart))
    assert [layout.round_parent("m", "ei", 0, number) for number in (1, 2)] == trains_from
    assert [layout.round_start("m", "ei", 0, number) for number in (1, 2)] == [
        f"{RUNS}/m/sft/seed0/model",
        f"{RUNS}/m/ei/seed0/round1/model",
    ]


def test_the_base_model_is_one_cell_and_others_are_one_a_seed() -> None:
    # 2 models × (1 base + 2 seeds of sft + 2 seeds of ei) = 10 cells, on 2 suites
    assert len(LAYOUT.cells()) == 10
    assert LAYOUT.cells()[:3] == [("m", "base", 0), ("m", "sft", 0), ("m", "sft", 3)]
    assert len(LAYOUT.trained("train/metrics.jsonl")) == 8
    evaluated = LAYOUT.evaluated("metrics/{suite}.json")
    assert len(set(evaluated)) == 20
    assert evaluated[:2] == [
        f"{RUNS}/m/base/seed0/metrics/t.json",
        f"{RUNS}/m/base/seed0/metrics/u.json",
    ]


def test_training_files_are_those_that_a_stage_of_a_method_learns_from() -> None:
    assert LAYOUT.training_files() == ["artifacts/d/train.jsonl"]
    raw = config().model_dump(mode="json", by_alias=True)
    raw["datasets"] |= {"e": {"kind": "arithmetic"}, "f": {"kind": "arithmetic"}}
    raw["methods"]["sft"]["dataset"] = "e"  # a stage below ei, which the study names
    raw["methods"]["unused"] = {"kind": "sft", "dataset": "f"}
    raw["study"]["methods"] = ["base", "ei"]
    assert Layout(parse_config(raw)).training_files() == [
        "artifacts/d/train.jsonl",
        "artifacts/e/train.jsonl",
    ]


def test_suite_files_come_once_each() -> None:
    raw = config().model_dump(mode="json", by_alias=True)
    raw["suites"]["again"] = {"dataset": "d", "limit": 3}
    raw["study"]["suites"] = ["t", "u", "again"]
    assert Layout(parse_config(raw)).suite_files() == [
        "artifacts/d/test.jsonl",
        "artifacts/d/val.jsonl",
    ]


def test_one_of_matches_these_names_alone() -> None:
    pattern = re.compile(f"(?:{one_of(['qwen2.5', 'a+b'])})")
    assert pattern.fullmatch("qwen2.5") and pattern.fullmatch("a+b")
    assert not pattern.fullmatch("qwen2x5") and not pattern.fullmatch("aab")
    assert not re.fullmatch(one_of([]), "") and not re.search(one_of([]), "anything")


def test_paths_of_the_study_that_hold_no_model_or_data_are_named_by_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study_of(**study: Any) -> Config:
        raw = config().model_dump(mode="json", by_alias=True)
        for name, path in {"m": "~/weights", "n": "no/weights", "unused": "none"}.items():
            raw["models"][name] = {"source": "path", "path": path, "prompt": "p"}
        for name, path in {
            "d": "data",
            "half": "half",
            "lost": "no/data",
            "unused": "none",
        }.items():
            raw["datasets"][name] = {"kind": "gsm8k", "path": path}
        raw["methods"]["own"] = {"kind": "sft", "dataset": "lost"}
        raw["suites"]["u"]["dataset"] = "half"
        raw["study"] |= study
        return parse_config(raw)

    def missing(**study: Any) -> list[str]:
        return Layout(study_of(**study)).missing_paths()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    for file in ("data/train.jsonl", "data/test.jsonl", "half/train.jsonl"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert missing(methods=["base", "own"]) == [
        "models.m.path: no config.json in '~/weights'; name the folder of a model",
        "models.n.path: no folder 'no/weights'; name the folder of a model",
        "datasets.lost.path: no folder 'no/data'; name a folder with train.jsonl and test.jsonl",
        "datasets.half.path: no test.jsonl in 'half'; name a folder with train.jsonl and "
        "test.jsonl",
    ]
    # What has been prepared from them goes on without them, and with nothing but them.
    whole = study_of()
    lost = (
        ("models/n", whole.models["n"].starting_weights()),
        ("lost", whole.datasets["lost"]),
    )
    for folder, settings in lost:
        manifest = {"settings": settings.model_dump(mode="json")}
        write_json(tmp_path / "artifacts" / folder / "manifest.json", manifest)
    assert [line.partition(".path")[0] for line in missing(methods=["base", "own"])] == [
        "models.m", "datasets.half",
    ]  # fmt: skip
    # Of data it matters not where they lay: their digests are the same.
    for folder, settings in lost:
        manifest = {"settings": {**settings.model_dump(mode="json"), "path": "another"}}
        write_json(tmp_path / "artifacts" / folder / "manifest.json", manifest)
    assert [line.partition(".path")[0] for line in missing(methods=["base", "own"])] == [
        "models.m", "models.n", "datasets.half",
    ]  # fmt: skip
    manifest = {"settings": {**whole.datasets["lost"].model_dump(mode="json"), "num_val": 7}}
    write_json(tmp_path / "artifacts" / "lost" / "manifest.json", manifest)
    assert len(missing(methods=["base", "own"])) == 4
    (tmp_path / "weights" / "config.json").touch()
    assert missing(models=["m"], methods=["sft"], suites=["t"]) == []
    # What only evaluates learns from nothing.
    assert missing(models=["m"], methods=["base"], suites=["t"], dataset="lost") == []
    assert len(missing(models=["m"], methods=["sft"], suites=["t"], dataset="lost")) == 1


ROWS = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]


def own_data(folder: Path, **changes: Any) -> Layout:
    """A study of rows in `folder`/mine, which are written there."""
    for split in ("train", "test"):
        write_jsonl(folder / "mine" / f"{split}.jsonl", ROWS)
    raw = config().model_dump(mode="json", by_alias=True)
    digests = dict.fromkeys(("train", "test"), content_digest(ROWS))
    mine = {"kind": "gsm8k", "path": "mine", "num_val": 1, "digests": digests, **changes}
    raw["datasets"]["d"] = mine
    return Layout(parse_config(raw))


def test_own_rows_are_looked_at_where_they_are_newer_than_what_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = own_data(tmp_path)
    assert layout.faults_in_own_data() == []
    assert own_data(tmp_path, num_val=3).faults_in_own_data() == [
        "datasets.d: num_val is 3 of 3 train rows: leave some to train on"
    ]
    settings = layout.config.datasets["d"].model_dump(mode="json")
    write_json(tmp_path / "artifacts" / "d" / "manifest.json", {"settings": settings})
    monkeypatch.setattr("gsm8k_core.layout.make_gsm8k", pytest.fail)
    assert layout.faults_in_own_data() == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "mine" / "test.jsonl", [*ROWS, {"question": "no answer"}])
    (fault,) = layout.faults_in_own_data()
    assert fault.startswith("datasets.d: mine/test.jsonl, row 4: 'answer' is missing")
    (tmp_path / "mine" / "test.jsonl").unlink()
    assert layout.faults_in_own_data() == [], "that is for `missing_paths` to say"


def test_what_was_prepared_from_other_settings_is_told_with_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = own_data(tmp_path)
    assert layout.prepared_otherwise() == []
    made = own_data(tmp_path, num_val=2, path="elsewhere").config.datasets["d"]
    write_json(
        tmp_path / "artifacts" / "d" / "manifest.json", {"settings": made.model_dump(mode="json")}
    )
    older = layout.config.models["m"].starting_weights().model_dump(mode="json")
    del older["revision"]  # a setting that there was not yet
    write_json(tmp_path / "artifacts" / "models" / "m" / "manifest.json", {"settings": older})
    assert layout.prepared_otherwise() == ["artifacts/d (num_val was 2, is 1)"]
    write_json(tmp_path / "artifacts" / "d" / "manifest.json", {"settings": {"kind": "arithmetic"}})
    (told,) = layout.prepared_otherwise()
    assert "kind was 'arithmetic', is 'gsm8k'" in told
