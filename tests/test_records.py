"""What a finished study leaves: rows that lead to their makers, hashes that find a flipped byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsm8k_core.config import Config
from gsm8k_core.errors import DataError
from gsm8k_core.files import FINISHED, read_json, write_json, write_text
from gsm8k_core.layout import Layout
from gsm8k_core.records import (
    SUMS,
    check_settings,
    dropped_weights,
    hash_folder,
    invocation_facts,
    job_seconds,
    note_unrecorded,
    read_sums,
    record_study,
    verify_sums,
    write_sums,
)

FIRST, SECOND = "20261123T000000Z_aaaaaaaa", "20261124T000000Z_bbbbbbbb"
EXPERIMENTS = Path("artifacts/experiments/small/tiny-qwen2")
RESULTS = Path("artifacts/results/small")

ATTEMPTS = {"attempts_total": {"seconds_cpu": 1.0}}

pytestmark = pytest.mark.usefixtures("study")


def provenance(invocation: str | None) -> dict[str, Any]:
    return {"invocation": invocation}


@pytest.fixture
def layout(config: Config) -> Layout:
    study = {"name": "small", "methods": ["base", "sft", "grpo"], "seeds": [0, 1]}
    return Layout(config.model_copy(update={"study": config.study.model_copy(update=study)}))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> Path:
    """A finished study of two calls: the first made all of it, the second grpo's seed 1."""
    monkeypatch.chdir(tmp_path)
    for model, method, seed in layout.cells():
        run = Path(layout.run(model, method, seed))
        made = provenance(SECOND if (method, seed) == ("grpo", 1) else FIRST)
        if method != "base":
            write_json(
                run / "train" / "summary.json",
                {"device": "NVIDIA", "seconds_training": 10.0, "provenance": made, **ATTEMPTS},
            )
            write_text(run / "model" / "model.safetensors", f"weights of {method} {seed}")
            write_text(run / "state" / "progress.json", "{}")
            write_text(run / "completions" / "arithmetic.jsonl.partial", "{}")
            write_text(run / "wandb" / "run.wandb", "w")
        stats = {"device": "NVIDIA", "seconds_generating": 2.0, "provenance": made, **ATTEMPTS}
        write_json(run / "completions" / "arithmetic.stats.json", stats)
        write_text(run / "completions" / "arithmetic.jsonl", "{}\n")
        write_json(run / "metrics" / "arithmetic.json", {"accuracy": 0.5, "provenance": made})
        write_text(run / "grades" / "arithmetic.parquet", "PAR1")
        write_text(run / "logs" / "generate_arithmetic.log", "")
    write_text(RESULTS / "comparison.csv", "model\n")
    write_json(
        Path("artifacts/arithmetic/manifest.json"), {"test": {"num_problems": 1, "sha256": "0"}}
    )
    write_text(Path("artifacts/arithmetic/test.jsonl"), "{}\n")
    write_text(Path("artifacts/gsm8k/test.jsonl"), "of another study\n")
    weights = Path("artifacts/models/tiny-qwen2")
    write_json(weights / "manifest.json", {"from": "embedded", "files": {"a": "1"}, "model": "x"})
    write_text(weights / ".snakemake_timestamp", "")
    for name in (FIRST, SECOND):
        write_json(Path("artifacts/runs") / name / "run_manifest.json", {"state": "succeeded"})
    for name, of_study in (("failed", "small"), ("other", "large"), ("of eval", None)):
        write_json(Path("artifacts/runs") / name / "run_manifest.json", {"study": of_study})
    for kind, suffix in (("logs", "log"), ("benchmarks", "tsv")):
        for name in ("prepare_data/arithmetic", "prepare_data/gsm8k", "prepare_model/tiny-qwen2"):
            write_text(Path(f"artifacts/{kind}/{name}.{suffix}"), "l")
    record_study(layout, since_ns=0)
    return tmp_path


def flip_one_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_study_that_nobody_touched_is_as_recorded() -> None:
    differences = verify_sums(RESULTS / SUMS)
    assert not differences
    assert differences.num_checked == len(read_sums(RESULTS / SUMS)) > 30


def test_one_flipped_byte_is_found_in_any_file() -> None:
    for name in read_sums(RESULTS / SUMS):
        if Path(name).stat().st_size:
            flip_one_byte(Path(name), Path(name).stat().st_size // 2)
            assert verify_sums(RESULTS / SUMS).changed == [name]
            flip_one_byte(Path(name), Path(name).stat().st_size // 2)
    assert not verify_sums(RESULTS / SUMS)


def test_a_flipped_byte_of_the_record_itself_is_found_wherever_it_is() -> None:
    record = RESULTS / SUMS
    first_line = record.read_bytes().index(b"\n")
    for at in [*range(first_line + 2), record.stat().st_size - 1]:
        flip_one_byte(record, at)
        try:
            assert verify_sums(record)
        except DataError as error:
            assert str(error).startswith(str(record))
        flip_one_byte(record, at)
    assert not verify_sums(record)


def test_what_is_missing_and_what_is_new_is_told() -> None:
    gone = EXPERIMENTS / "grpo" / "seed1" / "model" / "model.safetensors"
    gone.unlink()
    added = EXPERIMENTS / "sft" / "seed0" / "model" / "adapter.bin"
    write_text(added, "?")
    differences = verify_sums(RESULTS / SUMS)
    assert (differences.changed, differences.missing) == ([], [str(gone)])
    assert differences.new == [str(added)]


def test_what_wandb_adds_when_it_uploads_is_no_difference() -> None:
    folder = EXPERIMENTS / "grpo" / "seed1" / "wandb"
    write_text(folder / "run.wandb.synced", "")
    assert not verify_sums(RESULTS / SUMS)
    flip_one_byte(folder / "run.wandb", 0)
    assert verify_sums(RESULTS / SUMS).changed == [str(folder / "run.wandb")]


def test_the_record_covers_the_study_and_what_it_came_from() -> None:
    names = set(read_sums(RESULTS / SUMS))
    assert {
        "artifacts/arithmetic/test.jsonl",
        "artifacts/models/tiny-qwen2/manifest.json",
        f"artifacts/runs/{FIRST}/run_manifest.json",
        f"artifacts/runs/{SECOND}/run_manifest.json",
        str(RESULTS / "comparison.csv"),
        str(RESULTS / "provenance.json"),
        str(EXPERIMENTS / "grpo/seed1/model/model.safetensors"),
        str(EXPERIMENTS / "base/seed0/logs/generate_arithmetic.log"),
        str(EXPERIMENTS / "grpo/seed1/wandb/run.wandb"),
        "artifacts/runs/failed/run_manifest.json",
        "artifacts/logs/prepare_data/arithmetic.log",
        "artifacts/benchmarks/prepare_data/arithmetic.tsv",
        "artifacts/logs/prepare_model/tiny-qwen2.log",
    } <= names
    assert not [name for name in names if "state" in name or "/." in name or "partial" in name]
    assert not [name for name in names if "gsm8k" in name or "other" in name or "eval" in name]


def test_sha256sum_reads_the_record() -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", str(RESULTS / SUMS)]
    assert subprocess.run(command, check=False).returncode == 0
    flip_one_byte(RESULTS / "comparison.csv", 0)
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


def now_ns(folder: Path) -> int:
    """The file system's time, and a moment later than that of all files before."""
    time.sleep(0.02)
    write_text(folder / "now", "")
    time.sleep(0.02)
    return (folder / "now").stat().st_ctime_ns


def test_a_later_call_records_what_it_wrote_and_nothing_else(study: Path, layout: Layout) -> None:
    before = read_sums(RESULTS / SUMS)
    outside = EXPERIMENTS / "sft" / "seed0" / "model" / "model.safetensors"
    removed = EXPERIMENTS / "sft" / "seed1" / "model" / "model.safetensors"
    redone = EXPERIMENTS / "grpo" / "seed0" / "model" / "model.safetensors"
    flip_one_byte(outside, 3)
    removed.unlink()
    since = now_ns(study)
    write_text(redone, "other weights")
    os.utime(redone, (0, 0))  # as a copy that keeps the time of what it was copied from
    write_text(RESULTS / "comparison.md", "new")
    record_study(layout, since)
    after = read_sums(RESULTS / SUMS)
    assert after[str(outside)] == before[str(outside)]
    assert after[str(redone)] != before[str(redone)]
    differences = verify_sums(RESULTS / SUMS)
    assert (differences.changed, differences.missing) == ([str(outside)], [str(removed)])
    assert differences.new == []


def test_a_call_killed_while_it_took_hashes_leaves_them_to_the_next(
    study: Path, layout: Layout
) -> None:
    redone = EXPERIMENTS / "grpo" / "seed0" / "model" / "model.safetensors"
    note_unrecorded(layout, now_ns(study))
    write_text(redone, "other weights")
    # Killed here, with its manifest written: the next call takes its results for older than itself.
    note_unrecorded(layout, now_ns(study))
    record_study(layout, now_ns(study))
    assert not verify_sums(RESULTS / SUMS)
    assert not (RESULTS / ".unrecorded").exists()
    flip_one_byte(redone, 3)
    record_study(layout, now_ns(study))
    assert verify_sums(RESULTS / SUMS).changed == [str(redone)]


def test_a_file_that_a_redone_job_writes_no_more_is_forgotten(study: Path, layout: Layout) -> None:
    model = EXPERIMENTS / "sft" / "seed0" / "model"
    since = now_ns(study)
    (model / "model.safetensors").unlink()
    write_text(model / "model-00001-of-00002.safetensors", "a")
    record_study(layout, since)
    assert not verify_sums(RESULTS / SUMS)


def test_a_copy_of_the_study_elsewhere_is_as_recorded(
    study: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path_factory.mktemp("copy")
    subprocess.run(["cp", "-r", str(study / "artifacts"), str(copy)], check=True)
    monkeypatch.chdir(copy)
    assert not verify_sums(RESULTS / SUMS)


def test_every_row_leads_to_the_calls_that_made_it() -> None:
    record = read_json(RESULTS / "provenance.json")
    rows = {row["method"]: row["runs"] for row in record["rows"]}
    assert {method: len(runs) for method, runs in rows.items()} == {"base": 1, "sft": 2, "grpo": 2}
    first, second = rows["grpo"]
    assert first["made_by"] == [f"artifacts/runs/{FIRST}/run_manifest.json"]
    # Its own training and sampling, then its parent's.
    assert second["made_by"] == [
        f"artifacts/runs/{SECOND}/run_manifest.json",
        f"artifacts/runs/{FIRST}/run_manifest.json",
    ]
    assert second["summaries"] == [
        str(EXPERIMENTS / "sft/seed1/train/summary.json"),
        str(EXPERIMENTS / "grpo/seed1/train/summary.json"),
    ]
    paths = [
        path
        for runs in rows.values()
        for run in runs
        for value in run.values()
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, str)
    ]
    assert paths and all(Path(path).is_file() for path in paths)


def test_a_row_leads_to_the_calls_of_every_round(layout: Layout) -> None:
    for name in ("train/summary.json", "completions.stats.json"):
        path = EXPERIMENTS / "sft" / "seed1" / "round1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"provenance": {"invocation": f"call of {path.stem}"}})
    record_study(layout, since_ns=0)
    rows = {row["method"]: row["runs"] for row in read_json(RESULTS / "provenance.json")["rows"]}
    assert rows["sft"][1]["made_by"][-2:] == [
        "artifacts/runs/call of completions.stats/run_manifest.json",
        "artifacts/runs/call of summary/run_manifest.json",
    ]


def made_by(method: str, seed: int = 1) -> list[str]:
    """The calls that a run of a method leads to, without their paths."""
    rows = {row["method"]: row["runs"] for row in read_json(RESULTS / "provenance.json")["rows"]}
    return [Path(path).parent.name for path in rows[method][seed]["made_by"]]


def test_a_row_leads_to_who_graded_it_and_who_prepared_what_it_came_from(layout: Layout) -> None:
    grading = EXPERIMENTS / "grpo" / "seed1" / "grades" / "arithmetic.manifest.json"
    records = {
        grading: "graded",
        Path("artifacts/arithmetic/manifest.json"): "prepared data",
        Path("artifacts/models/tiny-qwen2/manifest.json"): "prepared weights",
    }
    for path, name in records.items():
        write_json(path, {"provenance": provenance(name)})
        write_json(Path("artifacts/runs") / name / "run_manifest.json", {"study": "another"})
    record_study(layout, since_ns=0)
    assert made_by("grpo") == [SECOND, "graded", FIRST, "prepared data", "prepared weights"]
    row = read_json(RESULTS / "provenance.json")["rows"][2]["runs"][1]
    assert row["grading"] == str(grading)
    # What it leads to is among what is hashed.
    assert "artifacts/runs/graded/run_manifest.json" in read_sums(RESULTS / SUMS)


def test_the_tables_lead_to_the_calls_that_wrote_them(layout: Layout) -> None:
    for name in ("compare", "plot", "report"):
        record = {"provenance": provenance(SECOND if name == "plot" else FIRST)}
        write_json(RESULTS / "manifests" / f"{name}.json", record)
    record_study(layout, since_ns=0)
    tables = read_json(RESULTS / "provenance.json")["tables"]
    names = [str(RESULTS / "manifests" / f"{name}.json") for name in ("compare", "plot", "report")]
    runs = [f"artifacts/runs/{name}/run_manifest.json" for name in (FIRST, SECOND)]
    assert tables == {"records": names, "made_by": runs}


def test_a_row_leads_to_the_earlier_calls_of_a_run_that_was_killed(layout: Layout) -> None:
    path = EXPERIMENTS / "grpo" / "seed1" / "train" / "summary.json"
    attempts = [{"invocation": name} for name in ("first", "second", None, SECOND)]
    write_json(path, {**read_json(path), "attempts": attempts})
    record_study(layout, since_ns=0)
    assert made_by("grpo") == [SECOND, "second", "first", FIRST]


def test_a_method_that_learns_from_traces_leads_to_who_collected_and_chose_them(
    config: Config, study: Path
) -> None:
    settings = {"name": "small", "methods": ["base", "sft_r1_grpo"], "seeds": [0]}
    layout = Layout(config.model_copy(update={"study": config.study.model_copy(update=settings)}))
    run = Path(layout.run("tiny-qwen2", "sft_r1_grpo", 0))
    write_json(run / "metrics" / "arithmetic.json", {})
    traces = Path("artifacts/r1_traces")
    collected = {"attempts": [{"invocation": "killed"}], "provenance": provenance("collected")}
    write_json(traces / "collected.json", collected)
    write_json(traces / "manifest.json", {"provenance": provenance("selected")})
    write_text(traces / "collected" / "ledger.jsonl", "{}\n")
    write_json(Path("artifacts/gsm8k/manifest.json"), {"provenance": provenance("fetched")})
    record_study(layout, since_ns=0)
    assert made_by("sft_r1_grpo", 0) == ["selected", "collected", "killed", "fetched"]
    row = read_json(RESULTS / "provenance.json")["rows"][-1]["runs"][0]
    assert row["training_data"] == [
        "artifacts/r1_traces/manifest.json", "artifacts/r1_traces/collected.json",
        "artifacts/gsm8k/manifest.json", "artifacts/arithmetic/manifest.json",
    ]  # fmt: skip
    assert {
        str(traces / "collected" / "ledger.jsonl"), "artifacts/gsm8k/manifest.json",
    } <= read_sums(RESULTS / SUMS).keys()  # fmt: skip
    assert study.exists()


def test_an_unfinished_study_has_the_rows_that_are_there(layout: Layout) -> None:
    (EXPERIMENTS / "grpo" / "seed1" / "metrics" / "arithmetic.json").unlink()
    (EXPERIMENTS / "base" / "seed0" / "completions" / "arithmetic.stats.json").write_text("{")
    record_study(layout, since_ns=0)
    rows = {row["method"]: row["runs"] for row in read_json(RESULTS / "provenance.json")["rows"]}
    assert [run["seed"] for run in rows["grpo"]] == [0]
    assert rows["base"][0]["made_by"] == []


def test_a_call_tells_its_inputs_and_the_seconds_of_its_own_jobs(layout: Layout) -> None:
    facts = invocation_facts(layout, SECOND)
    assert facts["datasets"]["arithmetic"]["test"]["sha256"] == "0"
    assert facts["models"] == {"tiny-qwen2": {"from": "embedded", "files": {"a": "1"}}}
    assert (facts["seconds_gpu"], facts["seconds_cpu_jobs"]) == (12.0, 2.0)
    grpo = EXPERIMENTS / "grpo" / "seed0"  # whose links are no other run
    shutil.copytree(grpo / "train", grpo / FINISHED / "train")
    assert invocation_facts(layout, SECOND) == facts
    assert invocation_facts(layout, FIRST)["seconds_gpu"] == 3 * 12.0 + 2.0


@pytest.mark.parametrize(
    ("record", "seconds"),
    [
        ({"device": "cpu", "seconds_training": 5.0}, 0.0),
        ({"seconds_training": 5.0}, 0.0),
        ({"device": "NVIDIA", "seconds_training": 5.0, "seconds_sampling": 2.0}, 3.0),
        ({"device": "NVIDIA", "num_ranks": 4, "seconds_training": 5.0}, 20.0),
        ({"device": "NVIDIA", "seconds_training": 5.0, "seconds_validating": 3.0}, 8.0),
        ({"device": "cpu", "num_ranks": 4, "seconds_training": 5.0}, 0.0),
        ({"device": "NVIDIA", "seconds_loading": 1.0, "seconds_generating": 4.0}, 5.0),
        (
            {
                "device": "NVIDIA",
                "engine": "vllm",
                "seconds_generating": 4.0,
                "settings": {"model_settings": {"vllm": {"tensor_parallel": 2}}},
            },
            8.0,
        ),
    ],
)
def test_gpu_seconds_count_every_gpu_and_nothing_twice(
    record: dict[str, Any], seconds: float
) -> None:
    assert job_seconds([record])["seconds_gpu"] == seconds


@pytest.mark.parametrize(
    ("content", "message"),
    [("0" * 64 + "  a\n" + "xyz\n", "row 2"), ("0" * 64 + "  a", "cut short")],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_text(tmp_path / SUMS, content)
    with pytest.raises(DataError, match=message):
        read_sums(tmp_path / SUMS)


def test_names_of_files_come_back_as_they_were(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")  # bytes that are not UTF-8
    sums = {"a b": "0" * 64, "café/− x": "1" * 64, latin: "2" * 64}
    write_sums(tmp_path / SUMS, sums)
    assert read_sums(tmp_path / SUMS) == sums


# The command


def test_verify_says_all_is_well_or_what_is_not(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    verify = script("verify").main
    assert verify(["--study", "small"]) == 0
    assert "files are as recorded" in capsys.readouterr().out
    flip_one_byte(RESULTS / "comparison.csv", 0)
    assert verify(["--study", "small"]) == 1
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"changed {RESULTS / 'comparison.csv'}"
    assert "1 changed, 0 missing, 0 new" in lines[1]


def test_a_study_that_never_finished_is_an_error(script: Callable[[str], ModuleType]) -> None:
    with pytest.raises(DataError, match="written when the study finishes"):
        script("verify").main(["--study", "smal"])


def test_the_folder_of_an_eval_is_verified_alone(script: Callable[[str], ModuleType]) -> None:
    run = Path("artifacts/runs") / FIRST
    hash_folder(run)
    assert script("verify").main(["--run", str(run)]) == 0
    assert script("verify").main(["--run", str(run.resolve())]) == 0
    os.rename(run / "run_manifest.json", run / "other.json")
    assert script("verify").main(["--run", str(run)]) == 1


def test_weights_that_the_study_does_not_keep_are_dropped_and_not_missing(
    study: Path, layout: Layout
) -> None:
    settings = layout.config.study.model_copy(update={"keep_models": "none"})
    dropping = Layout(layout.config.model_copy(update={"study": settings}))
    model = EXPERIMENTS / "sft" / "seed0" / "model"
    shutil.rmtree(model)
    assert verify_sums(RESULTS / SUMS).missing == [str(model / "model.safetensors")]
    record_study(layout, now_ns(study))  # a study that keeps them does not forget them
    assert verify_sums(RESULTS / SUMS).missing == [str(model / "model.safetensors")]
    record_study(dropping, now_ns(study))
    assert not verify_sums(RESULTS / SUMS)
    assert read_json(RESULTS / "provenance.json")["dropped_weights"] == [str(model)]


def test_a_study_of_final_models_drops_those_between_rounds(study: Path, layout: Layout) -> None:
    for name in ("round1", "seed7"):
        write_json(EXPERIMENTS / "sft" / name / "train" / "summary.json", {})
    for keep, names in (("all", []), ("final", ["round1"]), ("none", ["round1", "seed7"])):
        settings = layout.config.study.model_copy(update={"keep_models": keep})
        dropped = dropped_weights(Layout(layout.config.model_copy(update={"study": settings})))
        assert dropped == [str(EXPERIMENTS / "sft" / name / "model") for name in names]
    assert study.exists()


def test_what_a_failed_call_removed_and_did_not_make_again_is_missing(
    study: Path, layout: Layout
) -> None:
    weights = EXPERIMENTS / "sft" / "seed0" / "model" / "model.safetensors"
    since = now_ns(study)
    weights.unlink()
    record_study(layout, since, has_failed=True)
    assert verify_sums(RESULTS / SUMS).missing == [str(weights)]


@pytest.mark.usefixtures("study")
def test_grades_that_were_taken_otherwise_are_refused(layout: Layout) -> None:
    path = Path(layout.run("tiny-qwen2", "sft", 0), "metrics", "arithmetic.json")
    taken = {"grading": "strict", "marker": "####", "math_verify": False}
    write_json(path, taken)
    check_settings(layout)
    write_json(
        path, {"grading": "strict", "marker": "####"}
    )  # whatever else it lacks, compare says
    check_settings(layout)
    write_json(path, {**taken, "grading": "flexible"})
    with pytest.raises(DataError, match=f"{path}: grading is 'flexible', the study asks for 'st"):
        check_settings(layout)
