"""Shares, differences and means, each with a 95 % interval and the number behind it."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from mimic_fast.errors import UsageError

_Z = 1.959963984540054  # 97.5 % point of the normal distribution
# 97.5 % points of Student's t for 1..10 degrees of freedom; an expansion takes over from 11 on.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A number with its uncertainty.

    Args:
        value: The estimate; shares are 0..1.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        n: Observations (images, or seeds) behind it.
    """

    value: float
    low: float
    high: float
    n: int


def measure_json(measure: Measure) -> dict[str, Any]:
    """``{"value": ..., "low": ..., "high": ..., "n": ...}`` as in report.json."""
    return {"value": measure.value, "low": measure.low, "high": measure.high, "n": measure.n}


def wilson(successes: int, n: int) -> Measure:
    """A share with Wilson's score interval (Wilson 1927), honest near 0 and 1.

    Raises:
        UsageError: If ``n`` is 0 or ``successes`` not in 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UsageError(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share, z2 = successes / n, _Z * _Z
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Measure(value=share, low=low, high=high, n=n)


def share_of(flags: Bool[Tensor, "image"]) -> Measure:
    """The share of true flags, by :func:`wilson`."""
    return wilson(int(flags.sum()), len(flags))


def paired_difference(a: Bool[Tensor, "image"], b: Bool[Tensor, "_image"]) -> Measure:
    """Share of ``a`` minus share of ``b`` on the same images, with Newcombe's interval.

    Method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998): Wilson intervals of the two
    shares, squared and added with the (continuity-corrected) correlation phi between the paired
    outcomes. Unlike Wald's interval it stays in [-1, 1] and is not empty when no pair disagrees.

    Raises:
        UsageError: If the two differ in length or are empty.
    """
    n = len(a)
    if len(b) != n or n == 0:
        raise UsageError(f"a paired difference needs the same images, got {n} and {len(b)}")
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    first, second = wilson(both + only_a, n), wilson(both + only_b, n)
    phi = _phi(both, only_a, only_b, n - both - only_a - only_b)
    below_a, above_a = first.value - first.low, first.high - first.value
    below_b, above_b = second.value - second.low, second.high - second.value
    difference = (only_a - only_b) / n
    down = math.sqrt(max(0.0, below_a**2 - 2 * phi * below_a * above_b + above_b**2))
    up = math.sqrt(max(0.0, above_a**2 - 2 * phi * above_a * below_b + below_b**2))
    return Measure(value=difference, low=difference - down, high=difference + up, n=n)


def mcnemar(a: Bool[Tensor, "image"], b: Bool[Tensor, "_image"]) -> float:
    """Two-sided p value of McNemar's exact test that ``a`` and ``b`` are true equally often.

    McNemar, Psychometrika 12:153 (1947): the pairs that disagree fall either way like a fair coin,
    so p = 2 P(X <= fewer), X ~ Binomial(number of them, 1/2), at most 1; 1 where no pair disagrees.
    Exact at any number: the sum costs little, so that neither the chi-square nor the mid-p variant
    is needed, and the level is never exceeded. Below the smallest normal float (2.2e-308) p is
    given as that, not as 0.

    Raises:
        UsageError: If the two differ in length or are empty.
    """
    n = len(a)
    if len(b) != n or n == 0:
        raise UsageError(f"McNemar's test needs the same images, got {n} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    disagree, fewer = only_a + only_b, min(only_a, only_b)
    if disagree <= 2 * fewer + 1:  # half of the coin's outcomes or more, without rounding
        return 1.0
    k = torch.arange(fewer + 1, dtype=torch.float64)
    logs = -torch.lgamma(k + 1) - torch.lgamma(disagree - k + 1)
    constant = math.lgamma(disagree + 1) - (disagree - 1) * math.log(2)
    return max(math.exp(float(logs.logsumexp(0)) + constant), sys.float_info.min)


def mean_measure(values: Shaped[Tensor, "sample"]) -> Measure:
    """A mean with Student's t interval; for features over images and for results over seeds.

    Raises:
        UsageError: If there are fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise UsageError(f"a mean with an interval needs at least 2 values, got {n}")
    mean, deviation = float(values.double().mean()), float(values.double().std())
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Measure(value=mean, low=mean - half, high=mean + half, n=n)


def t_quantile(degrees: int) -> float:
    """97.5 % point of Student's t (Abramowitz & Stegun 26.7.5 beyond 10 degrees, error < 1e-5)."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z, v = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    n = both + only_a + only_b + neither
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if product == 0:
        return 0.0
    excess = both * neither - only_a * only_b
    if excess > 0:
        excess = max(excess - n / 2, 0)
    return excess / math.sqrt(product)
