"""Losses at the taps of real encoders: the same on every path, in every arrangement of memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.config import EncoderSpec, LossSettings, Settings
from mimic_fast.data.loader import Batch, TrainingImages
from mimic_fast.distributed import SINGLE, start
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.layer_losses import summed, teacher_side
from mimic_fast.losses import weighted_attention_loss
from mimic_fast.step import Student, step_losses
from mimic_fast.training import Task, train

RESNET = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2},
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
ATTEND = LossSettings(attention_weight=0.01)
SPECS = {"resnet": RESNET, "vit": VIT}


def pair(spec: EncoderSpec) -> tuple[Student, TappedEncoder]:
    student, teacher = build_encoder(spec, seed=1), build_encoder(spec, seed=2)
    taps = default_taps(teacher)
    frozen = TappedEncoder(teacher.requires_grad_(False), taps).eval()
    return Student(TappedEncoder(student, taps), projection=0, seed=0), frozen


def images(spec: EncoderSpec, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, spec.image_size, spec.image_size, generator=generator)


def step(spec: EncoderSpec, path: ops.Path, **loss: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Terms and parameter gradients of one step on a path."""
    student, teacher = pair(spec)
    batch = Batch(v1=images(spec), v2=None, ids=torch.arange(4))
    settings = Settings(loss=LossSettings(attention_weight=0.01, **loss))
    weights = tuple(1000.0 + 500 * n for n in range(len(teacher.taps)))
    with ops.force(path):
        losses = step_losses(
            student, teacher, batch, batch.v1, weights, settings=settings, processes=SINGLE
        )
    losses.total.backward()
    terms = [losses.total, losses.clone, losses.attention, losses.dense]
    return terms, [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("path", ["cpp", "triton"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "loss",
    [{}, {"dense": 2.0, "clone_form": "mse"}, {"dense": 2.0, "attention_power": 1.5}],
    ids=["attention", "dense-mse", "dense-cosine"],
)
def test_a_step_is_the_same_on_every_path(spec, path, loss):
    found, gradients = step(SPECS[spec], path, **loss)

    expected, wanted = step(SPECS[spec], "reference", **loss)
    for own, value in zip(found, expected, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-7)
    for own, value in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


def test_attention_at_the_taps_is_that_of_the_feature_maps():
    student, teacher = pair(VIT)
    settings = LossSettings(attention_weight=0.01)
    weights = (1000.0, 0.0, 3000.0)

    side = teacher_side(teacher, images(VIT), weights, settings=settings)
    features, _ = student(images(VIT), side.listener)
    attention, dense = summed(side.listener, zero=features.sum() * 0)

    expected = weighted_attention_loss(
        student.tapped(images(VIT))[1], teacher(images(VIT))[1], weights, settings=settings
    )
    torch.testing.assert_close(attention, expected, rtol=1e-5, atol=0)
    assert dense == 0


def test_dense_loss_is_the_clone_loss_at_the_last_tap_without_the_class_token():
    student, teacher = pair(VIT)
    settings = LossSettings(attention_weight=0, dense=3.0, clone_form="cosine")

    side = teacher_side(teacher, images(VIT), (0.0,) * 3, settings=settings)
    features, _ = student(images(VIT), side.listener)
    attention, dense = summed(side.listener, zero=features.sum() * 0)

    own, other = student.tapped(images(VIT))[1][-1], teacher(images(VIT))[1][-1]
    cosine = nn.functional.cosine_similarity(own, other, dim=1).mean()
    torch.testing.assert_close(dense, -3 * cosine, rtol=1e-5, atol=0)
    assert attention == 0


def test_teacher_leaves_maps_and_no_activation():
    _, teacher = pair(RESNET)

    side = teacher_side(teacher, images(RESNET), (1.0,) * 4, settings=LossSettings())

    assert isinstance(side.listener, ops.LayerLosses)
    for target, positions in zip(side.listener.targets, (256, 64, 16, 4), strict=True):
        assert target is not None
        assert target.teacher is None
        assert target.power is not None
        assert target.power.shape == (4, positions)
        assert target.power.untyped_storage().nbytes() == 4 * 4 * positions


class InPlace(nn.Module):
    """Tapped before an activation that overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.act(self.first(images))).mean((2, 3))


def test_a_tap_that_is_overwritten_afterwards_teaches_what_is_there_then():
    torch.manual_seed(0)
    spec = EncoderSpec(
        architecture="timm:resnet18", image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    tapped = [TappedEncoder(Encoder(spec, InPlace(), feature_dim=5), ("first",)) for _ in range(2)]
    student, teacher = Student(tapped[0], projection=0, seed=0), tapped[1].eval()
    view = torch.rand(2, 3, 8, 8)

    def attention(path: ops.Path) -> tuple[Tensor, Tensor]:
        with ops.force(path):
            settings = LossSettings(attention_weight=1.0)
            side = teacher_side(teacher, view, (7.0,), settings=settings)
            features, _ = student(view, side.listener)
            loss, _ = summed(side.listener, zero=features.sum())
        weight = student.get_parameter("tapped.encoder.backbone.first.weight")
        return loss, torch.autograd.grad(loss + features.sum(), weight)[0]

    for own, value in zip(attention("cpp"), attention("reference"), strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_no_default_tap_is_overwritten(spec):
    _, teacher = pair(SPECS[spec])

    side = teacher_side(teacher, images(SPECS[spec]), (1.0,) * len(teacher.taps), settings=ATTEND)

    assert isinstance(side.listener, ops.LayerLosses)
    assert side.listener.live == frozenset()


@pytest.mark.parametrize("spec", SPECS)
def test_twenty_steps_give_the_losses_of_the_reference(spec, tmp_path):
    def curve(path: ops.Path) -> list[dict[str, Any]]:
        student, teacher = pair(SPECS[spec])
        out = tmp_path / path
        settings = Settings.model_validate(
            {
                "loss": {"attention_weight": 0.001, "dense": 0.5},
                "optim": {"name": "sgd", "lr": 0.01, "epochs": 5, "batch_size": 8},
                "run": {"out": out, "device": "cpu"},
            }
        )
        pool = (images(SPECS[spec], 32) * 255).to(torch.uint8)
        task = Task(
            student=student,
            teacher=teacher,
            layer_weights=(1000.0,) * len(teacher.taps),
            images=TrainingImages(squares=pool),
            out=out,
        )
        accelerator, processes = start(settings.run, settings.optim, expected_world=1)
        with ops.force(path):
            train(task, settings=settings, accelerator=accelerator, processes=processes)
        return read_rows(out)

    fused, plain = curve("cpp"), curve("reference")

    assert len(fused) == 20
    taps = len(default_taps(build_encoder(SPECS[spec], seed=0)))
    for row, expected in zip(fused, plain, strict=True):
        # the teacher's maps (not of the dense tap), the student's taps, the features
        assert row["ops"] == {"distill/cpp": (taps - 1) + taps + 1}
        assert set(expected["ops"]) == {"distill/reference"}
        for term in ("loss", "clone", "dense", "attention"):
            assert row[term] == pytest.approx(expected[term], rel=1e-5, abs=1e-7), term


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
