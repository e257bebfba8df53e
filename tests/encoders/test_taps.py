import copy

import pytest
import torch
from torch import nn

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import (
    TappedEncoder,
    attention_free_taps,
    default_taps,
    tap_shapes,
    undisturbed,
)
from mimic_fast.errors import UsageError

STAGES = ("layer1", "layer2", "layer3", "layer4")


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("architecture", "arguments", "expected"),
    [
        ("timm:resnet18", {}, STAGES),
        ("torchvision:resnet18", {}, STAGES),
        ("timm:tf_efficientnet_lite0", {}, tuple(f"blocks.{n}" for n in range(7))),
        ("timm:convnext_atto", {}, tuple(f"stages.{n}" for n in range(4))),
        ("timm:regnetx_002", {}, ("s1", "s2", "s3", "s4")),
        ("timm:vit_tiny_patch16_224", {"depth": 2}, ("blocks.0", "blocks.1")),
        ("torchvision:mobilenet_v3_small", {}, tuple(f"features.{n}" for n in range(13))),
    ],
)
def test_default_taps_are_stages_or_blocks(architecture, arguments, expected):
    spec = EncoderSpec(
        architecture=architecture,
        arguments=arguments,
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    assert default_taps(build_encoder(spec, seed=0)) == expected


def test_default_taps_of_unknown_structure_ask_for_taps(resnet_spec):
    encoder = Encoder(resnet_spec, nn.Sequential(nn.Flatten(), nn.Linear(3072, 8)), feature_dim=8)
    with pytest.raises(UsageError, match=r"give encoder.taps, of: 0, 1"):
        default_taps(encoder)


def test_resnet_maps_equal_the_stages_run_by_hand(tapped, resnet_spec, images):
    model = tapped(resnet_spec)

    features, maps = model(images)

    net = model.encoder.backbone
    x = net.act1(net.bn1(net.conv1((images - 0.5) / 0.25)))
    for name, feature_map in zip(STAGES, maps, strict=True):
        x = getattr(net, name)(x)
        assert torch.equal(feature_map, x)
    assert torch.equal(features, x.mean((2, 3)))


def test_vit_maps_are_patch_tokens_on_their_grid(tapped, vit_spec, images):
    model = tapped(vit_spec)

    features, maps = model(images)

    net = model.encoder.backbone
    tokens = net.norm_pre(net._pos_embed(net.patch_embed((images - 0.5) / 0.25)))
    for block, feature_map in zip(net.blocks, maps, strict=True):
        tokens = block(tokens)
        assert tokens.shape == (3, 1 + 4 + 64, 64)
        assert feature_map.shape == (3, 64, 8, 8)
        for row, column in [(0, 0), (0, 7), (3, 5), (7, 7)]:
            token = tokens[:, 1 + 4 + row * 8 + column]
            assert torch.equal(feature_map[:, :, row, column], token)
    assert torch.equal(features, model.encoder(images))


def test_torchvision_vit_drops_its_class_token(resnet_spec):
    from torchvision.models import VisionTransformer

    backbone = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    backbone.heads = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    model = TappedEncoder(
        Encoder(resnet_spec, backbone, feature_dim=16), ("encoder.layers.encoder_layer_0",)
    )
    _, (vector,) = model.eval().pooled(torch.rand(2, 3, 32, 32), pool="class_token")
    assert vector.shape == (2, 16)
    assert tap_shapes(model) == {"encoder.layers.encoder_layer_0": (16, 4, 4)}


def test_swin_maps_are_turned_channels_first(images):
    spec = EncoderSpec(
        architecture="timm:swin_tiny_patch4_window7_224",
        arguments={"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    encoder = build_encoder(spec, seed=0).eval()
    model = TappedEncoder(encoder, default_taps(encoder))

    # The first stage has 8 channels on an 8 x 8 grid, so its shape alone would not tell.
    assert tap_shapes(model) == {"layers.0": (8, 8, 8), "layers.1": (16, 4, 4)}
    normalized = (images - 0.5) / 0.5
    patches = encoder.backbone.get_submodule("patch_embed")(normalized)
    first = encoder.backbone.get_submodule("layers.0")(patches)
    assert torch.equal(model(images)[1][0], first.permute(0, 3, 1, 2))


def test_channels_last_maps_of_unknown_models_are_told_by_shape(resnet_spec):
    class ChannelsLast(nn.Module):
        def forward(self, images):
            return images.permute(0, 2, 3, 1)

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn = ChannelsLast()

        def forward(self, images):
            return self.turn(images).mean((1, 2))

    model = TappedEncoder(Encoder(resnet_spec, Backbone(), feature_dim=3), ("turn",))
    assert tap_shapes(model) == {"turn": (3, 32, 32)}


def test_maps_carry_gradients_to_the_weights(tapped, spec, images):
    model = tapped(spec)
    _, maps = model(images)
    maps[-1].square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_pooled_mean_averages_positions(tapped, spec, images):
    model = tapped(spec)
    _, maps = model(images)
    features, vectors = model.pooled(images, pool="mean")
    assert torch.equal(features, model.encoder(images))
    for vector, feature_map in zip(vectors, maps, strict=True):
        torch.testing.assert_close(vector, feature_map.flatten(2).mean(2))


def test_pooled_class_token_is_the_first_token(tapped, vit_spec, images):
    model = tapped(vit_spec)
    net = model.encoder.backbone
    tokens = net._pos_embed(net.patch_embed((images - 0.5) / 0.25))
    _, vectors = model.pooled(images, pool="class_token")
    for block, vector in zip(net.blocks, vectors, strict=True):
        tokens = block(tokens)
        assert torch.equal(vector, tokens[:, 0])


def test_pooled_class_token_averages_cnn_taps(tapped, resnet_spec, images):
    model = tapped(resnet_spec)
    token, mean = (model.pooled(images, pool=p)[1] for p in ("class_token", "mean"))
    assert all(torch.equal(a, b) for a, b in zip(token, mean, strict=True))


def test_pooled_class_token_without_one_is_refused(tapped, vit_spec, images):
    arguments = {**vit_spec.arguments, "class_token": False, "global_pool": "avg"}
    model = tapped(vit_spec.model_copy(update={"arguments": arguments}))
    assert tap_shapes(model)["blocks.0"] == (64, 8, 8)  # registers are still dropped
    with pytest.raises(UsageError, match=r"no class token; set mi\.pool = 'mean'"):
        model.pooled(images, pool="class_token")


def test_unknown_tap_says_what_exists(tapped, resnet_spec):
    with pytest.raises(UsageError, match="'layer5' is not in timm:resnet18; have: conv1, bn1"):
        tapped(resnet_spec, "layer1", "layer5")


@pytest.mark.parametrize("taps", [(), ("layer1", "layer1")])
def test_no_tap_or_a_tap_twice_is_refused(trained, resnet_spec, taps):
    with pytest.raises(UsageError, match="different layers, at least one"):
        TappedEncoder(trained(resnet_spec), taps)


def test_tap_that_never_runs_is_refused(tapped, vit_spec, images):
    # Fused attention reads the dropout rate and never calls the module.
    with pytest.raises(UsageError, match=r"'blocks.0.attn.attn_drop' ran 0 times"):
        tapped(vit_spec, "blocks.0.attn.attn_drop")(images)


def test_tap_that_runs_twice_is_refused(resnet_spec, images):
    spec = resnet_spec.model_copy(
        update={"architecture": "torchvision:resnet18", "arguments": {}, "stem": "native"}
    )
    model = TappedEncoder(build_encoder(spec, seed=0), ("layer1.0.relu",))
    with pytest.raises(UsageError, match=r"'layer1.0.relu' ran 2 times"):
        model.eval()(images)


def test_tap_that_is_no_map_is_refused(tapped, vit_spec, images):
    # q, k and v of one head: [batch, head, token, channel].
    with pytest.raises(UsageError, match=r"'blocks.0.attn.q_norm' returns .* choose another layer"):
        tapped(vit_spec, "blocks.0.attn.q_norm")(images)


def test_tap_on_vectors_has_one_position(tapped, resnet_spec):
    assert tap_shapes(tapped(resnet_spec, "global_pool")) == {"global_pool": (64, 1, 1)}


def test_no_hook_stays_behind(tapped, resnet_spec, images):
    model = tapped(resnet_spec)
    model(images)
    with pytest.raises(UsageError):
        model(images[:, :1])
    assert hooks_of(model) == 0


def test_deepcopy_taps_its_own_weights(tapped, spec, images):
    model = tapped(spec)
    twin = copy.deepcopy(model)
    _, before = model(images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)

    _, after = model(images)
    _, changed = twin(images)

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, changed, strict=True))


def test_two_tapped_views_of_one_encoder_agree(trained, resnet_spec, images):
    encoder = trained(resnet_spec)
    one, two = TappedEncoder(encoder, STAGES), TappedEncoder(encoder, ("layer4",))
    assert torch.equal(one(images)[1][-1], two(images)[1][0])


def test_distributed_wrapper_returns_the_same_maps_and_gradients(
    tapped, resnet_spec, images, tmp_path
):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    plain = tapped(resnet_spec)
    wrapped_model = copy.deepcopy(plain)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(wrapped_model)
        _, maps = wrapped(images)
        torch.stack([m.square().mean() for m in maps]).sum().backward()
    finally:
        distributed.destroy_process_group()
    _, expected = plain(images)
    torch.stack([m.square().mean() for m in expected]).sum().backward()

    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    for (name, parameter), other in zip(
        plain.named_parameters(), wrapped_model.parameters(), strict=True
    ):
        assert name.startswith("encoder.backbone.")
        torch.testing.assert_close(other.grad, parameter.grad)


def test_training_forward_updates_batch_statistics_once(tapped, resnet_spec, images):
    model = tapped(resnet_spec).train()
    counter = model.encoder.backbone.bn1.num_batches_tracked
    before = counter.item()
    model(images)
    assert counter.item() == before + 1


def test_tapping_keeps_the_mode(trained, resnet_spec):
    assert not TappedEncoder(trained(resnet_spec), STAGES).training
    assert TappedEncoder(trained(resnet_spec).train(), STAGES).training


def test_state_dict_holds_only_backbone_weights(tapped, spec):
    model = tapped(spec)
    keys = set(model.encoder.backbone.state_dict())
    assert set(model.state_dict()) == {f"encoder.backbone.{key}" for key in keys}


def test_attention_free_taps_have_one_position(trained, resnet_spec):
    native = resnet_spec.model_copy(update={"stem": "native"})
    encoder = trained(native)
    model = TappedEncoder(encoder, STAGES)
    assert tap_shapes(model) == {
        "layer1": (8, 8, 8), "layer2": (16, 4, 4), "layer3": (32, 2, 2), "layer4": (64, 1, 1),
    }  # fmt: skip
    assert attention_free_taps(model) == ("layer4",)


def test_undisturbed_restores_modes_buffers_and_random_state(tapped, resnet_spec, images):
    model = tapped(resnet_spec).train()
    model.encoder.backbone.layer2.eval()
    modes = [part.training for part in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()

    def disturb():
        with undisturbed(model):
            assert not any(part.training for part in model.modules())
            model.train()(images)
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        disturb()

    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
