"""The nearest-neighbor estimator for all layers, on few canonical directions.

The rotation is fitted on one half of the images and measured on the other, both ways, as the
histogram's is; what is measured are the leading directions together, not pair by pair. The
jackknife looks for neighbors anew without each group: on Gaussians its interval is about 1.4 times
as wide as it need be, where that of fixed neighbors is too narrow. Process 0 computes, the others
wait for its result.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.distributed import SINGLE, Processes, broadcast_json
from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.activations import check_finite
from mimic_fast.mutual_information.canonical import cross_fit_folds, whiten
from mimic_fast.mutual_information.counting import jackknife_group, shuffling_rolls
from mimic_fast.mutual_information.gaussian_table import LARGEST_CORRELATION
from mimic_fast.mutual_information.halves import HalfEstimate, combine_halves
from mimic_fast.mutual_information.ksg import NEIGHBORS, ksg_terms
from mimic_fast.mutual_information.pair_forms import Sides, canonical_sides
from mimic_fast.mutual_information.pairs import score_correlations
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.progress import Event, Reporter, silent

MOST_DIRECTIONS = 8  # a side; in more dimensions all neighbors are about equally far
_JITTER = 1e-10  # of a standard deviation: orders ties at random, as the authors advise


def check_images(images: int) -> None:
    """Refuses too few images before anything is computed.

    Raises:
        SelfTestError: If a half would not hold more images than neighbors.
    """
    fewest = 2 * (NEIGHBORS + 1)
    if images < fewest:
        raise SelfTestError(
            f"mi.estimator = 'ksg' needs {fewest} clean images, got {images}; draw more"
        )


def estimate_ksg(
    layers: Sequence[Float[Tensor, "image _"]],
    features: Float[Tensor, "image feature"],
    settings: MutualInformationSettings,
    *,
    names: Sequence[str],
    seed: int,
    processes: Processes = SINGLE,
    report: Reporter = silent,
) -> list[LayerEstimate]:
    """Mutual information of at most 8 canonical directions of every layer with the features.

    Args:
        layers: Pooled activations of the same images, one entry per layer; widths may differ.
        features: The encoder's features.
        settings: Components, shuffles, jackknife groups.
        names: Name of each layer.
        seed: Draws the two halves of the cross-fit and the order of ties.
        processes: All of them must call, with the same tensors.
        report: Told after every layer, by process 0.

    Raises:
        SelfTestError: If a layer or the features are not finite, or there are too few images.
    """
    check_finite((*layers, features), (*names, "features"))
    check_images(len(features))
    estimates: list[LayerEstimate] = []
    if processes.is_main:
        folds = cross_fit_folds(len(features), seed=seed)
        whitenings = [whiten(features[f.fit], components=settings.components) for f in folds]
        for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
            halves = []
            for fold, whitening in zip(folds, whitenings, strict=True):
                sides = canonical_sides(
                    layer,
                    features,
                    fold,
                    features_whitening=whitening,
                    components=settings.components,
                )
                halves.append(_measure(sides, settings, seed=seed))
            estimates.append(combine_halves(name, halves, None))
            report(Event(phase="estimate", done=index + 1, total=len(layers), unit="layers"))
    shared = broadcast_json([asdict(estimate) for estimate in estimates], processes)
    return [LayerEstimate(**estimate) for estimate in shared]


def _measure(sides: Sides, settings: MutualInformationSettings, *, seed: int) -> HalfEstimate:
    of_layer, of_features = (side[:MOST_DIRECTIONS] for side in sides)
    directions, images = of_layer.shape
    num_groups = min(settings.jackknife_groups, images)
    groups = jackknife_group(images, num_groups=num_groups)
    generator = torch.Generator().manual_seed(seed)
    x, y = _untied(of_layer, generator), _untied(of_features, generator)
    rolls = shuffling_rolls(images, shuffles=settings.shuffles)
    r = score_correlations(of_layer, of_features, groups, num_groups=num_groups)
    kept = [groups != group for group in range(num_groups)]
    return HalfEstimate(
        total=float(_nats(x, y)),
        without_group=torch.stack([_nats(x[rest], y[rest]) for rest in kept]),
        shuffled=torch.stack([_nats(x, y.roll(roll, 0)) for roll in rolls]),
        pairs=directions,
        most_capped=directions,
        capped=int((r[0] > LARGEST_CORRELATION).sum()),
    )


def _nats(x: Float64[Tensor, "image dim"], y: Float64[Tensor, "image dim"]) -> Float64[Tensor, ""]:
    """The estimate; 0 where a side has no directions, or leaving a group out no neighbors."""
    if x.shape[1] == 0 or len(x) <= NEIGHBORS:
        return torch.zeros((), dtype=torch.float64)
    return ksg_terms(x, y).mean()


def _untied(
    side: Float[Tensor, "direction image"], generator: torch.Generator
) -> Float64[Tensor, "image direction"]:
    wide = side.T.double()
    noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
    return (wide + _JITTER * noise).contiguous()
