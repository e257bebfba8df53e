"""CLP finds the channel that amplifies, and no other."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mimic_fast.baselines.clp import ClpSettings, Layer, channel_bounds, clp, layers_of, prune
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import NothingSavedError
from tests.baselines.conftest import SPEC

WIDE = SPEC.model_copy(update={"arguments": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}})
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "img_size": 16},
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)
LITE = EncoderSpec(
    architecture="timm:tf_efficientnet_lite0", image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3
)


def sample(spec: EncoderSpec) -> torch.Tensor:
    return torch.rand(2, 3, spec.image_size, spec.image_size)


def layer(encoder, name: str) -> Layer:
    found = {one.name: one for one in layers_of(encoder, sample(encoder.spec))}
    return found[name]


@pytest.mark.parametrize("planted", ["kernel", "gamma", "variance"])
def test_a_planted_amplifier_is_pruned_and_nothing_else_changes(planted):
    encoder = build_encoder(WIDE, seed=0).eval()
    one = layer(encoder, "layer3.0.conv1")
    assert one.norm is not None
    with torch.no_grad():
        if planted == "kernel":
            one.module.weight[5] *= 30
        elif planted == "gamma":
            one.norm.weight[5] *= -30
        else:
            assert one.norm.running_var is not None
            one.norm.running_var[5] = 1e-3
    before = {k: v.clone() for k, v in encoder.state_dict().items()}

    pruned = prune(encoder, sample(WIDE), deviations=3.0)

    assert pruned == {"layer3.0.conv1": [5]}
    after = encoder.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"backbone.layer3.0.bn1.weight"} or changed == {
        "backbone.layer3.0.bn1.weight",
        "backbone.layer3.0.bn1.bias",
    }
    assert one.norm.weight[5] == one.norm.bias[5] == 0


def test_the_switched_off_channel_is_zero_for_every_image():
    encoder = build_encoder(WIDE, seed=0).eval()
    one = layer(encoder, "layer3.0.conv1")
    assert one.norm is not None
    with torch.no_grad():
        one.module.weight[5] *= 30
        one.norm.bias[5] = 2.0
    prune(encoder, sample(WIDE), deviations=3.0)
    seen = []
    one.norm.register_forward_hook(lambda *call: seen.append(call[2]))

    encoder(sample(WIDE))

    assert not seen[0][:, 5].any()
    assert seen[0][:, 4].any()


def test_bounds_are_singular_values_by_the_norms_factor():
    encoder = build_encoder(WIDE, seed=0).eval()
    one = layer(encoder, "layer2.0.conv2")
    assert one.norm is not None
    variance = one.norm.running_var
    assert variance is not None
    with torch.no_grad():
        one.norm.weight.uniform_(-2, 2)
        variance.uniform_(0.1, 3)

    bounds = channel_bounds(one)

    for channel in range(len(bounds)):
        kernel = one.module.weight[channel].detach().double().reshape(16, 9)
        largest = torch.linalg.svdvals(kernel)[0]
        factor = one.norm.weight[channel].detach().abs() / (variance[channel] + 1e-5).sqrt()
        assert bounds[channel].item() == pytest.approx(float(largest * factor.double()), rel=1e-5)


def test_a_linear_layers_bound_is_its_rows_length():
    linear = nn.Linear(7, 4)

    bounds = channel_bounds(Layer(name="x", module=linear, norm=None))

    torch.testing.assert_close(bounds, linear.weight.detach().double().norm(dim=1))


@pytest.mark.parametrize("spec", [WIDE, LITE], ids=["resnet", "lite"])
def test_every_convolution_of_a_cnn_finds_its_batchnorm(spec):
    encoder = build_encoder(spec, seed=0).eval()

    found = list(layers_of(encoder, sample(spec)))

    norms = [m for m in encoder.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    paired = [one.norm for one in found if one.norm is not None]
    assert len(paired) == len(norms)
    assert {id(norm) for norm in paired} == {id(norm) for norm in norms}
    assert all(
        one.norm is not None and one.norm.num_features == one.module.out_channels
        for one in found
        if isinstance(one.module, nn.Conv2d)
    )


def test_a_vit_is_judged_by_its_rows():
    encoder = build_encoder(VIT, seed=0).eval()
    fc1 = encoder.backbone.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(fc1, nn.Linear)
    with torch.no_grad():
        fc1.weight[9] *= 40

    pruned = prune(encoder, sample(VIT), deviations=3.0)

    assert pruned == {"blocks.1.mlp.fc1": [9]}
    assert not fc1.weight[9].any()
    assert fc1.bias[9] == 0


def test_a_batchnorm_behind_an_activation_in_place_is_not_the_layers_own():
    layers = [
        *(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    encoder = Encoder(WIDE, nn.Sequential(*layers), feature_dim=5).eval()

    found = {one.name: one.norm for one in layers_of(encoder, sample(WIDE))}

    assert found == {"0": None, "3": layers[4]}


def test_fewer_deviations_prune_more():
    counts = []
    for deviations in (1.0, 2.0, 6.0):
        encoder = build_encoder(WIDE, seed=0).eval()
        pruned = prune(encoder, sample(WIDE), deviations=deviations)
        counts.append(sum(map(len, pruned.values())))

    assert counts[0] > counts[1] > counts[2] == 0


def test_what_is_left_says_what_was_pruned(settings_of, suspect):
    path = clp(settings_of(), ClpSettings(deviations=1.5))

    card = json.loads(path.with_suffix(".json").read_bytes())
    assert (card["kind"], card["clean_images"]) == ("clp", 0)
    assert card["settings"] == {"deviations": 1.5}
    changed = {
        key
        for key, value in load_file(path).items()
        if not torch.equal(value, load_file(suspect)[key])
    }
    assert card["pruned"]
    assert changed
    assert all("bn" in key or "downsample.1" in key for key in changed)
    assert not load_encoder(path).encoder.training


def test_a_stop_leaves_nothing(settings_of, tmp_path):
    with pytest.raises(NothingSavedError, match="clp keeps no state"):
        clp(settings_of(), ClpSettings(), stop=lambda: True)
    assert not (tmp_path / "out").exists()
