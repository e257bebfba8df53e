"""Synchronized BatchNorm that also runs on CPU, where ``torch.nn.SyncBatchNorm`` raises."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimic_fast.distributed import Processes, sum_with_gradient
from mimic_fast.errors import UsageError


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the joined batch of all processes; state keys are BatchNorm2d's own.

    Mean first, then squared deviations (two all-reduces): no cancellation, so float32 stays close
    to BatchNorm on one process. Half-precision input is summed in float32, as BatchNorm2d does. In
    eval mode it is BatchNorm2d.
    """

    processes: Processes

    def forward(self, input: Float[Tensor, "batch channel height width"]) -> Tensor:
        """Normalizes over the batch of all processes."""
        if not self.training:
            return super().forward(input)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        local = wide.new_full((1,), float(input.numel() // input.shape[1]))
        totals = sum_with_gradient(torch.cat([wide.sum((0, 2, 3)), local]), self.processes)
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centered = wide - mean[:, None, None]
        variance = sum_with_gradient(centered.square().sum((0, 2, 3)), self.processes) / count
        self._update(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        output = centered * scale[:, None, None]
        if self.bias is not None:
            output = output + self.bias[:, None, None]
        return output.to(input.dtype)

    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


def synchronize_batchnorm(module: nn.Module, processes: Processes) -> nn.Module:
    """Replaces every BatchNorm of ``module`` in place by its synchronized form, keeping the state.

    Raises:
        UsageError: If a layer has no synchronized form on CPU, such as BatchNorm3d.
    """
    if processes.world == 1:
        return module
    if processes.device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        # Not torch's own conversion, which drops the activation inside timm's BatchNormAct2d.
        return convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            _synchronize(child, processes)
    return module


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's BatchNormAct2d, which drops and activates in its own forward."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Float[Tensor, "batch channel height width"]) -> Tensor:
        """Normalizes, drops, activates."""
        return self.act(self.drop(super().forward(input)))


class SyncBatchNorm1d(SyncBatchNorm):
    """The same for BatchNorm1d: on rows, or on rows of sequences."""

    def forward(self, input: Float[Tensor, "batch channel *length"]) -> Tensor:
        """Normalizes over the batch of all processes."""
        maps = input.reshape(*input.shape[:2], -1, 1)
        return super().forward(maps).reshape(input.shape)


def _synchronize(layer: nn.Module, processes: Processes) -> None:
    # Changing the class keeps parameters, buffers and hooks where they are.
    from timm.layers.norm_act import BatchNormAct2d

    kinds = {
        nn.BatchNorm1d: SyncBatchNorm1d,
        nn.BatchNorm2d: SyncBatchNorm,
        BatchNormAct2d: SyncBatchNormAct,
    }
    if type(layer) not in kinds:
        raise UsageError(
            f"cannot synchronize a {type(layer).__name__} on CPU; run one process or use a GPU"
        )
    layer.__class__ = kinds[type(layer)]
    layer.processes = processes  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
