"""encode(): batches, modes, triggers, and encoders that answer nonsense."""

import pytest
import torch
from torch import nn

from mimic_fast.config import RunSettings
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.features import encode, place
from mimic_fast.evaluation.triggers import apply_trigger, white_patch


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
    )


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_features_do_not_depend_on_the_batch_size(encoder, images, batch_size):
    features = encode(encoder, images, batch_size=batch_size)

    encoder.eval()
    torch.testing.assert_close(features, encoder(images.float() / 255).detach())
    assert not features.requires_grad


def test_bytes_and_floats_give_the_same_features(encoder, images):
    assert torch.equal(encode(encoder, images), encode(encoder, images.float() / 255))


def test_trigger_is_stamped_on_every_image_and_resized_to_fit(encoder, images):
    features = encode(encoder, images, trigger=white_patch(image_size=32, channels=1))

    stamped = apply_trigger(images.float() / 255, white_patch(image_size=8, channels=3))
    assert torch.equal(features, encode(encoder, stamped))
    assert not torch.equal(features, encode(encoder, images))


def test_modes_and_statistics_are_left_as_they_were(encoder, images):
    encoder.train()
    encoder[1].eval()
    statistics = encoder[1].running_mean.clone(), encoder[1].num_batches_tracked.clone()

    encode(encoder, images)

    assert [module.training for module in encoder] == [True, False, True, True, True]
    assert torch.equal(encoder[1].running_mean, statistics[0])
    assert torch.equal(encoder[1].num_batches_tracked, statistics[1])


def test_modes_are_restored_after_an_error(encoder, images):
    encoder.train()

    with pytest.raises(RuntimeError):
        encode(encoder, images[:, :1])
    assert encoder.training


def test_double_precision_encoder_gets_double_images(encoder, images):
    features = encode(encoder.double(), images)

    assert features.dtype == torch.float32


def test_progress_counts_images(encoder, images):
    events = []

    encode(encoder, images, batch_size=4, report=events.append)

    assert [(event.done, event.total, event.unit) for event in events] == [
        (4, 11, "images"),
        (8, 11, "images"),
        (11, 11, "images"),
    ]


def test_features_that_are_not_finite_are_refused(encoder, images):
    with torch.no_grad():
        encoder[0].weight[0] = torch.nan

    with pytest.raises(UnsafeInputError, match="not finite"):
        encode(encoder, images)


def test_no_images_is_a_usage_error(encoder, images):
    with pytest.raises(UsageError, match="no images"):
        encode(encoder, images[:0])


def test_placing_orders_weights_for_speed_and_changes_no_feature(encoder, images):
    before = encode(encoder, images)

    place([encoder], RunSettings(device="cpu"))

    kernels = [weight for weight in encoder.parameters() if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    torch.testing.assert_close(encode(encoder, images), before, rtol=1e-5, atol=1e-5)
