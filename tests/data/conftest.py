"""Small real images and sources for the data tests."""

import gzip
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimic_fast.data.fashion_mnist import fetch_fashion_mnist
from mimic_fast.data.items import Source, decode_image
from mimic_fast.errors import UnsafeInputError, UsageError


@pytest.fixture(scope="session")
def encode_image() -> Callable[..., bytes]:
    """A seeded random image as a file's bytes."""

    def encode(
        seed: int = 0, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", suffix: str = "PNG"
    ) -> bytes:
        width, height = size
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, suffix)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_source(encode_image) -> Callable[..., Source]:
    """A source in memory; ``contents`` replaces the bytes of some items."""

    def make(
        count: int,
        *,
        labels: Sequence[int] | None = None,
        contents: dict[int, bytes] | None = None,
        size: tuple[int, int] = (8, 8),
    ) -> Source:
        data: list[bytes] = [encode_image(index, size=size) for index in range(count)]
        for index, content in (contents or {}).items():
            data[index] = content
        return Source(
            name="memory",
            keys=tuple(f"{index:04d}.png" for index in range(count)),
            labels=None if labels is None else tuple(labels),
            classes=None,
            read=data.__getitem__,
            decode=decode_image,
        )

    return make


@pytest.fixture(scope="session")
def fashion_files() -> dict[str, Path]:
    """The real Fashion-MNIST in the user's cache, fetched if this machine can."""
    try:
        return fetch_fashion_mnist()
    except (UsageError, UnsafeInputError) as error:
        pytest.skip(f"needs Fashion-MNIST: {error}")


@pytest.fixture(scope="session")
def fashion_archives(fashion_files, tmp_path_factory) -> Path:
    """A folder with the four .gz files, as the Debian package installs them."""
    folder = tmp_path_factory.mktemp("archives")
    for name, path in fashion_files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    return folder
