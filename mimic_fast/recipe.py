"""Recipes: presets, TOML files and ``--set section.key=value`` into frozen settings.

Order of precedence: defaults, then the preset, then the recipe, then command-line values, then
``--set``. An unknown key is refused with the nearest name. The effective settings are written to
the run as JSON.
"""

import difflib
import json
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mimic_fast.config import Frozen, Settings
from mimic_fast.errors import UsageError

Model = TypeVar("Model", bound=Frozen)

# 'official' is the authors' demo (github.com/wssun/MIMIC, 36ef47c), 'mimic' the abstract's method.
PRESETS: dict[str, dict[str, Any]] = {
    # The teacher sees the whole image: a crop that zooms in on a bright spot would trigger it, and
    # the student would learn that answer. What the teacher would answer differently (other colors,
    # small crops) is then kept from the student too: its answer would be wrong.
    "hardened": {
        "data": {"crop_scale": [0.6, 1.0], "jitter_probability": 0.0, "grayscale": 0.0},
        "loss": {
            "teacher_view": "plain",
            "attention_weight": 0.0003,
            "harden": {"probability": 1.0},
        },
        "optim": {"batch_size": 64},
    },
    "mimic": {},
    "official": {
        "data": {"crop_scale": [0.08, 1.0], "hold_out": 0.0},
        "mi": {"source": "student", "estimator": "dv"},
        "loss": {"attention_form": "mean", "attention_weight": 1.0, "contrastive": 1.0},
        "optim": {
            "name": "adam",
            "lr": 1e-3,
            "weight_decay": 1e-6,
            "epochs": 1000,
            "warmup_epochs": 0,
            "schedule": "constant",
            "clip_norm": 0,
        },
        "seed": 100,
    },
}


def load_settings(
    recipe: Path | None = None,
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Settings:
    """Builds the effective settings of a purification.

    Args:
        recipe: TOML file; None for defaults only.
        preset: Overrides the preset the recipe names.
        overrides: ``section.key=value`` strings; the value is read as TOML, else as a plain string.
        values: Nested values that rank above the recipe and below ``overrides`` (command-line
            options).

    Raises:
        UsageError: If a file, a key or a value is not valid.
    """
    user = _user_values(recipe, overrides, values)
    name = preset or user.get("preset", "hardened")
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return validated(Settings, _merged(PRESETS[name], {**user, "preset": name}))


def load_recipe(
    model: type[Model],
    recipe: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Model:
    """Builds settings of another kind (pre-training, attack) by the same rules, without presets.

    Raises:
        UsageError: If a file, a key or a value is not valid.
    """
    user = _user_values(recipe, overrides, values)
    return validated(model, _merged(_section_defaults(model), user))


def settings_json(settings: Frozen) -> str:
    """The settings as JSON text that :func:`validated` accepts again."""
    return json.dumps(settings.model_dump(mode="json"), indent=2) + "\n"


def settings_record(settings: Frozen) -> dict[str, Any]:
    """The settings as a card carries them to others: no run section, no folders of this machine."""
    return _without_folders(settings.model_dump(mode="json", exclude={"run"}))


def validated(model: type[Model], values: Mapping[str, Any]) -> Model:
    """``model`` from nested values, with one clear line on the first mistake.

    Raises:
        UsageError: If a key is unknown or a value not valid.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(error, model)) from None


def warn_ignored(section: Frozen, names: Sequence[str], *, prefix: str, user: str) -> None:
    """Warns of settings that were changed although nothing will read them.

    Args:
        section: The settings' section.
        names: Fields of it that are not read.
        prefix: The section's name in a recipe; empty: the recipe itself.
        user: What does not read them.
    """
    fields = type(section).model_fields
    changed = [
        f"{prefix}.{name}" if prefix else name
        for name in names
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
    if changed:
        warnings.warn(f"{user} ignores {', '.join(changed)}", stacklevel=3)


def _section_defaults(model: type[Frozen]) -> dict[str, Any]:
    """What this kind's sections default to, so that setting one key keeps the section's others."""
    sections = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in model.model_fields.items()
        if not field.is_required()
    }
    return {name: part.model_dump() for name, part in sections.items() if isinstance(part, Frozen)}


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _user_values(
    recipe: Path | None, overrides: Sequence[str], values: Mapping[str, Any] | None
) -> dict[str, Any]:
    user = _merged(_read_toml(recipe) if recipe is not None else {}, values or {})
    for item in overrides:
        user = _merged(user, _parse_override(item))
    return user


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist; give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}") from None


def _parse_override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set takes section.key=value, got {item!r}")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[key] = value
    return result


def _explain(error: ValidationError, model: type[Frozen]) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _field_paths(model)
        near = difflib.get_close_matches(where, known, n=1, cutoff=0)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown setting '{where}'{hint}"
    return (
        f"setting '{where}': {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"
    )


def _field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            paths += _field_paths(kind, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths
