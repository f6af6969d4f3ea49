"""Few-shot prompts, their stops and limits are lm-evaluation-harness's, by its own code.

Its tasks `gsm8k` and `gsm8k_cot` are built from the YAML files it ships, with GSM8K read from a
folder where they would ask the hub, and its requests are compared with our prompts byte by byte.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gsm8k_core.answers import is_correct
from gsm8k_core.arithmetic import make_arithmetic
from gsm8k_core.config import ArithmeticDataset, Config, Gsm8kDataset
from gsm8k_core.data import make_gsm8k, split_gsm8k, with_lm_eval_examples
from gsm8k_core.files import Json, read_jsonl
from gsm8k_core.problems import Problem
from gsm8k_core.prompts import render_prompt, wei2022_examples

REAL = os.environ.get("GSM8K_DIR")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

needs_gsm8k = pytest.mark.skipif(
    not REAL, reason="set GSM8K_DIR to a folder with GSM8K to compare prompts with lm-eval's"
)


def harness_yaml(name: str) -> Json:
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def real_rows() -> dict[str, list[Json]]:
    assert REAL is not None
    return {split: read_jsonl(Path(REAL) / f"{split}.jsonl") for split in ("train", "test")}


def harness_prompts(
    name: str, rows: dict[str, list[Json]], chat: bool = False
) -> Iterator[tuple[str, Json]]:
    """(prompt, generation settings) of every request that the harness's own code builds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        def local(**_ignored: Any) -> Any:
            return {split: datasets.Dataset.from_list(of) for split, of in rows.items()}

        task = ConfigurableTask(config={**harness_yaml(name), "custom_dataset": local})
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # as evaluator.simple_evaluate does
        template = chat_tokenizer().apply_chat_template

        def apply(messages: Any, add_generation_prompt: bool = True) -> str:
            return template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

        task.build_all_requests(
            rank=0,
            world_size=1,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,  # its default with a chat template
            chat_template=apply if chat else None,
        )
    for instance in task.instances:
        prompt, generation = instance.args
        yield prompt, generation


def chat_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    built = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a"
    )
    built.chat_template = CHAT
    return built


SUITES = pytest.mark.parametrize(
    ("suite", "task"), [("gsm8k_lm_eval", "gsm8k"), ("gsm8k_8shot_cot", "gsm8k-cot")]
)


def check_prompts(
    config: Config,
    suite: str,
    problems: list[Problem],
    theirs: list[tuple[str, Json]],
    chat: bool,
) -> None:
    settings = config.suites[suite]
    assert settings.prompt is not None
    prompt = config.prompts[settings.prompt].model_copy(update={"chat": chat})
    tokenizer = chat_tokenizer()
    for problem, (their_text, generation) in zip(problems, theirs, strict=True):
        our_text = render_prompt(problem.question, prompt, tokenizer, problem.examples)
        assert our_text.encode("utf-8") == their_text.encode("utf-8"), problem.id
        assert settings.stop == generation["until"]
        assert settings.greedy and generation["do_sample"] is False


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@SUITES
def test_prompts_are_the_harnesss_byte_for_byte(
    suite: str, task: str, chat: bool, config: Config
) -> None:
    embedded = make_arithmetic(ArithmeticDataset(kind="arithmetic", num_train=40, num_test=15))
    rows = {
        split: [{"question": one.question, "answer": one.answer} for one in embedded[split]]
        for split in ("train", "test")
    }
    # What JSON, Jinja or a shell might trip over.
    rows["test"][3]["question"] = "{{ 2 }} {question} \u2028 [1, 2] é\n"
    rows["train"][5]["answer"] = "[1 + 1 = <<1+1=2>>2]\n#### 2"
    problems = split_gsm8k(rows, num_val=1)["test"]
    problems = with_lm_eval_examples(problems, rows["train"], num_examples=5, seed=1234)
    check_prompts(config, suite, problems, list(harness_prompts(task, rows, chat)), chat)


@pytest.fixture(scope="module")
def problems(config: Config) -> list[Problem]:
    settings = config.datasets["gsm8k_lm_eval"]
    assert isinstance(settings, Gsm8kDataset)
    return make_gsm8k(settings.model_copy(update={"path": REAL}))[0]["test"]


@needs_gsm8k
@pytest.mark.slow
def test_all_1319_prompts_of_the_real_gsm8k_are_the_harnesss(
    config: Config, problems: list[Problem], real_rows: dict[str, list[Json]]
) -> None:
    theirs = list(harness_prompts("gsm8k", real_rows))
    assert len(theirs) == 1319
    check_prompts(config, "gsm8k_lm_eval", problems, theirs, chat=False)


def test_the_limit_is_the_harnesss_default(config: Config) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, task in (("gsm8k_lm_eval", "gsm8k"), ("gsm8k_8shot_cot", "gsm8k-cot")):
        generation = normalize_gen_kwargs(harness_yaml(task)["generation_kwargs"])
        assert config.suites[name].max_new_tokens == generation["max_gen_toks"] == 256


def test_the_eight_exemplars_are_the_harnesss_copy_of_the_papers() -> None:
    theirs = harness_yaml("gsm8k-cot")["fewshot_config"]["samples"]
    ours = [{"question": one.question, "target": one.answer} for one in wei2022_examples()]
    assert ours == theirs


def test_solutions_in_the_form_of_the_examples_are_graded_right_by_the_suite(
    config: Config,
) -> None:
    settings = config.suites["gsm8k_8shot_cot"]
    assert settings.marker is not None and settings.grading == "strict"
    golds = ["6", "5", "39", "8", "9", "29", "33", "8"]
    for example, gold in zip(wei2022_examples(), golds, strict=True):
        assert is_correct(example.answer, gold, "strict", settings.marker)
        assert not is_correct(example.answer, "1", "strict", settings.marker)


@needs_gsm8k
def test_no_worked_example_is_a_test_problem(
    problems: list[Problem], real_rows: dict[str, list[Json]]
) -> None:
    asked = {" ".join(problem.question.lower().split()) for problem in problems}
    shown = {one.question for problem in problems for one in problem.examples}
    shown |= {one.question for one in wei2022_examples()}
    assert not asked & {" ".join(question.lower().split()) for question in shown}
    of_train = {row["question"] for row in real_rows["train"]}
    assert all(one.question in of_train for problem in problems for one in problem.examples)
    assert {len(set(problem.examples)) for problem in problems} == {5}
