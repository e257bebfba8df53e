"""How the keys of a checkpoint in the wild relate to the keys of a backbone.

Two things differ: prefixes that wrappers add (``module.``, ``encoder.``), and layouts, other names
for the same weights: a ResNet inside ``nn.Sequential`` (as BadEncoder and many SimCLR programs save
it) and EfficientNet-PyTorch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mimic_fast.config import EncoderSpec
from mimic_fast.errors import UsageError

# Attribute names under which wrappers keep an encoder; where several fit, the earlier is taken.
_WRAPPERS = (
    "module", "_orig_mod", "backbone", "encoder", "encoder_q", "base_encoder", "online_encoder",
    "online_network", "teacher", "student", "f", "model", "visual", "net", "network", "trunk",
    "feature_extractor", "momentum_encoder", "encoder_k", "target_encoder", "target_network",
)  # fmt: skip
_WRAPPER_CHAIN = re.compile(r"(?:(?:" + "|".join(_WRAPPERS) + r")\.){0,4}")

# Heads and training state beside an encoder; anything else left over means another architecture.
_BESIDE = re.compile(
    r"_?(?:fc|heads?|classifier|head_dist|last_linear|linear|g|mlp|mlp_head|proj\w*|pred\w*|prototypes|"
    r"decoder\w*|mask_token|queue\w*|logit_scale|temperature)(?:\.|$)"
)

Layout = Callable[[Iterable[str]], dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMatch:
    """Which checkpoint key fills which backbone key.

    Args:
        keys: Backbone key to checkpoint key.
        unused: Checkpoint keys that no backbone key needs: heads, projectors, queues.
    """

    keys: dict[str, str]
    unused: tuple[str, ...]


def match_keys(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], spec: EncoderSpec
) -> KeyMatch:
    """Finds every weight of a backbone in a checkpoint.

    ``num_batches_tracked`` counters may be absent (torch before 0.4.1); nothing else may.

    Args:
        expected: Shape of every backbone key.
        tensors: The checkpoint.
        spec: What the backbone was built from.

    Raises:
        UsageError: If weights are missing, differ in shape, or are left over inside the encoder.
    """
    architecture = spec.architecture
    # Without its pooling, a sequence is a ResNet whose stem was made small.
    layouts = [layout for layout in _LAYOUTS if layout is not _UNPOOLED or spec.stem != "native"]
    prefix, names = _best(expected, tensors, layouts)
    keys = {key: prefix + name for key, name in names.items() if prefix + name in tensors}
    missing = [k for k in expected if k not in keys and not k.endswith("num_batches_tracked")]
    if missing:
        raise UsageError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} weights of {architecture}: "
            f"{_few(missing)}; give the right encoder.architecture, arguments and stem"
        )
    for key, name in keys.items():
        if tensors[name].shape != expected[key]:
            raise UsageError(
                f"{name!r} has shape {list(tensors[name].shape)}, {architecture} needs "
                f"{list(expected[key])}; give the right architecture, arguments, stem and size"
            )
    used = set(keys.values())
    unused = tuple(name for name in tensors if name not in used)
    inside = [n for n in unused if n.startswith(prefix) and not _is_beside(n.removeprefix(prefix))]
    if inside:
        raise UsageError(
            f"the checkpoint has {len(inside)} weights that {architecture} lacks: {_few(inside)}; "
            "give the right encoder.architecture and arguments"
        )
    return KeyMatch(keys=keys, unused=unused)


def prefixes(names: Iterable[str]) -> list[str]:
    """Wrapper prefixes that occur in a checkpoint, the empty one first, then by preference."""
    found = {""}
    for name in names:
        chain = _WRAPPER_CHAIN.match(name)
        parts = chain.group().split(".")[:-1] if chain else []
        found.update(".".join(parts[: n + 1]) + "." for n in range(len(parts)))
    return sorted(found, key=lambda p: [_WRAPPERS.index(part) for part in p.split(".")[:-1]])


def resnet_places(*, pooled: bool) -> dict[str, str]:
    """Index of each ResNet part in ``nn.Sequential(conv1, bn1, relu, [maxpool,] layer1, ...)``.

    Args:
        pooled: Whether the sequence holds the pooling layer, which shifts the stages by one.
    """
    first = 4 if pooled else 3
    return {"conv1": "0", "bn1": "1"} | {f"layer{n}": str(first + n - 1) for n in range(1, 5)}


def replace_heads(keys: Iterable[str], *, places: Mapping[str, str]) -> dict[str, str]:
    """Every key with its first component replaced where ``places`` names it."""
    split = [(key, *key.partition(".")) for key in keys]
    return {key: places.get(head, head) + dot + rest for key, head, dot, rest in split}


def efficientnet_pytorch(keys: Iterable[str]) -> dict[str, str]:
    """Names in the EfficientNet-PyTorch family (``_blocks.3._depthwise_conv``), by timm name."""
    keys = list(keys)
    blocks: dict[str, dict[str, None]] = {}
    for key in keys:
        found = re.match(r"(blocks\.\d+\.\d+)\.(\w+)", key)
        if found:
            blocks.setdefault(found[1], {})[found[2]] = None
    order = {block: number for number, block in enumerate(blocks)}
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    renamed = replace_heads(keys, places=outer)
    for key in keys:
        found = re.match(r"(blocks\.\d+\.\d+)\.(.+)\.(\w+)$", key)
        if found:
            inner = _INVERTED if "conv_pwl" in blocks[found[1]] else _SEPARABLE
            part = inner.get(found[2], found[2])
            renamed[key] = f"_blocks.{order[found[1]]}.{part}.{found[3]}"
    return renamed


_SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_SEPARABLE = {
    "conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2",
    **_SQUEEZE,
}  # fmt: skip
_INVERTED = {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
    "conv_pwl": "_project_conv", "bn3": "_bn2", **_SQUEEZE,
}  # fmt: skip


_POOLED = partial(replace_heads, places=resnet_places(pooled=True))
_UNPOOLED = partial(replace_heads, places=resnet_places(pooled=False))
_LAYOUTS: tuple[Layout, ...] = (
    partial(replace_heads, places={}), _POOLED, _UNPOOLED, efficientnet_pytorch,
)  # fmt: skip


def _best(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], layouts: Iterable[Layout]
) -> tuple[str, dict[str, str]]:
    """The prefix and layout under which most weights are found, in shape too; first of equals."""
    found = prefixes(tensors)
    best, most = ("", {key: key for key in expected}), -1
    for layout in layouts:
        names = layout(expected)
        for prefix in found:
            fits = sum(
                prefix + name in tensors and tensors[prefix + name].shape == expected[key]
                for key, name in names.items()
            )
            if fits > most:
                best, most = (prefix, names), fits
    return best


def _is_beside(name: str) -> bool:
    return _BESIDE.match(name) is not None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
