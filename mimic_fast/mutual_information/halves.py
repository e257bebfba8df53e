"""From the two measured halves of a cross-fit to one estimate with its interval and noise floor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mimic_fast.mutual_information.jackknife import jackknife_variance, student_quantile
from mimic_fast.mutual_information.result import LayerEstimate

_ONE_SIDED_95 = 1.645  # normal quantile


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfEstimate:
    """One measured half.

    Args:
        total: The estimate, nats.
        without_group: The same without each jackknife group of images.
        shuffled: The same of shuffled pairings.
        pairs: Pairs of directions measured.
        most_capped: Pairs that would be capped if the features followed from the layer.
        capped: Pairs that are.
    """

    total: float
    without_group: Float64[Tensor, " group"]
    shuffled: Float64[Tensor, " shuffle"]
    pairs: int
    most_capped: int
    capped: int


def combine_halves(name: str, halves: Sequence[HalfEstimate], bins: int | None) -> LayerEstimate:
    """The mean of the halves, whose images are different ones: their variances add."""
    raw = sum(half.total for half in halves) / len(halves)
    variance = sum(jackknife_variance(half.without_group) for half in halves) / len(halves) ** 2
    degrees = sum(len(half.without_group) - 1 for half in halves)
    reach = student_quantile(degrees) * math.sqrt(variance)
    shuffled = torch.stack([half.shuffled for half in halves]).mean(dim=0)
    most_capped = max(half.most_capped for half in halves)
    capped = sum(half.capped for half in halves) / len(halves)
    return LayerEstimate(
        tap=name,
        raw=raw,
        low=raw - reach,
        high=raw + reach,
        noise_floor=float(shuffled.mean() + _ONE_SIDED_95 * shuffled.std()),
        pairs=max(half.pairs for half in halves),
        bins=bins,
        determines_features=most_capped > 0 and capped >= most_capped / 2,
    )
