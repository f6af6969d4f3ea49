"""From a question to the text that the model continues, and from a solution to what SFT imitates.

Rendered text is tokenized with `add_special_tokens=False`: a chat template writes its own
special tokens. Plain prompts get one BOS where the tokenizer has one that it would add itself.

Worked examples come before the question: as turns of their own where the prompt is a chat, else as
text. Both are what lm-evaluation-harness does by default (0.4.13: `fewshot_as_multiturn` comes with
`apply_chat_template`), and the tests compare them with its own code byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from gsm8k_core.config import PromptSettings
from gsm8k_core.errors import DataError, ModelError
from gsm8k_core.files import packaged_json
from gsm8k_core.problems import Problem, WorkedExample, worked_examples

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def strip_calculator_marks(text: str) -> str:
    """Drop `<<48/2=24>>`; the result after each mark stays."""
    return CALCULATOR_MARK.sub("", text)


def render_solution(solution: str, prompt: PromptSettings) -> str:
    """A GSM8K solution in the form that `prompt` asks for (calculator marks, `####` or boxed).

    Raises DataError where the answer is to be boxed, but no `####` says which it is.
    """
    if prompt.strip_calculator:
        solution = strip_calculator_marks(solution)
    if prompt.answer_marker == "boxed":
        body, marker, gold = solution.rpartition("####")
        if not marker:
            raise DataError(
                f"solution {solution[-80:]!r} does not end in '#### ' and a number, so there is "
                "nothing to put into \\boxed{}: mend the dataset"
            )
        solution = f"{body.rstrip()}\nThe answer is \\boxed{{{gold.strip()}}}."
    return solution


def demonstration(problem: Problem, prompt: PromptSettings) -> str:
    """What SFT imitates for this problem: what follows the prompt, its first space included."""
    text = render_solution(problem.demonstration or problem.answer, prompt)
    return text if text[:1].isspace() else _gap(prompt) + text  # what was sampled begins with it


def _gap(prompt: PromptSettings) -> str:
    """A space before an answer in plain text, unless the template ends in one."""
    return "" if prompt.chat or prompt.template[-1:].isspace() else " "


@cache
def wei2022_examples() -> tuple[WorkedExample, ...]:
    """The eight exemplars of Wei et al. 2022; none of them is a problem of GSM8K."""
    return worked_examples(packaged_json("wei2022.json")["examples"], "wei2022.json: examples")


def shown_examples(
    prompt: PromptSettings, of_problem: Sequence[WorkedExample]
) -> list[WorkedExample]:
    """The worked examples that `prompt` shows before a problem that brings `of_problem`.

    Quoted exemplars stay as they are; solutions of the dataset take the form that the prompt asks
    for. Raises DataError when the prompt wants the problem's own and it brings none.
    """
    if prompt.examples is None:
        return []
    if prompt.examples == "wei2022":
        return list(wei2022_examples())
    if not of_problem:
        raise DataError(
            "the prompt shows each problem's own worked examples (examples: of_problem), but this "
            "problem has none; use a dataset with examples_per_test_problem above 0, and its "
            "test split"
        )
    return [
        WorkedExample(example.question, render_solution(example.answer, prompt))
        for example in of_problem
    ]


def render_prompt(
    question: str,
    prompt: PromptSettings,
    tokenizer: Any,
    examples: Sequence[WorkedExample] = (),
) -> str:
    """The text before the completion; `examples` are those that the problem brings (its own).

    Raises ModelError when the prompt wants a chat template that the tokenizer does not have, or
    sets what the template does not know, and DataError when it wants the problem's own examples and
    there are none.
    """
    if not prompt.chat:
        shown = shown_examples(prompt, examples)
        gap = _gap(prompt)
        before = [f"{user_turn(one.question, prompt)}{gap}{one.answer}\n\n" for one in shown]
        return "".join([*before, user_turn(question, prompt)])
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, which this prompt "
            "needs; take a prompt with chat: false (models.<name>.prompt, suites.<name>.prompt)"
        )
    for name in prompt.chat_arguments:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ModelError(
                f"{tokenizer.name_or_path}: the chat template knows no {name!r}, which "
                "chat_arguments of this prompt set; mend its name or leave it out"
            )
    messages = chat_messages(question, prompt, examples)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **prompt.chat_arguments
    )


def user_turn(question: str, prompt: PromptSettings) -> str:
    """What the user says to ask `question`."""
    return prompt.template.replace("{question}", question)


def chat_messages(
    question: str, prompt: PromptSettings, examples: Sequence[WorkedExample] = ()
) -> list[dict[str, str]]:
    """The turns before the completion; `examples` are those that the problem brings (its own)."""
    messages = []
    if prompt.system is not None:
        messages.append({"role": "system", "content": prompt.system})
    for one in shown_examples(prompt, examples):
        messages.append({"role": "user", "content": user_turn(one.question, prompt)})
        messages.append({"role": "assistant", "content": one.answer})
    messages.append({"role": "user", "content": user_turn(question, prompt)})
    return messages


def prompt_token_ids(texts: list[str], prompt: PromptSettings, tokenizer: Any) -> list[list[int]]:
    """Token ids of rendered prompts, with the BOS that the tokenizer (or the chat template) adds.

    An EOS that a tokenizer puts behind every text is left out: the model is to go on.
    """
    if not texts:  # as of a rank without a share, which tokenizers take for a mistake
        return []
    encoded = tokenizer(texts, add_special_tokens=not prompt.chat)["input_ids"]
    eos, eos_id = str(tokenizer.eos_token), tokenizer.eos_token_id
    return [
        ids[:-1] if ids[-1:] == [eos_id] and not text.endswith(eos) else ids
        for text, ids in zip(texts, encoded, strict=True)
    ]


def encode_prompts(
    questions: Iterable[str], prompt: PromptSettings, tokenizer: Any
) -> list[list[int]]:
    """Token ids of the prompts that ask `questions`: a list for each, for `Request` and `collate`.

    With the BOS that the tokenizer or the chat template adds, without an EOS. Raises ModelError
    where `prompt` wants a chat template that the tokenizer does not have, or sets what that does
    not know, and DataError where it wants worked examples of each problem.
    """
    texts = [render_prompt(question, prompt, tokenizer) for question in questions]
    return prompt_token_ids(texts, prompt, tokenizer)
