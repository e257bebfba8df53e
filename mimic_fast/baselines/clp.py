"""CLP: prunes the channels that can change the most, by their weights alone.

Zheng et al., "Data-free Backdoor Removal Based on Channel Lipschitzness", ECCV 2022,
arXiv:2208.03111. A channel that answers to a trigger must turn a small change of its input into a
large one of its output. The largest singular value of its kernel, laid out as [input channels,
kernel positions], times the factor of the BatchNorm behind it bounds that. A channel whose bound
exceeds the layer's mean by more than u standard deviations is set to zero.

Neither images nor labels are used, so there is nothing to adapt to encoders. Linear layers, and
convolutions without a BatchNorm right behind them, are judged by their weights alone: this is what
remains of the method in a vision transformer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimic_fast.baselines.repair import Repair, leave_repaired, open_suspect
from mimic_fast.config import Frozen, Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.progress import Event, Reporter, silent

KERNELS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ClpSettings(Frozen):
    """The paper's u for CIFAR-10."""

    u: float = Field(
        default=3.0,
        ge=0,
        description="standard deviations above its layer's mean from which a channel is pruned; "
        "of n channels none lies further above than (n - 1) / sqrt(n)",
    )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What makes a layer's channels.

    Args:
        name: Of the convolution or linear layer.
        weight: Output channels first.
        bias: By channel, if there is one.
        norm: The BatchNorm that takes the layer's output as it is, if there is one.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    norm: _BatchNorm | None


def clp(
    settings: Settings,
    options: ClpSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Prunes a copy of the suspect; gives the encoder's file below ``run.out``.

    Of the settings only ``encoder``, ``run`` and ``seed`` are read, no images.

    Raises:
        UsageError: If encoder or output are missing, or no layer has two channels.
        UnsafeInputError: If the file is damaged or a weight is not finite.
        NothingSavedError: If ``stop`` told so.
    """
    suspect, device = open_suspect(settings, kind="clp", report=report)
    spec = suspect.encoder.spec
    repair = Repair(
        kind="clp",
        suspect=suspect,
        pool=torch.zeros(
            0, spec.in_channels, spec.image_size, spec.image_size, dtype=torch.uint8
        ),
        settings=settings,
        device=device,
        report=report,
        stop=stop,
    )  # fmt: skip
    repair.leave()
    encoder = repair.copy()
    layers = layers_of(encoder)
    pruned = prune(layers, u=options.u)
    count = sum(len(channels) for channels in pruned.values())
    channels = sum(len(layer.weight) for layer in layers)
    report(Event(phase="clp", message=f"{count} of {channels} channels pruned"))
    facts: dict[str, Any] = {
        "channels": channels,
        "pruned": count,
        "pruned_channels": pruned,
        "layers": len(layers),
        "layers_with_batchnorm": sum(layer.norm is not None for layer in layers),
    }
    return leave_repaired(repair, encoder, options, facts=facts)


def layers_of(encoder: Encoder) -> list[Layer]:
    """All convolutions and linear layers, and the projections of attention, with their BatchNorm.

    Raises:
        UsageError: If no layer has two channels to compare.
    """
    norms = following_norms(encoder)
    layers = [
        Layer(name=name, weight=weight, bias=bias, norm=norms.get(name))
        for name, weight, bias in _kernels(encoder)
    ]
    if not any(len(layer.weight) > 1 for layer in layers):
        raise UsageError(
            f"clp compares the channels of a layer, but {encoder.spec.architecture} has no "
            "convolution or linear layer of two channels; use another defense"
        )
    return layers


@torch.no_grad()
def following_norms(encoder: Encoder) -> dict[str, _BatchNorm]:
    """The BatchNorm that takes a layer's output, by the layer's name.

    One black image goes through and tensors are followed, not names: a BatchNorm belongs to a layer
    if it reads the very memory that the layer wrote, with nothing written to it in between.
    """
    made: dict[int, tuple[str, Tensor, int]] = {}
    norms: dict[str, _BatchNorm] = {}

    def made_by(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # Kept, so that its memory is not given to another tensor meanwhile.
            made[output.untyped_storage().data_ptr()] = (name, output, output._version)

        return note

    def taken(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (taken,) = inputs
        found = made.get(taken.untyped_storage().data_ptr())
        if found is None or not isinstance(module, _BatchNorm):
            return
        name, output, version = found
        same = taken._version == version and taken.numel() == output.numel()
        if same and module.num_features == len(encoder.get_submodule(name).weight):  # pyright: ignore[reportArgumentType]
            norms.setdefault(name, module)

    handles = []
    for name, module in encoder.named_modules():
        if isinstance(module, KERNELS):
            handles.append(module.register_forward_hook(made_by(name)))
        elif isinstance(module, _BatchNorm) and module.affine and module.running_var is not None:
            handles.append(module.register_forward_pre_hook(taken))
    try:
        side = encoder.spec.image_size
        encoder(encoder.mean.new_zeros(1, encoder.spec.in_channels, side, side))
    finally:
        for handle in handles:
            handle.remove()
    return norms


def channel_bounds(layer: Layer) -> Float64[Tensor, " channel"]:
    """Upper bound of each channel's Lipschitz constant.

    Raises:
        UnsafeInputError: If one is not finite.
    """
    kernels = layer.weight.detach().double()
    kernels = kernels.reshape(*kernels.shape[:2], -1)
    factors = kernels.new_ones(()) if layer.norm is None else norm_factors(layer.norm)
    if not bool(kernels.isfinite().all() & factors.isfinite().all()):
        raise UnsafeInputError(f"weights of {layer.name} are not finite; the file is damaged")
    if kernels.shape[1] > kernels.shape[2]:
        kernels = kernels.mT
    # The singular values by the smaller Gram matrix, which is 9x9 for a 3x3 kernel.
    squares = torch.linalg.eigvalsh(kernels @ kernels.mT)[:, -1].clamp(min=0)
    return squares.sqrt() * factors


def norm_factors(norm: _BatchNorm) -> Float64[Tensor, " channel"]:
    """What a BatchNorm multiplies a change of its input by: |gamma| / sqrt(variance + eps)."""
    assert norm.running_var is not None
    return norm.weight.detach().double().abs() * (norm.running_var.double() + norm.eps).rsqrt()


def outliers(bounds: Float[Tensor, " channel"], *, u: float) -> list[int]:
    """The channels above mean + u standard deviations (of n - 1); none of a single channel."""
    if len(bounds) < 2:
        return []
    return (bounds > bounds.mean() + u * bounds.std()).nonzero().flatten().tolist()


@torch.no_grad()
def prune(layers: list[Layer], *, u: float) -> dict[str, list[int]]:
    """Sets outlying channels to zero in place; gives them by layer, where there are any.

    Every bound is taken before anything is pruned, as it depends on its own layer alone.
    """
    pruned: dict[str, list[int]] = {}
    for layer in layers:
        channels = outliers(channel_bounds(layer), u=u)
        if not channels:
            continue
        pruned[layer.name] = channels
        # Where a BatchNorm follows it is what gives the channel its value at zero input.
        held = (layer.weight, layer.bias) if layer.norm is None else tuple(layer.norm.parameters())
        for values in held:
            if values is not None:
                values[channels] = 0
    return pruned


def _kernels(encoder: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for name, module in encoder.named_modules():
        if isinstance(module, KERNELS):
            yield name, module.weight, module.bias
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{name}.in_proj", module.in_proj_weight, module.in_proj_bias
