"""Real runs of Snakemake: provenance, hashes, W&B offline, secrets, two calls at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flips import files_of, unnoticed_flips
from forked_snakemake import run_snakemake
from workspace import make_workspace, write_overlay

from gsm8k_core.files import read_json, write_text

STUDY = {
    "study": {"name": "followed", "methods": ["base", "grpo"]},
    "datasets": {"arithmetic_debug": {"num_train": 200, "num_val": 10, "num_test": 20}},
    "methods": {"grpo": {"from": "base"}},
    "suites": {"debug": {"limit": 5, "max_new_tokens": 8}},
    "tracking": {"project": "maths", "mode": "offline"},
}
GRPO = "artifacts/experiments/followed/tiny-qwen2/grpo/seed0"
RESULTS = "artifacts/results/followed"
PLANTED = {
    "HF_TOKEN": "hf_plantedPLANTED0123456789",
    "WANDB_API_KEY": "planted00000000000000000000000000000wandb",
    "DEEPSEEK_API_KEY": "sk-planted-deepseek-0123456789",
    "OPENAI_API_KEY": "sk-planted-openai-0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/0123456789",
}
IN_SETTINGS = "-".join(["planted", "password"])  # this file stands in changes.diff as it is
REWARD = """
import os

def fails(completion, gold):
    raise RuntimeError("the server refused " + os.environ["OPENAI_API_KEY"])
"""

pytestmark = pytest.mark.slow


def words_of(*words: str, overlays: tuple[str, ...] = ()) -> list[str]:
    files = ("studies/debug.yaml", "study.yaml", *overlays)
    return [*words, "--cores", "1", "--configfile", *files]


def environment(workspace: Path) -> dict[str, str]:
    # W&B leaves variables behind where a test of it has run in this process.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**own, **PLANTED, "PYTHONPATH": str(workspace)}


def snakemake(workspace: Path, *words: str, overlays: tuple[str, ...] = ()) -> tuple[int, str]:
    words = tuple(words_of(*words, overlays=overlays))
    result = run_snakemake(workspace, *words, environment=environment(workspace))
    return result.returncode, result.stdout


def run(workspace: Path, *words: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, *words],
        cwd=workspace,
        env=environment(workspace),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


def verify(workspace: Path) -> tuple[int, str]:
    return run(workspace, "scripts/verify.py", "--study", "followed")


def secrets_below(folder: Path) -> list[str]:
    """Files below `folder` (hidden ones too, links not followed) that hold a planted secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [
                f"{path}: {secret}"
                for secret in (*PLANTED.values(), IN_SETTINGS)
                if secret.encode() in content
            ]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a small study has been run to its end, followed by W&B offline."""
    workspace = make_workspace(tmp_path_factory.mktemp("provenance") / "workspace", STUDY)
    code, output = snakemake(workspace)
    assert code == 0, output
    return workspace


def test_a_call_for_a_part_of_a_study_does_not_record_it_as_finished(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace", STUDY)
    code, output = snakemake(workspace, "--until", "prepare_data")
    assert code == 0, output
    assert not (workspace / RESULTS / "SHA256SUMS").exists()
    code, output = verify(workspace)
    assert code == 1 and "written when the study finishes" in output, output


def test_a_row_leads_to_the_call_that_made_it(finished: Path) -> None:
    rows = read_json(finished / RESULTS / "provenance.json")["rows"]
    assert [row["method"] for row in rows] == ["base", "grpo"]
    (path,) = rows[1]["runs"][0]["made_by"]
    manifest = read_json(finished / path)
    assert manifest["state"] == "succeeded"
    assert manifest["command"][0] == "snakemake"
    assert manifest["datasets"]["arithmetic_debug"]["train"]["num_problems"] == 200
    assert manifest["seconds_cpu_jobs"] > 0
    summary = read_json(finished / GRPO / "train" / "summary.json")
    assert Path(path).parent.name == summary["provenance"]["invocation"]


def test_verify_finds_one_flipped_byte_in_every_file_of_the_study(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    found = {"/".join(path.parts[1:]) for path in files_of("followed")}
    assert {
        "arithmetic_debug/test.jsonl",
        "benchmarks/prepare_model/tiny-qwen2.tsv",
        "experiments/followed/tiny-qwen2/grpo/seed0/grades/debug.manifest.json",
        "experiments/followed/tiny-qwen2/grpo/seed0/logs/train_grpo.log",
        "experiments/followed/tiny-qwen2/grpo/seed0/model/model.safetensors",
        "logs/prepare_data/arithmetic_debug.log",
        "results/followed/SHA256SUMS",
        "results/followed/manifests/compare.json",
    } <= found
    assert any(name.endswith(".wandb") for name in found) and any("/sys/" in name for name in found)
    assert unnoticed_flips("followed") == []


def test_a_kind_of_file_that_nobody_has_listed_is_noticed_to_be_missing_from_the_record(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    extra = [Path("artifacts/extra/thing.bin"), Path(GRPO, ".hidden")]
    for path in extra:
        write_text(path, "0")
    unnoticed = unnoticed_flips("followed")
    for path in extra:
        path.unlink()
    extra[0].parent.rmdir()
    assert unnoticed == sorted(map(str, extra))


def test_verify_says_which_file_was_changed(finished: Path) -> None:
    assert verify(finished)[0] == 0
    path = finished / GRPO / "grades" / "debug.parquet"
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + b"?")
    code, output = verify(finished)
    path.write_bytes(before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert code == 1
    assert output.startswith(f"changed {GRPO}/grades/debug.parquet\n")


def test_wandb_followed_the_run_in_its_own_folder(finished: Path) -> None:
    run_files = list((finished / GRPO / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(run_files) == 1, (finished / GRPO / "logs" / "train_grpo.log").read_text("utf-8")
    assert run_files[0].stat().st_size > 1000
    (table,) = (finished / RESULTS / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert read_json(table)["columns"][:4] == ["study", "model", "method", "suite"]
    assert [row[2] for row in read_json(table)["data"]] == ["base", "grpo"]
    assert not (finished / "wandb").exists()


def test_following_a_run_or_not_is_no_reason_to_do_it_again(finished: Path) -> None:
    for tracking in ({"project": None}, {"project": "other", "mode": "disabled"}):
        other = write_overlay(finished, "other.yaml", {"tracking": tracking})
        code, output = snakemake(finished, "-n", overlays=(other,))
        assert code == 0 and "Nothing to be done" in output


def test_planted_secrets_are_in_no_file_and_no_output(finished: Path) -> None:
    (finished / "my_reward.py").write_text(REWARD, encoding="utf-8")
    crash = {
        "study": {"name": "crashed", "methods": ["grpo"]},
        "methods": {"grpo": {"reward": {"custom": "my_reward:fails"}}},
    }
    code, output = snakemake(finished, overlays=(write_overlay(finished, "c.yaml", crash),))
    assert code == 1 and "the server refused ***" in output
    assert not any(secret in output for secret in PLANTED.values())

    url = f"https://me:{IN_SETTINGS}@host/gsm8k"
    path = write_overlay(finished, "s.yaml", {"datasets": {"gsm8k": {"path": url}}})
    code, output = snakemake(finished, overlays=(path,))
    assert code == 1 and "datasets.gsm8k.path: holds the user or password of a URL" in output
    assert IN_SETTINGS not in output
    code, output = run(
        finished, "-m", "gsm8k_core.cli", "eval", "--limit", "2",
        "--config", "config.yaml", "studies/debug.yaml", "study.yaml",
    )  # fmt: skip
    assert code == 0, output
    (finished / path).unlink()  # where it was planted
    assert secrets_below(finished) == []


def test_the_check_for_secrets_sees_one(finished: Path) -> None:
    planted = finished / "artifacts" / ".hidden"
    planted.write_text(f"x{PLANTED['HF_TOKEN']}x", encoding="utf-8")
    assert len(secrets_below(finished)) >= 1
    planted.unlink()


def noted_jobs(workspace: Path) -> list[Path]:
    """What Snakemake has noted of outputs whose job has begun and not ended."""
    return list((workspace / ".snakemake").glob("incomplete/*"))


def wait_for_its_job(workspace: Path, call: subprocess.Popen[bytes]) -> None:
    """Until Snakemake has noted that the job has begun, which it does a moment after it has.

    Stopped in between, it would leave a job that ends by itself, and a file that nobody misses.
    """
    deadline = time.monotonic() + 120
    while not noted_jobs(workspace):
        assert time.monotonic() < deadline
        if call.poll() is not None:
            (manifest,) = (workspace / "artifacts" / "runs").glob("*/run_manifest.json")
            assert read_json(manifest)["state"] == "succeeded"
            pytest.skip("the machine is so busy that the call ended unseen")
        time.sleep(0.02)


def skip_if_it_had_ended(workspace: Path) -> None:
    """By what it says itself, and not by its lock, which the test is about."""
    (manifest,) = (workspace / "artifacts" / "runs").glob("*/run_manifest.json")
    if read_json(manifest)["state"] != "running" or not noted_jobs(workspace):
        pytest.skip("the machine is so busy that the call had ended when it was stopped")


def test_a_second_call_beside_the_first_stops_with_a_clear_line_and_harms_nothing(
    tmp_path: Path,
) -> None:
    workspace = make_workspace(tmp_path / "workspace", STUDY)
    target = "artifacts/arithmetic_debug/train.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words_of(target)],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as first:
        wait_for_its_job(workspace, first)
        first.send_signal(signal.SIGSTOP)
        try:
            skip_if_it_had_ended(workspace)
            code, output = snakemake(workspace, target)
        finally:
            first.send_signal(signal.SIGCONT)
        assert code == 1, output
        assert "Error: Directory cannot be locked." in output and "--unlock" in output
        assert "Traceback" not in output
        first.communicate(timeout=120)
        assert first.returncode == 0
    (manifest,) = (workspace / "artifacts" / "runs").glob("*/run_manifest.json")
    assert read_json(manifest)["state"] == "succeeded"
    assert (workspace / target).exists()


def test_after_a_kill_of_snakemake_unlocking_goes_on_and_says_what_was_killed(
    tmp_path: Path,
) -> None:
    workspace = make_workspace(tmp_path / "workspace", STUDY)
    target = "artifacts/arithmetic_debug/train.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words_of(target)],
        cwd=workspace,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as first:
        wait_for_its_job(workspace, first)
        first.kill()
    skip_if_it_had_ended(workspace)
    assert snakemake(workspace, target)[0] == 1
    assert snakemake(workspace, "--unlock")[0] == 0
    code, output = snakemake(workspace, target)
    assert code == 0, output
    manifests = sorted((workspace / "artifacts" / "runs").glob("*/run_manifest.json"))
    assert [read_json(path)["state"] for path in manifests] == ["killed", "succeeded"]
