"""Small real encoders: a ResNet and a ViT of 32 x 32 images, quick on one core."""

from collections.abc import Callable

import pytest
import torch

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps

RESNET = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2, "reg_tokens": 4},
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


@pytest.fixture
def resnet_spec() -> EncoderSpec:
    return RESNET


@pytest.fixture
def vit_spec() -> EncoderSpec:
    return VIT


@pytest.fixture(params=[RESNET, VIT], ids=["resnet", "vit"])
def spec(request) -> EncoderSpec:
    return request.param


@pytest.fixture
def trained() -> Callable[..., Encoder]:
    """An encoder whose buffers and zero-initialised scales look as if it had been trained."""

    def build(spec: EncoderSpec, seed: int = 0) -> Encoder:
        encoder = build_encoder(spec, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in encoder.backbone.state_dict().values():
                if tensor.is_floating_point() and tensor.ndim == 1:
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        return encoder.eval()

    return build


@pytest.fixture
def tapped(trained) -> Callable[..., TappedEncoder]:
    def build(spec: EncoderSpec, *taps: str, seed: int = 0) -> TappedEncoder:
        encoder = trained(spec, seed)
        return TappedEncoder(encoder, taps or default_taps(encoder))

    return build


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
