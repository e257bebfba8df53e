import contextlib
import json
import math
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.errors import UsageError
from mimic_fast.recipe import PRESETS, load_recipe, load_settings, settings_json, validated


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("loss.atention_weight", "loss.attention_weight"),
        ("optim.learning_rate", "optim"),
        ("loss.harden.probabilty", "loss.harden.probability"),
        ("sed", "seed"),
        ("los.clone", "los"),
    ],
)
def test_unknown_setting_is_refused_with_the_nearest_name(key, near):
    with pytest.raises(UsageError) as caught:
        load_settings(overrides=[f"{key}=1"])

    message = str(caught.value)
    assert message.startswith("unknown setting '")
    assert near in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_precedence_is_default_preset_recipe_option_override(tmp_path):
    path = recipe(
        tmp_path,
        """
        preset = "official"
        seed = 1
        [optim]
        lr = 0.5
        epochs = 7
        batch_size = 9
        """,
    )

    settings = load_settings(
        path,
        values={"optim": {"epochs": 8, "batch_size": 10}},
        overrides=["optim.batch_size=11", "optim.batch_size=12"],
    )

    assert settings.preset == "official"
    assert settings.optim.momentum == 0.9  # default
    assert settings.optim.name == "adam"  # preset
    assert (settings.seed, settings.optim.lr) == (1, 0.5)  # recipe
    assert settings.optim.epochs == 8  # option
    assert settings.optim.batch_size == 12  # the last override


def test_preset_option_overrides_the_recipes(tmp_path):
    path = recipe(tmp_path, 'preset = "official"\n')

    settings = load_settings(path, preset="mimic")

    assert settings.preset == "mimic"
    assert settings.optim.name == "adamw"
    assert settings.loss.harden.probability == 0


def test_hardened_is_the_default_preset():
    settings = load_settings()

    assert settings.preset == "hardened"
    assert settings.loss.harden.probability > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert load_settings(preset=preset).preset == preset


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="hardened, mimic, official; got 'fast'"):
        load_settings(preset="fast")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss.attention_weight=500", 500.0),
        ("loss.attention_weight = 5e-1", 0.5),
        ("data.source=fashion-mnist:train", "fashion-mnist:train"),
        ('data.source="a=b"', "a=b"),
        ("data.source=a=b", "a=b"),
        ("data.crop_scale=[0.5, 1.0]", (0.5, 1.0)),
        ("data.stratified=true", True),
        ("encoder.taps=['layer1', 'layer2']", ("layer1", "layer2")),
        ("encoder.arguments.width=3", {"width": 3}),
    ],
)
def test_override_is_read_as_toml_or_else_as_text(text, expected):
    settings = load_settings(overrides=[text])

    section, name = text.partition("=")[0].strip().split(".")[:2]
    assert getattr(getattr(settings, section), name) == expected


@pytest.mark.parametrize("text", ["", "=1", "loss.clone", "  =2"])
def test_override_without_key_or_value_is_refused(text):
    with pytest.raises(UsageError, match=r"--set takes section\.key=value"):
        load_settings(overrides=[text])


@given(
    st.sampled_from(["optim.lr", "loss.temperature"]),
    st.floats(min_value=1e-300, max_value=1e300, allow_nan=False),
)
def test_any_number_survives_an_override(key, value):
    section, name = key.split(".")

    settings = load_settings(overrides=[f"{key}={value!r}"])

    assert getattr(getattr(settings, section), name) == value


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return False
    return True


@given(st.text(min_size=1).filter(lambda text: not _is_toml(text)))
def test_any_text_that_is_no_toml_survives_an_override(text):
    assert load_settings(overrides=[f"data.source={text}"]).data.source == text


@given(st.text())
def test_any_override_is_a_setting_or_a_usage_error(text):
    with contextlib.suppress(UsageError):
        assert isinstance(load_settings(overrides=[text]), Settings)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "'fast'"])
def test_value_out_of_range_names_setting_and_value(value):
    with pytest.raises(UsageError, match=r"setting 'optim\.lr': .* \(got "):
        load_settings(overrides=[f"optim.lr={value}"])


def test_settings_checked_together_say_what_is_wrong():
    with pytest.raises(UsageError, match=r"crop_scale must satisfy 0 < low <= high <= 1"):
        load_settings(overrides=["data.crop_scale=[0.9, 0.2]"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("seed = ", "is not valid TOML"),
        ("seed = 1\nseed = 2", "is not valid TOML"),
        (b"\xff", "cannot be read"),
        ("[optim]\nepoch = 3", r"unknown setting 'optim\.epoch'; did you mean 'optim\.epochs'\?"),
        ("optim = 3", "setting 'optim'"),
    ],
)
def test_unusable_recipe_is_a_usage_error(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)

    with pytest.raises(UsageError, match=message):
        load_settings(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_effective_settings_round_trip_through_json(preset):
    settings = load_settings(
        preset=preset,
        overrides=["encoder.teacher=t.safetensors", "run.out=r", "encoder.arguments.depths=[1, 2]"],
    )

    again = validated(Settings, json.loads(settings_json(settings)))

    assert again == settings
    assert settings_json(again) == settings_json(settings)


def test_effective_settings_of_another_kind_round_trip():
    spec = load_recipe(
        EncoderSpec,
        values={
            "architecture": "timm:resnet18",
            "image_size": 32,
            "mean": [0.5] * 3,
            "std": [1] * 3,
        },
    )

    assert validated(EncoderSpec, json.loads(settings_json(spec))) == spec


@pytest.mark.parametrize(
    ("module", "name", "override", "kept"),
    [
        ("attacks.badencoder", "BadEncoderSettings", "optim.epochs=1", ("optim", "name", "adamw")),
        ("pretraining", "PretrainSettings", "loss.temperature=1", ("loss", "contrastive", 1.0)),
    ],
)
def test_override_keeps_what_else_a_section_defaults_to(module, name, override, kept):
    model = getattr(import_module(f"mimic_fast.{module}"), name)
    spec = {"architecture": "timm:resnet18", "image_size": 32, "mean": [0.5] * 3, "std": [1] * 3}
    values = {"spec": spec} if name == "PretrainSettings" else {}

    settings = load_recipe(model, overrides=[override], values=values)

    section, field, value = kept
    assert getattr(getattr(settings, section), field) == value


def test_settings_are_frozen():
    settings = load_settings()

    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_setting_has_a_description_in_the_json_schema():
    schema = Settings.model_json_schema()
    missing = [
        f"{model['title']}.{name}"
        for model in [schema, *schema["$defs"].values()]
        for name, field in model.get("properties", {}).items()
        # a section is described by its class
        if not field.get("description") and "$ref" not in field
    ]

    assert not missing
    assert all(model.get("description") for model in [schema, *schema["$defs"].values()])


def test_json_schema_lists_every_field():
    schema = Settings.model_json_schema()

    def fields(model: type[BaseModel]) -> set[str]:
        nested = (f.annotation for f in model.model_fields.values())
        inner = [t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)]
        return set(model.model_fields).union(*(fields(t) for t in inner))

    listed = {name for model in [schema, *schema["$defs"].values()] for name in model["properties"]}
    assert fields(Settings) <= listed


def test_defaults_are_finite():
    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            return [n for item in value.values() for n in numbers(item)]
        if isinstance(value, list):
            return [n for item in value for n in numbers(item)]
        return [value] if isinstance(value, float) else []

    assert all(math.isfinite(n) for n in numbers(load_settings().model_dump(mode="json")))


def test_loss_with_nothing_to_minimize_is_refused():
    zero = ("loss.clone=0", "loss.attention_weight=0", "loss.contrastive=0")

    with pytest.raises(UsageError, match="one of clone, dense, attention_weight and contrastive"):
        load_settings(overrides=zero)
