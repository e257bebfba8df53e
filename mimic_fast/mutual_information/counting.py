"""Joint counts of pairs of directions, added over processes: only they cross between them.

Process 0 bins; every process counts its share of the images; integers are summed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from mimic_fast.distributed import Processes, broadcast_tensors, sum_counts
from mimic_fast.ops import cross_histogram, equal_mass_codes, joint_histogram


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """Joint histograms of one layer's pairs on one measured half.

    Args:
        groups: Apart for every jackknife group of images; their sum holds every image once.
        shuffled: Of shuffled pairings, all images each.
    """

    groups: Int32[Tensor, "group pair bins bins"]
    shuffled: Int32[Tensor, "shuffle pair bins bins"]


def jackknife_group(images: int, *, num_groups: int) -> Tensor:
    """Group of each image of a measured half, whose order is random already."""
    return torch.arange(images) % num_groups


def shuffling_rolls(images: int, *, shuffles: int) -> tuple[int, ...]:
    """By how many images one side is rolled against the other, once for each shuffled pairing."""
    return tuple(1 + turn * (images - 1) // shuffles for turn in range(shuffles))


def bin_codes(
    coordinates: tuple[Float[Tensor, "x_direction image"], Float[Tensor, "y_direction image"]]
    | None,
    *,
    bins: int,
    processes: Processes,
) -> tuple[UInt8[Tensor, "x_direction image"], UInt8[Tensor, "y_direction image"]]:
    """Bins of both sides, from process 0's coordinates, on all processes."""
    sides = [] if coordinates is None else [equal_mass_codes(v, bins=bins) for v in coordinates]
    x_codes, y_codes = broadcast_tensors(sides, processes)
    return x_codes, y_codes


def count_matched(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    *,
    bins: int,
    num_groups: int,
    shuffles: int,
    processes: Processes,
) -> PairCounts:
    """Counts of the pairs of directions ``i`` and ``i``, on all processes together.

    A shuffled pairing rolls one side against the other; the order of the images is random.

    Args:
        x_codes: Bins of the first side, the same on all processes.
        y_codes: Bins of the second side.
        bins: K.
        num_groups: Jackknife groups.
        shuffles: Shuffled pairings.
        processes: All of them must call.
    """
    images = x_codes.shape[1]
    share = _share(images, processes)
    group = jackknife_group(images, num_groups=num_groups).to(x_codes.device)
    counts = joint_histogram(
        x_codes, y_codes, group, bins=bins, num_groups=num_groups, images=share
    )
    rolls = shuffling_rolls(images, shuffles=shuffles)
    rolled = joint_histogram(x_codes, y_codes, bins=bins, rolls=rolls, images=share)
    return PairCounts(
        groups=sum_counts(counts[0], processes).cpu(),
        shuffled=sum_counts(rolled[:, 0], processes).cpu(),
    )


def count_crossed(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    num_groups: int,
    shuffles: int,
    processes: Processes,
) -> PairCounts:
    """Counts of every direction of x with every direction of y, those of the first x first.

    Arguments as for :func:`count_matched`.
    """
    images = x_codes.shape[1]
    own = slice(*_share(images, processes))
    group = jackknife_group(images, num_groups=num_groups).to(x_codes.device)[own]
    x, y = x_codes[:, own], y_codes[:, own]
    groups = [
        _crossed(x[:, group == index], y[:, group == index], bins=bins)
        for index in range(num_groups)
    ]
    rolls = shuffling_rolls(images, shuffles=shuffles)
    shuffled = [_crossed(x, y_codes.roll(roll, 1)[:, own], bins=bins) for roll in rolls]
    return PairCounts(
        groups=sum_counts(torch.stack(groups), processes).cpu(),
        shuffled=sum_counts(torch.stack(shuffled), processes).cpu(),
    )


def _crossed(x_codes: Tensor, y_codes: Tensor, *, bins: int) -> Int32[Tensor, "pair bins bins"]:
    pairs = len(x_codes) * len(y_codes)
    if x_codes.shape[1] == 0:  # a process with fewer images than there are groups
        return torch.zeros(pairs, bins, bins, dtype=torch.int32, device=x_codes.device)
    counts = cross_histogram(x_codes.contiguous(), y_codes.contiguous(), bins=bins)
    return counts[0].flatten(0, 1)


def _share(images: int, processes: Processes) -> tuple[int, int]:
    """First image that this process counts, and the one after its last."""
    rank, world = processes.rank, processes.world
    return rank * images // world, (rank + 1) * images // world
