"""An optimizer step that skips itself where the gradient is not finite, without asking the host."""

import torch
from torch import Tensor

from mimic_fast.engines.engine import Update
from mimic_fast.precision import LossScale


def update_locally(
    optimizer: torch.optim.Optimizer, norm: Tensor, scale: LossScale | None
) -> Update:
    """Steps a fused optimizer unless ``norm`` is not finite.

    Args:
        optimizer: Fused: its kernels leave everything as it is where found_inf is 1.
        norm: Of the gradient over all processes, hence the same decision in each.
        scale: Float16's, to be adjusted.
    """
    bad = (~torch.isfinite(norm)).float()
    optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    if scale is not None:
        scale.update(bad)
    return Update(norm=norm.detach(), bad=bad)


def spoiled(loss: Tensor) -> Tensor:
    """``loss``, with gradients that are not finite where it is not.

    Added up over processes, they tell all of them.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
