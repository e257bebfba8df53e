"""ANP: masks, noise, and the neurons that are pruned."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mimic_fast import ops
from mimic_fast.baselines.anp import (
    AnpSettings,
    Masks,
    anp,
    neurons_of,
    prune,
    train_masks,
    worst_noise,
)
from mimic_fast.baselines.repair import open_repair
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError
from mimic_fast.progress import silent

OPTIM = AnpSettings().optim.model_copy(update={"batch_size": 27})
SHORT = AnpSettings(optim=OPTIM, iterations=3)
SLEEPER = 5  # channel


def generator():
    return torch.Generator().manual_seed(0)


def masks_of(encoder):
    encoder = encoder.float().eval().requires_grad_(False)
    return Masks(encoder, neurons_of(encoder))


def transformer():
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={
            "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2
        },
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )  # fmt: skip
    return build_encoder(spec, seed=0).eval()


class Two(nn.Module):
    """Two convolutions, each with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=None)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12, momentum=None)

    def forward(self, images):
        hidden = self.bn1(self.conv1(images)).relu()
        return self.bn2(self.conv2(hidden)).relu().mean((2, 3))


@pytest.fixture
def sleeping(settings_of):
    """A repair of an encoder with a channel, silent on clean images, that is loud once it wakes."""
    repair = opened(settings_of())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(repair.suspect.encoder.spec, Two(), feature_dim=12)
    encoder(repair.images)
    encoder.eval().requires_grad_(False)
    # in deviations; noise of 0.4 wakes it at 1.5 of them
    encoder.get_parameter("backbone.bn1.bias")[SLEEPER] = -3.5
    louder = 6 * torch.randn(12, 3, 3, generator=generator())
    encoder.get_parameter("backbone.conv2.weight")[:, SLEEPER] = louder
    return replace(repair, suspect=replace(repair.suspect, encoder=encoder))


def opened(settings):
    return open_repair(settings, kind="anp", report=silent, stop=lambda: False)


def noisy_loss(encoder, images, goal):
    """Worst of several draws: a start at which the channel is silent has no slope to wake it."""
    masks, draws, losses = masks_of(encoder), generator(), []
    for _ in range(10):
        noise = worst_noise(masks, images, goal, options=SHORT, generator=draws)
        losses.append(ops.clone_loss(masks(images, noise), goal).item())
    return max(losses)


def test_the_sleeping_channel_is_pruned_and_no_other(sleeping):
    suspect, encoder, images = sleeping.suspect.encoder, sleeping.copy(), sleeping.images
    masks, goal = masks_of(encoder), suspect(images)
    optim = OPTIM.model_copy(update={"lr": 0.5})

    train_masks(sleeping, masks, SHORT.model_copy(update={"iterations": 40, "optim": optim}))
    pruned = prune(encoder, masks, threshold=AnpSettings().threshold)

    assert pruned == {"backbone.bn1": [SLEEPER]}
    assert ops.clone_loss(encoder(images), goal) < -0.999
    before, after = (noisy_loss(one, images, goal) for one in (suspect, encoder))
    assert after < before - 0.01


def test_the_card_says_what_was_pruned_and_nothing_else_changed(settings_of, suspect):
    # Every neuron whose mask left 1 counts as closed.
    path = anp(settings_of(), SHORT.model_copy(update={"iterations": 1, "threshold": 1.0}))

    card = json.loads(path.with_suffix(".json").read_bytes())
    before, after = load_file(suspect), load_file(path)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    pruned = card["pruned_neurons"]
    assert card["kind"] == "anp"
    assert 0 < card["pruned"] == sum(map(len, pruned.values())) < card["neurons"]
    assert card["neurons"] == sum(len(v) for k, v in before.items() if k.endswith("running_mean"))
    assert changed <= {f"{name.removeprefix('backbone.')}.weight" for name in pruned}
    assert not after["bn1.weight"][pruned["backbone.bn1"]].any()
    assert card["settings"]["iterations"] == 1


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_masks_and_noise_are_those_of_the_formula(suspect, kind):
    encoder = load_encoder(suspect).encoder.double() if kind == "cnn" else transformer().double()
    masks = Masks(encoder.requires_grad_(False), neurons_of(encoder))
    noise = torch.rand(2, len(masks.values), generator=generator(), dtype=torch.float64) - 0.5
    images = torch.rand(2, 3, 16, 16, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        masks.values.uniform_(0, 1, generator=generator())
    features = masks(images, noise)

    place = 0
    with torch.no_grad():
        for module in encoder.modules():
            wanted = nn.BatchNorm2d if kind == "cnn" else (nn.Linear, nn.Conv2d)
            if not isinstance(module, wanted):
                continue
            assert module.bias is not None
            for channel in range(len(module.weight)):
                module.weight[channel] *= masks.values[place] + noise[0, place]
                module.bias[channel] *= 1 + noise[1, place]
                place += 1

    assert place == len(masks.values)
    torch.testing.assert_close(features, encoder(images).float())


def test_open_masks_are_the_encoder_itself_and_lie_at_the_minimum_of_the_loss(suspect):
    encoder = load_encoder(suspect).encoder
    masks, images = masks_of(encoder), torch.rand(4, 3, 16, 16, generator=generator())
    features = masks(images)
    loss = ops.clone_loss(features, encoder(images))
    loss.backward()

    torch.testing.assert_close(features, encoder(images))
    torch.testing.assert_close(loss.item(), -1.0)
    assert masks.values.grad is not None
    assert masks.values.grad.abs().max() < 1e-4
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_noise_stays_within_epsilon_and_harms_more_than_its_random_start(suspect):
    masks = masks_of(load_encoder(suspect).encoder)
    images = torch.rand(16, 3, 16, 16, generator=generator())
    goal = masks(images).detach()
    for steps in (1, 4):
        options = AnpSettings(epsilon=0.3, noise_steps=steps)
        noise = worst_noise(masks, images, goal, options=options, generator=generator())
        start = (2 * torch.rand(2, len(masks.values), generator=generator()) - 1) * 0.3

        assert noise.abs().max() <= 0.3
        assert ops.clone_loss(masks(images, noise), goal) > ops.clone_loss(
            masks(images, start), goal
        )
    assert masks.values.grad is None


def test_one_update_is_that_of_the_weighted_losses(settings_of):
    repair = opened(settings_of())
    masks = masks_of(repair.copy())
    optim = OPTIM.model_copy(update={"lr": 0.01})
    options = SHORT.model_copy(update={"iterations": 1, "optim": optim, "alpha": 0.3})
    ids = repair.batch(0, optim)
    images, goal = repair.images[ids], repair.suspect.encoder(repair.images[ids])
    noise = worst_noise(masks, images, goal, options=options, generator=generator())
    cosine = torch.nn.functional.cosine_similarity
    loss = (
        -0.7 * cosine(masks(images, noise), goal).mean() - 0.3 * cosine(masks(images), goal).mean()
    )
    (slope,) = torch.autograd.grad(loss, masks.values)
    assert slope.abs().max() > 1e-4

    train_masks(repair, masks, options)

    torch.testing.assert_close(
        masks.values.detach(), (1 - 0.01 * slope).clamp(0, 1), rtol=0, atol=1e-6
    )


def test_masks_stay_in_their_range(settings_of):
    repair = opened(settings_of())
    masks = masks_of(repair.copy())
    optim = OPTIM.model_copy(update={"lr": 20.0})

    train_masks(repair, masks, SHORT.model_copy(update={"optim": optim}))

    assert masks.values.min() == 0
    assert masks.values.max() == 1


def test_iterations_or_epochs_give_the_number_of_updates(settings_of):
    for iterations, expected in ((4, 4), (None, 6)):
        seen = []
        optim = OPTIM.model_copy(update={"epochs": 2})
        options = AnpSettings(optim=optim, iterations=iterations)
        anp(settings_of(), options, report=seen.append)

        assert sum(event.phase == "anp" for event in seen) == expected


def test_only_masks_below_the_threshold_are_pruned_and_biases_stay(suspect):
    encoder = load_encoder(suspect).encoder
    with torch.no_grad():
        encoder.get_parameter("backbone.bn1.bias").fill_(0.7)
    masks = masks_of(encoder)
    with torch.no_grad():
        masks.values[:3] = torch.tensor([0.1, 0.25, 0.2])

    pruned = prune(encoder, masks, threshold=0.25)

    assert pruned == {"backbone.bn1": [0, 2]}
    assert encoder.get_parameter("backbone.bn1.weight").tolist() == [0, 1, 0] + [1] * 61
    assert encoder.get_parameter("backbone.bn1.bias").eq(0.7).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_transformer_is_masked_at_its_linear_layers(settings_of, tmp_path, precision):
    path = export_encoder(transformer(), tmp_path / "transformer", key_map=None, card={})
    optim = OPTIM.model_copy(update={"precision": precision})
    options = SHORT.model_copy(update={"optim": optim, "threshold": 1.0})

    repaired = anp(settings_of(encoder={"teacher": str(path)}), options)

    card = json.loads(repaired.with_suffix(".json").read_bytes())
    assert card["neurons"] == 16 + 48 + 16 + 64 + 16  # patches, qkv, projection, MLP
    assert 0 < card["pruned"] < card["neurons"]


def test_an_encoder_without_neurons_is_refused():
    spec = EncoderSpec(architecture="timm:resnet18", image_size=8, mean=(0.5,) * 3, std=(1,) * 3)
    encoder = Encoder(spec, nn.Flatten(), feature_dim=192)

    with pytest.raises(UsageError, match=r"anp masks channels of .* has none with weights"):
        neurons_of(encoder)


def test_losses_that_are_not_finite_end_it(settings_of):
    repair = opened(settings_of())
    encoder = repair.copy().requires_grad_(False)
    with torch.no_grad():
        encoder.get_parameter("backbone.bn1.weight").fill_(torch.nan)

    with pytest.raises(DivergedError, match="anp diverged at step 1"):
        train_masks(repair, masks_of(encoder), SHORT)


def test_a_stopped_run_writes_nothing(settings_of, tmp_path):
    with pytest.raises(NothingSavedError, match="anp keeps no state"):
        anp(settings_of(), SHORT, stop=lambda: True)
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_clean_set_is_refused(settings_of):
    with pytest.raises(UsageError, match="exceeds the 81 training images"):
        anp(settings_of(), AnpSettings())


def test_the_defaults_are_the_papers():
    optim = AnpSettings().optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.2, 0.9, 0)
    assert OptimSettings.model_validate(optim.model_dump()) == optim
