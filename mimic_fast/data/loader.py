"""From decoded images to batches: which items, in which order, seen how.

Everything is a function of (seed, epoch, step): there is no state to save, a resumed run gets the
identical next batch, and any number of processes sees the same global batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.augment import augmented_view
from mimic_fast.data.counter import uniforms
from mimic_fast.distributed import Processes
from mimic_fast.errors import UsageError

_ORDER_STREAM = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This process's share of one global batch.

    Args:
        v1: First view, ``[B, C, H, W]`` in [0, 1].
        v2: Second view, or None where no loss needs it.
        ids: Item ids, ``[B]``.
    """

    v1: Tensor
    v2: Tensor | None
    ids: Tensor


def steps_per_epoch(images: int, *, batch_size: int, processes: Processes) -> int:
    """Full global batches in one pass; the remainder waits for another epoch's order.

    Raises:
        UsageError: If not one batch fits, or the batch cannot be shared evenly.
    """
    if batch_size % processes.world:
        raise UsageError(
            f"optim.batch_size {batch_size} does not divide by {processes.world} processes; "
            f"use {batch_size // processes.world * processes.world or processes.world}"
        )
    if images < batch_size:
        raise UsageError(
            f"optim.batch_size {batch_size} exceeds the {images} training images; "
            "set optim.batch_size lower or draw more (data.clean_fraction)"
        )
    return images // batch_size


def epoch_order(images: int, *, seed: int, epoch: int) -> Int[Tensor, " image"]:
    """The order of all item ids in one pass."""
    # Sorted by hashed keys; ties (24 bits) fall back to the stable order of ids.
    keys = uniforms(torch.arange(images), 1, seed=seed, epoch=epoch, stream=_ORDER_STREAM)[:, 0]
    return keys.argsort(stable=True)


def batch_ids(
    order: Int[Tensor, " image"], *, batch_size: int, step: int, processes: Processes
) -> Int[Tensor, " batch"]:
    """Item ids of this process in step ``step`` of the epoch: its slice of the global batch."""
    share = batch_size // processes.world
    start = step * batch_size + processes.rank * share
    return order[start : start + share]


def make_batch(
    pool: UInt8[Tensor, "image channel side side"],
    ids: Int[Tensor, " batch"],
    *,
    settings: DataSettings,
    image_size: int,
    seed: int,
    epoch: int,
    second: bool,
) -> Batch:
    """Augments the images of ``ids``.

    Args:
        pool: All training images; item id = row.
        ids: Which of them.
        settings: Augmentation.
        image_size: Height and width of the views, pixels.
        seed: Seed of the run.
        epoch: Pass over the data.
        second: Whether the second view is needed.
    """
    images = pool[ids]

    def view(number: int) -> Float[Tensor, "batch channel height width"]:
        return augmented_view(
            images,
            ids,
            settings=settings,
            image_size=image_size,
            seed=seed,
            epoch=epoch,
            view=number,
        )

    return Batch(v1=view(1), v2=view(2) if second else None, ids=ids)
