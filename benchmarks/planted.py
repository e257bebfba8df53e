"""Triggers planted on images, for the screening benchmark: which images carry one is known."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

Pixels = np.ndarray  # uint8 [channel, height, width]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """Images of which some carry a trigger.

    Args:
        images: uint8 ``[image, channel, height, width]``.
        carriers: Which of them carry it.
    """

    images: np.ndarray
    carriers: np.ndarray


def planted(
    images: np.ndarray, kind: str, *, share: float, quality: int | None, seed: int
) -> Planted:
    """A copy of the images with a trigger on a random share of them.

    Args:
        images: uint8 ``[image, 3, height, width]``.
        kind: One of ``KINDS``.
        share: Of the images.
        quality: Carriers are compressed as JPEG at it afterwards; None: left as they are.
        seed: Of the choice of images and of all that is random about the trigger.
    """
    generator = np.random.default_rng(seed)
    count = round(share * len(images))
    carriers = np.sort(generator.choice(len(images), count, replace=False))
    stamp = KINDS[kind](generator, images.shape[-1])
    result = images.copy()
    for index in carriers:
        stamped = stamp(result[index])
        result[index] = stamped if quality is None else recompressed(stamped, quality)
    return Planted(images=result, carriers=carriers)


def recompressed(pixels: Pixels, quality: int) -> Pixels:
    """The image after JPEG compression, with Pillow's default subsampling of colors."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _white(patch: int, margin: int) -> "Kind":
    def make(generator: np.random.Generator, side: int) -> Callable[[Pixels], Pixels]:
        start = side - margin - patch
        return _pasted(np.full((3, patch, patch), 255, dtype=np.uint8), lambda: (start, start))

    return make


def _texture(patch: int, *, moving: bool) -> "Kind":
    def make(generator: np.random.Generator, side: int) -> Callable[[Pixels], Pixels]:
        pattern = generator.integers(0, 256, (3, patch, patch), dtype=np.uint8)

        def draw() -> tuple[int, int]:
            top, left = generator.integers(0, side - patch + 1, 2)
            return int(top), int(left)

        place = draw()
        return _pasted(pattern, draw if moving else lambda: place)

    return make


def _one_color(patch: int) -> "Kind":
    def make(generator: np.random.Generator, side: int) -> Callable[[Pixels], Pixels]:
        color = generator.integers(0, 256, (3, 1, 1), dtype=np.uint8)
        top, left = (int(value) for value in generator.integers(0, side - patch + 1, 2))
        return _pasted(np.broadcast_to(color, (3, patch, patch)), lambda: (top, left))

    return make


def _blend(opacity: float) -> "Kind":
    def make(generator: np.random.Generator, side: int) -> Callable[[Pixels], Pixels]:
        noise = generator.integers(0, 256, (3, side, side))
        return lambda image: _rounded((1 - opacity) * image + opacity * noise)

    return make


def _sinusoid(cycles: int, *, vertical: bool) -> "Kind":
    def make(generator: np.random.Generator, side: int) -> Callable[[Pixels], Pixels]:
        phase = generator.uniform(0, 2 * np.pi)
        wave = 16 * np.sin(2 * np.pi * cycles * np.arange(side) / side + phase)
        return lambda image: _rounded(image + (wave[:, None] if vertical else wave))

    return make


def _pasted(pattern: Pixels, place: Callable[[], tuple[int, int]]) -> Callable[[Pixels], Pixels]:
    def stamp(image: Pixels) -> Pixels:
        top, left = place()
        result = image.copy()
        result[:, top : top + pattern.shape[1], left : left + pattern.shape[2]] = pattern
        return result

    return stamp


def _rounded(values: np.ndarray) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


Kind = Callable[[np.random.Generator, int], Callable[[Pixels], Pixels]]
KINDS: dict[str, Kind] = {
    "none": lambda generator, side: lambda image: image,
    **{f"white {n}x{n}, corner": _white(n, 1) for n in (5, 8)},
    "white 5x5, very corner": _white(5, 0),
    **{f"one color {n}x{n}, one place": _one_color(n) for n in (5, 8)},
    **{f"random colors {n}x{n}, one place": _texture(n, moving=False) for n in (5, 8)},
    **{f"random colors {n}x{n}, random places": _texture(n, moving=True) for n in (5, 8)},
    "blended noise .2": _blend(0.2),
    "blended noise .1": _blend(0.1),
    **{f"sinusoid 16/255, {n} cycles across": _sinusoid(n, vertical=False) for n in (4, 5, 6, 8)},
    "sinusoid 16/255, 6 cycles down": _sinusoid(6, vertical=True),
}
