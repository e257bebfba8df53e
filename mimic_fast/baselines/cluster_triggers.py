"""Clusters of clean features and the smallest trigger that moves images into each of them.

The detector of SSL-Cleanse (Zheng et al., ECCV 2024, arXiv:2303.09079); ``ssl_cleanse`` says what
departs from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mimic_fast.errors import UsageError

_LEARNING_RATE, _BETAS = 0.1, (0.5, 0.9)
_FACTOR = 1.5  # of the penalty, up and down
_GAUSSIAN = 1.4826  # deviations in a median absolute deviation, of a normal distribution
_TRIES, _ROUNDS = 10, 100  # of K-means


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Clean features and their clusters.

    Args:
        mean: Mean feature, from which all are seen.
        labels: Cluster of each image, on the CPU.
        centers: Means of unit vectors.
    """

    mean: Float[Tensor, " feature"]
    labels: Int64[Tensor, " image"]
    centers: Float[Tensor, "cluster feature"]

    def place(self, features: Float[Tensor, "image feature"]) -> Float[Tensor, "image feature"]:
        """Unit vectors as seen from the mean."""
        return F.normalize(features.float() - self.mean, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How hard it is tried.

    Args:
        steps: Steps in all.
        batch_size: Images of a step for each cluster.
        success: Share of images to move, 0..1.
        penalty: Of the mask's mean, at the start.
        patience: Steps between changes of the penalty.
        seed: Draws starts and batches.
    """

    steps: int
    batch_size: int
    success: float
    penalty: float
    patience: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted:
    """The smallest trigger of each cluster.

    Args:
        sizes: Means of the masks; 1 where no trigger moved enough images.
        masks: Opacity.
        patterns: What is pasted.
    """

    sizes: Float[Tensor, " cluster"]
    masks: Float[Tensor, "cluster 1 height width"]
    patterns: Float[Tensor, "cluster channel height width"]


def cluster(
    features: Float[Tensor, "image feature"], count: int, *, seed: int, device: torch.device
) -> Clusters:
    """K-means of the features' directions, the best of ten starts by k-means++.

    Raises:
        UsageError: If fewer than ``count`` images differ.
    """
    mean = features.mean(0)
    points = F.normalize(features - mean, dim=1)
    draw = torch.Generator().manual_seed(seed)
    tries = [_k_means(points, count, draw) for _ in range(_TRIES)]
    labels, centers, _ = min(tries, key=lambda one: one[2])
    return Clusters(mean=mean.to(device), labels=labels, centers=centers.to(device))


def invert_clusters(
    encoder: Callable[[Tensor], Tensor],
    images: Float[Tensor, "image channel height width"],
    clusters: Clusters,
    schedule: Schedule,
    *,
    tick: Callable[[int, Mapping[str, Tensor]], None],
) -> Inverted:
    """Searches each cluster's smallest trigger, all side by side; asks nothing of the host.

    Minimizes the squared distance to the cluster's center plus a penalty times the mask's mean. The
    penalty grows while enough images are nearest to that center, and falls while they are not.

    Args:
        encoder: Images to features; its weights want no gradients.
        images: In [0, 1], on the device, those that were clustered.
        clusters: Of their features.
        schedule: Steps, batches, penalty.
        tick: Told the step's number and means over clusters.
    """
    device, (channels, height, width) = images.device, images.shape[1:]
    draw = torch.Generator().manual_seed(schedule.seed)
    count, batch = len(clusters.centers), schedule.batch_size
    masks, patterns = (
        torch.logit(torch.rand(count, planes, height, width, generator=draw), eps=1e-6)
        .to(device)
        .requires_grad_()
        for planes in (1, channels)
    )
    optimizer = torch.optim.Adam([masks, patterns], _LEARNING_RATE, betas=_BETAS)
    own = torch.arange(count, device=device)
    others = (clusters.labels[None] != torch.arange(count)[:, None]).double()
    penalty = torch.full((count,), schedule.penalty, device=device)
    moved = torch.zeros(count, device=device)
    best = Inverted(
        sizes=torch.ones(count, device=device),
        masks=torch.ones_like(masks),
        patterns=patterns.detach().sigmoid(),
    )
    for step in range(schedule.steps):
        ids = torch.multinomial(others, batch, replacement=True, generator=draw).to(device)
        mask, pattern = masks.sigmoid(), patterns.sigmoid()
        triggered = images[ids] * (1 - mask[:, None]) + (pattern * mask)[:, None]
        points = clusters.place(encoder(triggered.flatten(0, 1)))
        nearest = torch.cdist(points.detach(), clusters.centers).argmin(1).view(count, batch)
        moved += (nearest == own[:, None]).float().mean(1)
        goal = clusters.centers.repeat_interleave(batch, 0)
        distance = (points - goal).square().sum(1).view(count, batch).mean(1)
        sizes = mask.mean((1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        (distance + penalty * sizes).sum().backward()
        optimizer.step()
        if (step + 1) % schedule.patience == 0:
            enough = moved / schedule.patience >= schedule.success
            best = _smaller(best, sizes.detach(), mask.detach(), pattern.detach(), enough=enough)
            penalty = torch.where(enough, penalty * _FACTOR, penalty / _FACTOR)
            moved.zero_()
        tick(step, {"distance": distance.detach().mean(), "size": sizes.detach().mean()})
    return best


def anomaly_indices(sizes: Float[Tensor, " cluster"]) -> Float[Tensor, " cluster"]:
    """How far each size lies below the median, in normalized median absolute deviations.

    Returns:
        In float64 on the CPU; 0 for sizes at or above the median, at most 1e6.
    """
    sizes = sizes.double().cpu()
    middle = sizes.quantile(0.5)
    spread = (sizes - middle).abs().quantile(0.5) * _GAUSSIAN
    # Where more than half of the sizes are equal any other one is an outlier.
    return ((middle - sizes).clamp_min(0) / spread.clamp_min(1e-6)).clamp_max(1e6)


def _smaller(
    best: Inverted, sizes: Tensor, masks: Tensor, patterns: Tensor, *, enough: Tensor
) -> Inverted:
    better = enough & (sizes < best.sizes)
    wide = better[:, None, None, None]
    return Inverted(
        sizes=torch.where(better, sizes, best.sizes),
        masks=torch.where(wide, masks, best.masks),
        patterns=torch.where(wide, patterns, best.patterns),
    )


def _k_means(
    points: Float[Tensor, "image feature"], count: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Labels, centers and inertia."""
    centers = points[torch.randint(len(points), (1,), generator=draw)]
    while len(centers) < count:
        far = torch.cdist(points, centers).amin(1).square()
        # float32 rounding leaves distances of about 1e-3 between equal unit vectors in cdist
        far = torch.where(far > 1e-5, far, 0)
        if not bool(far.any()):
            raise UsageError(
                f"ssl_cleanse was asked for {count} clusters, but the features of the clean images "
                f"have {len(centers)} directions; give more images or fewer options.clusters"
            )
        centers = torch.cat([centers, points[torch.multinomial(far, 1, generator=draw)]])
    labels = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        nearest, now = torch.cdist(points, centers).min(1)
        # A cluster that lost all its points takes the one that is worst off.
        for empty in set(range(count)) - set(now.tolist()):
            now[int(nearest.argmax())], nearest[int(nearest.argmax())] = empty, -1.0
        if torch.equal(now, labels):
            break
        labels = now
        members = F.one_hot(labels, count).to(points)
        centers = (members.T @ points) / members.sum(0)[:, None]
    return labels, centers, float((points - centers[labels]).square().sum())
