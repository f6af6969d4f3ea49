"""Training and sampling on CUDA: agreement with the CPU, bf16, graphs, sleep and wake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import shared_prompts
from gsm8k_core import scoring
from gsm8k_core.compiling import compile_error
from gsm8k_core.engines.base import Completion, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.engines.vllm_engine import vllm_build
from gsm8k_core.errors import ModelError
from gsm8k_core.files import read_json, read_jsonl
from gsm8k_core.models import autocast, load_model, load_tokenizer, plain_weights
from gsm8k_core.problems import read_problems
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import collate

GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def prompts(sft_folder: Path, arithmetic_folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(sft_folder)
    problems = read_problems(arithmetic_folder / "test.jsonl")[:16]
    return [list(tokenizer(f"{problem.question}\n")["input_ids"]) for problem in problems]


def run_python(*words: Any) -> None:
    """In a process of its own, which can import what this one can: on a bare machine, the pack."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def sampled(prompts: list[list[int]]) -> list[Request]:
    return [Request(ids, [2 * i, 2 * i + 1], 1.0, 32) for i, ids in enumerate(prompts)]


def scores_of(
    model: Any, requests: list[Request], groups: list[list[Completion]], dtype: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's log-probs of the sampled tokens, and the engine's; one entry a token."""
    pairs = [(r, c) for r, group in zip(requests, groups, strict=True) for c in group]
    batch = collate([r.prompt_ids for r, _ in pairs], [c.token_ids for _, c in pairs], 0)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad(), autocast(model.device, dtype):
        scores = score_responses(model, batch["input_ids"], batch["labels"], batch["response_mask"])
    said = torch.tensor([x for _, c in pairs for x in c.log_probs])
    return scores["log_probs"][batch["response_mask"]].cpu().float(), said


def test_scores_and_gradients_on_the_gpu_are_those_of_the_cpu(
    sft_folder: Path, prompts: list[list[int]], cuda: torch.device
) -> None:
    batch = collate(prompts, [ids[:12] for ids in prompts], 0)
    found = {}
    for device in (torch.device("cpu"), cuda):
        model = load_model(sft_folder, device)
        here = {name: tensor.to(device) for name, tensor in batch.items()}
        scores = score_responses(model, here["input_ids"], here["labels"], here["response_mask"])
        scores["log_probs"].sum().backward()
        gradient = model.model.embed_tokens.weight.grad
        found[device.type] = scores["log_probs"].detach().cpu(), gradient.cpu()
    torch.testing.assert_close(found["cpu"], found["cuda"], rtol=1e-3, atol=1e-3)


def test_bf16_scores_stay_near_those_of_float32(
    sft_folder: Path, prompts: list[list[int]], cuda: torch.device
) -> None:
    model = load_model(sft_folder, cuda)
    requests = sampled(prompts)
    groups = HfEngine(model, load_tokenizer(sft_folder)).generate(requests)
    exact, _ = scores_of(model, requests, groups)
    rounded, _ = scores_of(model, requests, groups, "bfloat16")
    assert (exact - rounded).abs().mean() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_that_are_shared_give_the_scores_and_gradients_of_a_row_each(
    sft_folder: Path, cuda: torch.device, dtype: str
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default, which scoring has to undo
    words = f"--model {sft_folder} --device {cuda} --dtype {dtype} --rounds 2"
    assert shared_prompts.main(f"{words} --prompts 8 --group-size 4".split()) == 0


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_samples_from_what_the_trainer_scores(
    start: Callable[..., Any],
    sft_folder: Path,
    prompts: list[list[int]],
    cuda: torch.device,
    dtype: str,
    eager: bool,
) -> None:
    engine, model = start(sft_folder, dtype, eager=eager), load_model(sft_folder, cuda)
    for parameter in model.parameters():
        parameter.data.mul_(1.03)  # weights that the engine learns of by the push alone
    engine.load_weights(plain_weights(model))
    requests = sampled(prompts)
    scores, said = scores_of(model, requests, engine.generate(requests), dtype)
    bound = 1e-3 if dtype == "float32" else 1e-1
    assert (scores - said).abs().mean() < bound


def test_sleep_gives_the_memory_back_and_wake_goes_on_with_pushed_weights(
    start: Callable[..., Any], sft_folder: Path, prompts: list[list[int]], cuda: torch.device
) -> None:
    engine = start(sft_folder, "float32", colocated=True, kv_cache_gib=4.0, eager=True)
    model = load_model(sft_folder, cuda)
    engine.load_weights(plain_weights(model))
    requests = sampled(prompts)
    before = engine.generate(requests)
    awake, _ = torch.cuda.mem_get_info()
    for level in (1, 2, 1, 2):
        engine.sleep_level = level
        engine.sleep()
        asleep, _ = torch.cuda.mem_get_info()
        assert asleep - awake > 3 * GIB
        engine.load_weights(plain_weights(model))
        engine.wake()
        scores, said = scores_of(model, requests, engine.generate(requests))
        assert (scores - said).abs().mean() < 1e-3
    again = engine.generate(requests)
    assert [[c.token_ids for c in g] for g in again] == [[c.token_ids for c in g] for g in before]
    engine.sleep()  # is closed so, as a trainer's is


def test_an_engine_whose_cache_has_a_size_starts_beside_others_that_hold_the_gpu(
    start: Callable[..., Any], sft_folder: Path, prompts: list[list[int]], cuda: torch.device
) -> None:
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - 12 * GIB), dtype=torch.uint8, device=cuda)
    engine = start(sft_folder, eager=True, kv_cache_gib=1.0)
    assert len(engine.generate(sampled(prompts))) == len(prompts)
    del held


def test_a_push_that_does_not_arrive_stops_the_run(
    start: Callable[..., Any],
    sft_folder: Path,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, model = start(sft_folder, eager=True), load_model(sft_folder, cuda)
    engine.load_weights(plain_weights(model))
    model.model.layers[-1].mlp.down_proj.weight.data.mul_(1.01)

    def lost(_: str, kwargs: dict[str, Any]) -> None:
        list(kwargs["weights_iterator"])

    arriving = engine.llm.collective_rpc
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "collective_rpc", lost)
        with pytest.raises(ModelError, match=r"still holds old weights after a push .*down_proj"):
            engine.load_weights(plain_weights(model))
    assert engine.llm.collective_rpc == arriving
    engine.load_weights(plain_weights(model))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_grpo_trains_on_the_gpu(
    run_json: Callable[..., str],
    sft_folder: Path,
    arithmetic_folder: Path,
    tmp_path: Path,
    engine: str,
) -> None:
    if engine == "vllm" and vllm_build() is None:
        pytest.skip("vLLM is not installed (extra vllm)")
    settings = json.loads(
        run_json("grpo", num_steps=4, prompts_per_step=16, group_size=4, max_new_tokens=24)
    )
    settings["model_settings"]["gpus"] = 1
    run_python(
        ROOT / "scripts" / "train_grpo.py", "--settings", json.dumps(settings),
        "--starting-model", sft_folder, "--data", arithmetic_folder / "train.jsonl",
        "--output-dir", tmp_path / "run", "--engine", engine,
        "--vllm-rollout-gpu-memory-fraction", 0.1, "--vllm-kv-cache-gib", 1,
    )  # fmt: skip
    rows = read_jsonl(tmp_path / "run" / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sampler_gap_mean"] < 1e-3 for row in rows)
    assert read_json(tmp_path / "run" / "train" / "summary.json")["device"] != "cpu"


def test_scores_by_block_are_those_of_whole_logits_in_less_memory(cuda: torch.device) -> None:
    settings = Qwen2Config(
        vocab_size=100_000, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(settings)
    model.to(cuda).eval()
    input_ids, labels = torch.randint(100_000, (2, 8, 512), device=cuda)
    mask = torch.arange(512, device=cuda).expand(8, -1) >= 128

    def whole() -> torch.Tensor:
        logits = model(input_ids=input_ids).logits
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * mask

    def in_blocks() -> torch.Tensor:
        return score_responses(model, input_ids, labels, mask)["log_probs"]

    peaks, found = [], []
    for score in (whole, in_blocks):
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        log_probs = score()
        log_probs.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append((log_probs.detach(), model.model.embed_tokens.weight.grad.clone()))
        del log_probs
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert peaks[1] < peaks[0] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_scores_and_their_gradients_are_those_of_whole_logits(
    cuda: torch.device, dtype: torch.dtype, temperature: float
) -> None:
    if compile_error("cuda") is None:
        fused = scoring._fused(scoring._block_gradient, "cuda")
        assert fused is not scoring._block_gradient
    torch.manual_seed(0)
    hidden = torch.randn(600, 64, device=cuda, dtype=dtype)
    weight = torch.randn(300_007, 64, device=cuda, dtype=dtype) / 4  # several blocks
    labels = torch.randint(300_007, (600,), device=cuda)
    found = []
    for whole in (False, True):
        rows, matrix = (part.clone().requires_grad_() for part in (hidden, weight))
        if whole:
            logits = rows @ matrix.T
            scores = scoring._score_logits(logits, labels, temperature, True, True)
        else:
            scores = scoring._LinearScores.apply(rows, matrix, labels, temperature, True, True)
        loss = scores[:, 0].sum() + 0.3 * scores[:, 1].sum()
        gradients = torch.autograd.grad(loss, (rows, matrix))
        found.append([scores.detach().float(), *(gradient.float() for gradient in gradients)])
    assert len(scoring._blocks(300_007, 600, scoring._logits_per_block("cuda"))) > 2
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() < bound * expected.norm()


def test_sft_on_two_gpus_has_the_losses_of_one(
    run_json: Callable[..., str], tiny_folder: Path, arithmetic_folder: Path, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rows = []
    for ranks in (1, 2):
        settings = json.loads(run_json("sft", num_steps=5, batch_size=16, learning_rate=1e-3))
        settings["model_settings"]["gpus"] = ranks
        run_python(
            "-m", "torch.distributed.run", "--standalone", "--max-restarts", 0,
            "--nproc-per-node", ranks, ROOT / "scripts" / "train_sft.py",
            "--settings", json.dumps(settings), "--starting-model", tiny_folder,
            "--data", arithmetic_folder / "train.jsonl", "--output-dir", tmp_path / f"{ranks}",
        )  # fmt: skip
        rows.append(read_jsonl(tmp_path / f"{ranks}" / "train" / "metrics.jsonl"))
    assert len(rows[0]) == 5
    for one, two in zip(*rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
