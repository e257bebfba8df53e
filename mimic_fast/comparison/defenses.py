"""The defenses that can be compared, by kind: from settings to the encoder that comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mimic_fast.config import Frozen, Settings
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter
from mimic_fast.recipe import validated


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a defense is given.

    Args:
        settings: A purification's: teacher, clean images, optimizer, ``run.out`` for all it writes.
        options: The kind's own settings, of :func:`options_of`.
        clean: The clean encoder of the attack, where there is one; only the reference uses it.
        report: Told of progress.
        stop: Polled; true saves and leaves with ``StoppedError``.
    """

    settings: Settings
    options: Frozen
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


# Baselines by kind: the function KIND and this settings class are in mimic_fast/baselines/KIND.py.
# function(settings, options, report=..., stop=...) gives the encoder's file below run.out.
_BASELINES: dict[str, str] = {
    "fine_tuning": "FineTuningSettings",
    "fine_pruning": "FinePruningSettings",
    "nad": "NadSettings",
    "anp": "AnpSettings",
    "clp": "ClpSettings",
    "medic": "MedicSettings",
    "bcu": "BcuSettings",
    "i_bau": "IBauSettings",
    "receive": "ReceiveSettings",
    "ssl_cleanse": "SslCleanseSettings",
}


# Sections of a purification's settings that a baseline does not read: its options have their like.
UNREAD = ("preset", "student", "mi", "loss", "optim", "stop")
# Of section data: a contrastive loss wants other views than imitation, so these have their own.
UNREAD_DATA = ("crop_scale", "jitter_probability", "grayscale")


def is_baseline(kind: str) -> bool:
    """Whether it has options of its own in place of the sections ``UNREAD``."""
    return kind in _BASELINES


def own_views(kind: str) -> bool:
    """Whether it augments as it always does, whatever ``UNREAD_DATA`` says."""
    return is_baseline(kind) or kind == "student_only"


class NoOptions(Frozen):
    """Of kinds whose settings are all in a recipe."""


def defense_of(kind: str) -> Callable[[Call], Path]:
    """The function of a kind.

    Raises:
        UsageError: If there is none.
    """
    if kind in DEFENSES:
        return DEFENSES[kind]
    _, function = _baseline(kind)
    return lambda call: function(call.settings, call.options, report=call.report, stop=call.stop)


def options_of(kind: str, values: Mapping[str, Any]) -> Frozen:
    """The kind's own settings from ``defenses.NAME.options``.

    Raises:
        UsageError: If there is no such kind, a key is unknown or a value not valid.
    """
    if kind not in DEFENSES:
        return validated(_baseline(kind)[0], values)
    if values:
        raise UsageError(
            f"a defense of kind {kind!r} takes no options, got {', '.join(values)}; what a recipe "
            "has goes into settings"
        )
    return NoOptions()


def _baseline(kind: str) -> tuple[type[Frozen], Callable[..., Path]]:
    if kind not in _BASELINES:
        kinds = ", ".join((*DEFENSES, *_BASELINES))
        raise UsageError(f"there is no defense of kind {kind!r}; there are {kinds}")
    module = import_module(f"mimic_fast.baselines.{kind}")
    return getattr(module, _BASELINES[kind]), getattr(module, kind)
