"""Checkpoints: going on after a load is the same, bit for bit, as never having stopped."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gsm8k_core import checkpoints
from gsm8k_core.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from gsm8k_core.errors import TrainingError
from gsm8k_core.files import read_json, write_json


class Model(torch.nn.Module):
    """Dropout draws from torch's generator; the head is tied; the offset is frozen."""

    def __init__(self, width: int = 4, extra_layer: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, width)
        self.hidden = torch.nn.Linear(width, width)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        self.offset = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.extra = torch.nn.Linear(width, width) if extra_layer else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(self.embed(ids))))) + self.offset


def new() -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Model()
    return model, torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)


def train(model: Model, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """Steps that draw from torch (dropout) and from Python (the data)."""
    losses = []
    for _ in range(num_steps):
        ids = torch.tensor([random.randrange(8) for _ in range(16)])
        loss = torch.nn.functional.cross_entropy(model(ids), ids.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_going_on_after_a_load_equals_not_stopping_bit_for_bit(tmp_path: Path) -> None:
    random.seed(0)
    model, optimizer = new()
    train(model, optimizer, 5)
    save_checkpoint(tmp_path, 5, model, optimizer, {"cursor": 80})
    losses = train(model, optimizer, 5)

    random.seed(99)
    again, optimizer_again = new()
    train(again, optimizer_again, 2)  # whatever happened in between is overwritten
    torch.manual_seed(99)
    progress, extra = load_checkpoint(tmp_path / "step-00000005", again, optimizer_again)
    assert (progress, extra) == ({"cursor": 80, "step": 5}, {})
    assert train(again, optimizer_again, 5) == losses
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_load_into_a_fresh_optimizer_restores_its_moments_and_counts(tmp_path: Path) -> None:
    model, optimizer = new()
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {})
    again, optimizer_again = new()
    assert optimizer_again.state_dict()["state"] == {}
    load_checkpoint(tmp_path / "step-00000003", again, optimizer_again)
    saved, restored = optimizer.state_dict()["state"], optimizer_again.state_dict()["state"]
    assert saved.keys() == restored.keys() != set()
    for index, values in saved.items():
        assert values.keys() == restored[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            assert torch.equal(value, restored[index][name])
            assert value.dtype == restored[index][name].dtype


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_loaded_checkpoint_is_not_held_open_by_what_was_loaded(tmp_path: Path) -> None:
    model, optimizer = new()
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {}, extra={"reference": torch.ones(1000)})
    again, optimizer_again = new()
    _, extra = load_checkpoint(tmp_path / "step-00000003", again, optimizer_again)
    assert torch.equal(extra["reference"], torch.ones(1000))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_python_s_generator_with_a_pending_gauss_comes_back(tmp_path: Path) -> None:
    model, optimizer = new()
    random.seed(1)
    random.gauss(0, 1)  # leaves its twin pending
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    expected = [random.gauss(0, 1), random.random()]
    random.seed(2)
    load_checkpoint(tmp_path / "step-00000001", model, optimizer)
    assert [random.gauss(0, 1), random.random()] == expected


def test_what_the_loop_gives_comes_back(tmp_path: Path) -> None:
    model, optimizer = new()
    extra = {"old": torch.arange(6.0).reshape(2, 3).T, "ids": torch.tensor([1, 2])}
    save_checkpoint(tmp_path, 7, model, optimizer, {"best": None, "n": [1]}, extra=extra)
    progress, back = load_checkpoint(tmp_path / "step-00000007", model, optimizer)
    assert progress == {"best": None, "n": [1], "step": 7}
    assert back.keys() == extra.keys()
    assert all(torch.equal(back[name], extra[name]) for name in extra)
    assert back["ids"].dtype == torch.int64


def test_what_the_loop_wants_back_is_not_put_on_the_model_s_device(tmp_path: Path) -> None:
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, extra={"reference": torch.ones(3)})
    elsewhere = Model().to("meta")
    elsewhere.head.weight = elsewhere.embed.weight  # moved, they are two
    optimizer = torch.optim.AdamW(trained_parameters(elsewhere).values())
    _, extra = load_checkpoint(tmp_path / "step-00000001", elsewhere, optimizer)
    assert torch.equal(extra["reference"], torch.ones(3))


def test_saving_copies_no_moments_on_the_device() -> None:
    model, optimizer = new()
    train(model, optimizer, 1)
    moments = checkpoints._optimizer_tensors(optimizer)
    own = optimizer.state[model.embed.weight]
    assert moments["0.exp_avg"].data_ptr() == own["exp_avg"].data_ptr()


def test_a_run_on_the_cpu_does_not_start_cuda_where_there_are_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: int) -> torch.Tensor:
        raise RuntimeError("CUDA is started")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", start)
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    load_checkpoint(list_checkpoints(tmp_path)[0], model, optimizer)


def test_what_was_loaded_can_be_trained_and_saved_again_to_the_same_bytes(tmp_path: Path) -> None:
    random.seed(0)
    model, optimizer = new()
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "one", 2, model, optimizer, {})
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "one", 4, model, optimizer, {})
    again, optimizer_again = new()
    load_checkpoint(tmp_path / "one" / "step-00000002", again, optimizer_again)
    save_checkpoint(tmp_path / "two", 2, again, optimizer_again, {})
    train(again, optimizer_again, 2)
    save_checkpoint(tmp_path / "two", 4, again, optimizer_again, {})
    for step in ("step-00000002", "step-00000004"):
        for name in ("weights", "optimizer", "generators"):
            one, two = (
                tmp_path / folder / step / f"{name}.safetensors" for folder in ("one", "two")
            )
            assert one.read_bytes() == two.read_bytes(), (step, name)


def test_only_trained_parameters_are_stored_tied_ones_once() -> None:
    assert list(trained_parameters(Model())) == ["embed.weight", "hidden.weight", "hidden.bias"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    model, optimizer = new()
    for step in (1, 2, 9, 10, 100):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=keep)
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert kept == [1, 2, 9, 10, 100][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


def test_a_checkpoint_is_known_by_its_number_and_at_least_one_is_kept(tmp_path: Path) -> None:
    model, optimizer = new()
    (tmp_path / "step-notes").mkdir()
    save_checkpoint(tmp_path, 7, model, optimizer, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007"]
    with pytest.raises(ValueError, match="keep is 0: take 1 or more"):
        save_checkpoint(tmp_path, 8, model, optimizer, {}, keep=0)


def test_an_optimizer_that_keeps_other_things_than_tensors_is_refused(tmp_path: Path) -> None:
    model, _ = new()
    optimizer = torch.optim.LBFGS(model.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.tensor([1, 2])).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with pytest.raises(TrainingError, match="the optimizer keeps func_evals as int"):
        save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)


def test_there_are_no_checkpoints_where_there_is_no_folder(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []


def killed(*_args: object, **_kwargs: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["save_file", "write_json"])
def test_an_interrupted_save_leaves_no_checkpoint_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    monkeypatch.setattr(checkpoints, at, killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_save_left_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.abc" / "step-00000003").mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []


def test_a_disk_that_refuses_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # safetensors reports a full disk as its own error, which is no OSError.
    def full(*_args: object) -> None:
        raise checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")

    model, optimizer = new()
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(TrainingError, match=r"weights\.safetensors: cannot be .*No space left"):
        save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [lambda: Model(extra_layer=True), lambda: Model(width=6)],
    ids=["other names", "other shapes"],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, other: Callable[[], Model]
) -> None:
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    stranger = other()
    optimizer = torch.optim.AdamW(trained_parameters(stranger).values())
    with pytest.raises(TrainingError, match="step-00000001: holds other parameters .* delete"):
        load_checkpoint(tmp_path / "step-00000001", stranger, optimizer)


def test_a_checkpoint_that_lacks_the_file_of_a_rank_is_named(tmp_path: Path) -> None:
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    progress = tmp_path / "step-00000001" / "progress.json"
    write_json(progress, {**read_json(progress), "num_ranks": 2})
    with pytest.raises(TrainingError, match=r"weights\.rank1\.safetensors: damaged .* delete"):
        load_checkpoint(tmp_path / "step-00000001", model, optimizer)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model, optimizer = new()
    train(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    path = tmp_path / "step-00000001" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors: damaged .* delete"):
        load_checkpoint(tmp_path / "step-00000001", model, optimizer)
