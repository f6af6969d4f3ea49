"""Ask a chat API every question, keep what it answers, never pass the budget, survive any kill.

A collection is a folder of append-only JSONL files:

- `ledger.jsonl`: first what is asked of whom, then a row before each request (the worst that it can
  cost) and a row after each that brought no answer (what it may have cost);
- `answers.jsonl`: complete answers;
- `incomplete.jsonl`: answers cut at max_tokens, filtered or empty: paid for, not asked again;
- `failed.jsonl`: traces given up in some run, and why; the next run asks them again.

A request whose ledger row is followed by nothing counts at its worst case: the process was killed
while it was under way, and the server may have done the work. So the sum of the files never lies
below what the server can charge.

A row is one write to the file, so a kill between two rows loses none. A last line that was torn all
the same (a full disk) is cut off at the next start. Power failures are another matter: nothing is
forced to the disk.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from gsm8k_core.chat_api import ChatClient, Fault, Refused, Reply, retry_delay
from gsm8k_core.config import BudgetSettings, CollectionSettings
from gsm8k_core.errors import ApiError, DataError
from gsm8k_core.files import Json, cut_torn_line, iter_jsonl
from gsm8k_core.manifest import utc_now
from gsm8k_core.problems import Problem
from gsm8k_core.prompts import chat_messages
from gsm8k_core.redaction import redact

log = logging.getLogger(__name__)

TEMPLATE_TOKENS = 512
"""Most tokens that a server's chat template adds to a conversation (default system turns too)."""
MAX_FAILED_IN_A_ROW = 20
"""Traces given up one after the other, without an answer in between, after which it ends."""

Task = tuple[str, int]
"""Problem id and number of the trace (from 0)."""


@dataclass(frozen=True)
class Amount:
    """Tokens, and the money that they cost."""

    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.tokens - other.tokens, self.money - other.money)


def price(num_prompt_tokens: int, num_completion_tokens: int, budget: BudgetSettings) -> Amount:
    """What so many tokens cost."""
    money = (
        num_prompt_tokens * budget.prompt_price + num_completion_tokens * budget.completion_price
    )
    return Amount(num_prompt_tokens + num_completion_tokens, money / 1e6)


def worst_case(messages: list[dict[str, str]], settings: CollectionSettings) -> Amount:
    """The most that one request can cost.

    A token of a byte-level vocabulary holds at least one byte, so the bytes bound the tokens.
    """
    num_bytes = sum(len(message["content"].encode("utf-8")) for message in messages)
    return price(num_bytes + TEMPLATE_TOKENS, settings.api.max_tokens, settings.budget)


def amount_of_usage(usage: Json | None, budget: BudgetSettings) -> Amount | None:
    """What the server says it did; None where it does not say.

    Where the total is larger than its parts, the rest is reasoning, priced as completion.
    """
    counts = [
        (usage or {}).get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    ]
    prompt, completion, total = (
        count if type(count) is int and count >= 0 else None for count in counts
    )
    if prompt is None or completion is None:
        return None
    return price(prompt, max(completion, (total or 0) - prompt), budget)


# ------------------------------------------------------------------------------------- on the disk


class AppendOnly:
    """A JSONL file to which whole rows are appended, by one process at a time.

    Cuts off a torn last line when opened. Raises DataError if another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            self.close()
            raise DataError(
                f"{path.parent}: another collector is writing there; wait until it is done"
            ) from None
        self._repair()

    def _repair(self) -> None:
        if num_bytes := cut_torn_line(self.path):
            log.warning("%s: cut off a torn last line of %d bytes", self.path, num_bytes)

    def append(self, row: Json) -> None:
        """Write one row. Half a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        if os.write(self._descriptor, data) < len(data):
            self._repair()
            raise OSError(errno.ENOSPC, "no space left for a whole row", str(self.path))

    def rows(self, *keys: str) -> Iterator[tuple[str, Json]]:
        """Every row, with its place for errors. Raises DataError where one lacks any of `keys`."""
        for number, row in enumerate(iter_jsonl(self.path), start=1):
            where = f"{self.path}, row {number}"
            for key in keys:
                if key not in row:
                    raise DataError(f"{where}: '{key}' is missing")
            yield where, row

    def close(self) -> None:
        os.close(self._descriptor)


class Collection:
    """The folder of one collection, locked for this process, and what it has and has cost so far.

    Raises DataError when another process has it, when its traces were collected with other settings
    or of other questions, or when a row is malformed.
    """

    def __init__(self, folder: Path, settings: CollectionSettings, problems: list[Problem]) -> None:
        self.folder = folder
        self.settings = settings
        self.questions = {problem.id: problem.question for problem in problems}
        self.done: set[Task] = set()
        self.spent_on_replies = Amount()
        self.maybe_spent = Amount()
        self.num_requests = 0
        with ExitStack() as files:

            def opened(name: str) -> AppendOnly:
                return files.enter_context(closing(AppendOnly(folder / name)))

            self.ledger = opened("ledger.jsonl")
            self.answers = opened("answers.jsonl")
            self.incomplete = opened("incomplete.jsonl")
            self.failed = opened("failed.jsonl")
            self._load()
            self._open_files = files.pop_all()

    @property
    def spent(self) -> Amount:
        """The most that the server can have charged so far."""
        return self.spent_on_replies + self.maybe_spent

    def _load(self) -> None:
        cost = ("request", "tokens", "money")
        settled: set[int] = set()
        for file in (self.answers, self.incomplete):
            for where, row in file.rows("problem_id", "sample_index", "question", *cost):
                problem_id, question = row["problem_id"], row["question"]
                if self.questions.get(problem_id, question) != question:
                    raise DataError(
                        f"{where}: {problem_id} was another question; move the folder away, or "
                        "give the new traces another name"
                    )
                settled.add(row["request"])
                self.num_requests = max(self.num_requests, row["request"])
                self.done.add((problem_id, row["sample_index"]))
                self.spent_on_replies += Amount(row["tokens"], row["money"])
        reserved: dict[int, Amount] = {}
        self._check_identity(next(iter_jsonl(self.ledger.path), None))
        for _, row in self.ledger.rows(*cost):
            self.num_requests = max(self.num_requests, row["request"])
            reserved[row["request"]] = Amount(row["tokens"], row["money"])
        for request, amount in reserved.items():
            if request not in settled:
                self.maybe_spent += amount

    def _check_identity(self, header: Json | None) -> None:
        """What is asked of whom must not change within a folder; how patiently may."""
        api, prompt = self.settings.api, self.settings.prompt
        identity = {
            "model": api.model,
            "temperature": api.temperature,
            "parameters": api.parameters,
            "prompt": prompt.model_dump(mode="json", include={"template", "system", "examples"}),
        }
        if header is None:
            self.ledger.append({"request": 0, "tokens": 0, "money": 0.0, "asked": identity})
            return
        asked = header.get("asked", {})
        different = sorted(key for key in identity if asked.get(key) != identity[key])
        if different:
            raise DataError(
                f"{self.folder}: its traces were collected with another {', '.join(different)}; "
                "move the folder away, or give the new traces another name"
            )

    def missing(self, problems: list[Problem]) -> list[tuple[Problem, int]]:
        """Traces not there yet; the first one of every question before the second of any."""
        return [
            (problem, index)
            for index in range(self.settings.traces_per_question)
            for problem in problems
            if (problem.id, index) not in self.done
        ]

    def reserve(self, task: Task, attempt: int, amount: Amount) -> int:
        """Note what a request may cost, before it is sent; returns the request's number."""
        self.num_requests += 1
        self._note(self.num_requests, task, amount, {"attempt": attempt})
        return self.num_requests

    def settle(self, request: int, task: Task, amount: Amount, reason: str) -> None:
        """Note what a request without an answer may have cost. The later row counts."""
        self._note(request, task, amount, {"reason": redact(reason)})
        self.maybe_spent += amount

    def _note(self, request: int, task: Task, amount: Amount, more: Json) -> None:
        row = {"request": request, "problem_id": task[0], "sample_index": task[1]}
        self.ledger.append({**row, "tokens": amount.tokens, "money": amount.money, **more})

    def add_reply(self, row: Json) -> None:
        """Keep a reply, and with it what it cost."""
        complete = row["finish_reason"] == "stop" and row["content"].strip()
        (self.answers if complete else self.incomplete).append(row)
        self.done.add((row["problem_id"], row["sample_index"]))
        self.spent_on_replies += Amount(row["tokens"], row["money"])

    def add_failure(self, task: Task, reason: str, attempts: int) -> None:
        """Record that a trace is given up until the next run, and why."""
        row = {"problem_id": task[0], "sample_index": task[1], "reason": redact(reason)}
        self.failed.append({**row, "attempts": attempts, "at": utc_now()})

    def close(self) -> None:
        """Let another process have it."""
        self._open_files.close()


# ---------------------------------------------------------------------------------------- spending


class BudgetSpent(Exception):
    """Nothing more fits into the budget."""


class Budget:
    """Lets a request begin only where its worst case still fits beside those under way."""

    def __init__(self, settings: BudgetSettings, spent: Amount) -> None:
        self.settings = settings
        self._spent = spent
        self._reserved = Amount()
        self._changed = asyncio.Condition()

    @property
    def is_limited(self) -> bool:
        return self.settings.tokens is not None or self.settings.money is not None

    def _fits(self, amount: Amount) -> bool:
        total = self._spent + self._reserved + amount
        tokens, money = self.settings.tokens, self.settings.money
        return (tokens is None or total.tokens <= tokens) and (
            money is None or total.money <= money
        )

    async def reserve(self, amount: Amount) -> None:
        """Wait for room. Raises BudgetSpent where none will come: nothing is under way."""
        async with self._changed:
            while not self._fits(amount):
                if self._reserved.tokens == 0:
                    raise BudgetSpent
                await self._changed.wait()
            self._reserved += amount

    async def settle(self, reserved: Amount, actual: Amount) -> None:
        """Give back a reservation for what the request really cost."""
        async with self._changed:
            self._reserved -= reserved
            self._spent += actual
            if self._reserved.tokens == 0:
                self._reserved = Amount()  # sums of fractions leave a rest
            self._changed.notify_all()


# -------------------------------------------------------------------------------------- collecting


class Collector:
    """Asks for what a collection lacks, `concurrency` requests at a time."""

    def __init__(
        self,
        collection: Collection,
        client: ChatClient,
        problems: list[Problem],
        on_trace: Callable[[], None],
    ) -> None:
        """`on_trace` is called after each trace that is there or given up."""
        self.collection = collection
        self.problems = problems
        self.client = client
        self.on_trace = on_trace
        self.settings = collection.settings
        self.budget = Budget(self.settings.budget, collection.spent)
        self.budget_spent = False
        self._failed_in_a_row = 0
        self._stop = asyncio.Event()
        self._error: ApiError | None = None
        self._rng = random.Random()

    async def run(self) -> None:
        """Ask for every missing trace. Ends early, without an error, when the budget is spent.

        Raises ApiError when the server refuses to go on; requests under way are waited for first,
        since they are paid for.
        """
        tasks = iter(self.collection.missing(self.problems))
        workers = (self._work(tasks) for _ in range(self.settings.api.concurrency))
        await asyncio.gather(*workers)
        if self._error is not None:
            raise self._error

    async def _work(self, tasks: Iterator[tuple[Problem, int]]) -> None:
        for problem, index in tasks:
            if self._stop.is_set():
                return
            try:
                await self._collect(problem, index)
            except BudgetSpent:
                self.budget_spent = True
                self._stop.set()
            except ApiError as error:
                if self._error is None:
                    # Now: `run` raises it only when the last request under way has ended.
                    log.error("%s; sending no more requests, waiting for those in flight", error)
                    self._error = error
                self._stop.set()

    async def _collect(self, problem: Problem, index: int) -> None:
        """One trace: there, given up, or (when all is stopped) left for the next run."""
        api = self.settings.api
        messages = chat_messages(problem.question, self.settings.prompt, problem.examples)
        worst = worst_case(messages, self.settings)
        reason = ""
        for attempt in range(1, api.max_attempts + 1):
            await self.budget.reserve(worst)
            if self._stop.is_set():
                await self.budget.settle(worst, Amount())
                return
            try:
                await self._attempt(problem, index, attempt, messages, worst)
            except Fault as fault:
                reason = str(fault)
                log.debug("%s, trace %d, attempt %d: %s", problem.id, index, attempt, reason)
                if (fault.retry_after or 0.0) > api.max_retry_after_seconds:
                    reason = f"the server asks to wait {fault.retry_after:g} s ({reason})"
                    break
                delay = retry_delay(attempt, fault.retry_after, api, self._rng)
                if attempt < api.max_attempts and await self._stopped_within(delay):
                    return
            except Refused as refused:
                # A server that has answered others refuses this question.
                if not (refused.of_one and self.collection.done):
                    raise
                reason = str(refused)
                break
            else:
                self._failed_in_a_row = 0
                self.on_trace()
                return
        self.collection.add_failure((problem.id, index), reason, attempt)
        self.on_trace()
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise ApiError(
                f"{api.base_url}: {self._failed_in_a_row} traces in a row failed, "
                f"the last one because of: {reason}"
            )

    async def _attempt(
        self,
        problem: Problem,
        index: int,
        attempt: int,
        messages: list[dict[str, str]],
        worst: Amount,
    ) -> None:
        """One request, noted in the ledger before it is sent. Raises Fault, Refused and ApiError.

        The ledger's row stays unsettled when this is cancelled: the server goes on by itself.
        """
        task = (problem.id, index)
        request = self.collection.reserve(task, attempt, worst)
        started = time.monotonic()
        try:
            reply = await self.client.ask(messages)
        except Fault as fault:
            said = amount_of_usage(fault.usage, self.settings.budget)
            cost = (said or worst) if fault.billed else Amount()
            self.collection.settle(request, task, cost, str(fault))
            await self.budget.settle(worst, cost)
            self._check_cost(cost, worst)
            raise
        except Refused as refused:
            cost = amount_of_usage(refused.usage, self.settings.budget) or Amount()
            self.collection.settle(request, task, cost, str(refused))
            await self.budget.settle(worst, cost)
            raise
        cost = amount_of_usage(reply.usage, self.settings.budget) or worst
        row = reply_row(problem, index, request, attempt, reply, cost)
        self.collection.add_reply({**row, "seconds": round(time.monotonic() - started, 3)})
        await self.budget.settle(worst, cost)
        self._check_cost(cost, worst)

    def _check_cost(self, cost: Amount, worst: Amount) -> None:
        """Raise ApiError where a request has cost more than it could, so that no budget holds.

        More completion than allowed may cost more though the tokens, prompt included, are fewer.
        """
        if self.budget.is_limited and (cost.tokens > worst.tokens or cost.money > worst.money):
            raise ApiError(
                f"{self.settings.api.base_url}: it counted {cost.tokens} tokens for a request of "
                f"at most {worst.tokens} (a price of {cost.money:g} where {worst.money:g} is the "
                "most), so it does not respect max_tokens and no budget can hold; remove the "
                "budget to continue"
            )

    async def _stopped_within(self, seconds: float) -> bool:
        """Sleep, unless everything is stopped meanwhile."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True


def reply_row(
    problem: Problem, index: int, request: int, attempt: int, reply: Reply, cost: Amount
) -> Json:
    """A row of answers.jsonl or incomplete.jsonl."""
    return {
        "problem_id": problem.id,
        "sample_index": index,
        "question": problem.question,
        "reasoning": reply.reasoning,
        "content": reply.content,
        "finish_reason": reply.finish_reason,
        "model": reply.model,
        "usage": reply.usage,
        "tokens": cost.tokens,
        "money": cost.money,
        "request": request,
        "attempts": attempt,
        "at": utc_now(),
    }
