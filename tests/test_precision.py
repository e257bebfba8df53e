"""The loss scale follows torch's own; what was asked for is what multiplies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_fast import precision
from mimic_fast.errors import UsageError
from mimic_fast.precision import LossScale, autocast_dtype, check_precision

CPU = torch.device("cpu")


@settings(max_examples=20)
@given(st.lists(st.booleans(), max_size=30))
def test_scale_is_that_of_torch(steps):
    ours, parameter = LossScale(CPU), torch.nn.Parameter(torch.ones(1))
    theirs = torch.amp.GradScaler("cpu")  # pyright: ignore[reportPrivateImportUsage]
    optimizer = torch.optim.SGD([parameter], 0.0)
    theirs.scale(parameter.sum())
    for bad in steps:
        parameter.grad = torch.full((1,), torch.inf if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)))

        assert ours.scale.item() == theirs.get_scale()


def test_scale_doubles_after_2000_finite_steps():
    ours = LossScale(CPU)
    for _ in range(1999):
        ours.update(torch.tensor(0.0))
    assert ours.scale.item() == 2.0**16
    ours.update(torch.tensor(0.0))
    assert ours.scale.item() == 2.0**17


def test_gradients_are_divided_exactly():
    gradient = torch.tensor([3.0, -5.0]) * 2**16
    LossScale(CPU).unscale([gradient])

    assert gradient.tolist() == [3.0, -5.0]


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16"])
def test_what_runs_is_what_was_asked_for(name):
    check_precision(name, CPU)
    assert autocast_dtype(name) == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def test_autocast_that_does_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "autocast", lambda dtype, device: torch.no_grad())

    with pytest.raises(UsageError, match=r"bf16.*float32"):
        check_precision("bf16", CPU)
