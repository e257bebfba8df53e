"""The cells of a matrix: what each is, by what it is known again, where it lies."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimic_fast.comparison.defenses import clean, defense_of
from mimic_fast.comparison.settings import MatrixSettings
from mimic_fast.config import Settings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import attack_path, read_attack
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.files import sha256_file
from mimic_fast.recipe import load_settings, settings_record

_FORM = 1  # changes with what a cell's figures mean
# Where figures come from, not what they are.
_INDIFFERENT = {"cache", "attack", "clean", "student_only", "curve_every", "scan"}
_OWN = ("encoder.teacher", "seed", "run", "evaluation")  # the matrix's, for all defenses


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One defense with one seed on one attacked encoder.

    Args:
        attack: Name in the matrix.
        defense: Name in the matrix.
        seed: Of the defense.
        kind: The defense's kind.
        settings: Everything the defense and the measurement need; ``run.out`` is the folder.
        clean: The clean encoder, where there is one.
        evaluation_seed: Draws labeled and test images.
        digest: SHA-256 over all that decides the figures.
    """

    attack: str
    defense: str
    seed: int
    kind: str
    settings: Settings
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


def cells_of(matrix: MatrixSettings, out: Path) -> Iterator[Cell]:
    """All cells, attack by attack; files are digested once.

    Raises:
        UsageError: If a kind or setting of a defense is wrong, a file is missing, or an attack has
            no target yet on one of the sets.
        UnsafeInputError: If an ``attack.json`` is damaged.
    """
    for name, attack in matrix.attacks.items():
        attacked = _attack_identity(matrix, name)
        for label, defense in matrix.defenses.items():
            function = defense_of(defense.kind)
            for seed in defense.seeds or matrix.seeds:
                settings = _settings(matrix, name, label, seed, out)
                identity = {
                    "form": _FORM,
                    "attack": attacked,
                    "kind": function.__name__,
                    "settings": _decisive(settings),
                    "evaluation_seed": matrix.evaluation_seed,
                }
                yield Cell(
                    attack=name,
                    defense=label,
                    seed=seed,
                    kind=defense.kind,
                    settings=settings,
                    clean=attack.clean,
                    evaluation_seed=matrix.evaluation_seed,
                    digest=_digest(identity),
                )


def check_files(matrix: MatrixSettings) -> None:
    """Refuses a matrix that names what is not there or does not fit, before anything runs.

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
    for label, defense in matrix.defenses.items():
        without = [name for name, attack in matrix.attacks.items() if attack.clean is None]
        if defense_of(defense.kind) is clean and without:
            raise UsageError(
                f"defenses.{label} of kind 'clean' needs attacks.{without[0]}.clean, the clean "
                "encoder"
            )


def without_target(matrix: MatrixSettings) -> list[str]:
    """Attacks whose target class on some downstream set has still to be worked out."""
    sets = {downstream.name for downstream in matrix.evaluation.downstream}
    return [
        name
        for name, attack in matrix.attacks.items()
        if sets - set(read_attack(attack.attack_file).targets)
    ]


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
    evaluation = {
        **matrix.evaluation.model_dump(mode="json"),
        "attack": str(attack_path(attacked.attack_file)),
    }
    values = {
        **own.settings,
        "seed": seed,
        "encoder": {**own.settings.get("encoder", {}), "teacher": str(attacked.encoder)},
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


def _attack_identity(matrix: MatrixSettings, name: str) -> dict[str, Any]:
    attack = matrix.attacks[name]
    read = read_attack(attack.attack_file)
    names = [downstream.name for downstream in matrix.evaluation.downstream]
    missing = [one for one in names if one not in read.targets]
    if missing:
        raise UsageError(f"attacks.{name} has no target on {', '.join(missing)}")
    folder = attack_path(attack.attack_file).parent
    return {
        "encoder": sha256_file(attack.encoder),
        "trigger": sha256_file(folder / "trigger.safetensors"),
        "targets": {one: read.targets[one] for one in names},
        "clean": None if attack.clean is None else sha256_file(attack.clean),
    }


def _decisive(settings: Settings) -> dict[str, Any]:
    """The settings without where files lie on this machine and without what changes no figure."""
    record = settings_record(settings)
    record["encoder"].pop("teacher")  # its digest stands for it
    evaluation = {k: v for k, v in record["evaluation"].items() if k not in _INDIFFERENT}
    evaluation["downstream"] = [
        {key: Path(value).name for key, value in one.items()} for one in evaluation["downstream"]
    ]
    data = dict(record["data"])
    for key in ("source", "clean_set"):
        data[key] = None if data[key] is None else Path(data[key]).name
    return {**record, "evaluation": evaluation, "data": data}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
