"""A vision transformer through the whole program: trained, attacked, purified, measured."""

import json
import math

from mimic_fast.attacks.badencoder import BadEncoderSettings, badencoder
from mimic_fast.distil import purify
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.evidence import write_evidence
from mimic_fast.pretraining import PretrainSettings, pretrain
from mimic_fast.recipe import load_settings

SPEC = {
    "architecture": "timm:vit_tiny_patch16_224",
    "arguments": {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "image_size": 32,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
TAPS = ["blocks.0", "blocks.1", "blocks.2"]


def is_measure(value: dict) -> bool:
    """``{"value", "low", "high", "n"}``, fractions with their interval."""
    return (
        set(value) == {"value", "low", "high", "n"}
        and all(math.isfinite(value[key]) for key in value)
        and value["low"] <= value["value"] <= value["high"]
        and value["n"] > 0
    )


def test_vit_goes_through_the_whole_program(images, tmp_path):
    source, run = str(images / "train"), {"device": "cpu"}
    optim = {"epochs": 1, "batch_size": 25, "warmup_epochs": 0, "lr": 1e-3}
    clean = pretrain(
        PretrainSettings.model_validate(
            {
                "spec": SPEC,
                "data": {"source": source},
                "optim": optim,
                "run": {**run, "out": tmp_path / "clean"},
            }
        )
    )
    attacked = badencoder(
        BadEncoderSettings.model_validate(
            {
                "encoder": {"teacher": clean.path},
                "data": {"source": source},
                "reference": "class:1",
                "optim": {**optim, "name": "sgd"},
                "run": {**run, "out": tmp_path / "attacked"},
            }
        )
    )
    settings = load_settings(
        overrides=("data.clean_fraction=1.0", "data.allow_budget=true", "data.hold_out=0.2"),
        values={
            "encoder": {"teacher": str(attacked.encoder)},
            "data": {"source": source},
            "optim": {**optim, "batch_size": 30, "epochs": 2},
            "run": {**run, "out": str(tmp_path / "run")},
            "evaluation": {
                "downstream": [
                    {"name": "colors", "train": source, "test": str(images / "test")},
                ],
                "attack": str(attacked.attack),
                "clean": str(clean.path),
                "probe": ["linear", "knn"],
            },
        },
    )

    result = purify(settings)
    write_evidence(result, settings)

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["schema"] == 1
    assert list(report["encoders"]) == ["teacher", "purified", "clean"]
    for encoder in report["encoders"].values():
        assert len(encoder["sha256"]) == 64
        assert [part["probe"] for part in encoder["downstream"]] == ["linear", "knn"]
        for part in encoder["downstream"]:
            assert part["dataset"] == "colors"
            assert is_measure(part["clean_accuracy"])
            (attack,) = part["attacks"]
            assert attack["target"] in (0, 1)
            for name in ("attack_success_rate", "attack_success_rate_all", "robust_accuracy"):
                assert is_measure(attack[name]), name
    assert set(report["agreement"]) == {"cosine", "knn_overlap_10", "linear_cka"}
    assert all(is_measure(value) for value in report["agreement"].values())
    assert report["clean_set"]["size"] == 100
    assert report["clean_set"]["fraction"] == 1.0
    assert report["clean_set"]["sha256"] == result.clean_set.sha256
    for name in ("seconds", "images_per_second", "peak_memory_bytes"):
        assert report["cost"][name] > 0
    layers = report["mutual_information"]["layers"]
    assert [layer["tap"] for layer in layers] == TAPS
    assert all(math.isfinite(layer["weight"]) and layer["weight"] > 0 for layer in layers)
    assert result.trained.steps == 6
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000

    # The purified encoder takes the teacher's place: same architecture, other weights.
    teacher, purified = load_encoder(attacked.encoder), load_encoder(result.encoder)
    assert purified.encoder.spec == teacher.encoder.spec
    assert purified.key_map == teacher.key_map
    assert purified.sha256 == report["encoders"]["purified"]["sha256"] != teacher.sha256
