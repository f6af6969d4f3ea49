"""What a study will cost, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import plan_scale
from gsm8k_core import training
from gsm8k_core.config import Config, SuiteSettings, WeightsSettings, load_config
from gsm8k_core.errors import ConfigError
from gsm8k_core.files import read_json, write_json
from gsm8k_core.planning import (
    Assumptions,
    Records,
    Work,
    _sampling_seconds,
    disk_use,
    jobs_by_rule,
    num_parameters,
    parameters_of,
    suite_size,
    tokens_of_training,
    work_of,
)

ROOT = Path(__file__).resolve().parent.parent
SFT = "artifacts/experiments/other/tiny-qwen2/sft/seed0"


@pytest.fixture
def plan(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict]:
    """Run plan_study in an empty folder; its JSON."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> dict:
        config = ["--config", str(ROOT / "config.yaml")]
        assert script("plan_study").main([*words, "--json", *config]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def hours_of(plan: dict, method: str, work: str) -> dict:
    (row,) = [row for row in plan["hours"] if row["method"] == method and row["work"] == work]
    return row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt-tokens", "-5"], "expected 1 or more, found -5"),
        (["--gpu-flops", "0"], "expected a number above 0, found 0"),
        (["--cpu-flops", "nan"], "expected a number above 0, found nan"),
        (["--gpu-flops", "inf"], "expected a number above 0, found inf"),
        (["--gpu-flops", "fast"], "invalid number value: 'fast'"),
        (["--training-utilisation", "30"], "expected a number above 0 and at most 1, found 30"),
        (["--engine-start-seconds", "-1"], "expected a number from 0 on, found -1"),
    ],
)
def test_an_assumption_that_makes_no_sense_is_refused(
    script: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    with pytest.raises(SystemExit):
        script("plan_study").main(words)
    assert f"argument {words[0]}: {said}" in capsys.readouterr().err


def test_a_plan_says_what_looks_inherited_by_mistake(
    script: Callable[[str], ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.yaml").write_text("study: {suites: [gsm8k]}", encoding="utf-8")
    config = ["--config", str(ROOT / "config.yaml"), str(tmp_path / "mine.yaml")]
    assert script("plan_study").main(config) == 0
    assert "study.dataset: arithmetic, which the methods learn from, is inherited" in caplog.text


def test_a_size_below_zero_is_refused(plan: Callable[..., dict]) -> None:
    for size in ("-1", "0", "x", ""):
        with pytest.raises(ConfigError, match=f"MODEL=NUMBER, a number above 0, found t.*={size}"):
            plan("--parameters", f"tiny-qwen2={size}")
    assert plan("--engine-start-seconds", "0", "--parameters", "tiny-qwen2=1e5")


def test_nothing_is_guessed_of_a_model_whose_size_is_not_known(plan: Callable[..., dict]) -> None:
    found = plan()
    assert found["bytes"]["trained weights kept"] is None
    assert found["wall_hours"] is None
    assert hours_of(found, "sft", "training")["sources"] == ["parameters unknown"]


def test_weights_of_a_given_size_are_counted_for_each_run(plan: Callable[..., dict]) -> None:
    found = plan("--parameters", "tiny-qwen2=1e6")
    assert found["training_runs"] == 12
    assert found["bytes"]["trained weights kept"] == 12 * 4e6
    assert found["bytes"]["checkpoints while running"] == 12e6 * 3


def test_arithmetic_is_six_flops_a_parameter_and_token(plan: Callable[..., dict]) -> None:
    found = plan(
        "--parameters", "tiny-qwen2=1e6", "--prompt-tokens", "30", "--completion-tokens", "20",
        "--cpu-flops", "1e9", "--training-utilisation", "0.5",
    )  # fmt: skip
    row = hours_of(found, "sft", "training")
    seconds = 6 * 1e6 * (1000 * 32 * 50) / (1e9 * 0.5)
    assert row["cpu_hours"] == pytest.approx(3 * seconds / 3600)
    assert row["gpu_hours"] == 0


def test_the_longest_run_of_a_method_is_one_of_its_slowest_model(
    script: Callable[[str], ModuleType],
) -> None:
    hours = script("plan_study").hours

    def of_model(name: str, seconds: float | None, gpus: int) -> Work:
        return Work(name, "grpo", None, 3, 0, seconds, "arithmetic", gpus)

    small, large = of_model("small", 1800.0, 1), of_model("large", 7200.0, 4)
    (row,) = hours([small, large])
    assert row["longest_run_hours"] == 2.0  # by the clock, however many runs and GPUs there are
    assert row["gpu_hours"] == 3 * 0.5 + 3 * 4 * 2.0
    (row,) = hours([small, of_model("unknown", None, 1)])
    assert row["longest_run_hours"] is None


def test_the_hours_of_one_run_stand_on_the_page(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(ROOT / "config.yaml"), str(ROOT / "studies" / "qwen2.5-gsm8k.yaml")]
    sizes = ("qwen2.5-0.5b-instruct=1e8", "qwen2.5-1.5b-instruct=1e9", "qwen2.5-math-1.5b=1e9")
    words = [*config, "--parameters", *sizes]
    assert script("plan_study").main([*words, "--json"]) == 0
    row = hours_of(json.loads(capsys.readouterr().out), "grpo", "training")
    assert script("plan_study").main(words) == 0
    page = capsys.readouterr().out
    assert "| runs | finished | hours of the longest run | GPU-hours |" in page
    assert f"| grpo | training | 9 | 0 | {row['longest_run_hours']:.3g} | " in page


def config_of(folder: Path, overlay: dict) -> Config:
    """config.yaml with `overlay` laid over it."""
    write_json(folder / "overlay.yaml", overlay)
    return load_config(ROOT / "config.yaml", [folder / "overlay.yaml"])


@pytest.mark.parametrize(("num_steps", "every"), [(3, 2), (4, 2)])
def test_a_run_samples_to_train_and_to_validate_as_much_as_was_planned(
    script: Callable[[str], ModuleType],
    tiny_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_steps: int,
    every: int,
) -> None:
    grpo = {
        "from": "base", "num_steps": num_steps, "prompts_per_step": 4, "group_size": 2,
        "minibatches": 1, "validate_every_steps": every, "num_validation_problems": 7,
        "max_new_tokens": 1, "validation_max_new_tokens": 1,  # so all lengths are known
    }  # fmt: skip
    config = config_of(tmp_path, {"methods": {"grpo": grpo}})
    validated: list[int] = []
    validate = training.num_greedy_right

    def count(engine: object, problems: list, *others: object, **options: object) -> int:
        validated.append(len(problems))
        return validate(engine, problems, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "num_greedy_right", count)
    settings = config.run_settings("tiny-qwen2", "grpo", 0)
    script("train_grpo").main(
        ["--settings", settings.model_dump_json(by_alias=True),
         "--starting-model", str(tiny_folder), "--data", str(arithmetic_folder / "train.jsonl"),
         "--val-data", str(arithmetic_folder / "val.jsonl"), "--output-dir", str(tmp_path / "run")]
    )  # fmt: skip
    summary = read_json(tmp_path / "run" / "train" / "summary.json")
    prompt = summary["num_tokens"] / summary["num_sampled_tokens"] - 1
    planned = tokens_of_training(config, "grpo", Assumptions(prompt_tokens=round(prompt)))
    assert planned.sampled == summary["num_sampled_tokens"]
    assert planned.validated == sum(validated)
    # And each is scored once before the update.
    assert planned.trained == pytest.approx(summary["num_tokens"] * 4 / 3, rel=0.05)


def test_validation_is_planned_in_each_round_and_on_no_more_problems_than_there_are(
    tmp_path: Path,
) -> None:
    validating = {"validate_every_steps": 100, "num_validation_problems": 50}
    kinds = ("sft", "expert_iteration", "dpo", "grpo")
    config = config_of(
        tmp_path,
        {
            "defaults": {kind: {"num_steps": 100, **validating} for kind in kinds},
            "methods": {"sft": {"num_validation_problems": 10**6}},
        },
    )
    a = Assumptions(completion_tokens=10)
    # At the start and at the end.
    planned = {kind: tokens_of_training(config, kind, a).validated for kind in kinds}
    rounds = config.methods["expert_iteration"].sampling_rounds
    num_val = config.datasets["arithmetic"].num_val
    assert rounds > 1
    assert planned == {
        "sft": 2 * num_val * 10, "expert_iteration": rounds * 1000, "dpo": 1000, "grpo": 1000,
    }  # fmt: skip
    assert tokens_of_training(load_config(ROOT / "config.yaml"), "grpo", a).validated == 0


def test_the_time_of_validation_is_planned_with_the_start_of_the_engine_where_none_runs(
    tmp_path: Path,
) -> None:
    a = Assumptions(parameters={"tiny-qwen2": 1e6}, completion_tokens=10)
    seconds: dict[int, dict[str, float | None]] = {}
    for every in (0, 50):
        kinds = ("sft", "expert_iteration", "grpo")
        defaults = {kind: {"num_steps": 100, "validate_every_steps": every} for kind in kinds}
        models = {"tiny-qwen2": {"gpus": 1}}
        config = config_of(tmp_path, {"models": models, "defaults": defaults})
        work = work_of(config, Records(), a)
        seconds[every] = {item.method: item.seconds for item in work if item.suite is None}
    of_tokens = 3 * 100 * 10 * a.sampling_seconds_per_token
    for method, starts in (("sft", 1), ("rft", 1), ("grpo", 0)):
        before, after = seconds[0][method], seconds[50][method]
        assert before is not None and after is not None
        assert after - before == pytest.approx(of_tokens + starts * a.engine_start_seconds)


def test_a_plan_says_of_which_methods_it_cannot_know_what_they_sample(
    plan: Callable[..., dict],
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = ("--parameters", "tiny-qwen2=1e6")
    assert plan(*size)["unknown_refills"] == {}
    config = [str(ROOT / "config.yaml"), str(tmp_path / "dapo.yaml")]
    write_json(tmp_path / "dapo.yaml", {"study": {"methods": ["grpo", "dapo"]}})
    script("plan_study").main([*size, "--config", *config])
    assert "in each step up to so many times as much again: dapo (3)." in capsys.readouterr().out
    summary = {"model": "tiny-qwen2", "method": "dapo", "num_steps": 80, "seconds_training": 1.0}
    measured = Path(SFT.replace("sft", "dapo")) / "train" / "summary.json"
    write_json(tmp_path / measured, summary)
    script("plan_study").main([*size, "--config", *config])
    assert "Dynamic sampling" not in capsys.readouterr().out


def test_a_suite_has_the_problems_of_its_split_and_the_completions_that_it_asks_for() -> None:
    config = load_config(ROOT / "config.yaml")
    for suite, expected in (
        ({"dataset": "gsm8k"}, (1319, 1319)),
        ({"dataset": "gsm8k_platinum", "num_samples": 4}, (1209, 5 * 1209)),
        ({"dataset": "gsm8k", "limit": 10, "greedy": False, "num_samples": 4}, (10, 40)),
        ({"dataset": "gsm8k", "split": "val"}, (500, 500)),
        ({"dataset": "gsm8k", "split": "train"}, (6973, 6973)),
    ):
        assert suite_size(config, SuiteSettings.model_validate(suite)) == expected


def test_a_suite_of_prepared_problems_has_as_many_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "config.yaml")
    suite = SuiteSettings.model_validate({"dataset": "gsm8k", "num_samples": 2})
    assert suite_size(config, suite) == (1319, 3 * 1319)
    Path("artifacts/gsm8k").mkdir(parents=True)
    write_json(Path("artifacts/gsm8k/manifest.json"), {"test": {"num_problems": 200}})
    assert suite_size(config, suite) == (200, 600)


def test_sampling_on_a_gpu_takes_vllms_start_and_its_least_time_for_a_token() -> None:
    a = Assumptions(gpu_flops=1e12, sampling_utilisation=0.1)
    start, least = a.engine_start_seconds, a.sampling_seconds_per_token
    assert _sampling_seconds(1e3, 1e6, 1, a) == pytest.approx(start + 1e6 * least)  # a small model
    assert _sampling_seconds(1e9, 1e6, 1, a, starts=3) == pytest.approx(3 * start + 2e15 / 1e11)
    assert _sampling_seconds(1e9, 0, 1, a) == 0.0  # what samples nothing starts nothing


def test_what_lies_on_the_disk_at_once_is_added_up(plan: Callable[..., dict]) -> None:
    found = plan("--parameters", "tiny-qwen2=1e6")["bytes"]
    apart = ("most at once", "trained weights dropped", "checkpoints written in all")
    assert found["most at once"] == sum(size for name, size in found.items() if name not in apart)
    # SFT of 1,000 steps has checkpoints after 250, 500 and 750, RFT of 150 none before its end.
    saves = {"sft": 3, "rft": 0, "grpo": 1, "dr_grpo": 1}
    assert found["checkpoints written in all"] == 3 * sum(saves.values()) * 12e6
    assert plan()["bytes"]["most at once"] is None


def test_an_evaluation_holds_the_gpus_that_vllm_shares_a_model_over(tmp_path: Path) -> None:
    overlay = tmp_path / "gpus.yaml"
    records = Records()
    stats = {"seconds_loading": 0.0, "seconds_generating": 3600.0, "num_completions": 1}
    records.generating["tiny-qwen2", "arithmetic"].append(stats)
    held = {}
    for shared in (1, 4):
        vllm = f"vllm: {{tensor_parallel: {shared}}}"
        overlay.write_text(f"models: {{tiny-qwen2: {{gpus: 4, {vllm}}}}}", encoding="utf-8")
        work = work_of(load_config(ROOT / "config.yaml", [overlay]), records, Assumptions())
        of_sft = [item for item in work if item.method == "sft"]
        held[shared] = [item.gpus for item in of_sft]
    assert held == {1: [4, 1], 4: [4, 4]}  # training, evaluation


def test_a_finished_run_of_any_study_is_measured_and_scaled_by_steps(
    plan: Callable[..., dict], tmp_path: Path
) -> None:
    summary = {
        "model": "tiny-qwen2", "method": "sft", "num_steps": 500, "num_ranks": 1,
        "seconds_training": 20.0, "seconds_validating": 10.0,
    }  # fmt: skip
    write_json(tmp_path / SFT / "train" / "summary.json", summary)
    row = hours_of(plan(), "sft", "training")
    assert row["sources"] == ["measured, 1 runs"]
    assert row["cpu_hours"] == pytest.approx(3 * 60.0 / 3600)
    assert row["finished"] == 0
    own = SFT.replace("other", "default")
    write_json(tmp_path / own / "train" / "summary.json", summary)
    assert hours_of(plan(), "sft", "training")["finished"] == 1


def test_seconds_measured_on_other_gpus_than_a_job_would_have_are_scaled(tmp_path: Path) -> None:
    records = Records()
    summary = {"num_steps": 1000, "num_ranks": 1, "seconds_training": 800.0}
    stats = {
        "seconds_loading": 5.0, "seconds_generating": 800.0, "num_completions": 2500,
        "device": "H100", "engine": "vllm",
    }  # fmt: skip
    records.training["tiny-qwen2", "sft"].append({**summary, "num_ranks": 2})
    records.generating["tiny-qwen2", "arithmetic"].append(stats)
    overlay = tmp_path / "gpus.yaml"
    seconds = {}
    for gpus in (1, 8):
        settings = f"{{gpus: {gpus}, vllm: {{tensor_parallel: {gpus}}}}}"
        overlay.write_text(f"models: {{tiny-qwen2: {settings}}}", encoding="utf-8")
        config = load_config(ROOT / "config.yaml", [overlay])
        _, completions = suite_size(config, config.suites["arithmetic"])
        stats["num_completions"] = completions
        work = work_of(config, records, Assumptions())
        seconds[gpus] = [item.seconds for item in work if item.method == "sft"]
    assert seconds == {1: [1600.0, 805.0], 8: [200.0, 105.0]}  # training, evaluation


def test_of_adapters_no_checkpoints_of_all_weights_are_planned(tmp_path: Path) -> None:
    sizes = Assumptions(parameters={"tiny-qwen2": 1e6})
    best = {"keep_best": True, "validate_every_steps": 10}
    overlays: tuple[dict, ...] = ({}, {"lora": {"rank": 8}}, {"lora": {"rank": 8}, **best})
    found = []
    for grpo in overlays:
        study = {"methods": ["base", "grpo"]}
        methods = {"grpo": {"from": "base", **grpo}}
        config = config_of(tmp_path, {"study": study, "methods": methods})
        disk = disk_use(config, sizes, gpus=1, cpu_jobs=2)
        found.append((disk["checkpoints while running"], disk["checkpoints written in all"]))
    # Per parameter 12 bytes of a checkpoint, of which three lie there, and 4 of best weights, four.
    written = found[0][1]
    assert found == [(2 * 3 * 12e6, written), (0, 0), (2 * 4 * 4e6, 0)] and written


def test_of_a_model_on_several_gpus_fewer_runs_hold_checkpoints_at_once(tmp_path: Path) -> None:
    overlay = tmp_path / "gpus.yaml"
    sizes = Assumptions(parameters={"tiny-qwen2": 1e6})
    held = {}
    for each in (0, 1, 3, 8):
        overlay.write_text(f"models: {{tiny-qwen2: {{gpus: {each}}}}}", encoding="utf-8")
        config = load_config(ROOT / "config.yaml", [overlay])
        held[each] = disk_use(config, sizes, gpus=8, cpu_jobs=5)["checkpoints while running"]
    assert held == {each: runs * 3 * 12e6 for each, runs in ((0, 5), (1, 8), (3, 2), (8, 1))}


def test_parameters_are_counted_in_the_files(tiny_folder: Path) -> None:
    size = (tiny_folder / "model.safetensors").stat().st_size
    counted = num_parameters(tiny_folder)
    assert counted is not None and 0 < size - 4 * counted < 10_000
    assert num_parameters(tiny_folder / "nothing") is None


def test_parameters_of_weights_that_are_cut_short_are_not_known(
    tmp_path: Path, tiny_folder: Path
) -> None:
    weights = (tiny_folder / "model.safetensors").read_bytes()
    for size in (4, 100, len(weights) - 1):
        (tmp_path / "model.safetensors").write_bytes(weights[:size])
        assert num_parameters(tmp_path) is None


def test_parameters_of_a_model_in_the_home_folder_are_counted(
    config: Config, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    weights = WeightsSettings(source="path", path=f"~/{tiny_folder.name}")
    settings = config.models["tiny-qwen2"].model_copy(update=weights.model_dump())
    config = config.model_copy(update={"models": {"mine": settings}})
    assert parameters_of(config, "mine", Assumptions()) == num_parameters(tiny_folder)


@pytest.mark.slow
def test_snakemake_plans_a_hundred_training_runs_with_the_jobs_that_are_counted_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_scale.make_workspace(tmp_path, plan_scale.large_study(5, 20, 1))
    seconds, jobs = plan_scale.plan(tmp_path, seconds_at_most=600)
    with capsys.disabled():  # to be read in CI's log; how long it takes is no test
        print(f"\n100 training runs, {jobs['total']:,} jobs planned in {seconds:.1f} s")
    counted = jobs_by_rule(load_config(ROOT / "config.yaml", [tmp_path / "large.yaml"]))
    assert jobs == {**counted, "total": sum(counted.values())}
    trained = ("train_sft", "train_grpo", "finish_rounds", "train_dpo")
    assert sum(jobs[rule] for rule in trained) == 100
