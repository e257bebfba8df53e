"""Encoders by name: timm or torchvision backbones with random weights and no classifier.

Nothing here downloads: names that stand for published weights are refused, and so are constructor
arguments that read files. The specification may come from an untrusted card.
"""

import difflib
import re
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.reasons import reason
from mimic_fast.errors import UsageError

# Set by this file, or able to read files and the network.
_RESERVED = ("pretrained", "weights", "checkpoint", "cache", "num_classes", "in_chans", "hf_hub")
_RESERVED_EXACT = ("features_only", "out_indices", "scriptable", "exportable", "no_jit", "progress")
_PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)
_LARGEST_ARGUMENT = 2**16
_LARGEST_IMAGE = 4096

# What constructors and forwards raise on arguments or image sizes they cannot use.
_REFUSALS = (
    TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError,
    ZeroDivisionError, OverflowError,
)  # fmt: skip


class Encoder(nn.Module):
    """Images in [0, 1] to features; normalization is part of it.

    ``state_dict`` keys are exactly ``backbone.<library key>``: mean and deviation come from the
    specification.

    Args:
        spec: What was built.
        backbone: Maps normalized images ``[batch, channel, height, width]`` to ``[batch,
            feature]``.
        feature_dim: Width of the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, feature_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch feature"]:
        """Features of un-normalized images.

        Raises:
            UsageError: If the number of channels differs from the specification's.
        """
        if images.shape[1] != self.spec.in_channels:
            raise UsageError(
                f"the encoder takes {self.spec.in_channels}-channel images, got {images.shape[1]}; "
                "convert the images or give encoder.in_channels"
            )
        return self.backbone((images - self.mean) / self.std)


def build_encoder(spec: EncoderSpec, *, seed: int | None = None) -> Encoder:
    """A randomly initialized encoder on the CPU, in training mode.

    Args:
        spec: Architecture, input and normalization.
        seed: Makes the weights depend on it alone and leaves the global random state untouched;
            None draws from the global state.

    Raises:
        UsageError: If the architecture is unknown, or does not take these arguments or this image
            size.
    """
    if seed is None:
        return _build(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _build(spec)


def count_weights(spec: EncoderSpec) -> int:
    """Parameters of the backbone, counted without allocating them.

    Raises:
        UsageError: As in :func:`build_encoder`.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _backbone(spec).parameters())


def _backbone(spec: EncoderSpec) -> nn.Module:
    library, _, name = spec.architecture.partition(":")
    _check_arguments(spec)
    make = _timm_backbone if library == "timm" else _torchvision_backbone
    return make(name, spec)


def _build(spec: EncoderSpec) -> Encoder:
    with torch.device("cpu"):
        backbone = _backbone(spec)
        if spec.stem != "native":
            _replace_stem(backbone, spec)
        _check_patches(backbone, spec)
        feature_dim = _probe_feature_dim(backbone, spec)
        return Encoder(spec, backbone, feature_dim=feature_dim)


def _check_arguments(spec: EncoderSpec) -> None:
    for key, value in spec.arguments.items():
        if key.startswith(_RESERVED) or key in _RESERVED_EXACT:
            raise UsageError(f"encoder.arguments must not set {key!r}; it is set by mimic_fast")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and abs(number) > _LARGEST_ARGUMENT:
                raise UsageError(
                    f"encoder.arguments.{key} must lie within +-{_LARGEST_ARGUMENT}, got {number}"
                )
    if spec.image_size > _LARGEST_IMAGE:
        raise UsageError(
            f"encoder.image_size must be at most {_LARGEST_IMAGE} pixels, got {spec.image_size}"
        )


def _timm_backbone(name: str, spec: EncoderSpec) -> nn.Module:
    import timm

    # list_models knows no 'hf-hub:' or 'local-dir:' names, so nothing that downloads passes.
    base = name.partition(".")[0]
    if not _PLAIN_NAME.fullmatch(name) or not timm.is_model(base):
        raise _unknown(spec.architecture, timm.list_models())
    arguments: dict[str, Any] = dict(spec.arguments)
    published = timm.get_pretrained_cfg(base)
    resize = (
        published is not None
        and published.fixed_input_size
        and published.input_size[-1] != spec.image_size
    )
    if resize or "img_size" in arguments:
        _agree_on_size(arguments, "img_size", spec)
    try:
        return timm.create_model(
            base, pretrained=False, num_classes=0, in_chans=spec.in_channels, **arguments
        )
    except _REFUSALS as error:
        raise _refused(spec, error) from None


def _torchvision_backbone(name: str, spec: EncoderSpec) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown(spec.architecture, known)
    if spec.in_channels != 3:
        raise UsageError(
            f"torchvision models take 3 channels, got in_channels = {spec.in_channels}; "
            "use the timm architecture of the same name"
        )
    arguments: dict[str, Any] = dict(spec.arguments)
    if "image_size" in arguments or name.startswith("vit_"):
        _agree_on_size(arguments, "image_size", spec)
    try:
        backbone = cast(nn.Module, models.get_model(name, weights=None, **arguments))
    except _REFUSALS as error:
        raise _refused(spec, error) from None
    _remove_classifier(backbone, spec)
    return backbone


def _agree_on_size(arguments: dict[str, Any], key: str, spec: EncoderSpec) -> None:
    given = arguments.setdefault(key, spec.image_size)
    if given not in (spec.image_size, [spec.image_size, spec.image_size]):
        raise UsageError(
            f"encoder.arguments.{key} = {given} contradicts image_size {spec.image_size}; drop one"
        )


def _remove_classifier(backbone: nn.Module, spec: EncoderSpec) -> None:
    """Drops the last linear layer and the dropout before it; the rest shapes the features."""
    for name in ("fc", "heads", "head", "classifier"):
        head = getattr(backbone, name, None)
        if isinstance(head, nn.Linear):
            setattr(backbone, name, nn.Identity())
            return
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            kept = list(head.named_children())[:-1]
            while kept and isinstance(kept[-1][1], nn.Dropout):
                kept.pop()
            rest = nn.Sequential()
            for child, module in kept:
                rest.add_module(child, module)
            setattr(backbone, name, rest if kept else nn.Identity())
            return
    raise UsageError(f"{spec.architecture} has no linear classifier to remove; use a timm model")


def _replace_stem(backbone: nn.Module, spec: EncoderSpec) -> None:
    """One 3x3 convolution in place of the 7x7 one and the pooling, as for small images."""
    conv = getattr(backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise UsageError(
            f"stem {spec.stem!r} is for ResNets with one stem convolution; {spec.architecture} "
            "has none, use stem 'native'"
        )
    stride = {"small_stride1": 1, "small_stride2": 2}[spec.stem]
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")  # as both libraries
    backbone.conv1 = small
    backbone.maxpool = nn.Identity()


def _check_patches(backbone: nn.Module, spec: EncoderSpec) -> None:
    # timm rounds the grid down and only fails, or ignores a border, in the forward pass.
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    sides = patch if isinstance(patch, tuple) else (patch,)
    for side in sides:
        if isinstance(side, int) and side > 0 and spec.image_size % side:
            raise UsageError(
                f"image_size must be a multiple of the patch size {side}, got {spec.image_size}; "
                "set encoder.image_size or arguments.patch_size"
            )


def _probe_feature_dim(backbone: nn.Module, spec: EncoderSpec) -> int:
    """Runs one black image: proves that the image size fits, and that features are vectors."""
    training = backbone.training
    size = spec.image_size
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, spec.in_channels, size, size, dtype=dtype))
    except _REFUSALS as error:
        raise UsageError(
            f"{spec.architecture} with {spec.arguments} cannot take images of {size}x{size} "
            f"pixels ({reason(error)}); check encoder.image_size and arguments"
        ) from None
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(
            f"{spec.architecture} must return one feature vector per image; check "
            "encoder.arguments (global_pool)"
        )
    return features.shape[1]


def _unknown(architecture: str, names: list[str]) -> UsageError:
    library, _, name = architecture.partition(":")
    if ":" in name or "/" in name:
        return UsageError(
            f"architecture {architecture!r} would be downloaded; name a {library} architecture "
            "and give the weights as a file"
        )
    near = difflib.get_close_matches(name, names, n=1, cutoff=0)
    hint = f"; did you mean '{library}:{near[0]}'?" if near else ""
    return UsageError(f"unknown architecture {architecture!r}{hint}")


def _refused(spec: EncoderSpec, error: BaseException) -> UsageError:
    return UsageError(
        f"{spec.architecture} cannot be built with {spec.arguments} and image_size "
        f"{spec.image_size}: {reason(error)}"
    )
