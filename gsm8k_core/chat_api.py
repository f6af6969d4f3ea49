"""One request to an OpenAI-compatible chat API, and what may become of it.

Requests do not stream. A whole JSON document is either there or not, so there is no half of a trace
to piece together, and it always brings the `usage` that the budget is settled with, which a stream
brings only from servers that know `stream_options`. DeepSeek keeps the connection of a waiting
request alive with blank lines (with `: keep-alive` comments where it streams, as gateways do for
both); what stands before the document is passed over. The price is that a server which stalls is
noticed at the wall deadline and no earlier.

The key stands in $DEEPSEEK_API_KEY and in the request's header. It is taken out of everything that
comes back, since servers quote the key that they refuse.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import logging
import os
import random
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import dropwhile
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from gsm8k_core.config import ApiSettings
from gsm8k_core.errors import ApiError, ConfigError
from gsm8k_core.files import Json
from gsm8k_core.redaction import MIN_SECRET_LENGTH

log = logging.getLogger(__name__)

KEY_VARIABLE = "DEEPSEEK_API_KEY"
CONNECT_SECONDS = 30.0
EXCERPT_CHARACTERS = 300
"""How much of a server's words goes into an error."""

IN_THE_CLEAR = (
    f"{KEY_VARIABLE} is not sent over http to another machine, where others could read it: use "
    "https, or a tunnel to a port of this machine"
)
STATUS_HELP = {
    400: "the server does not understand the request: see api.model and api.parameters",
    401: f"the key is wrong or missing: set {KEY_VARIABLE}",
    402: "the account has no balance left: top it up, then run the same command again",
    403: "the key may not do this",
    404: "there is no such address or model: see api.base_url and api.model",
    413: "the request is too long for the server: see traces.<name>.prompt",
    422: "the server does not accept a parameter: see api.parameters, temperature, max_tokens",
}
OF_ONE_REQUEST = (400, 403, 413, 422)
"""Refusals that may be of one question: too long for the model, or not to a filter's liking."""
NOT_NOW = (408, 409, 425, 429, 499)
"""Statuses below 500 after which another attempt may do better: timeouts, conflicts, limits."""
BEFORE_WORK = (409, 425, 429, 503)
"""Refusals to begin, which cost nothing unless they tell of work."""
UNFINISHED = ("insufficient_system_resource", "abort", "error")
"""Finish reasons by which a server says that it gave up, not the model (DeepSeek, vLLM)."""


@dataclass(frozen=True)
class Reply:
    """What a chat completion holds."""

    model: str | None
    reasoning: str
    content: str
    finish_reason: str | None
    usage: Json | None


class Fault(Exception):
    """An attempt that gave no answer, and may be made again.

    `billed`: the server may have done the work, and may ask money for it. `usage`: what it says it
    did. `retry_after`: seconds that it asks to wait.
    """

    def __init__(
        self,
        reason: str,
        billed: bool,
        retry_after: float | None = None,
        usage: Json | None = None,
    ) -> None:
        super().__init__(reason)
        self.billed = billed
        self.retry_after = retry_after
        self.usage = usage


class Refused(ApiError):
    """The server does not accept a request. `usage`: what it says it did all the same.

    `of_one`: it may accept others.
    """

    def __init__(self, message: str, of_one: bool, usage: Json | None) -> None:
        super().__init__(message)
        self.of_one = of_one
        self.usage = usage


class ChatClient:
    """Asks one server. `async with ChatClient(settings) as client: await client.ask(messages)`."""

    def __init__(self, settings: ApiSettings) -> None:
        """Raises ConfigError when the key cannot be one."""
        self.settings = settings
        self._key = api_key(settings.base_url)
        self._key_stays = self._key is None and bool(os.environ.get(KEY_VARIABLE, "").strip())
        if self._key_stays:
            log.warning("%s: %s", settings.base_url, IN_THE_CLEAR)
        # A shorter one is a placeholder, and part of what a model writes.
        is_secret = len(self._key or "") >= MIN_SECRET_LENGTH
        self._key_form = key_form(self._key) if self._key and is_secret else None
        self._http = httpx.AsyncClient(
            base_url=settings.base_url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=settings.concurrency),
            trust_env=not is_loopback(settings.base_url),  # no proxy reaches this machine's ports
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def ask(self, messages: list[dict[str, str]]) -> Reply:
        """One completion of `messages`; one attempt.

        Raises Fault where another attempt may do better, Refused where none will.
        """
        body: Json = {**self.settings.parameters, "model": self.settings.model}
        body |= {"messages": messages, "max_tokens": self.settings.max_tokens, "stream": False}
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                response = await self._http.post("/chat/completions", json=body)
        except TimeoutError:
            seconds = self.settings.request_seconds
            raise Fault(f"no whole answer within {seconds:g} s", billed=True) from None
        except httpx.RequestError as error:
            # What never left this machine costs nothing.
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            reason = self._without_key(f"{type(error).__name__}: {error}")
            raise Fault(reason, billed=not unsent) from None
        if response.status_code != 200:
            raise self._refusal(response)
        return self._reply(response)

    def _refusal(self, response: httpx.Response) -> Fault | Refused:
        """The error of a status other than 200."""
        status = response.status_code
        said = excerpt(self._without_key(response.text))
        usage = usage_in(response.content)
        if status in NOT_NOW or 500 <= status < 600:
            return Fault(  # any other than these may be the end of work that was done
                f"HTTP {status}: {said}",
                billed=status not in BEFORE_WORK or usage is not None,
                retry_after=retry_after_seconds(response.headers),
                usage=usage,
            )
        remedy = STATUS_HELP.get(status, "see api.base_url: is this an OpenAI-compatible server?")
        if status == 401 and self._key_stays:
            remedy = IN_THE_CLEAR
        message = f"{self.settings.base_url}: HTTP {status}, {remedy}; it says: {said}"
        return Refused(message, status in OF_ONE_REQUEST, usage)

    def _reply(self, response: httpx.Response) -> Reply:
        """The Reply in the body of a response with status 200; Fault where there is none."""
        kind = response.headers.get("content-type", "no content type")
        try:
            text = response.content.decode("utf-8")
            # Struck out once it is decoded: JSON has several ways to write the same text.
            body = self._decoded_without_key(json.loads(without_keep_alives(text)))
        except (ValueError, RecursionError) as error:
            problem = f"not a JSON document ({type(error).__name__}, {kind})"
            raise Fault(f"{problem}: {excerpt(self._without_key(response.text))}", True) from None
        try:
            reply = parse_reply(body)
        except ValueError as error:
            reason = f"{error}: {excerpt(self._without_key(text))}"
            raise Fault(reason, True, usage=usage_of(body)) from None
        if reply.finish_reason in UNFINISHED:
            reason = f"the server gave up: finish reason {reply.finish_reason}"
            raise Fault(reason, True, usage=reply.usage)
        return reply

    def _without_key(self, text: str) -> str:
        return self._key_form.sub("***", text) if self._key_form else text

    def _decoded_without_key(self, value: Any) -> Any:
        """A JSON value, with the key struck out of every text in it."""
        if isinstance(value, str):
            return self._without_key(value)
        if isinstance(value, list):
            return [self._decoded_without_key(item) for item in value]
        if isinstance(value, dict):
            return {
                self._without_key(name): self._decoded_without_key(item)
                for name, item in value.items()
            }
        return value


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(base_url: str) -> str | None:
    """The key from the environment; None without one, or where it would travel in the clear.

    Raises ConfigError, which does not quote it, when it holds what a header cannot.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key or not (urlsplit(base_url).scheme == "https" or is_loopback(base_url)):
        return None
    if re.fullmatch(r"[A-Za-z0-9._~+/=-]+", key) is None:  # RFC 6750, section 2.1
        raise ConfigError(f"{KEY_VARIABLE}: not a key: it holds spaces or other odd characters")
    return key


def key_form(key: str) -> re.Pattern[str]:
    """What finds the key in a text, however often JSON has escaped it (`\\/`, `\\u002f`)."""
    return re.compile(
        "".join(rf"\\{{0,8}}(?:{re.escape(c)}|u(?i:{ord(c):04x}))" for c in key), re.ASCII
    )


def without_keep_alives(text: str) -> str:
    """`text` from the first line on that is neither blank nor a comment (`: keep-alive`)."""

    def fills(line: str) -> bool:
        return not line.strip() or line.lstrip().startswith(":")

    return "\n".join(dropwhile(fills, text.split("\n")))


def parse_reply(body: Any) -> Reply:
    """The Reply of a chat completion's JSON. Raises ValueError that says what is missing.

    Reasoning stands in `reasoning_content` (DeepSeek) or `reasoning` (vLLM since 2026, OpenRouter).
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        raise ValueError("no choices")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise ValueError("a choice without a message")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    if not isinstance(reasoning, str) or not isinstance(content, str):
        raise ValueError("content that is not a text")
    model = body.get("model")
    finish_reason = choices[0].get("finish_reason")
    return Reply(
        model=model if isinstance(model, str) else None,
        reasoning=reasoning,
        content=content,
        finish_reason=finish_reason if isinstance(finish_reason, str) else None,
        usage=usage_of(body),
    )


def usage_of(body: Any) -> Json | None:
    """The `usage` of a JSON document, where it has one."""
    usage = body.get("usage") if isinstance(body, dict) else None
    return usage if isinstance(usage, dict) else None


def usage_in(content: bytes) -> Json | None:
    """The `usage` in the body of an error; None where it is no JSON document that has one."""
    try:
        return usage_of(json.loads(without_keep_alives(content.decode("utf-8"))))
    except (ValueError, RecursionError):
        return None


def retry_after_seconds(headers: httpx.Headers) -> float | None:
    """Seconds to wait by `Retry-After`: a number, or a date (RFC 9110, section 10.2.3).

    A date counts from the server's own `Date`, where it gives one: clocks differ.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return float(value)
    then, now = http_date(value), http_date(headers.get("date", ""))
    if then is None:
        return None
    return max(0.0, (then - (now or datetime.datetime.now(datetime.UTC))).total_seconds())


def http_date(text: str) -> datetime.datetime | None:
    """An HTTP date in UTC; None where `text` is none."""
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)


def retry_delay(
    attempt: int, retry_after: float | None, settings: ApiSettings, rng: random.Random
) -> float:
    """Seconds to wait after attempt number `attempt` (from 1).

    Exponential backoff with full jitter (Brooker 2015, AWS Architecture Blog), on top of what the
    server asks for: those who were sent away together must not come back together.
    """
    doubled = settings.backoff_seconds * 2.0 ** min(attempt - 1, 60)
    return (retry_after or 0.0) + rng.uniform(0.0, min(settings.max_backoff_seconds, doubled))


def excerpt(text: str) -> str:
    """The beginning of `text` on one line."""
    line = " ".join(text[: 4 * EXCERPT_CHARACTERS].split())
    return line if len(line) <= EXCERPT_CHARACTERS else line[:EXCERPT_CHARACTERS] + " …"
