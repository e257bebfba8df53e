"""The loss scale follows torch's own; what was asked for is what multiplies; runs end alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast import precision
from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.loader import Batch, TrainingImages
from mimic_fast.distributed import SINGLE, start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.precision import LossScale, autocast_dtype, check_precision
from mimic_fast.step import Student, step_losses
from mimic_fast.training import Task, Trained, train

CPU = torch.device("cpu")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


def follows_torch(steps: list[bool], growth: int) -> list[float]:
    """Our scale after every step, which is torch's."""
    ours, parameter = LossScale(CPU), torch.nn.Parameter(torch.ones(1))
    theirs = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
        "cpu", growth_interval=growth
    )
    optimizer, found = torch.optim.SGD([parameter], 0.0), []
    theirs.scale(parameter.sum())
    for bad in steps:
        parameter.grad = torch.full((1,), torch.inf if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)))
        found.append(ours.scale.item())
        assert found[-1] == theirs.get_scale()
    return found


@settings(max_examples=20)
@given(st.lists(st.booleans(), max_size=30))
def test_scale_is_that_of_torch(steps):
    follows_torch(steps, growth=2000)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=32))  # 8 doublings reach the largest scale
def test_scale_grows_like_that_of_torch(draws):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_GROWTH_STEPS", 4)

        found = follows_torch([False] * 4 + [draw == 0 for draw in draws[4:]], growth=4)

    assert found[:4] == [2.0**16] * 3 + [2.0**17]


def test_scale_doubles_after_2000_finite_steps():
    ours = LossScale(CPU)
    for _ in range(1999):
        ours.update(torch.tensor(0.0))
    assert ours.scale.item() == 2.0**16
    ours.update(torch.tensor(0.0))
    assert ours.scale.item() == 2.0**17


def test_scale_stops_growing(monkeypatch):
    monkeypatch.setattr(precision, "_GROWTH_STEPS", 1)
    ours = LossScale(CPU)
    for _ in range(12):
        ours.update(torch.tensor(0.0))

    assert ours.scale.item() == 2.0**24


@settings(max_examples=30)
@given(st.lists(st.booleans(), max_size=12), st.lists(st.booleans(), max_size=12))
def test_restored_scale_goes_on_as_if_never_saved(before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_GROWTH_STEPS", 3)
        ours, restored = LossScale(CPU), LossScale(CPU)
        for bad in before:
            ours.update(torch.tensor(float(bad)))
        restored.restore({name: value.clone() for name, value in ours.tensors().items()})

        for bad in after:
            for scale in (ours, restored):
                scale.update(torch.tensor(float(bad)))
            assert restored.scale.item() == ours.scale.item()


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1), st.integers(-16, 8))
def test_gradients_are_divided_exactly(values, steps):
    scale = LossScale(CPU)
    scale.scale.mul_(2.0**steps)
    exact = torch.tensor(values)
    gradients = [exact * scale.scale, exact[:1] * scale.scale]

    scale.unscale(gradients)
    scale.unscale([])

    assert torch.equal(gradients[0], exact)
    assert torch.equal(gradients[1], exact[:1])


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16"])
def test_what_runs_is_what_was_asked_for(name):
    check_precision(name, CPU)
    assert autocast_dtype(name) == HALVES.get(name)


@pytest.mark.parametrize(("name", "runs"), [("bf16", None), ("fp16", torch.bfloat16)])
def test_autocast_that_runs_in_another_type_is_refused(monkeypatch, name, runs):
    real = precision.autocast
    monkeypatch.setattr(precision, "autocast", lambda dtype, device: real(runs, device))

    with pytest.raises(UsageError, match=rf"{name}.*cpu computes in .*; use fp32"):
        check_precision(name, CPU)


# A small ResNet under every precision.


def students(contrastive: float = 0.0) -> tuple[Student, TappedEncoder]:
    teacher, student = build_encoder(SPEC, seed=7), build_encoder(SPEC, seed=1)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher.train()(images)  # running statistics of its own
    taps = default_taps(teacher)
    width = 32 if contrastive else 0
    return (
        Student(TappedEncoder(student, taps), projection=width, seed=1),
        TappedEncoder(teacher.requires_grad_(False), taps).eval(),
    )


@pytest.mark.parametrize("name", HALVES)
def test_student_computes_in_the_type_and_losses_in_float32(name):
    student, teacher = students(contrastive=0.5)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Batch(v1=images, v2=images.flip(3), ids=torch.arange(8))
    run = Settings.model_validate({"optim": {"precision": name}, "loss": {"contrastive": 0.5}})
    seen: set[torch.dtype] = set()
    student.tapped.encoder.backbone.get_submodule("layer4").register_forward_hook(
        lambda _, inputs, output: seen.add(output.dtype)
    )
    exact, _ = student(images)
    assert seen == {torch.float32}
    seen.clear()

    student.autocast = autocast_dtype(name)
    features, projected = student(images)
    losses = step_losses(
        student, teacher, batch, images, (1000.0,) * 4, settings=run, processes=SINGLE
    )
    losses.total.backward()

    assert seen == {HALVES[name]}
    assert projected is not None
    assert {features.dtype, projected.dtype} <= {HALVES[name], torch.float32}
    error = (features.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    terms = (losses.total, losses.clone, losses.attention, losses.contrastive)
    assert all(term.dtype == torch.float32 and term.isfinite() and term != 0 for term in terms)
    for parameter in student.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.fixture(scope="module")
def pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (30, 3, 16, 16), generator=generator, dtype=torch.uint8)


def trained(
    pool: Tensor, steps: int, optim: dict[str, Any], loss: dict[str, Any], out: Path | None = None
) -> tuple[Trained, Task, list[dict[str, float]]]:
    run = Settings.model_validate(
        {
            "optim": {"epochs": 200, "batch_size": 30, "warmup_epochs": 0, **optim},
            "loss": loss,
            "run": {"device": "cpu", "max_steps": steps, "out": out, "checkpoint_every": steps},
        }
    )
    student, teacher = students(run.loss.contrastive)
    task = Task(
        student=student,
        teacher=teacher,
        layer_weights=(1000.0,) * 4,
        images=TrainingImages(squares=pool),
        out=out,
    )
    shown: list[dict[str, float]] = []
    accelerator, processes = start(run.run, run.optim, expected_world=1)
    result = train(
        task,
        settings=run,
        accelerator=accelerator,
        processes=processes,
        report=lambda event: shown.append(dict(event.metrics)),
    )
    return result, task, shown


def final_loss(pool: Tensor, name: str, steps: int) -> tuple[float, float]:
    """First loss, and the mean of the last ten, which forgives the noise of batches."""
    optim, loss = {"precision": name, "lr": 1e-3}, {"contrastive": 0.5}
    result, task, shown = trained(pool, steps, optim, loss)
    assert result.skipped == 0
    assert all(p.dtype == torch.float32 for p in task.student.parameters())
    losses = [row["loss"] for row in shown]
    assert len(losses) == steps
    return losses[0], sum(losses[-10:]) / 10


STEPS = [20, pytest.param(200, marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", HALVES)
def test_lower_precision_ends_like_float32(pool, name, steps):
    first, expected = final_loss(pool, "fp32", steps)
    begun, found = final_loss(pool, name, steps)

    assert begun != first  # it did run in another type
    assert begun == pytest.approx(first, rel=0.005)
    assert expected < first - 0.06  # 3 % of it: what is compared has moved by more than it may err
    assert found == pytest.approx(expected, rel=0.02)  # measured 0.001 to 0.006


def test_overflow_of_float16_is_skipped_until_the_scale_fits(pool, tmp_path):
    # The loss is large, not infinite: its gradient times 2^16 is beyond float16's 65504.
    optim = {"precision": "fp16", "lr": 1e-4, "max_nonfinite": 3}

    result, task, _ = trained(pool, 24, optim, {"clone": 1e4}, tmp_path)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert result.steps == len(rows) == 24
    assert result.skipped == len(skipped)
    assert skipped[:4] == [1, 2, 3, 4]  # more in a row than a run may have that are not finite
    assert sum(row["skipped"] for row in rows[-8:]) <= 2  # at the largest scale that mostly fits
    assert all(row["loss"] is not None for row in rows)
    assert all((row["grad_norm"] is None) == row["skipped"] for row in rows)
    assert len(skipped) < 17
    assert all(value.isfinite().all() for value in task.student.state_dict().values())


def test_overflow_leaves_no_trace(pool):
    for steps, moves in ((1, False), (16, True)):
        result, task, _ = trained(pool, steps, {"precision": "fp16"}, {"clone": 1e4})
        weights, _ = students()
        first = dict(weights.named_parameters())
        same = [torch.equal(p, first[n]) for n, p in task.student.named_parameters()]

        assert result.skipped >= 1
        assert all(same) is not moves
