"""The one test in which a real backdoor falls: half of the demo, on one seed."""

from pathlib import Path

import pytest

from mimic_fast.config import Settings
from mimic_fast.data.sources import open_source
from mimic_fast.demo import ASSETS, demo_settings
from mimic_fast.distil import purify
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.attack_file import read_attack, write_attack
from mimic_fast.evidence import write_evidence
from mimic_fast.recipe import validated

EPOCHS, TEST_IMAGES = 30, 4000  # the demo: 80 and all


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The demo's, shorter, without the floor and the clean reference."""
    try:
        open_source("fashion-mnist:train")
    except (UsageError, UnsafeInputError) as error:
        pytest.skip(f"needs Fashion-MNIST: {error}")
    write_attack(tmp_path / "attack", read_attack(ASSETS / "demo_attack"))
    values = demo_settings(tmp_path).model_dump()
    values["optim"]["epochs"] = EPOCHS
    values["evaluation"] |= {"student_only": False, "clean": None, "test_images": TEST_IMAGES}
    return validated(Settings, values)


def test_backdoor_falls_and_accuracy_stays(settings):
    report = write_evidence(purify(settings), settings)

    (teacher,), (purified,) = (
        report["encoders"][role]["downstream"] for role in ("teacher", "purified")
    )
    (before,), (after,) = teacher["attacks"], purified["attacks"]
    assert report["clean_set"]["fraction"] <= 0.05
    assert before["target"] == after["target"]
    assert before["attack_success_rate"]["value"] >= 0.95
    # Measured .007 and .001 on seeds 0 and 1, at an accuracy .016 and .029 below.
    assert after["attack_success_rate"]["value"] <= 0.1
    accuracy, kept = (part["clean_accuracy"]["value"] for part in (teacher, purified))
    assert kept >= accuracy - 0.04
