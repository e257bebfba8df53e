"""Joint histograms and mutual information: checked inputs, and the path that is picked."""

from types import ModuleType

import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64, UInt8
from torch import Tensor

from mimic_fast.kernels import reference
from mimic_fast.ops_choice import Path, choose, count_call, cpu_library


def equal_mass_codes(
    values: Float[Tensor, "direction image"], *, bins: int
) -> UInt8[Tensor, "direction image"]:
    """Bin of every image by its rank, K bins of equal mass; as ``reference.equal_mass_codes``.

    Raises:
        ValueError: If K is not 2 to 256, or a value is NaN, which has no rank.
    """
    _check_bins(bins)
    if bool(values.isnan().any()):
        raise ValueError("expected numbers to rank, got NaN; edge_codes counts NaN apart")
    path = choose("histogram", values.device).path
    # Ranking is a sort: torch has the GPU's, and there is no kernel of ours for it.
    return _on_path(
        "reference" if path == "triton" else path, "equal_mass_codes", values, bins=bins
    )


def edge_codes(
    values: Float[Tensor, "direction image"], edges: Float[Tensor, "direction edge"]
) -> UInt8[Tensor, "direction image"]:
    """Bin of every value between given edges; as ``reference.edge_codes``.

    Raises:
        ValueError: If there are not 3 to 256 edges (2 to 255 bins) for every direction.
    """
    if edges.shape[0] != values.shape[0] or not 3 <= edges.shape[1] <= 256:
        raise ValueError(
            f"expected 3 to 256 edges for each of {values.shape[0]} directions, got "
            f"{list(edges.shape)}; 256 bins leave no code for NaN"
        )
    return _on_path(choose("histogram", values.device).path, "edge_codes", values, edges)


def joint_histogram(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    groups: Int64[Tensor, " image"] | None = None,
    *,
    bins: int,
    num_groups: int = 1,
    rolls: tuple[int, ...] = (0,),
    images: tuple[int, int] | None = None,
) -> Int32[Tensor, "roll group pair bins bins"]:
    """Joint bin counts of matched pairs, all pairs, groups and rolls at once.

    Arguments and result are those of ``reference.joint_histogram``.

    Raises:
        ValueError: If codes, bins, groups or the range of images do not fit together.
    """
    _check_codes(x_codes, y_codes, bins, matched=True)
    total = x_codes.shape[1]
    start, stop = images or (0, total)
    if not 0 <= start <= stop <= total:
        raise ValueError(f"images must be a range within 0..{total}, got {start}..{stop}")
    if groups is not None:
        if groups.shape != (total,):
            raise ValueError(f"expected a group for each of {total} images, got {groups.shape[0]}")
        if not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
            raise ValueError(f"groups must lie in 0..{num_groups - 1}; number them from 0")
    return _counted(
        "joint_histogram",
        x_codes,
        y_codes,
        groups,
        bins=bins,
        num_groups=num_groups,
        rolls=rolls,
        images=images,
    )


def cross_histogram(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Int32[Tensor, "roll x_direction y_direction bins bins"]:
    """Joint bin counts of every first direction with every second; see ``joint_histogram``."""
    _check_codes(x_codes, y_codes, bins, matched=False)
    return _counted("cross_histogram", x_codes, y_codes, bins=bins, rolls=rolls)


def matched_information(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Float32[Tensor, "roll pair"] | Float64[Tensor, "roll pair"]:
    """Plug-in mutual information of matched pairs, nats; no table of counts is written."""
    _check_codes(x_codes, y_codes, bins, matched=True)
    return _counted("matched_information", x_codes, y_codes, bins=bins, rolls=rolls)


def cross_information(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> (
    Float32[Tensor, "roll x_direction y_direction"]
    | Float64[Tensor, "roll x_direction y_direction"]
):
    """Plug-in mutual information of every pair of directions, nats; see above."""
    _check_codes(x_codes, y_codes, bins, matched=False)
    return _counted("cross_information", x_codes, y_codes, bins=bins, rolls=rolls)


def _counted(
    name: str, x_codes: Tensor, y_codes: Tensor, *rest: object, **settings: object
) -> Tensor:
    path = choose("histogram", x_codes.device).path
    count_call("histogram", path)
    return _on_path(path, name, x_codes, y_codes, *rest, **settings)


def _on_path(path: Path, name: str, *arguments: object, **settings: object) -> Tensor:
    if path == "cpp":
        settings["library"] = cpu_library("cpu_histogram")
    return getattr(_module(path), name)(*arguments, **settings)


def _module(path: Path) -> ModuleType:
    if path == "triton":
        from mimic_fast.kernels import mi_histogram

        return mi_histogram
    if path == "cpp":
        from mimic_fast.kernels import cpu_histogram

        return cpu_histogram
    return reference


def _check_bins(bins: int) -> None:
    if not 2 <= bins <= 256:
        raise ValueError(f"bins must be 2 to 256, got {bins}")


def _check_codes(x_codes: Tensor, y_codes: Tensor, bins: int, *, matched: bool) -> None:
    _check_bins(bins)
    for codes in (x_codes, y_codes):
        if codes.dtype != torch.uint8 or codes.ndim != 2:
            raise ValueError(
                f"expected uint8 codes [direction, image], got {codes.dtype} {list(codes.shape)}"
            )
    if x_codes.shape[1] != y_codes.shape[1] or (matched and x_codes.shape != y_codes.shape):
        pairs = "of the same pairs and images" if matched else "of the same images"
        raise ValueError(
            f"expected codes {pairs}, got {list(x_codes.shape)} and {list(y_codes.shape)}"
        )
    if x_codes.shape[1] == 0:
        raise ValueError("expected at least one image, got none")
    if x_codes.device != y_codes.device:
        raise ValueError(f"expected codes on one device, got {x_codes.device} and {y_codes.device}")
