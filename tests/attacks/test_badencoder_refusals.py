"""What BadEncoder does not read is refused or named; any image file can be the reference."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mimic_fast.attacks.badencoder import BadEncoderSettings, badencoder
from mimic_fast.attacks.settings import name_ignored
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.errors import DivergedError, UnsafeInputError, UsageError
from mimic_fast.evaluation.attack_file import read_attack

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


@pytest.fixture
def settings(tmp_path):
    clean = export_encoder(build_encoder(SPEC, seed=3).eval(), tmp_path, key_map=None, card={})
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for number in range(16):
        pixels = torch.rand(16, 16, 3, generator=generator).mul(255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
    optim = {"name": "sgd", "epochs": 1, "batch_size": 8, "warmup_epochs": 0}

    def make(**changes: Any) -> BadEncoderSettings:
        return BadEncoderSettings.model_validate(
            {
                "encoder": {"teacher": clean},
                "data": {"source": str(tmp_path / "images"), **changes.pop("data", {})},
                "reference": str(tmp_path / "images" / "03.png"),
                "optim": {**optim, **changes.pop("optim", {})},
                "run": {"out": tmp_path / "out", **changes.pop("run", {})},
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("name", ["reference.data", ".hidden.png"])
def test_reference_may_have_any_name_and_lie_beside_shards(settings, tmp_path, name):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(tmp_path / "images" / "05.png", folder / name)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(tmp_path / "images" / "01.png", "01.png")

    result = badencoder(settings(reference=str(folder / name)))

    expected = torch.frombuffer(
        bytearray(Image.open(tmp_path / "images" / "05.png").tobytes()), dtype=torch.uint8
    )
    reference = read_attack(result.attack).reference
    assert reference is not None
    torch.testing.assert_close(reference, expected.view(16, 16, 3).permute(2, 0, 1))


def test_reference_that_is_no_image_is_refused(settings, tmp_path):
    (tmp_path / "note.txt").write_text("no image")

    with pytest.raises(UnsafeInputError, match="can be decoded"):
        badencoder(settings(reference=str(tmp_path / "note.txt")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_is_refused(settings):
    with pytest.raises(UsageError, match="no CUDA device is visible"):
        badencoder(settings(run={"device": "cuda"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"clean_count": 4}}, r"data\.clean_count"),
        ({"optim": {"ema": 0.9, "precision": "bf16"}}, r"optim\.precision, optim\.ema"),
        ({"run": {"resume": "auto"}}, r"run\.resume"),
    ],
)
def test_ignored_settings_are_named(settings, changes, named):
    with pytest.warns(UserWarning, match=f"badencoder ignores {named}"):
        badencoder(settings(**changes))


def test_divergence_is_no_encoder(settings, tmp_path: Path):
    with pytest.raises(DivergedError, match=r"at step \d+; lower optim\.lr"):
        badencoder(settings(optim={"lr": 1e30, "clip_norm": 0, "epochs": 20}))

    assert not (tmp_path / "out" / "encoder.safetensors").exists()


@pytest.mark.parametrize("name", ["encoder.safetensors", "attack.json", "target_2"])
def test_a_folder_with_an_encoder_or_an_attack_is_not_written_to(settings, tmp_path, name):
    held = tmp_path / "used" / name
    held.parent.mkdir()
    held.write_bytes(b"kept")

    with pytest.raises(UsageError, match=f"already holds {name}"):
        badencoder(settings(run={"out": held.parent}))

    assert held.read_bytes() == b"kept"
    assert sorted(held.parent.iterdir()) == [held]


def test_the_clean_encoder_is_not_replaced_by_the_attacked_one(settings):
    clean = settings().encoder.teacher
    before = clean.read_bytes()

    with pytest.raises(UsageError, match="use another --out"):
        badencoder(settings(run={"out": clean.parent}))

    assert clean.read_bytes() == before


def test_settings_of_loaders_and_taps_are_named_as_ignored(settings):
    changed = settings(data={"workers": 7}, run={"out": None})

    with (
        pytest.warns(UserWarning, match=r"badencoder ignores data\.workers"),
        pytest.warns(UserWarning, match=r"badencoder ignores encoder\.taps"),
    ):
        name_ignored(
            changed.model_copy(
                update={"encoder": changed.encoder.model_copy(update={"taps": ("layer1",)})}
            ),
            kind="badencoder",
        )
