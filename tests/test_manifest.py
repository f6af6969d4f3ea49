"""Who made a result, with what and where; never a secret."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gsm8k_core import manifest
from gsm8k_core.config import Config
from gsm8k_core.files import read_json, write_json
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

ROOT = Path(__file__).resolve().parent.parent


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
    monkeypatch.setenv("HF_TOKEN", "planted-token-1")
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-2")
    monkeypatch.setenv("LANG", "planted-key-2")  # allowed, but not with that value
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setattr(sys, "argv", ["/somebody/bin/snakemake", "--note", "planted-token-1"])
    monkeypatch.setattr(manifest, "uncommitted_changes", lambda: ("+token: planted-token-1\n", {}))
    invocation = Invocation(tmp_path)
    invocation.start(config)
    written = "".join(
        path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "planted" not in written + json.dumps(provenance())
    assert "+token: ***" in written
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
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    clean = git_state()
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
    (tmp_path / "file").write_bytes(b"caf\xe9 au lait\n")  # Latin-1: a diff that is not UTF-8
    changed = git_state()
    assert changed["commit"] == clean["commit"]
    assert changed["dirty"] and len(changed["diff_sha256"]) == 64
    git("config", "diff.noprefix", "true")  # a user's, which changes how a difference looks
    assert git_state() == changed


def test_the_commit_of_a_repository_that_the_library_only_lies_in_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(manifest, "ROOT", inside)
    monkeypatch.setattr(manifest, "run_command", lambda *_, **__: "2fbb610d" * 5)
    assert git_state()["commit"] is None
    assert manifest.uncommitted_changes() == ("", {})
    (inside / ".git").touch()  # a worktree's is a file
    assert git_state()["commit"] == "2fbb610d" * 5


def test_outside_a_checkout_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    unknown = {"commit": None, "dirty": None, "diff_sha256": None}
    assert git_state() == unknown
    monkeypatch.setenv("GSM8K_COMMIT", "unknown")  # what the Dockerfile says unless told
    assert git_state() == unknown
    monkeypatch.setenv("GSM8K_COMMIT", "2fbb610d" * 5)
    assert git_state() == {**unknown, "commit": "2fbb610d" * 5}
    # In an image that runs the code of a checkout, its own commit is another code's.
    monkeypatch.setenv("GSM8K_CHECKOUT", "3acc721e" * 5)
    assert git_state() == {**unknown, "commit": "3acc721e" * 5}
    monkeypatch.setenv("GSM8K_CHECKOUT", "")
    assert git_state() == unknown
    assert manifest.uncommitted_changes() == ("", {})


def test_git_that_refuses_a_checkout_is_told_once(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    git_in(tree, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.delenv("GSM8K_CHECKOUT", raising=False)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    manifest._warn_of_git.cache_clear()
    assert git_state()["commit"] is None and git_state()["commit"] is None
    (warning,) = caplog.messages
    assert f"git does not tell of {tree}, so no changes are recorded" in warning
    assert "dubious ownership" in warning
    # A job: its call of snakemake has said so, or knows the commit.
    manifest._warn_of_git.cache_clear()
    monkeypatch.setenv("GSM8K_CHECKOUT", "")
    assert git_state()["commit"] is None and len(caplog.messages) == 1


GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")


def git_in(folder: Path, *words: str) -> str:
    result = subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository in place of this one."""
    folder = tmp_path / "tree"
    folder.mkdir()
    git_in(folder, "init", "-q")
    monkeypatch.setattr(manifest, "ROOT", folder)
    monkeypatch.setattr(manifest, "code_digest", lambda: "0" * 64)  # it is kept for the process
    return folder


def test_the_uncommitted_changes_give_the_tree_back(
    tree: Path, tmp_path: Path, config: Config
) -> None:
    (tree / "changed.py").write_text("a = 1\n", encoding="utf-8")
    (tree / "removed.py").write_text("b = 1\n", encoding="utf-8")
    (tree / "binary").write_bytes(bytes(range(256)) * 9)
    (tree / "latin-1, CRLF").write_bytes(b"caf\xe9\r\n" * 9)
    (tree / "blank at its end").write_text("a\nb\nc\n\n", encoding="utf-8")
    (tree / ".gitignore").write_text("ignored\n", encoding="utf-8")
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    (tree / "changed.py").write_text("a = 2\n", encoding="utf-8")
    (tree / "removed.py").unlink()
    (tree / "binary").write_bytes(bytes(range(256)) * 8)
    (tree / "latin-1, CRLF").write_bytes(b"caf\xe9\r\n" * 5 + b"th\xe9\r\n" + b"caf\xe9\r\n" * 9)
    (tree / "blank at its end").write_text("a\nB\nc\n\n", encoding="utf-8")
    (tree / "a new one.py").write_text("c = '−'\n", encoding="utf-8")
    (tree / "new binary").write_bytes(b"\0\1\2")
    (tree / "zz").write_text("the last one ends in a blank line\n\n", encoding="utf-8")
    (tree / "ignored").write_text("d\n", encoding="utf-8")
    (tree / "large").write_text("e\n" * manifest.MAX_UNTRACKED_BYTES, encoding="utf-8")
    before = git_in(tree, "status", "--porcelain")
    name = Invocation(tmp_path / "runs").start(config)
    assert git_in(tree, "status", "--porcelain") == before
    written = read_json(tmp_path / "runs" / name / "run_manifest.json")
    assert written["changes"] == {
        "redacted": False, "left_out": {"large": "larger than 200000 bytes"},
    }  # fmt: skip

    copy = tmp_path / "copy"
    git_in(tmp_path, "clone", "-q", str(tree), str(copy))
    git_in(copy, "apply", str(tmp_path / "runs" / name / "changes.diff"))
    contents = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for folder in (tree, copy)
    ]
    assert contents[1] == {k: v for k, v in contents[0].items() if k not in ("ignored", "large")}


def test_a_folder_of_many_unknown_files_is_named_and_no_more(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a virtual environment has them: together longer than a command line may be.
    (tree / "lib" / "known").mkdir(parents=True)
    (tree / "lib" / "known" / "tracked").write_text("a\n", encoding="utf-8")
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    (tree / "own.py").write_text("b\n", encoding="utf-8")
    (tree / "lib" / "known" / "own.py").write_text("d\n", encoding="utf-8")
    (tree / "lib" / "dump").mkdir()
    for number in range(501):
        (tree / "lib" / "dump" / str(number)).touch()
    (tree / "env" / ("x" * 100)).mkdir(parents=True)
    for number in range(501):
        (tree / "env" / ("x" * 100) / f"{number}.py").touch()
    (tree / "data").mkdir()
    for number in range(3):
        (tree / "data" / f"{number}.jsonl").write_text("c" * 90_000, encoding="utf-8")
    monkeypatch.setattr(manifest, "MAX_UNTRACKED_BYTES_OF_FOLDER", 200_000)
    patch, left_out = manifest.uncommitted_changes()
    assert left_out == {
        "data/": "3 files that git does not know",
        "env/": "501 files that git does not know",
        "lib/dump/": "501 files that git does not know",
    }
    assert "+b" in patch and "+d" in patch and "env/" not in patch


def test_as_many_unknown_files_as_no_command_line_takes_are_in_the_patch(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git_in(tree, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setattr(manifest, "MAX_UNTRACKED_FILES", 20_000)
    # Paths of 800 characters: 2.4 MB in all, where Linux takes 2 MiB.
    folder = tree / ("y" * 200) / ("y" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    for number in range(3_000):
        (folder / f"{'y' * 200}{number}.py").touch()
    patch, left_out = manifest.uncommitted_changes()
    assert left_out == {}
    assert patch.count("new file mode") == 3_000


def test_what_git_cannot_add_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git_in(tree, "commit", "-q", "--allow-empty", "-m", "first")
    (tree / "gone.py").write_text("b\n", encoding="utf-8")
    output_of = manifest._output

    def without_add(*command: str, **options: Any) -> bytes | None:
        return None if "add" in command else output_of(*command, **options)

    monkeypatch.setattr(manifest, "_output", without_add)  # as where a file has just gone
    assert manifest.uncommitted_changes() == ("", {"gone.py": "git could not add it"})


def test_a_file_that_goes_while_it_is_looked_at_stops_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git_in(tree, "commit", "-q", "--allow-empty", "-m", "first")
    for name in ("stays.py", "goes.py"):
        (tree / name).write_text(f"{name}\n", encoding="utf-8")
    reason_of = manifest._reason_to_leave_out

    def looked_at(name: str) -> str | None:
        reason = reason_of(name)
        (tree / "goes.py").unlink(missing_ok=True)
        return reason

    monkeypatch.setattr(manifest, "_reason_to_leave_out", looked_at)
    patch, left_out = manifest.uncommitted_changes()
    assert "+stays.py" in patch and "goes.py" not in patch and not left_out.keys() - {"goes.py"}


def test_looking_at_a_checkout_does_not_write_its_index(tree: Path) -> None:
    (tree / "file").write_text("a\n", encoding="utf-8")
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    os.utime(tree / "file", (0, 0))  # git would note another time, told by the second
    before = (tree / ".git" / "index").read_bytes()
    git_state()
    manifest.uncommitted_changes()
    assert (tree / ".git" / "index").read_bytes() == before


def test_a_patch_that_ends_in_a_blank_line_of_context_applies(tree: Path, tmp_path: Path) -> None:
    (tree / "file").write_text("a\nb\n\n", encoding="utf-8")
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    (tree / "file").write_text("a\nB\n\n", encoding="utf-8")
    (tmp_path / "changes.diff").write_text(manifest.uncommitted_changes()[0], encoding="utf-8")
    git_in(tree, "checkout", "-q", "file")
    git_in(tree, "apply", str(tmp_path / "changes.diff"))
    assert (tree / "file").read_text(encoding="utf-8") == "a\nB\n\n"


def test_a_file_changed_in_the_second_of_its_commit_is_in_the_patch(tree: Path) -> None:
    """Of the same size in the same second: git reads it where its index is no younger."""
    git_in(tree, "config", "core.trustctime", "false")  # the one time that cannot be set
    instant = (1_700_000_000, 1_700_000_000)
    (tree / "file").write_text("a\n", encoding="utf-8")
    os.utime(tree / "file", instant)
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    (tree / "file").write_text("b\n", encoding="utf-8")
    for path in (tree / "file", tree / ".git" / "index"):
        os.utime(path, instant)
    assert "+b" in manifest.uncommitted_changes()[0]


def test_files_that_hold_secrets_are_named_and_their_content_is_nowhere(
    tree: Path, tmp_path: Path, config: Config
) -> None:
    (tree / "sub").mkdir()
    (tree / ".env.shared").write_text("A=planted-0\n", encoding="utf-8")
    (tree / "deploy.sh").write_text("true\n", encoding="utf-8")
    git_in(tree, "add", ".")
    git_in(tree, "commit", "-q", "-m", "first")
    for name in (
        ".env", ".env.shared", "sub/.env.local", ".netrc", "sub/server.pem", "a.key", "id_rsa",
        "id_ed25519", "Server.PEM", ".aws/config", ".ssh/config", ".kube/config", ".pypirc",
        ".git-credentials", "sub/credentials", "a.p12", "a.pfx", "service-account-1.json",
        "kaggle.json",
    ):  # fmt: skip
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("HF=planted-1\n", encoding="utf-8")
    (tree / "staged.pem").write_text("planted-2\n", encoding="utf-8")
    git_in(tree, "add", "staged.pem")
    (tree / "deploy.sh").write_text("export DB_PASS=planted-3\ntrue\n", encoding="utf-8")
    (tree / "new.sh").write_text("SMTP_KEY='planted-4 of two words'\n", encoding="utf-8")
    name = Invocation(tmp_path / "runs").start(config)
    folder = tmp_path / "runs" / name
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()]
    assert "planted" not in "".join(texts)
    changes = read_json(folder / "run_manifest.json")["changes"]
    assert changes["redacted"] is True
    assert set(changes["left_out"]) == {
        ".env", ".env.shared", "sub/.env.local", ".netrc", "sub/server.pem", "a.key", "id_rsa",
        "id_ed25519", "staged.pem", "Server.PEM", ".aws/config", ".ssh/config", ".kube/config",
        ".pypirc", ".git-credentials", "sub/credentials", "a.p12", "a.pfx",
        "service-account-1.json", "kaggle.json",
    }  # fmt: skip
    diff = (folder / "changes.diff").read_text(encoding="utf-8")
    assert "+export DB_PASS=***\n" in diff and "+SMTP_KEY='***'\n" in diff


def test_git_does_not_take_a_file_of_variables(tree: Path) -> None:
    shutil.copyfile(ROOT / ".gitignore", tree / ".gitignore")
    names = [".env", ".env.local", "studies/.env"]
    assert git_in(tree, "check-ignore", *names).split() == names


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
    (tmp_path / "gsm8k_core" / "engines").mkdir()
    (tmp_path / "gsm8k_core" / "engines" / "a.py").write_text("1", encoding="utf-8")
    with_folder = digest()
    assert with_folder != first
    (tmp_path / "gsm8k_core" / "engines" / "a.py").unlink()
    (tmp_path / "gsm8k_core" / "platinum.json").write_text("[]", encoding="utf-8")
    with_data = digest()
    assert with_data != first
    (tmp_path / "gsm8k_core" / "platinum.json").unlink()
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


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--nv --env WANDB_API_KEY=0123 --bind /a", "--nv --env WANDB_API_KEY=*** --bind /a"),
        ("--nv --api-key 0123 --token=4567 -B /a", "--nv --api-key *** --token=*** -B /a"),
        ("--export=ALL,X_TOKEN=0123", "--export=ALL,X_TOKEN=***"),
        ("--db-password=correct horse battery", "--db-password=***"),
        ("storage_s3_secret_key=0a1b2c3d4e5f6a7b8c9d", "storage_s3_secret_key=***"),
        ("study=r1 seeds=[0,1] tokens=8 --prompt-tokens 8", None),
        ('{"source": "hub", "hub_id": "Qwen/Qwen2.5-0.5B", "sort_key": "accuracy"}', None),
        ("X_TOKEN=$X_TOKEN", None),
    ],
)
def test_a_secret_within_a_word_of_the_command_line_is_not_written_down(
    word: str, shown: str | None
) -> None:
    assert redacted(["snakemake", "--apptainer-args", word]) == [
        "snakemake", "--apptainer-args", word if shown is None else shown,
    ]  # fmt: skip


def test_a_record_names_a_file_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.json")
    record = manifest.CallRecord("check_overlap.py", ["--output", name])
    record.write(tmp_path / "record.json", packages=(), outputs=[])
    assert read_json(tmp_path / "record.json")["command"][-1] == "caf?.json"


def test_a_job_names_the_call_that_it_works_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSM8K_INVOCATION", raising=False)
    assert provenance()["invocation"] is None
    monkeypatch.setenv("GSM8K_INVOCATION", "20261123T054450Z_2fbb610d-2")
    assert provenance()["invocation"] == "20261123T054450Z_2fbb610d-2"
    monkeypatch.setenv("GSM8K_INVOCATION", "../../anything")
    assert provenance()["invocation"] is None


def test_an_invocation_says_its_seeds_process_changes_and_seconds(
    tmp_path: Path, config: Config
) -> None:
    invocation = Invocation(tmp_path)
    folder = tmp_path / invocation.start(config)
    assert (folder / "changes.diff").exists()
    invocation.finish("succeeded", seconds_gpu=1.5)
    written = read_json(folder / "run_manifest.json")
    assert written["seeds"] == [0, 1, 2]
    assert written["process"]["pid"] == os.getpid()
    assert written["seconds_cpu"] > 0 and written["seconds_gpu"] == 1.5


def test_an_evaluation_belongs_to_no_study(tmp_path: Path, config: Config) -> None:
    name = Invocation(tmp_path).start(config, evaluation={"seed": 5, "model": "a"})
    written = read_json(tmp_path / name / "run_manifest.json")
    assert (written["study"], written["seeds"]) == (None, [5])
    assert written["evaluation"]["model"] == "a"


def start_and_stop(runs: Path, how: str) -> None:
    """An invocation in a process of its own that ends by `how`."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gsm8k_core.config import load_config\n"
        "from gsm8k_core.manifest import Invocation\n"
        "invocation = Invocation(Path(sys.argv[1]))\n"
        "invocation.start(load_config(Path('config.yaml')))\n" + how
    )
    subprocess.run([sys.executable, "-c", code, str(runs)], cwd=manifest.ROOT, check=False)


@pytest.mark.slow
def test_the_next_call_says_killed_of_what_was_killed(tmp_path: Path, config: Config) -> None:
    start_and_stop(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    start_and_stop(tmp_path, "invocation.finish('failed')")
    killed, failed = sorted(tmp_path.iterdir())
    assert read_json(killed / "run_manifest.json")["state"] == "killed"
    assert read_json(failed / "run_manifest.json")["state"] == "failed"

    alive = Invocation(tmp_path)
    alive.start(config)
    later = Invocation(tmp_path)
    later.start(config)  # beside one that runs
    assert alive.folder is not None
    assert read_json(alive.folder / "run_manifest.json")["state"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["failed", "interrupted"])
def test_what_a_killed_call_of_the_study_wrote_counts_as_written_by_the_next(
    tmp_path: Path, config: Config, end: str
) -> None:
    start_and_stop(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    (killed,) = tmp_path.iterdir()
    invocation = Invocation(tmp_path)
    invocation.start(config)
    assert invocation.since_ns == (killed / "locks" / "requirements.lock.txt").stat().st_ctime_ns
    invocation.finish(end)
    third = Invocation(tmp_path)
    third.start(config)
    assert third.since_ns > invocation.since_ns


@pytest.mark.slow
def test_what_a_killed_call_wrote_counts_until_a_call_of_its_study_comes_to_an_end(
    tmp_path: Path, config: Config
) -> None:
    earlier = Invocation(tmp_path)
    earlier.start(config)
    earlier.finish("succeeded")
    time.sleep(1.1)  # calls are in the order of their seconds
    start_and_stop(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    _, killed = sorted(tmp_path.iterdir())
    time.sleep(1.1)
    start_and_stop(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    of_another = config.study.model_copy(update={"name": "another"})
    other = Invocation(tmp_path)
    other.start(config.model_copy(update={"study": of_another}))
    other.finish("succeeded")
    # On another host nobody can tell that a process has ended.
    path = killed / "run_manifest.json"
    process = {"host": "elsewhere", "pid": 1, "started": 1.0}
    write_json(path, {**read_json(path), "state": "running", "process": process})
    last = Invocation(tmp_path)
    last.start(config)
    assert last.since_ns == (killed / "locks" / "requirements.lock.txt").stat().st_ctime_ns


def test_a_call_at_work_is_not_killed_when_the_clock_is_corrected(
    tmp_path: Path, config: Config
) -> None:
    first = Invocation(tmp_path)
    first.start(config)
    (folder,) = tmp_path.iterdir()
    path = folder / "run_manifest.json"
    written = read_json(path)
    for step, state in ((5.0, "running"), (-5.0, "running"), (3600.0, "killed")):
        process = {**written["process"], "started": written["process"]["started"] + step}
        write_json(path, {**written, "process": process})
        Invocation(tmp_path).start(config)
        assert read_json(path)["state"] == state


def test_a_manifest_that_cannot_be_read_stops_nobody(tmp_path: Path, config: Config) -> None:
    (tmp_path / "20260101T000000Z_nogit").mkdir()
    (tmp_path / "20260101T000000Z_nogit" / "run_manifest.json").write_text("{", encoding="utf-8")
    Invocation(tmp_path).start(config)


def test_a_dead_call_of_another_user_stops_nobody(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = {"host": platform.node(), "pid": 2**22 + 1, "started": 1.0}  # no such process
    paths = [tmp_path / f"2026010{day}T000000Z_nogit" / "run_manifest.json" for day in (1, 2)]
    for path in paths:
        write_json(path, {"state": "running", "process": process})

    def refusing(path: Path, value: Any) -> None:
        if path == paths[0]:
            raise PermissionError(13, "Permission denied", str(path))
        write_json(path, value)

    monkeypatch.setattr(manifest, "write_json", refusing)  # root may write everywhere
    Invocation(tmp_path).start(config)
    assert [read_json(path)["state"] for path in paths] == ["running", "killed"]


def test_every_record_names_the_gpus_and_the_driver_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65, 81559 MiB'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manifest.gpus.cache_clear()
    assert manifest.provenance()["gpus"] == ["NVIDIA H100, 580.65, 81559 MiB"]
    manifest.gpus.cache_clear()
