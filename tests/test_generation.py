"""Logged generations: what a row and the summary hold, and how an end is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gsm8k_core.errors import DataError, ModelError
from gsm8k_core.generation import log_generations
from gsm8k_core.rewards import gsm8k_reward
from gsm8k_core.scoring import compute_entropy

WORDS = ["<eos>", "<pad>", "what", "is", "two", "plus", "four", "five", "six"]
EOS, PAD, FOUR, FIVE = 0, 1, 6, 7


def word_tokenizer(pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad_token
    )


class ScriptedModel(torch.nn.Module):
    """Writes what it is told, with a uniform distribution over the first `spread[t]` tokens."""

    def __init__(self, script: list[list[int]], spread: list[int]) -> None:
        super().__init__()
        self.script, self.spread = torch.tensor(script), spread
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig(eos_token_id=[EOS])
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.asked: dict[str, Any] = {}

    def generate(self, **asked: Any) -> torch.Tensor:
        self.asked = {**asked, "training": self.training}
        for width in self.spread:
            step = torch.full((len(self.script), len(WORDS)), -math.inf)
            step[:, :width] = 0.0
            assert torch.equal(asked["logits_processor"](asked["input_ids"], step), step)
        return torch.cat([asked["input_ids"], self.script], dim=1)


def grade(response: str, ground_truth: str) -> dict[str, float]:
    right = float(response == ground_truth)
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


PROMPTS = ["what is two plus two", "two", "is two"]
SCRIPT = [[FOUR, EOS, PAD, PAD], [FIVE, FIVE, FIVE, EOS], [FOUR, FOUR, FOUR, FOUR]]
SPREAD = [1, 2, 4, 8]
CHANGES = {"initializer_range": 0.5, "eos_token_id": EOS, "pad_token_id": PAD}
REAL_MODEL = Qwen2Config(**{**SIZES, **CHANGES, "vocab_size": len(WORDS)})


def test_rows_hold_response_length_end_entropy_and_rewards() -> None:
    model = ScriptedModel(SCRIPT, SPREAD)
    rows, _ = log_generations(
        model, word_tokenizer(), PROMPTS, ["four", "four", "six"], grade, max_new_tokens=4
    )
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["ground_truth"] for row in rows] == ["four", "four", "six"]
    assert [row["response"] for row in rows] == ["four", "five five five", "four four four four"]
    assert [row["response_ids"] for row in rows] == [SCRIPT[0][:2], SCRIPT[1], SCRIPT[2]]
    assert [row["length"] for row in rows] == [2, 4, 4]  # EOS counts, padding does not
    assert [row["truncated"] for row in rows] == [False, False, True]
    assert [row["answer_reward"] for row in rows] == [1.0, 0.0, 0.0]
    # entropies of the steps: log 1, log 2, log 4, log 8 = 0, 1, 2, 3 times log 2
    expected = [0.5 * math.log(2), 1.5 * math.log(2), 1.5 * math.log(2)]
    assert [row["mean_entropy"] for row in rows] == pytest.approx(expected)


def test_prompts_may_come_from_generators() -> None:
    model = ScriptedModel(SCRIPT, SPREAD)
    truths = (truth for truth in "abc")
    rows, _ = log_generations(model, word_tokenizer(), iter(PROMPTS), truths, grade)
    assert [(row["prompt"], row["ground_truth"]) for row in rows] == [*zip(PROMPTS, "abc")]


def test_an_error_of_the_reward_function_names_the_completion() -> None:
    model = ScriptedModel(SCRIPT, SPREAD)
    with pytest.raises(DataError, match="completion 1: gold answer 'five' is not a number"):
        log_generations(model, word_tokenizer(), PROMPTS, ["4", "five", "4"], gsm8k_reward)


def test_the_summary_has_the_mean_of_whatever_the_reward_function_returns() -> None:
    def shaped(response: str, ground_truth: str) -> dict[str, float]:
        return {**grade(response, ground_truth), "length_reward": -float(len(response))}

    model, golds = ScriptedModel(SCRIPT, SPREAD), ["four", "four", "six"]
    rows, summary = log_generations(model, word_tokenizer(), PROMPTS, golds, shaped)
    mean = -sum(len(row["response"]) for row in rows) / 3
    assert summary["length_reward_mean"] == pytest.approx(mean)
    with pytest.raises(ValueError, match="reward_fn returns length, which a row has already"):
        log_generations(
            model, word_tokenizer(), PROMPTS, golds, lambda *_: {"reward": 0.0, "length": 1.0}
        )


def test_the_summary_holds_means_over_completions_by_correctness() -> None:
    _, summary = log_generations(
        ScriptedModel(SCRIPT, SPREAD), word_tokenizer(), PROMPTS, ["four", "four", "six"], grade
    )
    assert summary == {
        "num_completions": 3,
        "length_mean": pytest.approx(10 / 3),
        "truncated_mean": pytest.approx(1 / 3),
        "entropy_mean": pytest.approx(3.5 / 3 * math.log(2)),
        "reward_mean": pytest.approx(1 / 3),
        "format_reward_mean": 1.0,
        "answer_reward_mean": pytest.approx(1 / 3),
        "length_mean_correct": 2.0,
        "length_mean_incorrect": 4.0,
    }


def test_a_mean_over_no_completion_is_none() -> None:
    _, summary = log_generations(
        ScriptedModel(SCRIPT, SPREAD), word_tokenizer(), PROMPTS, ["six"] * 3, grade
    )
    assert summary["length_mean_correct"] is None


def test_the_end_is_known_from_the_first_eos_even_where_padding_is_eos() -> None:
    script = [[FOUR, EOS, EOS, EOS], [FIVE, FIVE, FIVE, EOS], [FOUR, FOUR, FOUR, FOUR]]
    rows, _ = log_generations(ScriptedModel(script, SPREAD), word_tokenizer("<eos>"), PROMPTS)
    assert [row["length"] for row in rows] == [2, 4, 4]
    assert [row["truncated"] for row in rows] == [False, False, True]


def test_prompts_are_padded_on_the_left_and_sampled_from_the_whole_distribution() -> None:
    model = ScriptedModel(SCRIPT, SPREAD).train()
    log_generations(model, word_tokenizer(), PROMPTS, max_new_tokens=4, temperature=0.7)
    assert model.asked["input_ids"].tolist() == [[2, 3, 4, 5, 4], [1, 1, 1, 1, 4], [1, 1, 1, 3, 4]]
    assert model.asked["attention_mask"].tolist() == [[1] * 5, [0] * 4 + [1], [0] * 3 + [1] * 2]
    assert model.asked["eos_token_id"] == [EOS]
    assert (model.asked["do_sample"], model.asked["temperature"]) == (True, 0.7)
    assert (model.asked["top_p"], model.asked["top_k"]) == (1.0, 0)
    assert model.asked["repetition_penalty"] == 1.0
    assert not model.asked["training"]  # dropout is off
    assert model.training  # and on again afterwards


def test_a_temperature_of_zero_is_greedy() -> None:
    model = ScriptedModel(SCRIPT, SPREAD)
    log_generations(model, word_tokenizer(), PROMPTS, temperature=0.0)
    assert model.asked["do_sample"] is False
    assert "temperature" not in model.asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["two"], "reward_fn": grade}, "reward_fn needs ground_truths"),
        ({"prompts": ["two"], "ground_truths": ["a", "b"]}, "1 prompts but 2 ground truths"),
        ({"prompts": "two"}, "lists of texts, found one text"),
        ({"prompts": ["two", "is"], "ground_truths": "ab"}, "lists of texts, found one text"),
        ({"prompts": ["two"], "temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": ["two"], "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_inputs_that_do_not_match_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_generations(ScriptedModel(SCRIPT, SPREAD), word_tokenizer(), **arguments)


def test_prompts_that_no_completion_of_the_model_can_follow_are_refused() -> None:
    model, tokenizer = ScriptedModel(SCRIPT, SPREAD), word_tokenizer()
    with pytest.raises(ModelError, match="a prompt of no tokens"):
        log_generations(model, tokenizer, ["two", ""])
    with pytest.raises(ModelError, match="2 tokens and 511 new ones need 513 .* has 512"):
        log_generations(model, tokenizer, PROMPTS[1:], max_new_tokens=511)
    assert model.asked == {}


def test_every_id_that_ends_a_completion_is_known_and_there_must_be_one() -> None:
    model, tokenizer = ScriptedModel(SCRIPT, SPREAD), word_tokenizer()
    model.generation_config.eos_token_id = FIVE
    rows, _ = log_generations(model, tokenizer, PROMPTS)
    assert [row["length"] for row in rows] == [2, 1, 4]
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="no EOS token"):
        log_generations(model, tokenizer, PROMPTS)


def test_a_real_model_writes_the_same_greedy_completion_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model, tokenizer = Qwen2ForCausalLM(REAL_MODEL), word_tokenizer()
    together, summary = log_generations(
        model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0.0
    )
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone, _ = log_generations(model, tokenizer, [prompt], max_new_tokens=6, temperature=0.0)
        assert row["response_ids"] == alone[0]["response_ids"]
        assert row["mean_entropy"] == pytest.approx(alone[0]["mean_entropy"], rel=1e-4)
        assert 0.0 < row["mean_entropy"] < math.log(len(WORDS))
        assert row["truncated"] == (EOS not in row["response_ids"])
    assert summary["num_completions"] == 3


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_entropies_are_those_of_the_distributions_that_generate_returns(
    temperature: float,
) -> None:
    torch.manual_seed(0)
    model, tokenizer = Qwen2ForCausalLM(REAL_MODEL).eval(), word_tokenizer()
    torch.manual_seed(1)
    (row,), _ = log_generations(model, tokenizer, ["two"], None, None, 12, temperature)
    torch.manual_seed(1)
    greedy: dict[str, Any] = {"do_sample": False}
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0}
    output = model.generate(
        torch.tensor([[4]]), attention_mask=torch.ones(1, 1), max_new_tokens=12,
        return_dict_in_generate=True, output_scores=True, **(sampled if temperature else greedy),
    )  # fmt: skip
    assert row["response_ids"] == output.sequences[0, 1:].tolist()
    entropies = torch.stack([compute_entropy(scores) for scores in output.scores])
    assert row["mean_entropy"] == entropies.mean().item()


def test_what_the_models_own_generation_config_holds_changes_no_completion() -> None:
    torch.manual_seed(0)
    model, tokenizer = Qwen2ForCausalLM(REAL_MODEL), word_tokenizer()
    for temperature in (0.0, 1.0):
        torch.manual_seed(1)
        plain, _ = log_generations(model, tokenizer, PROMPTS, None, None, 12, temperature)
        # as Qwen2.5's own, but for a stronger penalty
        model.generation_config.update(
            do_sample=True, temperature=0.7, top_p=0.8, top_k=2, repetition_penalty=3.0,
            min_p=0.9, num_beams=2, max_time=0.0, return_dict_in_generate=True,
        )  # fmt: skip
        torch.manual_seed(1)
        found, _ = log_generations(model, tokenizer, PROMPTS, None, None, 12, temperature)
        assert found == plain
        model.generation_config = GenerationConfig.from_model_config(model.config)
