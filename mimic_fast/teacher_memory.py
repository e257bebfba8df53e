"""The teacher's answers to all that it will ever see, computed once where that is little.

With ``loss.teacher_view = "plain"`` the teacher sees the same image in every pass; where it sees
the student's view and ``data.view_pool`` has those taken in turn, so many views of every image. Its
features and attention maps of them, 4 bytes a value, then stand for all its further forwards: a
quarter of a step's work for a network as large as the student. What the losses need is small,
unlike activations, so a dense clone loss, which needs those, goes without.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mimic_fast.config import Settings
from mimic_fast.data.loader import Loader, sights_per_image
from mimic_fast.distributed import Processes, all_gather_rows, any_process
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.errors import StoppedError
from mimic_fast.layer_losses import TeacherOutputs, teacher_outputs
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Event, Reporter

_LARGEST = 2**31  # bytes on every process; beyond, the teacher runs in every step


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherMemory:
    """What the teacher said of everything that it sees.

    Args:
        outputs: Row = as :meth:`Loader.sights` counts.
    """

    outputs: TeacherOutputs

    def of(self, sights: Int64[Tensor, " batch"]) -> TeacherOutputs:
        """The answers to what a batch shows."""
        every = self.outputs
        rows = sights.to(every.features.device, non_blocking=True)
        return replace(
            every,
            features=every.features[rows],
            power=tuple(None if power is None else power[rows] for power in every.power),
        )


def why_not(settings: Settings, *, images: int, values: int) -> str | None:
    """Why the teacher has to run in every step; None: it need not.

    Args:
        settings: Of the run.
        images: Training images.
        values: Numbers that would be kept of every view of an image.
    """
    loss, views = settings.loss, sights_per_image(settings)
    if not loss.teacher_memory:
        return "loss.teacher_memory is off"
    if not views:
        return "its view is another in every pass (data.view_pool is 0)"
    if loss.dense > 0:
        return "a dense clone loss needs its activations"
    if views * images * values * 4 > _LARGEST:
        seen = f"{images} images" if views == 1 else f"{views} views of {images} images"
        return f"its answers to {seen} would take more than {_LARGEST >> 30} GiB"
    return None


def remember(
    teacher: TappedEncoder,
    loader: Loader,
    layer_weights: Sequence[float],
    *,
    settings: Settings,
    processes: Processes,
    layout: torch.memory_format,
    seen: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> TeacherMemory | None:
    """Runs the teacher once over all that it sees, each process over its share; None if it may not.

    Says which in a progress report. A chunk has as many views as a process sees in a step.

    Args:
        teacher: Frozen, in eval mode, placed, in the type it runs in.
        loader: Makes its views, the same on every process.
        layer_weights: lambda_l by tap.
        settings: Of the run.
        processes: This process's place.
        layout: Memory order of the images.
        seen: Images that all steps of the run take together, wherever it goes on: up to as many
            as there are views, the teacher has nothing to say twice.
        report: Told of progress.
        stop: Polled before every chunk, on all processes equally often.

    Raises:
        StoppedError: If a process was told to stop.
    """
    share = settings.optim.batch_size // processes.world // settings.optim.accumulate
    images, total = loader.images, sights_per_image(settings) * loader.images
    weight = next(teacher.parameters())

    def answers(view: Tensor) -> TeacherOutputs:
        placed = view.to(processes.device, weight.dtype, memory_format=layout)
        with autocast(autocast_dtype(settings.optim.precision), processes.device):
            return teacher_outputs(teacher, placed, layer_weights, settings=settings.loss)

    def views(starts: Sequence[int]) -> Generator[Tensor]:
        return loader.sights(torch.arange(at, min(at + share, total)) for at in starts)

    early = why_not(settings, images=images, values=0)
    if early is None and seen <= total:
        early = "the run takes no image twice" if total == images else "the run takes no view twice"
    one = answers(next(views([0]))) if early is None else None
    values = 0 if one is None else sum(t[0].numel() for t in (one.features, *_maps(one)))
    reason = early or why_not(settings, images=images, values=values)
    if one is None or reason is not None:
        report(Event(phase="distil", message=f"the teacher runs in every step: {reason}"))
        return None
    starts = range(0, total, share)
    own = starts[processes.rank :: processes.world]
    turns = -(-len(starts) // processes.world)
    # A teacher that is cut over the processes runs on all of them or on none.
    filled = turns if isinstance(teacher.encoder, FSDPModule) else len(own)
    parts: list[list[Tensor]] = []
    with closing(views([*own, *[0] * (filled - len(own))])) as made:
        for turn in range(turns):
            if any_process(stop(), processes):
                raise StoppedError("stopped while the teacher answered; go on with --resume auto")
            if turn < filled:
                found = answers(next(made))
                parts.extend([[found.features, *_maps(found)]] if turn < len(own) else [])
            done = min(total, (turn + 1) * processes.world * share)
            report(Event(phase="teacher", done=done, total=total, unit="images"))
    like = [one.features, *_maps(one)]
    features, *maps = (
        _in_order(
            torch.cat([part[k] for part in parts]) if parts else like[k][:0],
            starts,
            total=total,
            processes=processes,
        )
        for k in range(len(like))
    )
    rest = iter(maps)
    power = tuple(None if power is None else next(rest) for power in one.power)
    return TeacherMemory(outputs=replace(one, features=features, power=power))


def _maps(outputs: TeacherOutputs) -> list[Tensor]:
    return [power for power in outputs.power if power is not None]


def _in_order(own: Tensor, starts: range, *, total: int, processes: Processes) -> Tensor:
    """All rows from what each process has of every ``world``-th chunk."""
    if processes.world == 1:
        return own
    gathered = all_gather_rows(own, processes)
    ids = [
        torch.arange(first, min(first + starts.step, total))
        for rank in range(processes.world)
        for first in starts[rank :: processes.world]
    ]
    result = torch.empty_like(gathered)
    result[torch.cat(ids).to(own.device)] = gathered
    return result
