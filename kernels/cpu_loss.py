"""Attention and clone loss on the CPU: the kernels of ``cpu_loss.cpp``, called through ctypes.

The same functions as ``distill_loss.py`` (Triton) with one argument more, ``library``: what
``cpu_build.load_library("cpu_loss", cache)`` returned. Their oracle is ``reference.layer_losses``.
float32, float64 and bfloat16; sums are float32, float64 for float64. Every stride is taken as it
is, nothing is copied. The threads are those of ``torch.set_num_threads``; results do not depend on
their number.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast.kernels.layout import Layout, layout_of

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_CLONES = {"none": 0, "cosine": 1, "mse": 2}
_ACTIVATIONS = ("student", "teacher", "trunk", "out")
_TABLES = {"teacher_power": 2, "weights": 1, "losses": 2, "coefficients": 3, "grad_losses": 2}


_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...]]  # of a tensor: dtype, shape, strides


class _Activation(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("start", "image", "position", "channel")]


class _Job(ctypes.Structure):
    """What is computed and how the tensors lie; mirrors ``struct Job`` of the C++ file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "positions", "channels")),
        *((name, _Activation) for name in _ACTIVATIONS),
        *((name, ctypes.c_int64 * dimensions) for name, dimensions in _TABLES.items()),
        ("power", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "planes", "clone", "attention")),
    ]


class _Data(ctypes.Structure):
    """Addresses of the tensors, null for those left out; mirrors ``struct Data``."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_ACTIVATIONS, *_TABLES)]


def power_maps(
    feature_maps: Sequence[Float[Tensor, "total ..."]],
    *,
    prefix: int,
    power: float,
    images: int | None = None,
    library: ctypes.CDLL,
) -> Float[Tensor, "layer batch position"]:
    """Power maps A = sum_c |x|^p of activations of one shape and dtype.

    Args:
        feature_maps: One a layer, in a layout that ``layout_of`` knows.
        prefix: Class and register tokens to leave out (tokens only).
        power: p, at least 1.
        images: Only the first so many count; None: all.
        library: The built kernels.
    """
    first = feature_maps[0]
    count = first.shape[0] if images is None else images
    maps = _empty(len(feature_maps), count, _positions(first, prefix), like=first)
    for feature_map, kept in zip(feature_maps, maps[:, None], strict=True):
        tables = (None, None, None, kept, None)
        _run(library, (feature_map, None, None, None), tables, count, prefix, power, "none", True)
    return maps


def forward(
    students: Sequence[Float[Tensor, "total ..."]],
    teachers: Sequence[Float[Tensor, "_ ..."]] | None,
    teacher_powers: Float[Tensor, "layer batch position"] | None,
    weights: Float[Tensor, "2 layer"],
    losses: Float[Tensor, "layer 2 batch"],
    *,
    prefix: int,
    power: float,
    clone: Literal["none", "cosine", "mse"],
    attention: bool,
    library: ctypes.CDLL,
) -> Float[Tensor, "layer plane batch position"]:
    """Losses of each layer and image, and what :func:`backward` needs of the forward pass.

    Args:
        students: Activations of one shape and dtype, one a layer.
        teachers: Of the teacher; None where its power maps are all that is needed.
        teacher_powers: Its :func:`power_maps`; None: computed here.
        weights: Of the attention and the clone loss of each layer.
        losses: Filled: weighted attention losses and clone losses. Its batch is what counts.
        prefix: Class and register tokens to leave out (tokens only).
        power: p of the attention map, at least 1.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.
        library: The built kernels.

    Returns:
        Coefficients: d loss / d A with attention; then alpha and beta of d loss / d s = alpha s +
        beta t with the cosine.
    """
    layers, batch = len(students), losses.shape[2]
    planes = attention + 2 * (clone == "cosine")
    coefficients = _empty(layers, planes, batch, _positions(students[0], prefix), like=students[0])
    for layer, student in enumerate(students):
        teacher = None if teachers is None else teachers[layer]
        teacher_power = None if teacher_powers is None else teacher_powers[layer]
        tables = (teacher_power, weights[:, layer], losses[layer], coefficients[layer], None)
        activations = (student, teacher, None, None)
        _run(library, activations, tables, batch, prefix, power, clone, attention)
    return coefficients


def backward(
    student: Float[Tensor, "total ..."],
    teacher: Float[Tensor, "_ ..."] | None,
    coefficients: Float[Tensor, "plane batch position"],
    weights: Float[Tensor, "2"],
    grad_losses: Float[Tensor, "2 batch"],
    trunk: Float[Tensor, "total ..."] | None,
    out: Float[Tensor, "total ..."],
    *,
    prefix: int,
    power: float,
    clone: Literal["none", "cosine", "mse"],
    attention: bool,
    library: ctypes.CDLL,
) -> None:
    """Gradient of one layer's losses with respect to the student, added to the trunk's.

    Args:
        student: As in the forward pass, as are the settings.
        teacher: Needed by the clone loss only.
        coefficients: Of this layer, from :func:`forward`.
        weights: Of this layer.
        grad_losses: Cotangent of this layer's losses.
        trunk: Gradient that arrives from later layers; None: nothing is added.
        out: Filled where images and positions count, left alone elsewhere. May be ``trunk``.
        prefix: Class and register tokens to leave out (tokens only).
        power: p of the attention map.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.
        library: The built kernels.
    """
    activations = (student, None if clone == "none" else teacher, trunk, out)
    tables = (None, weights, None, coefficients, grad_losses)
    _run(library, activations, tables, grad_losses.shape[1], prefix, power, clone, attention)


def forward_with_gradient(
    student: Float[Tensor, "total ..."],
    teacher: Float[Tensor, "_ ..."] | None,
    teacher_power: Float[Tensor, "batch position"] | None,
    weights: Float[Tensor, "2"],
    losses: Float[Tensor, "2 batch"],
    out: Float[Tensor, "total ..."],
    *,
    prefix: int,
    power: float,
    clone: Literal["none", "cosine", "mse"],
    attention: bool,
    library: ctypes.CDLL,
) -> None:
    """Losses of one layer and the gradient of their sum, while each image is in the cache.

    Three passes over a tensor, where :func:`forward` and :func:`backward` need five.

    Args:
        student: Activation of the student.
        teacher: Of the teacher; None where its power map is all that is needed.
        teacher_power: Its power map; None: computed here.
        weights: Of the attention and the clone loss.
        losses: Filled: weighted attention losses and clone losses. Its batch is what counts.
        out: Filled where images and positions count, left alone elsewhere.
        prefix: Class and register tokens to leave out (tokens only).
        power: p of the attention map, at least 1.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.
        library: The built kernels.
    """
    activations = (student, teacher, None, out)
    tables = (teacher_power, weights, losses, None, None)
    _run(library, activations, tables, losses.shape[1], prefix, power, clone, attention)


def _run(
    library: ctypes.CDLL,
    activations: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    tables: tuple[Tensor | None, ...],
    images: int,
    prefix: int,
    power: float,
    clone: str,
    attention: bool,
) -> None:
    tensors = (*activations, *tables)
    # Preparing a job costs as much as a small layer: once for each set of shapes and strides.
    kinds = tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])
    job = _job(kinds, images, prefix, power, clone, attention)
    data = _Data(*[None if x is None else x.data_ptr() for x in tensors])
    library.run(job, ctypes.byref(data))


@functools.lru_cache(maxsize=1024)
def _job(
    kinds: tuple[_Kind | None, ...],
    images: int,
    prefix: int,
    power: float,
    clone: str,
    attention: bool,
) -> Any:
    activations, tables = kinds[: len(_ACTIVATIONS)], kinds[len(_ACTIVATIONS) :]
    layouts = [_layout(kind, prefix) for kind in activations]
    student, (dtype, *_) = layouts[0], kinds[0] or (torch.float32,)
    assert student is not None
    positions, channels = student.positions, student.channels
    job = _Job(images=images, positions=positions, channels=channels)
    for name, kind, layout in zip(_ACTIVATIONS, activations, layouts, strict=True):
        if kind is not None:
            assert layout is not None
            sizes = layout.kind, layout.positions, layout.channels
            assert (kind[0], *sizes) == (dtype, student.kind, positions, channels)
            assert images <= layout.images
            strides = layout.stride_image, layout.stride_position, layout.stride_channel
            setattr(job, name, _Activation(layout.start, *strides))
    planes = attention + 2 * (clone == "cosine")
    shapes = ((images, positions), (2,), (2, images), (planes, images, positions), (2, images))
    for name, kind, shape in zip(_TABLES, tables, shapes, strict=True):
        if kind is not None:
            assert kind[:2] == (_sum_dtype(dtype), shape)
            getattr(job, name)[:] = kind[2]
    job.power, job.dtype, job.planes = power, _DTYPES[dtype], student.kind == "planes"
    job.clone, job.attention = _CLONES[clone], attention
    return ctypes.byref(job)


def _layout(kind: _Kind | None, prefix: int) -> Layout | None:
    if kind is None:
        return None
    return layout_of(torch.empty_strided(kind[1], kind[2], device="meta"), prefix=prefix)


def _positions(activation: Tensor, prefix: int) -> int:
    if activation.ndim == 3:
        return activation.shape[1] - prefix
    return activation.shape[2:].numel()


def _empty(*sizes: int, like: Tensor) -> Tensor:
    return torch.empty(sizes, dtype=_sum_dtype(like.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
