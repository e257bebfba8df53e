"""The training step on fake tensors: teacher, student, losses, backward and optimizer of a run."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.blocks import checkpoint_blocks
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.engines.update import update_locally
from mimic_fast.layer_losses import TeacherOutputs, teacher_outputs
from mimic_fast.optim import (
    averaged_state,
    build_optimizer,
    gradient_norm,
    start_momentum,
    update_average,
)
from mimic_fast.planning.fake import made_fake, meta_encoder
from mimic_fast.precision import LossScale, autocast, autocast_dtype
from mimic_fast.step import Student, step_losses
from mimic_fast.teacher_memory import why_not


def meta_networks(spec: EncoderSpec, settings: Settings) -> tuple[Student, TappedEncoder]:
    """Student and teacher of a run on the meta device.

    Raises:
        UsageError: If the architecture is unknown, or has no such taps.
    """
    encoder, loss = meta_encoder(spec), settings.loss
    taps = settings.encoder.taps or default_taps(encoder)
    teacher = TappedEncoder(encoder.requires_grad_(False), taps)
    with torch.device("meta"):
        width = loss.projection if loss.contrastive > 0 else 0
        student = Student(TappedEncoder(meta_encoder(spec), taps), projection=width, seed=0)
    return student.train(), teacher.eval()


@dataclass(kw_only=True, slots=True)
class Views:
    """Images of one micro-batch where the step computes.

    Args:
        teacher: What the teacher sees.
        student: The student's first view.
        second: Its second, or None.
        beside: What nobody looks at and is alive all the same.
    """

    teacher: Tensor
    student: Tensor
    second: Tensor | None
    beside: list[Tensor]


class FakeStep:
    """One process of a run whose student is whole; to be made and used under ``FakeTensorMode``.

    Args:
        student: On the meta device; becomes fake in place.
        teacher: Likewise.
        settings: Of the run.
        on_gpu: Whether batches are copied to the device that computes, or lie there already.
    """

    def __init__(
        self, student: Student, teacher: TappedEncoder, settings: Settings, *, on_gpu: bool
    ) -> None:
        self.settings, self._on_gpu = settings, on_gpu
        self.spec, optim = teacher.encoder.spec, settings.optim
        self.dtype = torch.float64 if optim.precision == "fp64" else torch.float32
        last = optim.channels_last
        self.student = made_fake(student, dtype=self.dtype, channels_last=last)
        self.teacher = made_fake(teacher, dtype=self.dtype, channels_last=last)
        self.layer_weights = tuple(float(side > 1) for side in self._sides())
        if optim.activation_checkpointing:
            checkpoint_blocks(student.tapped)
        self.student.autocast = autocast_dtype(optim.precision)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.student, optim)
        start_momentum(self.optimizer)
        self.average = averaged_state(self.student) if optim.ema else None
        self._scale = LossScale(SINGLE.device) if optim.precision == "fp16" else None
        self._said = self._said_of_one()

    def held(self) -> Iterable[Tensor]:
        """Everything that outlives a step, gradients aside."""
        yield from self.networks()
        yield from self.moments()
        yield from (self.average or {}).values()

    def networks(self) -> Iterable[Tensor]:
        """Weights and buffers of student and teacher."""
        for module in (self.student, self.teacher):
            yield from module.parameters()
            yield from module.buffers()

    def moments(self) -> Iterable[Tensor]:
        """The optimizer's state."""
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def loss(self, images: int, *, pulled: bool = False) -> Tensor:
        """Forward of a micro-batch; ``pulled``: the contrast was computed over more of them."""
        views, width = self.views(images), self.settings.loss.projection
        ids = torch.empty(images, dtype=torch.int64)
        batch = Batch(v1=views.teacher, v2=views.second, ids=ids)
        losses = step_losses(
            self.student,
            self.teacher,
            batch,
            views.student,
            self.layer_weights,
            settings=self.settings,
            processes=SINGLE,
            pull=(torch.empty(images, width), torch.empty(images, width)) if pulled else None,
            known=self._known(images),
        )
        # The loop holds on to its batch until the next one.
        self._views = views
        return losses.total if self._scale is None else losses.total * self._scale.scale

    def update(self) -> None:
        """The optimizer's part, as the ddp engine has it."""
        if self._scale is not None:
            self._scale.unscale([p.grad for p in self.parameters if p.grad is not None])
        norm = gradient_norm(self.parameters, clip=self.settings.optim.clip_norm)
        update_locally(self.optimizer, norm, self._scale)
        if self.average is not None:
            update_average(self.average, self.student, decay=self.settings.optim.ema)

    def clear(self) -> None:
        """Drops batch and gradients."""
        self._views = None
        self.optimizer.zero_grad(set_to_none=True)

    def views(self, images: int) -> Views:
        """As the loop has them: a GPU gets a copy of what is looked at, a CPU where types differ.

        The loader makes the crops in the order that convolutions want, plain and hardened images
        in another, so that a CPU holds those twice.
        """
        loss, last = self.settings.loss, self.settings.optim.channels_last
        wide, rearranged = self.dtype != torch.float32, last and self.spec.in_channels > 1
        plain = loss.teacher_view == "plain" and self._said is None
        hardened = loss.harden.probability > 0
        first = self._image(images)
        beside: list[Tensor] = []

        def seen(apart: bool) -> Tensor:
            view = self._image(images) if apart else first
            if self._on_gpu or wide or (apart and rearranged):
                beside.extend([] if self._on_gpu or view is first else [view])
                return self._image(images, self.dtype)
            return view

        student = seen(hardened)
        teacher = student if self._said is not None else seen(plain)
        second = None
        if loss.contrastive > 0:
            second = self._image(images, self.dtype)
            beside += [self._image(images)] if wide and not self._on_gpu else []
        beside += [] if self._on_gpu else [first]
        return Views(teacher=teacher, student=student, second=second, beside=beside)

    def _said_of_one(self) -> TeacherOutputs | None:
        """Where the teacher's answers are kept, those to one image; the run has them before it."""
        if why_not(self.settings, images=0, values=0) is not None:
            return None
        view, weights = self._image(1, self.dtype), self.layer_weights
        with autocast(self.student.autocast, view.device):
            return teacher_outputs(self.teacher, view, weights, settings=self.settings.loss)

    def _known(self, images: int) -> TeacherOutputs | None:
        said = self._said
        if said is None:
            return None
        return replace(
            said,
            features=said.features.new_empty(images, said.features.shape[1]),
            power=tuple(None if p is None else p.new_empty(images, p.shape[1]) for p in said.power),
        )

    def _image(self, images: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = self.spec.image_size
        return torch.empty(images, self.spec.in_channels, size, size, dtype=dtype)

    def _sides(self) -> list[int]:
        with torch.no_grad():
            _, maps = self.teacher(self._image(1, self.dtype))
        return [feature_map.shape[2] for feature_map in maps]
