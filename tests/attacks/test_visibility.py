"""PSNR and SSIM against their formulas, window by window."""

import math

import numpy as np
import pytest
import torch

from mimic_fast.attacks.visibility import psnr, ssim


def ssim_by_windows(x: np.ndarray, y: np.ndarray, radius: int = 5) -> float:
    """The formula of Wang et al. (2004), every window on its own."""
    offsets = np.arange(-radius, radius + 1)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]), strict=True):
        for row in range(radius, a.shape[0] - radius):
            for column in range(radius, a.shape[1] - radius):
                here = np.s_[row - radius : row + radius + 1, column - radius : column + radius + 1]
                p, q = a[here], b[here]
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 1e-4)
                    * (2 * cov + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "radius"), [((2, 3, 17, 14), 5), ((1, 1, 8, 9), 3)])
def test_ssim_is_the_formula_of_every_window(size, radius):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, generator=generator, dtype=torch.float64)
    y = (x + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)).clamp(0, 1)

    assert ssim(x, y) == pytest.approx(ssim_by_windows(x.numpy(), y.numpy(), radius), abs=1e-12)


def test_equal_images_are_equal():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    assert ssim(x, x) == pytest.approx(1, abs=1e-9)
    assert psnr(x, x) == pytest.approx(100)


def test_psnr_is_the_mean_over_images():
    x = torch.full((2, 3, 8, 8), 0.5)
    y = torch.stack([x[0] + 0.1, x[1] + 0.01])

    expected = (-20 * math.log10(0.1) - 20 * math.log10(0.01)) / 2
    assert psnr(x, y) == pytest.approx(expected, abs=1e-4)
