import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mimic_fast.config import EncoderSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.names import efficientnet_pytorch
from mimic_fast.errors import UsageError


@pytest.fixture
def settings_of():
    """Everything that the weights of the small encoders do not show."""

    def build(spec) -> EncoderSettings:
        return EncoderSettings(
            stem=spec.stem,
            arguments={"num_heads": 2} if "vit" in spec.architecture else None,
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
        )

    return build


def write(path, tensors, how):
    if how == "safetensors":
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=how == "torch")
    return path


@pytest.mark.parametrize("how", ["safetensors", "torch", "torch-legacy"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder.", "f."])
def test_weights_are_loaded_exactly(tmp_path, trained, spec, settings_of, images, how, prefix):
    source = trained(spec, seed=4)
    tensors = {prefix + k: v for k, v in source.backbone.state_dict().items()}
    tensors["head.weight"] = torch.zeros(3)
    path = write(tmp_path / "teacher.bin", tensors, how)

    loaded = load_encoder(path, settings_of(spec))

    assert loaded.encoder.spec == spec
    assert loaded.format == how.removesuffix("-legacy")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.key_map == {k: prefix + k for k in source.backbone.state_dict()}
    assert loaded.unused == ("head.weight",)
    assert not loaded.encoder.training
    state = loaded.encoder.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in source.state_dict().items())
    assert torch.equal(loaded.encoder(images), source(images))


def test_torchvision_resnet_file_gives_torchvisions_features(tmp_path, images):
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    original = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    path = write(tmp_path / "x.pth", original.state_dict(), "torch")

    loaded = load_encoder(path, EncoderSettings(image_size=32, mean=(0,) * 3, std=(1,) * 3))
    original.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    assert loaded.unused == ("fc.weight", "fc.bias")
    torch.testing.assert_close(loaded.encoder(images), original(images))


@pytest.mark.parametrize(
    ("stem", "pooled", "prefix"),
    [("small_stride1", False, "f.f."), ("native", True, ""), ("small_stride1", True, "encoder.")],
    ids=["badencoder", "sequential", "sequential-with-identity"],
)
def test_resnet_inside_a_sequence_is_loaded(
    tmp_path, trained, resnet_spec, images, stem, pooled, prefix
):
    spec = resnet_spec.model_copy(update={"stem": stem})
    source = trained(spec)
    children = dict(source.backbone.named_children())
    children.pop("fc")
    if not pooled:
        children.pop("maxpool")
    sequence = nn.Sequential(*children.values())
    tensors = {prefix + key: tensor for key, tensor in sequence.state_dict().items()}
    tensors["g.0.weight"] = torch.zeros(2)
    path = write(tmp_path / "model_1000.pth", tensors, "torch")
    given_stem = None if stem == "native" else stem

    loaded = load_encoder(
        path, EncoderSettings(stem=given_stem, image_size=32, mean=spec.mean, std=spec.std)
    )

    assert loaded.encoder.spec == spec
    assert loaded.key_map["layer1.0.conv1.weight"] == f"{prefix}{4 if pooled else 3}.0.conv1.weight"
    assert torch.equal(loaded.encoder(images), source(images))
    assert torch.equal(sequence.eval()((images - 0.5) / 0.25).flatten(1), source(images))


def test_efficientnet_under_its_published_names_is_loaded(tmp_path, trained, resnet_spec, images):
    spec = resnet_spec.model_copy(
        update={"architecture": "timm:tf_efficientnet_lite0", "arguments": {}, "stem": "native"}
    )
    source = trained(spec)
    tensors = source.backbone.state_dict()
    renamed = {name: tensors[key] for key, name in efficientnet_pytorch(tensors).items()}
    path = write(tmp_path / "x.pth", {**renamed, "_fc.bias": torch.zeros(9)}, "torch-legacy")

    loaded = load_encoder(path, EncoderSettings(image_size=32, mean=spec.mean, std=spec.std))

    assert loaded.encoder.spec == spec
    assert loaded.unused == ("_fc.bias",)
    assert torch.equal(loaded.encoder(images), source(images))


def test_half_precision_file_is_reported_and_widened(tmp_path, trained, spec, settings_of):
    source = trained(spec).half()
    path = write(tmp_path / "x.safetensors", source.backbone.state_dict(), "safetensors")

    loaded = load_encoder(path, settings_of(spec))

    assert {loaded.dtypes[k] for k in loaded.key_map if k.endswith("weight")} == {torch.float16}
    for key, tensor in loaded.encoder.backbone.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(tensor, source.backbone.state_dict()[key].to(tensor.dtype))


def test_absent_batch_counters_start_at_zero(tmp_path, trained, resnet_spec, settings_of):
    state = trained(resnet_spec).backbone.state_dict()
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    path = write(tmp_path / "x.pth", kept, "torch")
    loaded = load_encoder(path, settings_of(resnet_spec))
    assert loaded.key_map.keys() == kept.keys()
    assert loaded.encoder.backbone.get_buffer("bn1.num_batches_tracked").item() == 0


def test_loading_leaves_the_random_state_untouched(tmp_path, trained, spec, settings_of):
    path = write(tmp_path / "x.pth", trained(spec).backbone.state_dict(), "torch")
    before = torch.get_rng_state()
    load_encoder(path, settings_of(spec))
    assert torch.equal(torch.get_rng_state(), before)


def test_student_does_not_depend_on_the_teacher(tmp_path, trained, spec, settings_of):
    students = []
    for seed in (1, 2):
        path = write(tmp_path / f"{seed}.pth", trained(spec, seed).backbone.state_dict(), "torch")
        loaded = load_encoder(path, settings_of(spec))
        students.append(build_encoder(loaded.encoder.spec, seed=7))
    one, two = (dict([*s.named_parameters(), *s.named_buffers()]) for s in students)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_encoder_does_not_share_memory_with_the_file(tmp_path, trained, resnet_spec, settings_of):
    path = write(tmp_path / "x.pth", trained(resnet_spec).backbone.state_dict(), "torch")
    loaded = load_encoder(path, settings_of(resnet_spec))
    before = path.read_bytes()
    with torch.no_grad():
        loaded.encoder.backbone.get_parameter("conv1.weight").zero_()
    assert path.read_bytes() == before


def test_wrong_architecture_is_a_usage_error(tmp_path, trained, spec, settings_of):
    path = write(tmp_path / "x.pth", trained(spec).backbone.state_dict(), "torch")
    with pytest.raises(UsageError, match=r"lacks \d+ of \d+ weights of timm:convnext_atto: stem"):
        load_encoder(path, EncoderSettings(architecture="timm:convnext_atto"))


def test_wrong_number_type_is_a_usage_error(tmp_path, trained, resnet_spec, settings_of):
    state = {**trained(resnet_spec).backbone.state_dict(), "bn1.bias": torch.zeros(64).int()}
    path = write(tmp_path / "x.pth", state, "torch")
    with pytest.raises(UsageError, match=r"'bn1.bias' has type torch.int32"):
        load_encoder(path, settings_of(resnet_spec))
