"""The fused losses without their kernels: the same tensors are made, nothing is computed.

Kernels read addresses, which fake tensors do not have. All that counts here is what they allocate;
the autograd functions around them are the real ones.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mimic_fast import layer_losses, ops, ops_loss
from mimic_fast.ops_choice import Choice, Engine, Path


@contextmanager
def losses_on(path: Path) -> Iterator[None]:
    """Losses of fake tensors take this path, whatever this machine could run.

    The fused paths differ in nothing that is counted; ``compiled`` is counted as ``reference``,
    which never allocates less.
    """
    fused = path in ("triton", "cpp")
    real = ops_loss.choose, ops_loss.engine
    chosen = Choice(path="triton" if fused else "reference", reason="counted, not computed")
    ops_loss.choose = lambda *_: chosen
    ops_loss.engine = lambda _: _ENGINE
    layer_losses._weights.cache_clear()  # real tensors here would meet fake ones, and fake ones
    try:  # left behind would meet the real ones of a run
        with warnings.catch_warnings():
            # stacked() asks where rows lie; all fake ones lie at 0, and it then copies nothing
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        ops_loss.choose, ops_loss.engine = real
        layer_losses._weights.cache_clear()


def _power_maps(feature_maps: Sequence[Tensor], *, prefix: int, **_: Any) -> Tensor:
    first = feature_maps[0]
    return _table(first, len(feature_maps), first.shape[0], _positions(first, prefix))


def _forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor] | None,
    teacher_powers: Tensor | None,
    weights: Tensor,
    losses: Tensor,
    *,
    prefix: int,
    clone: ops.Clone,
    attention: bool,
    **_: Any,
) -> Tensor:
    planes = attention + 2 * (clone == "cosine")
    positions = _positions(students[0], prefix)
    return _table(students[0], len(students), planes, losses.shape[2], positions)


def _backward(*_: Any, **__: Any) -> None:
    """Writes into what it was given."""


def _table(like: Tensor, *shape: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=wide)


def _positions(activation: Tensor, prefix: int) -> int:
    if activation.ndim == 2:
        return 1
    return activation.shape[1] - prefix if activation.ndim == 3 else activation[0, 0].numel()


_ENGINE = Engine(name="triton", power_maps=_power_maps, forward=_forward, backward=_backward)
