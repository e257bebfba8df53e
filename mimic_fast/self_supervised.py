"""Training on decoded images alone, without teacher and labels: SimCLR or BYOL, any processes.

What pre-training does once its images are read, and what the student-only floor is.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.batchnorm import synchronize_batchnorm
from mimic_fast.byol import Byol, byol_student, target_of
from mimic_fast.config import EncoderSpec, EvaluationSettings, RunSettings, Settings
from mimic_fast.data.loader import TrainingImages
from mimic_fast.distributed import Processes, any_process, broadcast_json
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.mutual_information.finished_parts import tensor_digest
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import settings_json
from mimic_fast.step import Student, whole_encoder
from mimic_fast.training import Task, Trained, train

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_contrastive(
    spec: EncoderSpec,
    pool: UInt8[Tensor, "image channel side side"],
    *,
    settings: Settings,
    started: "tuple[Accelerator, Processes]",
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str,
) -> tuple[Encoder, Trained]:
    """SimCLR on ``pool`` from random weights seeded by ``settings.seed``.

    Args:
        spec: The encoder to build.
        pool: Decoded images, the same in all processes.
        settings: Augmentation, temperature, optimizer; the loss weights must be contrastive only.
        started: What :func:`mimic_fast.distributed.start` gave.
        report: Told of every step.
        stop: Polled every step.
        phase: Name in progress reports.

    Raises:
        UsageError: If the processes have different images, or a saved state is of another run.
        StoppedError: If ``stop`` told so; the state is saved.
    """
    tapped = _tapped(spec, seed=settings.seed)
    student = Student(tapped, projection=settings.loss.projection, seed=settings.seed)
    task = _task(student, None, pool, settings, started[1], {"kind": phase, "byol": None})
    return _trained(task, settings, started, report=report, stop=stop, phase=phase)


def train_byol(
    spec: EncoderSpec,
    pool: UInt8[Tensor, "image channel side side"],
    *,
    momentum: float,
    hidden: int | None,
    settings: Settings,
    started: "tuple[Accelerator, Processes]",
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str,
) -> tuple[Encoder, Trained]:
    """BYOL on ``pool``; what is not said here is as in :func:`train_contrastive`.

    Args:
        spec: The encoder to build.
        pool: Decoded images, the same in all processes.
        momentum: Decay of the target at the first step.
        hidden: Hidden width of projector and predictor; None: by the features' width.
        settings: Augmentation, output width (``loss.projection``), optimizer; ``loss.contrastive``
            must be above 0, which asks for two views, and has no other effect.
        started: What :func:`mimic_fast.distributed.start` gave; the engine must be ddp.
        report: Told of every step.
        stop: Polled every step.
        phase: Name in progress reports.
    """
    student = byol_student(
        _tapped(spec, seed=settings.seed),
        hidden=hidden,
        width=settings.loss.projection,
        seed=settings.seed,
    )
    byol = Byol(target=target_of(student), momentum=momentum)
    known = {"kind": phase, "byol": {"momentum": momentum, "hidden": hidden}}
    task = _task(student, byol, pool, settings, started[1], known)
    return _trained(task, settings, started, report=report, stop=stop, phase=phase)


def _tapped(spec: EncoderSpec, *, seed: int) -> TappedEncoder:
    encoder = build_encoder(spec, seed=seed)
    return TappedEncoder(encoder, default_taps(encoder))


def _task(
    student: Student,
    byol: Byol | None,
    pool: UInt8[Tensor, "image channel side side"],
    settings: Settings,
    processes: Processes,
    known: Mapping[str, Any],
) -> Task:
    task = Task(
        student=student,
        teacher=None,
        layer_weights=(),
        images=TrainingImages(squares=pool),
        fingerprint={
            **known,
            "spec": student.tapped.encoder.spec.model_dump(mode="json"),
            "images": _digest(pool, processes),
            "settings": _identity(settings),
        },
        out=settings.run.out,
        byol=byol,
    )
    for one in task.trained:
        synchronize_batchnorm(one, processes).to(processes.device)
    return task


def _trained(
    task: Task,
    settings: Settings,
    started: "tuple[Accelerator, Processes]",
    *,
    report: Reporter,
    stop: Callable[[], bool],
    phase: str,
) -> tuple[Encoder, Trained]:
    accelerator, processes = started
    trained = train(
        task,
        settings=settings,
        accelerator=accelerator,
        processes=processes,
        report=report,
        stop=stop,
        phase=phase,
    )
    encoder = whole_encoder(task.student.tapped.encoder, trained.whole, seed=settings.seed)
    return encoder, trained


def _digest(pool: UInt8[Tensor, "image channel side side"], processes: Processes) -> str:
    """Of the images, which must be the same everywhere: a process takes its share of one order."""
    digest = tensor_digest(pool)
    if any_process(digest != broadcast_json(digest, processes), processes):
        raise UsageError(
            "the processes of this run read different images; give all of them the same data.source"
        )
    return digest


def _identity(settings: Settings) -> str:
    run = RunSettings(max_steps=settings.run.max_steps)
    decisive = {"run": run, "evaluation": EvaluationSettings()}
    return settings_json(settings.model_copy(update=decisive))
