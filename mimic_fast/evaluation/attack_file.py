"""attack.json: what an attack stamps, what it points at, and which class that is downstream.

Lies in a folder with ``trigger.safetensors`` and, where the attack has one, ``reference.png``. All
of it is read as untrusted data: paths stay inside the folder and nothing is unpickled.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.triggers import Trigger, load_trigger, save_trigger
from mimic_fast.files import write_atomic

_MAX_JSON = 2**20
_MAX_PIXELS = 2048 * 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """What must be known of an attack to measure its success.

    Args:
        kind: The attack's name, e.g. ``badencoder``.
        trigger: What is stamped on images.
        reference: The image whose features triggered images imitate; None for poisoning attacks.
        targets: Target class by downstream set, fixed on the teacher, kept for every defense.
        facts: How the attack was made; recorded, never interpreted.
    """

    kind: str
    trigger: Trigger
    reference: UInt8[Tensor, "channel height width"] | None
    targets: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class _AttackFile(BaseModel):
    """The JSON text, validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    schema_version: int = Field(alias="schema", ge=1, le=1)
    kind: str = Field(min_length=1, max_length=100)
    trigger: str
    reference: str | None = None
    targets: dict[str, int] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)


def write_attack(directory: Path, attack: Attack) -> Path:
    """Writes trigger, reference and ``attack.json`` (last) into ``directory``; returns the latter.

    Raises:
        MachineError: If the folder cannot be written.
        UsageError: If the reference has neither 1 nor 3 channels.
    """
    save_trigger(directory / "trigger.safetensors", attack.trigger)
    content: dict[str, Any] = {
        "schema": 1,
        "kind": attack.kind,
        "trigger": "trigger.safetensors",
        "targets": dict(attack.targets),
        "facts": dict(attack.facts),
    }
    if attack.reference is not None:
        write_atomic(directory / "reference.png", _png(attack.reference))
        content["reference"] = "reference.png"
    path = directory / "attack.json"
    _write_json(path, content)
    return path


def read_attack(path: Path) -> Attack:
    """Reads ``attack.json``, or the one in the folder ``path``.

    Raises:
        UsageError: If a file is missing or not of this form.
        UnsafeInputError: If a file is damaged, oversized or named outside the folder.
    """
    path = attack_path(path)
    content = _read_json(path)
    reference = None
    if content.reference is not None:
        reference = _read_png(_inside(path, content.reference))
    targets = content.targets
    if any(target < 0 for target in targets.values()):
        raise UsageError(f"attack {path}: targets must be class indices from 0 on, got {targets}")
    return Attack(
        kind=content.kind,
        trigger=load_trigger(_inside(path, content.trigger)),
        reference=reference,
        targets=targets,
        facts=content.facts,
    )


def attack_files(path: Path) -> tuple[Path, ...]:
    """The ``attack.json`` that ``path`` is; of a folder its own and its further targets'.

    An attack with several targets leaves ``attack.json`` of the first in its folder and those of
    the others in ``target_2``, ``target_3``, ... there.

    Raises:
        UnsafeInputError: If one of these is a link out of the folder.
        UsageError: If the folder cannot be read.
    """
    own = attack_path(path)
    if not path.is_dir():
        return (own,)
    return (own, *(_inside(own, f"{name}/attack.json") for name in further_targets(path)))


def further_targets(folder: Path) -> list[str]:
    """Those of ``target_2``, ``target_3``, ... in a folder that have an ``attack.json``.

    Raises:
        UsageError: If the folder cannot be read.
    """
    try:
        names = [path.parent.name for path in folder.glob("target_*/attack.json")]
    except OSError as error:
        raise UsageError(f"attack {folder} cannot be read: {error}") from None
    numbers = (re.fullmatch(r"target_([2-9]|[1-9]\d{1,3})", name) for name in names)
    return [f"target_{n}" for n in sorted(int(number[1]) for number in numbers if number)]


def refuse_other_targets(folder: Path, *, count: int) -> None:
    """Refuses a folder with more targets than an attack writes: they are of an earlier one.

    Raises:
        UsageError: With the first of them.
    """
    left = [name for name in further_targets(folder) if int(name.partition("_")[2]) > count]
    if left:
        raise UsageError(
            f"{folder} holds {left[0]} of an earlier attack; use another --out, or remove it"
        )


def record_targets(path: Path, targets: Mapping[str, int]) -> None:
    """Adds targets to ``attack.json``; one already recorded stands.

    Raises:
        MachineError: If the file cannot be written.
        UsageError: If it is missing or not of this form.
    """
    path = attack_path(path)
    content = _read_json(path)
    merged = {**targets, **content.targets}
    if merged != content.targets:
        values = content.model_dump(by_alias=True, exclude_none=True)
        _write_json(path, {**values, "targets": merged})


def record_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to ``attack.json``; those of the same name are replaced.

    Raises:
        MachineError: If the file cannot be written.
        UsageError: If it is missing or not of this form.
    """
    path = attack_path(path)
    content = _read_json(path)
    values = content.model_dump(by_alias=True, exclude_none=True)
    _write_json(path, {**values, "facts": {**content.facts, **facts}})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What an ``attack.json`` says without its trigger and reference; as in :class:`Attack`."""

    kind: str
    targets: Mapping[str, int]
    facts: Mapping[str, Any]


def recorded(path: Path) -> Recorded:
    """Reads ``attack.json`` alone: its trigger may be missing or damaged.

    Raises:
        UsageError: If the file is missing or not of this form.
        UnsafeInputError: If it is oversized.
    """
    content = _read_json(attack_path(path))
    return Recorded(kind=content.kind, targets=content.targets, facts=content.facts)


def attack_path(path: Path) -> Path:
    """The JSON file itself, whether it or its folder was given."""
    return path / "attack.json" if path.is_dir() else path


def _read_json(path: Path) -> _AttackFile:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UnsafeInputError(f"attack {path} is over {_MAX_JSON} bytes; not an attack.json")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"attack {path} does not exist; give an attack.json or its folder"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"attack {path} cannot be read: {error}") from None
    try:
        return _AttackFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise UsageError(f"attack {path}: {where}: {first['msg']}; expected schema 1") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _inside(path: Path, name: str) -> Path:
    """``name`` next to ``path``, links followed, or an error if that leaves the folder."""
    folder = path.parent.resolve()
    try:
        target = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise UnsafeInputError(f"attack {path} names an impossible file {name!r}") from None
    if not target.is_relative_to(folder):
        raise UnsafeInputError(f"attack {path} names {name!r} outside its folder; copy it inside")
    return target


def _png(image: UInt8[Tensor, "channel height width"]) -> bytes:
    from PIL import Image

    if image.shape[0] not in (1, 3):
        raise UsageError(f"a reference image has 1 or 3 channels, got {image.shape[0]}")
    array = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_png(path: Path) -> UInt8[Tensor, "channel height width"]:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UnsafeInputError(f"reference {path} is over {_MAX_PIXELS} pixels; shrink it")
            array = np.array(image if image.mode == "L" else image.convert("RGB"))
    except FileNotFoundError:
        raise UsageError(f"reference {path} does not exist; attack.json names it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnsafeInputError(f"reference {path} cannot be decoded: {error}") from None
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
