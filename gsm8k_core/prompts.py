"""From a question to the text that the model continues, and from a solution to what SFT imitates.

Rendered text is tokenized with `add_special_tokens=False` (trap 4): a chat template writes its own
special tokens. Plain prompts get one BOS where the tokenizer has one that it would add itself.
"""

from __future__ import annotations

import re
from typing import Any

from gsm8k_core.config import PromptSettings
from gsm8k_core.errors import ModelError
from gsm8k_core.problems import Problem

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def strip_calculator_marks(text: str) -> str:
    """Drop `<<48/2=24>>`; the result after each mark stays."""
    return CALCULATOR_MARK.sub("", text)


def render_solution(solution: str, prompt: PromptSettings) -> str:
    """A GSM8K solution in the form that `prompt` asks for (calculator marks, `####` or boxed)."""
    if prompt.strip_calculator:
        solution = strip_calculator_marks(solution)
    if prompt.answer_marker == "boxed":
        body, _, gold = solution.rpartition("####")
        solution = f"{body.rstrip()}\nThe answer is \\boxed{{{gold.strip()}}}."
    return solution


def demonstration(problem: Problem, prompt: PromptSettings) -> str:
    """What SFT imitates for this problem."""
    return render_solution(problem.demonstration or problem.answer, prompt)


def render_prompt(question: str, prompt: PromptSettings, tokenizer: Any) -> str:
    """The text before the completion.

    Raises ModelError when the prompt wants a chat template that the tokenizer does not have.
    """
    user = prompt.template.replace("{question}", question)
    if not prompt.chat:
        return user
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, which this prompt "
            "needs; take a prompt with chat: false (models.<name>.prompt, suites.<name>.prompt)"
        )
    messages = [{"role": "user", "content": user}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_token_ids(texts: list[str], prompt: PromptSettings, tokenizer: Any) -> list[list[int]]:
    """Token ids of rendered prompts: exactly one BOS each, where the model has one."""
    return tokenizer(texts, add_special_tokens=not prompt.chat)["input_ids"]
