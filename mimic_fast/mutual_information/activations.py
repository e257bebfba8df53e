"""Activations of the clean images: pooled vectors of every tap, the same for any process count.

The images are cut into fixed chunks, whole chunks go to processes, and the float32 vectors are
gathered in the order of the images: every forward pass has the shape it has in a single process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mimic_fast.data.augment import plain_view
from mimic_fast.distributed import Processes, all_gather_rows, any_process, broadcast_json
from mimic_fast.encoders.taps import TappedEncoder, undisturbed
from mimic_fast.errors import SelfTestError, StoppedError
from mimic_fast.mutual_information.finished_parts import FinishedParts
from mimic_fast.progress import Event, Reporter

Images = UInt8[Tensor, "image channel side side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepA:
    """What every part of step A needs to run in step with the other processes.

    Args:
        processes: All of them, this one's place among them.
        parts: Finished parts of an earlier try.
        report: Told of progress.
        stop: Polled between chunks and epochs, on all processes equally often.
    """

    processes: Processes
    parts: FinishedParts
    report: Reporter
    stop: Callable[[], bool]

    def poll(self) -> None:
        """Leaves if any process was told to stop; finished parts are on disk by then.

        Raises:
            StoppedError: On all processes alike.
        """
        if any_process(self.stop(), self.processes):
            raise StoppedError("stopped in step A; go on with --resume auto")


def pooled_activations(
    tapped: TappedEncoder,
    images: Images,
    *,
    chunk: int,
    pool: Literal["mean", "class_token"],
    step: StepA,
) -> tuple[Float32[Tensor, "image feature"], tuple[Float32[Tensor, "image _"], ...]]:
    """Features and one pooled vector per tap of every image, on the CPU of every process.

    Args:
        tapped: The encoder whose activations are measured, on ``step.processes.device``.
        images: All clean images.
        chunk: Images per forward pass.
        pool: How a tap becomes one vector.
        step: Processes, finished parts, progress.

    Raises:
        StoppedError: If a process was told to stop.
        MachineError: If a finished part cannot be written.
    """
    rank, world = step.processes.rank, step.processes.world
    chunks = -(-len(images) // chunk)
    own = range(-(-rank * chunks // world), -(-(rank + 1) * chunks // world))
    done: list[list[Tensor]] = []
    # Every process polls as often as process 0, which has the most chunks.
    for turn in range(-(-chunks // world)):
        step.poll()
        index = own[turn] if turn < len(own) else None
        rows = _chunk_activations(tapped, images, index, chunk, pool, step)
        if rows is not None:
            done.append(rows)
        shown = min(len(images), (turn + 1) * world * chunk)
        step.report(Event(phase="locate", done=shown, total=len(images), unit="images"))
    widths = broadcast_json(
        [tensor.shape[1] for tensor in done[0]] if done else None, step.processes
    )
    gathered = [
        all_gather_rows(
            _stacked([c[k] for c in done], width).to(step.processes.device), step.processes
        )
        for k, width in enumerate(widths)
    ]
    features, *layers = [tensor.cpu() for tensor in gathered]
    return features, tuple(layers)


def flattened_maps(
    tapped: TappedEncoder, images: Images, *, tap: int, chunk: int, poll: Callable[[], None]
) -> tuple[Float32[Tensor, "image feature"], Float32[Tensor, "image value"]]:
    """Features and the whole flattened map of one tap: channels times positions values an image.

    All of it is held in memory: 2,000 maps of 64x32x32 are 0.5 GB.

    Raises:
        SelfTestError: If a tap or the features are not finite.
    """
    features, maps = [], []
    with undisturbed(tapped), torch.no_grad():
        for view in _views(tapped, images, chunk):
            poll()
            vectors, outputs = tapped(view)
            check_finite((*outputs, vectors), (*tapped.taps, "features"))
            features.append(vectors.float().cpu())
            maps.append(outputs[tap].flatten(1).float().cpu())
    return torch.cat(features), torch.cat(maps)


def check_finite(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Names the first layer with a value that is not finite.

    Raises:
        SelfTestError: If there is one.
    """
    for name, values in zip(names, tensors, strict=True):
        if not bool(values.isfinite().all()):
            raise SelfTestError(
                f"activations of '{name}' must be finite, got NaN or infinity; check the encoder's "
                "weights or leave the layer out of encoder.taps"
            )


def _chunk_activations(
    tapped: TappedEncoder,
    images: Tensor,
    index: int | None,
    chunk: int,
    pool: Literal["mean", "class_token"],
    step: StepA,
) -> list[Tensor] | None:
    """Rows of one chunk, None if this process has no more.

    Where the encoder is cut over the processes, all of them run it whenever one of them must.
    """
    name = f"pooled_{index or 0:06d}"
    part = images[:chunk] if index is None else images[index * chunk : (index + 1) * chunk]
    found = None if index is None else step.parts.find(name, part)
    needed = index is not None and found is None
    if isinstance(tapped.encoder, FSDPModule):
        forward = any_process(needed, step.processes)
    else:
        forward = needed
    if forward:
        with undisturbed(tapped), torch.no_grad():
            view = next(_views(tapped, part, len(part)))
            features, layers = tapped.pooled(view, pool=pool)
        if needed:
            found = {f"{i:04d}": t.float().cpu() for i, t in enumerate((features, *layers))}
            step.parts.keep(name, part, found)
    return None if found is None else [found[key] for key in sorted(found)]


def _views(tapped: TappedEncoder, images: Tensor, chunk: int) -> Iterator[Tensor]:
    encoder = tapped.encoder
    for part in images.split(chunk):
        yield plain_view(part, image_size=encoder.spec.image_size).to(encoder.mean.device)


def _stacked(rows: list[Tensor], width: int) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, width)
