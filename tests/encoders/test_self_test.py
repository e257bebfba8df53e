from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.self_test import self_test
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import SelfTestError, UsageError


class Detach(nn.Module):
    """A layer through which no gradient flows."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.detach()


def student_of(spec, *taps: str) -> TappedEncoder:
    encoder = build_encoder(spec, seed=100)
    return TappedEncoder(encoder, taps or default_taps(encoder))


def wrapped(spec, tap: str, layer: nn.Module, *, seed: int, first: bool) -> TappedEncoder:
    """A ResNet with a layer before it or in its first stage, tapped there and at its last stage."""
    backbone = build_encoder(spec, seed=seed).backbone
    if first:
        whole = nn.Sequential(OrderedDict([(tap, layer), ("net", backbone)]))
        taps = (tap, "net.layer4")
    else:
        backbone.get_submodule("layer1").add_module(tap, layer)
        whole = nn.Sequential(OrderedDict([("net", backbone)]))
        taps = (f"net.layer1.{tap}", "net.layer4")
    return TappedEncoder(Encoder(spec, whole, feature_dim=64), taps)


def test_different_encoders_pass(tapped, spec, images):
    self_test(student_of(spec), tapped(spec), images)


def test_native_stem_with_a_last_stage_of_one_position_passes(trained, resnet_spec, images):
    spec = resnet_spec.model_copy(update={"stem": "native"})
    encoder = trained(spec)
    self_test(student_of(spec), TappedEncoder(encoder, default_taps(encoder)), images)


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Upsample(16), nn.AvgPool2d(2)], ids=repr)
def test_tap_on_the_raw_input_is_dead(resnet_spec, images, layer):
    student = wrapped(resnet_spec, "resize", layer, seed=1, first=True)
    teacher = wrapped(resnet_spec, "resize", layer, seed=2, first=True)
    with pytest.raises(SelfTestError, match=r"tap 'resize' is dead: its attention loss is 0"):
        self_test(student, teacher, images)


def test_tap_without_gradient_is_dead(resnet_spec, images):
    student = wrapped(resnet_spec, "cut", Detach(), seed=1, first=False)
    teacher = wrapped(resnet_spec, "cut", Detach(), seed=2, first=False)
    with pytest.raises(SelfTestError, match=r"tap 'net.layer1.cut' is dead: no gradient"):
        self_test(student, teacher, images)


def test_tap_of_one_position_without_gradient_is_dead(trained, resnet_spec, images):
    teacher, student = (
        Encoder(
            resnet_spec,
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Identity(), nn.Conv2d(3, 4, 1), nn.Flatten()),
            feature_dim=4,
        )
        for _ in range(2)
    )
    with pytest.raises(SelfTestError, match=r"tap '1' is dead: no gradient"):
        self_test(TappedEncoder(student, ("1",)), TappedEncoder(teacher, ("1",)), images)


def test_tap_that_is_the_same_for_every_image_is_dead(tapped, resnet_spec, images):
    teacher = tapped(resnet_spec)
    with torch.no_grad():
        for parameter in teacher.encoder.backbone.layer3.parameters():
            parameter.zero_()
    with pytest.raises(
        SelfTestError, match=r"tap 'layer3' is dead: the teacher's .* same for every"
    ):
        self_test(student_of(resnet_spec), teacher, images)


def test_dead_student_tap_is_named_with_its_side(tapped, resnet_spec, images):
    student = student_of(resnet_spec)
    with torch.no_grad():
        for parameter in student.encoder.backbone.get_submodule("layer2").parameters():
            parameter.zero_()
    with pytest.raises(SelfTestError, match=r"tap 'layer2' is dead: the student's"):
        self_test(student, tapped(resnet_spec), images)


def test_tap_that_is_not_finite_is_dead(tapped, resnet_spec, images):
    teacher = tapped(resnet_spec)
    # Finite in the file, not in the map: the square root of a negative variance.
    teacher.encoder.backbone.layer2[0].bn1.running_var.fill_(-1)
    with pytest.raises(SelfTestError, match=r"tap 'layer2' is dead: .* is not finite"):
        self_test(student_of(resnet_spec), teacher, images)


def test_features_that_are_zero_are_refused(tapped, resnet_spec, images):
    student, teacher = student_of(resnet_spec, "layer1"), tapped(resnet_spec, "layer1")
    with torch.no_grad():
        for parameter in teacher.encoder.backbone.layer4.parameters():
            parameter.zero_()
    with pytest.raises(SelfTestError, match="teacher's features are zero"):
        self_test(student, teacher, images)


def test_two_taps_on_one_tensor_are_duplicates(tapped, vit_spec, images):
    taps = ("blocks.0", "pos_drop", "norm_pre")
    with pytest.raises(SelfTestError, match="taps 'pos_drop' and 'norm_pre' are duplicates"):
        self_test(student_of(vit_spec, *taps), tapped(vit_spec, *taps), images)


def test_student_with_the_teachers_weights_is_refused(tapped, spec, images):
    with pytest.raises(SelfTestError, match="its attention loss is 0"):
        self_test(tapped(spec), tapped(spec), images)


def test_frozen_student_is_refused(tapped, spec, images):
    with pytest.raises(SelfTestError, match="no trainable parameters"):
        self_test(student_of(spec).requires_grad_(False), tapped(spec), images)


def test_other_architecture_is_refused(tapped, resnet_spec, images):
    wide = resnet_spec.model_copy(
        update={"arguments": {"layers": [1, 1, 1, 1], "channels": [12, 16, 32, 64]}}
    )
    with pytest.raises(SelfTestError, match=r"tap 'layer1' differs in shape"):
        self_test(student_of(resnet_spec), tapped(wide), images)


@pytest.mark.parametrize("count", [1, 2], ids=["one-image", "two-equal-images"])
def test_images_that_cannot_show_it_are_refused(tapped, resnet_spec, images, count):
    same = images[:1].expand(count, -1, -1, -1)
    with pytest.raises(UsageError, match="two different images"):
        self_test(student_of(resnet_spec), tapped(resnet_spec), same)


def test_everything_is_left_as_it_was(tapped, spec, images):
    student, teacher = student_of(spec), tapped(spec).requires_grad_(False)
    student.train()
    student.pooled(images, pool="mean")[0].sum().backward()
    state = {
        "student": {k: v.clone() for k, v in student.state_dict().items()},
        "teacher": {k: v.clone() for k, v in teacher.state_dict().items()},
        "gradients": {
            k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None
        },
    }
    random = torch.get_rng_state()

    self_test(student, teacher, images)

    after = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "gradients": {k: p.grad for k, p in student.named_parameters() if p.grad is not None},
    }
    for kind, tensors in state.items():
        assert tensors.keys() == after[kind].keys()
        assert all(torch.equal(tensor, after[kind][key]) for key, tensor in tensors.items()), kind
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in student.modules())
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_calling_without_gradients_enabled_still_works(tapped, resnet_spec, images):
    with torch.no_grad():
        self_test(student_of(resnet_spec), tapped(resnet_spec), images)
