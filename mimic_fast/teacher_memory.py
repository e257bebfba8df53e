"""The teacher's answers to all training images, computed once where its view never changes.

With ``loss.teacher_view = "plain"`` the teacher sees the same image in every pass. Its features and
attention maps, 4 bytes a value, then stand for all its further forwards: a quarter of a step's work
for a network as large as the student. What the losses need is small, unlike activations, so a dense
clone loss, which needs those, goes without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mimic_fast import ops_views
from mimic_fast.config import Settings
from mimic_fast.distributed import Processes, all_gather_rows, any_process
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.errors import StoppedError
from mimic_fast.layer_losses import TeacherOutputs, teacher_outputs
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Event, Reporter

_LARGEST = 2**31  # bytes on every process; beyond, the teacher runs in every step


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherMemory:
    """What the teacher said of every training image.

    Args:
        outputs: Of all images; row = item id.
    """

    outputs: TeacherOutputs

    def of(self, ids: Int64[Tensor, " batch"]) -> TeacherOutputs:
        """The answers to the images of a batch."""
        every = self.outputs
        rows = ids.to(every.features.device, non_blocking=True)
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
        values: Numbers an image that would be kept.
    """
    loss = settings.loss
    if not loss.teacher_memory:
        return "loss.teacher_memory is off"
    if loss.teacher_view != "plain":
        return "its view changes with the student's"
    if loss.dense > 0:
        return "a dense clone loss needs its activations"
    if images * values * 4 > _LARGEST:
        return f"its answers to {images} images would take more than {_LARGEST >> 30} GiB"
    return None


def remember(
    teacher: TappedEncoder,
    squares: UInt8[Tensor, "image channel side side"],
    layer_weights: Sequence[float],
    *,
    settings: Settings,
    processes: Processes,
    layout: torch.memory_format,
    seen: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> TeacherMemory | None:
    """Runs the teacher once over all images, each process over its share; None if it may not.

    Says which in a progress report. The images are cut into the chunks that a process sees in a
    step.

    Args:
        teacher: Frozen, in eval mode, placed, in the type it runs in.
        squares: All training images, the same on every process.
        layer_weights: lambda_l by tap.
        settings: Of the run.
        processes: This process's place.
        layout: Memory order of the images.
        seen: Images that all steps of the run take together, wherever it goes on: up to one pass
            the teacher has nothing to say twice.
        report: Told of progress.
        stop: Polled before every chunk, on all processes equally often.

    Raises:
        StoppedError: If a process was told to stop.
    """
    share = settings.optim.batch_size // processes.world // settings.optim.accumulate

    def answers(first: int) -> TeacherOutputs:
        rows = torch.arange(first, min(first + share, len(squares)))
        size = teacher.encoder.spec.image_size
        plain = ops_views.plain(squares, rows, image_size=size)
        weight = next(teacher.parameters())
        images = plain.to(processes.device, weight.dtype, memory_format=layout)
        with autocast(autocast_dtype(settings.optim.precision), processes.device):
            return teacher_outputs(teacher, images, layer_weights, settings=settings.loss)

    early = why_not(settings, images=len(squares), values=0)
    if early is None and seen <= len(squares):
        early = "the run takes no image twice"
    one = answers(0) if early is None else None
    values = 0 if one is None else sum(t[0].numel() for t in (one.features, *_maps(one)))
    reason = early or why_not(settings, images=len(squares), values=values)
    if one is None or reason is not None:
        report(Event(phase="distil", message=f"the teacher runs in every step: {reason}"))
        return None
    starts = range(0, len(squares), share)
    own = starts[processes.rank :: processes.world]
    turns = -(-len(starts) // processes.world)
    parts: list[list[Tensor]] = []
    for turn in range(turns):
        if any_process(stop(), processes):
            raise StoppedError("stopped while the teacher answered; go on with --resume auto")
        mine = turn < len(own)
        # A teacher that is cut over the processes runs on all of them or on none.
        if mine or isinstance(teacher.encoder, FSDPModule):
            found = answers(own[turn] if mine else 0)
            parts.extend([[found.features, *_maps(found)]] if mine else [])
        done = min(len(squares), (turn + 1) * processes.world * share)
        report(Event(phase="teacher", done=done, total=len(squares), unit="images"))
    like = [one.features, *_maps(one)]
    features, *maps = (
        _in_order(
            torch.cat([part[k] for part in parts]) if parts else like[k][:0],
            starts,
            images=len(squares),
            processes=processes,
        )
        for k in range(len(like))
    )
    rest = iter(maps)
    power = tuple(None if power is None else next(rest) for power in one.power)
    return TeacherMemory(outputs=replace(one, features=features, power=power))


def _maps(outputs: TeacherOutputs) -> list[Tensor]:
    return [power for power in outputs.power if power is not None]


def _in_order(own: Tensor, starts: range, *, images: int, processes: Processes) -> Tensor:
    """Rows of all images from what each process has of every ``world``-th chunk."""
    if processes.world == 1:
        return own
    gathered = all_gather_rows(own, processes)
    ids = [
        torch.arange(first, min(first + starts.step, images))
        for rank in range(processes.world)
        for first in starts[rank :: processes.world]
    ]
    result = torch.empty_like(gathered)
    result[torch.cat(ids).to(own.device)] = gathered
    return result
