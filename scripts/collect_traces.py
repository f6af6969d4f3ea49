"""Collect reasoning traces of train questions from an OpenAI-compatible chat API.

The key is read from $DEEPSEEK_API_KEY; your own server may need none. Answers are appended to
`<output-dir>/answers.jsonl` as they come, so a collection that was stopped for any reason resumes
where it was and asks for nothing twice. It ends when every trace is there or given up, or when the
budget is spent: the worst case of a request is reserved before it is sent. Beside the answers are
incomplete.jsonl, failed.jsonl (asked again by the next run), ledger.jsonl (what may have been paid
for; keep it in the folder as long as there is a budget) and attempts.json (every call so far).

    python scripts/collect_traces.py --traces r1_traces --data artifacts/gsm8k/train.jsonl \\
        --output-dir artifacts/r1_traces/collected --summary artifacts/r1_traces/collected.json

For another server, such as `vllm serve MODEL`, give its base URL and the model:

    python scripts/collect_traces.py --traces r1_traces --data artifacts/gsm8k/train.jsonl \\
        --base-url http://127.0.0.1:8000/v1 --model MODEL \\
        --output-dir /tmp/traces/collected --summary /tmp/traces/collected.json
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from gsm8k_core.chat_api import ChatClient
from gsm8k_core.cli import leave, run_script, traces_parser, traces_settings_from
from gsm8k_core.config import CollectionSettings, Config, checked, merge
from gsm8k_core.errors import ApiError
from gsm8k_core.files import Json, iter_jsonl, sha256_file, write_json
from gsm8k_core.manifest import Attempts, provenance, provenance_at_end
from gsm8k_core.problems import read_problems
from gsm8k_core.progress import progress_bar
from gsm8k_core.trace_collection import Collection, Collector

log = logging.getLogger("collect_traces")

SECONDS_BETWEEN_LOG_LINES = 60.0


class Progress:
    """A bar with rate and spend in a terminal; a line a minute in a log."""

    def __init__(self, collection: Collection, attempts: Attempts, total: int, start: int) -> None:
        self.collection = collection
        self.attempts = attempts
        self.total = total
        self.bar = progress_bar("traces", total, start)
        self.logged = time.monotonic()

    def __call__(self) -> None:
        """One trace more."""
        self.bar.set_postfix_str(self.spend(), refresh=False)
        self.bar.update()
        if time.monotonic() - self.logged >= SECONDS_BETWEEN_LOG_LINES:
            self.logged = time.monotonic()
            self.attempts.note()
            if self.bar.disable:
                log.info("%d traces of %d; %s", len(self.collection.done), self.total, self.spend())

    def spend(self) -> str:
        spent, budget = self.collection.spent, self.collection.settings.budget
        tokens = "" if budget.tokens is None else f" of {budget.tokens}"
        money = "" if budget.money is None else f" of {budget.money:g}"
        return f"spent {spent.tokens}{tokens} tokens, {spent.money:.4f}{money} in money"


async def run(collector: Collector) -> None:
    async with collector.client:
        await collector.run()


def summary_of(collection: Collection, collector: Collector) -> Json:
    """What there is, what it cost and what is missing, and why."""
    answers = collection.answers.path
    missing = {(problem.id, index) for problem, index in collection.missing(collector.problems)}
    reasons = {
        (row["problem_id"], row["sample_index"]): row["reason"]
        for row in iter_jsonl(collection.failed.path)
    }
    failed = sorted(missing & reasons.keys())
    return {
        "name": collection.settings.name,
        "num_answers": sum(1 for _ in iter_jsonl(answers)),
        "num_incomplete": sum(1 for _ in iter_jsonl(collection.incomplete.path)),
        "num_failed": len(failed),
        "num_never_asked": len(missing) - len(failed),
        "num_requests": collection.num_requests,
        "models": dict(Counter(str(row["model"]) for row in iter_jsonl(answers))),
        "budget_spent": collector.budget_spent,
        "tokens": collection.spent_on_replies.tokens,
        "money": round(collection.spent_on_replies.money, 6),
        "tokens_maybe_billed_without_reply": collection.maybe_spent.tokens,
        "money_maybe_billed_without_reply": round(collection.maybe_spent.money, 6),
        "failed": {
            f"{problem_id}/{index}": reasons[problem_id, index] for problem_id, index in failed
        },
        "answers_sha256": sha256_file(answers),
        "settings": collection.settings.model_dump(mode="json"),
    }


def settings_of(args: argparse.Namespace) -> CollectionSettings:
    """The settings that the arguments name."""
    settings: CollectionSettings = traces_settings_from(
        args, CollectionSettings, Config.collection_settings
    )
    given = {"base_url": args.base_url, "model": args.model}
    overlay = {"api": {key: value for key, value in given.items() if value is not None}}
    raw = merge(settings.model_dump(mode="json"), overlay)
    return checked(raw, CollectionSettings, "--base-url, --model")


def main(argv: list[str] | None = None) -> int:
    arguments = traces_parser(__doc__)
    arguments.add_argument("--base-url", help="another server than the config's")
    arguments.add_argument("--model", help="another model than the config's")
    arguments.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    arguments.add_argument("--output-dir", type=Path, required=True, help="folder of the answers")
    arguments.add_argument("--summary", type=Path, required=True, help="counts and cost, JSON")
    args = arguments.parse_args(argv)

    settings = settings_of(args)
    made_by = provenance()
    client = ChatClient(settings.api)
    problems = read_problems(args.data)[: settings.num_questions]
    with closing(Collection(args.output_dir, settings, problems)) as collection:
        num_missing = len(collection.missing(problems))
        total = len(problems) * settings.traces_per_question
        if num_missing < total:
            log.info("resuming after %d of %d traces", total - num_missing, total)
        attempts = Attempts(args.output_dir / "attempts.json", settings.name)
        on_trace = Progress(collection, attempts, total, total - num_missing)
        collector = Collector(collection, client, problems, on_trace)
        with on_trace.bar:
            asyncio.run(run(collector))
        summary = summary_of(collection, collector)
        log.info(
            "%d answers, %d incomplete, %d failed, %d never asked; %s",
            *(
                summary[f"num_{kind}"]
                for kind in ("answers", "incomplete", "failed", "never_asked")
            ),
            on_trace.spend(),
        )
        if collector.budget_spent:
            log.warning("the budget is spent; raise traces.%s.budget and run again", settings.name)
        if summary["num_answers"] == 0:
            raise ApiError(f"{settings.api.base_url}: not one answer; see {args.output_dir}")
        if summary["num_failed"] > settings.api.max_failed_fraction * total:
            raise ApiError(
                f"{settings.api.base_url}: {summary['num_failed']} of {total} traces failed, see "
                f"{args.output_dir / 'failed.jsonl'}; run the same command again, which asks for "
                f"these alone, or raise traces.{settings.name}.api.max_failed_fraction"
            )
        ended = {**attempts.finish(), "provenance": provenance_at_end(made_by)}
        write_json(args.summary, {**summary, **ended})
    return 0


if __name__ == "__main__":
    leave(run_script(main))
