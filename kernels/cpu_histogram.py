"""Bin codes, joint counts and mutual information by the C++ kernels of ``cpu_histogram.cpp``.

The names, arguments and results are those of ``reference.py``, with one argument more: ``library``
is what ``cpu_build.load_library("cpu_histogram", cache)`` returned. Tensors lie in CPU memory; rows
of codes are read where they are if they are dense. Work is dealt to torch's threads, and results do
not depend on their number.
"""

import ctypes

import torch
from jaxtyping import Float, Float64, Int32, Int64, UInt8
from torch import Tensor

from mimic_fast.kernels import reference

_C_NAMES = {torch.float32: "float", torch.float64: "double"}


def edge_codes(
    values: Float[Tensor, "direction image"],
    edges: Float[Tensor, "direction edge"],
    *,
    library: ctypes.CDLL,
) -> UInt8[Tensor, "direction image"]:
    """Bin of every value, K = edges - 1 bins a direction; NaN and what lies outside is missing."""
    dtype = _float_or_double(torch.promote_types(values.dtype, edges.dtype))
    values, edges = values.to(dtype).contiguous(), edges.to(dtype).contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    _call(
        library,
        f"edge_codes_{_C_NAMES[dtype]}",
        values,
        edges,
        *values.shape,
        edges.shape[1] - 1,
        codes,
    )
    return codes


def equal_mass_codes(
    values: Float[Tensor, "direction image"], *, bins: int, library: ctypes.CDLL
) -> UInt8[Tensor, "direction image"]:
    """Bin of every image by its rank: K bins of equal mass; equal values share a bin."""
    dtype = _float_or_double(values.dtype)
    values = values.to(dtype).contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    unordered = torch.zeros(len(values), dtype=torch.bool)
    if values.numel():
        _call(
            library,
            f"equal_mass_codes_{_C_NAMES[dtype]}",
            values,
            *values.shape,
            bins,
            codes,
            unordered,
        )
    if unordered.any():  # NaN has no rank: what it does to the others is the oracle's affair
        codes[unordered] = reference.equal_mass_codes(values[unordered], bins=bins)
    return codes


def joint_histogram(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    groups: Int64[Tensor, " image"] | None = None,
    *,
    bins: int,
    num_groups: int = 1,
    rolls: tuple[int, ...] = (0,),
    images: tuple[int, int] | None = None,
    library: ctypes.CDLL,
) -> Int32[Tensor, "roll group pair bins bins"]:
    """Joint bin counts of matched pairs, apart for every group of images and roll.

    Images whose group is not in ``0..num_groups - 1`` are not counted.
    """
    pairs, total = x_codes.shape
    start, stop, _ = slice(*(images or (0, total))).indices(total)
    counts = torch.empty(len(rolls), num_groups, pairs, bins, bins, dtype=torch.int32)
    _call(
        library,
        "joint_histogram",
        *_rows(x_codes),
        *_rows(y_codes),
        None if groups is None else groups.contiguous(),
        pairs,
        total,
        start,
        max(start, stop),
        bins,
        num_groups,
        *_list(rolls),
        counts,
    )
    return counts


def cross_histogram(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
    library: ctypes.CDLL,
) -> Int32[Tensor, "roll x_direction y_direction bins bins"]:
    """Joint bin counts of every first direction with every second."""
    shape = (len(rolls), len(x_codes), len(y_codes), bins, bins)
    counts = torch.empty(shape, dtype=torch.int32)
    _call(
        library,
        "cross",
        *_rows(x_codes),
        len(x_codes),
        *_rows(y_codes),
        len(y_codes),
        x_codes.shape[1],
        bins,
        *_list(rolls),
        None,
        counts,
    )
    return counts


def matched_information(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
    library: ctypes.CDLL,
) -> Float64[Tensor, "roll pair"]:
    """Plug-in mutual information of matched pairs, nats."""
    information = torch.empty(len(rolls), len(x_codes), dtype=torch.float64)
    _call(
        library,
        "matched_information",
        *_rows(x_codes),
        *_rows(y_codes),
        *x_codes.shape,
        bins,
        *_list(rolls),
        information,
    )
    return information


def cross_information(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
    library: ctypes.CDLL,
) -> Float64[Tensor, "roll x_direction y_direction"]:
    """Plug-in mutual information of every first direction with every second, nats."""
    information = torch.empty(len(rolls), len(x_codes), len(y_codes), dtype=torch.float64)
    _call(
        library,
        "cross",
        *_rows(x_codes),
        len(x_codes),
        *_rows(y_codes),
        len(y_codes),
        x_codes.shape[1],
        bins,
        *_list(rolls),
        information,
        None,
    )
    return information


def _float_or_double(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32  # holds halves exactly


def _rows(codes: Tensor) -> tuple[Tensor, int]:
    """Codes whose rows are dense, copied only if they are not, and the bytes between rows."""
    dense = codes if codes.stride(1) == 1 else codes.contiguous()
    return dense, dense.stride(0)


def _list(numbers: tuple[int, ...]) -> tuple[Tensor, int]:
    return torch.tensor(numbers, dtype=torch.int64), len(numbers)


def _call(library: ctypes.CDLL, name: str, *arguments: Tensor | int | None) -> None:
    """Calls a C function with pointers and 64-bit integers; ``arguments`` keeps tensors alive."""
    passed: list[ctypes.c_void_p | ctypes.c_int64] = []
    for argument in arguments:
        if isinstance(argument, int):
            passed.append(ctypes.c_int64(argument))
        else:
            assert argument is None or argument.device.type == "cpu", name
            passed.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
    getattr(library, name)(*passed)
