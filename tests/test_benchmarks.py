"""Every comparison of benchmarks/ runs, at the smallest size; what it prints is not judged."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gsm8k_core.arithmetic import make_arithmetic
from gsm8k_core.config import ArithmeticDataset
from gsm8k_core.files import read_jsonl, write_jsonl

SCORING = "--hidden 16 --vocabulary 300 --rows 2 --tokens 9 --rounds 1"


@pytest.mark.slow
def test_scoring_is_compared_with_whole_logits(capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("benchmarks.scoring").main(SCORING.split()) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[-3:] == ["| ours", "| whole logits", "| TRL's head"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_training_step_is_compared_with_one_of_compiled_layers(
    sft_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model {sft_folder} --rows 2 --shortest 20 --rounds 2".split()
    assert importlib.import_module("benchmarks.training_step").main(words) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == ["| plain", "| compiled layers"]


@pytest.mark.slow
def test_an_update_with_shared_prompts_has_the_gradient_of_one_with_a_row_each(
    sft_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--prompts 3 --group-size 4 --completion-tokens 3 20 --tokens-per-microbatch 200"
    model = f"--model {sft_folder} --rounds 1"
    assert (
        importlib.import_module("benchmarks.shared_prompts").main(f"{model} {words}".split()) == 0
    )
    written = capsys.readouterr().out
    found = re.search(r"log-probs differ by (\S+), gradients by (\S+)", written)
    assert found is not None and max(map(float, found.groups())) < 1e-4, written


@pytest.mark.slow
def test_sft_and_trl_train_on_the_same_examples_with_the_same_losses(
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    problems = read_jsonl(arithmetic_folder / "train.jsonl")[:8]
    problems[3]["question"] *= 36  # longer than the model has positions, as some of GSM8K are
    write_jsonl(tmp_path / "train.jsonl", problems)
    words = f"--model {sft_folder} --model-name tiny-qwen2 --data {tmp_path}/train.jsonl"
    sizes = "--batch-size 2 --steps 4 --rounds 1"
    assert importlib.import_module("benchmarks.sft").main(f"{words} {sizes}".split()) == 0
    assert "losses of the same step differ by at most" in capsys.readouterr().out


@pytest.mark.slow
def test_grpo_and_trl_do_the_same_work_with_the_same_loss(
    sft_folder: Path, arithmetic_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model {sft_folder} --model-name tiny-qwen2 --data {arithmetic_folder}/train.jsonl"
    sizes = "--prompts 2 --group-size 2 --max-new-tokens 4 --rounds 1 --updates 2"
    assert importlib.import_module("benchmarks.grpo").main(f"{words} {sizes}".split()) == 0
    written = capsys.readouterr().out
    found = re.search(r"loss (\S+) \(TRL\) and (\S+) \(ours\), gradients differ by (\S+)", written)
    assert found is not None, written
    theirs, ours, error = map(float, found.groups())
    assert ours == pytest.approx(theirs, abs=1e-5) and error < 1e-4
    assert re.search(r"^(0|50|100)% of our groups had rewards that differ", written, re.MULTILINE)


@pytest.mark.slow
def test_evaluation_and_lm_eval_write_the_same_completions(
    sft_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = make_arithmetic(ArithmeticDataset(kind="arithmetic", num_train=40, num_test=15))
    for split in ("train", "test"):
        rows = [{"question": one.question, "answer": one.answer} for one in embedded[split]]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    words = f"--model {sft_folder} --gsm8k {tmp_path} --limit 4 --rounds 1 --max-new-tokens 4"
    assert importlib.import_module("benchmarks.evaluation").main(words.split()) == 0
    written = capsys.readouterr().out
    assert "; 0 completions differ" in written and written.count("/4 |") == 4


@pytest.mark.slow
def test_the_engines_write_the_same_completions(
    sft_folder: Path, arithmetic_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model {sft_folder} --model-name tiny-qwen2 --data {arithmetic_folder}/test.jsonl"
    sizes = "--num-problems 4 --rounds 2 --max-new-tokens 4"
    assert importlib.import_module("benchmarks.engines").main(f"{words} {sizes}".split()) == 0
    written = capsys.readouterr().out
    # vLLM takes part in its own environment alone.
    assert {"transformers", "generate"} <= set(re.findall(r"\| (\w+) \| .* \| 4/4 \|", written))


def test_memory_that_hardly_grows_is_neither_a_trend_nor_has_an_exponent(tmp_path: Path) -> None:
    growth = importlib.import_module("benchmarks.growth")
    seconds = np.array([1.0, 2.0, 4.0])
    found = {"grading": seconds / 2, "scoring": 40 * seconds}
    rows = {name: ([10, 20, 40], seconds, mib) for name, mib in found.items()}
    panels = growth.plot(rows, tmp_path / "g.svg").to_dict(validate=False)["concat"]
    titles = [
        "grading: exponent 1.00", "scoring: exponent 1.00",
        "grading: less than 5 MiB", "scoring: exponent 1.00",
    ]  # fmt: skip
    assert [panel["title"] for panel in panels] == titles
    svg = (tmp_path / "g.svg").read_text(encoding="utf-8")
    assert all(f">{title}</text>" in svg for title in titles)
    marks = [[layer["mark"]["type"] for layer in panel["layer"]] for panel in panels]
    assert marks == [["line", "point"], ["line", "point"], ["point"], ["line", "point"]]
    scales = [panel["layer"][0]["encoding"]["y"]["scale"] for panel in panels]
    assert [scale.get("type") for scale in scales] == ["log", "log", None, "log"]
    assert scales[2]["domain"] == [0, 20]
