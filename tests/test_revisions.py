"""A name on the hub can move: what was prepared says which commit it stood for, and is kept."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from script_modules import load_script

from gsm8k_core.data import content_digest
from gsm8k_core.files import read_json
from gsm8k_core.problems import read_problems

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATASET = "somebody/tiny", "somebody/sums"
ROWS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def files(tiny_folder: Path) -> dict[str, bytes]:
    """The embedded model, as the hub has it."""
    return {
        path.name: path.read_bytes()
        for path in tiny_folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }


def run(folder: Path, hub: HubServer, *words: str, succeeds: bool = True) -> str:
    """Run a script or module in `folder`; what it said on stderr."""
    hidden = ("HF_HUB_OFFLINE", "GSM8K_DIR", "HTTPS_PROXY", "https_proxy")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={
            **environment, **hub.environment, "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode == 0) is succeeds, result.stderr
    return result.stderr


def of_model(revision: str) -> list[str]:
    """Arguments of prepare_model."""
    settings = json.dumps({"source": "hub", "hub_id": MODEL, "revision": revision})
    folder = "artifacts/models/tiny"
    return ["--model-name", "tiny", "--settings", settings, "--output-dir", folder]


@pytest.fixture
def prepare_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[HubServer, str], str]]:
    """`prepare_model(hub, revision)`: the script in this process; what it logged."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)

    def prepare(hub: HubServer, revision: str) -> str:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        close_session()  # the client reads the proxies when it is made
        caplog.clear()
        load_script("prepare_model").main(of_model(revision))
        return caplog.text

    yield prepare
    close_session()


def manifest_of(folder: Path) -> dict[str, object]:
    manifest = read_json(folder / "artifacts" / "models" / "tiny" / "manifest.json")
    assert isinstance(manifest, dict)
    return manifest


@pytest.mark.slow
def test_a_branch_is_recorded_with_its_commit_and_said_to_move_with_the_hub_and_without(
    prepare_model: Callable[[HubServer, str], str],
    hub: HubServer,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    commit = hub.push("models", MODEL, files)
    said = prepare_model(hub, "main")
    manifest = manifest_of(tmp_path)
    assert (manifest["revision"], manifest["commit"]) == ("main", commit)
    assert re.search(rf"WARNING .*{MODEL} at main: this name can move.* commit {commit} now", said)
    # Without the hub, its cache still knows the commit.
    with HubServer() as closed:
        pass
    assert "can move" in prepare_model(closed, "main")
    assert manifest_of(tmp_path)["commit"] == commit
    # The same settings, later: other weights, and the record says so.
    moved = hub.push("models", MODEL, {**files, "special.txt": b"new"})
    prepare_model(hub, "main")
    assert manifest_of(tmp_path)["commit"] == moved != commit


@pytest.mark.slow
def test_a_commit_is_recorded_and_nothing_is_said_of_it(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    others = {"original/a.safetensors": b"a", "consolidated.00.safetensors": b"the same again"}
    commit = hub.push("models", MODEL, {**files, **others})
    hub.push("models", MODEL, {**files, "special.txt": b"new"})
    script = str(ROOT / "scripts" / "prepare_model.py")
    said = run(tmp_path, hub, script, *of_model(commit))
    assert not [asked for asked in hub.requests for name in others if name in str(asked)]
    assert manifest_of(tmp_path)["commit"] == commit
    assert "WARNING" not in said and "special.txt" not in str(manifest_of(tmp_path)["files"])


@pytest.mark.slow
def test_prepared_weights_are_used_again_and_not_fetched_anew_when_the_branch_has_moved(
    prepare_model: Callable[[HubServer, str], str],
    hub: HubServer,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    commit = hub.push("models", MODEL, files)
    prepare_model(hub, "main")
    hub.push("models", MODEL, {**files, "special.txt": b"new"})
    num_requests = len(hub.requests)
    model = {"source": "hub", "hub_id": MODEL, "revision": "main", "prompt": "plain", "gpus": 0}
    suite = {"dataset": "small", "max_new_tokens": 4}
    dataset = {"kind": "arithmetic", "num_train": 20, "num_val": 2, "num_test": 2}
    overlay = {
        "models": {"tiny": model}, "datasets": {"small": dataset}, "suites": {"small": suite},
    }  # fmt: skip
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    run(
        tmp_path, hub, "-m", "gsm8k_core.cli", "eval", "--model", "tiny", "--suite", "small",
        "--config", str(ROOT / "config.yaml"), "more.yaml",
    )  # fmt: skip
    (path,) = (tmp_path / "artifacts" / "runs").glob("*/run_manifest.json")
    assert read_json(path)["models"]["tiny"]["commit"] == commit
    assert len(hub.requests) == num_requests


def parquet(rows: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    return buffer.getvalue()


def push_dataset(hub: HubServer, train: list[dict[str, str]], test: list[dict[str, str]]) -> str:
    return hub.push(
        "datasets",
        DATASET,
        {"train-0.parquet": parquet(train), "test-0.parquet": parquet(test),
         "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n"
         b"  - split: train\n    path: train-*\n  - split: test\n    path: test-*\n---\n"},
    )  # fmt: skip


def prepare_dataset(folder: Path, hub: HubServer, succeeds: bool = True, **settings: Any) -> str:
    named = {"kind": "gsm8k", "hub_id": DATASET, "hub_config": "main", "num_val": 1, **settings}
    return run(
        folder, hub, str(ROOT / "scripts" / "prepare_data.py"), "--dataset", "sums",
        "--settings", json.dumps(named), "--output-dir", "sums", succeeds=succeeds,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_a_dataset_is_recorded_with_its_commit(named: bool, hub: HubServer, tmp_path: Path) -> None:
    train, test = ROWS[:3], ROWS[3:]
    commit = push_dataset(hub, train, test)
    digests = {"train": content_digest(train), "test": content_digest(test)}
    revision = "main" if named else commit
    said = prepare_dataset(tmp_path, hub, revision=revision, digests=digests)
    source = read_json(tmp_path / "sums" / "manifest.json")["source"]
    at = f"main = {commit}" if named else commit
    assert source == f"hub: {DATASET} (main) at {at}"
    assert ("this name can move" in said) is named


@pytest.mark.slow
def test_of_a_dataset_on_the_hub_all_columns_that_mean_something_are_taken(
    hub: HubServer, tmp_path: Path
) -> None:
    more = {"demonstration": "It is #### 0", "cluster": "sums"}
    rows = [{**row, "id": f"own-{n}", **more} for n, row in enumerate(ROWS)]
    train, test = rows[:3], rows[3:]
    commit = push_dataset(hub, *([{**r, "level": "easy"} for r in part] for part in (train, test)))
    digests = {"train": content_digest(train), "test": content_digest(test)}
    prepare_dataset(tmp_path, hub, revision=commit, digests=digests)
    (found,) = read_problems(tmp_path / "sums" / "test.jsonl")
    assert (found.id, found.demonstration, found.cluster) == ("own-3", "It is #### 0", "sums")


@pytest.mark.slow
def test_a_dataset_on_the_hub_whose_gold_is_not_that_of_its_answer_is_refused(
    hub: HubServer, tmp_path: Path
) -> None:
    train, test = ([{**row, "gold": "-1"} for row in part] for part in (ROWS[:3], ROWS[3:]))
    commit = push_dataset(hub, train, test)
    said = prepare_dataset(tmp_path, hub, succeeds=False, revision=commit, digests={})
    assert f"{DATASET} train, row 1: 'gold' is '-1'" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_dataset_on_the_hub_with_other_columns_is_refused_by_row_and_column(
    hub: HubServer, tmp_path: Path
) -> None:
    rows = [{"problem": row["question"], "answer": row["answer"]} for row in ROWS]
    commit = push_dataset(hub, rows[:3], rows[3:])
    said = prepare_dataset(tmp_path, hub, succeeds=False, revision=commit, digests={})
    assert f"{DATASET} train, row 1: 'question' is missing or not a text" in said
    assert "Traceback" not in said
