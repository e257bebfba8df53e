"""The views of decoded images on the CPU: checked inputs, and the path that is picked.

``data/augment.py`` has the formulas and is the path where the C++ kernels cannot run. Every image
is made by itself: results are the same bits at any place in any batch, for any number of threads.
"""

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mimic_fast.data.augment import apply_colors, apply_view, plain_view
from mimic_fast.data.view_parameters import ViewParameters
from mimic_fast.kernels import cpu_views
from mimic_fast.ops_choice import choose, count_call, cpu_library


def views(
    pool: UInt8[Tensor, "image channel side side"],
    rows: Int64[Tensor, " batch"],
    drawn: ViewParameters,
    *,
    image_size: int,
    channels_last: bool = False,
    out: Float32[Tensor, "batch channel _ _"] | None = None,
) -> Float32[Tensor, "batch channel _ _"]:
    """``apply_view(pool[rows], drawn)`` without a copy of the images, in [0, 1].

    Args:
        pool: Decoded images, dense; may be mapped from a file.
        rows: Which of them.
        drawn: How each is seen.
        image_size: Height and width of the result, pixels.
        channels_last: Whether the result is laid out as ``torch.channels_last``.
        out: Filled and returned, laid out so; None: a new tensor.

    Raises:
        ValueError: If shapes, dtypes or layouts do not fit, or a box is not whole pixels of an
            image.
        IndexError: If a row is not in the pool.
    """
    _check_pool(pool, rows)
    _check_drawn(drawn, len(rows), pool.device)
    _check_boxes(drawn.box, pool.shape[-1])
    _check_size(image_size)
    result = _result(out, (len(rows), pool.shape[1], image_size, image_size), channels_last, pool)
    if _path(pool) == "reference":
        return result.copy_(apply_view(pool[rows], drawn, image_size=image_size))
    box, flip = drawn.box.float().contiguous(), drawn.flip.contiguous()
    library = cpu_library("cpu_views")
    rows = rows.contiguous()
    cpu_views.views(pool, rows, box, flip, _colors(drawn), result, library=library)
    return result


def plain(
    pool: UInt8[Tensor, "image channel side side"],
    rows: Int64[Tensor, " batch"],
    *,
    image_size: int,
    channels_last: bool = False,
    out: Float32[Tensor, "batch channel _ _"] | None = None,
) -> Float32[Tensor, "batch channel _ _"]:
    """``plain_view(pool[rows])``, to the last bit, without a copy of the images.

    Arguments and errors are those of :func:`views`; a ``ValueError`` too if the images are smaller
    than ``image_size``.
    """
    _check_pool(pool, rows)
    _check_size(image_size)
    margin = (pool.shape[-1] - image_size) // 2
    if margin < 0:
        raise ValueError(f"images of {pool.shape[-1]} pixels are smaller than {image_size}")
    result = _result(out, (len(rows), pool.shape[1], image_size, image_size), channels_last, pool)
    if _path(pool) == "reference":
        return result.copy_(plain_view(pool[rows], image_size=image_size))
    cut = slice(margin, margin + image_size)
    library = cpu_library("cpu_views")
    cpu_views.convert(pool[..., cut, cut], rows.contiguous(), None, result, library=library)
    return result


def from_crops(
    crops: UInt8[Tensor, "batch channel height width"],
    drawn: ViewParameters | None = None,
    *,
    channels_last: bool = False,
    out: Float32[Tensor, "batch channel height width"] | None = None,
) -> Float32[Tensor, "batch channel height width"]:
    """Crops that another backend made become floats in [0, 1], with the colors that were drawn.

    Args:
        crops: Of any strides: those of a batch ``[B, H, W, C]`` are ``batch.permute(0, 3, 1, 2)``.
        drawn: How each is seen; only the colors count. None: as it is.
        channels_last: Whether the result is laid out as ``torch.channels_last``.
        out: Filled and returned, laid out so; None: a new tensor.

    Raises:
        ValueError: If shapes, dtypes or layouts do not fit.
    """
    _check_images(crops, torch.uint8)
    if drawn is not None:
        _check_drawn(drawn, len(crops), crops.device)
    result = _result(out, tuple(crops.shape), channels_last, crops)
    if _path(crops) == "reference":
        plain_crops = crops.float() / 255
        return result.copy_(plain_crops if drawn is None else apply_colors(plain_crops, drawn))
    colors = None if drawn is None else _colors(drawn)
    cpu_views.convert(crops, None, colors, result, library=cpu_library("cpu_views"))
    return result


def colors_(
    crops: Float32[Tensor, "batch channel height width"], drawn: ViewParameters
) -> Float32[Tensor, "batch channel height width"]:
    """``apply_colors(crops, drawn)`` in place.

    Args:
        crops: In [0, 1], dense in NCHW or ``torch.channels_last``; changed and returned.
        drawn: How each is seen; only the colors count.

    Raises:
        ValueError: If shapes, dtypes or the layout do not fit.
    """
    _check_images(crops, torch.float32)
    _check_drawn(drawn, len(crops), crops.device)
    if not crops.is_contiguous() and not crops.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"expected crops that are dense in NCHW or channels_last, got strides {crops.stride()};"
            " make them .contiguous()"
        )
    if _path(crops) == "reference":
        return crops.copy_(apply_colors(crops, drawn))
    cpu_views.change_colors(crops, _colors(drawn), library=cpu_library("cpu_views"))
    return crops


def _path(images: Tensor) -> str:
    path = choose("views", images.device).path
    count_call("views", path)
    return path


def _colors(drawn: ViewParameters) -> cpu_views.Colors:
    return cpu_views.Colors(
        jittered=drawn.jittered.contiguous(),
        amounts=drawn.amounts.float().contiguous(),
        order=drawn.order.long().contiguous(),
        gray=drawn.gray.contiguous(),
    )


def _result(
    out: Tensor | None, shape: tuple[int, ...], channels_last: bool, like: Tensor
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device=like.device, memory_format=layout)
    if out.shape != shape or out.dtype != torch.float32 or out.device != like.device:
        raise ValueError(
            f"expected out to be {list(shape)} torch.float32 on {like.device}, got "
            f"{list(out.shape)} {out.dtype} on {out.device}"
        )
    if not out.is_contiguous(memory_format=layout):
        name = "channels_last" if channels_last else "NCHW"
        raise ValueError(f"expected out to be dense in {name}, got strides {out.stride()}")
    return out


def _check_images(images: Tensor, dtype: torch.dtype) -> None:
    if images.dtype != dtype or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"expected {dtype} images [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
        )


def _check_pool(pool: Tensor, rows: Tensor) -> None:
    _check_images(pool, torch.uint8)
    if pool.shape[2] != pool.shape[3] or not pool.is_contiguous():
        raise ValueError(
            f"expected a pool of squares that is dense, got {list(pool.shape)} with strides "
            f"{pool.stride()}; make it .contiguous()"
        )
    if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != pool.device:
        raise ValueError(
            f"expected int64 rows [B] on {pool.device}, got {rows.dtype} {list(rows.shape)} on "
            f"{rows.device}"
        )
    if not len(rows):
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= len(pool):
        raise IndexError(f"rows must lie in 0..{len(pool) - 1}, got {low}..{high}")


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")


def _check_drawn(drawn: ViewParameters, batch: int, device: torch.device) -> None:
    expected = {"box": 4, "flip": 0, "jittered": 0, "amounts": 4, "order": 4, "gray": 0}
    for name, columns in expected.items():
        shape = (batch, columns) if columns else (batch,)
        tensor: Tensor = getattr(drawn, name)
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"expected drawn.{name} {list(shape)} on {device}, got {list(tensor.shape)} on "
                f"{tensor.device}"
            )
        if not columns and tensor.dtype != torch.bool:
            raise ValueError(f"expected drawn.{name} as torch.bool, got {tensor.dtype}")


def _check_boxes(box: Tensor, side: int) -> None:
    start, length = box[:, :2], box[:, 2:]
    fits = (start >= 0) & (length >= 1) & (start + length <= side)
    fits = fits & (start == start.floor()) & (length == length.floor())
    if not bool(fits.all()):
        wrong = box[~fits.all(dim=1)][0].tolist()
        raise ValueError(
            f"expected boxes of whole pixels within {side} x {side}, got top, left, height, width "
            f"{wrong}"
        )
