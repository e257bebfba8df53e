"""What a process of a run holds and computes, counted on a step that is run on fake tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.blocks import blocks
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.losses import contrastive_loss
from mimic_fast.ops_choice import Path
from mimic_fast.planning.fake_step import FakeStep, meta_networks
from mimic_fast.planning.flops import Flops, counted_flops
from mimic_fast.planning.live import LiveBytes, Trace
from mimic_fast.planning.stand_in import losses_on
from mimic_fast.teacher_memory import why_not

_WARM, _FEW, _MORE = 3, 2, 4  # images of the steps that are run
_PAIRED = 64  # images of the contrastive loss that is run


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How a network's weights are cut into blocks, bytes.

    Args:
        largest: The largest block.
        rest: What belongs to no block: stem, position embeddings, last normalization, projection.
    """

    largest: int
    rest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """A step as a sequence of operations, with what is alive after each beyond what outlives it.

    Args:
        fixed: Bytes alive whatever the batch, gradients aside, ``[operation]``.
        per_image: Bytes alive for each image of the micro-batch, ``[operation]``.
        gradients: Bytes of the gradients of weights, ``[operation]``.
        update_from: The operation with which the optimizer's part begins.
    """

    fixed: Tensor
    per_image: Tensor
    gradients: Tensor
    update_from: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """One process whose student and teacher are whole; bytes unless said otherwise.

    Args:
        numbers: Trained weights, how many.
        weights: Of the student and its projection head.
        buffers: Of student and teacher.
        teacher: Its weights.
        moments: The optimizer's state.
        average: Averaged weights, 0 without.
        student_parts: Blocks of the student.
        teacher_parts: Blocks of the teacher.
        view: Of one image: all its views that the step holds.
        ahead: Of one image: all its views as the loader makes them.
        pair: Contrastive loss: alive at its worst moment for each anchor and candidate.
        operations: A step.
        flops: Of a step, for each image.
    """

    numbers: int
    weights: int
    buffers: int
    teacher: int
    moments: int
    average: int
    student_parts: Parts
    teacher_parts: Parts
    view: int
    ahead: int
    pair: float
    operations: Operations
    flops: Flops


def count(spec: EncoderSpec, settings: Settings, *, path: Path, on_gpu: bool) -> Counts:
    """Counts by running the step at three batch sizes; no weight is ever allocated.

    Args:
        spec: Of teacher and student.
        settings: Of the run.
        path: What the losses will run on.
        on_gpu: Whether the batch is made elsewhere and copied.

    Raises:
        UsageError: If the architecture is unknown, or has no such taps.
    """
    student, teacher = meta_networks(spec, settings)
    parts = settings.optim.accumulate
    with FakeTensorMode(), losses_on(path):
        step = FakeStep(student, teacher, settings, on_gpu=on_gpu)
        live = LiveBytes()
        live.hold(step.held())
        live.watch_gradients(step.parameters)
        with live:
            flops = counted_flops(step, _WARM)
            step.update()  # makes the optimizer's state
            step.clear()
            held = _bytes(step.held())
            few, more = (_recorded(step, live, images, parts) for images in (_FEW, _MORE))
        pair = _pair(settings) if settings.loss.contrastive > 0 else 0.0
        view = _views(step)
    return Counts(
        numbers=sum(p.numel() for p in step.parameters),
        weights=_bytes(step.parameters),
        buffers=_bytes([*step.student.buffers(), *step.teacher.buffers()]),
        teacher=_bytes(step.teacher.parameters()),
        moments=_bytes(step.moments()),
        average=_bytes((step.average or {}).values()),
        student_parts=_parts(step.student, step.student.tapped),
        teacher_parts=_parts(step.teacher, step.teacher),
        view=view,
        ahead=_made_ahead(spec, settings),
        pair=pair,
        operations=_operations(few, more, held),
        flops=flops,
    )


def _recorded(step: FakeStep, live: LiveBytes, images: int, parts: int) -> Trace:
    """A step of one micro-batch, or the last of more: gradients of the others are there already."""
    pulled = parts > 1 and step.settings.loss.contrastive > 0
    if parts > 1:
        step.loss(images, pulled=pulled).backward()
    live.start()
    before = [(b, b.clone()) for b in step.student.buffers() if b.is_floating_point()]
    step.loss(images, pulled=pulled).backward()
    live.start_update()
    step.update()
    for buffer, old in before:
        buffer.copy_(old)
    trace = live.trace()
    step.clear()
    return trace


def _operations(few: Trace, more: Trace, held: int) -> Operations:
    """A line through two batch sizes for every operation: both steps are the same sequence."""
    if len(few.live) != len(more.live):
        raise RuntimeError(
            f"a step of {_FEW} images has {len(few.live)} operations, one of {_MORE} has "
            f"{len(more.live)}; their memory cannot be extrapolated"
        )
    gradients = torch.tensor(few.gradients, dtype=torch.float64)
    alive = [
        torch.tensor(trace.live, dtype=torch.float64) - held - gradients for trace in (few, more)
    ]
    per_image = (alive[1] - alive[0]) / (_MORE - _FEW)
    return Operations(
        fixed=alive[0] - _FEW * per_image,
        per_image=per_image,
        gradients=gradients,
        update_from=few.update_from,
    )


def _pair(settings: Settings) -> float:
    """Forward and backward of the contrastive loss, whose table grows with the square."""
    views = [torch.empty(_PAIRED, 2, requires_grad=True) for _ in range(2)]
    live = LiveBytes()
    with live:
        live.start()
        temperature = settings.loss.temperature
        contrastive_loss(*views, temperature=temperature, processes=SINGLE).backward()
        return max(live.trace().live) / (2 * _PAIRED) ** 2


def _views(step: FakeStep) -> int:
    views = step.views(1)
    second = [] if views.second is None else [views.second]
    return _bytes([views.teacher, views.student, *second, *views.beside])


def _made_ahead(spec: EncoderSpec, settings: Settings) -> int:
    loss = settings.loss
    plain = loss.teacher_view == "plain" and why_not(settings, images=0, values=0) is not None
    views = 1 + (loss.contrastive > 0) + plain + (loss.harden.probability > 0)
    return views * spec.in_channels * spec.image_size**2 * torch.float32.itemsize


def _parts(module: nn.Module, tapped: TappedEncoder) -> Parts:
    sizes = [_bytes(block.parameters()) for block in blocks(tapped)]
    return Parts(largest=max(sizes), rest=_bytes(module.parameters()) - sum(sizes))


def _bytes(tensors: Iterable[Tensor] | Sequence[Tensor]) -> int:
    """Of the storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
