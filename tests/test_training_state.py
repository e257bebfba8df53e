import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mimic_fast.checkpoint import load_state, save_state
from mimic_fast.errors import UnsafeInputError
from mimic_fast.training_state import (
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=1e-2),
    "adam-amsgrad": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "adamw-not-foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "sgd-nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    # channels_last, so that a moment restored in another layout would show
    model = model.to(dtype).to(memory_format=torch.channels_last)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return model, OPTIMIZERS[kind](groups)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)  # a schedule, so that lr must come back too
        images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def assert_equal_bits(model: nn.Module, other: nn.Module) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_goes_on_bit_for_bit_from_disk(kind, dtype, tmp_path):
    straight, optimizer = build(kind, dtype)
    train(straight, optimizer, range(6))

    first, before = build(kind, dtype)
    train(first, before, range(3))
    tensors, rest = optimizer_tensors(before)
    path = save_state(
        tmp_path,
        3,
        tensors={"model": first.state_dict(), "optimizer": tensors},
        meta={"optimizer": rest},
        keep=1,
    )
    state = load_state(path)
    second, after = build(kind, dtype)
    second.load_state_dict(state.tensors["model"])
    restore_optimizer(after, state.tensors["optimizer"], state.meta["optimizer"])

    for old, new in zip(before.param_groups, after.param_groups, strict=True):
        assert {**old, "params": 0} == {**new, "params": 0}
        for a, b in zip(old["params"], new["params"], strict=True):
            assert before.state[a].keys() == after.state[b].keys()
            for name, value in before.state[a].items():
                found = after.state[b][name]
                assert torch.equal(found, value)
                assert (found.dtype, found.stride()) == (value.dtype, value.stride())
    train(second, after, range(3, 6))
    assert_equal_bits(second, straight)


def test_moments_wider_than_their_parameters_keep_their_type():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param])
    moment = torch.full((3,), 1 / 3)
    optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": moment, "exp_avg_sq": moment}
    tensors, rest = optimizer_tensors(optimizer)

    other = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    restored = torch.optim.AdamW([other])
    restore_optimizer(restored, tensors, rest)

    assert restored.state[other]["exp_avg"].dtype == torch.float32
    assert torch.equal(restored.state[other]["exp_avg"], moment)


def test_restored_moments_are_copies():
    model, optimizer = build("adamw")
    train(model, optimizer, range(1))
    tensors, rest = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other, restored = build("adamw")
    restore_optimizer(restored, tensors, rest)

    train(other, restored, range(3))

    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_fresh_optimizer_round_trips_through_json():
    _, optimizer = build("adamw")
    tensors, rest = optimizer_tensors(optimizer)
    _, other = build("adamw")

    restore_optimizer(other, tensors, json.loads(json.dumps(rest)))

    assert tensors == {}
    assert other.param_groups[0]["betas"] == (0.9, 0.999)
    assert len(other.state) == 0


def test_state_of_another_model_is_refused():
    _, optimizer = build("adamw")
    tensors, rest = optimizer_tensors(optimizer)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(1))])

    with pytest.raises(UnsafeInputError, match="another model"):
        restore_optimizer(other, tensors, rest)


@pytest.mark.parametrize("draw_gauss_first", [False, True])
def test_random_generators_go_on_where_they_were(draw_gauss_first, tmp_path: Path):
    def draw() -> list[float]:
        return [
            torch.rand(()).item(),
            torch.randn(()).item(),
            random.random(),
            random.gauss(0, 1),
            np.random.random(),
            np.random.normal(),
        ]

    if draw_gauss_first:  # Python and NumPy each cache the second of two normal draws
        random.gauss(0, 1)
        np.random.normal()
    tensors = rng_tensors()
    expected = [draw(), draw()]  # before saving: beartype's checks draw from Python's generator
    path = save_state(tmp_path, 1, tensors={"rng": tensors}, meta={}, keep=1)

    restore_rng(load_state(path).tensors["rng"])

    assert [draw(), draw()] == expected
