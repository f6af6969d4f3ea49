"""From questions to prompts: templates, one BOS, boxed solutions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gsm8k_core.config import PromptSettings
from gsm8k_core.errors import DataError, ModelError
from gsm8k_core.models import tiny_tokenizer
from gsm8k_core.problems import Problem, WorkedExample
from gsm8k_core.prompts import (
    demonstration,
    encode_prompts,
    prompt_token_ids,
    render_prompt,
    render_solution,
    strip_calculator_marks,
)

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ONE_BOS_CHAT = "<s>" + CHAT.replace("<s>", "")
BOS = 0


def tokenizer(chat_template: str | None = None, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; a BOS before every text, as Llama's tokenizer has it."""
    characters = {chr(code): code - 29 for code in range(32, 127)} | {"\n": 98}
    backend = Tokenizer(models.WordLevel({"<s>": BOS, "<unk>": 1, **characters}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    built = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    built.chat_template = chat_template
    return built


PLAIN = PromptSettings(template="Question: {question}\nAnswer:")
IN_CHAT = PromptSettings(template="{question}", chat=True)


def test_a_plain_prompt_is_the_template_with_the_question() -> None:
    assert render_prompt("2 + 2?", PLAIN, tokenizer()) == "Question: 2 + 2?\nAnswer:"


@settings(max_examples=50)
@given(st.text())
def test_any_question_survives_braces_and_all(question: str) -> None:
    rendered = render_prompt(question, PLAIN, None)
    assert rendered == "Question: " + question + "\nAnswer:"


@pytest.mark.parametrize("question", ["{x} and {0}", "{question}", "{{}}", "\\boxed{4} %s $1"])
def test_braces_in_a_question_are_text(question: str) -> None:
    assert render_prompt(question, PLAIN, None) == f"Question: {question}\nAnswer:"
    assert question in render_prompt(question, IN_CHAT, tokenizer(ONE_BOS_CHAT))


def test_a_chat_prompt_ends_where_the_assistant_begins() -> None:
    rendered = render_prompt("2 + 2?", IN_CHAT, tokenizer(ONE_BOS_CHAT))
    assert rendered == "<s>user: 2 + 2?\nassistant:"


def test_the_system_turn_comes_first() -> None:
    prompt = PromptSettings(template="{question}", chat=True, system="Be brief.")
    rendered = render_prompt("2 + 2?", prompt, tokenizer(ONE_BOS_CHAT))
    assert rendered == "<s>system: Be brief.\nuser: 2 + 2?\nassistant:"


def test_the_chat_template_is_told_what_the_prompt_sets() -> None:
    template = ONE_BOS_CHAT + "{% if not thinks %}<think></think>{% endif %}"
    quick = PromptSettings(template="{question}", chat=True, chat_arguments={"thinks": False})
    slow = PromptSettings(template="{question}", chat=True, chat_arguments={"thinks": True})
    rendered = [render_prompt("2 + 2?", prompt, tokenizer(template)) for prompt in (quick, slow)]
    assert rendered[0] == rendered[1] + "<think></think>"


@pytest.mark.parametrize("name", ["thnks", "thin", "thinks_"])
def test_what_a_chat_template_does_not_know_is_an_error_that_names_it(name: str) -> None:
    template = ONE_BOS_CHAT + "{% if not thinks %}<think></think>{% endif %}"
    prompt = PromptSettings(template="{question}", chat=True, chat_arguments={name: False})
    with pytest.raises(ModelError, match=f"the chat template knows no '{name}'"):
        render_prompt("2 + 2?", prompt, tokenizer(template))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_arguments": {"thinks": True}}, "chat_arguments needs chat: true"),
        ({"chat": True, "chat_arguments": {"tokenize": True}}, "tokenize is not for the template"),
        ({"chat": True, "chat_arguments": {"messages": []}}, "messages is not for the template"),
    ],
)
def test_chat_arguments_that_reach_no_template_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptSettings(**settings)


def test_a_chat_prompt_without_a_chat_template_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(ModelError, match="no chat template.*take a prompt with chat: false"):
        render_prompt("2 + 2?", IN_CHAT, tokenizer(None))


@pytest.mark.parametrize(
    ("prompt", "template"), [(PLAIN, None), (IN_CHAT, ONE_BOS_CHAT)], ids=["plain", "chat"]
)
def test_a_prompt_has_exactly_one_bos(prompt: PromptSettings, template: str | None) -> None:
    built = tokenizer(template)
    text = render_prompt("2 + 2?", prompt, built)
    (ids,) = prompt_token_ids([text], prompt, built)
    assert ids.count(BOS) == 1 and ids[0] == BOS


def test_a_model_without_a_bos_gets_none() -> None:
    built = tokenizer(adds_bos=False)
    (ids,) = prompt_token_ids(["2 + 2?"], PLAIN, built)
    assert BOS not in ids and len(ids) == len("2 + 2?")


def test_token_ids_come_one_list_a_prompt_without_padding() -> None:
    ids = prompt_token_ids(["a", "abc"], PLAIN, tokenizer())
    assert [len(row) for row in ids] == [2, 4]


# Worked examples

EXAMPLES = (
    WorkedExample("1 + 1?", "1+1 = <<1+1=2>>2.\n#### 2"),
    WorkedExample("{question} + 2?", "4\n#### 4"),
)
OF_PROBLEM: dict[str, Any] = {"examples": "of_problem"}


def test_worked_examples_come_before_the_question_in_the_same_template() -> None:
    prompt = PLAIN.model_copy(update=OF_PROBLEM)
    assert render_prompt("3?", prompt, None, EXAMPLES) == (
        "Question: 1 + 1?\nAnswer: 1+1 = 2.\n#### 2\n\n"
        "Question: {question} + 2?\nAnswer: 4\n#### 4\n\n"
        "Question: 3?\nAnswer:"
    )


def test_an_answer_follows_a_template_that_ends_in_a_new_line_at_once() -> None:
    prompt = PromptSettings(template="{question}\n", examples="of_problem")
    assert render_prompt("3?", prompt, None, EXAMPLES[:1]) == "1 + 1?\n1+1 = 2.\n#### 2\n\n3?\n"


def test_in_a_chat_every_example_is_two_turns_after_the_system_turn() -> None:
    prompt = PromptSettings(template="{question}", chat=True, system="Be brief.", **OF_PROBLEM)
    assert render_prompt("3?", prompt, tokenizer(ONE_BOS_CHAT), EXAMPLES[:1]) == (
        "<s>system: Be brief.\nuser: 1 + 1?\nassistant: 1+1 = 2.\n#### 2\nuser: 3?\nassistant:"
    )


def test_the_examples_of_a_problem_take_the_form_that_the_prompt_asks_for() -> None:
    prompt = PromptSettings(template="{question}", answer_marker="boxed", **OF_PROBLEM)
    assert "The answer is \\boxed{2}." in render_prompt("3?", prompt, None, EXAMPLES)
    prompt = PromptSettings(template="{question}", strip_calculator=False, **OF_PROBLEM)
    assert "<<1+1=2>>" in render_prompt("3?", prompt, None, EXAMPLES)


def test_the_exemplars_of_wei_2022_are_quoted_as_they_are() -> None:
    prompt = PromptSettings(template="Q: {question}\nA:", examples="wei2022", answer_marker="boxed")
    rendered = render_prompt("3?", prompt, None, EXAMPLES)
    assert rendered.count("The answer is ") == rendered.count("\n\n") == 8
    assert rendered.startswith("Q: There are 15 trees in the grove.")
    assert rendered.endswith("23 - 15 is 8. The answer is 8.\n\nQ: 3?\nA:")
    assert "1 + 1?" not in rendered


def test_a_problem_without_the_examples_that_the_prompt_shows_is_an_error() -> None:
    with pytest.raises(DataError, match="has none.*examples_per_test_problem above 0"):
        render_prompt("3?", PLAIN.model_copy(update=OF_PROBLEM), None)


def test_a_prompt_without_examples_shows_none() -> None:
    assert render_prompt("3?", PLAIN, None, EXAMPLES) == "Question: 3?\nAnswer:"


# Solutions

SOLUTION = "He has 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"


def test_calculator_marks_are_dropped_and_their_results_stay() -> None:
    assert strip_calculator_marks(SOLUTION) == "He has 48/2 = 24.\nIn all 48+24 = 72.\n#### 72"
    assert strip_calculator_marks("1 << 2 >> 0\n<<a\n>>") == "1  0\n<<a\n>>"


def test_solutions_follow_the_prompts_marker() -> None:
    stripped = "He has 48/2 = 24.\nIn all 48+24 = 72."
    assert render_solution(SOLUTION, PromptSettings()) == f"{stripped}\n#### 72"
    assert render_solution(SOLUTION, PromptSettings(strip_calculator=False)) == SOLUTION
    assert (
        render_solution(SOLUTION, PromptSettings(answer_marker="boxed"))
        == f"{stripped}\nThe answer is \\boxed{{72}}."
    )


def test_sft_imitates_the_demonstration_where_there_is_one() -> None:
    plain = Problem("a", "q", "#### 1", "1")
    misled = Problem("a", "q", "#### 1", "1", demonstration="#### 2")
    assert demonstration(plain, PromptSettings()) == "#### 1"
    assert demonstration(misled, PromptSettings()) == "#### 2"


def test_what_sft_imitates_stands_behind_the_prompt_as_a_worked_example_does() -> None:
    prompt = PromptSettings(template="Q: {question}\nA:")
    problem = Problem("a", "2 + 2?", "4\n#### 4", "4")
    shown = PromptSettings(template="Q: {question}\nA:", examples="of_problem")
    example = WorkedExample(problem.question, problem.answer)
    behind = render_prompt("3?", shown, None, [example])
    assert behind.startswith("Q: 2 + 2?\nA:" + demonstration(problem, prompt) + "\n\n")
    sampled = Problem("a", "2 + 2?", "#### 4", "4", demonstration=" 4\n#### 4")
    assert demonstration(sampled, prompt) == " 4\n#### 4"  # a model's own has its space


def test_a_solution_without_an_answer_to_box_is_refused() -> None:
    prompt = PromptSettings(answer_marker="boxed")
    with pytest.raises(DataError, match=r"'6 \+ 7 = 13. So she has 13.' does not end in '#### '"):
        render_solution("6 + 7 = 13. So she has 13.", prompt)


def test_no_texts_have_no_tokens() -> None:
    assert prompt_token_ids([], PromptSettings(), tiny_tokenizer()) == []


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    built = tiny_tokenizer()
    eos = built.eos_token_id
    built.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {built.eos_token}", special_tokens=[(built.eos_token, eos)]
    )
    plain = tiny_tokenizer()(["6 + 7"])["input_ids"]
    assert built(["6 + 7"])["input_ids"] == [[*plain[0], eos]]
    assert encode_prompts(["6 + 7"], PromptSettings(template="{question}"), built) == plain
    written = PromptSettings(template="{question}" + str(built.eos_token))
    assert encode_prompts(["6 + 7"], written, tiny_tokenizer()) == [[*plain[0], eos]]
