"""The defenses that can stand in a matrix.

A further one is one file with its function and settings, usually in ``baselines/``, and one entry
here. ``run`` imports what it needs when it is called: a mistake in a matrix shows at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mimic_fast.config import EncoderSettings, Frozen, Settings
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter
from mimic_fast.recipe import load_settings, validated

Stop = Callable[[], bool]

# Settings that the matrix itself decides, or that make no sense in one cell.
_OF_THE_MATRIX = ("seed", "encoder", "evaluation")
_OF_THE_CELL = ("out", "resume", "engine", "deepspeed")


class Prepare(Protocol):
    """Makes effective settings, every default filled in, of the keys a matrix has."""

    def __call__(
        self,
        keys: Mapping[str, Any],
        *,
        data: Mapping[str, Any],
        encoder: EncoderSettings,
        seed: int,
    ) -> Frozen:
        """Settings of one seed.

        Args:
            keys: What the matrix says of this defense, without ``kind``.
            data: What the matrix says of the clean images, no defaults.
            encoder: How the attacks' encoders are read; no file.
            seed: Seeds everything.

        Raises:
            UsageError: If a key is unknown or a value not valid.
        """
        ...


class Run(Protocol):
    """Runs a defense on one encoder."""

    def __call__(
        self, settings: Any, teacher: Path, *, out: Path, report: Reporter, stop: Stop
    ) -> Path:
        """Returns the purified encoder's file.

        Args:
            settings: What ``prepare`` made.
            teacher: Checkpoint of the backdoored encoder.
            out: Folder for all it writes; what an interrupted call has left there is gone on with.
            report: Told of progress.
            stop: Polled; true saves the state and leaves.

        Raises:
            StoppedError: If ``stop`` told so.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Defense:
    """One kind of defense.

    Args:
        model: Of its settings.
        prepare: Keys of a matrix to settings.
        run: Encoder to purified encoder.
        reads_data: Whether the clean images decide its result.
        form: Part of a cell's digest; raise it when another default or another computation gives
            other results under the same settings.
    """

    model: type[Frozen]
    prepare: Prepare
    run: Run
    reads_data: bool = True
    form: int = 1


class NoSettings(Frozen):
    """A defense without settings."""


def _nothing(
    keys: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    encoder: EncoderSettings,
    seed: int,
) -> NoSettings:
    if keys:
        raise UsageError(f"kind 'none' has no settings, got '{next(iter(keys))}'")
    return validated(NoSettings, keys)


def _as_purification(
    keys: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    encoder: EncoderSettings,
    seed: int,
) -> Settings:
    """A recipe of ``mimic-fast purify``; the matrix's data section ranks below the defense's."""
    run = keys.get("run")
    misplaced = [name for name in _OF_THE_MATRIX if name in keys]
    if isinstance(run, Mapping):
        misplaced += [f"run.{name}" for name in _OF_THE_CELL if name in run]
    if misplaced:
        raise UsageError(f"'{misplaced[0]}' has no place in a defense; leave it to the matrix")
    own = keys.get("data", {})
    merged = {**data, **own} if isinstance(own, Mapping) else own
    values = {**keys, "seed": seed, "data": merged, "encoder": encoder.model_dump()}
    return load_settings(values=values)


def _none(settings: NoSettings, teacher: Path, *, out: Path, report: Reporter, stop: Stop) -> Path:
    return teacher


def _purify(settings: Settings, teacher: Path, *, out: Path, report: Reporter, stop: Stop) -> Path:
    from mimic_fast.distil import purify

    return purify(_placed(settings, teacher, out), report=report, stop=stop).encoder


def _student_only(
    settings: Settings, teacher: Path, *, out: Path, report: Reporter, stop: Stop
) -> Path:
    from mimic_fast.baselines.student_only import student_only
    from mimic_fast.data.clean_set import clean_images
    from mimic_fast.encoders.ingest import load_encoder

    settings = _placed(settings, teacher, out)
    spec = load_encoder(teacher, settings.encoder).encoder.spec
    images = clean_images(settings.data, spec, seed=settings.seed, report=report)
    pool = images.squares[: len(images.squares) - images.clean_set.hold_out]
    floor = student_only(spec, pool, settings=settings, report=report, stop=stop)
    assert floor.path is not None
    return floor.path


def _placed(settings: Settings, teacher: Path, out: Path) -> Settings:
    """The settings with the encoder and folder of one cell; an earlier start is gone on with."""
    return settings.model_copy(
        update={
            "encoder": settings.encoder.model_copy(update={"teacher": teacher}),
            "run": settings.run.model_copy(update={"out": out, "resume": "auto"}),
        }
    )


DEFENSES: Mapping[str, Defense] = {
    "none": Defense(model=NoSettings, prepare=_nothing, run=_none, reads_data=False),
    "purify": Defense(model=Settings, prepare=_as_purification, run=_purify),
    "student_only": Defense(model=Settings, prepare=_as_purification, run=_student_only),
}
