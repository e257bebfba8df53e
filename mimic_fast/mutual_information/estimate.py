"""The histogram estimator: the nats that each layer and the features have in common.

Canonical pairs, equal-mass bins, integer counts over all images, a Gaussian as control variate, and
a delete-group jackknife (method page, section 2). Process 0 does all floating-point work and hands
out bin codes; every process counts its share of the images, and only integers are added up: the
result is the same to the last bit for any number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.distributed import SINGLE, Processes, broadcast_json
from mimic_fast.mutual_information.activations import check_finite
from mimic_fast.mutual_information.canonical import (
    Fold,
    Projection,
    canonical_pairs,
    coordinates,
    cross_fit_folds,
    whiten,
)
from mimic_fast.mutual_information.counting import count_pairs, jackknife_group
from mimic_fast.mutual_information.gaussian_table import LARGEST_CORRELATION, gaussian_table
from mimic_fast.mutual_information.histogram import choose_bins
from mimic_fast.mutual_information.jackknife import jackknife_variance, student_quantile
from mimic_fast.mutual_information.pairs import (
    pair_information,
    score_correlations,
    shuffled_information,
)
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.progress import Event, Reporter, silent

_ONE_SIDED_95 = 1.645  # normal quantile

Coordinates = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _HalfEstimate:
    """One measured half: its total, and the same without each group or on shuffled pairings."""

    total: float
    without_group: Float64[Tensor, " group"]
    shuffled: Float64[Tensor, " shuffle"]
    pairs: int
    capped: int


def estimate_histogram(
    layers: Sequence[Float[Tensor, "image _"]],
    features: Float[Tensor, "image feature"],
    settings: MutualInformationSettings,
    *,
    names: Sequence[str],
    seed: int,
    processes: Processes = SINGLE,
    report: Reporter = silent,
) -> list[LayerEstimate]:
    """Mutual information of every layer with the features.

    Args:
        layers: Pooled activations of the same images, one entry per layer; widths may differ.
        features: The encoder's features.
        settings: Components, bins, shuffles, jackknife groups.
        names: Name of each layer.
        seed: Draws the two halves of the cross-fit.
        processes: All of them must call, with the same tensors.
        report: Told after every layer.

    Raises:
        SelfTestError: If a layer or the features are not finite, or there are too few images for
            the bins.
    """
    check_finite((*layers, features), (*names, "features"))
    bins = choose_bins(settings.bins, len(features) // 2, force=settings.force)
    folds = cross_fit_folds(len(features), seed=seed)
    whitenings = _whitenings(features, folds, settings, processes)
    estimates = []
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        halves = []
        for fold, whitening in zip(folds, whitenings, strict=True):
            sides = whitening and _pair_up(layer, features, fold, whitening, settings.components)
            half = _measure(sides, bins, len(fold.measured), settings, processes)
            halves += [] if half is None else [half]
        estimates += [_combine(name, halves, bins)] if halves else []
        report(Event(phase="estimate", done=index + 1, total=len(layers), unit="layers"))
    shared = broadcast_json([asdict(estimate) for estimate in estimates], processes)
    return [LayerEstimate(**estimate) for estimate in shared]


def _whitenings(
    features: Tensor,
    folds: tuple[Fold, ...],
    settings: MutualInformationSettings,
    processes: Processes,
) -> list[Projection | None]:
    if not processes.is_main:
        return [None for _ in folds]
    return [whiten(features[fold.fit], components=settings.components) for fold in folds]


def _pair_up(
    layer: Tensor, features: Tensor, fold: Fold, features_whitening: Projection, components: int
) -> Coordinates:
    """Coordinates of the measured half along the pairs fitted on the other half."""
    fit_layer, fit_features = layer[fold.fit], features[fold.fit]
    of_layer, of_features = canonical_pairs(
        fit_layer,
        fit_features,
        layer_whitening=whiten(fit_layer, components=components),
        features_whitening=features_whitening,
    )
    measured = fold.measured
    return coordinates(layer[measured], of_layer), coordinates(features[measured], of_features)


def _measure(
    sides: Coordinates | None,
    bins: int,
    images: int,
    settings: MutualInformationSettings,
    processes: Processes,
) -> _HalfEstimate | None:
    """The nats of one measured half, on process 0; the others only count."""
    num_groups = min(settings.jackknife_groups, images)
    counts = count_pairs(
        sides,
        bins=bins,
        num_groups=num_groups,
        shuffles=settings.shuffles,
        processes=processes,
    )
    if sides is None:
        return None
    groups = jackknife_group(images, num_groups=num_groups)
    r = score_correlations(*sides, groups, num_groups=num_groups)
    totals = pair_information(counts.groups, r, gaussian_table(bins, images)).sum(dim=1)
    return _HalfEstimate(
        total=float(totals[0]),
        without_group=totals[1:],
        shuffled=shuffled_information(counts.shuffled),
        pairs=r.shape[1],
        capped=int((r[0] > LARGEST_CORRELATION).sum()),
    )


def _combine(name: str, halves: Sequence[_HalfEstimate], bins: int) -> LayerEstimate:
    """The mean of the halves, whose images are different ones: their variances add."""
    raw = sum(half.total for half in halves) / len(halves)
    variance = sum(jackknife_variance(half.without_group) for half in halves) / len(halves) ** 2
    degrees = sum(len(half.without_group) - 1 for half in halves)
    reach = student_quantile(degrees) * math.sqrt(variance)
    shuffled = torch.stack([half.shuffled for half in halves]).mean(dim=0)
    pairs = max(half.pairs for half in halves)
    capped = sum(half.capped for half in halves) / len(halves)
    return LayerEstimate(
        tap=name,
        raw=raw,
        low=raw - reach,
        high=raw + reach,
        noise_floor=float(shuffled.mean() + _ONE_SIDED_95 * shuffled.std()),
        pairs=pairs,
        bins=bins,
        determines_features=pairs > 0 and capped >= pairs / 2,
    )
