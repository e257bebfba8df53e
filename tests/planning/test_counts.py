"""What is counted of a step, against figures known otherwise."""

import pytest
import torch

from mimic_fast import ops
from mimic_fast.encoders.recognise import recognise_spec
from mimic_fast.kernels.ownership import sole_holder
from mimic_fast.planning.counts import Counts, count
from mimic_fast.recipe import load_settings


def counted(architecture: str, *overrides: str, size: int = 224, on_gpu: bool = True) -> Counts:
    encoder = [f"encoder.architecture={architecture}", f"encoder.image_size={size}"]
    run = load_settings(overrides=[*encoder, *overrides])
    spec = recognise_spec({}, run.encoder, None).spec
    return count(spec, run, path="triton", on_gpu=on_gpu)


def images_peak(counts: Counts, images: int) -> float:
    step = counts.operations
    return float((step.fixed + images * step.per_image + step.gradients).max())


def test_weights_moments_and_work_of_a_vit_are_the_published_ones():
    counts = counted("timm:vit_base_patch16_224")

    assert counts.numbers == 85_798_656  # ViT-B/16 without its classifier
    assert counts.weights == counts.teacher == 4 * counts.numbers
    assert counts.moments == pytest.approx(2 * counts.weights, rel=1e-4)
    # 17.6 GMAC an image, attention included; the student alone, the teacher's answers are kept.
    forward = counts.flops.forward
    assert forward.convolutions + forward.products == pytest.approx(2 * 17.56e9, rel=0.01)
    assert counts.flops.backward.products == pytest.approx(2 * forward.products, rel=0.03)
    assert counts.student_parts.largest == 28_351_488  # one of twelve equal blocks
    assert counts.student_parts.rest + 12 * counts.student_parts.largest == counts.weights


def test_work_of_grouped_convolutions_is_not_that_of_whole_ones():
    flops = counted("timm:mobilenetv2_050", size=64).flops

    # The student's backward is twice its forward, less the gradient of the image.
    assert flops.backward.convolutions == pytest.approx(2 * flops.forward.convolutions, rel=0.03)


def test_a_teacher_that_runs_in_every_step_is_counted_there():
    kept = counted("timm:resnet18", size=64).flops
    for setting in ("loss.teacher_memory=false", "loss.teacher_view=same", "loss.dense=1"):
        every = counted("timm:resnet18", setting, size=64).flops

        assert every.forward.convolutions == pytest.approx(2 * kept.forward.convolutions)
        assert every.backward.convolutions == kept.backward.convolutions


def test_sgd_has_one_moment_and_no_momentum_none():
    one = counted("timm:resnet18", "optim.name=sgd", size=64)
    none = counted("timm:resnet18", "optim.name=sgd", "optim.momentum=0", size=64)

    assert (one.moments, none.moments) == (one.weights, 0)


def test_second_view_checkpointing_and_precision_change_activations():
    vit = "timm:vit_tiny_patch16_224"
    plain, contrastive, recomputed, half = (
        counted(vit, "encoder.arguments.depth=3", *overrides, size=96)
        for overrides in (
            [],
            ["loss.contrastive=0.5"],
            ["optim.activation_checkpointing=true"],
            ["optim.precision=bf16"],
        )
    )

    base = images_peak(plain, 64)
    assert images_peak(contrastive, 64) == pytest.approx(2 * base, rel=0.1)
    assert images_peak(recomputed, 64) < 0.6 * base
    assert 0.5 * base < images_peak(half, 64) < 0.8 * base


def test_gradients_of_earlier_parts_are_there_from_the_start():
    alone = counted("timm:resnet18", size=64)
    parts = counted("timm:resnet18", "optim.accumulate=2", size=64)

    assert float(alone.operations.gradients[0]) == 0
    assert float(parts.operations.gradients[0]) == parts.weights


def test_contrastive_table_grows_with_the_square():
    counts = counted("timm:resnet18", "loss.contrastive=0.5", size=64)

    # Logits, masked logits, their log-softmax or gradient: float32 each, and a mask.
    assert 8 <= counts.pair <= 40


def test_counting_leaves_nothing_behind_for_real_runs():
    sole_holder.cache_clear()
    held = torch.get_default_dtype(), torch.initial_seed()
    counted("timm:vit_tiny_patch16_224", size=32)
    seen = sole_holder()
    sole_holder.cache_clear()

    assert seen == sole_holder()
    assert held == (torch.get_default_dtype(), torch.initial_seed())
    assert ops.choose("distill", torch.device("cpu"), torch.float32).reason != "counted"
    student = torch.rand(2, 5, 4, requires_grad=True)
    ops.attention_loss(student, torch.rand(2, 5, 4)).backward()  # on real kernels again
    assert student.grad is not None
    assert bool(student.grad.abs().sum() > 0)
