import pytest
import torch
from torch import nn

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.errors import UsageError


def spec_of(architecture: str, **changes) -> EncoderSpec:
    channels = changes.get("in_channels", 3)
    defaults = {"image_size": 32, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    return EncoderSpec(architecture=architecture, **(defaults | changes))


@pytest.mark.parametrize(
    ("architecture", "arguments", "feature_dim"),
    [
        ("timm:resnet18", {}, 512),
        ("timm:resnet18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}, 256),
        ("timm:vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 96, "num_heads": 3}, 96),
        ("timm:tf_efficientnet_lite0", {}, 1280),
        ("torchvision:resnet18", {}, 512),
        ("torchvision:mobilenet_v3_small", {}, 1024),
        ("torchvision:shufflenet_v2_x0_5", {}, 1024),
    ],
)
def test_build_encoder_returns_vectors_without_classifier(architecture, arguments, feature_dim):
    encoder = build_encoder(spec_of(architecture, arguments=arguments), seed=0)

    features = encoder.eval()(torch.rand(2, 3, 32, 32))

    assert features.shape == (2, feature_dim)
    assert encoder.feature_dim == feature_dim
    assert all(key.startswith("backbone.") for key in encoder.state_dict())
    assert not any(tensor.shape[:1] == (1000,) for tensor in encoder.state_dict().values())


def test_build_encoder_normalizes_images_with_the_spec(resnet_spec, images):
    encoder = build_encoder(resnet_spec, seed=0).eval()

    expected = encoder.backbone((images - 0.5) / 0.25)

    torch.testing.assert_close(encoder(images), expected)


def test_build_encoder_returns_training_mode(spec):
    assert all(module.training for module in build_encoder(spec, seed=0).modules())


def test_seed_alone_decides_weights(spec):
    torch.manual_seed(1)
    first = build_encoder(spec, seed=5).state_dict()
    torch.manual_seed(2)
    second = build_encoder(spec, seed=5).state_dict()
    other = build_encoder(spec, seed=6).state_dict()

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_seed_leaves_global_random_state_untouched(spec):
    before = torch.get_rng_state()
    build_encoder(spec, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_draws_from_global_random_state(resnet_spec):
    torch.manual_seed(3)
    first = build_encoder(resnet_spec).backbone.get_parameter("conv1.weight")
    second = build_encoder(resnet_spec).backbone.get_parameter("conv1.weight")
    torch.manual_seed(3)
    again = build_encoder(resnet_spec).backbone.get_parameter("conv1.weight")

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("architecture", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize(("stem", "stride"), [("small_stride1", 1), ("small_stride2", 2)])
def test_small_stem_replaces_convolution_and_pooling(architecture, stem, stride):
    backbone = build_encoder(spec_of(architecture, stem=stem), seed=0).backbone

    conv = backbone.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (stride, stride), (1, 1))
    assert conv.weight.shape == (64, 3, 3, 3)
    assert conv.bias is None
    assert isinstance(backbone.get_submodule("maxpool"), nn.Identity)
    # Kaiming normal, fan-out: variance 2 / (64 * 9); 1,728 draws know it to about 3 %.
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.08)


def test_small_stem_refuses_other_architectures(vit_spec):
    with pytest.raises(UsageError, match="stem 'small_stride1' is for ResNets"):
        build_encoder(vit_spec.model_copy(update={"stem": "small_stride1"}))


def test_gray_images_build_one_input_channel():
    encoder = build_encoder(spec_of("timm:resnet18", in_channels=1), seed=0).eval()
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, 512)


def test_forward_refuses_other_channel_counts(resnet_spec):
    with pytest.raises(UsageError, match="takes 3-channel images, got 1"):
        build_encoder(resnet_spec)(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [("timm:resnet81", "timm:resnet"), ("torchvision:reznet18", "torchvision:resnet18")],
)
def test_unknown_architecture_names_the_nearest(architecture, nearest):
    with pytest.raises(UsageError, match=f"unknown architecture '{architecture}'.*'{nearest}"):
        build_encoder(spec_of(architecture))


@pytest.mark.parametrize(
    "architecture",
    ["timm:hf-hub:timm/resnet18", "timm:hf_hub:timm/x", "timm:local-dir:/tmp/x", "torchvision:a/b"],
)
def test_names_that_would_download_are_refused(architecture):
    with pytest.raises(UsageError, match="would be downloaded"):
        build_encoder(spec_of(architecture))


def test_architecture_with_control_characters_is_quoted():
    with pytest.raises(UsageError) as caught:
        build_encoder(spec_of("timm:resnet18.\x1b[2J"))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "num_classes", "in_chans",
     "weights", "weights_backbone", "features_only"],
)  # fmt: skip
def test_arguments_that_read_files_or_are_set_here_are_refused(name):
    with pytest.raises(UsageError, match=f"must not set '{name}'"):
        build_encoder(spec_of("timm:resnet18", arguments={name: "x"}))


@pytest.mark.parametrize("arguments", [{"embed_dim": 10**9}, {"layers": [10**9, 1, 1, 1]}])
def test_arguments_beyond_reason_are_refused(arguments):
    with pytest.raises(UsageError, match="must lie within"):
        build_encoder(spec_of("timm:resnet18", arguments=arguments))


def test_image_size_beyond_reason_is_refused():
    with pytest.raises(UsageError, match="at most 4096 pixels"):
        build_encoder(spec_of("timm:resnet18", image_size=100_000))


@pytest.mark.parametrize(
    "arguments", [{"no_such_argument": 1}, {"layers": "many"}, {"act_layer": "x"}, {"block": "x"}]
)
def test_arguments_the_constructor_refuses_are_usage_errors(arguments):
    with pytest.raises(UsageError, match="timm:resnet18 cannot be built with"):
        build_encoder(spec_of("timm:resnet18", arguments=arguments))


def test_arguments_the_forward_pass_refuses_are_usage_errors():
    with pytest.raises(UsageError, match="cannot take images of 32x32 pixels"):
        build_encoder(spec_of("timm:resnet18", arguments={"channels": [8]}))


def test_image_size_that_does_not_fit_the_patch_is_refused(vit_spec):
    with pytest.raises(UsageError, match="multiple of the patch size 4, got 30"):
        build_encoder(vit_spec.model_copy(update={"image_size": 30}))


def test_image_size_that_does_not_fit_the_torchvision_patch_is_refused():
    with pytest.raises(UsageError, match="torchvision:vit_b_16 cannot be built"):
        build_encoder(spec_of("torchvision:vit_b_16", image_size=40))


def test_image_size_that_contradicts_an_argument_is_refused(vit_spec):
    arguments = {**vit_spec.arguments, "img_size": 64}
    with pytest.raises(UsageError, match="img_size = 64 contradicts image_size 32"):
        build_encoder(vit_spec.model_copy(update={"arguments": arguments}))


def test_encoder_without_pooling_is_refused():
    with pytest.raises(UsageError, match="one feature vector per image"):
        build_encoder(spec_of("timm:resnet18", arguments={"global_pool": ""}))


def test_torchvision_refuses_gray_images():
    with pytest.raises(UsageError, match="take 3 channels, got in_channels = 1"):
        build_encoder(spec_of("torchvision:resnet18", in_channels=1))


def test_torchvision_without_linear_classifier_is_refused():
    with pytest.raises(UsageError, match="no linear classifier"):
        build_encoder(spec_of("torchvision:squeezenet1_1"))


def test_torchvision_dropout_before_the_classifier_is_removed():
    backbone = build_encoder(spec_of("torchvision:mobilenet_v3_small"), seed=0).backbone
    kept = backbone.get_submodule("classifier").children()
    assert [type(layer) for layer in kept] == [nn.Linear, nn.Hardswish]
