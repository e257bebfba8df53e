"""Fine-Pruning: what clean images leave dormant goes, and stays away."""

import json

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.std_conv import StdConv2d

from mimic_fast.baselines.fine_pruning import (
    FinePruningSettings,
    fine_pruning,
    last_layer,
    mean_activity,
    prunable_layer,
    prune,
)
from mimic_fast.baselines.repair import open_repair
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.agreement import knn_overlap
from mimic_fast.progress import silent

SHORT = OptimSettings(
    name="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4, epochs=2, batch_size=27, warmup_epochs=0
)
OPTIONS = FinePruningSettings(optim=SHORT)
LAST = "layer4.0.conv2"
PLANTED = 5


def opened(settings):
    return open_repair(settings, kind="fine_pruning", report=silent, stop=lambda: False)


def layer_of(encoder, name=LAST):
    layer = encoder.backbone.get_submodule(name)
    assert isinstance(layer, torch.nn.Conv2d)
    return layer


def written(tmp_path, architecture, arguments, *, image_size=16, **fields):
    spec = EncoderSpec(
        architecture=architecture,
        arguments=arguments,
        image_size=image_size,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        **fields,
    )
    encoder = build_encoder(spec, seed=0).eval()
    return export_encoder(encoder, tmp_path / architecture, key_map=None, card={})


@pytest.fixture
def suspect(tmp_path):
    """Its last block counts from the start: timm's begins as zero."""
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "zero_init_last": False}
    return written(tmp_path, "timm:resnet18", arguments, stem="small_stride2")


def vit(tmp_path):
    arguments = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}
    return written(tmp_path, "timm:vit_tiny_patch16_224", arguments)


def convnext(tmp_path):
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "ls_init_value": 1.0}
    return written(tmp_path, "timm:convnext_atto", arguments, image_size=32)


def card_of(path):
    return json.loads(path.with_suffix(".json").read_bytes())


@pytest.fixture
def trigger():
    """White images with a black frame: far from the clean ones."""
    image = torch.ones(1, 3, 16, 16)
    image[..., :3, :] = image[..., -3:, :] = 0
    return image


@pytest.fixture
def planted(settings_of, trigger, tmp_path):
    """A suspect with one hidden channel that the trigger alone excites, and that moves features."""
    repair = opened(settings_of())
    encoder = repair.copy().requires_grad_(False)
    norm = encoder.backbone.get_submodule("layer4.0.bn1")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    encoder(torch.cat([trigger, repair.images]))
    handle.remove()
    raw = found[0][:, :, 0, 0]
    above, below = raw[0] - raw[1:].amax(0), raw[1:].amin(0) - raw[0]
    source = int(torch.maximum(above, below).argmax())
    sign = 1.0 if above[source] > below[source] else -1.0
    conv1, conv2 = layer_of(encoder, "layer4.0.conv1"), layer_of(encoder)
    conv1.weight[PLANTED] = conv1.weight[source]
    clean_edge = raw[1:, source].amax() if sign > 0 else raw[1:, source].amin()
    norm.running_mean[PLANTED], norm.running_var[PLANTED] = clean_edge, 1.0
    norm.weight[PLANTED], norm.bias[PLANTED] = sign * 100, 0.0
    conv2.weight[:, PLANTED] = 1.0
    return export_encoder(encoder, tmp_path / "planted", key_map=None, card={})


def test_defaults():
    options = FinePruningSettings()

    assert (options.utility_drop, options.layer, options.optim.epochs) == (0.4, None, 100)


def test_a_planted_dormant_channel_is_pruned_and_the_backdoor_with_it(
    settings_of, planted, trigger
):
    repair = opened(settings_of(encoder={"teacher": str(planted)}))
    suspect, encoder = repair.suspect.encoder, repair.copy()

    pruned = prune(repair, encoder, layer_of(encoder), utility_drop=0.3)

    assert not pruned.kept[PLANTED]
    assert pruned.kept.any()
    with torch.no_grad():
        moved = (suspect(trigger) - encoder(trigger)).norm()
        clean = (suspect(repair.images) - encoder(repair.images)).norm(dim=1).max()
    assert moved > 5 * clean


def test_activity_is_the_mean_absolute_input_over_images_and_positions(settings_of):
    repair = opened(settings_of())
    encoder = repair.copy()
    layer = layer_of(encoder, "layer2.0.conv2")
    found = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    one_by_one = torch.cat([encoder(image[None]).detach() for image in repair.images])
    handle.remove()

    activity, features = mean_activity(repair, encoder, layer)

    expected = torch.cat(found).double().abs().mean((0, 2, 3))
    torch.testing.assert_close(activity, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


def test_as_many_channels_go_as_the_neighbors_allow(settings_of):
    repair = opened(settings_of())
    encoder = repair.copy()
    layer = layer_of(encoder)
    order = mean_activity(repair, encoder, layer)[0].argsort()
    with torch.no_grad():
        before = encoder(repair.images)

    pruned = prune(repair, encoder, layer, utility_drop=0.25)

    def overlap(count):
        other = repair.copy().requires_grad_(False)
        layer_of(other).weight[:, order[:count]] = 0
        return knn_overlap(before.double(), other(repair.images).double()).value

    count = int((~pruned.kept).sum())
    assert 0 < count < 15
    assert set(order[:count].tolist()) == set((~pruned.kept).nonzero()[:, 0].tolist())
    assert pruned.utility == pytest.approx(overlap(count), abs=0.005)
    assert overlap(count) >= 0.745  # a tie between neighbors may fall otherwise in float64
    assert overlap(count + 1) < 0.755
    assert torch.equal(
        layer.weight[:, pruned.kept], layer_of(repair.suspect.encoder).weight[:, pruned.kept]
    )


def test_no_neighbor_may_be_lost_and_all_may(settings_of):
    repair = opened(settings_of())
    kept = []
    for drop in (0.0, 0.99):
        encoder = repair.copy()
        kept.append(int(prune(repair, encoder, layer_of(encoder), utility_drop=drop).kept.sum()))

    assert kept[0] > 1
    assert kept[1] == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_pruned_channels_stay_dead_while_the_others_are_trained(settings_of, suspect, name):
    optim = SHORT.model_copy(update={"name": name, "lr": 0.01})

    path = fine_pruning(settings_of(), OPTIONS.model_copy(update={"optim": optim}))

    key = f"{LAST}.weight"
    after, before = load_file(path)[key], load_file(suspect)[key]
    dead = (after == 0).flatten(2).all(2).all(0)
    card = card_of(path)
    assert 0 < int(dead.sum()) == card["pruned"] < card["channels"] == 16
    assert not torch.equal(after[:, ~dead], before[:, ~dead])
    encoder = load_encoder(path).encoder
    images = torch.rand(4, 3, 16, 16)
    features = encoder(images)
    with torch.no_grad():  # what makes the pruned channels has no effect
        encoder.get_parameter("backbone.layer4.0.bn1.bias")[dead] += 100
    torch.testing.assert_close(encoder(images), features, rtol=0, atol=0)


def test_the_card_says_what_was_pruned(settings_of):
    card = card_of(fine_pruning(settings_of(), OPTIONS))

    assert (card["kind"], card["layer"]) == ("fine_pruning", LAST)
    assert 0.6 <= card["utility"] < 1
    assert card["settings"]["utility_drop"] == 0.4


@pytest.mark.parametrize(
    ("make", "layer", "channels"),
    [(vit, "blocks.1.mlp.fc2", 64), (convnext, "stages.3.blocks.0.mlp.fc2", 32)],
)
def test_hidden_units_of_an_mlp_are_pruned(settings_of, tmp_path, make, layer, channels):
    settings = settings_of(encoder={"teacher": str(make(tmp_path))})
    optim = SHORT.model_copy(update={"epochs": 1, "precision": "bf16"})

    path = fine_pruning(settings, OPTIONS.model_copy(update={"optim": optim}))

    card = card_of(path)
    assert (card["layer"], card["channels"]) == (layer, channels)
    dead = (load_file(path)[f"{layer}.weight"] == 0).transpose(0, 1).flatten(1).all(1)
    assert 0 < int(dead.sum()) == card["pruned"] < channels


@pytest.mark.parametrize(
    ("architecture", "arguments", "expected"),
    [
        ("timm:seresnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}, LAST),
        ("timm:resnet18d", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}, LAST),
        ("timm:resnet26", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, "layer4.0.conv3"),
        ("torchvision:mobilenet_v3_small", {}, "classifier.0"),
    ],
)
def test_skip_connections_and_squeeze_layers_are_not_the_last(architecture, arguments, expected):
    spec = EncoderSpec(
        architecture=architecture, arguments=arguments, image_size=32,
        mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip

    assert last_layer(build_encoder(spec, seed=0)) == expected


def test_a_chosen_layer_is_pruned(settings_of):
    path = fine_pruning(settings_of(), OPTIONS.model_copy(update={"layer": "layer3.0.conv2"}))

    assert (card_of(path)["layer"], card_of(path)["channels"]) == ("layer3.0.conv2", 8)


@pytest.mark.parametrize(
    ("layer", "what"), [("layer9", "is missing"), ("layer4.0.bn1", "is BatchNormAct2d|BatchNorm2d")]
)
def test_what_is_no_such_layer_is_refused(settings_of, layer, what):
    with pytest.raises(UsageError, match=what):
        fine_pruning(settings_of(), OPTIONS.model_copy(update={"layer": layer}))


def test_a_layer_that_standardizes_its_weights_is_refused(settings_of):
    encoder = opened(settings_of()).copy()
    block = encoder.backbone.get_submodule("layer4.0")
    block.add_module("conv2", StdConv2d(16, 16, 3, padding=1))

    with pytest.raises(UsageError, match="recomputes its weights"):
        prunable_layer(encoder, LAST)
    assert prunable_layer(encoder, "layer3.0.conv2").weight.shape[1] == 8


def test_too_few_images_for_neighbors_are_refused(settings_of, suspect, clean_folder):
    data = {"source": str(clean_folder), "clean_count": 12, "allow_budget": True}
    optim = SHORT.model_copy(update={"batch_size": 8})

    with pytest.raises(UsageError, match="at least 12 clean images, got"):
        fine_pruning(settings_of(data=data), OPTIONS.model_copy(update={"optim": optim}))
