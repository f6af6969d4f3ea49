"""From collected answers to reasoning traces that SFT learns from: verified, filtered, distinct.

A demonstration is written with GSM8K's own mark, `#### 24`, whatever the server was asked for, so
that `prompts.demonstration` can give it the form that a student's prompt asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gsm8k_core.answers import BOX, closing_brace, is_correct
from gsm8k_core.config import PromptSettings, TraceDatasetSettings, TraceSelectionSettings
from gsm8k_core.errors import DataError
from gsm8k_core.files import Json, parse_jsonl, required
from gsm8k_core.problems import Problem
from gsm8k_core.prompts import render_solution

THINK_TAG = re.compile(r"</?think>")
STUDENT_PROMPTS = (PromptSettings(), PromptSettings(answer_marker="boxed"))


def select_traces(
    path: Path, problems: list[Problem], settings: TraceDatasetSettings
) -> tuple[list[Problem], dict[str, int]]:
    """Problems whose demonstration is a trace, by problem and number of the trace; and counts.

    The counts say how many answers there were, what became of each and how many questions are
    covered. Raises DataError that names the row of an answer whose question is not in `problems`,
    or that lacks something.
    """
    counts: Counter[str] = Counter()
    asked = problems[: settings.num_questions]
    most = math.inf if settings.traces_per_question is None else settings.traces_per_question
    kept: dict[str, list[Problem]] = {problem.id: [] for problem in asked}
    seen: set[bytes] = set()
    for problem, row in _in_order(path, problems):
        counts["answers"] += 1
        if problem.id not in kept or row["sample_index"] >= most:
            counts["not_asked_for"] += 1
            continue
        reasoning, content = split_reasoning(row["reasoning"], row["content"])
        fate = _fate(problem, reasoning, content, settings)
        if fate == "kept":
            text = " ".join(f"{reasoning} {content}".split()).casefold()
            digest = hashlib.sha256(f"{problem.question}\0{text}".encode()).digest()
            if digest in seen:
                fate = "duplicate"
            elif len(kept[problem.id]) == settings.selection.max_kept_per_question:
                fate = "one_too_many"
            else:
                seen.add(digest)
                kept[problem.id].append(
                    replace(
                        problem,
                        id=f"{problem.id}-trace{row['sample_index']}",
                        demonstration=demonstration_text(
                            reasoning, content, problem.gold, settings.selection
                        ),
                    )
                )
        counts[fate] += 1
    counts["questions"] = len(asked)
    counts["questions_kept"] = sum(bool(traces) for traces in kept.values())
    return [trace for traces in kept.values() for trace in traces], dict(counts)


def _in_order(path: Path, problems: list[Problem]) -> Iterator[tuple[Problem, Json]]:
    """Each answer with its problem, by problem and number of the trace.

    Answers come in the order in which a server finished them, which is another one each time. They
    are long: all are checked first, and only their places in the file are kept.
    """
    by_id = {problem.id: problem for problem in problems}
    place = {problem.id: index for index, problem in enumerate(problems)}
    order: list[tuple[int, int, int]] = []
    try:
        handle = path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    with handle:
        end = 0
        for number, row in enumerate(parse_jsonl(handle, str(path)), start=1):
            start, end = end, handle.tell()
            where = f"{path}, row {number}"
            for key in ("reasoning", "content"):
                required(row, key, str, where)
            sample_index = required(row, "sample_index", int, where)
            problem_id = required(row, "problem_id", str, where)
            problem = by_id.get(problem_id)
            if problem is None or problem.question != required(row, "question", str, where):
                raise DataError(f"{where}: the question of {problem_id} is not in the data")
            order.append((place[problem_id], sample_index, start))
        for index, _, start in sorted(order):
            handle.seek(start)
            yield problems[index], json.loads(handle.readline())


def _fate(problem: Problem, reasoning: str, content: str, settings: TraceDatasetSettings) -> str:
    """`kept`, or why an answer is left out."""
    selection = settings.selection
    if not is_correct(content, problem.gold, selection.grading, settings.marker):
        return "incorrect"
    if selection.require_reasoning and not reasoning:
        return "without_reasoning"
    if THINK_TAG.search(reasoning) or THINK_TAG.search(content):
        return "stray_think_tag"
    text = demonstration_text(reasoning, content, problem.gold, selection)
    if len(text) < selection.min_characters:
        return "too_short"
    if selection.max_characters is not None and len(text) > selection.max_characters:
        return "too_long"
    # Outside think tags, the reasoning may hold a marker that would be read as the answer's.
    for prompt in STUDENT_PROMPTS:
        rendered = render_solution(text, prompt)
        if not is_correct(rendered, problem.gold, "strict", prompt.answer_marker):
            return "second_marker"
    return "kept"


def split_reasoning(reasoning: str, content: str) -> tuple[str, str]:
    """Reasoning and answer, stripped.

    A server without a reasoning parser leaves both in `content`, and the opening tag may stand in
    its chat template instead.
    """
    if not reasoning.strip() and "</think>" in content:
        reasoning, _, content = content.partition("</think>")
        reasoning = reasoning.lstrip().removeprefix("<think>")
    return reasoning.strip(), content.strip()


def demonstration_text(
    reasoning: str, content: str, gold: str, selection: TraceSelectionSettings
) -> str:
    """What SFT imitates: the think format around both, ended by `#### gold`."""
    answer = f"{without_marker(content)}\n#### {gold}".lstrip()
    if not reasoning:
        return answer
    before, _, rest = selection.think_format.partition("{reasoning}")
    return before + reasoning + rest.removesuffix("{answer}") + answer


def without_marker(content: str) -> str:
    """`content` without a last line `#### 24`, and with what `\\boxed{}` holds in its place."""
    body, _, last_line = content.rpartition("\n")
    if last_line.lstrip().startswith("####"):
        content = body.rstrip()
    while (box := BOX.search(content)) is not None:
        end = closing_brace(content, box.end())
        if end is None:
            end = len(content)
        content = content[: box.start()] + content[box.end() : end] + content[end + 1 :]
    return content
