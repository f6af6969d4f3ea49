"""What a chat API's headers, bodies and settings mean, and where the key may go."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from gsm8k_core.chat_api import (
    ChatClient,
    Fault,
    Reply,
    api_key,
    excerpt,
    parse_reply,
    retry_after_seconds,
    retry_delay,
    without_keep_alives,
)
from gsm8k_core.config import ApiSettings
from gsm8k_core.errors import ConfigError

NOW = "Sun, 06 Nov 1994 08:49:37 GMT"


def api(**changes: Any) -> ApiSettings:
    return ApiSettings(**{"base_url": "https://example.org/v1", "model": "m", **changes})


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 0.5 "}, 0.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "1_0"}, None),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:47 GMT", "Date": NOW}, 10.0),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:27 GMT", "Date": NOW}, 0.0),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 -0000"}, 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(httpx.Headers(headers)) == seconds


def test_a_retry_date_without_the_servers_own_clock_counts_from_ours() -> None:
    seconds = retry_after_seconds(httpx.Headers({"Retry-After": "Fri, 31 Dec 2060 23:59:59 GMT"}))
    assert seconds is not None and seconds > 1e8


def test_the_wait_doubles_up_to_its_limit_with_full_jitter() -> None:
    settings = api(backoff_seconds=1.0, max_backoff_seconds=20.0)
    rng = random.Random(0)
    for attempt, ceiling in ((1, 1.0), (2, 2.0), (3, 4.0), (5, 16.0), (6, 20.0), (5000, 20.0)):
        waits = [retry_delay(attempt, None, settings, rng) for _ in range(2000)]
        assert 0.0 <= min(waits) < 0.01 * ceiling
        assert 0.99 * ceiling < max(waits) <= ceiling
        assert sum(waits) / len(waits) == pytest.approx(ceiling / 2, rel=0.06)


def test_the_wait_that_a_server_asks_for_is_the_least() -> None:
    waits = [retry_delay(1, 30.0, api(), random.Random(seed)) for seed in range(200)]
    assert min(waits) >= 30.0 and max(waits) <= 31.0 and len(set(waits)) > 100


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('\n\n  \r\n{"a": 1}', '{"a": 1}'),
        (': keep-alive\n\n: keep-alive\n\n{"a":\n: 1}', '{"a":\n: 1}'),
        ("\n: x\n", ""),
        ("", ""),
    ],
)
def test_what_keeps_a_connection_alive_is_passed_over(text: str, rest: str) -> None:
    assert without_keep_alives(text) == rest


def body(message: Any, **changes: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop"}], **changes}


def test_both_names_of_the_reasoning_are_read() -> None:
    deepseek = parse_reply(body({"reasoning_content": "r", "content": "c"}, model="m"))
    vllm = parse_reply(body({"reasoning": "r", "reasoning_content": None, "content": "c"}))
    assert (deepseek.reasoning, deepseek.content, deepseek.model) == ("r", "c", "m")
    assert (vllm.reasoning, vllm.content, vllm.model, vllm.usage) == ("r", "c", None, None)
    assert parse_reply(body({"content": None})).content == ""


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "no choices"),
        ([], "no choices"),
        ({"error": "busy"}, "no choices"),
        ({"choices": {}}, "no choices"),
        ({"choices": ["x"]}, "a choice without a message"),
        ({"choices": [{"message": None}]}, "a choice without a message"),
        (body({"content": ["parts"]}), "content that is not a text"),
    ],
)
def test_a_body_without_a_completion_says_what_is_missing(value: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_reply(value)


@pytest.mark.parametrize(
    ("url", "goes"),
    [
        ("https://api.deepseek.com", True),
        ("HTTPS://api.deepseek.com", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000", True),
        ("http://localhost:8000", True),
        ("http://gpu-node:8000/v1", False),  # it would travel in the clear
        ("http://localhost.example.org", False),
    ],
)
def test_the_key_goes_where_it_is_safe(
    url: str, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", " sk-abc\n")
    assert api_key(url) == ("sk-abc" if goes else None)
    monkeypatch.setenv("DEEPSEEK_API_KEY", "")
    assert api_key(url) is None


def test_a_key_that_stays_here_is_said_to_and_named_in_the_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    client = ChatClient(api(base_url="http://gpu-node:8000/v1"))
    said = "DEEPSEEK_API_KEY is not sent over http to another machine"
    assert said in caplog.text
    assert said in str(client._refusal(httpx.Response(401, text="who are you")))
    caplog.clear()
    for url in ("https://gpu-node/v1", "http://127.0.0.1:8000/v1"):
        client = ChatClient(api(base_url=url))
        assert "the key is wrong" in str(client._refusal(httpx.Response(401, text="no")))
    assert not caplog.text


def test_a_placeholder_is_not_struck_out_of_what_a_model_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", "x")
    body = {"choices": [{"message": {"content": "so \\boxed{18}"}, "finish_reason": "stop"}]}
    reply = ChatClient(api())._reply(httpx.Response(200, json=body))
    assert reply.content == "so \\boxed{18}"


KEY = "planted/0123+abc=="
ESCAPED = (KEY, KEY.replace("/", "\\/"), KEY.replace("/", "\\u002F").replace("p", "\\u0070"))


@pytest.mark.parametrize("quoted", ESCAPED)
def test_a_key_is_struck_out_however_json_writes_it(
    quoted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    client = ChatClient(api())
    content = (
        '{"choices": [{"message": {"content": "K!", "reasoning": "{\\"k\\": \\"K\\"}"},'
        ' "finish_reason": "stop"}], "model": "K", "usage": {"K": 1}}'
    ).replace("K", quoted)
    reply = client._reply(httpx.Response(200, content=content.encode()))
    assert reply == Reply("***", '{"k": "***"}', "***!", "stop", {"***": 1})

    error = client._refusal(httpx.Response(401, content=f'{{"sent": "{quoted}"}}'.encode()))
    assert str(error).endswith('it says: {"sent": "***"}')
    for body in (f'{{"error": "{quoted}"}}', f'{{"error": "{quoted}'):
        with pytest.raises(Fault) as fault:
            client._reply(httpx.Response(200, content=body.encode()))
        assert '"error": "***' in str(fault.value)


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nX-Header: y", "sk-ключ", "sk-\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_quoted(key: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", {"DEEPSEEK_API_KEY": key})
        with pytest.raises(ConfigError, match="DEEPSEEK_API_KEY: not a key") as error:
            api_key("https://example.org")
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"base_url": "api.deepseek.com"}, "base_url must be http://HOST or https://HOST"),
        ({"base_url": "ftp://example.org"}, "base_url must be http://HOST or https://HOST"),
        ({"base_url": "https://example.org:99999"}, "Port out of range"),
        ({"base_url": "https://me:sk-1@example.org"}, "base_url must hold no user, password"),
        ({"base_url": "https://example.org/?key=sk-1"}, "base_url must hold no user, password"),
        ({"parameters": {"stream": True}}, "parameters: stream is set by the collector itself"),
        ({"parameters": {"api_key": "sk-1"}}, "parameters: api_key looks like a secret"),
    ],
)
def test_settings_that_cannot_work_or_hold_a_secret_are_refused(
    changes: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValidationError, match=error):
        api(**changes)


def test_an_excerpt_is_one_short_line() -> None:
    assert excerpt("a\n\n b\t") == "a b"
    assert len(excerpt("x" * 10**6)) < 310
