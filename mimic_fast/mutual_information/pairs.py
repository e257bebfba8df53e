"""Nats of canonical pairs from their counts, corrected with the Gaussian as control variate.

Per pair I = g(r) + (binned - b(r)) with the table of ``gaussian_table.py``: no bias for Gaussian
pairs up to the error of r, and the histogram adds what is not Gaussian. Above r = .99 the pair is
given g(r); no pair exceeds the entropy of its bins, log K.
"""

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from mimic_fast.mutual_information.gaussian_table import (
    LARGEST_CORRELATION,
    GaussianTable,
    gaussian_information,
    normal_scores,
)
from mimic_fast.mutual_information.histogram import (
    chance_information,
    margin_entropy,
)
from mimic_fast.ops import counted_information


def score_correlations(
    x: Float[Tensor, "pair image"],
    y: Float[Tensor, "pair image"],
    groups: Int64[Tensor, " image"],
    *,
    num_groups: int,
) -> Float64[Tensor, "replicate pair"]:
    """|r| of every pair from normal scores: of all images, then without each group in turn.

    r^2 = max(0, r_s^2 - 1/n) takes off what chance adds to the squared correlation of scores. The
    scores are those of all images throughout, as the bins are.
    """
    a, b = normal_scores(x), normal_scores(y)
    member = torch.nn.functional.one_hot(groups, num_groups).double()
    moments = torch.stack([a * b, a, b, a * a, b * b, torch.ones_like(a)]) @ member
    whole = moments.sum(dim=-1, keepdim=True)
    ab, a1, b1, aa, bb, count = torch.cat([whole, whole - moments], dim=-1).transpose(1, 2)
    count = count.clamp(min=1)
    spread = (aa - a1 * a1 / count) * (bb - b1 * b1 / count)
    squared = (ab - a1 * b1 / count).square() / spread
    squared = torch.where(spread > 0, squared, 0.0)  # a side that is constant here
    return (squared - 1 / x.shape[1]).clamp(0, 1).sqrt()


def pair_information(
    groups: Int[Tensor, "group pair bins bins"],
    correlations: Float64[Tensor, "replicate pair"],
    table: GaussianTable,
) -> Float64[Tensor, "replicate pair"]:
    """Corrected information of every pair: from all images, then without each group in turn, nats.

    The chance level is that of all images throughout: what leaving a group out adds to it is the
    same for every group and cancels in the jackknife.
    """
    whole = groups.sum(dim=0, keepdim=True)
    counts = torch.cat([whole, whole - groups])
    x_margin, y_margin = counts.sum(dim=-1), counts.sum(dim=-2)
    chance = chance_information(x_margin[0], y_margin[0])
    corrected = counted_information(counts) - chance + table.loss(correlations)
    capped = gaussian_information(correlations)
    value = torch.where(correlations <= LARGEST_CORRELATION, corrected, capped)
    return value.minimum(margin_entropy(x_margin)).minimum(margin_entropy(y_margin))


def shuffled_information(
    shuffled: Int[Tensor, "shuffle pair bins bins"],
) -> Float64[Tensor, " shuffle"]:
    """What the bins show of shuffled pairings beyond chance, summed over pairs: noise, nats."""
    first = shuffled[0]
    chance = chance_information(first.sum(dim=-1), first.sum(dim=-2))
    return (counted_information(shuffled) - chance).sum(dim=1)
