"""What a student begins with: random weights, a clean checkpoint, never the suspect."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mimic_fast.config import EncoderSpec, StudentSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder
from mimic_fast.errors import UsageError
from mimic_fast.first_weights import first_weights

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


def written(folder: Path, *, seed: int, spec: EncoderSpec = SPEC) -> Path:
    return export_encoder(build_encoder(spec, seed=seed).eval(), folder, key_map=None, card={})


@pytest.fixture
def teacher(tmp_path: Path) -> LoadedEncoder:
    return load_encoder(written(tmp_path / "suspect", seed=1))


def trusted(path: Path) -> StudentSettings:
    return StudentSettings(init="trusted", checkpoint=path)


def test_without_a_checkpoint_weights_are_random_and_the_seeds(teacher):
    first = first_weights(teacher, StudentSettings(), seed=5)

    assert first.sha256 is None
    wanted = build_encoder(SPEC, seed=5).state_dict()
    assert all(torch.equal(first.encoder.state_dict()[key], wanted[key]) for key in wanted)


def test_a_trusted_checkpoint_is_taken_and_named(teacher, tmp_path):
    path = written(tmp_path / "own", seed=2)

    first = first_weights(teacher, trusted(path), seed=5)

    assert first.sha256 == load_encoder(path).sha256
    wanted = build_encoder(SPEC, seed=2).state_dict()
    assert all(torch.equal(first.encoder.state_dict()[key], wanted[key]) for key in wanted)
    assert first.encoder.training
    assert all(parameter.requires_grad for parameter in first.encoder.parameters())


def test_a_checkpoint_in_half_precision_becomes_float32(teacher, tmp_path):
    path = written(tmp_path / "own", seed=2)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(halves, tmp_path / "half.safetensors")

    first = first_weights(teacher, trusted(tmp_path / "half.safetensors"), seed=5)

    assert {p.dtype for p in first.encoder.parameters()} == {torch.float32}


def test_the_suspect_itself_is_refused(teacher):
    with pytest.raises(UsageError, match=r"shares \d+ weights with the suspect, among them 'conv1"):
        first_weights(teacher, trusted(teacher.path), seed=0)


def test_one_weight_of_the_suspect_is_one_too_many(teacher, tmp_path):
    tensors = load_file(written(tmp_path / "own", seed=2))
    name = "layer3.0.conv2.weight"
    tensors[name] = load_file(teacher.path)[name]
    save_file(tensors, tmp_path / "mixed.safetensors")

    with pytest.raises(UsageError, match=f"shares 1 weights with the suspect, among them '{name}'"):
        first_weights(teacher, trusted(tmp_path / "mixed.safetensors"), seed=0)


def test_equal_position_embeddings_are_no_shared_weights(tmp_path):
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "img_size": 16},
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    vit = load_encoder(written(tmp_path / "suspect_vit", seed=1, spec=spec))
    tensors = load_file(written(tmp_path / "own", seed=2, spec=spec))
    tensors["pos_embed"] = load_file(vit.path)["pos_embed"]  # as the fixed sinusoids of MAE
    save_file(tensors, tmp_path / "fixed.safetensors")

    assert first_weights(vit, trusted(tmp_path / "fixed.safetensors"), seed=0).sha256 is not None


def test_another_architecture_is_refused(teacher, tmp_path):
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    other = SPEC.model_copy(update={"arguments": arguments})
    path = written(tmp_path / "other", seed=2, spec=other)

    with pytest.raises(UsageError):
        first_weights(teacher, trusted(path), seed=0)


def test_a_missing_file_is_refused(teacher, tmp_path):
    with pytest.raises(UsageError, match="gone"):
        first_weights(teacher, trusted(tmp_path / "gone.safetensors"), seed=0)


@pytest.mark.parametrize("values", [{"init": "trusted"}, {"checkpoint": Path("x.safetensors")}])
def test_init_and_checkpoint_belong_together(values):
    with pytest.raises(ValidationError, match="give both or none"):
        StudentSettings(**values)
