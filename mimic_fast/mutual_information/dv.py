"""The authors' estimator: a Donsker-Varadhan bound with one trained critic per layer.

I >= mean T(x, r) - log mean exp T(x, shuffled r), with T an MLP on a layer's flattened map and the
normalized features. Re-stated from the demo, github.com/wssun/MIMIC at 36ef47c
(models/scheduler.py, estimator/): batches in the order of the images without augmentation,
per-batch values clamped at 0, mean over the last 10 epochs. Departs from it in two ways: logsumexp
does not overflow where the demo counts the batch as 0, and every draw comes from a generator of the
layer's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mimic_fast.mutual_information.jackknife import student_quantile

_WIDTH = 512
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 1e-5
LAST_EPOCHS = 10


class Critic(nn.Sequential):
    """T(x, r): three linear layers with ReLU, drawn from ``generator`` as torch draws its own."""

    def __init__(self, inputs: int, *, generator: torch.Generator) -> None:
        sizes = ((inputs, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, 1))
        first, second, last = (_linear(a, b, generator) for a, b in sizes)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), last)


Bound = Callable[[Critic, Tensor, Tensor, torch.Generator], Tensor]


def donsker_varadhan(
    joint: Float[Tensor, " pair"], shuffled: Float[Tensor, " shuffled_pair"]
) -> Float[Tensor, ""]:
    """The bound from the critic's values on true pairs and on shuffled ones, nats."""
    return joint.mean() - (shuffled.logsumexp(dim=0) - math.log(len(shuffled)))


def dv_bound(
    critic: Critic,
    maps: Float[Tensor, "image value"],
    features: Float[Tensor, "image feature"],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """The bound of one batch, whose features are shuffled by ``generator``."""
    order = torch.randperm(len(features), generator=generator).to(features.device)
    joint = critic(torch.cat([maps, features], dim=1))
    shuffled = critic(torch.cat([maps, features[order]], dim=1))
    return donsker_varadhan(joint[:, 0], shuffled[:, 0])


def train_critic(
    maps: Float[Tensor, "image value"],
    features: Float[Tensor, "image feature"],
    *,
    epochs: int,
    batch: int,
    seed: int,
    device: torch.device,
    poll: Callable[[], None],
    bound: Bound = dv_bound,
) -> Float64[Tensor, " last_epoch"]:
    """Trains one layer's critic and evaluates it after each of the last 10 epochs.

    Args:
        maps: The layer's flattened feature maps.
        features: Features of the same images; normalized here.
        epochs: Passes over the images.
        batch: Images per step, at most all of them.
        seed: Decides the result alone; the global random state is neither read nor changed.
        device: Where the critic is trained.
        poll: Called before every epoch; may raise.
        bound: What a batch is trained for, and its value.

    Returns:
        Mean of the clamped batch values, nats, for each of the last epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    critic = Critic(maps.shape[1] + features.shape[1], generator=generator).to(device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    data = list(zip(maps.split(batch), F.normalize(features, dim=1).split(batch), strict=True))
    data = [(x, r) for x, r in data if len(x) > 1]  # a single image cannot be shuffled
    values = []
    for epoch in range(epochs):
        poll()
        with torch.enable_grad():
            for x, r in data:
                optimizer.zero_grad()
                (-bound(critic, x.to(device), r.to(device), generator)).backward()
                optimizer.step()
        if epoch >= epochs - LAST_EPOCHS:
            with torch.no_grad():
                bounds = [bound(critic, x.to(device), r.to(device), generator) for x, r in data]
            values.append(torch.stack(bounds).double().clamp(min=0).mean().cpu())
    return torch.stack(values)


@dataclass(frozen=True, kw_only=True, slots=True)
class DvValue:
    """The mean over the last epochs, and where a single epoch's value lies in 95 of 100 cases.

    The interval shows how much the training still moves; it knows nothing of the choice of images.
    """

    value: float
    low: float
    high: float


def dv_value(epochs: Float64[Tensor, " last_epoch"]) -> DvValue:
    """Summary of :func:`train_critic`."""
    value = float(epochs.mean())
    spread = 0.0
    if len(epochs) > 1:
        spread = student_quantile(len(epochs) - 1) * float(epochs.std())
    return DvValue(value=value, low=value - spread, high=value + spread)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(inputs)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer
