"""`python -m gsm8k_core.cli eval`: one number without a study, by the workflow's own jobs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import yaml

from gsm8k_core import evaluate
from gsm8k_core.cli import main as cli
from gsm8k_core.config import (
    Config,
    EvaluationSettings,
    GradingSettings,
    RunSettings,
    VllmSettings,
    dump,
    load_config,
)
from gsm8k_core.errors import ConfigError
from gsm8k_core.evaluate import _sentence, default_suite, find_subject, run, summarize
from gsm8k_core.files import Json, read_json, read_jsonl, sha256_file, write_json, write_text
from gsm8k_core.metrics import mean_interval
from gsm8k_core.tables import read_grades

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "datasets": {"arithmetic": {"num_train": 20, "num_val": 5, "num_test": 20}},
    "suites": {"arithmetic": {"num_samples": 2, "max_new_tokens": 8}},
}


def eval_command(folder: Path, *words: str, settings: Json = SMALL) -> subprocess.Popen[str]:
    """`eval` in `folder`, on `settings`."""
    (folder / "small.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "gsm8k_core.cli", "eval", *words]
    command += ["--config", str(ROOT / "config.yaml"), "small.yaml"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, error = process.communicate(timeout=600)
    assert process.returncode == code, error
    return out, error


# What is evaluated


def folder_of_weights(folder: Path) -> Path:
    write_text(folder / "config.json", "{}")
    return folder


def test_a_model_of_the_config_brings_its_prompt_unless_another_is_named(config: Config) -> None:
    found = find_subject("tiny-qwen2", None, config)
    assert (found.name, found.method, found.seed, found.folder) == ("tiny-qwen2", "base", 0, None)
    assert found.prompt == config.prompts["plain"]
    assert find_subject("tiny-qwen2", "chat_hash", config).prompt == config.prompts["chat_hash"]


def test_the_model_of_a_run_brings_that_runs_settings(tmp_path: Path, config: Config) -> None:
    run: RunSettings = config.run_settings("tiny-qwen2", "grpo", 2)
    write_text(tmp_path / "seed2" / "settings.json", dump(run))
    folder = folder_of_weights(tmp_path / "seed2" / "model")
    found = find_subject(str(folder), None, config)
    assert (found.name, found.method, found.parent, found.seed) == ("tiny-qwen2", "grpo", "sft", 2)
    assert found.settings.gpus == 0 and found.folder == folder


def test_the_folder_of_a_run_is_told_where_its_weights_are(tmp_path: Path, config: Config) -> None:
    folder_of_weights(tmp_path / "seed2" / "model")
    with pytest.raises(ConfigError, match=r"is a run's folder; did you mean .*seed2/model\?"):
        find_subject(str(tmp_path / "seed2"), None, config)


def test_weights_beside_a_folder_called_model_are_weights(tmp_path: Path, config: Config) -> None:
    folder = folder_of_weights(tmp_path / "mine")
    folder_of_weights(folder / "model")
    assert find_subject(str(folder), "plain", config).folder == folder


def test_the_library_without_a_clone_says_that_it_runs_scripts_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsm8k_core.evaluate.ROOT", tmp_path)
    with pytest.raises(ConfigError, match="eval runs scripts/ of a clone, and there are none"):
        run(argparse.Namespace())


def test_any_other_folder_needs_a_prompt(tmp_path: Path, config: Config) -> None:
    folder = folder_of_weights(tmp_path / "my-weights")
    with pytest.raises(ConfigError, match="name its prompt with --prompt NAME"):
        find_subject(str(folder), None, config)
    found = find_subject(str(folder), "chat_hash", config)
    assert (found.name, found.settings.source) == ("my-weights", "path")


def run_evaluated_on(folder: Path, *suites: str, config: Config) -> str:
    """The weights of a run that its study has evaluated on suites of `config`."""
    for suite in suites:
        settings = config.evaluation_settings("tiny-qwen2", "grpo", 0, suite)
        stats = {"settings": settings.model_dump(mode="json", by_alias=True)}
        write_json(folder / "completions" / f"{suite}.stats.json", stats)
    return str(folder_of_weights(folder / "model"))


def test_without_a_suite_a_run_is_asked_the_problems_that_its_study_asks(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = run_evaluated_on(tmp_path, "gsm8k_16_samples", config=config)
    assert default_suite(run, config) == "gsm8k"  # not the study's first, `arithmetic`
    assert "no --suite: taking gsm8k; the run's study evaluates it on gsm8k" in caplog.text
    study = config.study.model_copy(update={"suites": ["arithmetic", "gsm8k_8shot_cot"]})
    own = config.model_copy(update={"study": study})
    assert default_suite(run, own) == "gsm8k_8shot_cot"  # a study's suites go before others


def test_without_a_suite_another_model_is_asked_those_of_the_studys_first(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = str(folder_of_weights(tmp_path / "not-evaluated" / "model"))
    for model in ("qwen2.5-0.5b-instruct", folder):
        caplog.clear()
        assert default_suite(model, config) == "arithmetic"
        assert "no --suite: taking arithmetic, the first" in caplog.text


def test_a_run_whose_problems_no_suite_asks_needs_one_named(tmp_path: Path, config: Config) -> None:
    run = run_evaluated_on(tmp_path, "gsm8k", config=config)
    suites = {name: suite for name, suite in config.suites.items() if suite.dataset != "gsm8k"}
    other = config.model_copy(update={"suites": suites})
    with pytest.raises(ConfigError, match=r"evaluates it on gsm8k, and no suite of the config"):
        default_suite(run, other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny-qwen3"], "--model: no 'tiny-qwen3' in the config and no such folder"),
        (["--suite", "gsm9k"], "--suite: no 'gsm9k' in the config; there are: "),
        (["--prompt", "plane"], "--prompt: no 'plane' in the config; there are: "),
        (["--vllm-max-sequences", "none"], "vllm.max_sequences"),
        (["--config", "nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        cli(["eval", "--config", str(ROOT / "config.yaml"), *words])
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_no_problems_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["eval", "--limit", "0"])
    assert "--limit: " in capsys.readouterr().err


def test_a_grade_whose_package_is_missing_is_told_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    write_text(tmp_path / "asks.yaml", "suites: {arithmetic: {math_verify: true}}")
    config = ["--config", str(ROOT / "config.yaml"), "asks.yaml"]
    with pytest.raises(ConfigError, match=r"suites\.arithmetic\.math_verify: .*uv sync"):
        cli(["eval", "--suite", "arithmetic", *config])
    assert not (tmp_path / "artifacts").exists()


# What its jobs are asked


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Json]]:
    """`ask(*words)`: the options that `eval` gives to each script; none of them is run."""
    monkeypatch.chdir(tmp_path)
    small = {"suites": {"arithmetic": {"split": "val", "prompt": "chat_hash", "limit": 10}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")

    def call(*words: str) -> dict[str, Json]:
        asked: dict[str, Json] = {}

        def run_job(_folder: Path, script: str, **options: Any) -> None:
            asked[script] = options
            if "output_dir" in options:
                made = options["output_dir"]
                content = {"files": {}, "settings": json.loads(options["settings"])}
                for split in ("val", "test"):
                    write_text(made / f"{split}.jsonl", "{}\n")
                    content[split] = {"sha256": sha256_file(made / f"{split}.jsonl")}
                write_json(made / "manifest.json", content)
            elif script == "generate":
                write_json(options["stats"], {})
            else:
                options["grades"].parent.mkdir()
                row = {"problem_id": "a", "decoding": "greedy", "correct": True, "cluster": None}
                pl.DataFrame([row], schema_overrides={"cluster": pl.String}).write_parquet(
                    options["grades"]
                )

        monkeypatch.setattr(evaluate, "_run_job", run_job)
        cli(["eval", *words, "--config", str(ROOT / "config.yaml"), "small.yaml"])
        return asked

    return call


def test_a_suite_is_evaluated_on_its_split_with_its_prompt_unless_another_is_named(
    ask: Callable[..., dict[str, Json]], config: Config
) -> None:
    for words, prompt in (([], "chat_hash"), (["--prompt", "chat_boxed"], "chat_boxed")):
        asked = ask(*words)
        assert asked["generate"]["data"].name == "val.jsonl"
        settings = EvaluationSettings.model_validate_json(asked["generate"]["settings"])
        assert settings.prompt == config.prompts[prompt]
        marker = config.prompts[prompt].answer_marker
        graded = GradingSettings.model_validate_json(asked["grade"]["settings"])
        assert graded.marker == marker


def test_flags_go_before_what_a_run_s_own_settings_say(
    ask: Callable[..., dict[str, Json]], config: Config, tmp_path: Path
) -> None:
    write_text(tmp_path / "seed2/settings.json", dump(config.run_settings("tiny-qwen2", "grpo", 2)))
    folder = str(folder_of_weights(tmp_path / "seed2" / "model"))
    for words, seed, limit in (
        ([], 2, 10),
        (["--seed", "0", "--limit", "4"], 0, 4),
        (["--limit", "99"], 2, 10),  # of a suite that has ten
    ):
        asked = ask("--model", folder, "--prompt", "chat_boxed", *words)["generate"]
        settings = EvaluationSettings.model_validate_json(asked["settings"])
        assert (settings.seed, settings.suite_settings.limit) == (seed, limit)
        assert settings.prompt == config.prompts["chat_boxed"]


def test_a_run_without_a_suite_named_is_asked_what_its_study_asked(
    ask: Callable[..., dict[str, Json]], config: Config, tmp_path: Path
) -> None:
    write_text(tmp_path / "seed0/settings.json", dump(config.run_settings("tiny-qwen2", "grpo", 0)))
    folder = run_evaluated_on(tmp_path / "seed0", "gsm8k", config=config)
    for words, suite in (([], "gsm8k"), (["--suite", "arithmetic"], "arithmetic")):
        settings = json.loads(ask("--model", folder, *words)["generate"]["settings"])
        assert settings["suite"] == suite


def test_a_compute_type_goes_before_that_of_a_run_and_is_float32_for_other_folders(
    ask: Callable[..., dict[str, Json]], config: Config, tmp_path: Path
) -> None:
    run = config.run_settings("tiny-qwen2", "grpo", 0)
    rough = run.model_settings.model_copy(
        update={"dtype": "bfloat16", "vllm": VllmSettings(dtype="bfloat16")}
    )
    write_text(
        tmp_path / "seed0/settings.json", dump(run.model_copy(update={"model_settings": rough}))
    )
    of_run = str(folder_of_weights(tmp_path / "seed0" / "model"))
    foreign = str(folder_of_weights(tmp_path / "mine"))
    for folder, words, dtype in (
        (of_run, [], "bfloat16"),
        (of_run, ["--dtype", "float32"], "float32"),
        (foreign, [], "float32"),
        (foreign, ["--dtype", "bfloat16"], "bfloat16"),
    ):
        asked = ask("--model", folder, "--prompt", "plain", *words)["generate"]
        settings = EvaluationSettings.model_validate_json(asked["settings"])
        model, of_vllm = settings.model_settings, "bfloat16" if words == [] else None
        assert model.dtype == dtype and model.vllm.dtype == (of_vllm if folder == of_run else None)


@pytest.mark.slow
def test_what_was_prepared_from_other_settings_or_is_damaged_is_prepared_anew(
    ask: Callable[..., dict[str, Json]], tmp_path: Path
) -> None:
    prepared = tmp_path / "artifacts" / "arithmetic"
    settings = json.loads(ask()["prepare_data"]["settings"])
    for asked, content, anew in (
        (settings, "{}\n", False),
        (settings, "damaged", True),
        ({**settings, "seed": 7}, "{}\n", True),
    ):
        write_text(prepared / "val.jsonl", "{}\n")
        split = {"sha256": sha256_file(prepared / "val.jsonl")}
        write_json(prepared / "manifest.json", {"val": split, "settings": asked})
        (prepared / "val.jsonl").unlink()
        write_text(prepared / "val.jsonl", content)
        assert ("prepare_data" in ask()) is anew


# The number


def summary_of(grades: pl.DataFrame, folder: Path, confidence: float = 0.95) -> Json:
    grades.write_parquet(folder / "grades.parquet")
    return summarize(read_grades(folder / "grades.parquet"), confidence)


def test_the_number_and_its_interval_are_those_of_the_comparison(tmp_path: Path) -> None:
    rows = [
        {"problem_id": str(problem), "decoding": decoding, "sample_index": k, "correct": right,
         "cluster": None}
        for problem in range(30)
        for decoding, k, right in [
            ("greedy", 0, problem < 12),
            ("sample", 0, problem < 6),
            ("sample", 1, problem < 9),
        ]
    ]  # fmt: skip
    found = summary_of(pl.DataFrame(rows), tmp_path)
    expected = mean_interval([[1.0] * 12 + [0.0] * 18], 0.95)
    assert (found["num_problems"], found["num_clusters"]) == (30, None)
    assert found["accuracy"] == {
        "mean": 0.4, "low": pytest.approx(expected.low), "high": pytest.approx(expected.high),
    }  # fmt: skip
    assert found["pass_at_1"]["mean"] == pytest.approx(0.25)
    greedy_only = pl.DataFrame([row for row in rows if row["decoding"] == "greedy"])
    assert summary_of(greedy_only, tmp_path, 0.9)["pass_at_1"] is None


def test_the_number_of_clones_has_the_interval_of_their_clusters(
    config: Config, tmp_path: Path
) -> None:
    # Six clusters of five: two right, three wrong, one half and half. Rows in no order.
    right = [1.0] * 10 + [1.0, 1.0, 0.0, 0.0, 0.0] + [0.0] * 15
    clusters = [f"c{problem // 5}" for problem in range(30)]
    grades = pl.DataFrame(
        {
            "problem_id": [str(problem) for problem in range(30)],
            "decoding": "greedy",
            "correct": [value == 1.0 for value in right],
            "cluster": pl.Series(clusters),
        }
    )
    found = summary_of(grades.sample(fraction=1.0, shuffle=True, seed=3), tmp_path)
    expected = mean_interval([right], 0.95, clusters)
    assert list(found["accuracy"].values()) == pytest.approx(list(expected))
    assert expected.high - expected.low > 1.5 * np.subtract(*mean_interval([right])[:0:-1])
    settings = config.evaluation_settings("tiny-qwen2", "base", 0, "arithmetic")
    asked = "(30 problems in 6 clusters, 95 % interval over them"
    assert _sentence(settings, found, 0.95).endswith(f"{asked})\n")
    assert _sentence(settings, found, 0.995).endswith("99.5 % interval over them)\n")
    trained = config.evaluation_settings("tiny-qwen2", "sft", 0, "arithmetic")
    assert _sentence(trained, found, 0.95).endswith(f"{asked}, of this one run)\n")
    alone = {**found, "num_clusters": None}
    assert _sentence(settings, alone, 0.95).endswith("(30 problems, 95 % interval over them)\n")


@pytest.mark.slow
def test_two_evaluations_at_once_do_not_meet_and_agree(
    tmp_path: Path, ask: Callable[..., dict[str, Json]], script: Callable[[str], ModuleType]
) -> None:
    processes = [eval_command(tmp_path, "--limit", "6") for _ in range(2)]
    results = [finish(process)[0].split("\n") for process in processes]
    assert results[0][0] == results[1][0]
    assert results[0][0].startswith("tiny-qwen2 on arithmetic: accuracy 0.0 % [0.0, 39.0], pass@1 ")
    assert results[0][0].endswith("(6 problems, 95 % interval over them)")
    folders = [tmp_path / lines[1] for lines in results]
    assert folders[0] != folders[1]
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["runs"]
    first, second = (read_jsonl(folder / "completions" / "arithmetic.jsonl") for folder in folders)
    assert first == second and len(first) == 6 * 3

    folder = folders[0]
    manifest = read_json(folder / "run_manifest.json")
    assert (manifest["state"], manifest["study"], manifest["seeds"]) == ("succeeded", None, [0])
    assert manifest["command"][:2] == ["cli.py", "eval"]
    assert manifest["evaluation"]["suite_settings"]["limit"] == 6
    assert manifest["result"]["accuracy"]["mean"] == 0.0
    assert len(manifest["datasets"]["arithmetic"]["content_digest"]) == 64
    assert len(manifest["models"]["tiny-qwen2"]["files"]["model.safetensors"]) == 64
    assert manifest["seconds_cpu_jobs"] > 0
    for name in ("sys/host.json", "locks/requirements.lock.txt", "grades/arithmetic.parquet"):
        assert (folder / name).stat().st_size > 0
    metrics = read_json(folder / "metrics" / "arithmetic.json")
    assert metrics["provenance"]["invocation"] == folder.name
    for one in folders:  # `ask` works in tmp_path
        assert script("verify").main(["--run", str(one.relative_to(tmp_path))]) == 0

    # A third one links the weights that are there, if they are what their manifest says.
    (folders[1] / "model" / "model.safetensors").write_bytes(b"damaged")
    linked = ask("--limit", "2")["generate"]["model"] / "model.safetensors"
    assert linked.samefile(folders[0] / "model" / "model.safetensors")
    assert not linked.samefile(folders[1] / "model" / "model.safetensors")


@pytest.mark.slow
def test_an_evaluation_of_a_trained_model_gives_the_completions_of_its_study(
    tmp_path: Path, sft_folder: Path, script: Callable[[str], ModuleType]
) -> None:
    out, _ = finish(eval_command(tmp_path, "--model", str(sft_folder), "--limit", "10"))
    assert out.startswith("tiny-qwen2 sft on arithmetic: accuracy ")
    folder = tmp_path / out.split("\n")[1]
    assert read_json(folder / "run_manifest.json")["evaluation"]["method"] == "sft"
    assert not (folder / "model").exists()

    overlay = {"suites": {"arithmetic": {"limit": 10}}}
    (tmp_path / "ten.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    study = load_config(ROOT / "config.yaml", [tmp_path / "small.yaml", tmp_path / "ten.yaml"])
    settings = dump(study.evaluation_settings("tiny-qwen2", "sft", 0, "arithmetic"))
    script("generate").main(
        ["--settings", settings, "--model", str(sft_folder),
         "--data", str(folder / "data" / "test.jsonl"),
         "--output", str(tmp_path / "study.jsonl"), "--stats", str(tmp_path / "stats.json")]
    )  # fmt: skip
    assert read_jsonl(tmp_path / "study.jsonl") == read_jsonl(
        folder / "completions" / "arithmetic.jsonl"
    )


@pytest.mark.slow
def test_a_job_that_fails_ends_the_evaluation_with_one_more_line(tmp_path: Path) -> None:
    too_many = {"datasets": {"arithmetic": {"num_train": 20, "num_val": 100_000}}}
    _, error = finish(eval_command(tmp_path, settings=too_many), code=1)
    assert "error: arithmetic: no more than about " in error
    assert "error: prepare_data failed with exit code 1, see above; artifacts/runs/" in error
    assert "Traceback" not in error
    (manifest,) = (tmp_path / "artifacts" / "runs").glob("*/run_manifest.json")
    assert read_json(manifest)["state"] == "failed"


@pytest.mark.slow
def test_the_job_of_an_evaluation_that_is_killed_ends_too(tmp_path: Path) -> None:
    with eval_command(tmp_path) as evaluation:
        parent = psutil.Process(evaluation.pid)
        jobs: list[psutil.Process] = []
        while not jobs:
            assert evaluation.poll() is None
            jobs = parent.children()
            time.sleep(0.1)
        evaluation.kill()
    # When torch is loaded at the latest: until then nothing of ours runs in the job.
    assert psutil.wait_procs(jobs, timeout=300)[1] == []
    assert not list(tmp_path.rglob("*.stats.json"))
