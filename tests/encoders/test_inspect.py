import json

import pytest
import torch

from mimic_fast.config import EncoderSettings
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.inspect import inspect_checkpoint
from mimic_fast.errors import UnsafeInputError, UsageError


def test_exported_encoder_is_described(tmp_path, trained, resnet_spec):
    encoder = trained(resnet_spec)
    path = export_encoder(encoder, tmp_path, key_map=None, card={"seed": 1})

    facts = inspect_checkpoint(path)

    assert json.loads(json.dumps(facts)) == facts
    assert facts["format"] == "safetensors"
    assert facts["bytes"] == path.stat().st_size
    assert facts["card"]["seed"] == 1
    assert facts["architecture"] == "timm:resnet18"
    assert facts["spec"]["stem"] == "small_stride2"
    assert facts["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert facts["feature_dim"] == 64
    assert facts["taps"] == [
        {"tap": "layer1", "channels": 8, "grid": [16, 16], "attention": True},
        {"tap": "layer2", "channels": 16, "grid": [8, 8], "attention": True},
        {"tap": "layer3", "channels": 32, "grid": [4, 4], "attention": True},
        {"tap": "layer4", "channels": 64, "grid": [2, 2], "attention": True},
    ]
    assert (facts["unused"], facts["assumed"]) == ([], [])
    assert sum(facts["dtypes"].values()) == len(facts["tensors"])
    assert {"key": "conv1.weight", "shape": [64, 3, 3, 3], "dtype": "float32"} in facts["tensors"]
    assert "problem" not in facts


def test_given_taps_are_described(tmp_path, trained, vit_spec):
    path = export_encoder(trained(vit_spec), tmp_path, key_map=None, card={})
    facts = inspect_checkpoint(path, EncoderSettings(taps=("blocks.1", "fc_norm")))
    assert [(tap["tap"], tap["grid"]) for tap in facts["taps"]] == [
        ("blocks.1", [8, 8]),
        ("fc_norm", [1, 1]),
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (EncoderSettings(), "encoder.architecture"),
        (EncoderSettings(architecture="timm:resnet18"), "lacks"),
    ],
)
def test_unknown_architecture_leaves_the_tensors_and_says_what_to_give(tmp_path, settings, problem):
    path = tmp_path / "x.pt"
    torch.save({"odd.weight": torch.zeros(2, 3)}, path)

    facts = inspect_checkpoint(path, settings)

    assert facts["tensors"] == [{"key": "odd.weight", "shape": [2, 3], "dtype": "float32"}]
    assert problem in facts["problem"]
    assert "architecture" not in facts


def test_unsafe_and_missing_files_are_errors(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UnsafeInputError):
        inspect_checkpoint(tmp_path / "x.pt")
    with pytest.raises(UsageError):
        inspect_checkpoint(tmp_path / "y.pt")
