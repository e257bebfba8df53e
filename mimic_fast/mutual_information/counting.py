"""Joint counts of canonical pairs, added over processes: the only thing that crosses between them.

Process 0 bins; every process counts its share of the images; integers are summed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from mimic_fast.distributed import Processes, broadcast_tensors, sum_counts
from mimic_fast.ops import equal_mass_codes, joint_histogram


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


def count_pairs(
    coordinates: tuple[Float[Tensor, "pair image"], Float[Tensor, "pair image"]] | None,
    *,
    bins: int,
    num_groups: int,
    shuffles: int,
    processes: Processes,
) -> PairCounts:
    """Bins both sides of every pair and counts, on all processes together.

    A shuffled pairing rolls one side against the other; the order of the images is random.

    Args:
        coordinates: Both sides of the pairs on process 0; None on the others.
        bins: K.
        num_groups: Jackknife groups.
        shuffles: Shuffled pairings.
        processes: All of them must call.
    """
    sides = [] if coordinates is None else [equal_mass_codes(v, bins=bins) for v in coordinates]
    x_codes, y_codes = broadcast_tensors(sides, processes)
    images = x_codes.shape[1]
    share = (
        processes.rank * images // processes.world,
        (processes.rank + 1) * images // processes.world,
    )
    group = jackknife_group(images, num_groups=num_groups).to(x_codes.device)
    counts = joint_histogram(
        x_codes, y_codes, group, bins=bins, num_groups=num_groups, images=share
    )
    rolls = tuple(1 + turn * (images - 1) // shuffles for turn in range(shuffles))
    rolled = joint_histogram(x_codes, y_codes, bins=bins, rolls=rolls, images=share)
    return PairCounts(
        groups=sum_counts(counts[0], processes).cpu(),
        shuffled=sum_counts(rolled[:, 0], processes).cpu(),
    )
