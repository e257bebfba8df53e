import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_fast.config import EncoderSettings, EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.names import efficientnet_pytorch
from mimic_fast.encoders.recognise import recognise_spec
from mimic_fast.errors import MimicError, UnsafeInputError, UsageError

NOTHING = EncoderSettings()
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT = {"patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}


def spec_of(architecture: str, arguments=None, **changes) -> EncoderSpec:
    channels = changes.get("in_channels", 3)
    fields = {"image_size": 32, "mean": (0.5,) * channels, "std": (0.5,) * channels} | changes
    return EncoderSpec(architecture=architecture, arguments=arguments or {}, **fields)


def weights_of(architecture: str, arguments=None, **changes) -> dict[str, torch.Tensor]:
    encoder = build_encoder(spec_of(architecture, arguments, **changes), seed=0)
    return dict(encoder.backbone.state_dict())


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("timm:resnet18", {}),
        ("timm:resnet34", {"channels": [8, 16, 32, 64]}),
        ("timm:resnet18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}),
        ("timm:resnet50", {"channels": [8, 16, 32, 64]}),
        ("timm:resnet50", {"layers": [1, 2, 1, 1], "channels": [8, 16, 32, 64]}),
        ("timm:resnet50", {"channels": [32, 32, 32, 32], "cardinality": 8, "base_width": 4}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_resnet_is_recognised_from_its_weights(architecture, arguments, prefix):
    tensors = {prefix + key: t for key, t in weights_of(architecture, arguments).items()}

    found = recognise_spec(tensors, NOTHING, None)

    assert found.spec == EncoderSpec(
        architecture=architecture,
        arguments=arguments,
        image_size=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
    assert found.assumed == ("image_size", "mean", "std")


def test_torchvision_resnet_is_recognised_as_timms():
    assert recognise_spec(weights_of("torchvision:resnet18"), NOTHING, None).spec.architecture == (
        "timm:resnet18"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        VIT,
        VIT | {"reg_tokens": 4},
        VIT | {"reg_tokens": 4, "no_embed_class": True},
        VIT | {"class_token": False, "global_pool": "avg", "fc_norm": True},
        VIT | {"class_token": False, "global_pool": "avg", "fc_norm": False},
        VIT | {"mlp_ratio": 2.0, "qkv_bias": False},
        VIT | {"init_values": 1e-5},
    ],
    ids=lambda arguments: "-".join(sorted(arguments.keys() - VIT.keys())) or "plain",
)
def test_vit_is_recognised_from_its_weights(arguments):
    found = recognise_spec(weights_of("timm:vit_tiny_patch16_224", arguments), NOTHING, None)

    assert found.spec.architecture == "timm:vit_tiny_patch16_224"
    assert found.spec.arguments == arguments
    assert found.spec.image_size == 32
    assert found.assumed == ("mean", "std", "arguments.num_heads")


def test_vit_heads_that_cannot_be_told_are_asked_for():
    tensors = weights_of("timm:vit_tiny_patch16_224", VIT | {"embed_dim": 96, "num_heads": 3})
    with pytest.raises(UsageError, match=r"give --set encoder.arguments.num_heads=N"):
        recognise_spec(tensors, NOTHING, None)

    found = recognise_spec(tensors, EncoderSettings(arguments={"num_heads": 3}), None)
    assert found.spec.arguments == VIT | {"embed_dim": 96, "num_heads": 3}
    assert found.assumed == ("mean", "std")


def test_small_stem_stride_is_asked_for():
    tensors = weights_of("timm:resnet18", stem="small_stride2")
    with pytest.raises(UsageError, match=r"cannot tell stem .* --set encoder.stem=small_stride1"):
        recognise_spec(tensors, NOTHING, None)

    found = recognise_spec(tensors, EncoderSettings(stem="small_stride2"), None)
    assert (found.spec.stem, found.spec.image_size) == ("small_stride2", 32)


def test_gray_weights_are_recognised_with_plain_normalization():
    found = recognise_spec(weights_of("timm:resnet18", in_channels=1), NOTHING, None)
    assert (found.spec.in_channels, found.spec.mean, found.spec.std) == (1, (0.5,), (0.5,))


def test_efficientnet_lite0_is_recognised_by_its_published_names():
    tensors = weights_of("timm:tf_efficientnet_lite0")
    renamed = {name: tensors[key] for key, name in efficientnet_pytorch(tensors).items()}

    found = recognise_spec(renamed, NOTHING, None)

    assert found.spec == spec_of("timm:tf_efficientnet_lite0", image_size=224)
    assert found.assumed == ("image_size", "mean", "std")


def test_unknown_weights_ask_for_the_architecture():
    with pytest.raises(UsageError, match=r"--set encoder\.architecture=timm:resnet18"):
        recognise_spec({"a.weight": torch.zeros(2)}, NOTHING, None)


def test_settings_win_over_card_and_weights():
    card = {"spec": spec_of("timm:resnet18", image_size=64).model_dump(mode="json")}
    given = EncoderSettings(image_size=48, mean=(0.1, 0.2, 0.3))

    found = recognise_spec(weights_of("timm:resnet34"), given, card)

    assert found.spec == spec_of("timm:resnet18", image_size=48, mean=(0.1, 0.2, 0.3))
    assert found.assumed == ()


def test_arguments_of_another_architecture_are_dropped():
    card = {"spec": spec_of("timm:resnet18", {"layers": [1, 1, 1, 1]}).model_dump(mode="json")}
    found = recognise_spec({}, EncoderSettings(architecture="timm:convnext_atto"), card)
    assert found.spec == spec_of("timm:convnext_atto")


def test_given_architecture_needs_no_recognition():
    found = recognise_spec({}, EncoderSettings(architecture="torchvision:vit_b_16"), None)
    assert found.spec.architecture == "torchvision:vit_b_16"
    assert found.assumed == ("image_size", "mean", "std")


@pytest.mark.parametrize(
    "damage",
    [{"architecture": "os:system"}, {"std": [0, 0, 0]}, {"extra": 1}, {"mean": [float("nan")] * 3},
     {"image_size": "many"}, {"arguments": {"x": {"y": 1}}}],
    ids=str,
)  # fmt: skip
def test_card_that_is_not_valid_is_unsafe(damage):
    card = {"spec": spec_of("timm:resnet18").model_dump(mode="json") | damage}
    with pytest.raises(UnsafeInputError, match="card is not valid"):
        recognise_spec({}, NOTHING, card)


def test_settings_that_contradict_each_other_are_usage_errors():
    with pytest.raises(UsageError, match="mean needs 3 values"):
        recognise_spec(weights_of("timm:resnet18"), EncoderSettings(mean=(0.5,)), None)


KEYS = [
    "conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight",
    "layer1.0.conv3.weight", "layer2.0.conv2.weight", "layer3.0.conv2.weight",
    "layer4.0.conv2.weight", "0.weight", "1.running_mean", "3.0.conv1.weight", "pos_embed",
    "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "reg_token",
    "cls_token", "_conv_head.weight", "module.conv1.weight",
]  # fmt: skip


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(0, 5), max_size=4).map(torch.zeros))
)
def test_hostile_shapes_never_break_recognition(tensors):
    with contextlib.suppress(MimicError):
        recognise_spec(tensors, NOTHING, None)


@pytest.mark.parametrize("keys", [KEYS[:8], KEYS[11:15]], ids=["resnet", "vit"])
def test_known_names_with_impossible_shapes_are_not_recognised(keys):
    with pytest.raises(UsageError, match="cannot tell the architecture"):
        recognise_spec({key: torch.zeros(0) for key in keys}, NOTHING, None)
