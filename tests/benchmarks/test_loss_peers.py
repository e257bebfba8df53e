"""All that bench_loss.py times computes one loss, and who does not is found out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.loss_peers import (
    at_loss,
    check,
    dense_loss,
    later,
    loss_oracle,
    nad_loss,
    ours,
    plain,
    problem,
)

SHAPES = [(2, 5, 8), (3, 4, 3, 2)]


@pytest.mark.parametrize("dense", ["mse", "cosine"])
@pytest.mark.parametrize("trunk", [False, True], ids=["last", "trunk"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peers_and_ours_agree_with_the_oracle(shape, trunk, dense):
    given = problem(shape, dtype=torch.float32, device="cpu", trunk=trunk)
    candidates = {
        "nad": plain(nad_loss, given, dense=dense),
        "at": plain(at_loss, given, dense=dense),
        "reference": ours("reference", given, dense=dense),
        "cpp": ours("cpp", given, dense=dense),
        "triton": ours("triton", given, dense=dense),
    }

    errors = check(candidates, given, dense=dense)

    assert errors.keys() == candidates.keys()
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("trunk", [False, True], ids=["last", "trunk"])
def test_another_loss_is_refused(trunk):
    given = problem(SHAPES[0], dtype=torch.float32, device="cpu", trunk=trunk)

    def louder(student: Tensor, teacher: Tensor, *, dense) -> Tensor:
        return 1.0001 * nad_loss(student, teacher, dense=dense)

    with pytest.raises(AssertionError, match=r"louder: loss off by 0\.0001"):
        check({"louder": plain(louder, given, dense="mse")}, given, dense="mse")


def test_another_gradient_is_refused():
    given = problem(SHAPES[0], dtype=torch.float32, device="cpu", trunk=False)

    def half_detached(student: Tensor, teacher: Tensor, *, dense) -> Tensor:
        whole = nad_loss(student, teacher, dense=dense)
        return whole.detach() + (whole - whole.detach()) / 2

    with pytest.raises(AssertionError, match=r"gradient by 0\.5"):
        check({"half": plain(half_detached, given, dense="mse")}, given, dense="mse")


def test_both_losses_weigh_in_the_gradient():
    given = problem((8, 197, 192), dtype=torch.float64, device="cpu", trunk=False)
    attention = loss_oracle(given.student, given.teacher, dense="mse") - dense_loss(
        given.student, given.teacher, "mse"
    )
    (of_attention,) = torch.autograd.grad(attention, given.student, retain_graph=True)
    (of_dense,) = torch.autograd.grad(
        dense_loss(given.student, given.teacher, "mse"), given.student
    )

    assert 0.1 < of_attention.norm() / of_dense.norm() < 10


def test_gradient_of_later_layers_is_added():
    given = problem(SHAPES[0], dtype=torch.float32, device="cpu", trunk=True)

    _, with_later = plain(nad_loss, given, dense="mse")()
    _, without = plain(nad_loss, replace(given, trunk=False), dense="mse")()

    (arriving,) = torch.autograd.grad(later(given.student), given.student)
    torch.testing.assert_close(with_later, without + arriving)
    assert arriving.abs().max() > 1e-3
