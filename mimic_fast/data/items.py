"""What every data source hands out: named items, their bytes, and how bytes become pixels.

A source is an ordered list of keys with a function that reads one item and a function that
decodes it. Nothing is decoded when a source is opened, so opening is quick and a corrupt item
surfaces where it can be named.
"""

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mimic_fast.errors import UnsafeInputError, UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
MAX_ITEM_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000  # 192 MB decoded; more is a mistake or a decompression bomb
HIGHEST_MAX_PIXELS = 178_000_000  # Pillow itself refuses more

_SHOWN = 100  # characters of a name in a message
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
# Pillow takes files for whole that lack only their end: every pixel may be there, or only seem so.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# What ends a line, or moves the cursor of a terminal: a name must stay on its line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# The first three are what tens of thousands of mutated files raised; the others are what the
# parsers' building blocks raise, should a field be read that those files did not reach.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptItemError(UnsafeInputError):
    """One item of a source cannot be read or decoded: it is left out and named, the run goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one item may take; a larger one is a corrupt item.

    Args:
        max_item_bytes: Stored bytes.
        max_pixels: Width times height, at most HIGHEST_MAX_PIXELS.
    """

    max_item_bytes: int = MAX_ITEM_BYTES
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.max_item_bytes < 1 or not 1 <= self.max_pixels <= HIGHEST_MAX_PIXELS:
            raise UsageError(
                "limits must be at least 1 byte and 1 pixel, and at most "
                f"{HIGHEST_MAX_PIXELS} pixels; got {self.max_item_bytes} bytes and "
                f"{self.max_pixels} pixels"
            )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An ordered set of images.

    Args:
        name: The text it was opened with.
        keys: One unique name per item, in an order independent of the order of files on disk.
        labels: One class index per item, or None where the source has no labels.
        classes: The class names, where the source knows them.
        read: Index to the stored bytes of an item; raises CorruptItemError.
        decode: Stored bytes to uint8 pixels ``[C, H, W]``, C = 1 or 3; raises CorruptItemError.
        encoded: Whether the stored bytes are an image file, which any decoder of its format reads;
            False for bare pixels.
    """

    name: str
    keys: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    read: Callable[[int], bytes]
    decode: Callable[[bytes], Tensor]
    encoded: bool = True

    def __len__(self) -> int:
        return len(self.keys)


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: a known suffix, and not hidden."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.lower().endswith(IMAGE_SUFFIXES)


def printable(name: str) -> str:
    """A file name as one line of valid Unicode; what else it holds becomes backslash escapes."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_unique(keys: Sequence[str], name: str) -> None:
    """Refuses two items of one key: a manifest that names it could mean either.

    Args:
        keys: The keys of a source.
        name: What holds them, for the message.

    Raises:
        UnsafeInputError: If a key comes twice.
    """
    seen: set[str] = set()
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise UnsafeInputError(
            f"{name} holds two items of the key {shortened(twice)!r}; give every item its own name"
        )


def shortened(name: str) -> str:
    """A name as fits into a message; a hostile one can have a million characters."""
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."


def check_size(size: int, limits: Limits) -> None:
    """Refuses an item of too many bytes before it is read.

    Raises:
        CorruptItemError: If it is larger than allowed.
    """
    if size > limits.max_item_bytes:
        raise CorruptItemError(f"has {size} bytes, more than the {limits.max_item_bytes} allowed")


def read_range(path: Path, offset: int, size: int, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Bytes ``offset .. offset + size`` of a file.

    Raises:
        CorruptItemError: If the file cannot be read, ends early, or the item is larger than
            allowed.
    """
    check_size(size, limits)
    try:
        # Not a file object: half of the time to read a small image was spent on making one.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
    except OSError as error:
        raise CorruptItemError(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise CorruptItemError(f"ends after {len(data)} of {size} bytes")
    return data


def read_whole(path: Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """All bytes of a file.

    Raises:
        CorruptItemError: If the file cannot be read or is larger than allowed.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorruptItemError(f"cannot be read: {error.strerror}") from None
    return read_range(path, 0, size, limits)


def decode_image(
    data: bytes, limits: Limits = DEFAULT_LIMITS
) -> UInt8[Tensor, "channel height width"]:
    """Decodes a JPEG, PNG, WebP, BMP or PPM file to its last pixel.

    Color images come out as RGB, gray ones with one channel, 16-bit gray scaled to 8 bits.
    Transparency is dropped and the EXIF orientation ignored, as in the usual training pipelines.

    Raises:
        CorruptItemError: If the bytes are no such image, are truncated, or hold more pixels than
            allowed.
    """
    if not data:
        raise CorruptItemError("is empty")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # odd metadata beside good pixels
            Image.open(io.BytesIO(data), formats=_FORMATS) as image,
        ):
            _check_header(image, data, limits)
            pixels = _pixels(image)
    except Image.UnidentifiedImageError:
        raise CorruptItemError("is not a JPEG, PNG, WebP, BMP or PPM image") from None
    except _DECODE_ERRORS as error:
        reason = str(error).strip() or type(error).__name__
        raise CorruptItemError(f"cannot be decoded: {reason.splitlines()[0]}") from None
    return torch.from_numpy(pixels)


def _check_header(image: Image.Image, data: bytes, limits: Limits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise CorruptItemError(
            f"has {image.width} x {image.height} pixels, more than the {limits.max_pixels} allowed"
        )
    if _END_MARKS.get(image.format or "", b"") not in data:
        raise CorruptItemError(f"is truncated: the end mark of a {image.format} is missing")


def _pixels(image: Image.Image) -> np.ndarray:
    """The loaded pixels, ``[C, H, W]`` uint8, contiguous and writable."""
    if image.mode in _WIDE_MODES:
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return ((wide + 128) // 257).astype(np.uint8)[None]
    gray = image.mode in ("1", "L", "LA", "La")
    values = np.array(image.convert("L" if gray else "RGB"), dtype=np.uint8)
    return values[None] if gray else np.ascontiguousarray(values.transpose(2, 0, 1))
