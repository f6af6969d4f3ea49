"""An OpenAI-compatible chat server on loopback that misbehaves on purpose, over real sockets.

Written on bare asyncio streams: what it does wrong happens below HTTP (resets, stalls, half of a
body), where a web framework would get in the way.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import format_datetime
from typing import Any, Self

JSON = "application/json"


class ChatServer:
    """`with ChatServer(behave) as server:` serves at `server.url` until the block ends.

    `behave(question, number)` names what happens to the so-manieth request (from 1) for a question:
    a method's name without `do_`. The server bills whatever it may have worked on, and more than
    fairly: the whole of max_tokens for a request whose answer gets lost.
    """

    def __init__(self, behave: Callable[[str, int], str], seconds_per_answer: float = 0.0) -> None:
        self.behave = behave
        self.seconds_per_answer = seconds_per_answer
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[str] = []
        self.asked: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.asked_again: list[str] = []
        self.billed_tokens = 0
        self.under_way = 0
        self.most_under_way = 0

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(60)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        started.set()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = next(
                    int(line.split(":")[1])
                    for line in head.split("\r\n")
                    if line.lower().startswith("content-length")
                )
                body = json.loads(await reader.readexactly(length))
                self.headers.append(head)
                if head.startswith("POST /v1/chat/completions "):
                    await self._answer(body, writer)
                else:
                    self.send(writer, 404, b'{"detail": "Not Found"}')
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        question = body["messages"][-1]["content"]
        self.requests.append(body)
        self.times.append(time.monotonic())
        self.asked[question] += 1
        if self.delivered[question]:
            self.asked_again.append(question)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await getattr(self, "do_" + self.behave(question, self.asked[question]))(body, writer)
            await writer.drain()
        finally:
            self.under_way -= 1

    # ------------------------------------------------------------------------------ what it says

    def completion(self, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A correct answer to `What is A + B?`, and its bill."""
        question = body["messages"][-1]["content"]
        numbers = [int(word.strip("?")) for word in question.split() if word.strip("?").isdigit()]
        usage = {"prompt_tokens": len(question) // 4, "completion_tokens": body["max_tokens"] // 2}
        usage["total_tokens"] = sum(usage.values())
        message = {
            "role": "assistant",
            "reasoning_content": " + ".join(map(str, numbers)) + f" = {sum(numbers)}",
            "content": f"The answer is \\boxed{{{sum(numbers)}}}.",
        }
        choice = {"index": 0, "message": message | changes.pop("message", {})}
        choice["finish_reason"] = changes.pop("finish_reason", "stop")
        completion = {"id": "c", "model": "served-model", "choices": [choice], "usage": usage}
        return completion | changes

    def bill(self, tokens: int) -> None:
        self.billed_tokens += tokens

    def worst(self, body: dict[str, Any]) -> int:
        return len(body["messages"][-1]["content"]) // 4 + int(body["max_tokens"])

    def send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: bytes,
        kind: str = JSON,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def say(self, body: dict[str, Any], writer: asyncio.StreamWriter, **changes: Any) -> None:
        completion = self.completion(body, **changes)
        usage = completion["usage"]
        self.bill(usage["total_tokens"] if usage else self.worst(body))
        await asyncio.sleep(self.seconds_per_answer)
        self.send(writer, 200, json.dumps(completion).encode())
        await writer.drain()
        self.delivered[body["messages"][-1]["content"]] += 1

    async def do_answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer)

    async def do_vllm_answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        message = {"reasoning_content": None, "reasoning": "in vLLM's field"}
        await self.say(body, writer, message=message)

    async def do_wrong(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, message={"content": "\\boxed{-1}"})

    async def do_surrogate(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, message={"reasoning_content": "half \ud83d, U+2028 \u2028."})

    async def do_no_usage(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, usage=None)

    async def do_greedy_usage(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 10**6, "total_tokens": 10**6 + 9}
        await self.say(body, writer, usage=usage)

    async def do_length(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, finish_reason="length", message={"content": ""})

    async def do_content_filter(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, finish_reason="content_filter")

    async def do_empty(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.say(body, writer, message={"content": None})

    async def do_text_plain(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        completion = self.completion(body)
        self.bill(completion["usage"]["total_tokens"])
        self.send(writer, 200, json.dumps(completion).encode(), kind="text/plain")

    # ---------------------------------------------------------------------------- what goes wrong

    async def refuse(
        self, writer: asyncio.StreamWriter, status: int, headers: dict[str, str] | None = None
    ) -> None:
        # It quotes the key that it was sent, as careless servers do.
        key = self.headers[-1].partition("uthorization: ")[2].partition("\r\n")[0]
        error = {"error": {"message": f"refused with {status}, sent {key}"}}
        self.send(writer, status, json.dumps(error).encode(), headers=headers)

    async def do_400(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 400)

    async def do_401(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 401)

    async def do_402(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 402)

    async def do_408(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        await self.refuse(writer, 408)

    async def do_409(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 409)

    async def do_422(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 422)

    async def do_429(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 429)

    async def do_429_after_1(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 429, {"Retry-After": "1"})

    async def do_429_tomorrow(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 429, {"Retry-After": "86400"})

    async def do_503_date(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """`Retry-After` as a date, one second from now by a clock that is a day behind."""
        now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        dates = [format_datetime(now + datetime.timedelta(seconds=s), usegmt=True) for s in (0, 1)]
        await self.refuse(writer, 503, {"Date": dates[0], "Retry-After": dates[1]})

    async def do_503(self, _: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.refuse(writer, 503)

    async def do_500(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        await self.refuse(writer, 500)

    async def do_502(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        self.send(writer, 502, b"<html>bad gateway</html>", kind="text/html")

    async def do_reset(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Half of an answer, then a TCP reset."""
        self.bill(self.worst(body))
        data = json.dumps(self.completion(body)).encode()
        self.send(writer, 200, data[: len(data) // 2], length=len(data))
        await writer.drain()
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def do_stall(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Half of an answer, then nothing."""
        self.bill(self.worst(body))
        data = json.dumps(self.completion(body)).encode()
        self.send(writer, 200, data[: len(data) // 2], length=len(data))
        await writer.drain()
        await asyncio.sleep(3600)

    async def do_malformed(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        self.send(writer, 200, b'{"choices": [{"message": {"content": "18')

    async def do_not_utf8(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        self.send(writer, 200, b'{"choices": "\xff"}')

    async def do_deep(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        self.send(writer, 200, b"[" * 200_000)

    async def do_blank(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Status 200 and nothing but keep-alives, as an overloaded DeepSeek has sent."""
        self.bill(self.worst(body))
        self.send(writer, 200, b"\n\n\n\n")

    async def do_empty_choices(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        completion = self.completion(body, choices=[])
        self.bill(completion["usage"]["total_tokens"])
        self.send(writer, 200, json.dumps(completion).encode())

    async def do_gave_up(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        completion = self.completion(body, finish_reason="insufficient_system_resource")
        self.bill(completion["usage"]["total_tokens"])
        self.send(writer, 200, json.dumps(completion).encode())

    async def do_html(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bill(self.worst(body))
        self.send(writer, 200, b"<html><body>Log in to the network</body></html>", kind="text/html")

    async def keep_alive(
        self, body: dict[str, Any], writer: asyncio.StreamWriter, num_lines: int, line: bytes
    ) -> None:
        """`num_lines` of waiting, 300 a second, then the answer, in one chunked body."""
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")

        async def chunk(data: bytes) -> None:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()

        for _ in range(num_lines):
            await chunk(line)
            await asyncio.sleep(1 / 300)
        completion = self.completion(body)
        self.bill(completion["usage"]["total_tokens"])
        await chunk(json.dumps(completion).encode())
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        self.delivered[body["messages"][-1]["content"]] += 1

    async def do_keep_alive(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Ten minutes of a blank line a second, 300 times as fast."""
        await self.keep_alive(body, writer, 600, b"\n")

    async def do_comments(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await self.keep_alive(body, writer, 20, b": keep-alive\n\n")

    async def do_endless_keep_alive(
        self, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        self.bill(self.worst(body))
        await self.keep_alive(body, writer, 10**6, b"\n")


class HeldServer(ChatServer):
    """Gives no answer until `until()`."""

    def __init__(self, behave: Callable[[str, int], str], until: Callable[[], bool]) -> None:
        super().__init__(behave)
        self.until = until

    async def do_answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        while not self.until():
            await asyncio.sleep(0.02)
        await super().do_answer(body, writer)
