"""The histogram estimator: the nats that each layer and the features have in common.

Pairs of directions (``pair_forms.py``; canonical by default), equal-mass bins, integer counts over
all images, a Gaussian as control variate, and a delete-group jackknife (method page, section 2).
Process 0 does all floating-point work and hands out bin codes; every process counts its share of
the images, and only integers are added up: the result is the same to the last bit for any number of
processes.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.distributed import SINGLE, Processes, broadcast_json
from mimic_fast.mutual_information.activations import check_finite
from mimic_fast.mutual_information.canonical import Fold, Projection, cross_fit_folds, whiten
from mimic_fast.mutual_information.counting import (
    PairCounts,
    bin_codes,
    count_crossed,
    count_matched,
    jackknife_group,
)
from mimic_fast.mutual_information.gaussian_table import LARGEST_CORRELATION, gaussian_table
from mimic_fast.mutual_information.halves import HalfEstimate, combine_halves
from mimic_fast.mutual_information.histogram import choose_bins
from mimic_fast.mutual_information.pair_forms import (
    Sides,
    canonical_sides,
    principal_sides,
    sliced_sides,
)
from mimic_fast.mutual_information.pairs import (
    pair_information,
    score_correlations,
    shuffled_information,
)
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.progress import Event, Reporter, silent

_BLOCK = 512  # pairs whose counts are held at once, where they can be many


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
    """Mutual information of every layer with the features, or what ``settings.pairs`` has for it.

    Only canonical pairs estimate the mutual information. The sum over crossed pairs and the mean
    over slices do not (:mod:`~mimic_fast.mutual_information.pair_forms`): of those, compare layers.

    Args:
        layers: Pooled activations of the same images, one entry per layer; widths may differ.
        features: The encoder's features.
        settings: Pairs, slices, components, bins, shuffles, jackknife groups.
        names: Name of each layer.
        seed: Draws the two halves of the cross-fit, and slices.
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
            sides = whitening and _sides(layer, features, fold, whitening, settings, seed=seed)
            half = _measure(sides, bins, settings, processes)
            halves += [] if half is None else [half]
        estimates += [combine_halves(name, halves, bins)] if halves else []
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


def _sides(
    layer: Tensor,
    features: Tensor,
    fold: Fold,
    features_whitening: Projection,
    settings: MutualInformationSettings,
    *,
    seed: int,
) -> Sides:
    """Coordinates of the measured half along the directions that are paired."""
    components = settings.components
    if settings.pairs == "cross":
        return principal_sides(
            layer, features, fold, features_whitening=features_whitening, components=components
        )
    if settings.pairs == "sliced":
        return sliced_sides(
            layer,
            features,
            fold,
            features_whitening=features_whitening,
            components=components,
            slices=settings.slices,
            seed=seed,
        )
    return canonical_sides(
        layer, features, fold, features_whitening=features_whitening, components=components
    )


def _measure(
    sides: Sides | None,
    bins: int,
    settings: MutualInformationSettings,
    processes: Processes,
) -> HalfEstimate | None:
    """The nats of one measured half, on process 0; the others only count."""
    codes = bin_codes(sides, bins=bins, processes=processes)
    parts = []
    for block in _blocks(codes, settings):
        counts = _count(codes, block, bins, settings, processes)
        if sides is not None:
            parts.append(_block_nats(counts, *_paired(sides, block, settings), bins))
    if sides is None:
        return None
    pairs = sum(part.pairs for part in parts)
    # A sliced estimate is a mean over the slices, the others are sums over their pairs.
    share = 1 / pairs if settings.pairs == "sliced" else 1.0
    return HalfEstimate(
        total=share * sum(part.total for part in parts),
        without_group=share * torch.stack([part.without_group for part in parts]).sum(dim=0),
        shuffled=share * torch.stack([part.shuffled for part in parts]).sum(dim=0),
        pairs=pairs,
        most_capped=min(len(side) for side in sides),
        capped=sum(part.capped for part in parts),
    )


def _blocks(codes: tuple[Tensor, Tensor], settings: MutualInformationSettings) -> list[slice]:
    """First directions that are counted together, with the second ones that belong to them."""
    directions, others = map(len, codes)
    if settings.pairs == "canonical" or directions == 0:
        return [slice(0, directions)]
    size = max(1, _BLOCK // others) if settings.pairs == "cross" else _BLOCK
    return [slice(start, start + size) for start in range(0, directions, size)]


def _count(
    codes: tuple[Tensor, Tensor],
    block: slice,
    bins: int,
    settings: MutualInformationSettings,
    processes: Processes,
) -> PairCounts:
    x_codes, y_codes = codes
    crossed = settings.pairs == "cross" and len(x_codes) > 0
    count = count_crossed if crossed else count_matched
    return count(
        x_codes[block],
        y_codes if crossed else y_codes[block],
        bins=bins,
        num_groups=min(settings.jackknife_groups, x_codes.shape[1]),
        shuffles=settings.shuffles,
        processes=processes,
    )


def _paired(
    sides: Sides, block: slice, settings: MutualInformationSettings
) -> tuple[Float[Tensor, "pair image"], Float[Tensor, "pair image"]]:
    """Both coordinates of every pair of a block, in the order of its counts."""
    x, y = sides
    if settings.pairs != "cross":
        return x[block], y[block]
    own = x[block]
    return own.repeat_interleave(len(y), dim=0), y.repeat(len(own), 1)


def _block_nats(counts: PairCounts, x: Tensor, y: Tensor, bins: int) -> HalfEstimate:
    """Sums over the pairs of a block."""
    images, num_groups = x.shape[1], len(counts.groups)
    groups = jackknife_group(images, num_groups=num_groups)
    r = score_correlations(x, y, groups, num_groups=num_groups)
    totals = pair_information(counts.groups, r, gaussian_table(bins, images)).sum(dim=1)
    return HalfEstimate(
        total=float(totals[0]),
        without_group=totals[1:],
        shuffled=shuffled_information(counts.shuffled),
        pairs=len(x),
        most_capped=len(x),
        capped=int((r[0] > LARGEST_CORRELATION).sum()),
    )
