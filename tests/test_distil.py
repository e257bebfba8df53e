"""A whole purification of a small ResNet from files to files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.distil import purify
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.progress import Event
from mimic_fast.recipe import load_settings

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
TAPS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """90 pictures of blobs."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for number in range(90):
        coarse = torch.rand(3, 3, 3, generator=generator).mul(255).to(torch.uint8).numpy()
        picture = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR)
        picture.save(root / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher under the key names of a training that was wrapped."""
    encoder = build_encoder(SPEC, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(20):
            encoder(torch.rand(16, 3, 16, 16, generator=generator))
    names = {key: f"module.{key}" for key in encoder.backbone.state_dict()}
    return export_encoder(
        encoder.eval(), tmp_path_factory.mktemp("teacher"), key_map=names, card={}
    )


@pytest.fixture
def small(images: Path, teacher: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a run of seconds; more of them as for ``load_settings``."""

    def settings(*overrides: str, **options: Any) -> Settings:
        return load_settings(
            overrides=(
                *("data.clean_fraction=1.0", "data.allow_budget=true", "run.device=cpu"),
                *("optim.epochs=2", "optim.batch_size=20", *overrides),
            ),
            values={
                "encoder": {"teacher": str(teacher)},
                "data": {"source": str(images)},
                "run": {"out": str(tmp_path / "run")},
            },
            **options,
        )

    return settings


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_purified_encoder_takes_the_teachers_place(small, teacher):
    result = purify(small())

    assert result.encoder == result.out / "encoder.safetensors"
    suspect, purified = load_file(teacher), load_file(result.encoder)
    assert {key: value.shape for key, value in purified.items()} == {
        key: value.shape for key, value in suspect.items()
    }
    assert all(key.startswith("module.") for key in purified)
    loaded = load_encoder(result.encoder)
    torch.testing.assert_close(
        loaded.encoder.state_dict(), result.purified.state_dict(), rtol=0, atol=0
    )
    assert loaded.encoder.spec == result.teacher.encoder.spec
    assert not result.purified.training


def test_run_directory_tells_the_whole_story(small):
    settings = small()

    result = purify(settings)

    out = result.out
    assert json.loads((out / "config.json").read_text()) == settings.model_dump(mode="json")
    assert json.loads((out / "clean_set.json").read_text())["sha256"] == result.clean_set.sha256
    located = json.loads((out / "mutual_information.json").read_text())
    assert [layer["tap"] for layer in located["layers"]] == TAPS
    assert [row["step"] for row in rows(out)] == list(range(1, result.trained.steps + 1))
    card = json.loads((out / "encoder.json").read_text())
    assert card["kind"] == "purified"
    assert card["teacher"]["sha256"] == result.teacher.sha256
    assert card["clean_set"] == {
        "sha256": result.clean_set.sha256,
        "size": 90,
        "fraction": 1.0,
    }
    assert card["layer_weights"] == {
        layer["tap"]: pytest.approx(layer["weight"]) for layer in located["layers"]
    }
    assert card["steps"] == result.trained.steps == 9


def test_held_out_images_are_never_trained_on(small):
    """81 of the 90 images train: two passes are nine batches of 20."""
    result = purify(small())

    assert result.clean_set.hold_out == 9
    assert len(result.pool) == 90
    assert result.trained.steps == 9


def test_imitation_improves(small):
    result = purify(small("optim.epochs=20"))

    clone = [row["clone"] for row in rows(result.out)]
    assert sum(clone[-4:]) / 4 < sum(clone[:4]) / 4 - 0.05


def test_last_stage_of_one_position_gets_no_attention_loss(small):
    events: list[Event] = []

    result = purify(small("optim.epochs=1"), report=events.append)

    # 16 pixels: stride 2 in the stem and in three stages leave one position.
    said = [event.message for event in events if "1x1" in event.message]
    assert said == ["no attention loss on 1x1 maps: layer4"]
    assert result.mutual_information.layers[-1].weight > 0


def test_official_preset_is_the_authors_demo(small):
    settings = small("mi.dv_epochs=3", "optim.epochs=2", preset="official")

    result = purify(settings)

    found = result.mutual_information
    assert (found.estimator, found.source, found.bins) == ("dv", "student", None)
    values = torch.tensor([layer.value for layer in found.layers], dtype=torch.float64)
    assert values.sum() > 0
    expected = 1000 + 10000 * values / values.sum()
    weights = torch.tensor([layer.weight for layer in found.layers], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert result.clean_set.hold_out == 0
    logged = rows(result.out)
    assert all(row["lr"] == 1e-3 for row in logged)
    for row in logged:
        assert row["contrastive"] > 0
        terms = row["clone"] + row["attention"] + row["contrastive"]
        assert row["loss"] == pytest.approx(terms, rel=1e-6)


def test_attention_weight_of_zero_leaves_the_clone_loss(small):
    result = purify(small("loss.attention_weight=0", "optim.epochs=1"))

    for row in rows(result.out):
        assert row["attention"] == 0
        assert row["loss"] == pytest.approx(row["clone"])


def test_same_seed_gives_the_same_encoder(small, tmp_path):
    one = purify(small("optim.epochs=1"))
    two = purify(small("optim.epochs=1", f"run.out={tmp_path / 'two'}"))
    other = purify(small("optim.epochs=1", f"run.out={tmp_path / 'other'}", "seed=1"))

    assert one.encoder.read_bytes() == two.encoder.read_bytes()
    assert one.encoder.read_bytes() != other.encoder.read_bytes()


def test_finished_run_is_not_overwritten(small):
    result = purify(small("optim.epochs=1"))
    before = result.encoder.read_bytes()

    with pytest.raises(UsageError, match="already holds a run; use --resume auto"):
        purify(small("optim.epochs=1", "seed=1"))

    assert result.encoder.read_bytes() == before


def test_state_of_other_settings_is_not_continued(small):
    polls: list[None] = []

    def stop() -> bool:
        polls.append(None)
        return len(polls) > 9  # after step A and the teacher's one pass

    with pytest.raises(StoppedError):
        purify(small("mi.chunk=90"), stop=stop)

    with pytest.raises(UsageError, match="other settings, teacher or images"):
        purify(small("mi.chunk=90", "optim.lr=0.1", "run.resume=auto"))
    resumed = purify(small("mi.chunk=90", "run.resume=auto"))
    assert resumed.trained.steps == 9


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("encoder", "teacher", "no teacher given"),
        ("data", "source", "no clean images given"),
        ("run", "out", "no run directory given"),
    ],
)
def test_what_is_missing_is_named(small, section, key, message):
    settings = small()
    part = getattr(settings, section).model_copy(update={key: None})

    with pytest.raises(UsageError, match=message):
        purify(settings.model_copy(update={section: part}))


def test_a_trusted_start_is_on_record_and_decides_what_a_state_belongs_to(small, tmp_path):
    own = export_encoder(build_encoder(SPEC, seed=9), tmp_path / "own", key_map=None, card={})
    trusted = ("student.init=trusted", f"student.checkpoint={own}", "run.max_steps=1")

    result = purify(small(*trusted))

    card = json.loads(result.encoder.with_suffix(".json").read_bytes())
    assert card["student"] == {"init": "trusted", "sha256": load_encoder(own).sha256}
    # One step from there, not from random weights.
    before, after = load_file(own), load_file(result.encoder)
    moved = (before["layer4.0.conv1.weight"] - after["module.layer4.0.conv1.weight"]).abs().max()
    assert 0 < moved < 0.01
    with pytest.raises(UsageError, match="belongs to other settings"):
        purify(small("run.resume=auto", "run.max_steps=1"))
