"""The course of accuracy and ASR while a student is trained, by a real purification."""

import json

import pytest

from mimic_fast.config import EvaluationSettings, Settings
from mimic_fast.distil import purify
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, read_attack, write_attack
from mimic_fast.evaluation.curve import read_curve
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.triggers import white_patch
from mimic_fast.evidence import write_evidence


def settings_of(tmp_path, teacher, images, **run) -> Settings:
    if not (tmp_path / "attack").exists():
        attack = Attack(
            kind="badencoder", trigger=white_patch(image_size=32, channels=3), reference=None
        )
        write_attack(tmp_path / "attack", attack)
    return Settings.model_validate(
        {
            "encoder": {"teacher": teacher},
            "data": {"source": str(images / "train"), "clean_fraction": 1, "allow_budget": True},
            "optim": {"epochs": 4, "batch_size": 40},
            "evaluation": {
                "downstream": [
                    {
                        "name": "toy",
                        "train": str(images / "train"),
                        "test": str(images / "test"),
                    }
                ],
                "attack": tmp_path / "attack",
                "curve_every": 2,
            },
            "run": {"out": tmp_path / "run", "device": "cpu", **run},
        }
    )


def test_curve_is_what_an_evaluation_of_the_student_says(tmp_path, teacher, images):
    settings = settings_of(tmp_path, teacher, images)

    result = purify(settings)

    rows = read_curve(tmp_path / "run" / "curve.jsonl")
    assert [(row["role"], row["epoch"]) for row in rows] == [
        ("teacher", 0),
        ("purified", 2),
        ("purified", 4),
    ]
    measured = evaluate_encoders(
        {"purified": _Loaded(result.purified)}, settings.evaluation, seed=settings.seed
    )
    (entry,) = measured["encoders"]["purified"]["downstream"]
    assert rows[-1]["clean_accuracy"] == entry["clean_accuracy"]["value"]
    assert rows[-1]["attack_success_rate"] == entry["attacks"][0]["attack_success_rate"]["value"]
    assert read_attack(tmp_path / "attack").targets.keys() == {"toy"}


class _Loaded:
    sha256 = ""

    def __init__(self, encoder):
        self.encoder = encoder


def test_epoch_that_comes_again_replaces_its_row_and_training_is_not_touched(
    tmp_path, teacher, images
):
    whole = purify(settings_of(tmp_path, teacher, images))
    curve = (tmp_path / "run" / "curve.jsonl").read_text()
    state = whole.purified.state_dict()
    plain = settings_of(tmp_path, teacher, images, out=tmp_path / "plain")
    plain = plain.model_copy(update={"evaluation": EvaluationSettings()})

    again = purify(settings_of(tmp_path, teacher, images, resume="auto"))
    without = purify(plain)

    assert (tmp_path / "run" / "curve.jsonl").read_text() == curve
    for name, value in without.purified.state_dict().items():
        assert value.equal(state[name]), name
        assert value.equal(again.purified.state_dict()[name]), name


def test_report_has_the_figures_and_the_curve(tmp_path, teacher, images):
    settings = settings_of(tmp_path, teacher, images)

    content = write_evidence(purify(settings), settings)

    assert [figure["name"] for figure in content["figures"]] == [
        "attention",
        "features",
        "clean_set",
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    for figure in content["figures"]:
        assert figure["caption"].split(",")[0] in page
        assert (tmp_path / "run" / "figures" / f"{figure['name']}.svg").is_file()
    assert "The student while it was trained" in page


def test_damaged_line_of_a_curve_is_left_out(tmp_path):
    row = {"role": "purified", "epoch": 1, "clean_accuracy": 0.5, "attack_success_rate": None}
    path = tmp_path / "curve.jsonl"
    path.write_text(json.dumps(row) + '\n{"role": "purified"}\n{"ro')

    assert read_curve(path) == [row]
    assert read_curve(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("evaluation", "run", "said"),
    [
        ({"downstream": ()}, {}, "needs a labeled set"),
        ({}, {"engine": "zero3"}, "whole on one process"),
    ],
)
def test_curve_that_cannot_be_measured_is_refused(tmp_path, teacher, images, evaluation, run, said):
    settings = settings_of(tmp_path, teacher, images, **run)
    changed = settings.evaluation.model_copy(update=evaluation)

    with pytest.raises(UsageError, match=said):
        purify(settings.model_copy(update={"evaluation": changed}))

    assert not (tmp_path / "run").exists()
