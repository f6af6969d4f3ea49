"""Collecting traces from a server that misbehaves, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chat_server import ChatServer, HeldServer

from gsm8k_core import trace_collection
from gsm8k_core.chat_api import ChatClient, retry_delay
from gsm8k_core.config import CollectionSettings, dump
from gsm8k_core.errors import ApiError, DataError
from gsm8k_core.files import read_json, read_jsonl
from gsm8k_core.problems import Problem, write_problems
from gsm8k_core.trace_collection import MAX_FAILED_IN_A_ROW, Amount, Collection, Collector

ROOT = Path(__file__).resolve().parent.parent
FAKE_KEY = "sk-planted0123456789abcdef"
FILES = ("answers.jsonl", "incomplete.jsonl", "failed.jsonl", "ledger.jsonl")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)


def additions(count: int) -> list[Problem]:
    """`What is N + 1?`: what the server can solve."""
    return [
        Problem(f"add-{n}", f"What is {n} + 1?", f"{n} + 1 = {n + 1}\n#### {n + 1}", str(n + 1))
        for n in range(count)
    ]


def settings_for(url: str, **changes: Any) -> CollectionSettings:
    api = {
        "base_url": url, "model": "m", "max_tokens": 100, "concurrency": 8, "max_attempts": 6,
        "request_seconds": 60.0, "backoff_seconds": 0.01, "max_backoff_seconds": 0.1,
    } | changes.pop("api", {})  # fmt: skip
    prompt = {"template": "{question}", "chat": True, "answer_marker": "boxed"}
    return CollectionSettings(**{"name": "t", "prompt": prompt, "api": api, **changes})


def collect(
    folder: Path, settings: CollectionSettings, problems: list[Problem]
) -> tuple[Collection, Collector]:
    """Collect what is missing; the collection is closed again, and checked against itself."""

    async def run(collector: Collector) -> None:
        async with collector.client:
            await collector.run()

    with closing(Collection(folder, settings, problems)) as collection:
        collector = Collector(collection, ChatClient(settings.api), problems, lambda: None)
        try:
            asyncio.run(run(collector))
        finally:
            check(folder)
    with closing(Collection(folder, settings, problems)) as again:
        assert again.done == collection.done
        assert again.spent.tokens == collection.spent.tokens
        assert again.spent.money == pytest.approx(collection.spent.money)
    return collection, collector


def check(folder: Path) -> None:
    """No row is torn, and no trace is there twice."""
    for name in FILES:
        content = (folder / name).read_bytes()
        assert content == b"" or content.endswith(b"\n")
    rows = read_jsonl(folder / "answers.jsonl") + read_jsonl(folder / "incomplete.jsonl")
    tasks = Counter((row["problem_id"], row["sample_index"]) for row in rows)
    assert not tasks or max(tasks.values()) == 1


def once(fault: str, then: str = "answer") -> Callable[[str, int], str]:
    """A fault for the first request of each question."""
    return lambda _, number: fault if number == 1 else then


def answer(_: str, __: int) -> str:
    return "answer"


# -------------------------------------------------------------------------------- one after another


def test_an_answer_is_recorded_with_what_it_took(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        settings = settings_for(server.url, budget={"prompt_price": 1.0, "completion_price": 2.0})
        collect(tmp_path, settings, additions(1))
    (row,) = read_jsonl(tmp_path / "answers.jsonl")
    assert row.pop("seconds") > 0 and row.pop("at").endswith("+00:00")
    assert row == {
        "problem_id": "add-0", "sample_index": 0, "question": "What is 0 + 1?",
        "reasoning": "0 + 1 = 1", "content": "The answer is \\boxed{1}.", "finish_reason": "stop",
        "model": "served-model", "request": 1, "attempts": 1, "tokens": 53,
        "usage": {"prompt_tokens": 3, "completion_tokens": 50, "total_tokens": 53},
        "money": pytest.approx((3 * 1.0 + 50 * 2.0) / 1e6),
    }  # fmt: skip
    (request,) = server.requests
    assert request == {
        "model": "m", "max_tokens": 100, "stream": False,
        "messages": [{"role": "user", "content": "What is 0 + 1?"}],
    }  # fmt: skip
    assert "uthorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "HTTP 429: {"),
        ("429_after_1", "HTTP 429"),
        ("503_date", "HTTP 503"),
        ("503", "HTTP 503"),
        ("408", "HTTP 408"),
        ("409", "HTTP 409"),
        ("500", "HTTP 500"),
        ("502", "HTTP 502: <html>"),
        ("reset", "ReadError"),
        ("malformed", "not a JSON document (JSONDecodeError, application/json)"),
        ("not_utf8", "not a JSON document (UnicodeDecodeError, application/json)"),
        ("deep", "not a JSON document (RecursionError, application/json)"),
        ("blank", "not a JSON document"),
        ("html", "not a JSON document (JSONDecodeError, text/html): <html><body>Log in"),
        ("empty_choices", "no choices"),
        ("gave_up", "the server gave up: finish reason insufficient_system_resource"),
    ],
)
def test_a_fault_is_repeated_until_there_is_an_answer(
    fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []

    def noted_delay(*arguments: Any) -> float:
        delays.append(retry_delay(*arguments))
        return delays[-1]

    monkeypatch.setattr(trace_collection, "retry_delay", noted_delay)
    with ChatServer(once(fault)) as server:
        collection, _ = collect(tmp_path, settings_for(server.url), additions(1))
    (row,) = read_jsonl(tmp_path / "answers.jsonl")
    assert row["attempts"] == 2 and row["request"] == 2
    ledger = read_jsonl(tmp_path / "ledger.jsonl")[1:]
    assert [("reason" in entry, entry["request"]) for entry in ledger] == [
        (False, 1), (True, 1), (False, 2),
    ]  # fmt: skip
    assert ledger[1]["reason"].startswith(reason)
    assert collection.spent.tokens >= server.billed_tokens
    if fault in ("409", "429", "429_after_1", "503", "503_date"):
        assert ledger[1]["tokens"] == 0  # a refusal to begin costs nothing
    elif fault in ("empty_choices", "gave_up"):
        assert ledger[1]["tokens"] == 53  # the server says what it did
    else:
        assert ledger[1]["tokens"] == ledger[0]["tokens"] > 600
    (delay,) = delays
    assert (delay >= 1.0) == (fault in ("429_after_1", "503_date"))
    assert delay <= server.times[1] - server.times[0] < delay + 10.0


def test_a_body_that_stalls_ends_at_the_wall_deadline(tmp_path: Path) -> None:
    with ChatServer(once("stall")) as server:
        settings = settings_for(server.url, api={"request_seconds": 2.0})
        collect(tmp_path, settings, additions(1))
    assert read_jsonl(tmp_path / "ledger.jsonl")[2]["reason"] == "no whole answer within 2 s"
    assert 1.0 < server.times[1] - server.times[0] < 15.0
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("waiting", ["keep_alive", "comments", "text_plain", "vllm_answer"])
def test_what_is_odd_but_an_answer_is_taken(waiting: str, tmp_path: Path) -> None:
    with ChatServer(lambda *_: waiting) as server:
        collect(tmp_path, settings_for(server.url), additions(2))
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["attempts"] for row in rows] == [1, 1]
    assert sorted(row["content"] for row in rows) == [
        "The answer is \\boxed{1}.", "The answer is \\boxed{2}.",
    ]  # fmt: skip
    assert all(row["reasoning"] for row in rows)


def test_keep_alives_without_an_end_stop_at_the_wall_deadline(tmp_path: Path) -> None:
    with ChatServer(once("endless_keep_alive")) as server:
        settings = settings_for(server.url, api={"request_seconds": 0.5})
        collect(tmp_path, settings, additions(1))
    assert server.times[1] - server.times[0] < 15.0
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 1


@pytest.mark.parametrize(
    ("kind", "reason"), [("length", "length"), ("content_filter",) * 2, ("empty", "stop")]
)
def test_incomplete_answers_are_kept_apart_and_not_asked_again(
    kind: str, reason: str, tmp_path: Path
) -> None:
    with ChatServer(lambda *_: kind) as server:
        for _ in range(2):
            collection, _ = collect(tmp_path, settings_for(server.url), additions(3))
        assert server.asked.total() == 3
    assert (tmp_path / "answers.jsonl").read_bytes() == b""
    assert [row["finish_reason"] for row in read_jsonl(tmp_path / "incomplete.jsonl")] == (
        [reason] * 3
    )
    assert collection.spent.tokens == server.billed_tokens


def test_a_text_that_utf8_cannot_hold_does_not_break_the_file(tmp_path: Path) -> None:
    with ChatServer(lambda *_: "surrogate") as server:
        collect(tmp_path, settings_for(server.url), additions(2))
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["reasoning"] for row in rows] == ["half ?, U+2028 \u2028."] * 2


def test_a_server_that_tells_no_usage_is_charged_at_the_worst_case(tmp_path: Path) -> None:
    with ChatServer(lambda *_: "no_usage") as server:
        collection, _ = collect(tmp_path, settings_for(server.url), additions(1))
    reserved = read_jsonl(tmp_path / "ledger.jsonl")[1]["tokens"]
    assert collection.spent.tokens == reserved > server.billed_tokens


@pytest.mark.parametrize("status", [400, 401, 402, 422])
def test_a_refusal_stops_everything_with_one_clear_line(status: int, tmp_path: Path) -> None:
    with ChatServer(lambda *_: str(status)) as server:
        settings = settings_for(server.url, api={"concurrency": 2})
        with pytest.raises(ApiError, match=rf"^http://127.*/v1: HTTP {status}, .*; it says: {{"):
            collect(tmp_path, settings, additions(50))
        assert server.asked.total() <= 2
    assert (tmp_path / "failed.jsonl").read_bytes() == b""  # no fault of the question


def test_a_question_that_is_refused_alone_fails_and_the_others_are_asked(tmp_path: Path) -> None:
    def behave(question: str, _: int) -> str:
        return "400" if question == "What is 3 + 1?" else "answer"

    with ChatServer(behave) as server:
        collect(tmp_path, settings_for(server.url, api={"concurrency": 1}), additions(10))
        assert server.asked["What is 3 + 1?"] == 1  # which is not asked in vain again and again
    (row,) = read_jsonl(tmp_path / "failed.jsonl")
    assert (row["problem_id"], row["attempts"]) == ("add-3", 1) and "HTTP 400" in row["reason"]
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 9


def test_a_wrong_address_is_said_to_be_one(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        settings = settings_for(server.url.removesuffix("/v1"))
        with pytest.raises(ApiError, match="HTTP 404, there is no such address or model: see api"):
            collect(tmp_path, settings, additions(3))


def test_a_key_that_the_server_quotes_is_in_no_error_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", FAKE_KEY)
    with ChatServer(once("500", then="401")) as server:
        with pytest.raises(ApiError, match=r"sent Bearer \*\*\*") as error:
            collect(tmp_path, settings_for(server.url), additions(1))
    assert f"uthorization: Bearer {FAKE_KEY}" in server.headers[0]
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert any("sent Bearer ***" in text for text in texts)
    assert not any(FAKE_KEY in text for text in [str(error.value), *texts])


class IndiscreetServer(ChatServer):
    """Names a secret that is not the collector's own."""

    async def do_indiscreet(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.send(writer, 503, b'{"error": "planted-other-secret is no key here"}')

    async def do_indiscreet_refusal(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.send(writer, 401, b'{"error": "planted-other-secret is no key here"}')


def test_other_secrets_that_a_server_names_are_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXY_PASSWORD", "planted-other-secret")
    with IndiscreetServer(lambda *_: "indiscreet") as server:
        collect(tmp_path, settings_for(server.url, api={"max_attempts": 1}), additions(1))
        server.behave = lambda *_: "indiscreet_refusal"
        with pytest.raises(ApiError):
            collect(tmp_path, settings_for(server.url), additions(1))
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert sum(text.count("*** is no key here") for text in texts) == 3
    assert not any("planted-other-secret" in text for text in texts)


def test_a_refusal_is_said_at_once_and_not_when_the_others_have_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def behave(question: str, _: int) -> str:
        return "402" if question == "What is 0 + 1?" else "answer"

    def errors() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

    # The other answer comes when the refusal has been said.
    with HeldServer(behave, until=lambda: bool(errors())) as server:
        with pytest.raises(ApiError, match="HTTP 402"):
            collect(tmp_path, settings_for(server.url, api={"concurrency": 2}), additions(2))
    (said,) = errors()
    assert "HTTP 402, the account has no balance left" in said
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 1


@pytest.mark.slow
def test_an_empty_account_midway_loses_no_answer_that_is_under_way(tmp_path: Path) -> None:
    def behave(question: str, _: int) -> str:
        return "402" if question == "What is 20 + 1?" else "keep_alive"

    with ChatServer(behave) as server:
        settings = settings_for(server.url, api={"concurrency": 3})
        with pytest.raises(ApiError, match="HTTP 402, the account has no balance left"):
            collect(tmp_path, settings, additions(40)[18:])
        assert server.asked.total() == 3  # 18 and 19 were under way, nothing came after
        assert len(read_jsonl(tmp_path / "answers.jsonl")) == 2
        server.behave = answer
        collect(tmp_path, settings, additions(40)[18:])
        assert server.asked_again == []
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 22


def test_a_wait_that_is_too_long_fails_the_trace_with_its_reason(tmp_path: Path) -> None:
    with ChatServer(lambda *_: "429_tomorrow") as server:
        collect(tmp_path, settings_for(server.url), additions(1))
    (row,) = read_jsonl(tmp_path / "failed.jsonl")
    assert row["reason"].startswith("the server asks to wait 86400 s (HTTP 429")
    assert row["attempts"] == 1 == server.asked.total()


def test_a_trace_that_failed_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    problems = additions(3)
    with ChatServer(lambda _, number: "500" if number <= 2 else "answer") as server:
        settings = settings_for(server.url, api={"max_attempts": 2})
        collect(tmp_path, settings, problems)
        failed = read_jsonl(tmp_path / "failed.jsonl")
        assert {row["problem_id"] for row in failed} == {problem.id for problem in problems}
        assert all(row["attempts"] == 2 and "HTTP 500" in row["reason"] for row in failed)
        collect(tmp_path, settings, problems)
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 3


def test_a_server_that_answers_nobody_is_given_up(tmp_path: Path) -> None:
    with ChatServer(lambda *_: "503") as server:
        settings = settings_for(server.url, api={"max_attempts": 1, "concurrency": 4})
        with pytest.raises(ApiError, match="20 traces in a row failed, the last one because of: "):
            collect(tmp_path, settings, additions(1000))
        assert server.asked.total() <= MAX_FAILED_IN_A_ROW + 4


def test_a_port_where_nobody_listens_costs_nothing(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        url = server.url
    settings = settings_for(url, api={"max_attempts": 2})
    collection, _ = collect(tmp_path, settings, additions(2))
    assert collection.spent.tokens == 0
    assert [row["reason"][:12] for row in read_jsonl(tmp_path / "failed.jsonl")] == [
        "ConnectError",
    ] * 2  # fmt: skip


def test_several_traces_of_a_question_and_more_of_them_later(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        collect(tmp_path, settings_for(server.url, traces_per_question=2), additions(3))
        collect(tmp_path, settings_for(server.url, traces_per_question=3), additions(4))
        assert server.asked.total() == 12
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert {(row["problem_id"], row["sample_index"]) for row in rows} == {
        (f"add-{n}", index) for n in range(4) for index in range(3)
    }


def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path) -> None:
    with ChatServer(answer, seconds_per_answer=0.2) as server:
        collect(tmp_path, settings_for(server.url, api={"concurrency": 5}), additions(20))
    assert server.most_under_way == 5


# ----------------------------------------------------------------------------------------- budgets


def test_a_token_budget_is_never_passed_and_more_of_it_goes_on(tmp_path: Path) -> None:
    problems = additions(60)
    with ChatServer(answer, seconds_per_answer=0.005) as server:
        settings = settings_for(server.url, budget={"tokens": 2000})
        _, collector = collect(tmp_path, settings, problems)
        assert collector.budget_spent
        num_first = len(read_jsonl(tmp_path / "answers.jsonl"))
        # The worst case is 626 tokens, an answer takes 53: another worst case would not have fit.
        assert 2000 - 626 < server.billed_tokens <= 2000
        _, collector = collect(tmp_path, settings, problems)
        assert collector.budget_spent and server.asked.total() == num_first
        settings = settings_for(server.url, budget={"tokens": 100_000})
        _, collector = collect(tmp_path, settings, problems)
        assert not collector.budget_spent and server.asked_again == []
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 60


def test_a_money_budget_is_never_passed(tmp_path: Path) -> None:
    prices = {"prompt_price": 100.0, "completion_price": 1000.0}
    with ChatServer(answer) as server:
        settings = settings_for(server.url, budget={"money": 1.0, **prices})
        collection, collector = collect(tmp_path, settings, additions(100))
    assert collector.budget_spent
    paid = sum((3 * 100 + 50 * 1000) / 1e6 for _ in range(server.asked.total()))
    assert collection.spent.money == pytest.approx(paid)
    assert 1.0 - 0.16 < paid <= 1.0


def test_a_server_that_counts_more_than_max_tokens_is_left(tmp_path: Path) -> None:
    with ChatServer(lambda *_: "greedy_usage") as server:
        settings = settings_for(server.url, budget={"tokens": 10**7}, api={"concurrency": 1})
        with pytest.raises(ApiError, match="counted 1000009 tokens for a request of at most"):
            collect(tmp_path, settings, additions(5))
        assert server.asked.total() == 1
        assert len(read_jsonl(tmp_path / "answers.jsonl")) == 1  # it is paid for
        settings = settings_for(server.url, api={"concurrency": 1})
        collect(tmp_path, settings, additions(5))
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 5


class DearServer(ChatServer):
    """Answers at more than max_tokens, but with fewer tokens than a long prompt might have had."""

    async def do_dear(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 300, "total_tokens": 309}
        await self.say(body, writer, usage=usage)


def test_a_server_that_takes_more_money_than_the_worst_case_is_left(tmp_path: Path) -> None:
    budget = {"money": 1.0, "prompt_price": 1.0, "completion_price": 1000.0}
    with DearServer(lambda *_: "dear") as server:
        settings = settings_for(server.url, budget=budget, api={"concurrency": 1})
        with pytest.raises(ApiError, match=r"a price of 0\.300009 where 0\.10\d+ is the most"):
            collect(tmp_path, settings, additions(3))
        assert server.asked.total() == 1


class BillingServer(ChatServer):
    """Fails, and tells in the body of the error what the work has cost all the same."""

    async def fail(self, status: int, writer: asyncio.StreamWriter, completion: int) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": completion}
        self.bill(9 + completion)
        content = json.dumps({"error": "overloaded", "usage": usage}).encode()
        self.send(writer, status, content)

    async def do_billed_429(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.fail(429, writer, 80)

    async def do_billed_500(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.fail(500, writer, 80)

    async def do_dear_500(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.fail(500, writer, 5000)

    async def do_dear_and_empty(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 5000}
        self.bill(5009)
        self.send(writer, 200, json.dumps(self.completion(body, choices=[], usage=usage)).encode())


@pytest.mark.parametrize("fault", ["billed_429", "billed_500"])
def test_a_fault_that_is_billed_counts_against_the_budget(fault: str, tmp_path: Path) -> None:
    with BillingServer(lambda *_: fault) as server:
        settings = settings_for(server.url, budget={"tokens": 2000}, api={"concurrency": 1})
        collection, collector = collect(tmp_path, settings, additions(100))
    assert collector.budget_spent
    # 89 tokens each; the next one might have cost 626.
    assert 2000 - 626 < server.billed_tokens == collection.spent.tokens <= 2000
    assert server.asked.total() * 89 == server.billed_tokens


@pytest.mark.parametrize("fault", ["dear_500", "dear_and_empty"])
def test_a_server_that_takes_more_than_the_worst_case_for_a_fault_is_left(
    fault: str, tmp_path: Path
) -> None:
    with BillingServer(lambda *_: fault) as server:
        settings = settings_for(server.url, budget={"tokens": 10**5}, api={"concurrency": 1})
        with pytest.raises(ApiError, match="counted 5009 tokens for a request of at most 626"):
            collect(tmp_path, settings, additions(5))
        assert server.asked.total() == 1
    (_, _, settled) = read_jsonl(tmp_path / "ledger.jsonl")
    assert settled["tokens"] == 5009 == server.billed_tokens


def test_a_killed_request_counts_at_its_worst_case(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        settings = settings_for(server.url, budget={"tokens": 700})
        with closing(Collection(tmp_path, settings, additions(1))) as collection:
            assert collection.reserve(("add-0", 0), 1, Amount(600)) == 1  # and then nothing
        _, collector = collect(tmp_path, settings, additions(1))
        assert collector.budget_spent and server.asked.total() == 0


# ------------------------------------------------------------------------------- the file on disk


def test_every_byte_at_which_a_file_may_be_torn_is_mended(tmp_path: Path) -> None:
    problems = additions(3)
    with ChatServer(answer) as server:
        settings = settings_for(server.url, api={"concurrency": 1})
        collect(tmp_path / "whole", settings, problems)
        for name in ("answers.jsonl", "ledger.jsonl"):
            whole = (tmp_path / "whole" / name).read_bytes()
            first_rows = whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
            for cut in range(len(first_rows), len(whole)):
                folder = tmp_path / f"{name}-{cut}"
                folder.mkdir()
                for other in FILES:
                    (folder / other).write_bytes((tmp_path / "whole" / other).read_bytes())
                (folder / name).write_bytes(whole[:cut])
                with closing(Collection(folder, settings, problems)) as collection:
                    assert (folder / name).read_bytes() == first_rows
                    missing = [problem.id for problem, _ in collection.missing(problems)]
                    assert missing == (["add-2"] if name == "answers.jsonl" else [])
                    spent = collection.spent.tokens
                    assert spent == (53 + 53 + 626 if name == "answers.jsonl" else 3 * 53)


def test_a_malformed_row_in_the_middle_is_named(tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        settings = settings_for(server.url)
        collect(tmp_path, settings, additions(2))
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_text(encoding="utf-8").split("\n")
    for bad, error in (('{"torn', "not valid JSON"), ('{"a": 1}', "'problem_id' is missing")):
        answers.write_text("\n".join([bad, *lines]), encoding="utf-8")
        with pytest.raises(DataError, match=rf"answers\.jsonl, row 1: {error}"):
            Collection(tmp_path, settings, additions(2))


def test_a_second_collector_on_a_folder_stops_with_one_clear_line(tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:1/v1")
    first = Collection(tmp_path, settings, additions(1))
    with pytest.raises(DataError, match=r"another collector is writing there; wait until it is"):
        Collection(tmp_path, settings, additions(1))
    first.close()
    Collection(tmp_path, settings, additions(1)).close()


def test_a_folder_keeps_to_one_model_one_prompt_and_one_set_of_questions(tmp_path: Path) -> None:
    problems = additions(2)
    with ChatServer(answer) as server:
        collect(tmp_path, settings_for(server.url), problems)
        more_patient = {"concurrency": 1, "max_tokens": 50, "request_seconds": 9.0}
        collect(tmp_path, settings_for(server.url, api=more_patient), problems)
        with pytest.raises(DataError, match="collected with another model, temperature; move"):
            Collection(
                tmp_path, settings_for(server.url, api={"model": "x", "temperature": 1.0}), problems
            )
        prompt = {"template": "Solve: {question}", "answer_marker": "boxed"}
        with pytest.raises(DataError, match="collected with another prompt; move the folder away"):
            Collection(tmp_path, settings_for(server.url, prompt=prompt), problems)
        others = [Problem("add-1", "What is 1 + 2?", "#### 3", "3")]
        with pytest.raises(
            DataError, match=r"answers\.jsonl, row [12]: add-1 was another question"
        ):
            Collection(tmp_path, settings_for(server.url), others)
        assert server.asked.total() == 2


# -------------------------------------------------------------------------------- all of it at once

FAULTS = (
    "429", "500", "503", "502", "reset", "stall", "malformed", "empty_choices", "html", "blank",
    "gave_up", "not_utf8",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 100_000])
def test_a_thousand_questions_under_faults(budget: int | None, tmp_path: Path) -> None:
    rng = random.Random(5)
    problems = additions(1000)

    def behave(question: str, _: int) -> str:
        if question == "What is 500 + 1?":
            return "500"
        return rng.choice(FAULTS) if rng.random() < 0.2 else "answer"

    with ChatServer(behave) as server:
        # Three attempts, so that some other traces do fail: 0.2³ of 1000 are 8.
        api = {"concurrency": 32, "max_attempts": 3, "request_seconds": 10.0}
        settings = settings_for(server.url, api=api, budget={"tokens": budget})
        collection, collector = collect(tmp_path, settings, problems)
    answered = {row["problem_id"] for row in read_jsonl(tmp_path / "answers.jsonl")}
    failed = {row["problem_id"]: row["reason"] for row in read_jsonl(tmp_path / "failed.jsonl")}
    assert server.asked_again == []
    assert len(answered) == server.delivered.total()
    assert collection.spent.tokens >= server.billed_tokens
    assert not answered & failed.keys() and all(failed.values())
    assert (server.asked.total() - len(answered)) / server.asked.total() == pytest.approx(
        0.2, abs=0.07
    )
    if budget is None:
        assert "add-500" in failed
        assert answered | failed.keys() == {problem.id for problem in problems}
    else:
        assert collector.budget_spent
        assert len(answered | failed.keys()) < 1000
        assert server.billed_tokens <= collection.spent.tokens <= budget


# -------------------------------------------------------------------------- the script as a process


def words(folder: Path, settings: CollectionSettings) -> list[str]:
    return [
        "--settings", dump(settings), "--data", str(folder / "problems.jsonl"),
        "--output-dir", str(folder / "collected"), "--summary", str(folder / "collected.json"),
    ]  # fmt: skip


def start(
    folder: Path,
    settings: CollectionSettings,
    environment: dict[str, str] | None = None,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    script = str(ROOT / "scripts" / "collect_traces.py")
    return subprocess.Popen(
        [sys.executable, script, *words(folder, settings)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run(folder: Path, settings: CollectionSettings, **environment: str) -> tuple[int, str]:
    process = start(folder, settings, environment)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout + stderr


@pytest.mark.slow
def test_more_failed_traces_than_the_settings_allow_fail_the_job(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", additions(4))
    with ChatServer(lambda question, _: "500" if question == "What is 1 + 1?" else "answer") as own:
        codes = []
        for fraction in (0.2, 0.25):
            api = {"max_attempts": 1, "max_failed_fraction": fraction}
            code, said = run(tmp_path, settings_for(own.url, api=api))
            codes.append(code)
            assert ("1 of 4 traces failed" in said) is (fraction < 0.25)
            assert (tmp_path / "collected.json").exists() is (fraction == 0.25)
    assert codes == [1, 0]
    assert len(read_jsonl(tmp_path / "collected" / "answers.jsonl")) == 3


def test_the_script_says_what_there_is_and_what_it_cost(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", additions(5))

    def behave(question: str, _: int) -> str:
        return {"What is 0 + 1?": "length", "What is 1 + 1?": "500"}.get(question, "answer")

    with ChatServer(behave) as server:
        settings = settings_for(
            server.url,
            num_questions=4,
            api={"max_attempts": 2, "max_failed_fraction": 0.25},
            budget={"tokens": 10_000},
        )
        code, said = run(tmp_path, settings)
        assert code == 0, said
        first = read_json(tmp_path / "collected.json")
        server.behave = answer
        code, said_again = run(tmp_path, settings)
    assert "2 answers, 1 incomplete, 1 failed, 0 never asked; spent 1411 of 10000 tokens" in said
    assert first["models"] == {"served-model": 2} and not first["budget_spent"]
    assert first["failed"]["add-1/0"].startswith("HTTP 500")
    assert first["tokens"] == 3 * 53 and first["tokens_maybe_billed_without_reply"] == 2 * 626
    assert "resuming after 3 of 4 traces" in said_again
    assert "3 answers, 1 incomplete, 0 failed" in said_again
    assert server.asked["What is 4 + 1?"] == 0
    assert read_json(tmp_path / "collected.json")["num_requests"] == 6


def run_in_terminal(folder: Path, settings: CollectionSettings) -> str:
    """Run the script with stderr on a terminal; what it wrote there."""
    own, of_script = pty.openpty()
    fcntl.ioctl(of_script, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = start(folder, settings, {"TERM": "xterm"}, stderr=of_script)
    os.close(of_script)
    written = b""
    while True:
        try:
            written += os.read(own, 4096)
        except OSError:  # the other side is closed
            break
    os.close(own)
    process.communicate(timeout=60)
    assert process.returncode == 0, written.decode()
    return written.decode("utf-8")


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_the_rate_and_the_spend(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", additions(5))
    budget = {"tokens": 10_000, "money": 1.0, "prompt_price": 1.0, "completion_price": 1000.0}
    with ChatServer(answer, seconds_per_answer=0.15) as server:
        settings = settings_for(server.url, api={"concurrency": 1}, budget=budget, num_questions=3)
        first = run_in_terminal(tmp_path, settings)
        again = run_in_terminal(tmp_path, settings.model_copy(update={"num_questions": 5}))
    bars = re.findall(r"traces: +(\d+)%\|[^|]*\| (\d)/(\d) \[[^\]]*?(it/s|s/it)([^\]]*)\]", first)
    last = bars[-1]
    assert (last[0], last[1], last[2]) == ("100", "3", "3")
    assert last[4] == ", spent 159 of 10000 tokens, 0.1500 of 1 in money"
    spent = [int(number) for number in re.findall(r"spent (\d+) of", first)]
    assert {53, 159} <= set(spent) and spent == sorted(spent)  # it grows as answers come
    # One that goes on begins where the other was, in count and in spend.
    counts = [int(count) for count in re.findall(r"\| (\d)/5 ", again)]
    assert counts[0] == 3 and counts[-1] == 5
    assert "spent 265 of 10000 tokens, 0.2500 of 1 in money" in again


def test_a_log_has_a_line_now_and_then_instead_of_a_bar(
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_problems(tmp_path / "problems.jsonl", additions(3))
    module = script("collect_traces")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOG_LINES", 0.0)
    with ChatServer(answer) as server, caplog.at_level("INFO"):
        settings = settings_for(server.url, api={"concurrency": 1}, budget={"tokens": 1000})
        assert module.main(words(tmp_path, settings)) == 0
    lines = [line for line in caplog.messages if " traces of " in line]
    assert lines == [
        f"{n} traces of 3; spent {53 * n} of 1000 tokens, 0.0000 in money" for n in (1, 2, 3)
    ]
    assert "traces:" not in capsys.readouterr().err


@pytest.mark.slow
def test_two_scripts_on_one_folder_do_not_corrupt_each_other(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", additions(4))
    told = threading.Event()
    with HeldServer(answer, until=told.is_set) as server:
        settings = settings_for(server.url, api={"concurrency": 4, "request_seconds": 600.0})
        first = start(tmp_path, settings)
        deadline = time.monotonic() + 300
        try:
            while not server.requests:
                assert first.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            code, said = run(tmp_path, settings)
        finally:
            told.set()
        assert code == 1
        line = f"error: {tmp_path}/collected: another collector is writing there; wait until it is"
        assert said == f"{line} done\n"
        first.communicate(timeout=60)
        assert first.returncode == 0 and server.asked.total() == 4
    check(tmp_path / "collected")


@pytest.mark.slow
def test_twenty_kills_lose_no_line_and_double_none(tmp_path: Path) -> None:
    # The server draws in a thread of its own.
    faults, moments = random.Random(11), random.Random(12)
    problems = additions(400)
    write_problems(tmp_path / "problems.jsonl", problems)
    collected = tmp_path / "collected"

    def behave(_: str, number: int) -> str:
        # A question is answered every third time at least: none is ever given up.
        if number % 3 == 0 or faults.random() >= 0.2:
            return "answer"
        return faults.choice(("429", "500", "reset", "malformed"))

    with ChatServer(behave, seconds_per_answer=0.1) as server:
        settings = settings_for(server.url, api={"concurrency": 4})
        before = b""
        num_killed_at_work = 0
        for kill in range(20):
            num_requests = len(server.requests)
            process = start(tmp_path, settings)
            if kill % 5:  # the others are killed while they start
                wanted = num_requests + moments.randrange(1, 24)
                deadline = time.monotonic() + 60
                while len(server.requests) < wanted and time.monotonic() < deadline:
                    time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.1 if kill % 5 else 1.5))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            num_killed_at_work += len(server.requests) > num_requests
            answers = collected / "answers.jsonl"
            after = answers.read_bytes() if answers.exists() else b""
            assert after.startswith(before[: before.rfind(b"\n") + 1])
            before = after
            with closing(Collection(collected, settings, problems)) as collection:
                assert collection.spent.tokens >= server.billed_tokens
            check(collected)
        assert num_killed_at_work >= 15
        assert 50 < len(before.split(b"\n")) < 400
        code, said = run(tmp_path, settings)
        assert code == 0, said
    check(collected)
    rows = read_jsonl(collected / "answers.jsonl")
    assert (collected / "answers.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert {row["problem_id"] for row in rows} == {problem.id for problem in problems}
    # Asked twice: at most the four that were under way at each kill.
    assert server.delivered.total() - len(rows) <= 4 * 50


SECRET_SCENES = (
    "answer", "401", "402", "422", "500", "malformed", "html", "reset", "429_tomorrow", "stall",
)  # fmt: skip


@pytest.mark.slow
def test_the_key_is_sent_and_never_written(tmp_path: Path) -> None:
    written = []
    for scene in SECRET_SCENES:
        folder = tmp_path / scene
        write_problems(folder / "problems.jsonl", additions(3))
        with ChatServer(lambda *_, scene=scene: scene) as server:
            api = {"max_attempts": 2, "request_seconds": 0.5 if scene == "stall" else 60.0}
            code, said = run(
                folder, settings_for(server.url, api=api), DEEPSEEK_API_KEY=FAKE_KEY,
                GSM8K_LOG_LEVEL="DEBUG",
            )  # fmt: skip
        assert f"uthorization: Bearer {FAKE_KEY}" in server.headers[0]
        assert code == (0 if scene == "answer" else 1), said
        assert "Traceback" not in said
        written.append(said)
    # Nobody listens; a key that is none; a bug, which keeps its traceback.
    odd = settings_for("http://127.0.0.1:9/v1", api={"max_attempts": 1})
    written.append(run(tmp_path / "answer", odd, DEEPSEEK_API_KEY=FAKE_KEY)[1])
    code, said = run(tmp_path / "answer", odd, DEEPSEEK_API_KEY=FAKE_KEY + "\nX: y")
    assert code == 1 and said.startswith("error: DEEPSEEK_API_KEY: not a key"), said
    written.append(said)
    (tmp_path / "answer" / "collected" / "ledger.jsonl").write_text('{"a": 1}\n{}\n')
    written.append(run(tmp_path / "answer", odd, DEEPSEEK_API_KEY=FAKE_KEY)[1])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 * len(SECRET_SCENES) - 10
    for text in [*written, *(path.read_text(encoding="utf-8") for path in files)]:
        assert FAKE_KEY not in text and FAKE_KEY[3:15] not in text
    assert "sent Bearer ***" in (tmp_path / "500" / "collected" / "failed.jsonl").read_text()
