"""The demo-style loop minimizes what we minimize, by the work it is said to do."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.demo_style import (
    StudentModel,
    TwoViews,
    demo_losses,
    demo_style_steps,
    stage_maps,
)
from mimic_fast.config import EncoderSpec
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.recipe import load_settings
from mimic_fast.step import Student, step_losses

WEIGHTS = (1500.0, 2000.0, 3500.0, 7000.0)
TERMS = ("total", "clone", "attention", "contrastive")
SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 16]},
    stem="small_stride1",
    image_size=32,
    mean=(0.5, 0.46875, 0.4375),  # exact in float32, in which the encoder keeps them
    std=(0.25, 0.25, 0.3125),
)


@dataclass
class Both:
    """One student and teacher in two copies, and two views of five images."""

    student: Student
    teacher: TappedEncoder
    demo_student: StudentModel
    demo_teacher: torch.nn.Module
    v1: Tensor
    v2: Tensor

    def ours(self, second: Tensor):
        return step_losses(
            self.student,
            self.teacher,
            Batch(v1=self.v1, v2=second, ids=torch.arange(len(self.v1))),
            self.v1,
            WEIGHTS,
            settings=load_settings(preset="official"),
            processes=SINGLE,
        )

    def demo(self, second: Tensor):
        views = (normalized(self.v1), normalized(second))
        return demo_losses(self.demo_student, self.demo_teacher, *views, WEIGHTS, 0.5)


def both(dtype: torch.dtype, *, training: bool = False) -> Both:
    generator = torch.Generator().manual_seed(0)

    def encoder(seed: int) -> TappedEncoder:
        built = build_encoder(SPEC, seed=seed)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.ndim == 1:  # random encoders end their blocks with a scale of 0
                    parameter.add_(torch.rand(parameter.shape, generator=generator) / 2)
        return TappedEncoder(built, default_taps(built)).to(dtype)

    student = Student(encoder(1), projection=16, seed=3).to(dtype).train(training)
    teacher = encoder(2).eval().requires_grad_(False)
    twin = copy.deepcopy(student)
    assert twin.projection is not None
    v1, v2 = torch.rand(2, 5, 3, 32, 32, generator=generator).to(dtype)
    return Both(
        student=student,
        teacher=teacher,
        demo_student=StudentModel(twin.tapped.encoder.backbone, twin.projection),
        demo_teacher=copy.deepcopy(teacher).encoder.backbone.requires_grad_(True),
        v1=v1,
        v2=v2,
    )


def normalized(images: Tensor) -> Tensor:
    mean, std = images.new_tensor(SPEC.mean), images.new_tensor(SPEC.std)
    return (images - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-10)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("training", [False, True], ids=["two views", "one view in training mode"])
def test_losses_equal_ours(dtype, tolerance, training):
    # Batch normalization in training mode sees both views at once in ours and one at a time in the
    # demo's loop: the statistics agree where the views do.
    pair = both(dtype, training=training)
    second = pair.v1 if training else pair.v2

    with torch.no_grad():
        ours, demo = pair.ours(second), pair.demo(second)

    for term in TERMS:
        own, other = getattr(ours, term), getattr(demo, term)
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
        assert math.isfinite(own), term
        assert abs(own) > 1e-3, term


def test_student_gradients_equal_ours():
    pair = both(torch.float64)

    pair.ours(pair.v2).total.backward()
    pair.demo(pair.v2).total.backward()

    ours = dict(pair.student.tapped.encoder.backbone.named_parameters())
    assert pair.student.projection is not None
    head = dict(pair.student.projection.named_parameters())
    for name, parameter in pair.demo_student.named_parameters():
        part, _, key = name.partition(".")
        own = (ours if part == "backbone" else head)[key].grad
        torch.testing.assert_close(own, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_step_makes_three_student_and_two_teacher_forwards():
    pair = both(torch.float64)
    counts = {"student": 0, "teacher": 0}
    for name, backbone in (
        ("student", pair.demo_student.backbone),
        ("teacher", pair.demo_teacher),
    ):
        backbone.get_submodule("layer4").register_forward_hook(
            lambda *_, name=name: counts.update({name: counts[name] + 1})
        )

    pair.demo(pair.v2)

    assert counts == {"student": 3, "teacher": 2}


def test_only_the_clone_loss_flows_into_the_teacher():
    pair = both(torch.float64)
    losses = pair.demo(pair.v2)
    parameters = list(pair.demo_teacher.parameters())

    whole = torch.autograd.grad(losses.total, parameters, retain_graph=True)
    clone = torch.autograd.grad(losses.clone, parameters)

    assert max(float(gradient.abs().max()) for gradient in clone) > 1e-6
    torch.testing.assert_close(whole, clone, rtol=1e-8, atol=1e-12)


def test_stage_maps_equal_the_hooked_taps():
    pair = both(torch.float64)

    with torch.no_grad():
        _, ours = pair.student.tapped(pair.v1)
        demo = stage_maps(pair.demo_student.backbone, normalized(pair.v1))

    torch.testing.assert_close(list(ours), demo, rtol=1e-10, atol=1e-12)


def test_steps_train_the_student_and_leave_the_teacher():
    pair = both(torch.float32)
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    dataset = TwoViews(images, image_size=32, mean=SPEC.mean, std=SPEC.std)
    student = copy.deepcopy(pair.demo_student.state_dict())
    teacher = copy.deepcopy(pair.demo_teacher.state_dict())

    losses = list(
        demo_style_steps(
            pair.demo_student,
            pair.demo_teacher,
            dataset,
            WEIGHTS,
            batch_size=4,
            epochs=3,
            seed=0,
        )
    )

    assert len(losses) == 3 * (9 // 4)
    assert all(map(math.isfinite, losses))
    torch.testing.assert_close(pair.demo_teacher.state_dict(), teacher, rtol=0, atol=0)
    assert all(
        not torch.equal(student[name], parameter)
        for name, parameter in pair.demo_student.named_parameters()
    )


def test_views_are_augmented_apart_and_normalized():
    images = torch.full((2, 3, 40, 40), 255, dtype=torch.uint8)
    noise = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    torch.manual_seed(0)

    white, _ = TwoViews(images, image_size=32, mean=SPEC.mean, std=SPEC.std)[0]
    first, second = TwoViews(noise, image_size=32, mean=SPEC.mean, std=SPEC.std)[1]

    largest = (1 - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
    assert white.shape == first.shape == (3, 32, 32)
    assert (white.amax(dim=(1, 2)) <= largest + 1e-5).all()
    assert not torch.equal(first, second)
