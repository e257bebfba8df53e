import pytest
import torch
from torch.testing import assert_close

from mimic_fast.data.augment import plain_view
from mimic_fast.distributed import SINGLE
from mimic_fast.errors import StoppedError
from mimic_fast.mutual_information.activations import StepA, flattened_maps, pooled_activations
from mimic_fast.mutual_information.finished_parts import FinishedParts
from mimic_fast.progress import silent

NOWHERE = FinishedParts(folder=None, origin={})


def step(parts=NOWHERE, report=silent, stop=lambda: False):
    return StepA(processes=SINGLE, parts=parts, report=report, stop=stop)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_vectors_are_those_of_the_encoder_in_evaluation_mode(tapped, pictures, kind):
    encoder, images = tapped(kind).train(), pictures(10, side=36)

    features, layers = pooled_activations(encoder, images, chunk=4, pool="mean", step=step())

    assert all(module.training for module in encoder.modules()), "modes must be put back"
    with torch.no_grad():
        expected, maps = encoder.eval()(plain_view(images, image_size=32))
    assert_close(features, expected, atol=1e-4, rtol=1e-4)
    for layer, feature_map in zip(layers, maps, strict=True):
        assert layer.dtype == torch.float32
        assert_close(layer, feature_map.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)


def test_buffers_gradients_and_random_state_are_left_alone(tapped, pictures):
    encoder = tapped("resnet").train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = torch.get_rng_state()

    pooled_activations(encoder, pictures(8), chunk=4, pool="mean", step=step())

    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_class_token_can_be_taken_instead(tapped, pictures):
    encoder, images = tapped("vit"), pictures(6)

    _, mean = pooled_activations(encoder, images, chunk=6, pool="mean", step=step())
    _, token = pooled_activations(encoder, images, chunk=6, pool="class_token", step=step())

    assert mean[0].shape == token[0].shape
    assert not torch.allclose(mean[0], token[0])


def test_progress_ends_at_the_number_of_images(tapped, pictures):
    events = []

    pooled_activations(
        tapped("resnet"), pictures(10), chunk=4, pool="mean", step=step(report=events.append)
    )

    assert [event.done for event in events] == [4, 8, 10]
    assert {event.total for event in events} == {10}


def test_finished_chunks_are_not_computed_again(tapped, pictures, tmp_path):
    parts = FinishedParts(folder=tmp_path, origin={"encoder": 1})
    encoder, images = tapped("resnet"), pictures(10)
    polls = iter([False, False, True])

    with pytest.raises(StoppedError, match="resume auto"):
        pooled_activations(
            encoder, images, chunk=4, pool="mean", step=step(parts, stop=lambda: next(polls))
        )

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pooled_000000.safetensors", "pooled_000001.safetensors",
    ]  # fmt: skip
    forwards = []
    encoder.encoder.backbone.register_forward_hook(lambda _, x, y: forwards.append(len(y)))
    resumed = pooled_activations(encoder, images, chunk=4, pool="mean", step=step(parts))
    assert forwards == [2]
    straight = pooled_activations(encoder, images, chunk=4, pool="mean", step=step())
    assert torch.equal(resumed[0], straight[0])
    assert all(map(torch.equal, resumed[1], straight[1]))


def test_a_changed_image_spoils_its_own_chunk_only(tapped, pictures, tmp_path):
    parts = FinishedParts(folder=tmp_path, origin={})
    encoder, images = tapped("resnet"), pictures(8)
    pooled_activations(encoder, images, chunk=4, pool="mean", step=step(parts))
    changed = images.clone()
    changed[5] = 0

    forwards = []
    encoder.encoder.backbone.register_forward_hook(lambda _, x, y: forwards.append(len(y)))
    found, _ = pooled_activations(encoder, changed, chunk=4, pool="mean", step=step(parts))

    assert len(forwards) == 1
    straight, _ = pooled_activations(encoder, changed, chunk=4, pool="mean", step=step())
    assert torch.equal(found, straight)


def test_whole_maps_are_flattened_channel_by_channel(tapped, pictures):
    encoder, images = tapped("resnet"), pictures(5)
    polls = []

    features, maps = flattened_maps(encoder, images, tap=1, chunk=2, poll=lambda: polls.append(1))

    with torch.no_grad():
        expected, outputs = encoder.eval()(plain_view(images, image_size=32))
    assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert_close(maps, outputs[1].flatten(1), atol=1e-4, rtol=1e-4)
    assert len(polls) == 3
