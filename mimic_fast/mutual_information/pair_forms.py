"""Which directions of a layer are measured with which of the features: ``mi.pairs``.

``canonical`` fits a rotation to the dependence, ``cross`` takes principal directions as they are,
``sliced`` draws directions at random. All start from whitened sides, fitted on one half of the
images and measured on the other, so that neither scale nor linear mixing of the units counts.
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mimic_fast.mutual_information.canonical import (
    Fold,
    Projection,
    canonical_pairs,
    coordinates,
    whiten,
)

PairForm = Literal["canonical", "cross", "sliced"]
Sides = tuple[
    Float32[Tensor, "x_direction measured_image"],
    Float32[Tensor, "y_direction measured_image"],
]


def canonical_sides(
    layer: Float[Tensor, "image dim"],
    features: Float[Tensor, "image feature"],
    fold: Fold,
    *,
    features_whitening: Projection,
    components: int,
) -> Sides:
    """Matched coordinates of the measured half along the pairs fitted on the other half.

    For jointly Gaussian data the sum over these pairs is I(X;R).
    """
    fit_layer, fit_features = layer[fold.fit], features[fold.fit]
    of_layer, of_features = canonical_pairs(
        fit_layer,
        fit_features,
        layer_whitening=whiten(fit_layer, components=components),
        features_whitening=features_whitening,
    )
    measured = fold.measured
    return coordinates(layer[measured], of_layer), coordinates(features[measured], of_features)


def principal_sides(
    layer: Float[Tensor, "image dim"],
    features: Float[Tensor, "image feature"],
    fold: Fold,
    *,
    features_whitening: Projection,
    components: int,
) -> Sides:
    """Principal directions of both sides, each to be measured with each.

    The sum over all these pairs is not I(X;R), not even for Gaussian data: it counts what several
    directions tell of the same one again and again, and sees no dependence that takes three
    directions to show. Two layers of equal I(X;R) can have other sums.
    """
    of_layer = whiten(layer[fold.fit], components=components)
    measured = fold.measured
    sides = (
        coordinates(layer[measured], of_layer),
        coordinates(features[measured], features_whitening),
    )
    if min(len(side) for side in sides) == 0:
        return sides[0][:0], sides[1][:0]
    return sides


def sliced_sides(
    layer: Float[Tensor, "image dim"],
    features: Float[Tensor, "image feature"],
    fold: Fold,
    *,
    features_whitening: Projection,
    components: int,
    slices: int,
    seed: int,
) -> Sides:
    """Random directions of both sides, matched, for sliced mutual information.

    The mean over them estimates E I(u'X; v'R), u and v uniform on unit spheres: Goldfeld and
    Greenewald, "Sliced Mutual Information", NeurIPS 2021, arXiv:2110.05279, here of whitened
    vectors. It is 0 where X and R are independent and only there, at most I(X;R), and far smaller
    in many dimensions: only its ratios between layers mean something here.

    Args:
        layer: Pooled activations.
        features: Features of the same images.
        fold: Which of them are fitted and measured.
        features_whitening: Of the features of the fitted half.
        components: Largest number of principal directions a side.
        slices: Pairs of directions drawn.
        seed: Draws them; layers of equal widths get the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    of_layer = whiten(layer[fold.fit], components=components)
    measured = fold.measured
    of_features = _random_directions(features_whitening, slices, generator)
    return (
        coordinates(layer[measured], _random_directions(of_layer, slices, generator)),
        coordinates(features[measured], of_features),
    )


def _random_directions(
    whitening: Projection, slices: int, generator: torch.Generator
) -> Projection:
    """As many random unit vectors of the whitened space; none has a length where it has no axis."""
    dims = whitening.directions.shape[1]
    drawn = torch.randn(dims, slices, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(drawn, dim=0)
    return Projection(mean=whitening.mean, directions=whitening.directions @ unit)
