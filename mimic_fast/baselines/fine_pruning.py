"""Fine-Pruning: channels that clean images leave dormant are pruned, the rest is fine-tuned.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, arXiv:1805.12185. A backdoor may live in units of the last convolutional layer
that clean images do not excite. They are pruned in the order of their mean activation for as long
as clean accuracy allows, and the network is fine-tuned.

An encoder has no accuracy without labels: its place takes the share of an image's 10 nearest
neighbors that it keeps from the suspect. Neighbors change long before classes do, so the share that
may be lost is larger than one would lose of accuracy. The outputs of an encoder's last layer are
the features, joined by a skip connection, so what is pruned are the channels that go into it: the
hidden ones of a ResNet's last block, the MLP's hidden units of a ViT's. The last layer takes
nothing from a pruned channel, which needs no care for the BatchNorm, biases and activations that
make it. The count is found by bisection, not one channel after another.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mimic_fast.baselines.fine_tuning import fine_tune
from mimic_fast.baselines.repair import ContrastSettings, Repair, leave_repaired, open_repair
from mimic_fast.config import Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.taps import undisturbed
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.agreement import nearest_neighbors
from mimic_fast.progress import Event, Reporter, silent

_BATCH = 256
_MOST_IMAGES = 2048  # of the utility: its table of cosines grows with the square
_FEWEST_IMAGES = 12
# Where a block runs these after its last layer, they are beside the main path.
_BESIDE = {"downsample", "shortcut", "se"}


class FinePruningSettings(ContrastSettings):
    """Four of ten neighbors may change by pruning; then fine-tuning as by ``fine_tuning``."""

    utility_drop: float = Field(
        default=0.4,
        ge=0,
        lt=1,
        description="share of the suspect's 10 nearest neighbors that pruning may lose",
    )
    layer: str | None = Field(
        default=None,
        description="convolution or linear layer of the backbone whose input channels are pruned; "
        "None: the last one that runs, skip connections aside",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What was pruned.

    Args:
        kept: By input channel of the layer.
        utility: Share of the suspect's nearest neighbors that are left, 0..1.
    """

    kept: Bool[Tensor, " channel"]
    utility: float


def fine_pruning(
    settings: Settings,
    options: FinePruningSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Prunes and fine-tunes a copy of the suspect; gives the encoder's file below ``run.out``.

    Raises:
        UsageError: If there are fewer than 12 images, or the layer does not exist or cannot be
            pruned.
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do.
    """
    repair = open_repair(
        settings,
        kind="fine_pruning",
        report=report,
        stop=stop,
        batch_size=options.optim.batch_size,
    )
    encoder = repair.copy()
    name = options.layer or last_layer(encoder)
    layer = prunable_layer(encoder, name)
    pruned = prune(repair, encoder, layer, utility_drop=options.utility_drop)
    # The dead weights get no gradient: then neither step, momentum nor decay moves them from 0.
    mask = pruned.kept.view(1, -1, *(1,) * (layer.weight.ndim - 2))
    handle = layer.weight.register_hook(lambda gradient: gradient * mask)
    fine_tune(repair, encoder, options)
    handle.remove()
    facts = {
        "layer": name,
        "channels": len(pruned.kept),
        "pruned": int((~pruned.kept).sum()),
        "utility": pruned.utility,
    }
    return leave_repaired(repair, encoder, options, facts=facts)


def last_layer(encoder: Encoder) -> str:
    """The last convolution, not grouped, or linear layer that runs, below ``encoder.backbone``.

    Raises:
        UsageError: If there is none.
    """
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in encoder.backbone.named_modules()
        if _is_layer(module) and _BESIDE.isdisjoint(name.split("."))
    ]
    spec = encoder.spec
    image = encoder.mean.new_zeros(1, spec.in_channels, spec.image_size, spec.image_size)
    with undisturbed(encoder), torch.no_grad():
        encoder(image)
    for handle in handles:
        handle.remove()
    if not ran:
        raise UsageError(
            f"fine_pruning needs a convolution or a linear layer, {spec.architecture} runs none; "
            "give options.layer"
        )
    return ran[-1]


def prunable_layer(encoder: Encoder, name: str) -> nn.Conv2d | nn.Linear:
    """The layer of that name below ``encoder.backbone``, if a zeroed weight blinds it to a channel.

    Raises:
        UsageError: If it does not exist, is of another kind, or computes its weights from others.
    """
    layer = dict(encoder.backbone.named_modules()).get(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear) or not _is_layer(layer):
        raise UsageError(
            f"fine_pruning prunes what goes into a convolution, not grouped, or a linear layer; "
            f"options.layer {name!r} of {encoder.spec.architecture} is "
            f"{'missing' if layer is None else type(layer).__name__}; choose another"
        )
    channels = layer.weight.shape[1]
    if channels < 2:
        raise UsageError(f"layer {name!r} has one input channel, nothing to prune; choose another")
    # Layers that standardize their weights bring a zeroed one back.
    blind = copy.deepcopy(layer)
    sides: list[int] = []
    if isinstance(layer, nn.Conv2d):
        sides = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    probe = layer.weight.new_zeros(2, channels, *sides)
    probe[1, 0] = 1
    with torch.no_grad():
        blind.weight[:, 0] = 0
        black, excited = blind(probe)
    if not torch.equal(black, excited):
        raise UsageError(
            f"layer {name!r} ({type(layer).__name__}) recomputes its weights, so that pruned "
            "channels would come back; choose another as options.layer"
        )
    return layer


def prune(
    repair: Repair, encoder: Encoder, layer: nn.Conv2d | nn.Linear, *, utility_drop: float
) -> Pruned:
    """Zeroes, in place, what the layer takes from its least active input channels.

    The largest number of channels that keeps the utility, which is taken to fall with the number;
    one channel stays. Takes 1 + log2(channels) passes over the images.

    Args:
        repair: The clean images; told of progress.
        encoder: In eval mode, the suspect as yet.
        layer: Of the encoder.
        utility_drop: Share of the neighbors that may be lost.

    Raises:
        UsageError: If there are fewer than 12 images.
    """
    images = repair.images
    if len(images) < _FEWEST_IMAGES:
        raise UsageError(
            f"fine_pruning measures the 10 nearest neighbors and needs at least {_FEWEST_IMAGES} "
            f"clean images, got {len(images)}; raise data.clean_count"
        )
    activity, features = mean_activity(repair, encoder, layer)
    order = activity.argsort(stable=True)
    judged = images[:_MOST_IMAGES]
    neighbors = nearest_neighbors(features[:_MOST_IMAGES])
    weight = layer.weight.detach()
    whole = weight.clone()

    def cut(count: int) -> None:
        weight.copy_(whole)
        weight[:, order[:count]] = 0

    fits, too_many, best = 0, len(order), 1.0
    trial, trials = 0, math.ceil(math.log2(len(order)))
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        cut(count)
        same = nearest_neighbors(_features(repair, encoder, judged)) & neighbors
        share = float(same.sum() / neighbors.sum())
        if share >= 1 - utility_drop:
            fits, best = count, share
        else:
            too_many = count
        trial += 1
        metrics = {"pruned": float(count), "utility": share}
        repair.report(
            Event(phase="pruning", done=trial, total=trials, unit="trials", metrics=metrics)
        )
    cut(fits)
    kept = torch.ones_like(activity, dtype=torch.bool)
    kept[order[:fits]] = False
    return Pruned(kept=kept, utility=best)


def mean_activity(
    repair: Repair, encoder: Encoder, layer: nn.Conv2d | nn.Linear
) -> tuple[Float[Tensor, " channel"], Float[Tensor, "image feature"]]:
    """Mean absolute value of every input channel of the layer over clean images and positions.

    The features of the images come with it, from the same pass.

    Raises:
        UsageError: If the layer does not run.
    """
    total = torch.zeros(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device)
    seen = 0

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal seen
        rows = inputs[0].abs().movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1).flatten(0, -2)
        total.add_(rows.sum(0, dtype=torch.float64))
        seen += len(rows)

    handle = layer.register_forward_pre_hook(add)
    features = _features(repair, encoder, repair.images)
    handle.remove()
    if not seen:
        raise UsageError(
            "fine_pruning saw nothing go into the layer: the encoder does not call it as a module; "
            "choose another as options.layer"
        )
    return total / seen, features


@torch.no_grad()
def _features(
    repair: Repair, encoder: Encoder, images: Float[Tensor, "image channel height width"]
) -> Float[Tensor, "image feature"]:
    found = []
    for batch in images.split(_BATCH):
        repair.leave()
        found.append(encoder(batch))
    return torch.cat(found)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
