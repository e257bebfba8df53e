"""How much the student agrees with the teacher on clean images: needs neither labels nor a trigger.

Measured on the held-out part of the clean set, which the student never trained on.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.metrics import Measure, mean_measure, t_quantile

_NEIGHBORS = 10
_GROUPS = 20  # of the delete-group jackknife, as for mutual information
_MAX_IMAGES = 2048  # keeps the n x n tables of neighbors and CKA to seconds and 0.1 GB


def agreement(
    teacher_features: Float[Tensor, "image feature"],
    student_features: Float[Tensor, "image feature"],
) -> dict[str, Measure]:
    """Cosine, overlap of the 10 nearest neighbors, and linear CKA, each with a 95 % interval.

    ``cosine`` is the mean over images (t interval). ``knn_overlap_10`` is the mean share of an
    image's 10 nearest neighbors (by cosine, itself excluded) that both encoders name; chance
    is 10 / (n - 1). ``linear_cka`` is the debiased form (Kornblith et al., ICML 2019, with HSIC of
    Song et al., JMLR 2012): the plain form tends to 1 for unrelated features once there are more
    features than images. The last two have delete-group jackknife intervals, clipped to 0..1, and
    use the first 2,048 images.

    A measure that the number of images does not allow (fewer than 12 for neighbors, 8 for CKA) is
    absent.

    Args:
        teacher_features: One row per image.
        student_features: The same images, in the same order.

    Raises:
        UsageError: If fewer than two images are given.
    """
    if len(teacher_features) < 2:
        raise UsageError("agreement needs at least 2 held-out images; raise data.hold_out")
    teacher, student = teacher_features.double(), student_features.double()
    measures = {"cosine": mean_measure(F.cosine_similarity(teacher, student, dim=1))}
    teacher, student = teacher[:_MAX_IMAGES], student[:_MAX_IMAGES]
    n = len(teacher)
    # Every jackknife sample must keep more than 10 neighbors, and 4 images for CKA's n (n - 3).
    if n - math.ceil(n / min(_GROUPS, n)) > _NEIGHBORS:
        measures["knn_overlap_10"] = knn_overlap(teacher, student)
    if n >= 8:
        measures["linear_cka"] = linear_cka(teacher, student)
    return measures


def knn_overlap(
    teacher: Float[Tensor, "image feature"], student: Float[Tensor, "image other_feature"]
) -> Measure:
    """Mean share of common members among the 10 nearest neighbors; at least 12 images."""
    tables = [_cosines(teacher), _cosines(student)]

    def overlap(kept: Tensor) -> float:
        named = [_neighbor_flags(table[kept][:, kept]) for table in tables]
        return float((named[0] & named[1]).sum(1).double().mean()) / _NEIGHBORS

    return _clipped(_jackknife(overlap, len(teacher)))


def nearest_neighbors(features: Float[Tensor, "image feature"]) -> Bool[Tensor, "image image"]:
    """Whether the column's image is one of the row's 10 nearest by cosine; at least 11 images."""
    return _neighbor_flags(_cosines(features))


def linear_cka(
    teacher: Float[Tensor, "image feature"], student: Float[Tensor, "image other_feature"]
) -> Measure:
    """Debiased linear centered kernel alignment; at least 8 images. 0 where a side is constant."""
    tables = [_centered(x) @ _centered(x).T for x in (teacher, student)]

    def alignment(kept: Tensor) -> float:
        a, b = (table[kept][:, kept].clone().fill_diagonal_(0) for table in tables)
        product = _hsic(a, a) * _hsic(b, b)
        return _hsic(a, b) / math.sqrt(product) if product > 0 else 0.0

    return _clipped(_jackknife(alignment, len(teacher)))


def _hsic(a: Float[Tensor, "image image"], b: Float[Tensor, "image image"]) -> float:
    """Unbiased HSIC of two kernels with zero diagonals, times n (n - 3) (Song et al., eq. 5)."""
    n = len(a)
    value = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(value - 2 / (n - 2) * (a.sum(0) @ b.sum(1)))


def _jackknife(statistic: Callable[[Tensor], float], n: int) -> Measure:
    """The statistic of all images, with a delete-group jackknife interval.

    Images are dealt to groups in turn, so that an ordered set does not put one class in one group.
    """
    groups = min(_GROUPS, n)
    owner = torch.arange(n) % groups
    value = statistic(torch.arange(n))
    left = torch.tensor(
        [statistic((owner != group).nonzero()[:, 0]) for group in range(groups)],
        dtype=torch.float64,
    )
    variance = (groups - 1) / groups * float((left - left.mean()).square().sum())
    half = t_quantile(groups - 1) * math.sqrt(variance)
    return Measure(value=value, low=value - half, high=value + half, n=n)


def _clipped(measure: Measure) -> Measure:
    value, low, high = (
        min(max(number, 0.0), 1.0) for number in (measure.value, measure.low, measure.high)
    )
    return Measure(value=value, low=low, high=high, n=measure.n)


def _cosines(features: Float[Tensor, "image feature"]) -> Float[Tensor, "image image"]:
    normalized = F.normalize(features, dim=1)
    return (normalized @ normalized.T).fill_diagonal_(-torch.inf)


def _neighbor_flags(cosines: Float[Tensor, "image image"]) -> Tensor:
    nearest = cosines.topk(_NEIGHBORS, dim=1).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, nearest, True)


def _centered(features: Float[Tensor, "image feature"]) -> Float[Tensor, "image feature"]:
    """Centered and scaled: neither changes CKA, both keep its sums small."""
    centered = features - features.mean(0)
    norm = centered.norm()
    return centered / norm if norm > 0 else centered
