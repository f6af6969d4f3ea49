"""The losses against those of TRL, computed by TRL's own code from the same logits.

TRL's `_compute_loss` runs on a trainer object that has the few attributes it reads and no model:
its log-probs come from given logits, so that loss and gradient can be compared in one place.
Where the two differ by definition, a test says which definition is ours and why.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import SIZES
from transformers import Qwen2Config, Qwen2ForCausalLM

from gsm8k_core.config import GrpoMethod
from gsm8k_core.dpo import dpo_loss
from gsm8k_core.grpo import PolicyBatch, policy_loss, summarize_metrics
from gsm8k_core.losses import importance_weights, mask_truncated, step_normalizer
from gsm8k_core.scoring import compute_entropy, score_responses

# Importing TRL takes most of the time. The tests do it, and not each process that collects them.
pytestmark = pytest.mark.slow

NUM_ROWS, NUM_COLUMNS, VOCABULARY, MAX_NEW_TOKENS = 6, 7, 11, 9
LENGTHS = [7, 3, 1, 7, 5, 2]


class Accelerator:
    """One process: gathering and reducing change nothing."""

    num_processes = 1

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        del reduction
        return tensor


class Case:
    """Logits of a policy and what it is compared with, all in float32."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.logits = draw(NUM_ROWS, NUM_COLUMNS, VOCABULARY).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (NUM_ROWS, NUM_COLUMNS), generator=generator)
        self.mask = torch.arange(NUM_COLUMNS)[None, :] < torch.tensor(LENGTHS)[:, None]
        self.advantages = draw(NUM_ROWS)
        log_probs = self.log_probs().detach()
        self.old = log_probs + 0.3 * draw(NUM_ROWS, NUM_COLUMNS)
        self.sampler = self.old + 0.3 * draw(NUM_ROWS, NUM_COLUMNS)
        self.ref = log_probs + 0.5 * draw(NUM_ROWS, NUM_COLUMNS)

    def log_probs(self) -> torch.Tensor:
        scores = self.logits.log_softmax(-1)
        return scores.gather(-1, self.labels[..., None])[..., 0]

    def entropies(self) -> torch.Tensor:
        return compute_entropy(self.logits)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, self.logits, retain_graph=True)
        return gradient


def trl_loss(
    case: Case,
    loss_type: str,
    *,
    rows: slice = slice(None),
    accumulation_steps: int = 1,
    mask: torch.Tensor | None = None,
    ratios: torch.Tensor | None = None,
    **changes: Any,
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """TRL's GRPO loss of some rows of the case, as one of several accumulated microbatches."""
    from trl import GRPOTrainer

    mask = case.mask if mask is None else mask
    trainer = object.__new__(GRPOTrainer)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (  # type: ignore[method-assign]
        case.log_probs()[rows],
        case.entropies()[rows],
        None,
    )
    settings = {
        "loss_type": loss_type,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "entropy_coef": 0.0,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": ratios is not None,
        "vllm_importance_sampling_correction": ratios is not None,
        "use_adaptive_entropy": False,
        "max_completion_length": MAX_NEW_TOKENS,
        "current_gradient_accumulation_steps": accumulation_steps,
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            **{
                name: getattr(Accelerator(), name) for name in ("num_processes", "gather", "reduce")
            },
            sync_gradients=True,
        ),
        "_metrics": {"train": defaultdict(list)},
        **changes,
    }
    settings["_entropy_bonus_enabled"] = settings["entropy_coef"] != 0.0
    settings["args"] = SimpleNamespace(
        use_bias_correction_kl=False,
        delta=settings.pop("delta", None),
        steps_per_generation=accumulation_steps,
    )
    for name, value in settings.items():
        setattr(trainer, name, value)
    inputs: dict[str, Any] = {
        "prompt_ids": case.labels[rows, :1],
        "prompt_mask": torch.ones_like(case.labels[rows, :1]),
        "completion_ids": case.labels[rows],
        "completion_mask": mask[rows].long(),
        "advantages": case.advantages[rows],
        "old_per_token_logps": case.old[rows],
        "ref_per_token_logps": case.ref[rows],
        "num_items_in_batch": mask.sum(),
    }
    if ratios is not None:
        inputs["importance_sampling_ratio"] = ratios[rows]
    return trainer._compute_loss(None, inputs), settings["_metrics"]["train"]


def our_loss(
    case: Case, mask: torch.Tensor | None = None, **changes: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Our loss of the whole case."""
    settings = GrpoMethod.model_validate(
        {"kind": "grpo", "max_new_tokens": MAX_NEW_TOKENS, **changes}
    )
    mask = case.mask if mask is None else mask
    batch = PolicyBatch(case.advantages, mask, case.old, case.sampler, case.ref)
    normalizer = step_normalizer(settings.aggregation, mask, MAX_NEW_TOKENS)
    loss, metrics = policy_loss(case.log_probs(), case.entropies(), batch, settings, normalizer)
    return loss, summarize_metrics(metrics)


def assert_equal(case: Case, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    gradient = case.gradient(theirs)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(case.gradient(ours), gradient, rtol=1e-5, atol=1e-7)


SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {"aggregation": "sequence_mean"}),
    ("dapo", {}, {"aggregation": "token_mean"}),
    ("bnpo", {}, {"aggregation": "token_mean"}),
    ("dr_grpo", {}, {"aggregation": "constant"}),
    ("grpo", {"epsilon_high": 0.28}, {"clip_high": 0.28}),
    (
        "grpo",
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    ),
    (
        "dapo",
        {"importance_sampling_level": "sequence"},
        {"ratio_level": "sequence", "aggregation": "token_mean"},
    ),
    ("grpo", {"beta": 0.04}, {"kl_coefficient": 0.04, "kl_estimator": "k3"}),
    ("dapo", {"beta": 0.5}, {"kl_coefficient": 0.5, "aggregation": "token_mean"}),
    ("dr_grpo", {"beta": 0.5}, {"kl_coefficient": 0.5, "aggregation": "constant"}),
    # TRL's bound is on the ratio itself, ours on its distance from 1; TRL has no lower bound.
    (
        "cispo",
        {"epsilon_high": 1.3},
        {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3, "aggregation": "token_mean"},
    ),
    # TRL's delta bounds the unclipped ratio, which is the dual clip for negative advantages.
    ("grpo", {"delta": 1.3}, {"dual_clip": 1.3}),
    ("dapo", {"entropy_coef": 0.1}, {"entropy_coefficient": 0.1, "aggregation": "token_mean"}),
]


@pytest.mark.parametrize(("loss_type", "theirs", "ours"), SAME)
def test_loss_and_gradient_equal_those_of_trl(
    loss_type: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    case = Case()
    assert_equal(case, our_loss(case, **ours)[0], trl_loss(case, loss_type, **theirs)[0])


def test_clip_fractions_entropy_and_kl_are_reported_as_trl_reports_them() -> None:
    case = Case()
    _, ours = our_loss(case, kl_coefficient=0.1, clip_high=0.28)
    _, theirs = trl_loss(case, "grpo", beta=0.1, epsilon_high=0.28)
    assert ours["clip_fraction_low"] == pytest.approx(theirs["clip_ratio/low_mean"][0]) != 0
    assert ours["clip_fraction_high"] == pytest.approx(theirs["clip_ratio/high_mean"][0]) != 0
    assert ours["entropy"] == pytest.approx(theirs["entropy"][0])
    assert ours["kl"] == pytest.approx(theirs["kl"][0])


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_correction_for_the_sampler_equals_that_of_trl(level: str, mode: str) -> None:
    case, bound = Case(), 1.2
    # As TRL makes its ratio from the trainer's old log-probs and the sampler's, clip_min unset.
    difference = (case.old - case.sampler) * case.mask
    ratios = (difference if level == "token" else difference.sum(-1, keepdim=True)).exp()
    ratios = (
        ratios.clamp(max=bound) if mode == "truncate" else ratios.masked_fill(ratios > bound, 0.0)
    )
    ours, _ = our_loss(
        case,
        importance_correction=level,
        importance_mode=mode,
        importance_bound=bound,
        kl_coefficient=0.1,
        aggregation="token_mean",
    )
    assert_equal(case, ours, trl_loss(case, "dapo", ratios=ratios, beta=0.1)[0])
    weights = importance_weights(
        case.old,
        case.sampler,
        case.mask,
        level,  # type: ignore[arg-type]
        mode,  # type: ignore[arg-type]
        bound,
    )
    torch.testing.assert_close(weights[case.mask], ratios.expand_as(weights)[case.mask])


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence_mean"), ("dr_grpo", "constant"), ("dapo", "token_mean")],
)
def test_accumulated_microbatches_of_trl_add_up_to_our_step(
    loss_type: str, aggregation: str
) -> None:
    case = Case()
    theirs = sum(
        trl_loss(case, loss_type, rows=slice(start, start + 2), accumulation_steps=3)[0]
        for start in (0, 2, 4)
    )
    assert isinstance(theirs, torch.Tensor)
    assert_equal(case, our_loss(case, aggregation=aggregation)[0], theirs)


def test_the_token_mean_is_over_the_step_and_not_over_each_microbatch_as_in_bnpo() -> None:
    # BNPO divides each microbatch by its own tokens: a token weighs more beside short completions,
    # and the gradient changes with the microbatch size. Ours is DAPO's, over the whole step.
    case = Case()
    ours = our_loss(case, aggregation="token_mean")[0]
    parts = [trl_loss(case, "bnpo", rows=slice(s, s + 2), accumulation_steps=3) for s in (0, 2, 4)]
    bnpo = torch.stack([loss for loss, _ in parts]).sum()
    assert (case.gradient(bnpo) - case.gradient(ours)).abs().max() > 1e-3
    tokens = case.mask.sum()
    reweighted = [
        loss * 3 * case.mask[start : start + 2].sum() / tokens
        for (loss, _), start in zip(parts, (0, 2, 4), strict=True)
    ]
    assert_equal(case, ours, torch.stack(reweighted).sum())


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence_mean"), ("dr_grpo", "constant"), ("dapo", "token_mean")],
)
def test_truncated_completions_also_leave_the_denominator(loss_type: str, aggregation: str) -> None:
    # TRL's mask_truncated_completions sets their mask to 0 but counts them among the completions
    # that the loss is a mean over, so that a step with many of them learns more slowly. Ours is
    # the mean over those that count. The token mean has no such count: there both are the same.
    case = Case()
    truncated = torch.tensor([length == NUM_COLUMNS for length in LENGTHS])
    mask = mask_truncated(case.mask, truncated)
    ours = our_loss(case, mask, aggregation=aggregation)[0]
    theirs = trl_loss(case, loss_type, mask=mask)[0]
    correction = 1.0 if loss_type == "dapo" else NUM_ROWS / (NUM_ROWS - 2)
    assert_equal(case, ours, theirs * correction)


def test_the_entropy_bonus_is_aggregated_like_the_rest_of_the_loss() -> None:
    # TRL takes the token mean of the entropy whatever the loss type; ours is a term per token, so
    # that the balance between it and the objective is the same at every token.
    case = Case()
    ours = our_loss(case, entropy_coefficient=0.1)[0]
    without = trl_loss(case, "grpo")[0]
    theirs = trl_loss(case, "grpo", entropy_coef=0.1)[0]
    assert (case.gradient(ours) - case.gradient(theirs)).abs().max() > 1e-4
    per_completion = (case.entropies() * case.mask).sum(-1) / case.mask.sum(-1)
    assert_equal(case, ours, without - 0.1 * per_completion.mean())


def test_a_kl_of_another_kind_is_ours_alone() -> None:
    # TRL has k3 only; k2 in the loss has the gradient of KL(π ‖ π_ref) as its mean, k3 has not.
    case = Case()
    k2 = our_loss(case, kl_coefficient=0.5, kl_estimator="k2")[0]
    assert (
        case.gradient(k2) - case.gradient(trl_loss(case, "grpo", beta=0.5)[0])
    ).abs().max() > 1e-3


def test_log_probs_and_entropies_of_a_model_equal_those_of_trls_fused_head() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    rows = torch.randint(31, (3, 8))
    mask = torch.arange(7)[None, :] >= torch.tensor([[2], [4], [6]])
    ours = score_responses(
        model, rows[:, :-1], rows[:, 1:], mask, temperature=0.7, with_entropy=True
    )
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    labels = torch.cat([rows[:, :1], rows[:, 1:].masked_fill(~mask, -100)], dim=1)
    theirs = model(input_ids=rows, labels=labels, fused_lm_head=True)
    found, expected = ours["log_probs"][mask], theirs.log_probs[:, -7:][mask]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected = theirs.entropy[:, -7:][mask]
    torch.testing.assert_close(ours["token_entropy"][mask], expected, rtol=1e-5, atol=1e-5)


def test_the_dpo_loss_equals_that_of_trl() -> None:
    from trl import DPOTrainer

    case = Case()  # rows 0 to 2 are chosen, rows 3 to 5 rejected
    ref = (case.ref * case.mask).sum(-1)
    trainer = object.__new__(DPOTrainer)
    settings = {
        "beta": 0.3,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda tensor: tensor,
            gather_for_metrics=lambda tensor: tensor,
        ),
        "_total_train_tokens": 0,
        "_metrics": {"eval": defaultdict(list)},
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    prompt = torch.zeros_like(case.mask[:, :1])
    inputs = {
        "input_ids": torch.cat([case.labels[:, :1], case.labels], dim=1),
        "attention_mask": torch.cat([~prompt, case.mask], dim=1).long(),
        "completion_mask": torch.cat([prompt, case.mask], dim=1).long(),
        "ref_chosen_logps": ref[:3],
        "ref_rejected_logps": ref[3:],
    }
    log_probs = case.log_probs() * case.mask  # TRL's head gives 0 where nothing is to be scored

    def model(**_: Any) -> SimpleNamespace:
        nothing = torch.zeros(case.mask.shape)
        return SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    theirs = trainer._compute_loss(model, inputs, return_outputs=False)
    policy = log_probs.sum(-1)
    losses, metrics = dpo_loss(policy[:3], policy[3:], ref[:3], ref[3:], beta=0.3)
    assert_equal(case, losses.mean(), theirs)
    reported = trainer._metrics["eval"]
    assert metrics["margin"].mean().item() == pytest.approx(reported["rewards/margins"][0])
    assert metrics["accuracy"].mean().item() == pytest.approx(reported["rewards/accuracies"][0])
