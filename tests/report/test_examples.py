"""The row of images: the right ones, with the trigger where it belongs."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch
from mimic_fast.report.examples import load_examples, png_uri


@pytest.fixture
def settings(tmp_path) -> EvaluationSettings:
    for label, name in enumerate(("boot", "hat")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.full((20, 20, 3), 60 * label + 20 * index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.png")
    trigger = white_patch(image_size=32, channels=3)
    attack = Attack(kind="badencoder", trigger=trigger, reference=None)
    folder = str(tmp_path / "set")
    return EvaluationSettings(
        downstream=(DownstreamSettings(name="set", train=folder, test=folder),),
        attack=write_attack(tmp_path / "attack", attack),
    )


@pytest.fixture
def evaluation() -> dict:
    rows = [
        {"index": 2, "label": 0, "predicted": {"teacher": {"clean": 0, "triggered": 1}}},
        {"index": 4, "label": 1, "predicted": {"teacher": {"clean": 7, "triggered": 0}}},
    ]
    attacks = [{"trigger": "white_patch", "target": 1}]
    entry = {"dataset": "set", "probe": "linear", "attacks": attacks}
    return {
        "encoders": {"teacher": {"sha256": "", "downstream": [entry]}},
        "datasets": [{"name": "set", "class_names": ["boot", "hat"]}],
        "examples": [{"dataset": "set", "images": rows}],
    }


def pixels(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_examples_are_the_images_named_and_stamped_as_the_encoder_sees_them(settings, evaluation):
    boot, hat = load_examples(evaluation, settings, image_size=32, channels=3)

    assert np.array_equal(pixels(boot.clean), np.full((32, 32, 3), 40))
    assert np.array_equal(pixels(hat.clean), np.full((32, 32, 3), 80))
    assert boot.triggered is not None
    expected = np.full((32, 32, 3), 40)
    expected[21:31, 21:31] = 255
    assert np.array_equal(pixels(boot.triggered), expected)


def test_examples_say_what_was_predicted_and_who_was_fooled(settings, evaluation):
    boot, hat = load_examples(evaluation, settings, image_size=32, channels=1)

    assert (boot.label, hat.label) == ("boot", "hat")
    assert boot.said["teacher"] == ("boot", "hat")
    assert hat.said["teacher"] == ("class 7", "boot")
    assert (boot.fooled, hat.fooled) == (("teacher",), ())
    assert pixels(boot.clean).shape == (32, 32)


def test_without_an_attack_there_is_only_the_clean_image(settings, evaluation):
    del evaluation["encoders"]["teacher"]["downstream"][0]["attacks"]
    for row in evaluation["examples"][0]["images"]:
        del row["predicted"]["teacher"]["triggered"]
    plain = settings.model_copy(update={"attack": None})

    boot, _ = load_examples(evaluation, plain, image_size=32, channels=3)

    assert boot.triggered is None
    assert boot.said["teacher"] == ("boot", None)
    assert boot.fooled == ()


def test_without_a_labeled_set_there_are_no_examples():
    assert load_examples({"encoders": {}}, EvaluationSettings(), image_size=32, channels=3) == ()


def test_png_uri_is_lossless():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8, generator=generator)

    assert np.array_equal(pixels(png_uri(image)), image.permute(1, 2, 0).numpy())
