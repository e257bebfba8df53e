"""The MLP that the authors of MIMIC and BadEncoder put on frozen features.

Widths 512 and 256 with ReLU, dropout 0.5 between them, Adam 1e-4, batch 64. Features are
standardized first, as for the linear probe, so that their scale does not set the learning rate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mimic_fast.evaluation.probes import check_labels, standardization
from mimic_fast.watch import leave_if

_WIDTHS = (512, 256)
_DROPOUT = 0.5
_RATE = 1e-4
_BATCH = 64
_CHUNK = 8192  # rows classified at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpProbe:
    """A small network on standardized features, in float32.

    Args:
        mean: Of every feature over the training images.
        scale: Standard deviation, infinite where a feature is constant.
        network: Standardized features to logits, in eval mode.
        train_images: Labeled images it was fitted on.
    """

    mean: Float[Tensor, "feature"]
    scale: Float[Tensor, "feature"]
    network: nn.Module
    train_images: int

    def predict(self, features: Float[Tensor, "image feature"]) -> Int64[Tensor, "image"]:
        """Most likely class of every row."""
        with torch.no_grad():
            rows = (self._standardized(part) for part in features.split(_CHUNK))
            return torch.cat([self.network(part).argmax(1) for part in rows])

    def _standardized(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) / self.scale).float()


def fit_mlp_probe(
    features: Float[Tensor, "image feature"],
    labels: Int64[Tensor, "image"],
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> MlpProbe:
    """Trains the network; the same arguments give the same one.

    Args:
        features: Frozen features of the labeled images.
        labels: Class indices.
        num_classes: Number of classes, absent ones included.
        epochs: Passes over the images.
        seed: Of weights, order and dropout.
        stop: Polled every step; true leaves.

    Raises:
        UsageError: If there are no images or a label is out of range.
        StoppedError: If ``stop`` told so.
    """
    check_labels(features, labels, num_classes)
    mean, scale = standardization(features)
    x = ((features.double() - mean) / scale).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _network(x.shape[1], num_classes)
        optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(_BATCH):
                leave_if(stop)
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), labels[rows]).backward()
                optimizer.step()
    return MlpProbe(
        mean=mean,
        scale=scale,
        network=network.eval().requires_grad_(False),
        train_images=len(features),
    )


def _network(width: int, num_classes: int) -> nn.Sequential:
    first, second = _WIDTHS
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(_DROPOUT),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, num_classes),
    )
