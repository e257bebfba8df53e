"""What a purification measures of its student after passes over the clean images.

With labels: the curve of accuracy and ASR. Without: how it does on held-out images, and from that
whether it has learned enough.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import UInt8
from torch import Tensor, nn

from mimic_fast.config import Settings
from mimic_fast.distributed import Processes, any_process
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.ingest import LoadedEncoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.curve import Curve
from mimic_fast.evaluation.held_out import ENOUGH, HeldOut
from mimic_fast.progress import Event, Reporter
from mimic_fast.stopping import plateaued
from mimic_fast.watch import process_0_alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What is looked at.

    Args:
        student: The encoder that is trained.
        teacher: The suspect one, whole.
        held_out: Images that the student does not see, uint8 ``[n, C, S, S]``.
    """

    student: Encoder
    teacher: LoadedEncoder
    held_out: UInt8[Tensor, "image channel side side"]


def check_watched(settings: Settings) -> None:
    """The student must be whole on process 0, and there must be something to measure it on.

    Raises:
        UsageError: If not.
    """
    asked = {
        "evaluation.curve_every": settings.evaluation.curve_every is not None,
        f"stop.rule '{settings.stop.rule}'": settings.stop.rule != "never",
    }
    cut = settings.run.engine in ("zero3", "fsdp2") or settings.encoder.teacher_shard
    for name in (name for name, is_asked in asked.items() if is_asked and cut):
        raise UsageError(
            f"{name} needs student and teacher whole on one process; leave it out with run.engine "
            f"'{settings.run.engine}' and encoder.teacher_shard"
        )
    if settings.evaluation.curve_every is not None and not settings.evaluation.downstream:
        raise UsageError("evaluation.curve_every needs a labeled set: --downstream NAME=DIR")


def check_held_out(settings: Settings, images: int) -> None:
    """A rule needs enough images that the student never sees.

    Raises:
        UsageError: If there are fewer.
    """
    if settings.stop.rule != "never" and images < ENOUGH:
        raise UsageError(
            f"stop.rule '{settings.stop.rule}' needs at least {ENOUGH} held-out images, there are "
            f"{images}; raise data.hold_out"
        )


def after_passes(
    watched: Watched,
    settings: Settings,
    *,
    processes: Processes,
    report: Reporter,
    stop: Callable[[], bool],
) -> Callable[[int, nn.Module], bool]:
    """For ``train``: measures as the settings ask and tells, on all processes, when it is enough.

    Args:
        watched: Encoders and images.
        settings: ``evaluation`` and ``stop`` are read, files go to ``run.out``.
        processes: Process 0 measures, the others wait.
        report: Told when it is enough.
        stop: Whether this process was asked to stop.
    """
    curve = _curve(watched, settings, processes, stop)
    enough = _enough(watched, settings, processes, report)

    def after(epoch: int, _: nn.Module) -> bool:
        curve(epoch)
        return enough(epoch)

    return after


def _curve(
    watched: Watched, settings: Settings, processes: Processes, stop: Callable[[], bool]
) -> Callable[[int], None]:
    if settings.evaluation.curve_every is None:
        return lambda epoch: None
    assert settings.run.out is not None
    path = settings.run.out / "curve.jsonl"
    curve = Curve(path, settings.evaluation, teacher=watched.teacher, seed=settings.seed)
    process_0_alone(lambda stopped: curve.settle(stop=stopped), processes=processes, stop=stop)

    def after(epoch: int) -> None:
        def work(stopped: Callable[[], bool]) -> None:
            curve.measure(epoch, watched.student, stop=stopped)

        process_0_alone(work, processes=processes, stop=stop)

    return after


def _enough(
    watched: Watched, settings: Settings, processes: Processes, report: Reporter
) -> Callable[[int], bool]:
    rule = settings.stop
    if rule.rule == "never":
        return lambda epoch: False
    assert settings.run.out is not None
    held_out = HeldOut(
        settings.run.out / "held_out.jsonl",
        watched.held_out,
        teacher=watched.teacher.encoder,
        seed=settings.seed,
    )

    told = False

    def after(epoch: int) -> bool:
        nonlocal told
        if epoch % rule.every:
            return False

        def work(_: Callable[[], bool]) -> bool:
            losses = held_out.measure(epoch, watched.student)
            flat = plateaued(losses, patience=rule.patience, min_delta=rule.min_delta)
            return rule.rule == "plateau" and flat

        # Seconds: a signal waits for them.
        flat = any_process(bool(process_0_alone(work, processes=processes)), processes)
        if flat and not told:
            message = f"the held-out loss is flat at pass {epoch}; the run cools down"
            report(Event(phase="distil", message=message))
        told = told or flat
        return flat

    return after
