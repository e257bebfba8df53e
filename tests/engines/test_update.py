"""Losses that are not finite spoil every gradient, others none; a bad step changes nothing."""

import pytest
import torch

from mimic_fast.engines.update import spoiled, update_locally
from mimic_fast.precision import LossScale


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_of_a_loss_that_is_not_finite_are_not_finite(value):
    weight = torch.ones(3, requires_grad=True)
    spoiled(weight.sum() + value).backward()

    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_finite_losses_keep_every_bit():
    loss = torch.tensor(0.1234567, requires_grad=True)
    out = spoiled(loss)
    out.backward()

    assert out.item() == loss.item()
    assert loss.grad == 1


@pytest.mark.parametrize(("norm", "moves"), [(1.0, True), (float("inf"), False)])
def test_update_is_skipped_where_the_norm_is_not_finite(norm, moves):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    scale = LossScale(torch.device("cpu"))
    before = scale.scale.item()

    update = update_locally(torch.optim.SGD([weight], 0.1, fused=True), torch.tensor(norm), scale)

    assert bool((weight != 1).all()) is moves
    assert update.bad.item() == float(not moves)
    assert scale.scale.item() == (before if moves else before / 2)
