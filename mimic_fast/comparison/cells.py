"""The cells of a matrix: what each is, by what it is known again, where it lies."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimic_fast.comparison.contents import Contents, clean_set_digest, contents
from mimic_fast.comparison.defenses import UNREAD, UNREAD_DATA, is_baseline, options_of, own_views
from mimic_fast.comparison.settings import AS_IT_IS, DefenseSettings, MatrixSettings
from mimic_fast.config import Frozen, Settings, StopSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import attack_path, read_attack
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.stamping import Trigger, trigger_parts
from mimic_fast.files import sha256_file
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import load_settings, settings_record

_FORM = 1  # changes with what a cell's figures mean
# Where figures come from, not what they are.
_INDIFFERENT = {"cache", "attack", "clean", "student_only", "curve_every", "scan"}
_OWN = ("encoder.teacher", "seed", "run", "evaluation")  # the matrix's, for all defenses
# Settings younger than committed rows, with the value that does what was done before there were
# any: at that value they leave the digest of a cell alone.
_LATER: dict[str, dict[str, Any]] = {
    "mi": {"weighting": "information"},
    "stop": StopSettings().model_dump(mode="json"),
}
_READING = ("architecture", "arguments", "stem", "in_channels", "image_size", "mean", "std")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One defense with one seed on one attacked encoder.

    Args:
        attack: Name in the matrix.
        defense: Name in the matrix.
        seed: Of the defense.
        kind: The defense's kind.
        settings: Everything the defense and the measurement need; ``run.out`` is the folder.
        options: The kind's own settings, validated, as JSON has them.
        clean: The clean encoder, where there is one.
        evaluation_seed: Draws labeled and test images.
        digest: SHA-256 over all that decides the figures.
    """

    attack: str
    defense: str
    seed: int
    kind: str
    settings: Settings
    options: dict[str, Any]
    clean: Path | None
    evaluation_seed: int
    digest: str

    @property
    def folder(self) -> Path:
        """Where it runs and leaves ``cell.json``."""
        assert self.settings.run.out is not None
        return self.settings.run.out

    @property
    def title(self) -> str:
        """``attack/defense/seed`` for messages."""
        return f"{self.attack}/{self.defense}/{self.seed}"


def cells_of(
    matrix: MatrixSettings,
    out: Path,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Cell]:
    """All cells, attack by attack; files and data are digested once.

    Args:
        matrix: What to compare.
        out: Run directory.
        report: Told about downloads and videos.
        stop: Polled while data is read; true leaves.

    Raises:
        UsageError: If a kind or setting of a defense is wrong, a file or source is missing, or an
            attack has no target yet on one of the sets.
        UnsafeInputError: If an ``attack.json`` or a source is damaged.
        StoppedError: If ``stop`` told so.
    """
    content = contents(report=report, stop=stop)
    for name, attack in matrix.attacks.items():
        attacked = _attack_identity(matrix, name)
        for label, defense in matrix.defenses.items():
            options = _options(label, defense)
            for seed in _seeds(matrix, defense):
                settings = _settings(matrix, name, label, seed, out)
                identity = {
                    "form": _FORM,
                    "attack": attacked,
                    "kind": defense.kind,
                    "settings": _decisive(settings, content, kind=defense.kind),
                    "options": settings_record(options),
                    "evaluation_seed": matrix.evaluation_seed,
                }
                yield Cell(
                    attack=name,
                    defense=label,
                    seed=seed,
                    kind=defense.kind,
                    settings=settings,
                    options=options.model_dump(mode="json"),
                    clean=attack.clean,
                    evaluation_seed=matrix.evaluation_seed,
                    digest=_digest(identity),
                )


def check_files(matrix: MatrixSettings) -> None:
    """Refuses a matrix that names what is not there or does not fit, before anything runs.

    Warns of seeds that a defense has for nothing.

    Raises:
        UsageError: With the name of the attack, defense or labeled set and what is wrong with it.
        UnsafeInputError: If an ``attack.json`` is damaged.
    """
    for downstream in matrix.evaluation.downstream:
        open_downstream(downstream, matrix.evaluation, seed=matrix.evaluation_seed)
    for name, attack in matrix.attacks.items():
        for path in (attack.encoder, attack.clean):
            if path is not None and not path.is_file():
                raise UsageError(f"attacks.{name}: {path} does not exist; give a checkpoint")
        read_attack(attack.attack_file)
    without = [name for name, attack in matrix.attacks.items() if attack.clean is None]
    for name, defense in matrix.defenses.items():
        _options(name, defense)
        if defense.kind == "clean" and without:
            raise UsageError(
                f"defenses.{name} of kind 'clean' needs attacks.{without[0]}.clean, the clean "
                "encoder"
            )
        ignored = (defense.seeds or ())[1:]
        if defense.kind in AS_IT_IS and ignored:
            warnings.warn(
                f"defenses.{name}: kind {defense.kind!r} draws nothing and runs once, with its "
                f"first seed; {', '.join(map(str, ignored))} are ignored",
                stacklevel=3,
            )


def without_target(matrix: MatrixSettings) -> list[str]:
    """Attacks whose target class on some downstream set has still to be worked out."""
    sets = {downstream.name for downstream in matrix.evaluation.downstream}
    return [
        name
        for name, attack in matrix.attacks.items()
        if sets - set(read_attack(attack.attack_file).targets)
    ]


def _options(name: str, defense: DefenseSettings) -> Frozen:
    try:
        return options_of(defense.kind, defense.options)
    except UsageError as error:
        raise UsageError(f"defenses.{name}: {error}") from None


def _seeds(matrix: MatrixSettings, defense: DefenseSettings) -> tuple[int, ...]:
    """Of a defense that draws nothing the first: equal cells would show an interval of width 0."""
    seeds = defense.seeds or matrix.seeds
    return seeds[:1] if defense.kind in AS_IT_IS else seeds


def _settings(matrix: MatrixSettings, attack: str, defense: str, seed: int, out: Path) -> Settings:
    attacked, own = matrix.attacks[attack], matrix.defenses[defense]
    for path in _OWN:
        section, _, key = path.partition(".")
        found = own.settings.get(section)
        if found is not None and (not key or key in found):
            raise UsageError(
                f"defenses.{defense}.settings.{path} is the same for all cells; set it in the "
                "matrix itself"
            )
    for key in _READING:
        if key in own.settings.get("encoder", {}):
            raise UsageError(
                f"defenses.{defense}.settings.encoder.{key} is the same for all cells of an "
                "attack; set it in attacks.NAME.loading"
            )
    _refuse_unread(defense, own)
    evaluation = {
        **matrix.evaluation.model_dump(mode="json"),
        "attack": str(attack_path(attacked.attack_file)),
    }
    values = {
        **own.settings,
        "seed": seed,
        "encoder": {
            **attacked.loading.model_dump(mode="json", exclude_unset=True),
            **own.settings.get("encoder", {}),
            "teacher": str(attacked.encoder),
        },
        "data": {
            **matrix.data.model_dump(mode="json", exclude_none=True),
            **own.settings.get("data", {}),
        },
        "run": {
            "out": str(out / "cells" / attack / defense / f"seed_{seed}"),
            "resume": "auto",
        },
        "evaluation": evaluation,
    }
    try:
        return load_settings(preset=own.preset, values=values)
    except UsageError as error:
        raise UsageError(f"defenses.{defense}: {error}") from None


def _refuse_unread(name: str, defense: DefenseSettings) -> None:
    """A baseline has options in place of the sections that it does not read."""
    given = {**defense.settings, **({} if defense.preset is None else {"preset": ""})}
    unread = [section for section in UNREAD if section in given and is_baseline(defense.kind)]
    if own_views(defense.kind):
        unread += ["stop"] if "stop" in given and "stop" not in unread else []
        unread += [f"data.{key}" for key in UNREAD_DATA if key in given.get("data", {})]
    if unread:
        instead = f"set defenses.{name}.options" if is_baseline(defense.kind) else "leave it out"
        raise UsageError(
            f"defenses.{name}: kind {defense.kind!r} does not read {unread[0]}; {instead}"
        )


def _attack_identity(matrix: MatrixSettings, name: str) -> dict[str, Any]:
    attack = matrix.attacks[name]
    read = read_attack(attack.attack_file)
    names = [downstream.name for downstream in matrix.evaluation.downstream]
    missing = [one for one in names if one not in read.targets]
    if missing:
        raise UsageError(f"attacks.{name} has no target on {', '.join(missing)}")
    return {
        "encoder": sha256_file(attack.encoder),
        "trigger": _trigger_digest(read.trigger),
        "targets": {one: read.targets[one] for one in names},
        "clean": None if attack.clean is None else sha256_file(attack.clean),
    }


def _trigger_digest(trigger: Trigger) -> str:
    return hashlib.sha256(b"".join(trigger_parts(trigger))).hexdigest()


def _decisive(settings: Settings, content: Contents, *, kind: str) -> dict[str, Any]:
    """The settings with data by content, and without what changes no figure."""
    record = settings_record(settings)
    record["encoder"].pop("teacher")  # its digest stands for it
    for section, later in _LATER.items():
        for key, value in later.items():
            if record[section][key] == value:
                record[section].pop(key)
        if not record[section]:
            record.pop(section)
    if settings.student.checkpoint is not None:
        record["student"]["checkpoint"] = sha256_file(settings.student.checkpoint)
    for section in UNREAD if is_baseline(kind) or kind in AS_IT_IS else ():
        record.pop(section, None)
    for key in UNREAD_DATA if own_views(kind) or kind in AS_IT_IS else ():
        record["data"].pop(key)
    evaluation = {k: v for k, v in record["evaluation"].items() if k not in _INDIFFERENT}
    evaluation["downstream"] = [
        {
            "name": one.name,
            "train": content(one.train),
            "test": content(one.test),
        }
        for one in settings.evaluation.downstream
    ]
    own, data = settings.data, dict(record["data"])
    if own.source is not None:
        data["source"] = content(own.source)
    if own.clean_set is not None:
        data["clean_set"] = clean_set_digest(own.clean_set)
    return {**record, "evaluation": evaluation, "data": data}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
