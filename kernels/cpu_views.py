"""Augmented and plain views by the C++ kernels of ``cpu_views.cpp``, called through ctypes.

What ``data/augment.py`` computes, image by image, without copies between the steps. ``library`` is
what ``cpu_build.load_library("cpu_views", cache)`` returned. Images go to torch's threads; results
depend neither on their number nor on the batch. Results are float32 in [0, 1], dense in NCHW or in
``torch.channels_last``.
"""

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Colors:
    """The color changes of a batch, dense.

    Args:
        jittered: Whether an image's colors change.
        amounts: Changes of brightness, contrast, saturation (factors minus 1) and hue (turns).
        order: In which order they are made.
        gray: Whether an image ends up gray.
    """

    jittered: Bool[Tensor, " batch"]
    amounts: Float32[Tensor, "batch 4"]
    order: Int64[Tensor, "batch 4"]
    gray: Bool[Tensor, " batch"]


class _Drawn(ctypes.Structure):
    """Mirrors ``struct Drawn`` of ``cpu_views_colors.h``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("jittered", "amounts", "order", "gray")]


class _Images(ctypes.Structure):
    """Mirrors ``struct Images`` of the C++ file."""

    _fields_ = [
        ("start", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "channels", "height", "width")),
        ("interleaved", ctypes.c_int32),
    ]


class _Pixels(ctypes.Structure):
    """Mirrors ``struct Pixels``."""

    _fields_ = [
        ("start", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("image", "channel", "line", "pixel")),
    ]


def views(
    pool: UInt8[Tensor, "image channel side side"],
    rows: Int64[Tensor, " batch"],
    box: Float32[Tensor, "batch 4"],
    flip: Bool[Tensor, " batch"],
    colors: Colors,
    out: Float32[Tensor, "batch channel size size"],
    *,
    library: ctypes.CDLL,
) -> None:
    """Resized crops of some images of a pool, with their colors changed.

    Args:
        pool: Decoded images, dense.
        rows: Which of them, each within the pool.
        box: Top, left, height and width in whole pixels within the image.
        flip: Whether a crop is mirrored.
        colors: What happens to the colors.
        out: Filled.
        library: The built kernels.
    """
    assert pool.is_contiguous()
    library.views(
        ctypes.c_void_p(pool.data_ptr()),
        ctypes.c_int64(pool.shape[-1]),
        *(ctypes.c_void_p(_dense(tensor).data_ptr()) for tensor in (rows, box, flip)),
        ctypes.byref(_drawn(colors)),
        ctypes.byref(_images(out)),
        _threads(out),
    )


def convert(
    images: UInt8[Tensor, "image channel height width"],
    rows: Int64[Tensor, " batch"] | None,
    colors: Colors | None,
    out: Float32[Tensor, "batch channel height width"],
    *,
    library: ctypes.CDLL,
) -> None:
    """Divides by 255, then changes colors.

    Args:
        images: Of any strides.
        rows: Which of them, each within their number; None: all.
        colors: What happens to the colors; None: nothing.
        out: Filled.
        library: The built kernels.
    """
    library.convert(
        ctypes.byref(_Pixels(images.data_ptr(), *images.stride())),
        None if rows is None else ctypes.c_void_p(_dense(rows).data_ptr()),
        None if colors is None else ctypes.byref(_drawn(colors)),
        ctypes.byref(_images(out)),
        _threads(out),
    )


def change_colors(
    images: Float32[Tensor, "batch channel height width"], colors: Colors, *, library: ctypes.CDLL
) -> None:
    """Changes the colors of images in [0, 1], in place; they are dense in either memory format."""
    library.colors(ctypes.byref(_drawn(colors)), ctypes.byref(_images(images)), _threads(images))


def _images(tensor: Tensor) -> _Images:
    interleaved = not tensor.is_contiguous()
    assert not interleaved or tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor.shape[1] in (1, 3)
    return _Images(tensor.data_ptr(), *tensor.shape, interleaved)


def _threads(images: Tensor) -> ctypes.c_int64:
    # Asked of torch each time: OpenMP's own setting is another one in every thread of Python.
    return ctypes.c_int64(max(1, min(torch.get_num_threads(), len(images))))


def _drawn(colors: Colors) -> _Drawn:
    tensors = (colors.jittered, colors.amounts, colors.order, colors.gray)
    return _Drawn(*(_dense(tensor).data_ptr() for tensor in tensors))


def _dense(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()  # a copy would be gone before it is read
    return tensor
