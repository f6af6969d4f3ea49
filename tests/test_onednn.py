"""Linear layers by oneDNN compute what PyTorch's own do, and only where that was asked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gsm8k_core import onednn
from gsm8k_core.models import load_model


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: 0)


def layers(bias: bool) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """A plain one, and the same with oneDNN's products."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias)
    ours = onednn.OneDnnLinear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (33, 24), (3, 5, 24), (0, 24)])
def test_values_and_gradients_are_those_of_a_plain_layer(
    shape: tuple[int, ...], bias: bool
) -> None:
    outcomes = []
    for layer in layers(bias):
        rows = torch.linspace(-1.0, 2.0, 24 * 40).repeat(2)[: torch.Size(shape).numel()]
        rows = rows.reshape(shape).requires_grad_()
        values = layer(rows)
        (values * torch.linspace(0.0, 1.0, 40)).sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(rows), values)
        outcomes.append([values, rows.grad, *(part.grad for part in layer.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("faster")
def test_a_frozen_layer_passes_its_gradient_on_and_gets_none() -> None:
    plain, ours = layers(bias=True)
    for layer in (plain, ours):
        layer.requires_grad_(False)
    one, other = (torch.ones(3, 24, requires_grad=True) for _ in range(2))
    plain(one).sum().backward()
    ours(other).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert ours.weight.grad is None and ours.bias.grad is None


@pytest.mark.usefixtures("faster")
def test_other_types_are_computed_by_pytorch() -> None:
    _, ours = layers(bias=False)
    assert ours.double()(torch.ones(2, 24, dtype=torch.float64)).dtype == torch.float64
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.ones(2, 24)).dtype == torch.bfloat16
    assert onednn.applies_to(ours.weight, ours.weight)
    assert not onednn.applies_to(ours.weight, ours.weight.to("meta"))


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "expected"),
    [("AuthenticAMD", 26, "AVX512", 0), ("AuthenticAMD", 25, "AVX512", 2**17),
     ("AuthenticAMD", 26, "AVX2", math.inf), ("GenuineIntel", 6, "AVX512", math.inf)],
)  # fmt: skip
def test_it_is_taken_on_processors_of_amd_with_avx512_alone_and_on_zen_4_for_large_matrices(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: int, capability: str, expected: float
) -> None:
    described = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: described)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.smallest_matrix.__wrapped__() == expected


def test_only_layers_of_that_size_are_replaced_and_only_their_products_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: 1000)
    small, large = torch.nn.Linear(24, 40), torch.nn.Linear(25, 40)
    model = torch.nn.ModuleList([small, large])
    onednn.use_in(model)
    assert [type(layer) for layer in model] == [torch.nn.Linear, onednn.OneDnnLinear]
    assert not onednn.applies_to(torch.ones(99, 24), small.weight)
    assert onednn.applies_to(torch.ones(1, 25), large.weight)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_loaded_model_has_such_layers_where_they_are_faster(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: 0 if wanted else math.inf)
    model = load_model(tiny_folder, torch.device("cpu"))
    kinds = {type(part) for part in model.modules() if isinstance(part, torch.nn.Linear)}
    assert kinds == {onednn.OneDnnLinear if wanted else torch.nn.Linear}
    reached = model(torch.tensor([[5, 6, 7]])).logits
    monkeypatch.setattr(onednn, "smallest_matrix", lambda: math.inf if wanted else 0)
    torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits, reached, atol=1e-5, rtol=0)


def test_repeating_sizes_are_few_and_at_most_a_sixteenth_larger() -> None:
    padded = [onednn.repeating_size(size) for size in range(4096)]
    assert all(size <= more <= size * 17 / 16 for size, more in enumerate(padded))
    assert padded == sorted(padded) == [onednn.repeating_size(size) for size in padded]
    assert len({more for more in padded if 1024 <= more < 2048}) == 16
