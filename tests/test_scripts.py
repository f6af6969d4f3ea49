"""The scripts that do not train: data, models, completions, selection, joined rounds."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gsm8k_core.config import Config, EvaluationSettings, dump, merge
from gsm8k_core.data import content_digest
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.errors import ConfigError, DataError, ModelError
from gsm8k_core.files import (
    FINISHED,
    read_json,
    read_jsonl,
    seed_from,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)
from gsm8k_core.models import load_tokenizer, save_model, tiny_model
from gsm8k_core.problems import read_problems, write_problems

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ["--config", str(ROOT / "config.yaml")]
Script = Callable[[str], ModuleType]
Row = dict[str, Any]


# prepare_data


def test_prepared_data_has_its_splits_and_a_manifest_that_fits(arithmetic_folder: Path) -> None:
    manifest = read_json(arithmetic_folder / "manifest.json")
    assert manifest["dataset"] == "arithmetic" and manifest["source"] == "generated"
    assert manifest["settings"]["num_test"] == 40
    for split, num_problems in (("train", 1000), ("val", 20), ("test", 40)):
        path = arithmetic_folder / f"{split}.jsonl"
        assert len(read_problems(path)) == manifest[split]["num_problems"] == num_problems
        assert manifest[split]["sha256"] == sha256_file(path)
        rows = [{**row, "id": None} for row in read_jsonl(path)]  # as the source has them
        assert manifest[split]["content_digest"] == content_digest(rows)


def test_data_that_is_prepared_twice_is_the_same(
    arithmetic_folder: Path, script: Script, tmp_path: Path
) -> None:
    settings = json.dumps(read_json(arithmetic_folder / "manifest.json")["settings"])
    arguments = ["--dataset", "a", "--settings", settings, "--output-dir", str(tmp_path)]
    assert script("prepare_data").main(arguments) == 0
    for split in ("train", "val", "test"):
        again = (tmp_path / f"{split}.jsonl").read_bytes()
        assert again == (arithmetic_folder / f"{split}.jsonl").read_bytes()


def test_gsm8k_is_prepared_from_a_local_folder(script: Script, tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1:,}"} for i in range(998, 1010)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    digest = content_digest(rows)
    settings = {
        "kind": "gsm8k", "path": str(tmp_path), "num_val": 2,
        "digests": {"train": digest, "test": digest},
    }  # fmt: skip
    output = tmp_path / "gsm8k"
    arguments = ["--dataset", "gsm8k", "--settings", json.dumps(settings)]
    script("prepare_data").main([*arguments, "--output-dir", str(output)])
    manifest = read_json(output / "manifest.json")
    assert manifest["source"] == "local folder"
    assert manifest["test"]["content_digest"] == digest
    assert [manifest[split]["num_problems"] for split in ("train", "val", "test")] == [10, 2, 12]
    assert read_problems(output / "test.jsonl")[1].gold == "1000"


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [("prepare_data", "--dataset", "arithmetc"), ("prepare_model", "--model-name", "tiny")],
)
def test_a_name_that_the_config_has_not_says_which_there_are(
    script: Script, tmp_path: Path, name: str, flag: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: no '{value}'.* there are: "):
        script(name).main([flag, value, *CONFIG, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# prepare_model


def test_a_prepared_model_has_a_manifest_of_its_files(tiny_folder: Path) -> None:
    manifest = read_json(tiny_folder / "manifest.json")
    assert manifest["model"] == "tiny-qwen2"
    assert manifest["architecture"] == "Qwen2ForCausalLM"
    for name, digest in manifest["files"].items():
        assert sha256_file(tiny_folder / name) == digest
    assert {path.name for path in tiny_folder.iterdir()} == {*manifest["files"], "manifest.json"}


def test_a_model_that_fails_leaves_the_old_one_and_nothing_else(
    script: Script, tmp_path: Path
) -> None:
    output = tmp_path / "m"
    write_text(output / "config.json", "old")
    settings = json.dumps({"source": "path", "path": str(tmp_path / "none")})
    arguments = ["--model-name", "m", "--settings", settings, "--output-dir", str(output)]
    with pytest.raises(ModelError, match=r"no config\.json"):
        script("prepare_model").main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (output / "config.json").read_text(encoding="utf-8") == "old"


# generate


class Job:
    """One call of scripts/generate.py, on six problems of the tiny model."""

    def __init__(self, module: ModuleType, folder: Path, model: Path, data: Path) -> None:
        self.module, self.folder, self.model, self.data = module, folder, model, data
        self.settings: Row = {}

    @property
    def output(self) -> Path:
        return self.folder / "completions" / "arithmetic.jsonl"

    @property
    def partial(self) -> Path:
        return self.output.with_name("arithmetic.jsonl.partial")

    @property
    def stats(self) -> Path:
        return self.folder / "arithmetic.stats.json"

    def run(self) -> list[Row]:
        code = self.module.main(
            ["--settings", json.dumps(self.settings), "--model", str(self.model),
             "--data", str(self.data), "--output", str(self.output), "--stats", str(self.stats)]
        )  # fmt: skip
        assert code == 0
        return read_jsonl(self.output)


@pytest.fixture
def job(
    script: Script, config: Config, tiny_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> Callable[..., Job]:
    """`job(folder name, batch_size=, **suite)`."""

    def build(name: str = "run", batch_size: int = 6, **suite: Any) -> Job:
        built = Job(
            script("generate"), tmp_path / name, tiny_folder, arithmetic_folder / "test.jsonl"
        )
        settings = config.evaluation_settings("tiny-qwen2", "base", 0, "arithmetic")
        suite = {"limit": 6, "num_samples": 2, "max_new_tokens": 8, **suite}
        built.settings = merge(
            json.loads(dump(settings)),
            {"suite_settings": suite, "model_settings": {"completions_per_batch": batch_size}},
        )
        return built

    return build


def test_completions_are_in_the_order_of_the_problems_greedy_first(job: Callable[..., Job]) -> None:
    this = job()
    rows = this.run()
    problems = read_problems(this.data)[:6]
    assert [(r["problem_id"], r["decoding"], r["sample_index"]) for r in rows] == [
        (problem.id, decoding, index)
        for problem in problems
        for decoding, index in (("greedy", 0), ("sample", 0), ("sample", 1))
    ]
    gold = {problem.id: problem.gold for problem in problems}
    cluster = {problem.id: problem.cluster for problem in problems}
    tokenizer = load_tokenizer(this.model)
    for row in rows:
        assert row["gold"] == gold[row["problem_id"]]
        assert row["num_tokens"] == len(row["token_ids"]) <= 8
        assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["finish_reason"] in ("stop", "length")
        assert row["cluster"] == cluster[row["problem_id"]]


@pytest.mark.parametrize(("folder", "goes"), [("run", True), ("artifacts/runs/an_eval", False)])
def test_links_beside_a_model_go_when_its_study_reads_it_and_not_with_an_eval(
    job: Callable[..., Job],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    goes: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    this = job()
    this.model = Path("trained", "model")
    shutil.copytree(tiny_folder, this.model)
    write_text(Path("trained", FINISHED, "run.json"), "{}")
    this.folder = Path(folder)
    this.run()
    assert Path("trained", FINISHED).exists() is not goes


@pytest.mark.parametrize("likeliest", [{"top_k": 1}, {"top_p": 1e-6}])
def test_samples_among_the_likeliest_token_alone_are_the_greedy_completion(
    job: Callable[..., Job], likeliest: Row
) -> None:
    rows = job(**likeliest).run()
    by_problem = {
        row["problem_id"]: row["token_ids"] for row in rows if row["decoding"] == "greedy"
    }
    assert all(row["token_ids"] == by_problem[row["problem_id"]] for row in rows)


def test_completions_of_problems_without_a_cluster_have_none(job: Callable[..., Job]) -> None:
    this = job(limit=2, num_samples=0)
    plain = [replace(problem, cluster=None) for problem in read_problems(this.data)]
    this.data = this.folder / "plain.jsonl"
    write_problems(this.data, plain)
    assert list(this.run()[0]) == [
        "problem_id", "decoding", "sample_index", "gold", "completion", "token_ids",
        "num_tokens", "finish_reason",
    ]  # fmt: skip


def test_stats_add_up(job: Callable[..., Job]) -> None:
    this = job()
    rows, stats = this.run(), read_json(this.stats)
    assert stats["num_problems"] == 6 and stats["num_completions"] == len(rows) == 18
    assert stats["num_completion_tokens"] == sum(row["num_tokens"] for row in rows)
    tokenizer = load_tokenizer(this.model)
    prompts = [problem.question + "\n" for problem in read_problems(this.data)[:6]]
    assert stats["num_prompt_tokens"] == sum(map(len, tokenizer(prompts)["input_ids"]))
    assert EvaluationSettings.model_validate(stats["settings"]).suite_settings.limit == 6


def test_what_is_sampled_depends_on_problem_and_seed_alone(job: Callable[..., Job]) -> None:
    whole = job("whole").run()
    two = job("two", batch_size=1, limit=2)
    assert two.run() == whole[:6]
    more = job("more", num_samples=3).run()
    assert [row for row in more if row["sample_index"] < 2] == whole
    other_seed = job("seed")
    other_seed.settings["seed"] = 1
    samples = [row["token_ids"] for row in whole if row["decoding"] == "sample"]
    assert samples != [r["token_ids"] for r in other_seed.run() if r["decoding"] == "sample"]


def test_every_completion_is_asked_for_as_the_suite_says(job: Callable[..., Job]) -> None:
    this = job(temperature=0.7, max_new_tokens=9, stop=["Question:"])
    settings = EvaluationSettings.model_validate(this.settings)
    problem = read_problems(this.data)[0]
    asked = this.module.requests_for(problem, settings, load_tokenizer(this.model))
    assert [(len(one.seeds), one.temperature) for one in asked] == [(1, 0.0), (2, 0.7)]
    assert all((one.max_new_tokens, one.stop) == (9, ["Question:"]) for one in asked)


def test_sampling_seeds_are_those_of_the_contract(job: Callable[..., Job]) -> None:
    this = job()
    problem = read_problems(this.data)[0]
    settings = EvaluationSettings.model_validate(this.settings)
    greedy, sampled = this.module.requests_for(problem, settings, load_tokenizer(this.model))
    assert (greedy.temperature, sampled.temperature) == (0.0, 1.0)
    assert sampled.seeds == [seed_from(0, "arithmetic", problem.id, k) for k in (0, 1)]


def test_a_prompt_that_leaves_no_room_loses_its_beginning_and_is_counted(
    job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    this = job(max_new_tokens=490, num_samples=0)  # of the tiny model's 512 positions
    tokenizer = load_tokenizer(this.model)
    problems = read_problems(this.data)[:6]
    prompts = tokenizer([problem.question + "\n" for problem in problems])["input_ids"]
    long = sum(len(ids) > 512 - 490 for ids in prompts)
    assert long > 0
    this.run()
    assert read_json(this.stats)["num_prompts_truncated"] == long
    assert f"{long} of 6 prompts were too long" in caplog.text


def test_a_suite_that_leaves_no_room_for_any_prompt_says_so(job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match=r"suites\.arithmetic\.max_new_tokens.*512 positions"):
        job(max_new_tokens=512).run()


def test_a_shuffled_suite_takes_the_first_of_the_shuffled(job: Callable[..., Job]) -> None:
    this = job(shuffle_seed=5, limit=3, num_samples=0)
    expected = [problem.id for problem in read_problems(this.data)]
    random.Random(5).shuffle(expected)
    assert [row["problem_id"] for row in this.run()] == expected[:3]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job, int], None]:
    """`kill(job, n)`: run the job and end it within its n-th problem, from 1."""

    def run_until(this: Job, nth_problem: int) -> None:
        calls = 0
        decode = HfEngine._decode

        def counting(self: Any, requests: list[Any]) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3 * nth_problem - 1:
                raise Killed
            return decode(self, requests)

        with monkeypatch.context() as patch:
            patch.setattr(HfEngine, "_decode", counting)
            with pytest.raises(Killed):
                this.run()

    return run_until


# Each problem's three completions are three batches.
ONE_BY_ONE = {"batch_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [[4], [1], [1, 1, 3], [2, 2, 2], [6]])
def test_a_killed_job_goes_on_and_its_output_is_the_same_byte_for_byte(
    job: Callable[..., Job], kill: Callable[[Job, int], None], killed_in: list[int]
) -> None:
    whole = job("whole", **ONE_BY_ONE)
    whole.run()
    this = job("killed", **ONE_BY_ONE)
    for call in killed_in:
        kill(this, call)
        assert not this.output.exists() and this.partial.exists()
    this.run()
    assert this.output.read_bytes() == whole.output.read_bytes()
    counted = ("num_problems", "num_completions", "num_prompt_tokens", "num_completion_tokens")
    one, other = read_json(this.stats), read_json(whole.stats)
    assert {key: one[key] for key in counted} == {key: other[key] for key in counted}


@pytest.mark.slow
@pytest.mark.parametrize("tear", [1, 30, 10_000])
def test_a_torn_last_line_is_done_again(
    job: Callable[..., Job], kill: Callable[[Job, int], None], tear: int
) -> None:
    whole = job("whole", **ONE_BY_ONE)
    whole.run()
    this = job("torn", **ONE_BY_ONE)
    kill(this, 4)
    content = this.partial.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    this.partial.write_bytes(content[: max(last, len(content) - tear)] if tear < 10_000
                             else content[:40])  # fmt: skip
    this.run()
    assert this.output.read_bytes() == whole.output.read_bytes()


def batches_of(monkeypatch: pytest.MonkeyPatch, this: Job) -> list[int]:
    """Run the job; how many requests each batch held that it decoded."""
    asked: list[int] = []
    decode = HfEngine._decode

    def counting(self: Any, requests: list[Any]) -> Any:
        asked.append(len(requests))
        return decode(self, requests)

    monkeypatch.setattr(HfEngine, "_decode", counting)
    this.run()
    return asked


def test_finished_problems_are_not_sampled_again(
    job: Callable[..., Job], kill: Callable[[Job, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job(**ONE_BY_ONE)
    kill(this, 5)
    asked = batches_of(monkeypatch, this)
    assert len(asked) == 6  # three completions of two problems


def other_settings(this: Job, _tmp_path: Path) -> None:
    this.settings["suite_settings"]["temperature"] = 0.5


def other_weights(this: Job, tmp_path: Path) -> None:
    """The model was trained again: its settings, as this job knows them, are what they were."""
    tokenizer = load_tokenizer(this.model)
    model = tiny_model(tokenizer)
    model.model.norm.weight.data.mul_(3.0)
    save_model(model, tokenizer, tmp_path / "retrained")
    this.model = tmp_path / "retrained"


def other_problems(this: Job, tmp_path: Path) -> None:
    rows = read_jsonl(this.data)
    write_jsonl(tmp_path / "other.jsonl", [{**rows[i], "id": rows[~i]["id"]} for i in range(40)])
    this.data = tmp_path / "other.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_settings, other_weights, other_problems])
def test_what_was_begun_with_something_else_is_not_gone_on_with(
    job: Callable[..., Job],
    kill: Callable[[Job, int], None],
    tmp_path: Path,
    change: Callable[[Job, Path], None],
) -> None:
    this, fresh = job("killed", **ONE_BY_ONE), job("fresh", **ONE_BY_ONE)
    kill(this, 4)
    change(this, tmp_path)
    change(fresh, tmp_path)
    this.run()
    fresh.run()
    assert this.output.read_bytes() == fresh.output.read_bytes()


def test_what_another_engine_has_begun_is_not_gone_on_with(
    job: Callable[..., Job],
    kill: Callable[[Job, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    this = job(**ONE_BY_ONE)
    kill(this, 4)
    header, *rows = this.partial.read_text(encoding="utf-8").splitlines(keepends=True)
    assert '"engine": "transformers"' in header
    header = header.replace('"engine": "transformers"', '"engine": "vllm"')
    this.partial.write_text("".join([header, *rows]), encoding="utf-8", newline="\n")
    left = this.partial.read_bytes()
    asked = batches_of(monkeypatch, this)
    assert len(asked) == 18  # three completions of each of the six problems
    assert "aside 3 finished problems, which were generated with other engine\n" in caplog.text
    assert this.partial.read_bytes() == left
    # Rows of another version are not read, and of two the older file goes.
    other = this.partial.with_name("arithmetic.jsonl.other.partial")
    assert len(read_jsonl(other)) == 1 + 6
    other.write_text('{"engine": "other"}\n{"row": 1}\n', encoding="utf-8")
    os.utime(other, (0, 0))
    assert len(this.run()) == 18
    assert "dropping 1 finished problems, which were generated with other engine, " in caplog.text
    assert this.partial.read_bytes() == left and len(read_jsonl(other)) == 1 + 6


def test_what_was_left_aside_is_gone_on_with_where_it_fits_again(
    job: Callable[..., Job], kill: Callable[[Job, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """As on a cluster where one job gets a node whose GPU does not work."""
    whole = job("whole", **ONE_BY_ONE)
    whole.run()
    this = job("run", **ONE_BY_ONE)
    kill(this, 4)
    first = read_jsonl(this.partial)
    before = this.settings
    this.settings = merge(before, {"suite_settings": {"temperature": 0.5}})
    kill(this, 2)
    assert read_jsonl(this.partial) == first
    other = this.partial.with_name("arithmetic.jsonl.other.partial")
    second = read_jsonl(other)
    this.partial.unlink()
    kill(this, 3)
    assert read_jsonl(other)[: len(second)] == second and not this.partial.exists()
    write_jsonl(this.partial, first)
    this.settings = before
    with caplog.at_level("INFO"):
        this.run()
    assert f"resuming after {len(first) - 1} of 6 problems, from {this.partial}" in caplog.text
    assert read_jsonl(this.partial)[: len(first)] == first and len(first) > 2
    assert this.output.read_bytes() == whole.output.read_bytes()


def test_finished_problems_are_kept_until_the_completions_are_graded(
    job: Callable[..., Job], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job()
    this.run()
    rows, first = this.output.read_bytes(), read_json(this.stats)
    this.output.unlink()  # as Snakemake does with what it does not accept
    this.stats.unlink()
    monkeypatch.delattr(this.module, "start_engine")
    this.run()
    assert this.output.read_bytes() == rows
    again = read_json(this.stats)
    assert again["seconds_generating"] == first["seconds_generating"]
    assert [one["state"] for one in again["attempts"]] == ["finished", "finished"]
    assert again["attempts"][0] == first["attempts"][0] | {
        key: again["attempts"][0][key] for key in ("last_sign", "seconds_wall", "seconds_cpu")
    }

    other, lock = (this.output.with_name(name) for name in (
        "arithmetic.jsonl.other.partial", ".arithmetic.jsonl.lock"
    ))  # fmt: skip
    other.touch()
    lock.touch()  # of a job that generates them again
    grade = [
        "--completions", str(this.output), "--stats", str(this.stats), "--settings",
        '{"grading": "strict", "marker": "####"}', "--output", str(this.folder / "metrics.json"),
        "--grades", str(this.folder / "grades.parquet"),
    ]  # fmt: skip
    script("grade").main(grade)
    assert this.partial.exists() and other.exists()
    lock.unlink()
    script("grade").main(grade)
    assert list(this.output.parent.iterdir()) == [this.output]


def test_the_record_names_the_compute_type_that_was_used_and_the_completions(
    job: Callable[..., Job],
) -> None:
    this = job()
    this.settings["model_settings"]["dtype"] = "bfloat16"
    this.run()
    stats = read_json(this.stats)
    assert stats["dtype"] == "float32"  # a CPU without fast bfloat16, as all are taken to be
    assert stats["settings"]["model_settings"]["dtype"] == "bfloat16"
    assert stats["completions_sha256"] == sha256_file(this.output)


def test_more_memory_for_the_engine_goes_on_with_what_was_begun(
    job: Callable[..., Job], kill: Callable[[Job, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job(**ONE_BY_ONE)
    kill(this, 6)
    this.settings["model_settings"]["vllm"] = {"gpu_memory_fraction": 0.5}
    asked = batches_of(monkeypatch, this)
    assert len(asked) == 3


def test_a_model_shared_by_two_gpus_counts_the_seconds_of_both(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job()
    this.settings["model_settings"] |= {"gpus": 2, "vllm": {"tensor_parallel": 2}}
    start = this.module.start_engine
    stand_ins = {
        "resolve_device": lambda _: torch.device("cuda"),
        "choose_engine": lambda *_: "vllm",
        "start_engine": lambda folder, settings, *_: start(
            folder, settings, torch.device("cpu"), "transformers"
        ),
        "device_name": lambda _: "a GPU",
        "peak_memory_mb": lambda _: 0,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(this.module, name, stand_in)
    this.run()
    (attempt,) = read_json(this.stats)["attempts"]
    assert attempt["num_gpus"] == 2
    assert attempt["seconds_gpu"] == pytest.approx(2 * attempt["seconds_wall"], abs=0.11)


def test_an_engine_that_fails_to_shut_down_takes_no_completion_with_it(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_engine: HfEngine) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(HfEngine, "close", fail)
    this = job()
    assert len(this.run()) == 18
    assert "could not be shut down in order: CUDA error: unspecified" in caplog.text


def test_a_job_killed_while_its_engine_shuts_down_need_not_generate_anew(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_engine: HfEngine) -> None:
        raise Killed

    this = job()
    with monkeypatch.context() as patch:
        patch.setattr(HfEngine, "close", killed)
        with pytest.raises(Killed):
            this.run()
    assert this.partial.exists()
    monkeypatch.delattr(this.module, "start_engine")
    assert len(this.run()) == 18
    states = [one["state"] for one in read_json(this.stats)["attempts"]]
    assert states == ["killed", "finished"]


def test_a_job_killed_after_its_last_problem_starts_no_engine_again(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    this = job()
    with monkeypatch.context() as patch:
        patch.setattr(this.module, "write_jsonl", killed)
        with pytest.raises(Killed):
            this.run()
    monkeypatch.delattr(this.module, "start_engine")
    monkeypatch.setattr(this.module, "peak_memory_mb", lambda _: 0)  # as of a GPU left alone
    assert len(this.run()) == 18
    stats = read_json(this.stats)
    assert stats["engine"] == "transformers" and stats["peak_memory_mb"] > 10
    assert stats["seconds_loading"] > 0.001


@pytest.mark.parametrize("change", ["nothing", "code", "tokenizer"])
def test_finished_completions_are_generated_anew_where_nothing_was_taken_away_or_it_changed(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    this = job()
    first = this.run()
    if change != "nothing":
        this.output.unlink()
    if change == "code":
        monkeypatch.setattr(this.module, "code_digest", lambda: "0" * 64)
    elif change == "tokenizer":
        monkeypatch.setattr(this.module, "tokenizer_digest", lambda _: "0" * 64)
    assert batches_of(monkeypatch, this)
    assert read_jsonl(this.output) == first


def test_what_to_generate_must_be_said(script: Script, tmp_path: Path) -> None:
    paths = ["--model", "m", "--data", "d", "--output", "o", "--stats", "s"]
    with pytest.raises(ConfigError, match="say what to generate: --settings, or --model-name"):
        script("generate").main([*CONFIG, *paths])
    cell = ["--model-name", "tiny-qwen2", "--method"]
    both = ["--suite", "arithmetic", "--round", "1"]
    with pytest.raises(ConfigError, match="either --suite or --round"):
        script("generate").main([*CONFIG, *paths, *cell, "rft", *both])
    for method, number, last in (
        ("grpo", 1, "it has no rounds here"),
        ("dpo", 2, "its last is 1"),
        ("expert_iteration", 4, "its last is 3"),
    ):
        with pytest.raises(ConfigError, match=f"^--round: no round {number} of {method}: {last}"):
            script("generate").main([*CONFIG, *paths, *cell, method, "--round", str(number)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "number"), [("expert_iteration", 2), ("dpo", 1)])
def test_a_round_by_name_asks_for_what_the_workflow_generates(
    script: Script, config: Config, method: str, number: int
) -> None:
    names = {"model_name": "tiny-qwen2", "method": method, "suite": None, "round": number}
    args = argparse.Namespace(
        settings=None, config=[ROOT / "config.yaml"], seed=1, engine=None, **names
    )
    found = script("generate").settings_of(args)
    assert found == config.round_generation_settings("tiny-qwen2", method, 1, number)


# select_completions

QUESTIONS = {"a": "1 + 1?", "b": "2 + 2?", "c": "3 + 3?"}
GOLD = {"a": "2", "b": "4", "c": "6"}


def completion(problem_id: str, text: str, finish_reason: str = "stop", first_id: int = 9) -> Row:
    return {
        "problem_id": problem_id, "gold": GOLD[problem_id], "completion": text,
        "token_ids": [first_id, 0], "finish_reason": finish_reason,
    }  # fmt: skip


def selected(module: ModuleType, settings: str, completions: list[Row], folder: Path) -> list[Row]:
    """What a script that selects writes."""
    problems = [{"id": i, "question": q, "answer": f"#### {GOLD[i]}"} for i, q in QUESTIONS.items()]
    write_jsonl(folder / "train.jsonl", problems)
    write_jsonl(folder / "completions.jsonl", completions)
    for name in ("completions.jsonl.partial", ".completions.jsonl.attempts"):
        (folder / name).touch()
    words = ["--settings", settings, "--completions", str(folder / "completions.jsonl")]
    words += ["--data", str(folder / "train.jsonl"), "--output", str(folder / "selected.jsonl")]
    assert module.main(words) == 0
    assert not (folder / "completions.jsonl.partial").exists()
    return read_jsonl(folder / "selected.jsonl")


@pytest.fixture
def select(
    script: Script, run_json: Callable[..., str], tmp_path: Path
) -> Callable[..., list[Row]]:
    """`select(completions, **settings of rft)` -> the demonstrations."""
    write_jsonl(
        tmp_path / "train.jsonl",
        [{"id": i, "question": q, "answer": f"#### {GOLD[i]}"} for i, q in QUESTIONS.items()],
    )

    def call(completions: list[Row], method: str = "rft", **overrides: Any) -> list[Row]:
        write_jsonl(tmp_path / "completions.jsonl", completions)
        script("select_completions").main(
            ["--settings", run_json(method, **overrides),
             "--completions", str(tmp_path / "completions.jsonl"),
             "--data", str(tmp_path / "train.jsonl"),
             "--output", str(tmp_path / "demonstrations.jsonl")]
        )  # fmt: skip
        return read_jsonl(tmp_path / "demonstrations.jsonl")

    return call


def test_correct_completions_are_kept_as_their_token_ids(select: Callable[..., list[Row]]) -> None:
    kept = select(
        [
            completion("b", "so 4\n#### 4", first_id=5),
            completion("b", "#### 5"),
            completion("a", "it is 2"),  # right for a person, but not in the form asked for
            completion("a", "#### 2", first_id=6),
        ]
    )
    assert kept == [
        {"problem_id": "b", "question": "2 + 2?", "completion": "so 4\n#### 4",
         "response_ids": [5, 0]},
        {"problem_id": "a", "question": "1 + 1?", "completion": "#### 2", "response_ids": [6, 0]},
    ]  # fmt: skip


def test_the_first_distinct_ones_are_kept_up_to_the_cap(select: Callable[..., list[Row]]) -> None:
    texts = ["x\n#### 2", "x\n#### 2", "wrong\n#### 3", "y\n#### 2", "z\n#### 2"]
    rows = [completion("a", text, first_id=i) for i, text in enumerate(texts)]
    rows.append(completion("c", "#### 6"))
    kept = select(rows, max_kept_per_prompt=2)
    assert [(row["problem_id"], row["response_ids"][0]) for row in kept] == [
        ("a", 0), ("a", 3), ("c", 9),
    ]  # fmt: skip


def test_a_completion_that_did_not_end_is_dropped(select: Callable[..., list[Row]]) -> None:
    kept = select([completion("a", "#### 2", "length"), completion("b", "#### 4")])
    assert [row["problem_id"] for row in kept] == ["b"]


def test_a_cut_completion_does_not_hide_the_same_text_that_ended(
    select: Callable[..., list[Row]],
) -> None:
    # Two ways to tokenize one text: the longer has no room left for its EOS.
    kept = select(
        [completion("a", "#### 2", "length", first_id=1), completion("a", "#### 2", first_id=2)]
    )
    assert [row["response_ids"] for row in kept] == [[2, 0]]


@pytest.mark.parametrize(
    ("name", "method"), [("select_completions", "rft"), ("select_pairs", "dpo")]
)
def test_the_answer_is_read_after_the_marker_that_the_prompt_asks_for(
    script: Script, run_json: Callable[..., str], tmp_path: Path, name: str, method: str
) -> None:
    boxed = merge(json.loads(run_json(method)), {"prompt": {"answer_marker": "boxed"}})
    rows = [
        completion("a", "#### 2 \\boxed{3}", first_id=8),
        completion("a", "#### 3 \\boxed{2}", first_id=9),
    ]
    (chosen,) = selected(script(name), json.dumps(boxed), rows, tmp_path)
    kept = [value for key, value in chosen.items() if key.endswith("_ids")]
    assert kept == ([[9, 0]] if method == "rft" else [[9, 0], [8, 0]])


@pytest.mark.parametrize(
    ("name", "method"), [("select_completions", "rft"), ("select_pairs", "dpo")]
)
def test_an_answer_without_the_mark_is_right_where_the_method_reads_the_last_number(
    script: Script, run_json: Callable[..., str], tmp_path: Path, name: str, method: str
) -> None:
    rows = [completion("a", "It is 2.", first_id=8), completion("a", "It is 3.", first_id=9)]
    with pytest.raises(DataError):
        selected(script(name), run_json(method), rows, tmp_path)
    (chosen,) = selected(script(name), run_json(method, grading="flexible"), rows, tmp_path)
    kept = [value for key, value in chosen.items() if key.endswith("_ids")]
    assert kept == ([[8, 0]] if method == "rft" else [[8, 0], [9, 0]])


@pytest.mark.parametrize(("most", "pairs"), [(1, [(1, 2)]), (9, [(1, 2), (3, 4)])])
def test_pairs_are_a_right_and_a_wrong_completion_of_one_problem_up_to_the_cap(
    script: Script, run_json: Callable[..., str], tmp_path: Path, most: int, pairs: list[Any]
) -> None:
    texts = ("#### 2", "#### 3", "so #### 2", "#### 4", "yes #### 2")
    rows = [completion("a", text, first_id=number) for number, text in enumerate(texts, start=1)]
    rows += [completion("b", "#### 4", first_id=6), completion("c", "#### 7", first_id=7)]
    settings = run_json("dpo", max_pairs_per_prompt=most)
    found = selected(script("select_pairs"), settings, rows, tmp_path)
    assert [(row["chosen_ids"][0], row["rejected_ids"][0]) for row in found] == pairs
    assert {row["problem_id"] for row in found} == {"a"}


def test_no_correct_completion_is_an_error_that_says_what_to_do(
    select: Callable[..., list[Row]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"completions\.jsonl: .*nothing to train on; start from a"):
        select([completion("a", "#### 3"), completion("b", "#### 4", "length")])
    assert not (tmp_path / "demonstrations.jsonl").exists()


def test_a_completion_of_an_unknown_problem_is_named_by_its_row(
    select: Callable[..., list[Row]],
) -> None:
    stranger = {**completion("a", "#### 2"), "problem_id": "zz"}
    with pytest.raises(DataError, match=r"completions\.jsonl, row 2: no problem zz"):
        select([completion("a", "#### 2"), stranger])


def test_a_method_that_selects_nothing_is_an_error(select: Callable[..., list[Row]]) -> None:
    with pytest.raises(ConfigError, match="method sft is of kind sft, not expert_iteration"):
        select([completion("a", "#### 2")], method="sft")


# finish_rounds


@pytest.fixture
def rounds(run_json: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """`rounds(there)`: a run's folder as so many rounds leave it."""

    def build(there: int = 2) -> Path:
        for number in range(1, there + 1):
            folder = tmp_path / f"round{number}"
            settings = {**json.loads(run_json("rft")), "round": number}
            write_json(folder / "settings.json", settings)
            write_jsonl(
                folder / "train" / "metrics.jsonl",
                [
                    {
                        "step": step,
                        "loss": number + step / 10,
                        "num_tokens_total": 10 * step,
                        "seconds_total": 0.5 * step,
                    }
                    for step in (1, 2, 3)
                ],
            )
            summary = {
                "model": "tiny-qwen2", "num_steps": 3, "num_updates": 3, "num_tokens": 100 * number,
                "seconds_training": 2.5, "seconds_validating": 1.5,
                "num_examples": 10 * number, "round": number,
                "peak_memory_mb": 50 - number, "loss": 1.0 / number, "attempts": [],
                "best_validation": {"step": 2, "accuracy": 0.5},
            }  # fmt: skip
            write_json(folder / "train" / "summary.json", summary)
            stats = {
                "device": "NVIDIA", "engine": "vllm",
                "settings": {"model_settings": {"vllm": {"tensor_parallel": 2}}},
                "seconds_loading": 0.5, "seconds_generating": 3.5,
                "num_completion_tokens": 1000 * number, "peak_memory_mb": 60 + number,
            }  # fmt: skip
            write_json(folder / "completions.stats.json", stats)
            write_text(folder / "model" / "model.safetensors", f"weights {number}")
            write_text(folder / "model" / ".snakemake_timestamp", "")
        return tmp_path

    return build


def test_rounds_are_summed_and_the_last_model_is_the_runs(
    rounds: Callable[..., Path], script: Script
) -> None:
    folder = rounds()
    write_text(folder / "round2" / FINISHED / "run.json", "{}")
    assert script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "2"]) == 0
    assert not (folder / "round2" / FINISHED).exists()
    summary = read_json(folder / "train" / "summary.json")
    expected = {
        "num_rounds": 2, "round": 0, "num_steps": 6, "num_updates": 6,
        "num_tokens": 300,  # 100 + 200
        "num_examples": 30,  # 10 + 20
        "num_sampled_tokens": 3000,  # 1000 + 2000
        "seconds_sampling": 8.0,  # 2 × 4
        "gpu_seconds_sampling": 16.0,  # on two GPUs
        "seconds_training": 13.0,  # 2 × 2.5 of updates and 8 of sampling
        "seconds_validating": 3.0,  # 2 × 1.5
        "peak_memory_mb": 62,  # the sampling of round 2
        "loss": 0.5,  # of the last round
        "best_validation": {"step": 5, "accuracy": 0.5},  # step 2 after the 3 of round 1
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    rows = read_jsonl(folder / "train" / "metrics.jsonl")
    assert [(row["step"], row["round"]) for row in rows] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip
    assert rows[4]["loss"] == 2.2
    assert [row["num_tokens_total"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert [row["seconds_total"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    settings = read_json(folder / "settings.json")
    assert (settings["round"], settings["method_settings"]["rounds"]) == (2, 2)
    assert [path.name for path in (folder / "model").iterdir()] == ["model.safetensors"]
    assert (folder / "model" / "model.safetensors").read_text(encoding="utf-8") == "weights 2"


def test_a_runs_record_names_the_calls_of_every_round(
    rounds: Callable[..., Path], script: Script
) -> None:
    folder = rounds()
    for number, calls in ((1, ["first", "second"]), (2, ["third"])):
        path = folder / f"round{number}" / "train" / "summary.json"
        seconds = {"seconds_wall": 2.0, "seconds_cpu": 3.0, "seconds_gpu": 0.0}
        attempts = [{"invocation": call, **seconds} for call in calls]
        write_json(path, {**read_json(path), "attempts": attempts})
    script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "2"])
    summary = read_json(folder / "train" / "summary.json")
    assert [one["invocation"] for one in summary["attempts"]] == ["first", "second", "third"]
    assert summary["attempts_total"] == {
        "seconds_wall": 6.0, "seconds_cpu": 9.0, "seconds_gpu": 0.0,
    }  # fmt: skip


def test_rounds_of_an_earlier_study_are_not_taken_along(
    rounds: Callable[..., Path], script: Script
) -> None:
    folder = rounds(there=3)
    script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "2"])
    assert read_json(folder / "train" / "summary.json")["num_rounds"] == 2
    assert (folder / "model" / "model.safetensors").read_text(encoding="utf-8") == "weights 2"


def test_of_the_starts_of_rounds_only_the_first_has_a_row(
    rounds: Callable[..., Path], script: Script
) -> None:
    folder = rounds()
    for number in (1, 2):
        path = folder / f"round{number}" / "train" / "metrics.jsonl"
        write_jsonl(path, [{"step": 0, "validation_accuracy": 0.1 * number}, *read_jsonl(path)])
    script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "2"])
    rows = read_jsonl(folder / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0]["validation_accuracy"] == 0.1


def test_ten_rounds_are_in_the_order_of_their_numbers(
    rounds: Callable[..., Path], script: Script
) -> None:
    folder = rounds(there=10)
    script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "10"])
    rows = read_jsonl(folder / "train" / "metrics.jsonl")
    assert [row["round"] for row in rows] == [n for n in range(1, 11) for _ in range(3)]
    assert (folder / "model" / "model.safetensors").read_text(encoding="utf-8") == "weights 10"


def test_a_missing_round_is_named(rounds: Callable[..., Path], script: Script) -> None:
    folder = rounds()
    with pytest.raises(DataError, match=r"round3/train/summary\.json: no such file"):
        script("finish_rounds").main(["--run-dir", str(folder), "--rounds", "3"])
    with pytest.raises(DataError, match=r"round1/train/summary\.json: no such file"):
        script("finish_rounds").main(["--run-dir", str(folder / "nowhere"), "--rounds", "1"])
    assert not (folder / "model").exists()


@pytest.mark.parametrize(("name", "registry"), [("data", "datasets"), ("model", "models")])
def test_what_only_an_overlay_names_can_be_prepared_by_that_name(
    script: Callable[[str], ModuleType], tmp_path: Path, name: str, registry: str
) -> None:
    entries = {
        "datasets": {"mine": {"kind": "arithmetic", "num_train": 5, "num_val": 2, "num_test": 3}},
        "models": {"mine": {"source": "embedded", "prompt": "plain"}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps({registry: entries[registry]}), encoding="utf-8")
    words = ["--dataset" if name == "data" else "--model-name", "mine"]
    files = [str(ROOT / "config.yaml"), str(tmp_path / "mine.yaml")]
    output = tmp_path / "out"
    script(f"prepare_{name}").main([*words, "--config", *files, "--output-dir", str(output)])
    manifest = read_json(output / "manifest.json")
    assert manifest["dataset" if name == "data" else "model"] == "mine"


def test_weights_of_another_run_than_the_completions_are_kept_for_are_named(
    script: Callable[[str], ModuleType],
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate = script("generate")
    settings = config.evaluation_settings("tiny-qwen2", "grpo", 1, "arithmetic")
    model = tmp_path / "model"
    for made, said in (
        ({"method": "grpo", "seed": 1}, ""),
        ({"method": "sft", "seed": 1}, ""),  # its parent, whose weights a round is sampled from
        ({"method": "rft", "seed": 1}, f"{model} is of method rft, not grpo"),
        ({"method": "grpo", "seed": 0}, f"{model} is of seed 0, not 1"),
    ):
        caplog.clear()
        write_json(tmp_path / "settings.json", made)
        generate.warn_of_other_run(model, settings)
        assert "\n".join(caplog.messages) == said


def test_verify_says_of_an_eval_that_is_not_there_what_writes_its_record(
    script: Script, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere/.*: no such file; an eval writes it when it fin"):
        script("verify").main(["--run", str(tmp_path / "nowhere")])
