"""A diverged step again, in one process: where the first number that is not finite comes from.

The student is built as in a purification, from the specification alone, and takes the dumped
weights; the teacher is read from its file as ever. The batch is the global one in one piece,
whatever the number of processes and ``optim.accumulate``.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from mimic_fast import ops
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import Processes
from mimic_fast.diverged import Diverged
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, undisturbed
from mimic_fast.errors import UsageError
from mimic_fast.losses import Losses
from mimic_fast.not_finite import NotFinite, first_not_finite, not_finite
from mimic_fast.precision import autocast_dtype, check_precision
from mimic_fast.recipe import validated
from mimic_fast.step import Student, step_losses

_TERMS = ("clone", "dense", "attention", "contrastive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What the step did this time.

    Args:
        step: Of the run, from 1.
        precision: It was replayed in.
        device: It was replayed on.
        reproduced: Whether loss or gradient was not finite again.
        terms: The losses by their names in metrics.jsonl.
        gradient_norm: Over all parameters, before clipping.
        views: Ids of images whose views hold pixels that are not finite.
        first: The first module, in the order they finish, with an output that is not finite.
        weights: Parameters and buffers of the student that hold such values.
        gradients: Parameters whose gradient does.
        images: Ids of images whose loss is not finite for each of them alone, BatchNorm using its
            running statistics; all of them means weights or statistics, none the batch as a whole.
        batch_size: Images of the batch.
    """

    step: int
    precision: str
    device: str
    reproduced: bool
    terms: Mapping[str, float]
    gradient_norm: float
    views: tuple[int, ...]
    first: NotFinite | None
    weights: tuple[NotFinite, ...]
    gradients: tuple[NotFinite, ...]
    images: tuple[int, ...]
    batch_size: int


def replay(
    dump: Diverged,
    *,
    teacher: Path | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> Replayed:
    """Runs the step of a dump once more; weights and files stay as they are.

    Args:
        dump: What :func:`mimic_fast.diverged.load_diverged` read.
        teacher: Its file, where it has moved since.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``fp64``; None: the run's.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: If the teacher is missing or another, or the device is not there.
        UnsafeInputError: If the teacher's file is unsafe.
    """
    step = _Step.of(dump, teacher, precision, _device(device))
    with _forced(step), first_not_finite(step.student, step.teacher) as found:
        losses = step.losses(step.batch, training=True)
    (losses.total * step.loss_scale).backward()
    gradients = {n: p.grad for n, p in step.student.named_parameters() if p.grad is not None}
    norm = float(get_total_norm(gradients.values())) / step.loss_scale
    terms = {name: float(getattr(losses, name).detach()) for name in _TERMS}
    terms["loss"] = float(losses.total.detach())
    finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
    ids = dump.batch.ids.tolist()
    step.student.load_state_dict(dump.student)  # the step has spoiled BatchNorm's statistics
    return Replayed(
        step=dump.step,
        precision=step.settings.optim.precision,
        device=step.device.type,
        reproduced=not finite,
        terms=terms,
        gradient_norm=norm,
        views=tuple(ids[row] for row in _rows_not_finite(step.batch)),
        first=found[0] if found else None,
        weights=not_finite(dump.student),
        gradients=not_finite(gradients),
        images=() if finite else tuple(ids[row] for row in _bad_images(step, range(len(ids)))),
        batch_size=len(ids),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    student: Student
    teacher: TappedEncoder | None
    batch: Batch
    settings: Settings
    layer_weights: tuple[float, ...]
    loss_scale: float
    device: torch.device

    @classmethod
    def of(
        cls, dump: Diverged, teacher: Path | None, precision: str | None, device: torch.device
    ) -> "_Step":
        facts = dump.facts
        settings = facts.settings
        same = precision in (None, settings.optim.precision)
        if not same:
            optim = settings.optim.model_dump() | {"precision": precision}
            changed = {"optim": validated(OptimSettings, optim)}
            settings = settings.model_copy(update=changed)
        tapped = TappedEncoder(build_encoder(facts.spec, seed=settings.seed), facts.taps)
        width = settings.loss.projection if settings.loss.contrastive > 0 else 0
        student = Student(tapped, projection=width, seed=settings.seed)
        check_precision(settings.optim.precision, device)
        dtype = torch.float64 if settings.optim.precision == "fp64" else torch.float32
        layout = torch.channels_last if settings.optim.channels_last else torch.contiguous_format

        def placed(value: Any) -> Any:
            return value.to(device, dtype).to(memory_format=layout)

        student = placed(student)  # before it takes float64 weights
        student.load_state_dict(dump.student)
        student.autocast = autocast_dtype(settings.optim.precision)
        known = None if facts.teacher is None else _teacher(dump, teacher)
        return cls(
            student=student,
            teacher=None if known is None else placed(known),
            batch=_each_view(dump.batch, placed),
            settings=settings,
            layer_weights=facts.layer_weights,
            loss_scale=facts.loss_scale if same else 1.0,
            device=device,
        )

    def losses(self, batch: Batch, *, training: bool) -> Losses:
        """As the training loop computes them; who sees which view is decided as there."""
        self.student.train(training)
        seen = Batch(
            v1=batch.v1 if batch.plain is None else batch.plain, v2=batch.v2, ids=batch.ids
        )
        return step_losses(
            self.student,
            self.teacher,
            seen,
            batch.v1 if batch.student is None else batch.student,
            self.layer_weights,
            settings=self.settings,
            processes=Processes(rank=0, world=1, device=self.device),
        )


@contextmanager
def _forced(step: _Step) -> Iterator[None]:
    """The paths of the run's losses, where they exist on this device."""
    path = step.settings.run.force_op
    try:
        with ops.force_for_run(path, step.device, step.batch.v1.dtype):
            pass
    except ops.PathError as error:
        warnings.warn(f"run.force_op is ignored: {error}", stacklevel=5)
        path = None
    with ops.force_for_run(path, step.device, step.batch.v1.dtype):
        yield


def _device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not cuda:
        raise UsageError("--device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def _teacher(dump: Diverged, given: Path | None) -> TappedEncoder:
    """The recorded teacher, frozen.

    Raises:
        UsageError: If there is no file, or it is another one.
    """
    facts = dump.facts
    path = given or facts.settings.encoder.teacher
    if path is None:
        raise UsageError("the dump names no teacher's file; give --teacher")
    loaded = load_encoder(path, facts.settings.encoder)
    if loaded.sha256 != facts.teacher:
        raise UsageError(
            f"{path} is not the run's teacher: its SHA-256 begins {loaded.sha256[:12]}, the run's "
            f"{str(facts.teacher)[:12]}; give the run's with --teacher"
        )
    return TappedEncoder(loaded.encoder.requires_grad_(False), facts.taps).eval()


def _rows_not_finite(batch: Batch) -> list[int]:
    views = [v for v in (batch.v1, batch.v2, batch.plain, batch.student) if v is not None]
    finite = torch.stack([torch.isfinite(v).flatten(1).all(1) for v in views]).all(0)
    return (~finite).nonzero()[:, 0].tolist()


def _bad_images(step: _Step, rows: range) -> list[int]:
    """Rows whose own loss is not finite: halves of the batch, halved where they are bad.

    In evaluation mode no image changes another's activations, so that a sum over images is finite
    only if every image's is.
    """
    with undisturbed(step.student), torch.no_grad():
        total = step.losses(_part(step.batch, rows), training=False).total
    if bool(torch.isfinite(total)):
        return []
    if len(rows) == 1:
        return list(rows)
    half = len(rows) // 2
    return _bad_images(step, rows[:half]) + _bad_images(step, rows[half:])


def _each_view(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(view: Tensor | None) -> Tensor | None:
        return None if view is None else change(view)

    return Batch(
        v1=change(batch.v1),
        v2=changed(batch.v2),
        ids=batch.ids,
        plain=changed(batch.plain),
        student=changed(batch.student),
    )


def _part(batch: Batch, rows: range) -> Batch:
    cut = slice(rows.start, rows.stop)
    return replace(_each_view(batch, lambda view: view[cut]), ids=batch.ids[cut])
