"""Which items every step takes: passes over all images, end to end, cut into batches.

A pass visits every image exactly once, in an order of its own. Passes follow each other without a
gap and batches are cut from that stream, so that every batch is full and one that begins in a pass
may end in the next (and hold an item twice, seen in two ways); the last batch of a run is filled up
from the pass that would follow. Nothing depends on how many processes share a batch, and there is
no state: a resumed run goes on with the identical items, in whatever number of processes.
"""

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from mimic_fast.data.counter import uniforms
from mimic_fast.distributed import Processes
from mimic_fast.errors import UsageError

_STREAM = 2000


def check_batch(images: int, *, batch_size: int, processes: Processes, parts: int = 1) -> None:
    """Refuses a global batch that does not fit the images, the processes or their parts.

    Args:
        images: Of a pass.
        batch_size: Images of a step over all processes.
        processes: They share it evenly.
        parts: Each process takes its share in so many.

    Raises:
        UsageError: If the batch is larger than a pass, or cannot be shared evenly.
    """
    if batch_size % processes.world:
        raise UsageError(
            f"optim.batch_size {batch_size} does not divide by {processes.world} processes; "
            f"use {batch_size // processes.world * processes.world or processes.world}"
        )
    share = batch_size // processes.world
    if share % parts:
        raise UsageError(
            f"optim.batch_size {batch_size} gives each process {share} images, which do not divide "
            f"into optim.accumulate {parts} parts; choose a divisor of {share}"
        )
    if images < batch_size:
        raise UsageError(
            f"optim.batch_size {batch_size} exceeds the {images} training images; "
            "set optim.batch_size lower or draw more (data.clean_fraction)"
        )


def steps_of(passes: int, images: int, *, batch_size: int) -> int:
    """Steps until that many passes over the images are complete."""
    return -(-passes * images // batch_size)


@functools.lru_cache(maxsize=4)
def epoch_order(images: int, *, seed: int, epoch: int) -> Int[Tensor, " image"]:
    """The order of all item ids in one pass; the caller must not write into it."""
    # Sorted by hashed keys; ties (24 bits) fall back to the stable order of ids.
    keys = uniforms(torch.arange(images), 1, seed=seed, epoch=epoch, stream=_STREAM)[:, 0]
    return keys.argsort(stable=True)


def step_items(
    step: int, *, images: int, batch_size: int, seed: int, processes: Processes
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Ids of the items that this process takes in a step, and the pass each belongs to.

    Args:
        step: Of the run, from 0.
        images: Items of a pass; item ids are 0 .. images - 1.
        batch_size: Items of a step over all processes.
        seed: Seed of the run.
        processes: This process takes its slice of the batch: rank 0 the first.
    """
    share = batch_size // processes.world
    start = step * batch_size + processes.rank * share
    places = torch.arange(start, start + share)
    epochs, places = places // images, places % images
    ids = torch.empty_like(places)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        inside = epochs == epoch
        ids[inside] = epoch_order(images, seed=seed, epoch=epoch)[places[inside]]
    return ids, epochs
