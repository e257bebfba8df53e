"""A resume that is refused, in purify or pretrain, leaves the run that is there as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.distil import purify
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.pretraining import PretrainSettings, pretrain
from mimic_fast.progress import Event
from mimic_fast.recipe import load_settings

SPEC: dict[str, Any] = {
    "architecture": "timm:resnet18",
    "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    "stem": "small_stride2",
    "image_size": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for number in range(80):
        coarse = torch.rand(3, 3, 3, generator=generator).mul(255).to(torch.uint8).numpy()
        picture = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR)
        picture.save(root / f"{number:02d}.png")
    return root


@pytest.fixture
def purification(images, tmp_path):
    teacher = export_encoder(
        build_encoder(EncoderSpec(**SPEC), seed=7).eval(), tmp_path, key_map=None, card={}
    )

    def settings(*overrides: str) -> Settings:
        fixed = ("data.clean_fraction=1.0", "data.allow_budget=true", "run.device=cpu")
        run = ("run.checkpoint_every=1", "optim.epochs=2", "optim.batch_size=20")
        return load_settings(
            overrides=(*fixed, *run, *overrides),
            values={
                "encoder": {"teacher": str(teacher)},
                "data": {"source": str(images)},
                "run": {"out": str(tmp_path / "run")},
            },
        )

    return settings


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def stop_after(steps: int):
    """``stop`` and ``report`` of a run that is told to stop once so many steps are done."""
    done: list[int] = []

    def report(event: Event) -> None:
        if event.unit == "steps":
            done.append(event.done)

    return {"stop": lambda: len(done) >= steps, "report": report}


@pytest.mark.parametrize("change", ["optim.lr=0.5", "seed=3", "data.hold_out=0.2"])
def test_purification_with_other_settings_changes_no_file(purification, tmp_path, change):
    with pytest.raises(StoppedError):
        purify(purification(), **stop_after(2))
    before = contents(tmp_path / "run")

    with pytest.raises(UsageError, match=r"belongs to other settings.*config\.json"):
        purify(purification(change, "run.resume='auto'"))

    assert contents(tmp_path / "run") == before


def test_teacher_read_with_another_specification_is_another_run(purification, tmp_path):
    with pytest.raises(StoppedError):
        purify(purification(), **stop_after(2))
    card = tmp_path / "encoder.json"
    card.write_text(card.read_text().replace("0.25", "0.2"))

    with pytest.raises(UsageError, match="belongs to other settings"):
        purify(purification("run.resume='auto'"))


def test_batch_that_no_image_is_left_for_is_refused_before_anything_is_written(
    purification, tmp_path
):
    events: list[Event] = []

    with pytest.raises(UsageError, match="exceeds the 72 training images"):
        purify(purification("optim.batch_size=75"), report=events.append)

    assert not any(event.phase == "locate" for event in events)
    assert contents(tmp_path / "run") == {}


def pretraining(images: Path, out: Path, spec: dict[str, Any], **run: Any) -> PretrainSettings:
    return PretrainSettings.model_validate(
        {
            "spec": SPEC | spec,
            "data": {"source": str(images)},
            "optim": {"epochs": 2, "batch_size": 16, "warmup_epochs": 0},
            "run": {"out": out, "device": "cpu", **run},
        }
    )


@pytest.mark.parametrize(
    ("spec", "run"),
    [({"std": (0.2, 0.2, 0.2)}, {}), ({"stem": "small_stride1"}, {}), ({}, {"max_steps": 5})],
)
def test_pretraining_of_another_encoder_or_length_is_refused(images, tmp_path, spec, run):
    with pytest.raises(StoppedError):
        pretrain(pretraining(images, tmp_path, {}), **stop_after(2))

    with pytest.raises(UsageError, match="belongs to other settings"):
        pretrain(pretraining(images, tmp_path, spec, resume="auto", **run))


def test_pretraining_of_other_pictures_under_the_same_names_is_refused(images, tmp_path):
    with pytest.raises(StoppedError):
        pretrain(pretraining(images, tmp_path, {}), **stop_after(2))
    picture = (images / "00.png").read_bytes()
    try:
        (images / "00.png").write_bytes((images / "01.png").read_bytes())
        with pytest.raises(UsageError, match="belongs to other settings"):
            pretrain(pretraining(images, tmp_path, {}, resume="auto"))
    finally:
        (images / "00.png").write_bytes(picture)


def test_pretraining_does_not_mix_with_the_run_that_is_there(images, tmp_path):
    pretrain(pretraining(images, tmp_path, {}, max_steps=1))
    before = contents(tmp_path)

    with pytest.raises(UsageError, match="already holds a run"):
        pretrain(pretraining(images, tmp_path, {}))

    assert contents(tmp_path) == before
