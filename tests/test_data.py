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
import yaml

from gsm8k_core import data
from gsm8k_core.config import Gsm8kDataset
from gsm8k_core.data import (
    content_digest,
    fetch_gsm8k,
    make_gsm8k,
    revise_as_platinum,
    split_gsm8k,
    with_lm_eval_examples,
)
from gsm8k_core.errors import DataError
from gsm8k_core.files import read_jsonl
from gsm8k_core.problems import Problem

Rows = list[dict[str, Any]]
ROWS: dict[str, Rows] = {
    "train": [
        {"question": f"{i} + 1?\u2028", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(20)
    ],
    "test": [{"question": "2 × 3?", "answer": "6\n#### 6"}],
}
PUBLISHED = Gsm8kDataset(kind="gsm8k").digests


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
        {"question": "a\u2028b", "answer": 'say "é"\n#### 1', "gold": "not counted"},
        {"question": "c", "answer": "#### 2"},
    ]
    by_hand = '["a\u2028b","say \\"é\\"\\n#### 1"]\n["c","#### 2"]\n'
    assert content_digest(rows) == hashlib.sha256(by_hand.encode("utf-8")).hexdigest()


def test_content_digest_depends_on_the_order_of_rows_and_not_of_keys() -> None:
    one, two = {"question": "a", "answer": "b"}, {"answer": "d", "question": "c"}
    assert content_digest([one, two]) != content_digest([two, one])
    assert content_digest([two]) == content_digest([{"question": "c", "answer": "d"}])


def test_content_digest_covers_what_sft_imitates_what_prompts_show_and_clusters() -> None:
    row = {"question": "a", "answer": "b"}
    example = {"question": "c", "answer": "d"}
    kinds: list[dict[str, Any]] = [
        row,
        {**row, "demonstration": "e"},
        {**row, "demonstration": "f"},
        {**row, "demonstration": ""},
        {**row, "examples": [example]},
        {**row, "examples": [example, example]},
        {**row, "demonstration": "e", "examples": [example]},
        {**row, "cluster": "e"},  # of which intervals are made
        {**row, "id": "e"},  # of which seeds are made
        {**row, "id": "e", "cluster": "e"},
    ]
    assert len({content_digest([one]) for one in kinds}) == len(kinds)
    absent: dict[str, Any] = {
        **row,
        "demonstration": None,
        "examples": [],
        "cluster": None,
        "id": None,
    }  # as `problem_from_row` reads them
    assert content_digest([absent]) == content_digest([row])


# Local folder


def test_a_local_folder_is_read_from_the_settings_or_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_gsm8k(settings(path=str(folder))) == (ROWS, "local folder")
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    assert fetch_gsm8k(settings()) == (ROWS, "local folder")
    monkeypatch.setenv("GSM8K_DIR", "/nonexistent")  # the settings' own path wins
    assert fetch_gsm8k(settings(path=str(folder)))[0] == ROWS


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    named = f"~/{folder.name}"
    assert fetch_gsm8k(settings(path=named))[0] == ROWS
    monkeypatch.setenv("GSM8K_DIR", named)
    assert fetch_gsm8k(settings())[0] == ROWS


def test_other_rows_stop_and_the_message_names_split_and_digests(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [*ROWS["train"][:-1], {"question": "new", "answer": "#### 1"}]
    (folder / "train.jsonl").write_bytes(to_jsonl(changed))
    with pytest.raises(DataError) as caught:
        fetch_gsm8k(settings(path=str(folder)))
    message = str(caught.value)
    assert message.startswith(
        f"{folder}/train.jsonl is not the pinned one: 20 rows with content digest "
    )
    assert content_digest(changed) in message and content_digest(ROWS["train"]) in message
    assert "If you mean to use it as it is, pin it under datasets.<name>: digests: " in message
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    with pytest.raises(DataError, match=r"GSM8K_DIR"):
        fetch_gsm8k(settings())


def test_of_rows_of_one_s_own_one_message_says_all_there_is_to_pin(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl is not .* none; .*test.jsonl is") as caught:
        fetch_gsm8k(settings(path=str(folder), digests={}))
    pinned = {"digests": yaml.safe_load(str(caught.value).partition("digests: ")[2])}
    assert fetch_gsm8k(settings(path=str(folder), **pinned))[0] == ROWS


def test_only_where_gsm8k_itself_is_pinned_an_unchanged_copy_is_asked_for(folder: Path) -> None:
    for changes, asked in (({}, False), ({"digests": PUBLISHED}, True)):
        (folder / "test.jsonl").write_bytes(to_jsonl(ROWS["train"]))
        with pytest.raises(DataError) as caught:
            fetch_gsm8k(settings(path=str(folder), **changes))
        assert (
            "Take an unchanged copy of GSM8K, or, for problems of" in str(caught.value)
        ) == asked


def test_bad_rows_of_one_s_own_are_all_named_by_file_and_row_before_any_digest(
    folder: Path,
) -> None:
    rows = to_jsonl(ROWS["train"]).splitlines(keepends=True)
    rows[2] = b"{torn\n"
    rows[4] = b'{"question": "a", "answer": "none"}\n'
    rows[6] = b'{"question": " ", "answer": "#### 1"}\n'
    rows[8] = b'{"question": "a", "answer": "#### 1", "id": "train-0"}\n'
    (folder / "train.jsonl").write_bytes(b"".join(rows))
    (folder / "test.jsonl").write_bytes(b'{"question": 5, "answer": "#### 1"}\n')
    with pytest.raises(DataError) as caught:
        fetch_gsm8k(settings(path=str(folder), digests={}))
    message = str(caught.value)
    train = f"{folder}/train.jsonl, row"
    for said in (
        f"{train} 3: not valid JSON",
        f"{train} 5: no '#### <number>' at the end of the answer: 'none'",
        f"{train} 7: 'question' is empty",
        f"{train} 9: id 'train-0' is that of row 1 too",
        f"{folder}/test.jsonl, row 1: 'question' is missing or not a text",
    ):
        assert said in message
    assert message.endswith(". Mend these; then the digests are compared")
    assert "\n" not in message and "digests:" not in message


def test_a_mistyped_key_of_one_s_own_rows_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**ROWS["train"][0], "demonstraton": "#### 1"}, *ROWS["train"][1:]]
    (folder / "train.jsonl").write_bytes(to_jsonl(rows))
    fetch_gsm8k(settings(path=str(folder)))
    assert "'demonstraton' is not read; did you mean 'demonstration'?" in caplog.text


def test_of_many_bad_rows_the_first_are_listed_and_the_others_counted(folder: Path) -> None:
    (folder / "train.jsonl").write_text("{}\n" * 25)
    with pytest.raises(DataError, match=r"train\.jsonl, row 20: .*; and 5 more\. Mend"):
        fetch_gsm8k(settings(path=str(folder)))


def test_a_file_without_a_problem_is_refused_whatever_is_pinned(folder: Path) -> None:
    (folder / "test.jsonl").write_bytes(b"")
    digests = {"train": content_digest(ROWS["train"]), "test": content_digest([])}
    with pytest.raises(DataError, match=rf"^{folder}/test\.jsonl: holds no problem"):
        make_gsm8k(settings(path=str(folder), digests=digests))


def test_a_missing_split_and_a_missing_digest_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"test\.jsonl is not .* expected none"):
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


def test_a_dataset_of_ones_own_on_the_hub_is_never_gsm8k_from_elsewhere(
    serve: Callable[[dict[str, Any]], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, rows in ROWS.items():
        (tmp_path / f"{split}.jsonl").write_bytes(to_jsonl(rows))
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    assert fetch_gsm8k(settings())[1] == "local folder"
    asked = serve({split: to_jsonl(rows) for split, rows in ROWS.items()})
    with pytest.raises(DataError, match="^mine/maths could not be fetched .hub: no route to the"):
        fetch_gsm8k(settings(hub_id="mine/maths"))
    assert asked == []
    assert fetch_gsm8k(settings(hub_id="mine/maths", path=str(tmp_path)))[0] == ROWS


TRAIN = to_jsonl(ROWS["train"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, r"train\.jsonl: HTTP 404"),
        (500, r"train\.jsonl: HTTP 500"),
        ((TRAIN[:100], len(TRAIN)), r"train\.jsonl: IncompleteRead"),
        (TRAIN[:100], r"GitHub: train\.jsonl, row 2: not valid JSON"),
        (b"<html>sign in</html>", r"GitHub: train\.jsonl, row 1: not valid JSON \(Expecting value"),
        (b"\xff\xfe", r"GitHub: train\.jsonl, row 1: not valid JSON \('utf-8' codec"),
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


@pytest.mark.slow
def test_no_network_is_one_line_that_names_gsm8k_dir(tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{closed_port()}"
    result = prepare_gsm8k(tmp_path, HF_HUB_OFFLINE="1", HTTPS_PROXY=proxy, https_proxy=proxy)
    check_no_network(result, tmp_path)
    assert "Connection refused" in result.stderr


@pytest.mark.slow
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


def test_an_id_that_occurs_twice_in_a_split_is_named() -> None:
    rows = [{**row, "id": "x"} for row in ROWS["train"][:8]]
    with pytest.raises(DataError, match="GSM8K train: id 'x' occurs twice"):
        split_gsm8k({**ROWS, "train": rows}, 2)


def test_a_val_that_takes_all_of_train_is_an_error() -> None:
    with pytest.raises(DataError, match="num_val is 20 of 20 train rows"):
        split_gsm8k(ROWS, num_val=20)


def test_a_row_without_a_gold_answer_is_named() -> None:
    rows = {**ROWS, "test": [{"question": "a", "answer": "none"}]}
    with pytest.raises(DataError, match="GSM8K test, row 1: no '#### <number>'"):
        split_gsm8k(rows, num_val=1)


# Worked examples, one draw a test problem (tests/test_lm_eval_prompts.py compares the prompts)


def test_examples_are_drawn_from_all_of_train_problem_by_problem(folder: Path) -> None:
    made, _ = make_gsm8k(settings(path=str(folder), examples_per_test_problem=3))
    (problem,) = made["test"]
    generator = random.Random(1234)
    assert [example.question for example in problem.examples] == [
        row["question"] for row in generator.sample(ROWS["train"], 3)
    ]
    assert all(one.examples == () for split in ("train", "val") for one in made[split])

    test = split_gsm8k({**ROWS, "test": ROWS["test"] * 3}, num_val=1)["test"]
    drawn = with_lm_eval_examples(test, ROWS["train"], 5, seed=1234)
    assert len({problem.examples for problem in drawn}) == 3
    assert all(len(set(problem.examples)) == 5 for problem in drawn)
    other = with_lm_eval_examples(test, ROWS["train"], 5, seed=1)
    assert {problem.examples for problem in other}.isdisjoint({p.examples for p in drawn})


def test_a_test_problem_in_train_cannot_become_an_example() -> None:
    rows = [*ROWS["train"], {"question": " 2  × 3? ", "answer": "#### 6"}]
    test = split_gsm8k(ROWS, num_val=1)["test"]
    with pytest.raises(DataError, match="GSM8K train, row 21 asks what test-0 asks"):
        with_lm_eval_examples(test, rows, num_examples=2, seed=1234)


def test_more_examples_than_rows_are_an_error() -> None:
    test = split_gsm8k(ROWS, num_val=1)["test"]
    with pytest.raises(DataError, match="examples_per_test_problem is 21, but train has 20 rows"):
        with_lm_eval_examples(test, ROWS["train"], num_examples=21, seed=1234)


# GSM8K-Platinum

GSM8K_TEST_DIGEST = Gsm8kDataset(kind="gsm8k").digests["test"]


def test_platinum_drops_rows_and_corrects_golds_by_row_number() -> None:
    test = [Problem(f"test-{i}", f"q{i}", f"so\n#### {i}", str(i)) for i in range(1319)]
    revised = {problem.id: problem for problem in revise_as_platinum(test, GSM8K_TEST_DIGEST)}
    assert len(revised) == 1209
    assert "test-4" not in revised and "test-1298" not in revised  # the first and the last removed
    assert revised["test-5"] == test[5]
    assert revised["test-1309"] == Problem("test-1309", "q1309", "#### 2180", "2180")


def test_platinum_of_other_rows_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="GSM8K-Platinum is known by row number .* platinum: false"):
        make_gsm8k(settings(path=str(folder), platinum=True))


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


@pytest.mark.skipif(not REAL, reason="set GSM8K_DIR to a folder with GSM8K to make Platinum of it")
def test_the_real_platinum_has_1209_problems_and_ten_corrected_golds() -> None:
    gsm8k, _ = make_gsm8k(Gsm8kDataset(kind="gsm8k", path=REAL))
    platinum, _ = make_gsm8k(Gsm8kDataset(kind="gsm8k", path=REAL, platinum=True))
    assert platinum["train"] == gsm8k["train"] and platinum["val"] == gsm8k["val"]
    before = {problem.id: problem for problem in gsm8k["test"]}
    after = {problem.id: problem for problem in platinum["test"]}
    assert len(before) == 1319 and len(after) == 1209
    corrected = {
        key: (before[key].gold, problem.gold)
        for key, problem in after.items()
        if problem.gold != before[key].gold
    }
    assert corrected == {
        "test-288": ("3", "4"),
        "test-403": ("81", "135"),
        "test-454": ("150", "240"),
        "test-649": ("162000", "160000"),
        "test-749": ("3", "6"),
        "test-823": ("14", "18"),
        "test-952": ("360", "1800"),
        "test-1035": ("35", "40"),
        "test-1071": ("251", "257"),
        "test-1309": ("2280", "2180"),
    }
    assert all(after[key].question == before[key].question for key in after)
    assert all(after[key] == before[key] for key in after if key not in corrected)


@pytest.mark.skipif(
    not REAL or not (Path(REAL) / "platinum_delta.jsonl").exists(),
    reason="set GSM8K_DIR to a folder that has platinum_delta.jsonl too to compare the facts",
)
def test_the_packaged_facts_are_those_of_the_published_delta() -> None:
    assert REAL is not None
    test = make_gsm8k(Gsm8kDataset(kind="gsm8k", path=REAL))[0]["test"]
    revised = {p.id: p for p in revise_as_platinum(test, GSM8K_TEST_DIGEST)}
    delta = read_jsonl(Path(REAL) / "platinum_delta.jsonl")
    for row in delta:
        problem = test[row["test_index"]]
        digest = hashlib.sha256(problem.question.encode("utf-8")).hexdigest()
        assert (digest, problem.gold) == (row["question_sha256"], row["gsm8k_gold"])
        if row["status"] == "removed":
            assert problem.id not in revised
        else:
            assert revised[problem.id].gold == row["platinum_gold"]
    assert len(test) - len(revised) == sum(row["status"] == "removed" for row in delta) == 110
