"""What K equal-mass bins lose of a Gaussian's information: the control variate of the histogram estimator.

A bivariate Gaussian of correlation r carries g(r) = -log(1 - r^2) / 2 nats. The same bins at the same number
of images show b(r) of them on average, bias included, of which b(0) is chance. ``GaussianTable.loss`` is
g(r) - (b(r) - b(0)), so that I = g + (binned - b) reads ``binned - chance + loss(r)``. The table is a seeded
Monte Carlo with the same normal draws at every r, made once per K and n in a process.
"""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mimic_fast.mutual_information.histogram import equal_mass_codes, plug_in_information
from mimic_fast.ops import joint_histogram

LARGEST_CORRELATION = 0.99  # above, the loss of the bins is most of the answer
_NODES = 33
_DRAWS = 200_000  # normal pairs per node, in all replicates together
_REPLICATES = (8, 400)
_SEED = 20240603


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianTable:
    """Nats that the bins lose of a Gaussian, at nodes equally spaced in Fisher's z."""

    nodes: Float64[Tensor, " node"]
    losses: Float64[Tensor, " node"]

    def loss(self, correlation: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Loss at correlations in [0, ``LARGEST_CORRELATION``], interpolated linearly in Fisher's z."""
        z = torch.atanh(correlation.clamp(0, LARGEST_CORRELATION))
        step = float(self.nodes[1])
        index = (z / step).long().clamp(max=len(self.nodes) - 2)
        part = z / step - index
        return self.losses[index] * (1 - part) + self.losses[index + 1] * part


@functools.cache
def gaussian_table(bins: int, images: int) -> GaussianTable:
    """The table for ``bins`` equal-mass bins per axis and ``images`` images in a histogram."""
    low, high = _REPLICATES
    replicates = min(high, max(low, _DRAWS // images))
    generator = torch.Generator().manual_seed(_SEED)
    x, noise = torch.randn(2, replicates, images, generator=generator, dtype=torch.float64)
    x_codes = equal_mass_codes(x, bins=bins)
    everything = torch.zeros(images, dtype=torch.int64)
    nodes = torch.linspace(0, math.atanh(LARGEST_CORRELATION), _NODES, dtype=torch.float64)
    shortfall = []
    for r in torch.tanh(nodes).tolist():
        y = r * x + math.sqrt(1 - r * r) * noise
        codes = equal_mass_codes(y, bins=bins)
        counts = joint_histogram(x_codes, codes, everything, bins=bins, num_groups=1)[0]
        # The mean of the pointwise information is known to be g(r); taking the sample's own instead of g(r)
        # removes most of the Monte Carlo noise.
        shortfall.append(float((_pointwise(x, y, r).mean(dim=1) - plug_in_information(counts)).mean()))
    losses = torch.tensor(shortfall, dtype=torch.float64)
    return GaussianTable(nodes=nodes, losses=losses - losses[0])


def gaussian_information(correlation: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Mutual information of a bivariate Gaussian, nats."""
    return -0.5 * torch.log1p(-correlation.square())


def normal_scores(values: Float[Tensor, "pair image"]) -> Float64[Tensor, "pair image"]:
    """Normal quantiles of the ranks, ties at their middle rank: Gaussian margins whatever they were."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return torch.special.ndtri((below + up_to).double() / (2 * values.shape[1]))


def _pointwise(x: Tensor, y: Tensor, r: float) -> Tensor:
    """log p(x, y) / (p(x) p(y)) of a bivariate Gaussian."""
    rest = 1 - r * r
    quadratic = (r * r * (x * x + y * y) - 2 * r * x * y) / (2 * rest)
    return -0.5 * math.log(rest) - quadratic
