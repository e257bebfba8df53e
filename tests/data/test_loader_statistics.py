"""Views by DALI and by torch: the same images, the same drawn parameters, the same statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.clean_set import clean_images
from mimic_fast.data.loader import Loader, TrainingImages
from mimic_fast.data.sources import open_source
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.build import build_encoder
from mimic_fast.evaluation.probes import fit_linear_probe

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]},
    stem="small_stride2",
    image_size=32,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)
STILL: dict[str, Any] = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter_probability": 0.0,
    "grayscale": 0.0,
}
ONE_CHANGE: dict[str, dict[str, Any]] = {
    "crop": {"crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 4 / 3)},
    "flip": {"flip": 0.5},
    "brightness": {"jitter_probability": 1.0, "jitter": (0.8, 0, 0, 0)},
    "contrast": {"jitter_probability": 1.0, "jitter": (0, 0.8, 0, 0)},
    "saturation": {"jitter_probability": 1.0, "jitter": (0, 0, 0.8, 0)},
    "hue": {"jitter_probability": 1.0, "jitter": (0, 0, 0, 0.5)},
    "grayscale": {"grayscale": 0.5},
}
WAYS = {"torch": {"backend": "torch"}, "dali": {"backend": "dali"}}


def first_views(shards: str, count: int, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Every image's first view in one pass, and the ids, in the order of the pass."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    settings = Settings.model_validate(
        {
            "data": {"source": shards, "clean_count": count, "allow_budget": True, **data},
            "optim": {"batch_size": 500},
            "loss": {"harden": {"probability": 0.0}},
        }
    )
    found = clean_images(settings.data, SPEC, seed=0)
    images = TrainingImages(squares=found.squares, files=found.files)
    loader = Loader(images, settings=settings, image_size=32, processes=SINGLE)
    with loader.batches(0, count // 500) as batches:
        made = [(batch.v1, batch.ids) for batch in batches]
    views, ids = (torch.cat(part) for part in zip(*made, strict=True))
    return views, ids


def agree(shards: str, count: int, change: dict[str, Any]) -> None:
    views = {
        name: first_views(shards, count, {**STILL, **change, **way})[0]
        for name, way in WAYS.items()
    }
    mean, std = (
        {name: getattr(view, what)(dim=(0, 2, 3)) for name, view in views.items()}
        for what in ("mean", "std")
    )
    torch.testing.assert_close(mean["dali"], mean["torch"], rtol=0.01, atol=0)
    torch.testing.assert_close(std["dali"], std["torch"], rtol=0.01, atol=0)


@pytest.mark.parametrize("name", list(ONE_CHANGE))
def test_every_augmentation_has_the_same_mean_and_deviation(shared_data, name):
    agree(str(shared_data / "cifar10" / "train-00000.tar"), 1000, ONE_CHANGE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ONE_CHANGE))
def test_every_augmentation_has_the_same_statistics_over_10000_images(shared_data, name):
    agree(str(shared_data / "cifar10" / "train-*.tar"), 10_000, ONE_CHANGE[name])


@pytest.mark.slow
def test_probe_trained_through_either_is_as_good(shared_data):
    folder = shared_data / "cifar10"
    train = str(folder / "train-*.tar")
    test = clean_images(
        Settings.model_validate(
            {
                "data": {
                    "source": str(folder / "test-*.tar"),
                    "clean_count": 4000,
                    "allow_budget": True,
                }
            }
        ).data,
        SPEC,
        seed=0,
    )
    wanted = torch.tensor([item.label for item in test.clean_set.items])
    encoder = build_encoder(SPEC, seed=0).eval()  # random features of colors and edges

    def features(views: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder(part) for part in views.split(500)])

    seen = features(plain_view(test.squares, image_size=32))
    labels_of = dict(enumerate(open_source(train).labels or ()))
    accuracy: dict[str, float] = {}
    for name, way in WAYS.items():
        views, ids = first_views(train, 10_000, {"crop_scale": (0.5, 1.0), **way})
        items = clean_images(
            Settings.model_validate(
                {"data": {"source": train, "clean_count": 10_000, "allow_budget": True}}
            ).data,
            SPEC,
            seed=0,
        ).clean_set.items
        labels = torch.tensor([labels_of[items[i].index] for i in ids.tolist()])
        probe = fit_linear_probe(features(views), labels, num_classes=10, l2=1e-3)
        accuracy[name] = (probe.predict(seen) == wanted).double().mean().item()

    assert accuracy["torch"] > 0.2  # twice chance: the probe learned something
    assert abs(accuracy["torch"] - accuracy["dali"]) <= 0.005, accuracy
