"""MEDIC: importance by hand and by mechanism, and that the student takes no weight."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mimic_fast.baselines.medic import (
    LayerStatistics,
    MedicSettings,
    attributed,
    cloning_loss,
    importance,
    layer_statistics,
    medic,
)
from mimic_fast.baselines.repair import open_repair
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError
from mimic_fast.progress import silent

SHORT = OptimSettings(name="adam", lr=0.01, epochs=4, batch_size=27, warmup_epochs=0)
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


def tapped(encoder):
    return TappedEncoder(encoder.requires_grad_(False).eval(), default_taps(encoder))


def images(count=6, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def opened(settings):
    return open_repair(settings, kind="test", report=silent, stop=lambda: False)


def test_importance_is_the_geometric_mean_of_two_softmaxes():
    generator = torch.Generator().manual_seed(0)
    activation, gradient = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    mean = torch.randn(1, 4, 1, 1, generator=generator, dtype=torch.float64)
    deviation = torch.rand(1, 4, 1, 1, generator=generator, dtype=torch.float64) + 0.5

    got = importance(
        activation, gradient, LayerStatistics(mean=mean, deviation=deviation), sharpness=5.0
    )

    for image in range(3):
        a = ((activation[image] - mean[0]) / deviation[0]).abs()
        g = (gradient[image] * deviation[0]).abs()
        wa = torch.exp(5 * a / a.max()) / torch.exp(5 * a / a.max()).sum()
        wg = torch.exp(5 * g / g.max()) / torch.exp(5 * g / g.max()).sum()
        torch.testing.assert_close(got[image], (wa * wg).sqrt())
        assert got[image].sum() <= 1


@pytest.mark.parametrize("spec", ["resnet", VIT], ids=["resnet", "vit"])
def test_gradients_are_autograds_of_telling_images_apart(spec, suspect):
    encoder = load_encoder(suspect).encoder if spec == "resnet" else build_encoder(spec, seed=2)
    teacher, batch = tapped(encoder.double()), images().double()
    features, activations, gradients = attributed(teacher, batch, temperature=0.5)

    # The last tap again: nudge its output along the gradient, and compare the change of the loss.
    def loss(nudge):
        layer = encoder.backbone.get_submodule(teacher.taps[-1])
        handle = layer.register_forward_hook(lambda module, inputs, output: output + nudge)
        found = F.normalize(encoder(batch), dim=1)
        handle.remove()
        logits = found @ F.normalize(features, dim=1).T / 0.5
        return -logits.log_softmax(1).diagonal().sum()

    direction = gradients[-1]
    step = 1e-5 / direction.norm()
    change = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    torch.testing.assert_close(change, direction.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(features, encoder(batch))
    assert len(activations) == len(gradients) == len(teacher.taps)
    assert all(a.shape == g.shape for a, g in zip(activations, gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients)
    assert not any(tensor.requires_grad for tensor in (*activations, *gradients))


def test_a_neuron_that_matters_outweighs_a_dead_and_an_unread_one(settings_of):
    repair = opened(settings_of())
    dead, unread = 0, 1
    state = repair.suspect.encoder.backbone.state_dict()
    with torch.no_grad():
        # Channel 0 of layer3 is off for every image; nothing reads channel 1 of it.
        for norm in ("layer3.0.bn2", "layer3.0.downsample.1"):
            state[f"{norm}.weight"][dead] = 0.0
            state[f"{norm}.bias"][dead] = -1.0
        for reader in ("layer4.0.conv1", "layer4.0.downsample.0"):
            state[f"{reader}.weight"][:, unread] = 0.0
    teacher = tapped(repair.suspect.encoder)
    statistics = layer_statistics(repair, teacher, MedicSettings(optim=SHORT))
    _, activations, gradients = attributed(teacher, images(), temperature=0.5)

    weights = importance(activations[2], gradients[2], statistics[2], sharpness=5.0)

    assert activations[2][:, dead].abs().max() == 0
    assert gradients[2][:, unread].abs().max() == 0
    per_channel = weights.mean((0, 2, 3))
    others = per_channel[2:]
    assert per_channel[dead] < others.min()
    assert per_channel[unread] < others.median()
    assert others.max() > 2 * per_channel[dead]


def test_statistics_are_those_of_all_views_of_a_pass(settings_of):
    repair = opened(settings_of())
    options = MedicSettings(optim=SHORT)
    teacher = tapped(repair.suspect.encoder)
    got = layer_statistics(repair, teacher, options)

    views = torch.cat([repair.views(step, options, count=1)[0] for step in range(3)])
    with torch.no_grad():
        _, maps = teacher(views)
    for found, layer in zip(got, maps, strict=True):
        channels = layer.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(found.mean.flatten(), channels.mean(1).float())
        deviation = channels.std(1, correction=0)
        expected = deviation.clamp(min=float(deviation.max()) * 0.05)
        torch.testing.assert_close(found.deviation.flatten(), expected.float())


def test_the_cloning_loss_is_the_naive_sum_and_zero_for_the_suspect_itself():
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    gradients = [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    mine = [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    statistics = [
        LayerStatistics(
            mean=torch.zeros(1, 1, 5, dtype=torch.float64),
            deviation=torch.full((1, 1, 5), 2.0, dtype=torch.float64),
        )
        for _ in range(2)
    ]

    got = cloning_loss(mine, layers, gradients, statistics, sharpness=3.0)

    expected = sum(
        importance(t[i : i + 1], g[i : i + 1], s, sharpness=3.0).flatten()
        @ ((m[i] - t[i]) / 2).square().flatten()
        / 3
        for m, t, g, s in zip(mine, layers, gradients, statistics, strict=True)
        for i in range(3)
    )
    torch.testing.assert_close(got.double(), expected)
    assert cloning_loss(layers, layers, gradients, statistics, sharpness=3.0) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_comes_nearer_and_holds_no_weight_of_the_suspect(
    settings_of, suspect, precision
):
    seen = []
    optim = SHORT.model_copy(update={"precision": precision})
    path = medic(
        settings_of(), MedicSettings(optim=optim, crop_scale=(0.6, 1.0)), report=seen.append
    )

    losses = [event.metrics for event in seen if event.phase == "medic"]
    assert len(losses) == 12
    assert sum(m["cloning"] for m in losses[-3:]) < sum(m["cloning"] for m in losses[:3])
    assert sum(m["cosine"] for m in losses[-3:]) < sum(m["cosine"] for m in losses[:3])
    written, before = load_file(path), load_file(suspect)
    assert written.keys() == before.keys()
    for name, weight in before.items():
        if weight.is_floating_point() and weight.ndim == 4:
            assert not (written[name] == weight).any(), name
    card = json.loads(path.with_suffix(".json").read_bytes())
    assert (card["kind"], card["settings"]["sharpness"]) == ("medic", 5.0)
    assert card["taps"] == ["layer1", "layer2", "layer3", "layer4"]
    assert not load_encoder(path).encoder.training


def test_the_student_starts_from_random_weights_of_the_seed(settings_of, suspect):
    still = SHORT.model_copy(update={"epochs": 1, "lr": 1e-30, "weight_decay": 0.0})
    path = medic(settings_of(seed=7), MedicSettings(optim=still))

    fresh = build_encoder(load_encoder(suspect).encoder.spec, seed=7).backbone.state_dict()
    written = load_encoder(path).encoder.backbone.state_dict()
    assert all(torch.equal(written[k], v) for k, v in fresh.items() if v.ndim == 4)


def test_without_cloning_the_loss_is_the_cosine_alone(settings_of):
    seen = []
    options = MedicSettings(optim=SHORT.model_copy(update={"epochs": 1}), cloning=0.0)

    medic(settings_of(), options, report=seen.append)

    assert all(e.metrics["cloning"] == 0 for e in seen if e.phase == "medic")


def test_a_tap_that_does_not_exist_is_refused(settings_of, suspect):
    settings = settings_of(encoder={"teacher": str(suspect), "taps": ["layer9"]})
    with pytest.raises(UsageError, match="tap layer 'layer9' is not in"):
        medic(settings, MedicSettings(optim=SHORT))


def test_a_batch_larger_than_the_clean_set_is_refused(settings_of):
    optim = SHORT.model_copy(update={"batch_size": 128})
    with pytest.raises(UsageError, match="exceeds the 81 training images"):
        medic(settings_of(), MedicSettings(optim=optim))


def test_it_can_be_stopped(settings_of):
    with pytest.raises(NothingSavedError, match="medic keeps no state"):
        medic(settings_of(), MedicSettings(optim=SHORT), stop=lambda: True)


def test_divergence_ends_it(settings_of):
    wild = SHORT.model_copy(update={"lr": 1e30, "clip_norm": 0.0, "schedule": "constant"})
    with pytest.raises(DivergedError, match="medic diverged"):
        medic(settings_of(), MedicSettings(optim=wild))
