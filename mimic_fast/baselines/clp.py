"""CLP: channels that could amplify any input far more than their neighbors are switched off.

Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
arXiv:2208.03111. A channel's bound is the largest singular value of its kernel, ``[in, height *
width]``, times the factor of the BatchNorm behind it, |gamma| / sqrt(var + eps). Within a layer,
channels above mean + u * deviation are set to a constant zero. There is nothing to adapt: it looks
at weights alone, no image is used. Layers without BatchNorm (ViTs, ConvNeXt) are judged by their
kernel, of which a linear layer has one number an input: their bound is the row's length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimic_fast.baselines.repair import leave_repaired, open_repair
from mimic_fast.config import Frozen, Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.progress import Reporter, silent

_FEWEST = 3  # channels of a layer; of fewer a deviation says nothing


class ClpSettings(Frozen):
    """u = 3, as in the paper."""

    deviations: float = Field(
        default=3.0, gt=0, description="u: standard deviations above its layer's mean bound"
    )


def clp(
    settings: Settings,
    options: ClpSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Prunes a copy of the suspect; gives the encoder's file below ``run.out``.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` does.
    """
    repair = open_repair(settings, kind="clp", report=report, stop=stop)
    repair.leave()
    encoder = repair.copy()
    spec = encoder.spec
    black = encoder.mean.new_zeros(1, spec.in_channels, spec.image_size, spec.image_size)
    pruned = prune(encoder, black, deviations=options.deviations)
    return leave_repaired(repair, encoder, options, facts={"pruned": pruned, "clean_images": 0})


@torch.no_grad()
def prune(encoder: Encoder, sample: Tensor, *, deviations: float) -> dict[str, list[int]]:
    """Switches off, in place, the channels whose bound stands out.

    Args:
        encoder: In eval mode.
        sample: Images of any content: one forward shows which BatchNorm follows which layer.
        deviations: u.

    Returns:
        Channels that were switched off, by layer; layers that keep all are left out.
    """
    result: dict[str, list[int]] = {}
    for layer in list(layers_of(encoder, sample)):
        bounds = channel_bounds(layer)
        if len(bounds) < _FEWEST:
            continue
        limit = bounds.mean() + deviations * bounds.std()
        chosen = (bounds > limit).nonzero()[:, 0]
        if len(chosen):
            _switch_off(layer, chosen)
            result[layer.name] = chosen.tolist()
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A convolution or linear layer and the BatchNorm that takes its output as it is."""

    name: str
    module: nn.Conv2d | nn.Linear
    norm: _BatchNorm | None


def layers_of(encoder: Encoder, sample: Tensor) -> Iterator[Layer]:
    """All convolutions and linear layers, with their BatchNorms found by what flows where."""
    names = {module: name for name, module in encoder.backbone.named_modules()}
    # By the identity of an output, which is kept alive, and its version: what was changed in place
    # since is no longer the layer's own.
    made: dict[tuple[int, int], nn.Module] = {}
    outputs: list[Tensor] = []
    behind: dict[nn.Module, _BatchNorm] = {}

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output), output._version] = module
        outputs.append(output)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maker = made.get((id(inputs[0]), inputs[0]._version))
        if maker is not None and isinstance(module, _BatchNorm):
            behind[maker] = module

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            encoder(sample)
    finally:
        for hook in hooks:
            hook.remove()
    for module, name in names.items():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield Layer(name=name, module=module, norm=behind.get(module))


def channel_bounds(layer: Layer) -> Float[Tensor, " channel"]:
    """Upper bound of every output channel's Lipschitz constant, up to a factor of the layer."""
    weight = layer.module.weight.detach().double()
    kernels = weight.flatten(2) if weight.ndim == 4 else weight[:, None]
    bounds = torch.linalg.matrix_norm(kernels, ord=2)
    norm = layer.norm
    if norm is None:
        return bounds
    if norm.running_var is not None:
        bounds = bounds / (norm.running_var.double() + norm.eps).sqrt()
    return bounds if norm.weight is None else bounds * norm.weight.detach().double().abs()


def _switch_off(layer: Layer, channels: Tensor) -> None:
    """A constant zero: of the normalized output where BatchNorm follows, else of the layer's."""
    last = layer.module if layer.norm is None or layer.norm.weight is None else layer.norm
    for parameter in (last.weight, last.bias):
        if parameter is not None:
            parameter[channels] = 0
