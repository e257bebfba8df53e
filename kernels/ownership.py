"""Whether a gradient is ours alone, so that it may be overwritten.

Autograd hands one tensor to several branches of a sum, to hooks and to callers; whoever writes into
it then spoils the others' gradients.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def holders(gradient: Tensor) -> tuple[int, int, int]:
    """How many refer to a gradient: tensor, storage, Python object."""
    storage = gradient.untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    own = gradient._use_count()  # pyright: ignore[reportAttributeAccessIssue]
    return own, uses, sys.getrefcount(gradient)


@cache
def sole_holder() -> tuple[int, int, int] | None:
    """What :func:`holders` says of a gradient that is ours alone; None where it cannot be told.

    Measured, since it depends on the versions of Python and torch. A gradient that anything else
    refers to (another branch of a sum, a hook, the caller) shows higher counts and is left alone.
    """
    if not hasattr(torch.Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    return probed(lambda trunk: trunk * 2)


def probed(follow: Callable[[Tensor], Tensor]) -> tuple[int, int, int]:
    """What :func:`holders` says of the gradient of a tensor that ``follow`` goes on with."""
    found: list[tuple[int, int, int]] = []
    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        trunk, losses = _Probe.apply(leaf * 1, torch.empty(1), found, None)
        (follow(trunk).square().sum() + losses.sum()).backward()
    return found[0]


class _Probe(torch.autograd.Function):
    """Counts who holds a gradient that nobody else can hold; shaped like ``_Tap``."""

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, losses: Tensor, found: list[tuple[int, int, int]], _: None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.found = found
        return activation.view_as(activation), losses.view_as(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> Any:
        trunk, _cotangent = gradients
        held = None if trunk is None else holders(trunk)
        assert held is not None
        ctx.found.append(held)
        return trunk, None, None, None
