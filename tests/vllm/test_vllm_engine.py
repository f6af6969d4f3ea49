"""The real vLLM engine (for CPUs) against the transformers engine and the trainer's scores."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from gsm8k_core.engines import vllm_engine
from gsm8k_core.engines.base import Completion, Request
from gsm8k_core.engines.hf_engine import HfEngine
from gsm8k_core.errors import ModelError
from gsm8k_core.models import load_model, load_tokenizer, plain_weights
from gsm8k_core.problems import read_problems
from gsm8k_core.scoring import score_responses
from gsm8k_core.tokenization import collate

PARAGRAPH = 160  # tokens: more than one block of the CPU's prefix cache


@pytest.fixture(scope="module")
def prompts(sft_folder: Path, arithmetic_folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(sft_folder)
    problems = read_problems(arithmetic_folder / "test.jsonl")
    return [list(tokenizer(f"{problem.question}\n")["input_ids"]) for problem in problems]


@pytest.fixture(scope="module")
def engine(start: Callable[..., Any], sft_folder: Path) -> Any:
    return start(sft_folder)


@pytest.fixture
def twin(engine: Any, sft_folder: Path) -> HfEngine:
    """The transformers engine, with the same weights in both."""
    model = load_model(sft_folder, torch.device("cpu"))
    engine.load_weights(plain_weights(model))
    return HfEngine(model, load_tokenizer(sft_folder))


def greedy(prompts: list[list[int]], max_new_tokens: int = 48, stop: Any = ()) -> list[Request]:
    return [Request(ids, [0], 0.0, max_new_tokens, list(stop)) for ids in prompts]


def sampled(prompts: list[list[int]], temperature: float = 1.0) -> list[Request]:
    return [Request(ids, [7 * i, 7 * i + 1], temperature, 32) for i, ids in enumerate(prompts)]


def gap_to_trainer(
    model: torch.nn.Module, requests: list[Request], groups: list[list[Completion]]
) -> torch.Tensor:
    """|sampled log-prob - the trainer's score of the same token|, one entry a token."""
    pairs = [(r, c) for r, group in zip(requests, groups, strict=True) for c in group]
    batch = collate([r.prompt_ids for r, _ in pairs], [c.token_ids for _, c in pairs], 0)
    with torch.no_grad():
        scores = score_responses(
            model,
            batch["input_ids"],
            batch["labels"],
            batch["response_mask"],
            temperature=requests[0].temperature or 1.0,
        )["log_probs"]
    said = torch.tensor([x for _, c in pairs for x in c.log_probs])
    return (scores[batch["response_mask"]] - said).abs()


def test_greedy_completions_are_those_of_transformers(
    engine: Any, twin: HfEngine, prompts: list[list[int]]
) -> None:
    ours, theirs = engine.generate(greedy(prompts)), twin.generate(greedy(prompts))
    assert {c.finish_reason for (c,) in ours} >= {"stop"}
    parted = [(a, b) for (a,), (b,) in zip(ours, theirs, strict=True) if a.token_ids != b.token_ids]
    # Two engines may part where two tokens are as good as equal; nowhere else.
    for a, b in parted:
        place = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y)
        assert abs(a.log_probs[place] - b.log_probs[place]) < 1e-4
    assert len(parted) <= 1
    for (a,), (b,) in zip(ours, theirs, strict=True):
        if a.token_ids == b.token_ids:
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


@pytest.mark.parametrize("stop", [["####"], [" ="], ["\n", "#"]])
def test_stop_texts_end_and_cut_a_completion_as_in_transformers(
    engine: Any, twin: HfEngine, prompts: list[list[int]], stop: list[str]
) -> None:
    ours = engine.generate(greedy(prompts[:8], stop=stop))
    theirs = twin.generate(greedy(prompts[:8], stop=stop))
    assert any(c.finish_reason == "stop" for (c,) in ours)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert not any(text in a.text for text in stop)
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)


def test_a_limit_cuts_and_says_length(engine: Any, prompts: list[list[int]]) -> None:
    for (completion,) in engine.generate(greedy(prompts[:4], max_new_tokens=3)):
        assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_of_the_distribution_that_was_sampled_from(
    engine: Any, twin: HfEngine, prompts: list[list[int]], temperature: float
) -> None:
    requests = sampled(prompts[:16], temperature)
    gap = gap_to_trainer(twin.model, requests, engine.generate(requests))
    assert gap.max() < 1e-4 and gap.mean() < 1e-5


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 3), (0.9, 8)])
def test_what_is_cut_to_the_likeliest_tokens_is_so_in_both_engines(
    engine: Any, twin: HfEngine, prompts: list[list[int]], top_p: float, top_k: int
) -> None:
    requests = [
        replace(request, seeds=list(range(200)), max_new_tokens=1, top_p=top_p, top_k=top_k)
        for request in sampled(prompts[:4])
    ]
    for found, other in zip(engine.generate(requests), twin.generate(requests), strict=True):
        ours, theirs = (
            {completion.token_ids[0]: completion.log_probs[0] for completion in group}
            for group in (found, other)
        )
        common = ours.keys() & theirs.keys()
        assert common  # each sees some of the same few tokens, with the same probability
        for token in common:
            assert ours[token] == pytest.approx(theirs[token], abs=1e-4)


def test_a_completion_depends_on_its_seed_and_not_on_the_batch(
    engine: Any, prompts: list[list[int]]
) -> None:
    requests = sampled(prompts[:8])
    together = engine.generate(requests)
    assert [[c.token_ids for c in group] for group in engine.generate(requests)] == [
        [c.token_ids for c in group] for group in together
    ]
    (alone,) = engine.generate(requests[3:4])
    assert [c.token_ids for c in alone] == [c.token_ids for c in together[3]]
    first, second = together[0]
    assert first.token_ids != second.token_ids


def test_on_a_cpu_prompts_reach_the_engine_a_few_at_a_time_and_nothing_else_changes(
    engine: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sampled(prompts[:8])
    at_once = engine.generate(requests)
    steps: list[list[int]] = [[]]  # tokens of the prompts that were added before each
    core = engine.llm.llm_engine
    add, step = core.add_request, core.step

    def add_request(name: str, prompt: Any, params: Any) -> None:
        steps[-1].append(len(prompt["prompt_token_ids"]) if name.endswith("-0") else 0)
        add(name, prompt, params)

    def next_step() -> Any:
        steps.append([])
        return step()

    monkeypatch.setattr(core, "add_request", add_request)
    monkeypatch.setattr(core, "step", next_step)
    monkeypatch.setattr(vllm_engine, "CPU_PREFILL_TOKENS", 20)
    monkeypatch.setattr(engine, "most_at_once", 7)
    assert [[c.token_ids for c in group] for group in engine.generate(requests)] == [
        [c.token_ids for c in group] for group in at_once
    ]
    assert sum(map(len, steps)) == sum(len(request.seeds) for request in requests)
    longest = max(len(request.prompt_ids) for request in requests)
    assert all(sum(added) < 20 + longest and len(added) <= 7 for added in steps)
    assert len(steps[0]) < len(requests)


def test_finished_requests_are_told_of_one_by_one(engine: Any, prompts: list[list[int]]) -> None:
    heard: dict[int, list[Completion]] = {}
    requests = sampled(prompts[:6])
    completions = engine.generate(requests, on_done=heard.__setitem__)
    assert [heard[i] for i in range(6)] == completions


def train_a_little(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        scores = score_responses(model, batch["input_ids"], batch["labels"], batch["response_mask"])
        (-scores["log_probs"].sum() / batch["response_mask"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def moved(twin: HfEngine, prompts: list[list[int]]) -> torch.nn.Module:
    """The model after five optimizer steps, which the engine has not heard of."""
    train_a_little(twin.model, collate(prompts[:8], [ids[:20] for ids in prompts[:8]], 0))
    return twin.model


def test_after_a_push_log_probs_are_those_of_the_trainer(
    engine: Any, moved: torch.nn.Module, prompts: list[list[int]]
) -> None:
    requests = sampled(prompts[:16])
    stale = gap_to_trainer(moved, requests, engine.generate(requests))
    assert stale.mean() > 1e-2  # without the push this test would fail
    engine.load_weights(plain_weights(moved))
    gap = gap_to_trainer(moved, requests, engine.generate(requests))
    assert gap.max() < 1e-4 and gap.mean() < 1e-5


def test_a_tied_head_that_keeps_its_old_copy_would_be_seen(
    engine: Any, moved: torch.nn.Module, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sampled(prompts[:16])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "tied", False)  # leaves the head as it was
        engine.load_weights(plain_weights(moved))
    assert gap_to_trainer(moved, requests, engine.generate(requests)).max() > 1e-2


def test_a_push_empties_the_prefix_cache(
    engine: Any, moved: torch.nn.Module, prompts: list[list[int]]
) -> None:
    long = [(prompts[0] * 10)[:PARAGRAPH]]
    requests = sampled(long)
    engine.generate(requests)
    engine.load_weights(plain_weights(moved))
    assert gap_to_trainer(moved, requests, engine.generate(requests)).max() < 1e-4


def test_smollm2_agrees_after_five_steps_with_pushes(
    start: Callable[..., Any], smollm2_folder: Path
) -> None:
    engine = start(smollm2_folder, max_model_length=512)
    model = load_model(smollm2_folder, torch.device("cpu"))
    tokenizer = load_tokenizer(smollm2_folder)
    texts = ["Natalia sold 48 clips in April and half as many in May.", "A robe takes 2 bolts of"]
    prompts = [list(ids) for ids in tokenizer(texts)["input_ids"]]
    requests = [Request(ids, [1, 2], 1.0, 16) for ids in prompts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = collate(prompts, [ids[:8] for ids in prompts], 0)
    for _ in range(5):
        scores = score_responses(model, batch["input_ids"], batch["labels"], batch["response_mask"])
        (-scores["log_probs"].sum() / batch["response_mask"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        stale = gap_to_trainer(model, requests, engine.generate(requests))
        engine.load_weights(plain_weights(model))
        gap = gap_to_trainer(model, requests, engine.generate(requests))
        assert stale.mean() > 1e-3
        assert gap.max() < 1e-4
    assert gap.mean() < 1e-5


def test_starting_leaves_generators_threads_and_environment_alone(
    start: Callable[..., Any], tiny_folder: Path
) -> None:
    def state() -> list[Any]:
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.get_rng_state().tolist(),
            torch.set_num_threads,
            os.environ.get("LD_PRELOAD"),
            os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
            torch._dynamo.config.recompile_limit,
            torch._dynamo.config.disable,
        ]

    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    before = state()
    engine = start(tiny_folder)
    engine.generate(greedy([[5, 6, 7]], max_new_tokens=2))
    assert state() == before


def test_closing_frees_its_ports_and_leaves_no_process(tiny_folder: Path) -> None:
    from gsm8k_core.config import VllmSettings
    from gsm8k_core.engines.vllm_engine import VllmEngine

    this = psutil.Process()

    def ports() -> set[Any]:
        return {c.laddr for c in this.net_connections() if c.status == psutil.CONN_LISTEN}

    before = ports()
    settings = VllmSettings(kv_cache_gib=0.25)
    engine = VllmEngine(tiny_folder, settings, "float32", torch.device("cpu"), 0.5)
    engine.generate(greedy([[5, 6, 7]], max_new_tokens=2))
    engine.close()
    assert ports() <= before
    assert this.children(recursive=True) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_length": 4096}, "vllm.max_model_length is 4096, which is more positions"),
        ({"kv_cache_gib": 1e-5}, "not enough room for one sequence's key-value cache"),
    ],
)
def test_what_does_not_start_says_what_to_change(
    start: Callable[..., Any], tiny_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        start(tiny_folder, **settings)


def test_pickled_weights_are_loaded_neither_alone_nor_in_the_place_of_safe_ones(
    engine: Any, start: Callable[..., Any], sft_folder: Path, tmp_path: Path
) -> None:
    # By itself it looks for *.bin too, and first of all for another form of the same weights.
    assert engine.llm.llm_engine.vllm_config.load_config.load_format == "safetensors"
    folder = Path(shutil.copytree(sft_folder, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled: holds no \.safetensors; pickled weights are"):
        start(folder)


def test_a_request_longer_than_the_model_is_refused(engine: Any) -> None:
    with pytest.raises(ModelError, match="512"):
        engine.generate([Request([5] * 500, [0], 0.0, 100)])


@pytest.mark.parametrize("temperature", [0.005, 2.1])
def test_a_temperature_that_vllm_does_not_sample_at_is_refused(
    engine: Any, temperature: float
) -> None:
    with pytest.raises(ModelError, match="temperature is"):
        engine.generate([Request([5], [0], temperature, 1)])


def test_a_token_that_the_model_does_not_know_is_told_as_by_the_other_engine(
    engine: Any, twin: HfEngine
) -> None:
    unknown = [Request([5, 100_000], [0], 1.0, 1)]
    for one in (engine, twin):
        with pytest.raises(ValueError, match="prompt_ids holds 100000, but the model has"):
            one.generate(unknown)
    (last,) = engine.generate([Request([engine.num_embeddings - 1], [0], 1.0, 1)])[0]
    assert len(last.token_ids) == 1
