"""What a checkpoint is: from the settings, else its card, else the names and shapes of its weights.

Recognised from weights: ResNets of timm and torchvision (same names, same function), plain or
inside ``nn.Sequential``; timm ViTs; EfficientNet-Lite0 as published for EfficientNet-PyTorch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimic_fast.config import EncoderSettings, EncoderSpec
from mimic_fast.encoders.names import prefixes, replace_heads, resnet_places
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.recipe import validated

Shapes = Mapping[str, torch.Size]
Fields = dict[str, Any]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# timm's named ResNets: (bottleneck, blocks per stage).
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_VITS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}
_CHANNELS_PER_HEAD = 64  # heads leave no trace in the weights; every published ViT-T/S/B/L has 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Recognised:
    """A specification, and where it rests on convention.

    Args:
        spec: Enough to build the encoder.
        assumed: Fields that nobody gave and no weight shows; a wrong one changes the features
            silently.
    """

    spec: EncoderSpec
    assumed: tuple[str, ...]


def recognise_spec(
    tensors: Mapping[str, Tensor], settings: EncoderSettings, card: Mapping[str, Any] | None
) -> Recognised:
    """The specification of a checkpoint: settings win, then the card, then the weights.

    Given arguments are laid over the recognised ones, so ``encoder.arguments.num_heads`` alone is
    enough.

    Raises:
        UsageError: If something needed cannot be told; the message says which setting to give.
        UnsafeInputError: If the card is not valid.
    """
    fields: Fields = {} if card is None else _card_fields(card)
    if not fields:
        fields = _weight_fields({name: tensor.shape for name, tensor in tensors.items()})
    given = settings.model_dump(exclude={"teacher", "taps", "teacher_shard"}, exclude_none=True)
    if given.get("architecture", fields.get("architecture")) != fields.get("architecture"):
        for key in ("arguments", "undecided", "conventions"):  # those of another architecture
            fields.pop(key, None)
    arguments = {**fields.get("arguments", {}), **given.get("arguments", {})}
    fields = {**fields, **given, "arguments": arguments}
    if "architecture" not in fields:
        raise UsageError(
            "cannot tell the architecture from the checkpoint's keys; give it, for example "
            "--set encoder.architecture=timm:resnet18"
        )
    undecided: dict[str, str] = fields.pop("undecided", {})
    for key, hint in undecided.items():
        if key not in given and key.removeprefix("arguments.") not in arguments:
            raise UsageError(f"cannot tell {key} from the weights; give {hint}")
    assumed = _assume(fields, given)
    return Recognised(spec=validated(EncoderSpec, fields), assumed=assumed)


def _assume(fields: Fields, given: Fields) -> tuple[str, ...]:
    """Fills what is still open with conventions, and says what that was."""
    conventions: Fields = fields.pop("conventions", {})
    channels = fields.setdefault("in_channels", 3)
    mean, std = _IMAGENET if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    size = 224 if fields.get("stem", "native") == "native" else 32
    defaults = {"image_size": size, "mean": mean, "std": std, **conventions}
    assumed: list[str] = []
    for key, value in defaults.items():
        section, _, name = key.rpartition(".")
        target: Fields = fields[section] if section else fields
        if name not in target:
            target[name] = value
            assumed.append(key)
    return tuple(assumed)


def _card_fields(card: Mapping[str, Any]) -> Fields:
    try:
        return validated(EncoderSpec, card["spec"]).model_dump()
    except UsageError as error:
        raise UnsafeInputError(f"the checkpoint's card is not valid: {error}") from None


def _weight_fields(shapes: Shapes) -> Fields:
    for prefix in prefixes(shapes):
        view = {
            k.removeprefix(prefix): shape for k, shape in shapes.items() if k.startswith(prefix)
        }
        for recognise in (_resnet, _sequential_resnet, _vit, _efficientnet_lite0):
            try:
                fields = recognise(view)
            except (LookupError, ValueError, ArithmeticError):
                continue  # the names fit, the shapes belong to no network
            if fields:
                return fields
    return {}


def _resnet(view: Shapes) -> Fields:
    if not {"conv1.weight", "bn1.weight", "layer4.0.conv2.weight"} <= view.keys():
        return {}
    stages = ("layer1", "layer2", "layer3", "layer4")
    counts = tuple(sum(f"{s}.{b}.conv1.weight" in view for b in range(256)) for s in stages)
    bottleneck = "layer1.0.conv3.weight" in view
    last, expansion = ("conv3", 4) if bottleneck else ("conv2", 1)
    channels = [view[f"{s}.0.{last}.weight"][0] // expansion for s in stages]
    arguments: Fields = {}
    name = _RESNETS.get((bottleneck, counts))
    if name is None:
        name = "resnet50" if bottleneck else "resnet18"
        arguments["layers"] = list(counts)
    if channels != [64, 128, 256, 512]:
        arguments["channels"] = channels
    if bottleneck:
        width, per_group = view["layer1.0.conv2.weight"][:2]
        base_width = per_group * 64 // max(channels[0], 1)
        if (width // per_group, base_width) != (1, 64):
            arguments |= {"cardinality": width // per_group, "base_width": base_width}
    _, in_channels, kernel, _ = view["conv1.weight"]
    fields = {"architecture": f"timm:{name}", "arguments": arguments, "in_channels": in_channels}
    if kernel == 7:
        return {**fields, "stem": "native"}
    return {**fields, "undecided": {"stem": "--set encoder.stem=small_stride1 (or small_stride2)"}}


def _sequential_resnet(view: Shapes) -> Fields:
    if "0.weight" not in view or "1.running_mean" not in view:
        return {}
    pooled = "3.0.conv1.weight" not in view
    names = {index: part for part, index in resnet_places(pooled=pooled).items()}
    renamed = replace_heads(view, places=names)
    fields = _resnet({renamed[key]: shape for key, shape in view.items()})
    # A large stem without its pooling is no stem that build_encoder makes.
    return fields if pooled or fields.get("stem") != "native" else {}


def _vit(view: Shapes) -> Fields:
    needed = {
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    }
    if not needed <= view.keys():
        return {}
    dim, in_channels, patch, _ = view["patch_embed.proj.weight"]
    registers = view["reg_token"][1] if "reg_token" in view else 0
    has_class = "cls_token" in view
    positions, extra = view["pos_embed"][1], has_class + registers
    grid = math.isqrt(max(positions - extra, 0))
    arguments: Fields = {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": sum(f"blocks.{b}.attn.qkv.weight" in view for b in range(256)),
    }
    if grid * grid != positions - extra:
        grid = math.isqrt(positions)
        arguments["no_embed_class"] = True
    hidden = view["blocks.0.mlp.fc1.weight"][0]
    if hidden != 4 * dim:
        arguments["mlp_ratio"] = hidden / dim
    if registers:
        arguments["reg_tokens"] = registers
    if not has_class:
        arguments["class_token"] = False
    if "fc_norm.weight" in view or not has_class:
        arguments |= {"global_pool": "avg", "fc_norm": "fc_norm.weight" in view}
    if "blocks.0.attn.qkv.bias" not in view:
        arguments["qkv_bias"] = False
    if "blocks.0.ls1.gamma" in view:
        arguments["init_values"] = 1e-5
    heads = {"arguments.num_heads": dim // _CHANNELS_PER_HEAD}
    whole = dim % _CHANNELS_PER_HEAD == 0
    return {
        "architecture": f"timm:{_VITS.get(dim, 'vit_tiny')}_patch16_224",
        "arguments": arguments,
        "in_channels": in_channels,
        "image_size": grid * patch,
        "conventions": heads if whole else {},
        "undecided": {}
        if whole
        else {"arguments.num_heads": "--set encoder.arguments.num_heads=N"},
    }


def _efficientnet_lite0(view: Shapes) -> Fields:
    blocks = sum(f"_blocks.{b}._project_conv.weight" in view for b in range(256))
    squeezed = any("._se_" in name for name in view)
    if blocks != 16 or squeezed or view.get("_conv_head.weight") != torch.Size([1280, 320, 1, 1]):
        return {}
    # Published with inputs (x - 127) / 128 and TensorFlow's padding, which is timm's tf_ variant.
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return {"architecture": "timm:tf_efficientnet_lite0", "in_channels": 3, "conventions": half}
