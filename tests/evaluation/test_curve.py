"""The curve cuts labeled images, but never below one for each class."""

import shutil

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.evaluation import curve as curves
from mimic_fast.evaluation.curve import Curve, read_curve


def test_sets_of_many_classes_can_be_followed(tmp_path, write_images, encoders, monkeypatch):
    monkeypatch.setattr(curves, "_LABELS", 1000)
    one = write_images(tmp_path / "one", per_class=1, seed=0, classes=("red",)) / "red"
    for number in range(1001):
        shutil.copytree(one, tmp_path / "many" / f"{number:04d}")
    many = DownstreamSettings(
        name="many", train=str(tmp_path / "many"), test=str(tmp_path / "many")
    )
    settings = EvaluationSettings(downstream=(many,), curve_every=1, test_images=2)

    curve = Curve(tmp_path / "curve.jsonl", settings, teacher=encoders["teacher"], seed=0)
    curve.measure(1, encoders["purified"].encoder, stop=lambda: True)  # sets first, then images

    assert read_curve(tmp_path / "curve.jsonl") == []
