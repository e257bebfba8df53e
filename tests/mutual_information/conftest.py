"""Gaussian data of known mutual information, and small real encoders with images to measure."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps

SPECS = {
    "resnet": EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
        stem="small_stride2",
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    "vit": EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2},
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
}


def gaussian_pair(
    images: int, *, dims: int, correlation: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Jointly Gaussian vectors, each under a random linear map; dims * g(r) nats in common."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, images, dims, generator=generator, dtype=torch.float64)
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    first, second = torch.randn(2, dims, dims, generator=generator, dtype=torch.float64)
    return (x @ first).float(), (y @ second).float()


def small_encoder(kind: str) -> TappedEncoder:
    encoder = build_encoder(SPECS[kind], seed=3)
    return TappedEncoder(encoder, default_taps(encoder))


def varied_images(count: int, *, side: int = 32) -> Tensor:
    """Smooth random pictures: white noise would look the same to an encoder."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    return (smooth * 200 + fine * 55).to(torch.uint8)


@pytest.fixture
def gaussian() -> Callable[..., tuple[Tensor, Tensor]]:
    return gaussian_pair


@pytest.fixture
def tapped() -> Callable[[str], TappedEncoder]:
    return small_encoder


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    return varied_images
