"""GSM8K: the pinned rows from whatever source, and a split that depends on the questions alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gsm8k_core import data
from gsm8k_core.config import Gsm8kDataset
from gsm8k_core.data import content_digest, fetch_gsm8k, split_gsm8k
from gsm8k_core.errors import DataError

Rows = list[dict[str, Any]]
ROWS: dict[str, Rows] = {
    "train": [
        {"question": f"{i} + 1?\u2028", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(20)
    ],
    "test": [{"question": "2 × 3?", "answer": "6\n#### 6"}],
}


def to_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def settings(**changes: Any) -> Gsm8kDataset:
    digests = {split: content_digest(rows) for split, rows in ROWS.items()}
    return Gsm8kDataset(**{"kind": "gsm8k", "digests": digests, "num_val": 5, **changes})


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No $GSM8K_DIR, no proxy before the loopback server."""
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, rows in ROWS.items():
        (tmp_path / f"{split}.jsonl").write_bytes(to_jsonl(rows))
    return tmp_path


# Digests


def test_content_digest_is_sha256_over_compact_json_lines() -> None:
    rows = [
        {"question": "a\u2028b", "answer": 'say "é"\n#### 1', "id": "not counted"},
        {"question": "c", "answer": "#### 2"},
    ]
    by_hand = '["a\u2028b","say \\"é\\"\\n#### 1"]\n["c","#### 2"]\n'
    assert content_digest(rows) == hashlib.sha256(by_hand.encode("utf-8")).hexdigest()


def test_content_digest_depends_on_the_order_of_rows_and_not_of_keys() -> None:
    one, two = {"question": "a", "answer": "b"}, {"answer": "d", "question": "c"}
    assert content_digest([one, two]) != content_digest([two, one])
    assert content_digest([two]) == content_digest([{"question": "c", "answer": "d"}])


# Local folder


def test_a_local_folder_is_read_from_the_settings_or_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_gsm8k(settings(path=str(folder))) == (ROWS, "local folder")
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    assert fetch_gsm8k(settings()) == (ROWS, "local folder")
    monkeypatch.setenv("GSM8K_DIR", "/nonexistent")  # the settings' own path wins
    assert fetch_gsm8k(settings(path=str(folder)))[0] == ROWS


def test_other_rows_stop_and_the_message_names_split_and_digests(folder: Path) -> None:
    changed = [*ROWS["train"][:-1], {"question": "new", "answer": "#### 1"}]
    (folder / "train.jsonl").write_bytes(to_jsonl(changed))
    with pytest.raises(DataError) as caught:
        fetch_gsm8k(settings(path=str(folder)))
    message = str(caught.value)
    assert message.startswith("GSM8K train is not the pinned one: 20 rows with content digest ")
    assert content_digest(changed) in message and content_digest(ROWS["train"]) in message
    assert "local folder" in message


def test_a_missing_split_and_a_missing_digest_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"digests\.test: missing; this source has [0-9a-f]{64}"):
        fetch_gsm8k(settings(path=str(folder), digests={"train": content_digest(ROWS["train"])}))
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        fetch_gsm8k(settings(path=str(folder)))


def test_a_folder_without_the_rows_is_not_replaced_by_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_settings: Gsm8kDataset) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(data, "_from_hub", fail)
    monkeypatch.setattr(data, "_from_github", fail)
    with pytest.raises(DataError, match="no such file"):
        fetch_gsm8k(settings(path=str(tmp_path)))


# GitHub, from a real server on loopback


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], list[str]]]:
    """`serve({split: bytes | status | (bytes, claimed length)})` in GitHub's place."""
    servers = []

    def start(answers: dict[str, Any]) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                answer = answers[Path(self.path).stem]
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                body, length = answer if isinstance(answer, tuple) else (answer, len(answer))
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        monkeypatch.setattr(data, "GITHUB_RAW", f"http://127.0.0.1:{server.server_port}")

        def no_hub(_settings: Gsm8kDataset) -> Any:
            raise ConnectionError("no route to the hub")

        monkeypatch.setattr(data, "_from_hub", no_hub)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_github_is_asked_when_the_hub_cannot_be_reached(
    serve: Callable[[dict[str, Any]], list[str]],
) -> None:
    asked = serve({split: to_jsonl(rows) for split, rows in ROWS.items()})
    rows, source = fetch_gsm8k(settings(commit="abc"))
    assert rows == ROWS and source == "GitHub: openai/grade-school-math at abc"
    start = "/openai/grade-school-math/abc/grade_school_math/data"
    assert asked == [f"{start}/train.jsonl", f"{start}/test.jsonl"]


TRAIN = to_jsonl(ROWS["train"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, r"train\.jsonl: HTTP 404"),
        (500, r"train\.jsonl: HTTP 500"),
        ((TRAIN[:100], len(TRAIN)), r"train\.jsonl: IncompleteRead"),
        (TRAIN[:100], "GitHub: Unterminated string|GitHub: Expecting"),
        (b"<html>sign in</html>", "GitHub: Expecting value"),
        (b"\xff\xfe", "GitHub: 'utf-8' codec"),
    ],
)
def test_a_bad_answer_is_one_clear_error_that_names_the_way_out(
    serve: Callable[[dict[str, Any]], list[str]], answer: Any, message: str
) -> None:
    serve({"train": answer, "test": to_jsonl(ROWS["test"])})
    with pytest.raises(DataError, match=message) as caught:
        fetch_gsm8k(settings())
    text = str(caught.value)
    assert "hub: no route to the hub" in text and "set GSM8K_DIR" in text and "\n" not in text


def test_a_body_that_ends_between_rows_has_the_wrong_digest(
    serve: Callable[[dict[str, Any]], list[str]],
) -> None:
    serve({"train": to_jsonl(ROWS["train"][:7]), "test": to_jsonl(ROWS["test"])})
    with pytest.raises(DataError, match="GSM8K train is not the pinned one: 7 rows"):
        fetch_gsm8k(settings())


# The hub, through its real client


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Refuse(BaseHTTPRequestHandler):
    """A proxy that lets nobody through, as a company's may."""

    def do_CONNECT(self) -> None:
        self.send_error(403)

    def log_message(self, *_args: Any) -> None:
        pass


def prepare_gsm8k(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    hidden = ("no_proxy", "NO_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    script = Path(__file__).resolve().parent.parent / "scripts" / "prepare_data.py"
    output = str(tmp_path / "gsm8k")
    return subprocess.run(
        [sys.executable, str(script), "--dataset", "gsm8k", "--settings", '{"kind": "gsm8k"}',
         "--output-dir", output],
        env={**kept, "HF_HOME": str(tmp_path / "hf"), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def check_no_network(result: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.endswith(errors[0] + "\n")
    assert errors[0].startswith("error: GSM8K could not be fetched (hub: ")
    assert "GitHub: " in errors[0] and "GSM8K_DIR" in errors[0]
    assert not (tmp_path / "gsm8k").exists()


def test_no_network_is_one_line_that_names_gsm8k_dir(tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{closed_port()}"
    result = prepare_gsm8k(tmp_path, HF_HUB_OFFLINE="1", HTTPS_PROXY=proxy, https_proxy=proxy)
    check_no_network(result, tmp_path)
    assert "Connection refused" in result.stderr


def test_a_proxy_that_refuses_is_one_line_that_names_gsm8k_dir(tmp_path: Path) -> None:
    # The hub's client raises its ProxyError here, which is no OSError.
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuse)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        proxy = f"http://127.0.0.1:{server.server_port}"
        result = prepare_gsm8k(tmp_path, HTTPS_PROXY=proxy, https_proxy=proxy)
    finally:
        server.shutdown()
        server.server_close()
    check_no_network(result, tmp_path)
    assert "ProxyError" in result.stderr


# The split


def test_val_is_the_train_questions_of_smallest_digest() -> None:
    splits = split_gsm8k(ROWS, num_val=5)
    digests = {
        row["question"]: hashlib.sha256(row["question"].encode("utf-8")).hexdigest()
        for row in ROWS["train"]
    }
    smallest = sorted(digests, key=lambda question: digests[question])[:5]
    assert {problem.question for problem in splits["val"]} == set(smallest)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [15, 5, 1]
    assert not {p.id for p in splits["train"]} & {p.id for p in splits["val"]}


def test_val_does_not_depend_on_the_order_of_rows() -> None:
    shuffled = list(ROWS["train"])
    random.Random(1).shuffle(shuffled)
    assert shuffled != ROWS["train"]
    one, other = (split_gsm8k({**ROWS, "train": rows}, 5) for rows in (ROWS["train"], shuffled))
    for split in ("train", "val"):
        assert {p.question for p in one[split]} == {p.question for p in other[split]}


def test_a_larger_val_holds_the_smaller_one() -> None:
    small, large = (split_gsm8k(ROWS, number)["val"] for number in (3, 9))
    assert {p.id for p in small} < {p.id for p in large}


def test_rows_keep_their_order_and_are_named_by_their_row_in_the_source() -> None:
    splits = split_gsm8k(ROWS, num_val=5)
    numbers = [int(problem.id.removeprefix("train-")) for problem in splits["train"]]
    assert numbers == sorted(numbers)
    assert all(
        p.question == ROWS["train"][int(p.id.removeprefix("train-"))]["question"]
        for p in splits["train"] + splits["val"]
    )


def test_a_val_that_takes_all_of_train_is_an_error() -> None:
    with pytest.raises(DataError, match="num_val is 20 of 20 train rows"):
        split_gsm8k(ROWS, num_val=20)


def test_a_row_without_a_gold_answer_is_named() -> None:
    rows = {**ROWS, "test": [{"question": "a", "answer": "none"}]}
    with pytest.raises(DataError, match="GSM8K test, row 1: no '#### <number>'"):
        split_gsm8k(rows, num_val=1)


# The real thing

REAL = os.environ.get("GSM8K_DIR")


@pytest.mark.skipif(not REAL, reason="set GSM8K_DIR to a folder with GSM8K to check the real rows")
def test_the_real_gsm8k_has_the_pinned_digests_and_every_gold_parses() -> None:
    rows, source = fetch_gsm8k(Gsm8kDataset(kind="gsm8k", path=REAL))
    assert source == "local folder"
    assert {split: len(of_split) for split, of_split in rows.items()} == {
        "train": 7473,
        "test": 1319,
    }
    problems = split_gsm8k(rows, num_val=500)
    assert {split: len(of_split) for split, of_split in problems.items()} == {
        "train": 6973,
        "val": 500,
        "test": 1319,
    }
    everything = [problem for of_split in problems.values() for problem in of_split]
    for problem in everything:
        float(problem.gold)
    # This row is torn in two by str.splitlines.
    assert sum("\u2028" in problem.question for problem in everything) == 1
