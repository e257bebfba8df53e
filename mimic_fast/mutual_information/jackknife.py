"""The delete-group jackknife: how far an estimate may be from its mean, without repeating a sample.

A bootstrap would repeat images, and repeated images add nats to a histogram that nothing removes.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor


def jackknife_variance(replicates: Float64[Tensor, " group"]) -> float:
    """Variance of an estimate from its values with one group of images left out at a time.

    A bias that all replicates share, such as that of smaller tables, cancels.
    """
    groups = len(replicates)
    return float((replicates - replicates.mean()).square().sum()) * (groups - 1) / groups


def student_quantile(degrees: int, *, level: float = 0.95) -> float:
    """Half-width of the two-sided Student interval, in standard errors.

    With t = sqrt(nu) tan(a) the density becomes cos(a)^(nu - 1), which is integrated numerically.
    """
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    middle = (angles[1:] + angles[:-1]) / 2
    mass = middle.cos().pow(degrees - 1).cumsum(0)
    index = int(torch.searchsorted(mass, level * mass[-1]))
    return math.sqrt(degrees) * math.tan(float(middle[index]))
