"""Who made a result, with what and where; never a secret."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gsm8k_core import manifest
from gsm8k_core.config import Config
from gsm8k_core.files import read_json
from gsm8k_core.manifest import (
    Invocation,
    git_state,
    host_facts,
    installed_packages,
    package_versions,
    provenance,
    redacted,
    run_command,
    utc_now,
)


def test_provenance_says_code_packages_machine_and_time() -> None:
    facts = provenance()
    assert len(facts["code_digest"]) == 64
    assert facts["packages"]["torch"] == package_versions()["torch"]
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert facts["processor"]
    written = datetime.datetime.fromisoformat(facts["written"])
    assert written.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=5)
    assert utc_now() >= facts["written"]


def test_no_secret_of_the_environment_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret_too")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setattr(sys, "argv", ["/somebody/bin/snakemake", "--cores", "1"])
    invocation = Invocation(tmp_path)
    invocation.start(config)
    written = "".join(
        path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "secret" not in written + json.dumps(provenance())
    assert provenance()["environment"]["PYTHONHASHSEED"] == "7"


def test_git_state_tells_a_clean_checkout_from_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init", "-q")
    (tmp_path / "file").write_bytes(b"caf\xe9\n")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    command = run_command
    monkeypatch.setattr(manifest, "run_command", lambda *words: command(*words, cwd=tmp_path))
    clean = git_state()
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
    (tmp_path / "file").write_bytes(b"caf\xe9 au lait\n")  # Latin-1: a diff that is not UTF-8
    changed = git_state()
    assert changed["commit"] == clean["commit"]
    assert changed["dirty"] and len(changed["diff_sha256"]) == 64


def test_outside_a_checkout_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = run_command
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(manifest, "run_command", lambda *words: command(*words, cwd=tmp_path))
    assert git_state() == {"commit": None, "dirty": False, "diff_sha256": None}


def test_a_command_that_is_missing_or_fails_gives_none() -> None:
    assert run_command("no-such-command-anywhere") is None
    assert run_command(sys.executable, "-c", "raise SystemExit(3)") is None
    assert run_command(sys.executable, "-c", "print(' 5 ')") == "5"


def test_the_code_digest_follows_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = manifest.code_digest.__wrapped__
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    (tmp_path / "gsm8k_core").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "gsm8k_core" / "a.py").write_text("1", encoding="utf-8")
    first = digest()
    (tmp_path / "gsm8k_core" / "notes.txt").write_text("1", encoding="utf-8")
    assert digest() == first
    (tmp_path / "gsm8k_core" / "a.py").rename(tmp_path / "gsm8k_core" / "b.py")
    second = digest()
    (tmp_path / "gsm8k_core" / "b.py").write_text("2", encoding="utf-8")
    assert len({first, second, digest()}) == 3


def test_installed_packages_are_pinned_sorted_and_unique() -> None:
    packages = installed_packages()
    assert packages == sorted(set(packages), key=str.lower)
    assert f"torch=={package_versions()['torch']}" in packages


def test_host_facts_say_cpus_and_memory() -> None:
    facts = host_facts()
    assert facts["logical_cpus"] >= 1 and facts["memory_bytes"] > 2**28
    assert isinstance(facts["gpus"], list)


def test_an_invocation_says_how_it_began_and_how_it_ended(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somebody/bin/snakemake", "--cores", "1"])
    invocation = Invocation(tmp_path)
    invocation.start(config)
    (folder,) = tmp_path.iterdir()
    begun = read_json(folder / "run_manifest.json")
    assert begun["state"] == "running"
    assert begun["command"] == ["snakemake", "--cores", "1"]
    assert begun["config"]["study"]["name"] == "default"
    assert read_json(folder / "sys" / "host.json")["platform"]
    assert "torch==" in (folder / "locks" / "requirements.lock.txt").read_text(encoding="utf-8")
    invocation.finish("failed")
    ended = read_json(folder / "run_manifest.json")
    assert ended["state"] == "failed" and ended["seconds_wall"] >= 0
    assert {key: ended[key] for key in begun if key != "state"} == {
        key: value for key, value in begun.items() if key != "state"
    }


def test_two_invocations_of_the_same_second_have_two_folders(
    tmp_path: Path, config: Config
) -> None:
    for _ in range(3):
        Invocation(tmp_path).start(config)
    assert len(list(tmp_path.iterdir())) == 3


def test_finishing_what_never_began_writes_nothing(tmp_path: Path) -> None:
    Invocation(tmp_path).finish("failed")
    assert list(tmp_path.iterdir()) == []


def test_a_secret_on_the_command_line_is_not_written_down() -> None:
    command = ["snakemake", "--cores", "2", "--storage-s3-secret-key", "s3cr3t", "--api-token=abc"]
    assert redacted(command) == [
        "snakemake", "--cores", "2", "--storage-s3-secret-key", "***", "--api-token=***",
    ]  # fmt: skip
