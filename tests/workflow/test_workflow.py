"""Real runs of Snakemake, in a workspace of their own, on a small study that has every rule."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TextIO

import polars as pl
import pytest
import snakemake.benchmark as snakemake_benchmark
import yaml
from flips import files_of, unnoticed_flips
from forked_snakemake import run_snakemake
from killing import (
    NUM_KILLS,
    assert_whole,
    kill_at,
    moments_of_kills,
    num_finished,
    outputs,
    processes_in,
    states_of_calls,
    stopped,
    trained_weights,
    watch,
)
from workspace import ROOT, make_workspace, read_comparison

from gsm8k_core.answers import is_correct
from gsm8k_core.config import load_config
from gsm8k_core.data import content_digest
from gsm8k_core.files import FINISHED, read_json, read_jsonl, write_json, write_jsonl
from gsm8k_core.manifest import Invocation
from gsm8k_core.problems import read_problems

SMALL_STUDY = ("studies/debug.yaml", "small.yaml")
SMALL_METHODS = ("base", "sft", "expert_iteration", "dpo", "grpo")  # of small.yaml
CELLS = "artifacts/experiments/small/tiny-qwen2"

pytestmark = pytest.mark.slow


def small_workspace(folder: Path) -> Path:
    make_workspace(folder)
    shutil.copyfile(ROOT / "tests" / "workflow" / "small.yaml", folder / "small.yaml")
    return folder


def words_of(*arguments: str, overlays: tuple[str, ...] = SMALL_STUDY, gpus: int = 1) -> list[str]:
    # Targets come first: `--resources` would take a path behind it for one more resource.
    words = [*arguments, "--cores", "2", "--resources", f"gpu={gpus}"]
    return [*words, *(("--configfile", *overlays) if overlays else ())]


def snakemake(
    workspace: Path,
    *arguments: str,
    overlays: tuple[str, ...] = SMALL_STUDY,
    gpus: int = 1,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    words = words_of(*arguments, overlays=overlays, gpus=gpus)
    return run_snakemake(workspace, *words, environment={**os.environ, **environment})


def start_study(
    workspace: Path, output: TextIO, *overlays: str, **environment: str
) -> subprocess.Popen[str]:
    """As a user does: in a process that loads all anew, and that can be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words_of(overlays=(*SMALL_STUDY, *overlays))],
        cwd=workspace, env={**os.environ, **environment}, text=True,
        stdout=output, stderr=subprocess.STDOUT,
    )  # fmt: skip


def planned_jobs(workspace: Path, *arguments: str, overlays: tuple[str, ...] = SMALL_STUDY) -> dict:
    """Jobs that a dry run would do, by rule."""
    result = snakemake(workspace, "-n", *arguments, overlays=overlays)
    assert result.returncode == 0, result.stdout
    table = result.stdout.partition("Job stats:")[2]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.M)}


def overlay(workspace: Path, name: str, settings: dict) -> str:
    (workspace / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the small study has been run to its end."""
    workspace = small_workspace(tmp_path_factory.mktemp("workflow") / "finished")
    with (workspace / "output.txt").open("w+", encoding="utf-8") as output:
        assert start_study(workspace, output).wait() == 0, (output.seek(0), output.read())
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return small_workspace(tmp_path / "workspace")


def test_a_model_with_several_gpus_is_trained_under_torchrun_as_far_as_there_are_gpus(
    workspace: Path,
) -> None:
    model = {"gpus": 2, "vllm": {"tensor_parallel": 2}}
    two = overlay(workspace, "two.yaml", {"models": {"tiny-qwen2": model}})
    torchrun = (
        "OMP_NUM_THREADS=1 python scripts/with_gpus.py 2 "
        "python -m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 2"
    )
    one = "python scripts/with_gpus.py 1 python"
    for gpus, python in ((2, torchrun), (1, one)):
        result = snakemake(workspace, "-n", "-p", overlays=(*SMALL_STUDY, two), gpus=gpus)
        assert result.returncode == 0, result.stdout
        for script in ("train_sft", "train_dpo", "train_grpo"):
            assert f"command: {python} scripts/{script}.py " in result.stdout
        generate = f"python scripts/with_gpus.py {gpus} python scripts/generate.py "
        commands = [line for line in result.stdout.splitlines() if generate in line]
        assert commands and all(f"--vllm-tensor-parallel {gpus}" in line for line in commands)


def test_jobs_with_a_gpu_take_one_of_their_own_and_others_run_as_they_are(workspace: Path) -> None:
    one = overlay(workspace, "one.yaml", {"models": {"tiny-qwen2": {"gpus": 1}}})
    scripts = ("train_sft", "train_dpo", "train_grpo", "generate")
    for overlays, python in (
        ((*SMALL_STUDY, one), "python scripts/with_gpus.py 1 python"),
        (SMALL_STUDY, "python"),
    ):
        shown = snakemake(workspace, "-n", "-p", overlays=overlays).stdout
        commands = re.findall(r"command: (.*) scripts/(\w+)\.py ", shown)
        assert {name for _, name in commands} >= {*scripts, "grade"}
        for before, name in commands:
            assert before == (python if name in scripts else "python")


def test_jobs_follow_runs_as_the_config_says_whatever_the_shell_was_set_to(
    workspace: Path,
) -> None:
    lines = ['include: "Snakefile"', "rule tell:", '    output: "told.json"']
    lines.append("    shell: 'printenv GSM8K_TRACKING > {output}'")
    (workspace / "tell.smk").write_text("\n".join(lines), encoding="utf-8")
    of_shell = '{"project": "of-the-shell"}'
    other = overlay(workspace, "other.yaml", {"tracking": {"project": "of-the-config"}})
    for overlays, expected in ((SMALL_STUDY, {}), ((other,), {"project": "of-the-config"})):
        result = snakemake(
            workspace, "told.json", "--forceall", "--snakefile", "tell.smk",
            overlays=overlays, GSM8K_TRACKING=of_shell,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        assert read_json(workspace / "told.json") == expected


def test_each_job_is_given_the_weights_and_problems_that_its_settings_name(
    workspace: Path,
) -> None:
    again = {"kind": "expert_iteration", "from": "sft", "rounds": 2, "restart_from_parent": True}
    own = {"kind": "sft", "dataset": "other", "num_steps": 1}
    more = overlay(
        workspace,
        "more.yaml",
        {
            "study": {
                "methods": ["own", "again", "expert_iteration", "dpo", "grpo"],
                "suites": ["debug", "on_val"],
            },
            "datasets": {"other": {"kind": "arithmetic", "num_train": 50}},
            "methods": {"own": own, "again": again},
            "suites": {"on_val": {"dataset": "other", "split": "val", "limit": 5}},
        },
    )
    result = snakemake(workspace, "-n", "-p", overlays=(*SMALL_STUDY, more))
    assert result.returncode == 0, result.stdout
    commands = [shlex.split(line) for line in result.stdout.splitlines() if "scripts/" in line]

    def given(log: str, *flags: str) -> list[str]:
        (words,) = [words for words in commands if words[-1] == f"{CELLS}/{log}"]
        return [words[words.index(f"--{flag}") + 1].removeprefix(f"{CELLS}/") for flag in flags]

    base, problems = "artifacts/models/tiny-qwen2", "artifacts/arithmetic_debug"
    sft, train, val = "sft/seed0/model", f"{problems}/train.jsonl", f"{problems}/val.jsonl"
    first, last = ("expert_iteration/seed0/round1/model", "round2/demonstrations.jsonl")
    for log, start, data in (
        ("own/seed0/logs/train_sft", base, "artifacts/other/train.jsonl"),
        ("grpo/seed0/logs/train_grpo", sft, train),
        ("dpo/seed0/logs/train_dpo", sft, "dpo/seed0/round1/pairs.jsonl"),
        ("again/seed0/round2/logs/train_sft", sft, f"again/seed0/{last}"),
        ("expert_iteration/seed0/round2/logs/train_sft", first, f"expert_iteration/seed0/{last}"),
    ):
        found = given(f"{log}.log", "starting-model", "data", "val-data")
        assert found == [start, data, val]
    # What its pairs cost.
    stats = given("dpo/seed0/logs/train_dpo.log", "sampling-stats")
    assert stats == ["dpo/seed0/round1/completions.stats.json"]
    for log, model, data in (
        ("again/seed0/round2/logs/generate", "again/seed0/round1/model", train),
        ("dpo/seed0/round1/logs/generate", sft, train),
        ("grpo/seed0/logs/generate_debug", "grpo/seed0/model", f"{problems}/test.jsonl"),
        ("own/seed0/logs/generate_on_val", "own/seed0/model", "artifacts/other/val.jsonl"),
    ):
        assert given(f"{log}.log", "model", "data") == [model, data]


def test_jobs_that_ask_for_gpus_where_there_are_none_are_said_to_run_on_the_cpu(
    workspace: Path,
) -> None:
    four = {"gpus": 4, "vllm": {"tensor_parallel": 2}}
    models = overlay(workspace, "four.yaml", {"models": {"tiny-qwen2": four}})
    lines = ['include: "Snakefile"']
    for rule, function in (("train_asked", "model_gpus"), ("generate_asked", "generation_gpus")):
        lines += [f"rule {rule}:", f'    output: "{rule}-{{model}}"', "    resources:"]
        lines += [f"        gpu={function}", '    shell: "touch {output}"']
    (workspace / "ask.smk").write_text("\n".join(lines), encoding="utf-8")
    driver = workspace / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    prepared = "artifacts/arithmetic_debug/train.jsonl"
    for target, gpus, listed, asked, on_cpu in (
        ("train_asked-tiny-qwen2", 1, "", 4, 1),
        ("generate_asked-tiny-qwen2", 1, "", 2, 1),
        ("generate_asked-tiny-qwen2", 2, "", None, 1),
        ("generate_asked-tiny-qwen2", 1, "NVIDIA H100, 570.1, 81559 MiB", 2, 0),
        (prepared, 1, "", None, 0),  # no job of this call asks for any
    ):
        driver.write_text(f"#!/bin/sh\necho '{listed}'\n", encoding="utf-8")
        driver.chmod(0o755)
        result = snakemake(
            workspace, target, "--forceall", "--snakefile", "ask.smk",
            overlays=(*SMALL_STUDY, models), gpus=gpus,
            PATH=f"{driver.parent}:{os.environ['PATH']}",
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        found = re.findall(r"jobs ask for (\d) GPUs and get \d", result.stdout)
        assert found == ([] if asked is None else [str(asked)])
        found = re.findall(r"for a GPU \(models.*?\): (\d)\. nvidia-smi shows none", result.stdout)
        assert found == ([str(on_cpu)] if on_cpu else [])


def test_a_cluster_that_counts_gpus_in_gres_alone_trains_on_all_of_them(workspace: Path) -> None:
    four = overlay(workspace, "four.yaml", {"models": {"tiny-qwen2": {"gpus": 4, "threads": 8}}})
    asked = (
        "train_sft:gpu=0",
        "train_sft:gres=gpu:a100:4",
        "generate:gpu=0",
        "generate:gres=gpu:1",
    )
    shown = snakemake(
        workspace, "-n", "-p", "--set-resources", *asked, overlays=(*SMALL_STUDY, four)
    ).stdout
    # 8 threads are cut to the 2 cores of this call.
    start = "OMP_NUM_THREADS=1 python scripts/with_gpus.py 4 python -m torch.distributed.run"
    assert re.search(
        rf"command: {re.escape(start)} .* --nproc-per-node 4 scripts/train_sft\.py ", shown
    )
    assert "command: python scripts/with_gpus.py 1 python scripts/generate.py " in shown


def test_the_comparison_has_one_row_for_each_method(finished: Path) -> None:
    table = pl.read_csv(finished / "artifacts" / "results" / "small" / "comparison.csv")
    assert table["method"].to_list() == ["base", "sft", "expert_iteration", "dpo", "grpo"]
    assert table["num_problems"].to_list() == [20] * 5
    assert set(table.columns) >= {
        "model", "method", "suite", "num_seeds", "num_problems", "accuracy", "accuracy_ci_low",
        "accuracy_ci_high", "delta_vs_parent", "pass_at_1", "mean_completion_tokens",
        "truncated_fraction", "train_seconds", "generate_seconds",
    }  # fmt: skip
    trained = table.filter(pl.col("method") != "base")
    assert trained["train_seconds"].null_count() == 0
    for name in ("comparison.md", "comparison.parquet", "pairs.csv", "figures/accuracy.svg",
                 "figures/accuracy.png", "figures/reward.svg", "figures/reward.png",
                 "report.html"):  # fmt: skip
        assert (finished / "artifacts" / "results" / "small" / name).stat().st_size > 0


def test_a_study_killed_three_times_ends_as_one_that_nobody_has_disturbed(
    finished: Path,
    workspace: Path,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It drops its weights, which are the same to the byte, and its hashes have another seed."""
    seed = int(os.environ.get("GSM8K_KILL_SEED") or random.randrange(10**6))
    num_jobs = num_finished(finished)
    moments = moments_of_kills(num_jobs, seed)
    print(f"GSM8K_KILL_SEED={seed}: kills after so many jobs, and so many seconds: {moments}")
    drops = overlay(workspace, "drops.yaml", {"study": {"keep_models": "none"}})
    overlays, links = (*SMALL_STUDY, drops), tmp_path / "weights"
    with (tmp_path / "output.txt").open("w+", encoding="utf-8") as output:
        for call, moment in enumerate(moments, start=1):
            process = start_study(workspace, output, drops, PYTHONHASHSEED="7")
            kill_at(moment, call, num_jobs, process, workspace, links)
            for path in outputs(workspace):
                assert_whole(workspace / path, finished / path)
            assert snakemake(workspace, "--unlock", overlays=overlays).returncode == 0
        with start_study(workspace, output, drops, PYTHONHASHSEED="7") as process:
            watch(process, workspace, links, until=lambda: False)
        output.seek(0)
        assert process.returncode == 0, output.read()
    assert processes_in(workspace) == []
    # Where the code is edited meanwhile, a flag says so.
    tables = [
        read_comparison(folder / "artifacts/results/small/comparison.csv").drop("flags")
        for folder in (workspace, finished)
    ]
    assert tables[0].equals(tables[1])
    undisturbed = trained_weights(finished)
    # Those between two rounds live for a second: a busy machine may miss them.
    seen = [name for name in undisturbed if any((links / name).glob("*"))]
    assert all("round" in name for name in undisturbed.keys() - {*seen}) and seen
    for name in seen:
        made = [link.read_bytes() for link in (links / name).iterdir()]
        assert set(made) == {undisturbed[name].read_bytes()}, name
    # A kill between the last use of weights and their removal leaves them.
    assert len(trained_weights(workspace)) <= NUM_KILLS < len(undisturbed)
    ends = [{path for path in outputs(folder) if path.parent.name != "model"}
            for folder in (workspace, finished)]  # fmt: skip
    assert ends[0] == ends[1]
    for path in ends[0]:
        assert_whole(workspace / path, finished / path)
    assert not list((workspace / "artifacts").rglob(FINISHED))
    assert not list((workspace / "artifacts").rglob("*.partial"))
    assert planned_jobs(workspace, overlays=overlays) == {}
    monkeypatch.chdir(workspace)
    assert script("verify").main(["--study", "small"]) == 0
    assert "as study.keep_models says" in capsys.readouterr().out


def test_how_often_snakemake_measures_a_job_is_still_its_own_setting() -> None:
    """rules/common.smk sets it by its name, which is no public one."""
    rules = (ROOT / "rules" / "common.smk").read_text(encoding="utf-8")
    (name,) = re.findall(r"^snakemake\.benchmark\.(\w+) = ", rules, re.MULTILINE)
    assert isinstance(getattr(snakemake_benchmark, name), float)


def test_snakemakes_own_report_holds_the_report_tables_and_figures(finished: Path) -> None:
    result = snakemake(finished, "--report", "snakemake-report.zip")
    assert result.returncode == 0, result.stdout
    with zipfile.ZipFile(finished / "snakemake-report.zip") as archive:
        names = {Path(name).name for name in archive.namelist()}
        (index,) = [name for name in archive.namelist() if name.count("/") == 1]
        page = archive.read(index).decode("utf-8")
    assert names >= {"report.html", "comparison.html", "accuracy.svg", "cost.svg", "reward.svg"}
    assert "all completions with their grades" in page  # the report's caption
    for category in ("Report", "Tables", "Figures"):
        assert f'"{category}"' in page


def test_the_command_that_the_report_gives_for_overlap_plans_that_alone(finished: Path) -> None:
    page = (finished / "artifacts/results/small/report.html").read_text(encoding="utf-8")
    (command,) = re.findall(r"snakemake ([\w/.]+overlap\.md [-\w ]+ --configfile) FILE,", page)
    result = run_snakemake(finished, *command.split(), *SMALL_STUDY, "-n")
    assert result.returncode == 0, result.stdout
    assert re.findall(r"^check_overlap +1$", result.stdout, re.M)


def test_logs_and_benchmarks_stand_beside_every_run(finished: Path) -> None:
    run = finished / CELLS / "grpo" / "seed0"
    assert {path.name for path in (run / "logs").iterdir()} == {
        "train_grpo.log", "generate_debug.log", "grade_debug.log",
    }  # fmt: skip
    assert (run / "benchmarks" / "train_grpo.tsv").read_text(encoding="utf-8").startswith("s\t")
    assert not (run / "state").exists()
    assert not list((finished / "artifacts").rglob(FINISHED))  # every model was read
    assert not list((finished / "artifacts").rglob("*.partial"))


def test_expert_iteration_trains_each_round_on_correct_completions(finished: Path) -> None:
    run = finished / CELLS / "expert_iteration" / "seed0"
    train = read_problems(finished / "artifacts" / "arithmetic_debug" / "train.jsonl")
    gold = {problem.id: problem.gold for problem in train}
    for folder in (run / "round1", run / "round2"):
        rows = read_jsonl(folder / "demonstrations.jsonl")
        assert rows
        assert all(is_correct(row["completion"], gold[row["problem_id"]], "strict") for row in rows)
    first = {row["problem_id"] for row in read_jsonl(run / "round1" / "completions.jsonl")}
    second = {row["problem_id"] for row in read_jsonl(run / "round2" / "completions.jsonl")}
    assert first != second
    assert read_json(run / "train" / "summary.json")["num_rounds"] == 2
    assert (run / "model" / "model.safetensors").read_bytes() == (
        run / "round2" / "model" / "model.safetensors"
    ).read_bytes()


def test_the_invocation_has_a_manifest(finished: Path) -> None:
    (folder,) = list((finished / "artifacts" / "runs").iterdir())
    assert re.fullmatch(r"\d{8}T\d{6}Z_[0-9a-z]{5,8}", folder.name)
    manifest = read_json(folder / "run_manifest.json")
    assert manifest["state"] == "succeeded"
    assert manifest["study"] == "small"
    assert manifest["config"]["study"]["methods"][-1] == "grpo"
    assert read_json(folder / "sys" / "host.json")["logical_cpus"] >= 1
    lock = (folder / "locks" / "requirements.lock.txt").read_text(encoding="utf-8")
    assert "torch==" in lock and "snakemake==" in lock


def test_sigterm_within_the_last_job_leaves_a_study_that_is_whole(
    finished: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace, symlinks=True)
    results = workspace / "artifacts" / "results" / "small"
    for name in ("report.html", "logs/report.log", "SHA256SUMS"):
        (results / name).unlink()
    log = str((results / "logs" / "report.log").relative_to(workspace))
    before = states_of_calls(workspace)
    stopped(workspace, log, words_of(), lambda process: process.terminate())
    assert states_of_calls(workspace) == [*before, "succeeded"]
    assert "report.html" in (results / "SHA256SUMS").read_text(encoding="utf-8")


def test_verify_finds_one_flipped_byte_in_every_file_of_rounds_and_pairs_too(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    names = {path.name for path in files_of("small")}
    assert {"demonstrations.jsonl", "pairs.jsonl", "completions.stats.json"} <= names
    assert unnoticed_flips("small") == []


def test_a_finished_study_has_nothing_to_do(finished: Path) -> None:
    assert planned_jobs(finished) == {}


def test_a_changed_learning_rate_reruns_that_method_and_what_follows(finished: Path) -> None:
    changed = overlay(finished, "lr.yaml", {"methods": {"grpo": {"learning_rate": 2e-4}}})
    assert planned_jobs(finished, overlays=(*SMALL_STUDY, changed)) == {
        "train_grpo": 1, "generate": 1, "grade": 1, "compare": 1, "plot": 1, "report": 1,
        "all": 1, "total": 7,
    }  # fmt: skip


def test_an_edit_of_a_custom_reward_trains_again_what_uses_it_and_nothing_else(
    finished: Path,
) -> None:
    def grpo(custom: str) -> dict:
        reward = {"custom": custom, "custom_weight": 0.1}
        return {"kind": "grpo", "from": "base", "num_steps": 1, "reward": reward}

    overlays = (*SMALL_STUDY, "reward.yaml")
    study = {"name": "rewarded", "methods": ["plain", "mine"]}
    plain = {"kind": "grpo", "from": "base", "num_steps": 1}
    trained = "artifacts/experiments/rewarded/tiny-qwen2/mine/seed0/train/metrics.jsonl"
    targets = (trained, trained.replace("mine", "plain"))
    (finished / "my_reward.py").write_text(
        "def short(completion, gold):\n    return -len(completion) / 100\n", encoding="utf-8"
    )
    mistyped = {"plain": plain, "mine": grpo("my_rewrad:short")}
    overlay(finished, "reward.yaml", {"study": study, "methods": mistyped})
    refused = snakemake(finished, "-n", *targets, overlays=overlays)
    assert refused.returncode != 0
    assert "methods.mine.reward.custom: 'my_rewrad:short': no module 'my_rewrad'" in refused.stdout
    methods = {"plain": plain, "mine": grpo("my_reward:short")}
    overlay(finished, "reward.yaml", {"study": study, "methods": methods})
    result = snakemake(finished, *targets, overlays=overlays)
    assert result.returncode == 0, result.stdout
    assert planned_jobs(finished, *targets, overlays=overlays) == {}
    with (finished / "my_reward.py").open("a", encoding="utf-8") as code:
        code.write("# edited\n")
    assert planned_jobs(finished, *targets, overlays=overlays) == {"train_grpo": 1, "total": 1}
    again = snakemake(finished, *targets, overlays=overlays)
    assert "Trainings that had finished and are made again: 1." in again.stdout
    assert (
        f"The first is that of {trained.replace('metrics.jsonl', 'summary.json')};" in again.stdout
    )


def test_one_more_round_of_expert_iteration_trains_none_of_those_before(finished: Path) -> None:
    changed = overlay(finished, "rounds.yaml", {"methods": {"expert_iteration": {"rounds": 3}}})
    assert planned_jobs(finished, overlays=(*SMALL_STUDY, changed)) == {
        "generate_round": 1, "select_completions": 1, "train_round": 1, "finish_rounds": 1,
        "generate": 1, "grade": 1, "compare": 1, "plot": 1, "report": 1, "all": 1, "total": 10,
    }  # fmt: skip


def test_a_changed_parent_reruns_all_that_starts_from_it(finished: Path) -> None:
    changed = overlay(finished, "sft.yaml", {"methods": {"sft": {"learning_rate": 2e-4}}})
    jobs = planned_jobs(finished, overlays=(*SMALL_STUDY, changed))
    assert jobs["train_sft"] == jobs["train_dpo"] == jobs["train_grpo"] == 1
    assert jobs["train_round"] == 2
    assert jobs["generate"] == 4  # not the base model


def test_what_snakemake_has_no_record_of_is_not_compared_if_it_was_made_with_other_settings(
    finished: Path, tmp_path: Path
) -> None:
    """As a job leaves it that goes on when its snakemake, on another node, has been killed."""
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace, symlinks=True)
    grpo = f"{CELLS}/grpo/seed0/settings.json"  # from which nothing else starts
    stats = f"{CELLS}/sft/seed0/completions/debug.stats.json"
    made, sampled = read_json(workspace / grpo), read_json(workspace / stats)
    wanted = made["method_settings"]["learning_rate"]
    made["method_settings"]["learning_rate"] = 0.5
    sampled["settings"]["suite_settings"]["max_new_tokens"] = 99
    write_json(workspace / grpo, made)
    write_json(workspace / stats, sampled)
    target = "artifacts/results/small/comparison.csv"
    refused = snakemake(workspace, target)
    assert refused.returncode == 1
    asks = "the study asks for"
    assert f"{grpo}: method_settings.learning_rate is 0.5, {asks} {wanted}\n" in refused.stdout
    assert f"{stats}: suite_settings.max_new_tokens is 99, {asks} " in refused.stdout
    remedy = ["--forcerun", stats, grpo]
    assert " ".join(remedy) in refused.stdout
    again = snakemake(workspace, target, *remedy)
    assert again.returncode == 0, again.stdout
    assert planned_jobs(workspace, target) == {}


def test_a_round_that_a_method_does_not_have_is_no_target(workspace: Path) -> None:
    refused = snakemake(workspace, f"{CELLS}/sft/seed0/round1/completions.jsonl", "-n")
    assert refused.returncode != 0
    assert "MissingRuleException" in refused.stdout and "Traceback" not in refused.stdout
    refused = snakemake(workspace, f"{CELLS}/expert_iteration/seed0/round3/model", "-n")
    assert refused.returncode != 0
    assert "expert_iteration has no round 3, but 2" in refused.stdout


def test_a_job_of_a_call_has_the_settings_that_the_call_began_with(workspace: Path) -> None:
    overlays = [ROOT / "studies" / "debug.yaml", workspace / "small.yaml"]
    config = load_config(ROOT / "config.yaml", overlays)
    name = Invocation(workspace / "artifacts" / "runs").start(config)
    edited = overlay(workspace, "edited.yaml", {"methods": {"sft": {"learning_rate": 0.5}}})
    training = (f"{CELLS}/sft/seed0/model", "--forceall", "-n", "-p")
    for mode, rate in (("remote", 0.006), ("default", 0.5)):
        shown = snakemake(
            workspace, *training, "--mode", mode,
            overlays=(*SMALL_STUDY, edited), GSM8K_INVOCATION=name,
        )  # fmt: skip
        (command,) = [line for line in shown.stdout.splitlines() if "train_sft.py" in line]
        assert f'"learning_rate": {rate},' in command


def test_an_added_suite_trains_nothing_again(finished: Path) -> None:
    more = {
        "study": {"suites": ["debug", "more"]},
        "suites": {"more": {"dataset": "arithmetic_debug", "limit": 10, "max_new_tokens": 16}},
    }
    jobs = planned_jobs(finished, overlays=(*SMALL_STUDY, overlay(finished, "more.yaml", more)))
    assert jobs == {
        "generate": 5, "grade": 5, "compare": 1, "plot": 1, "report": 1, "all": 1, "total": 14,
    }  # fmt: skip


@pytest.mark.parametrize("grading", ["flexible", "lm_eval_strict", "math_verify"])
def test_another_grade_that_counts_generates_and_trains_nothing(
    finished: Path, grading: str
) -> None:
    changed = overlay(finished, "grading.yaml", {"suites": {"debug": {"grading": grading}}})
    assert planned_jobs(finished, overlays=(*SMALL_STUDY, changed)) == {
        "grade": 5, "compare": 1, "plot": 1, "report": 1, "all": 1, "total": 9,
    }  # fmt: skip


def test_another_size_of_the_report_makes_the_report_again_and_no_table(finished: Path) -> None:
    larger = overlay(finished, "larger.yaml", {"study": {"report_megabytes": 30}})
    assert planned_jobs(finished, overlays=(*SMALL_STUDY, larger)) == {
        "report": 1, "all": 1, "total": 2,
    }  # fmt: skip


def test_code_triggers_reruns_only_where_the_study_asks_for_it(finished: Path) -> None:
    asked = overlay(finished, "code.yaml", {"study": {"rerun_on_code_change": True}})
    assert planned_jobs(finished, overlays=(*SMALL_STUDY, asked))["train_sft"] == 1


def test_a_rule_that_is_worded_anew_reruns_nothing(finished: Path) -> None:
    rules = finished / "rules"
    rules.unlink()
    shutil.copytree(ROOT / "rules", rules)
    for name in ("train.smk", "data.smk", "common.smk"):
        text = (rules / name).read_text(encoding="utf-8").replace('"python ', '"python  ')
        # What a rule's script is called is a part of its command, not of what it is made with.
        (rules / name).write_text(text.replace('f"scripts/', 'f"scripts/./'))
    try:
        assert planned_jobs(finished) == {}
    finally:
        shutil.rmtree(rules)
        rules.symlink_to(ROOT / "rules")


def test_what_running_out_of_memory_changes_reruns_nothing_and_reaches_the_job(
    finished: Path,
) -> None:
    memory = {
        "vllm": {"rollout_gpu_memory_fraction": 0.2, "kv_cache_gib": 0.5},
        "defaults": {
            kind: {"tokens_per_microbatch": 512, "gradient_checkpointing": True}
            for kind in ("sft", "expert_iteration", "dpo", "grpo")
        },
        "models": {"tiny-qwen2": {"completions_per_batch": 8}},
    }
    assert (
        planned_jobs(finished, overlays=(*SMALL_STUDY, overlay(finished, "m.yaml", memory))) == {}
    )
    (finished / CELLS / "grpo/seed0/model").rename(finished / "kept")
    try:
        shown = snakemake(
            finished, "-n", "-p", f"{CELLS}/grpo/seed0/model", overlays=(*SMALL_STUDY, "m.yaml")
        )
    finally:
        (finished / "kept").rename(finished / CELLS / "grpo/seed0/model")
    assert "--vllm-rollout-gpu-memory-fraction 0.2 --vllm-kv-cache-gib 0.5" in shown.stdout
    assert "--tokens-per-microbatch 512 --gradient-checkpointing true" in shown.stdout
    assert "--completions-per-batch 8" in shown.stdout


def test_one_deleted_file_is_rebuilt_alone(finished: Path) -> None:
    target = f"{CELLS}/grpo/seed0/metrics/debug.json"
    before = (finished / target).read_bytes()
    others = {
        path: path.stat().st_mtime_ns
        for path in (finished / "artifacts" / "experiments").rglob("*")
        if path.is_file() and "grpo" not in path.parts
    }
    (finished / target).unlink()
    result = snakemake(finished, target)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^grade\s+1$", result.stdout, re.M)
    assert re.search(r"^total\s+1$", result.stdout, re.M)
    assert (finished / target).read_bytes() == before
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in others.items())


def test_any_table_or_figure_that_is_deleted_is_made_again(finished: Path) -> None:
    names = {"comparison.html": "compare", "pairs.csv": "compare", "figures/cost.png": "plot"}
    for name, rule in names.items():
        path = finished / "artifacts/results/small" / name
        content = path.read_bytes()
        path.unlink()
        assert rule in planned_jobs(finished), name
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("deleted", "first_rule"),
    [
        (".", "train_grpo"),
        ("model", "train_grpo"),
        ("completions", "generate"),
    ],
)
def test_what_is_deleted_of_a_cell_is_made_again_with_the_tables_and_nothing_else(
    finished: Path, deleted: str, first_rule: str
) -> None:
    path = finished / CELLS / "grpo" / "seed0" / deleted
    path.rename(finished / "deleted")
    try:
        jobs = planned_jobs(finished)
    finally:
        (finished / "deleted").rename(path)
    cell = ["train_grpo", "generate", "grade"]
    rules = [*cell[cell.index(first_rule) :], "compare", "plot", "report", "all"]
    assert jobs == {**dict.fromkeys(rules, 1), "total": len(rules)}


def test_tables_can_be_had_without_a_cell_that_failed(finished: Path) -> None:
    rest = [name for name in SMALL_METHODS if name != "grpo"]
    without = overlay(finished, "without.yaml", {"study": {"methods": rest}})
    path = finished / CELLS / "grpo" / "seed0"
    path.rename(finished / "failed")
    try:
        whole = planned_jobs(finished)
        jobs = planned_jobs(finished, overlays=(*SMALL_STUDY, without))
    finally:
        (finished / "failed").rename(path)
    assert whole["train_grpo"] == 1
    assert jobs == {"compare": 1, "plot": 1, "report": 1, "all": 1, "total": 4}


def test_weights_that_a_study_does_not_keep_are_not_made_again(finished: Path) -> None:
    none = overlay(finished, "none.yaml", {"study": {"keep_models": "none"}})
    path = finished / CELLS / "grpo" / "seed0" / "model"
    path.rename(finished / "dropped")
    try:
        jobs = planned_jobs(finished, overlays=(*SMALL_STUDY, none))
    finally:
        (finished / "dropped").rename(path)
    assert jobs == {}


def test_weights_that_a_study_does_not_keep_are_dropped_after_their_last_use(
    workspace: Path,
) -> None:
    cells = [f"{CELLS}/{method}/seed0" for method in SMALL_METHODS if method != "base"]
    rounds = [f"{CELLS}/expert_iteration/seed0/round{number}" for number in (1, 2)]
    for keep, dropped in (("none", [*cells, *rounds]), ("final", rounds), ("all", [])):
        kept = overlay(workspace, "keep.yaml", {"study": {"keep_models": keep}})
        shown = snakemake(workspace, "-n", overlays=(*SMALL_STUDY, kept)).stdout
        removed = re.findall(r"Would remove temporary output (\S+)", shown)
        assert sorted(removed) == sorted(f"{folder}/model" for folder in dropped)


def test_a_bad_config_is_refused_before_any_job_without_a_traceback(workspace: Path) -> None:
    mistakes = {
        "study": {"seeds": [0, 0], "methods": ["sft", "grppo"]},
        "methods": {"sft": {"learning_rate": -1.0, "from": "nothing"}, "grpo": {"clip_hgih": 0.3}},
        "suites": {"arithmetic": {"dataset": "arithmetik"}},
    }
    result = snakemake(workspace, overlays=(overlay(workspace, "bad.yaml", mistakes),))
    assert result.returncode != 0
    for line in (
        "study.seeds: listed twice: 0",
        "study.methods: no method 'grppo'; did you mean 'grpo'?",
        "methods.sft.learning_rate: input should be greater than 0, found -1.0",
        "methods.sft.from: no method 'nothing'",
        "methods.grpo.clip_hgih: unknown key; did you mean 'clip_high'?",
        "suites.arithmetic.dataset: no dataset 'arithmetik'; did you mean 'arithmetic'?",
    ):
        assert line in result.stdout
    assert "Traceback" not in result.stdout
    assert not (workspace / "artifacts").exists()


def test_what_an_overlay_may_have_meant_otherwise_is_said_and_a_study_of_its_own_hears_nothing(
    workspace: Path,
) -> None:
    inherited = "defaults.sft.learning_rate (0.004): made for the embedded model"
    nameless = "The study has the name that config.yaml gives, 'default'"
    toys = "study.dataset: arithmetic, which the methods learn from, is inherited"
    study = {
        "models": ["smollm2-135m-instruct"], "methods": ["base", "sft"], "suites": ["gsm8k"],
    }  # fmt: skip
    real = overlay(workspace, "real.yaml", {"study": study})
    said = snakemake(workspace, "-n", overlays=(real,)).stdout
    assert said.count(inherited) == said.count(nameless) == said.count(toys) == 1
    assert "take the place of those in artifacts/experiments/default." in said
    for quiet in (snakemake(workspace, "-n"), snakemake(workspace, "-n", overlays=())):
        assert quiet.returncode == 0
        assert not any(doubt in quiet.stdout for doubt in (inherited, nameless, toys))
    by_hand = snakemake(workspace, "-n", "--config", 'study={"suites": ["gsm8k"]}', overlays=())
    assert toys in by_hand.stdout


def test_data_that_is_not_the_pinned_one_stops_with_one_clear_line(workspace: Path) -> None:
    data = workspace / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(
            '{"question": "q", "answer": "a\\n#### 1"}\n', encoding="utf-8"
        )
    result = snakemake(workspace, "artifacts/gsm8k/train.jsonl", GSM8K_DIR=str(data))
    assert result.returncode != 0
    assert "/train.jsonl is not the pinned one: 1 rows with content digest" in result.stdout
    assert "Traceback" not in result.stdout
    assert not list((workspace / "artifacts").rglob("*.jsonl"))


def test_a_local_model_that_changes_and_data_with_new_digests_are_prepared_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(finished))
    model, data = finished / "my model", finished / "my data"
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
    data.mkdir()
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", rows)
    digests = dict.fromkeys(("train", "test"), content_digest(rows))
    dataset = {"kind": "gsm8k", "path": "~/my data", "num_val": 1, "digests": digests}
    settings = {
        "study": {"dataset": "mine"},
        "models": {"mine": {"source": "path", "path": "./my model", "prompt": "plain"}},
        "datasets": {"mine": dataset},
    }
    overlays = (*SMALL_STUDY, overlay(finished, "local.yaml", settings))
    targets = ("artifacts/models/mine", "artifacts/mine/train.jsonl")
    shutil.copytree(finished / "artifacts" / "models" / "tiny-qwen2", model)
    result = snakemake(finished, *targets, overlays=overlays)
    assert result.returncode == 0, result.stdout
    # Of data the digests count: what is only newer, or lies elsewhere, is as it was.
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", rows)
    data.rename(finished / "moved")
    overlay(
        finished, "local.yaml", {**settings, "datasets": {"mine": {**dataset, "path": "moved"}}}
    )
    assert planned_jobs(finished, *targets, overlays=overlays) == {}
    # What is wrong with rows is said before any job, and what there was of them stays.
    for how, changed, fault in (
        ("-n", [*rows, {"question": "?", "answer": "none"}], "row 4: no '#### <number>' at the"),
        ("-p", rows[:2], "train.jsonl is not the pinned one: 2 rows with content digest"),
    ):
        write_jsonl(finished / "moved" / "train.jsonl", changed)
        result = snakemake(finished, *targets, how, overlays=overlays)
        assert result.returncode != 0
        assert "These data cannot be used:\n  datasets.mine: moved/train" in result.stdout
        assert fault in result.stdout
    # So it is where a job is asked for and nothing looks newer: the rows have gone.
    (finished / "moved" / "train.jsonl").rename(finished / "away.jsonl")
    forced = snakemake(finished, targets[1], "--forcerun", "prepare_data", overlays=overlays)
    assert forced.returncode != 0
    assert "  datasets.mine: moved/train.jsonl: no such file" in forced.stdout
    (finished / "away.jsonl").rename(finished / "moved" / "train.jsonl")
    assert len(read_jsonl(finished / "artifacts" / "mine" / "train.jsonl")) == 2
    digests = {"train": content_digest(rows[:2]), "test": content_digest(rows)}
    again = {"mine": {**dataset, "path": "moved", "digests": digests}}
    overlay(finished, "local.yaml", {**settings, "datasets": again})
    # Of small files of weights Snakemake compares the content.
    (model / "model.safetensors").write_bytes(b"trained further")
    result = snakemake(finished, "-n", *targets, overlays=overlays)
    assert re.search(r"^prepare_data +1$", result.stdout, re.M)
    assert re.search(r"^prepare_model +1$", result.stdout, re.M)
    assert (
        "Prepared before from other settings: artifacts/mine (digests.train was "
        f"'{content_digest(rows)}', is '{content_digest(rows[:2])}'" in result.stdout
    )


def test_packages_that_jobs_would_miss_are_named_before_anything_is_removed(finished: Path) -> None:
    # In a study that has finished, settings that need them are new runs.
    def content() -> dict[Path, bytes]:
        paths = (path for path in (finished / "artifacts").rglob("*") if "runs" not in path.parts)
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = content()
    vllm = overlay(finished, "extras.yaml", {"models": {"tiny-qwen2": {"engine": "vllm"}}})
    result = snakemake(finished, overlays=(*SMALL_STUDY, vllm))
    assert result.returncode != 0
    assert "  models.tiny-qwen2.engine: vllm is not installed here: run `uv sync" in result.stdout
    assert "Traceback" not in result.stdout
    assert content() == before


def test_a_path_that_is_not_there_is_refused_though_something_was_prepared_under_that_name(
    finished: Path,
) -> None:
    settings = {
        "study": {"methods": ["base", "grpo"], "dataset": "typo"},
        "models": {"tiny-qwen2": {"source": "path", "path": "weights/typo"}},
        "datasets": {"typo": {"kind": "gsm8k", "path": "data/typo"}},
        "methods": {"grpo": {"from": "base", "reward": {"custom": "no_such_module:f"}}},
    }
    lost = overlay(finished, "lost.yaml", settings)
    for how in (["-n"], [], ["artifacts/models/tiny-qwen2"]):
        result = snakemake(finished, *how, overlays=(*SMALL_STUDY, lost))
        assert result.returncode != 0
        lines = [
            "3 mistakes in the config:",
            "  models.tiny-qwen2.path: no folder 'weights/typo'; name the folder of a model",
            "  datasets.typo.path: no folder 'data/typo'; name a folder with train.jsonl and "
            "test.jsonl",
            "  methods.grpo.reward.custom: 'no_such_module:f': no module 'no_such_module' here; "
            "put its folder on PYTHONPATH",
        ]
        assert "\n".join(lines) in result.stdout
        assert "Traceback" not in result.stdout
    unlocked = snakemake(finished, "--unlock", overlays=(*SMALL_STUDY, lost))
    assert unlocked.returncode == 0, unlocked.stdout


@pytest.mark.parametrize("study", sorted(path.name for path in (ROOT / "studies").glob("*.yaml")))
def test_every_study_plans_and_so_does_its_debug_form(workspace: Path, study: str) -> None:
    assert planned_jobs(workspace, overlays=(f"studies/{study}",))["all"] == 1
    if study != "debug.yaml":
        debug = (f"studies/{study}", "studies/debug.yaml")
        assert planned_jobs(workspace, overlays=debug)["all"] == 1


def test_what_needs_a_gpu_asks_for_one(workspace: Path) -> None:
    plan = snakemake(workspace, "-n", overlays=("studies/qwen2.5-gsm8k.yaml",)).stdout

    def jobs_of(rule: str) -> list[str]:
        # Jobs of a group stand indented below it.
        return re.findall(rf"^ *rule {rule}:\n(?:    .*\n)+", plan, re.M)

    for rule in ("train_grpo", "train_sft", "generate", "generate_round", "train_round"):
        assert jobs_of(rule) and all("gpu=1" in job for job in jobs_of(rule))
    for rule in ("grade", "select_completions", "compare", "plot", "prepare_data"):
        assert jobs_of(rule) and not any("gpu=" in job for job in jobs_of(rule))
    assert "gpu=1," not in snakemake(workspace, "-n", overlays=()).stdout  # tiny-qwen2 needs none
