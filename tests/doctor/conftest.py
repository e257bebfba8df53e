"""Settings and a teacher on disk for the doctor's checks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.recipe import load_settings

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


@pytest.fixture
def settings() -> Callable[..., Settings]:
    """``settings("run.engine=zero1", ...)``."""

    def make(*overrides: str) -> Settings:
        return load_settings(overrides=overrides)

    return make


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return build_encoder(SPEC, seed=3).eval()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return export_encoder(encoder, folder, key_map=None, card={})
