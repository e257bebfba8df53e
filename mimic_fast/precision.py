"""Lower precision: autocast over weights kept in float32, and float16's loss scale.

One way for every engine: student and teacher run under autocast inside their own forward, losses
outside of it, so that precision means the same whatever cuts the weights.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mimic_fast.errors import UsageError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST, _LARGEST, _GROWTH_STEPS = 2.0**16, 2.0**24, 2000  # as torch.amp.GradScaler begins and grows


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What ``optim.precision`` multiplies matrices in; None: in the type of the weights."""
    return _DTYPES.get(precision)


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to ``dtype``, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_precision(precision: str, device: torch.device) -> None:
    """Proves that a product under the autocast asked for has its type.

    Raises:
        UsageError: If it has another.
    """
    dtype = autocast_dtype(precision)
    if dtype is None:
        return
    factor = torch.ones(2, 2, device=device)
    with autocast(dtype, device):
        runs = (factor @ factor).dtype
    if runs != dtype:
        raise UsageError(
            f"optim.precision {precision!r} was asked for but {device.type} computes in {runs}; "
            "use fp32"
        )


class LossScale:
    """The factor that keeps float16 gradients from vanishing; lives on the device, never waits.

    It doubles after 2,000 finite steps in a row and halves with every overflow, as
    ``torch.amp.GradScaler`` does, which decides for one process alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_FIRST, device=device)
        self.finite = torch.zeros((), device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients by the factor, in place."""
        if gradients:
            torch._foreach_mul_(list(gradients), 1 / self.scale)  # pyright: ignore[reportPrivateImportUsage]

    def update(self, bad: Tensor) -> None:
        """Takes note of a step; ``bad`` is 1 where it was not finite, else 0."""
        self.finite.add_(1).mul_(1 - bad)
        grow = self.finite >= _GROWTH_STEPS
        factor = torch.where(bad > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(max=_LARGEST)
        self.finite.mul_((~grow).to(self.finite.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What a run state keeps."""
        return {"scale": self.scale, "finite": self.finite}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what :meth:`tensors` gave."""
        self.scale.copy_(tensors["scale"])
        self.finite.copy_(tensors["finite"])
