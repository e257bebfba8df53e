"""The matrix of a comparison: what ``mimic-fast compare MATRIX.toml`` reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from mimic_fast.comparison.defenses import DEFENSES
from mimic_fast.config import DataSettings, EncoderSettings, EvaluationSettings, Frozen
from mimic_fast.errors import UsageError
from mimic_fast.recipe import load_recipe, validated

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# What a matrix says elsewhere, or what makes no sense in one cell.
_ELSEWHERE = {
    "attack": "[attacks.NAME] attack",
    "clean": "[attacks.NAME] clean",
    "student_only": "a defense of kind 'student_only'",
}
_NOT_HERE = ("curve_every", "scan", "scan_references")


class AttackSettings(Frozen):
    """One attack: a backdoored encoder and what triggers it."""

    encoder: Path = Field(description="checkpoint of the backdoored encoder")
    attack: Path | None = Field(
        default=None, description="its attack.json or folder; None: the encoder's folder"
    )
    clean: Path | None = Field(
        default=None, description="the clean encoder: the rate of chance, and fidelity"
    )


class MatrixSettings(Frozen):
    """A whole matrix; entries of attacks and defenses are checked by :func:`load_matrix`."""

    results: Path | None = Field(
        default=None, description="CSV of finished cells; those found there are not run again"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        default=(0,), description="each defense is run with each of them"
    )
    # Required, so that what the user has set can be told from what is a default: a defense's preset
    # stands between the two.
    data: DataSettings = Field(description="clean images for the defenses")
    encoder: EncoderSettings = Field(
        default_factory=EncoderSettings, description="how the attacks' encoders are read"
    )
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="labeled sets, probes, labels"
    )
    attacks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by name: encoder, attack, clean"
    )
    defenses: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by name: kind, and that kind's settings"
    )

    @model_validator(mode="before")
    @classmethod
    def _data_given(cls, values: Any) -> Any:
        return {"data": {}, **values} if isinstance(values, Mapping) else values


@dataclass(frozen=True, kw_only=True, slots=True)
class DefenseEntry:
    """One defense of a matrix.

    Args:
        kind: A key of ``DEFENSES``.
        settings: By seed, everything that decides what the defense does; see ``defenses.py``.
    """

    kind: str
    settings: Mapping[int, Frozen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix that has been checked as far as it can be without opening a file.

    Args:
        settings: As read.
        attacks: By name, in the order of the file.
        defenses: By name, in the order of the file.
    """

    settings: MatrixSettings
    attacks: Mapping[str, AttackSettings]
    defenses: Mapping[str, DefenseEntry]


def load_matrix(recipe: Path | None, *, overrides: Sequence[str] = ()) -> Matrix:
    """Reads a matrix and checks every name, key and value of it.

    Args:
        recipe: TOML file.
        overrides: ``key=value`` strings, e.g. ``seeds=[0, 1]`` or
            ``defenses.mimic.optim.epochs=20``.

    Raises:
        UsageError: If a file, a key, a name or a value is not valid, or there is nothing to run.
    """
    settings = load_recipe(MatrixSettings, recipe, overrides=overrides)
    _check_rest(settings)
    for section, table in (("attacks", settings.attacks), ("defenses", settings.defenses)):
        _check_names(section, table)
    attacks = {
        name: _located(f"attacks.{name}", validated, AttackSettings, values)
        for name, values in settings.attacks.items()
    }
    defenses = {
        name: _located(f"defenses.{name}", _defense, settings, values)
        for name, values in settings.defenses.items()
    }
    if any(DEFENSES[one.kind].reads_data for one in defenses.values()) and not settings.data.source:
        raise UsageError("no clean images given for the defenses; set data.source in the matrix")
    return Matrix(settings=settings, attacks=attacks, defenses=defenses)


def _check_rest(settings: MatrixSettings) -> None:
    if not settings.seeds:
        raise UsageError("seeds is empty; give at least one, e.g. seeds = [0]")
    twice = [seed for seed in settings.seeds if settings.seeds.count(seed) > 1]
    if twice:
        raise UsageError(f"seeds names {twice[0]} twice; a cell is run once")
    if settings.encoder.teacher is not None or settings.encoder.teacher_shard:
        raise UsageError(
            "encoder.teacher and encoder.teacher_shard have no place in a matrix; the encoders are "
            "those of [attacks.NAME], each whole in one process"
        )
    evaluation = settings.evaluation
    for name, place in _ELSEWHERE.items():
        if getattr(evaluation, name):
            raise UsageError(f"evaluation.{name} has no place in a matrix; use {place}")
    for name in _NOT_HERE:
        if getattr(evaluation, name):
            raise UsageError(f"evaluation.{name} has no place in a matrix; leave it out")
    if not evaluation.downstream:
        raise UsageError(
            "nothing to measure on; give [[evaluation.downstream]] with name, train and test"
        )
    names = [downstream.name for downstream in evaluation.downstream]
    if len(set(names)) != len(names):
        raise UsageError(f"downstream sets need different names, got {', '.join(names)}")


def _check_names(section: str, table: Mapping[str, Any]) -> None:
    """Names become folders, also where a file system ignores the case of letters."""
    if not table:
        raise UsageError(f"the matrix has no {section}; give at least one [{section}.NAME]")
    seen: dict[str, str] = {}
    for name in table:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{section}: {name!r} cannot name a folder; use up to 64 letters, digits, '_', '-' "
                "and '.', the first a letter or digit"
            )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise UsageError(f"{section}: '{other}' and '{name}' differ in case only; rename one")


def _defense(settings: MatrixSettings, values: Mapping[str, Any]) -> DefenseEntry:
    keys = dict(values)
    kind = keys.pop("kind", None)
    if not isinstance(kind, str) or kind not in DEFENSES:
        said = "kind is missing" if kind is None else f"unknown kind {kind!r}"
        raise UsageError(f"{said}; there are {', '.join(DEFENSES)}")
    data = settings.data.model_dump(exclude_unset=True)
    prepare = DEFENSES[kind].prepare
    return DefenseEntry(
        kind=kind,
        settings={
            seed: prepare(keys, data=data, encoder=settings.encoder, seed=seed)
            for seed in settings.seeds
        },
    )


def _located(where: str, check: Any, *arguments: Any) -> Any:
    """``check(*arguments)``; what it refuses is said to stand at ``where``."""
    try:
        return check(*arguments)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
