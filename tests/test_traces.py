"""From answers to demonstrations: verified, filtered, distinct, in the think format."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsm8k_core.answers import is_correct
from gsm8k_core.config import (
    Config,
    PromptSettings,
    RunSettings,
    TraceDatasetSettings,
    dump,
    load_config,
    merge,
    parse_config,
    read_yaml,
)
from gsm8k_core.errors import ConfigError, DataError
from gsm8k_core.files import read_json, read_jsonl, sha256_file, write_jsonl
from gsm8k_core.layout import Layout
from gsm8k_core.problems import Problem, read_problems, write_problems
from gsm8k_core.prompts import demonstration
from gsm8k_core.selection import graded_completions
from gsm8k_core.traces import select_traces, split_reasoning, without_marker

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = [
    Problem("a", "What is 1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2", "2"),
    Problem("b", "What is 2 + 2?", "#### 4", "4"),
]
Row = dict[str, Any]


def row(problem_id: str, index: int = 0, **changes: Any) -> Row:
    question = {problem.id: problem.question for problem in PROBLEMS}.get(problem_id, "?")
    return {
        "problem_id": problem_id, "sample_index": index, "question": question,
        "reasoning": "Count both.", "content": "So it is \\boxed{2}.", "finish_reason": "stop",
    } | changes  # fmt: skip


@pytest.fixture
def select(tmp_path: Path) -> Callable[..., tuple[list[Problem], dict[str, int]]]:
    """`select(rows, marker="boxed", **selection)`: what is kept of them, and the counts."""

    def run(
        rows: list[Row], marker: str = "boxed", **selection: Any
    ) -> tuple[list[Problem], dict[str, int]]:
        write_jsonl(tmp_path / "answers.jsonl", rows)
        settings = TraceDatasetSettings.model_validate(
            {"name": "t", "marker": marker, "selection": selection}
        )
        return select_traces(tmp_path / "answers.jsonl", PROBLEMS, settings)

    return run


Select = Callable[..., tuple[list[Problem], dict[str, int]]]


def test_a_kept_trace_is_a_problem_whose_demonstration_thinks_first(select: Select) -> None:
    traces, counts = select([row("a")])
    assert traces == [
        Problem(
            "a-trace0", "What is 1 + 1?", PROBLEMS[0].answer, "2",
            "<think>\nCount both.\n</think>\n\nSo it is 2.\n#### 2",
        )
    ]  # fmt: skip
    assert counts == {"answers": 1, "kept": 1, "questions": 2, "questions_kept": 1}


@pytest.mark.parametrize("marker", ["####", "boxed"])
def test_a_student_sees_the_marker_that_its_prompt_asks_for(select: Select, marker: Any) -> None:
    ((trace,), _) = select([row("a")])
    text = demonstration(trace, PromptSettings(answer_marker=marker))
    assert text.startswith("<think>\nCount both.\n</think>\n\nSo it is 2.\n")
    assert text.endswith({"####": "\n#### 2", "boxed": "\nThe answer is \\boxed{2}."}[marker])
    assert is_correct(text, "2", "strict", marker)


def test_the_think_format_is_a_setting_and_text_in_braces_is_only_text(select: Select) -> None:
    thought = "A {answer} and {reasoning}."
    ((trace,), _) = select([row("a", reasoning=thought)], think_format="[{reasoning}]\n{answer}")
    assert trace.demonstration == "[A {answer} and {reasoning}.]\nSo it is 2.\n#### 2"


@pytest.mark.parametrize(
    ("changes", "selection", "fate"),
    [
        ({"content": "\\boxed{3}"}, {}, "incorrect"),
        ({"content": "It is 2."}, {}, "incorrect"),
        ({"reasoning": " \n"}, {}, "without_reasoning"),
        ({"reasoning": "a </think> b"}, {}, "stray_think_tag"),
        ({"content": "\\boxed{2} <think>"}, {}, "stray_think_tag"),
        ({}, {"max_characters": 20}, "too_long"),
        ({}, {"min_characters": 2000}, "too_short"),
        (
            {"reasoning": "#### 1 first\nThen."},
            {"think_format": "[{reasoning}]\n{answer}"},
            "second_marker",
        ),
    ],
)
def test_what_is_left_out_is_counted_by_its_reason(
    select: Select, changes: Row, selection: Row, fate: str
) -> None:
    traces, counts = select([row("a", **changes)], **selection)
    assert traces == [] and counts[fate] == 1 and counts["questions_kept"] == 0


def test_a_thought_in_think_tags_may_hold_a_marker_which_nobody_takes_for_the_answer(
    select: Select,
) -> None:
    traces, counts = select([row("a", reasoning="#### 1 first\nThen.")])
    assert counts["kept"] == 1 and "#### 1 first" in (traces[0].demonstration or "")


def test_answers_that_the_settings_no_longer_ask_for_are_left_out(tmp_path: Path) -> None:
    # Collected for more questions, and more often, before the settings were lowered.
    rows = [row("a", 0), row("a", 1, reasoning="Think."), row("b", 0, content="\\boxed{4}")]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    every = TraceDatasetSettings.model_validate(
        {"name": "t", "marker": "boxed", "selection": {"max_kept_per_question": 2}}
    )
    few = every.model_copy(update={"num_questions": 1, "traces_per_question": 1})
    for settings, ids in ((every, ["a-trace0", "a-trace1", "b-trace0"]), (few, ["a-trace0"])):
        traces, counts = select_traces(tmp_path / "answers.jsonl", PROBLEMS, settings)
        assert [trace.id for trace in traces] == ids
        assert counts.get("not_asked_for", 0) == 3 - len(ids)
        assert counts["questions"] == counts["questions_kept"] == (1 if settings is few else 2)


def test_lowering_what_a_collection_asks_for_is_another_dataset(config: Config) -> None:
    raw = config.model_dump(mode="json", by_alias=True)
    name = next(iter(raw["traces"]))
    before = config.trace_dataset_settings(name)
    for key in ("num_questions", "traces_per_question"):
        changed = parse_config({**raw, "traces": {name: {**raw["traces"][name], key: 3}}})
        assert changed.trace_dataset_settings(name) != before


def test_headings_in_the_reasoning_are_no_second_marker(select: Select) -> None:
    _, counts = select([row("a", reasoning="#### Step 1\nI guess \\boxed{7}; no, it is two.")])
    assert counts["kept"] == 1


def test_an_answer_without_reasoning_may_be_kept_and_has_no_think_part(select: Select) -> None:
    ((trace,), _) = select([row("a", reasoning="")], require_reasoning=False)
    assert trace.demonstration == "So it is 2.\n#### 2"


def test_flexible_grading_reads_the_last_number(select: Select) -> None:
    ((trace,), _) = select([row("a", content="It is 2.")], grading="flexible")
    assert trace.demonstration is not None and trace.demonstration.endswith("It is 2.\n#### 2")


def test_the_same_text_counts_once_whatever_its_spaces_and_capitals(select: Select) -> None:
    rows = [
        row("a", 0), row("a", 1, reasoning="count  BOTH.\n"), row("a", 2, reasoning="Think."),
        row("a", 3, reasoning="One more."), row("b", 0, content="\\boxed{4}"),
    ]  # fmt: skip
    traces, counts = select(rows, max_kept_per_question=2)
    assert [trace.id for trace in traces] == ["a-trace0", "a-trace2", "b-trace0"]
    assert counts["duplicate"] == counts["one_too_many"] == 1
    assert (counts["kept"], counts["questions_kept"]) == (3, 2)


def test_the_same_words_may_answer_two_questions(tmp_path: Path) -> None:
    again = Problem("c", "What is 3 - 1?", "#### 2", "2")
    rows = [row("a"), row("c", question=again.question)]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    settings = TraceDatasetSettings(name="t", marker="boxed")
    traces, _ = select_traces(tmp_path / "answers.jsonl", [*PROBLEMS, again], settings)
    assert [trace.id for trace in traces] == ["a-trace0", "c-trace0"]


def test_the_order_in_which_a_server_finished_does_not_matter(select: Select) -> None:
    rows = [row("b", content="\\boxed{4}"), row("a", 1, reasoning="Other."), row("a", 0)]
    traces, _ = select(rows)
    assert [trace.id for trace in traces] == ["a-trace0", "b-trace0"]
    assert select(rows[::-1])[0] == traces


def test_an_answer_to_another_question_is_named_by_its_row(select: Select) -> None:
    for stranger in (row("c"), row("a", question="What is 1 + 2?")):
        with pytest.raises(DataError, match=r"answers\.jsonl, row 2: the question of [ac] is not"):
            select([row("a"), stranger])


@pytest.mark.parametrize("key", ["problem_id", "sample_index", "question", "reasoning", "content"])
def test_an_answer_that_lacks_something_is_named_by_its_row_and_key(
    select: Select, key: str
) -> None:
    without = row("b")
    del without[key]
    with pytest.raises(DataError, match=rf"answers\.jsonl, row 2: '{key}' is missing"):
        select([row("a"), without])
    with pytest.raises(DataError, match=rf"answers\.jsonl, row 2: '{key}': expected .* null"):
        select([row("a"), row("b") | {key: None}])


@pytest.mark.parametrize("key", ["problem_id", "completion", "gold", "finish_reason"])
def test_a_completion_that_lacks_something_is_named_by_its_row_and_key(
    tmp_path: Path, key: str
) -> None:
    path = tmp_path / "completions.jsonl"
    whole = {"problem_id": "a", "completion": "#### 2", "gold": "2", "finish_reason": "stop"}
    without = {name: value for name, value in whole.items() if name != key}
    for bad, fault in ((without, "is missing"), (whole | {key: None}, ".*null")):
        write_jsonl(path, [whole, bad])
        with pytest.raises(DataError, match=rf"completions\.jsonl, row 2: '{key}'.* {fault}"):
            graded_completions(path, {"a": "?"}, "strict", "####")


@pytest.mark.parametrize(
    ("reasoning", "content", "expected"),
    [
        (" r \n", "\nc ", ("r", "c")),
        ("", "<think>\nr\n</think>\n\nc", ("r", "c")),
        ("", "r\n</think>\nc", ("r", "c")),  # the opening tag stood in the chat template
        ("r", "c </think> d", ("r", "c </think> d")),
        ("", "c", ("", "c")),
    ],
)
def test_reasoning_is_found_where_a_server_leaves_it(
    reasoning: str, content: str, expected: tuple[str, str]
) -> None:
    assert split_reasoning(reasoning, content) == expected


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        ("It is \\(\\boxed{18}\\).", "It is \\(18\\)."),
        ("\\boxed{\\frac{1}{2}} and \\boxed {\\text{18 \\} dollars}}",
         "\\frac{1}{2} and \\text{18 \\} dollars}"),
        ("cut \\boxed{18", "cut 18"),
        ("9 + 9 = 18\n#### 18", "9 + 9 = 18"),
        ("#### 18", ""),
        ("#### Steps\nIt is 18", "#### Steps\nIt is 18"),
    ],
)  # fmt: skip
def test_the_servers_own_marker_is_taken_out(content: str, rest: str) -> None:
    assert without_marker(content) == rest


# the script, the config, the workflow's paths


def test_the_script_writes_a_dataset_that_sft_learns_from(
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    tiny_folder: Path,
    run_json: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_problems(tmp_path / "problems.jsonl", PROBLEMS)
    rows = [row("a"), row("b", content="\\boxed{4}"), row("b", 1, content="\\boxed{5}")]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    arguments = [
        "--settings", dump(TraceDatasetSettings(name="t", marker="boxed")),
        "--answers", str(tmp_path / "answers.jsonl"), "--data", str(tmp_path / "problems.jsonl"),
        "--output-dir", str(tmp_path / "t"),
    ]  # fmt: skip
    assert script("select_traces").main(arguments) == 0
    train = tmp_path / "t" / "train.jsonl"
    assert [problem.id for problem in read_problems(train)] == ["a-trace0", "b-trace0"]
    manifest = read_json(tmp_path / "t" / "manifest.json")
    assert manifest["counts"] == {
        "answers": 3, "kept": 2, "incorrect": 1, "questions": 2, "questions_kept": 2,
    }  # fmt: skip
    assert manifest["train"] == {"num_problems": 2, "sha256": sha256_file(train)}

    module = script("train_sft")
    seen: list[str] = []
    load_examples = module.load_examples

    def remember(path: Path, run: RunSettings, tokenizer: Any, *of_model: int) -> Any:
        examples = load_examples(path, run, tokenizer, *of_model)
        seen.extend(tokenizer.decode(response) for _, response in examples)
        return examples

    monkeypatch.setattr(module, "load_examples", remember)
    module.main(
        [
            "--settings", run_json("sft", num_steps=2, batch_size=2, dataset="t"),
            "--starting-model", str(tiny_folder), "--data", str(train),
            "--output-dir", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert len(read_jsonl(tmp_path / "run" / "train" / "metrics.jsonl")) == 2
    assert len(seen) == 2
    assert all("<think>" in text and "Count both." in text and "####" in text for text in seen)


def test_nothing_left_to_learn_from_is_an_error_with_the_counts(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    write_problems(tmp_path / "problems.jsonl", PROBLEMS)
    write_jsonl(tmp_path / "answers.jsonl", [row("a", content="\\boxed{9}")])
    arguments = [
        "--config", str(ROOT / "config.yaml"), "--traces", "r1_traces",
        "--answers", str(tmp_path / "answers.jsonl"), "--data", str(tmp_path / "problems.jsonl"),
        "--output-dir", str(tmp_path / "t"),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no trace is left to learn from \(answers 1, incorrect 1"):
        script("select_traces").main(arguments)
    assert not (tmp_path / "t").exists()


def test_an_sft_method_learns_from_its_own_dataset_and_others_from_the_studys() -> None:
    layout = Layout(load_config(ROOT / "config.yaml", [ROOT / "studies" / "r1_traces.yaml"]))
    assert layout.train_data("sft_r1") == "artifacts/r1_traces/train.jsonl"
    assert layout.train_data("sft") == "artifacts/gsm8k/train.jsonl"
    assert layout.config.method_chain("sft_r1_grpo") == ["base", "sft_r1", "sft_r1_grpo"]


def test_selection_does_not_collect_again_and_collection_has_all_it_needs(config: Config) -> None:
    collection = json.loads(dump(config.collection_settings("r1_traces")))
    assert "selection" not in json.dumps(collection)
    assert collection["prompt"]["answer_marker"] == "boxed"
    assert collection["budget"]["money"] == config.traces["r1_traces"].budget.money == 5.0
    assert config.trace_dataset_settings("r1_traces").marker == "boxed"


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ({"methods": {"sft": {"dataset": "r1_trace"}}},
         "methods.sft.dataset: no dataset 'r1_trace'; did you mean 'r1_traces'?"),
        ({"traces": {"r1_traces": {"dataset": "gsm9k"}}},
         "traces.r1_traces.dataset: no dataset 'gsm9k'; did you mean 'gsm8k'?"),
        ({"traces": {"r1_traces": {"prompt": "chat_box"}}},
         "traces.r1_traces.prompt: no prompt 'chat_box'; did you mean 'chat_boxed'?"),
        ({"traces": {"r1_traces": {"api": {"max_token": 5}}}},
         "traces.r1_traces.api.max_token: unknown key; did you mean 'max_tokens'?"),
        ({"traces": {"r1_traces": {"budget": {"completion_price": 0}}}},
         "traces.r1_traces.budget: money needs completion_price"),
        ({"traces": {"r1_traces": {"selection": {"think_format": "{answer}"}}}},
         "traces.r1_traces.selection: think_format must contain {reasoning} exactly once"),
        ({"traces": {"r1_traces": {"selection": {"think_format": "{answer}{reasoning}"}}}},
         "traces.r1_traces.selection: think_format must end with {answer}"),
        ({"traces": {"gsm8k": {"dataset": "gsm8k", "prompt": "plain",
                               "api": {"base_url": "http://localhost", "model": "m"}}}},
         "traces.gsm8k: the name is taken by a dataset"),
        ({"traces": {"runs": {"dataset": "gsm8k", "prompt": "plain",
                              "api": {"base_url": "http://localhost", "model": "m"}}}},
         "traces.runs: the name is taken by a folder of artifacts/"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key(overlay: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(merge(read_yaml(ROOT / "config.yaml"), overlay))
    assert line in str(error.value)


def test_a_key_among_the_settings_is_refused_and_not_quoted() -> None:
    key = "sk-planted0123456789"
    for api in ({"api_key": key}, {"parameters": {"api_key": key}},
                {"base_url": f"https://u:{key}@example.org"}):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            parse_config(
                merge(read_yaml(ROOT / "config.yaml"), {"traces": {"r1_traces": {"api": api}}})
            )
        assert key not in str(error.value)


def test_long_answers_are_read_one_at_a_time(tmp_path: Path) -> None:
    rows = (
        row("ab"[number % 2], number, content="\\boxed{-1}", reasoning="x" * 100_000)
        for number in range(300)
    )
    write_jsonl(tmp_path / "answers.jsonl", rows)
    settings = TraceDatasetSettings(name="t", marker="boxed")
    tracemalloc.start()
    _, counts = select_traces(tmp_path / "answers.jsonl", PROBLEMS, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["incorrect"] == 300
    assert peak < 4e6 < (tmp_path / "answers.jsonl").stat().st_size / 7
