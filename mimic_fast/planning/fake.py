"""Encoders without memory: built on the meta device, then made of fake tensors on the CPU.

Fake tensors have shapes, types and storages that come and go, and no numbers: a network of any size
runs in the time of its Python code.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders import build
from mimic_fast.encoders.build import Encoder

Module = TypeVar("Module", bound=nn.Module)


def meta_encoder(spec: EncoderSpec) -> Encoder:
    """As ``build_encoder``, on the meta device.

    Raises:
        UsageError: As there.
    """
    with torch.device("meta"):
        backbone = build._backbone(spec)
        if spec.stem != "native":
            build._replace_stem(backbone, spec)
        build._check_patches(backbone, spec)
        width = build._probe_feature_dim(backbone, spec)
        return Encoder(spec, backbone, feature_dim=width)


def made_fake(module: Module, *, dtype: torch.dtype, channels_last: bool) -> Module:
    """The module with fake tensors in place of its own; to be called under ``FakeTensorMode``."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = _like(weight, dtype, channels_last)
                part._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer, dtype, channels_last)
    return module


def _like(tensor: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    last = channels_last and tensor.ndim == 4
    return torch.empty(
        tensor.shape,
        dtype=dtype if tensor.is_floating_point() else tensor.dtype,
        device="cpu",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
