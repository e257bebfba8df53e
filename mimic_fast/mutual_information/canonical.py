"""Canonical pairs: the directions along which a layer and the features depend on each other.

Both are whitened and rotated so that, for jointly Gaussian data, the information of the whole is
the sum over pairs of directions (method: Hotelling's canonical correlations). Rotations are fitted
on one half of the images and measured on the other, both ways: a rotation measured where it was
fitted would find dependence in pure noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

_FLAT = 1e-10  # eigenvalues below this share of the largest are rounding of float32 activations
_STILL = 1e-12  # the same, as a share of the mean square: a constant map has no directions at all
_IMAGES_PER_DIRECTION = 4  # with fewer, the fitted half is whitened perfectly and means nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Which images fit the rotation and which are measured; disjoint."""

    fit: Int64[Tensor, " fit_image"]
    measured: Int64[Tensor, " image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """An affine map to uncorrelated directions of unit variance, on the images it was fitted on."""

    mean: Float64[Tensor, " dim"]
    directions: Float64[Tensor, "dim direction"]

    def __call__(self, rows: Float[Tensor, "image dim"]) -> Float64[Tensor, "image direction"]:
        """Coordinates of ``rows`` along the directions."""
        return (rows.double() - self.mean) @ self.directions


def cross_fit_folds(num_images: int, *, seed: int) -> tuple[Fold, Fold]:
    """Splits the images at random into two halves that take turns in fitting and being measured.

    Both measured halves hold ``num_images // 2`` images, in random order; of an odd number, one
    image is only ever fitted on.
    """
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    half = num_images // 2
    first, second = order[:half], order[half : 2 * half]
    return (
        Fold(fit=order[half:], measured=first),
        Fold(fit=torch.cat([first, order[2 * half :]]), measured=second),
    )


def whiten(rows: Float[Tensor, "image dim"], *, components: int) -> Projection:
    """The leading principal directions, scaled to unit variance, in float64.

    Directions without variance (dead or constant units, exact linear dependence) are dropped, and
    at most one direction per four images is kept.

    Args:
        rows: Pooled activations or features.
        components: Largest number of directions.
    """
    wide = rows.double()
    mean = wide.mean(dim=0)
    centered = wide - mean
    covariance = centered.T @ centered / max(1, len(rows) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = max(_FLAT * float(values[0]), _STILL * float(wide.square().sum(dim=1).mean()))
    limit = min(components, max(1, len(rows) // _IMAGES_PER_DIRECTION))
    kept = min(limit, int((values > floor).sum()))
    return Projection(mean=mean, directions=vectors[:, :kept] / values[:kept].sqrt())


def canonical_pairs(
    layer: Float[Tensor, "image dim"],
    features: Float[Tensor, "image feature"],
    *,
    layer_whitening: Projection,
    features_whitening: Projection,
) -> tuple[Projection, Projection]:
    """Rotates two whitenings to canonical pairs: the directions ``i`` of both belong together.

    Args:
        layer: Pooled activations of the fitted half.
        features: Features of the same images.
        layer_whitening: :func:`whiten` of ``layer``.
        features_whitening: :func:`whiten` of ``features``.

    Returns:
        Two projections with as many directions as the smaller whitening, strongest pair first.
    """
    cross = layer_whitening(layer).T @ features_whitening(features) / max(1, len(layer) - 1)
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    return (
        Projection(mean=layer_whitening.mean, directions=layer_whitening.directions @ left),
        Projection(
            mean=features_whitening.mean, directions=features_whitening.directions @ right.T
        ),
    )


def coordinates(
    rows: Float[Tensor, "image dim"], projection: Projection
) -> Float32[Tensor, "direction image"]:
    """Coordinates to be ranked, one row per direction.

    They are computed in float64 and rounded to float32, the precision the activations came in:
    images whose activations agree get equal coordinates instead of ones that rounding orders at
    will.
    """
    return projection(rows).float().T.contiguous()
