"""The defenses that can be compared, by kind: from settings to the encoder that comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimic_fast.config import Settings
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a defense is given.

    Args:
        settings: A purification's: teacher, clean images, optimizer, ``run.out`` for all it writes.
        clean: The clean encoder of the attack, where there is one; only the reference uses it.
        report: Told of progress.
        stop: Polled; true saves and leaves with ``StoppedError``.
    """

    settings: Settings
    clean: Path | None
    report: Reporter
    stop: Callable[[], bool]


def none(call: Call) -> Path:
    """The suspect encoder as it is."""
    assert call.settings.encoder.teacher is not None
    return call.settings.encoder.teacher


def clean(call: Call) -> Path:
    """The encoder without the backdoor: what no defense can beat, and the chance rate of the ASR.

    Raises:
        UsageError: If the attack names none.
    """
    if call.clean is None:
        raise UsageError("defense kind 'clean' needs attacks.NAME.clean, the clean encoder")
    return call.clean


def purify(call: Call) -> Path:
    """The purification of this package, with any preset and settings."""
    from mimic_fast.distil import purify as run

    return run(call.settings, world=1, report=call.report, stop=call.stop).encoder


def student_only(call: Call) -> Path:
    """The floor: a random student trained contrastively on the clean images alone."""
    from mimic_fast.baselines.student_only import student_only as train
    from mimic_fast.data.clean_set import clean_images
    from mimic_fast.encoders.ingest import load_encoder

    settings = call.settings
    assert settings.encoder.teacher is not None
    spec = load_encoder(settings.encoder.teacher, settings.encoder).encoder.spec
    images = clean_images(settings.data, spec, seed=settings.seed, report=call.report)
    pool = images.squares[: len(images.squares) - images.clean_set.hold_out]
    path = train(spec, pool, settings=settings, report=call.report, stop=call.stop).path
    assert path is not None
    return path


DEFENSES: dict[str, Callable[[Call], Path]] = {
    "none": none,
    "clean": clean,
    "purify": purify,
    "student_only": student_only,
}


def defense_of(kind: str) -> Callable[[Call], Path]:
    """The function of a kind.

    Raises:
        UsageError: If there is none.
    """
    if kind not in DEFENSES:
        raise UsageError(f"there is no defense of kind {kind!r}; there are {', '.join(DEFENSES)}")
    return DEFENSES[kind]
