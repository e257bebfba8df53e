"""SimCLR pre-training of a small encoder from a folder of images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.pretraining import PretrainSettings, pretrain
from mimic_fast.progress import Event

SPEC: dict[str, Any] = {
    "architecture": "timm:resnet18",
    "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    "stem": "small_stride2",
    "image_size": 16,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.25, 0.25, 0.25),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """32 pictures of two blobs each."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for number in range(32):
        coarse = torch.rand(2, 2, 3, generator=generator).mul(255).to(torch.uint8).numpy()
        picture = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR)
        picture.save(tmp_path / "images" / f"{number:02d}.png")
    return tmp_path / "images"


def settings(images: Path | None, out: Path | None, **sections: Any) -> PretrainSettings:
    optim = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0, **sections.pop("optim", {})}
    return PretrainSettings.model_validate(
        {
            "spec": SPEC,
            "data": {
                "source": None if images is None else str(images),
                **sections.pop("data", {}),
            },
            "optim": optim,
            "run": {"out": out, "device": "cpu", **sections.pop("run", {})},
            **sections,
        }
    )


def test_encoder_is_written_as_it_was_trained(images, tmp_path):
    result = pretrain(settings(images, tmp_path / "run", seed=3))

    loaded = load_encoder(result.path)
    torch.testing.assert_close(
        loaded.encoder.state_dict(), result.encoder.state_dict(), rtol=0, atol=0
    )
    assert loaded.encoder.spec.model_dump() == result.encoder.spec.model_dump()
    assert not result.encoder.training
    assert result.trained.steps == 4
    card = json.loads((tmp_path / "run" / "encoder.json").read_text())
    assert card["kind"] == "pretrained"
    assert card["settings"]["seed"] == 3


def test_only_the_contrastive_loss_is_minimized_and_it_falls(images, tmp_path):
    mild = {"crop_scale": (0.6, 1.0), "jitter_probability": 0, "grayscale": 0}
    run = settings(images, tmp_path / "run", data=mild, optim={"epochs": 20})

    pretrain(run)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["clone"] == row["attention"] == 0 for row in rows)
    assert all(row["loss"] == pytest.approx(row["contrastive"]) for row in rows)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.3


def test_half_precision_is_of_the_file_alone(images, tmp_path):
    result = pretrain(settings(images, tmp_path / "run", dtype="fp16"))

    stored = load_file(result.path)
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {
        torch.float16
    }
    weight = result.encoder.backbone.get_parameter("conv1.weight")
    assert weight.dtype == torch.float32
    torch.testing.assert_close(stored["conv1.weight"], weight.detach().half())


def test_same_seed_gives_the_same_file_and_another_does_not(images, tmp_path):
    one, two, other = (
        pretrain(settings(images, tmp_path / name, seed=seed)).path.read_bytes()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )

    assert one == two
    assert one != other


def test_stopped_pretraining_goes_on_to_the_same_weights(images, tmp_path):
    straight = pretrain(settings(images, tmp_path / "straight"))
    polls: list[None] = []

    def stop() -> bool:
        polls.append(None)
        return len(polls) == 3

    with pytest.raises(StoppedError, match="after step 3"):
        pretrain(settings(images, tmp_path / "run"), stop=stop)
    events: list[Event] = []
    resumed = pretrain(
        settings(images, tmp_path / "run", run={"resume": "auto"}), report=events.append
    )

    assert [event.done for event in events if event.phase == "pretrain"] == [4]
    assert resumed.path.read_bytes() == straight.path.read_bytes()


@pytest.mark.parametrize("missing", ["source", "out"])
def test_what_is_missing_is_named(images, tmp_path, missing):
    run = settings(
        None if missing == "source" else images, None if missing == "out" else tmp_path / "run"
    )

    with pytest.raises(UsageError, match=r"data\.source .*run\.out"):
        pretrain(run)


def test_pretraining_without_a_loss_is_refused(images, tmp_path):
    run = settings(images, tmp_path / "run", loss={"clone": 1, "contrastive": 0})

    with pytest.raises(UsageError, match=r"loss\.contrastive must be above 0"):
        pretrain(run)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"data": {"clean_count": 4}}, r"ignores data\.clean_count"),
        ({"data": {"hold_out": 0.5, "budget": 0.1}}, r"ignores data\.budget, data\.hold_out"),
        (
            {"loss": {"clone": 1, "attention_weight": 0, "contrastive": 1}},
            r"ignores loss\.clone and loss\.attention_weight",
        ),
    ],
)
def test_settings_that_pretraining_ignores_are_named(images, tmp_path, sections, named):
    with pytest.warns(UserWarning, match=named):
        pretrain(settings(images, tmp_path / "run", **sections))
