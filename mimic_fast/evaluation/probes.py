"""Probes: simple classifiers on frozen features, deterministic, to compare encoders and not luck.

The linear probe is multinomial logistic regression; the kNN probe votes by cosine similarity
(k = min(200, n/2), temperature 0.5), as usual for self-supervised encoders. The MLP, which the
authors of MIMIC use, is in ``mlp_probe``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mimic_fast.errors import UsageError
from mimic_fast.watch import leave_if

_MAX_ITERATIONS = 500
_CONSTANT = 1e-6  # a feature that varies less, relatively, is float32 rounding: left out
_SINGULAR = 1e-9  # of the largest curvature: what is flatter is taken as this
_CHUNK = 2048  # rows classified at a time; bounds the similarity table of kNN


@runtime_checkable
class Probe(Protocol):
    """A fitted classifier of features."""

    @property
    def train_images(self) -> int:
        """Labeled images it was fitted on."""
        ...

    def predict(self, features: Float[Tensor, "image feature"]) -> Int64[Tensor, "image"]:
        """Class of every row."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe:
    """Logistic regression on standardized features, in float64.

    Args:
        mean: Of every feature over the training images.
        scale: Standard deviation, infinite where a feature is constant.
        weight: One row per class.
        bias: One value per class.
        train_images: Labeled images it was fitted on.
    """

    mean: Float[Tensor, "feature"]
    scale: Float[Tensor, "feature"]
    weight: Float[Tensor, "num_classes feature"]
    bias: Float[Tensor, "num_classes"]
    train_images: int

    def predict(self, features: Float[Tensor, "image feature"]) -> Int64[Tensor, "image"]:
        """Most likely class of every row."""
        chunks = (rows.double() for rows in features.split(_CHUNK))
        return torch.cat(
            [
                (((rows - self.mean) / self.scale) @ self.weight.T + self.bias).argmax(1)
                for rows in chunks
            ]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnProbe:
    """Votes of the nearest training images, weighted by exp(cosine / temperature).

    Args:
        bank: Normalized training features.
        labels: Their classes.
        num_classes: Number of classes.
        neighbors: Images that vote.
        temperature: Of the weights.
        train_images: Labeled images in the bank.
    """

    bank: Float[Tensor, "train feature"]
    labels: Int64[Tensor, "train"]
    num_classes: int
    neighbors: int
    temperature: float
    train_images: int

    def predict(self, features: Float[Tensor, "image feature"]) -> Int64[Tensor, "image"]:
        """Class with most votes for every row."""
        return torch.cat([self._vote(rows) for rows in features.split(_CHUNK)])

    def _vote(self, rows: Tensor) -> Tensor:
        similarity, index = (F.normalize(rows.float(), dim=1) @ self.bank.T).topk(self.neighbors)
        votes = similarity.new_zeros(len(rows), self.num_classes)
        votes.scatter_add_(1, self.labels[index], (similarity / self.temperature).exp())
        return votes.argmax(1)


def fit_linear_probe(
    features: Float[Tensor, "image feature"],
    labels: Int64[Tensor, "image"],
    *,
    num_classes: int,
    l2: float,
    stop: Callable[[], bool] = lambda: False,
) -> LinearProbe:
    """Minimizes mean cross-entropy + l2/2 ||weight||^2 (bias free) by L-BFGS from zero, in float64.

    Convex, so the same features give the same probe; no seed is involved. The search runs in the
    coordinates in which the curvature at zero is the identity: the minimum is the same one, found
    in far fewer passes over the images where features are correlated.

    Args:
        features: Frozen features of the labeled images.
        labels: Class indices.
        num_classes: Number of classes, absent ones included.
        l2: Penalty on the weights of standardized features, dimensionless.
        stop: Polled every iteration; true leaves.

    Raises:
        UsageError: If there are no images or a label is out of range.
        StoppedError: If ``stop`` told so.
    """
    check_labels(features, labels, num_classes)
    mean, scale = standardization(features)
    x = (features.double() - mean) / scale
    inverse_root = _inverse_root(x, num_classes, l2)
    x = x @ inverse_root
    turned = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [turned, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        leave_if(stop)
        optimizer.zero_grad()
        weight = turned @ inverse_root
        loss = F.cross_entropy(x @ turned.T + bias, labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(
        mean=mean,
        scale=scale,
        weight=turned.detach() @ inverse_root,
        bias=bias.detach(),
        train_images=len(features),
    )


def fit_knn_probe(
    features: Float[Tensor, "image feature"], labels: Int64[Tensor, "image"], *, num_classes: int
) -> KnnProbe:
    """Keeps the normalized features; k = min(200, n/2), temperature 0.5.

    Raises:
        UsageError: If there are no images or a label is out of range.
    """
    check_labels(features, labels, num_classes)
    return KnnProbe(
        bank=F.normalize(features.float(), dim=1),
        labels=labels,
        num_classes=num_classes,
        neighbors=max(1, min(200, len(features) // 2)),
        temperature=0.5,
        train_images=len(features),
    )


def standardization(
    features: Float[Tensor, "image feature"],
) -> tuple[Float[Tensor, "feature"], Float[Tensor, "feature"]]:
    """Mean and standard deviation of every feature in float64.

    The latter is infinite where a feature is constant: standardized it is 0, wherever it goes
    later.
    """
    x = features.double()
    deviation = x.std(0, correction=0)
    return x.mean(0), torch.where(deviation > _CONSTANT * x.abs().amax(0), deviation, torch.inf)


def check_labels(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuses what no probe can be fitted on.

    Raises:
        UsageError: If there are no images or a label is out of range.
    """
    if not len(features):
        raise UsageError("a probe needs labeled images; got none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UsageError(f"labels must lie in 0..{num_classes - 1}, got {low}..{high}")


def _inverse_root(x: Tensor, num_classes: int, l2: float) -> Tensor:
    """(X^T X / (n K) + l2)^(-1/2): the curvature of the loss at zero, up to the classes' mean."""
    values, vectors = torch.linalg.eigh(x.T @ x / (len(x) * num_classes))
    floor = values.amax().clamp(min=1.0) * _SINGULAR  # directions without images, unpenalized
    return vectors * (values + l2).clamp(min=floor).rsqrt() @ vectors.T
