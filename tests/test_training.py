"""The training loop on a small ResNet: what it counts, keeps still, skips, averages and stops."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.loader import TrainingImages
from mimic_fast.distil import purify
from mimic_fast.distributed import start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import DivergedError, StoppedError, UsageError
from mimic_fast.progress import Event
from mimic_fast.step import Student
from mimic_fast.training import Task, Trained, train

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
BATCH, IMAGES = 8, 30  # two passes are eight steps


@pytest.fixture
def pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, 16, 16), generator=generator, dtype=torch.uint8)


def settings(out: Path | None = None, **sections: dict[str, Any]) -> Settings:
    optim = {"epochs": 2, "batch_size": BATCH, "warmup_epochs": 0, **sections.pop("optim", {})}
    run = {"out": out, "device": "cpu", **sections.pop("run", {})}
    return Settings.model_validate({"optim": optim, "run": run, **sections})


def a_task(pool: Tensor, run: Settings, *, seed: int = 1) -> Task:
    teacher, student = build_encoder(SPEC, seed=7), build_encoder(SPEC, seed=seed)
    taps = default_taps(teacher)
    width = run.loss.projection if run.loss.contrastive > 0 else 0
    return Task(
        student=Student(TappedEncoder(student, taps), projection=width, seed=seed),
        teacher=TappedEncoder(teacher.requires_grad_(False), taps).eval(),
        layer_weights=(1000.0,) * len(taps),
        images=TrainingImages(squares=pool),
        out=run.run.out,
    )


def trained(task: Task, run: Settings, **options: Any) -> Trained:
    accelerator, processes = start(run.run, run.optim, expected_world=1)
    return train(task, settings=run, accelerator=accelerator, processes=processes, **options)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@contextmanager
def hook_removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def seen_images(module: nn.Module) -> list[int]:
    """Grows by the number of images of every forward pass."""
    counts: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    return counts


@pytest.mark.parametrize(("contrastive", "student_images"), [(0.0, BATCH), (0.5, 2 * BATCH)])
def test_every_step_sees_no_more_images_than_it_needs(pool, contrastive, student_images):
    run = settings(loss={"contrastive": contrastive})
    task = a_task(pool, run)
    assert task.teacher is not None
    student, teacher = (
        seen_images(tapped.encoder.backbone) for tapped in (task.student.tapped, task.teacher)
    )

    result = trained(task, run)

    assert result.steps == 8
    assert student == [student_images] * 8
    assert teacher == [BATCH] * 8


def test_teacher_stays_as_it_is(pool):
    run = settings(loss={"contrastive": 0.5}, optim={"weight_decay": 0.1})
    task = a_task(pool, run)
    assert task.teacher is not None
    modes: set[bool] = set()
    for module in task.teacher.modules():
        module.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    before, student = copied(task.teacher), copied(task.student)

    trained(task, run)

    after = task.teacher.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == {False}
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert not torch.equal(
        student["tapped.encoder.backbone.conv1.weight"],
        task.student.state_dict()["tapped.encoder.backbone.conv1.weight"],
    )


def test_optimizer_holds_the_students_parameters_and_no_other(pool):
    run = settings(loss={"contrastive": 0.5})
    task = a_task(pool, run)
    held: set[int] = set()
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: held.update(
            id(parameter) for group in optimizer.param_groups for parameter in group["params"]
        )
    )

    with hook_removed(hook):
        trained(task, run)

    assert held == {id(parameter) for parameter in task.student.parameters()}


def spoil_step(task: Task, *steps: int) -> None:
    """Makes the loss of these steps (from 1) infinite, BatchNorm statistics included."""
    count = 0

    def overflow(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        nonlocal count
        count += 1
        return inputs[0] * float("inf") if count in steps else inputs[0]

    task.student.tapped.encoder.backbone.register_forward_pre_hook(overflow)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("first", [1, 3])
def test_step_that_is_not_finite_leaves_no_trace(pool, tmp_path, name, first):
    run = settings(tmp_path, optim={"name": name, "clip_norm": 1.0})
    task, states = a_task(pool, run), []
    spoil_step(task, first)
    before = copied(task.student)

    result = trained(task, run, report=lambda event: states.append(copied(task.student)))

    assert result.skipped == 1
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if row["skipped"]] == [first]
    (bad,) = [row for row in logged if row["skipped"]]
    assert bad["loss"] is None
    assert len(set(bad["ids"])) == BATCH
    assert all("ids" not in row for row in logged if not row["skipped"])
    earlier = before if first == 1 else states[first - 2]
    floating = [key for key, value in earlier.items() if value.is_floating_point()]
    assert any("running_mean" in key for key in floating)
    assert all(torch.equal(states[first - 1][key], earlier[key]) for key in floating)
    assert not torch.equal(
        states[first]["tapped.encoder.backbone.conv1.weight"],
        earlier["tapped.encoder.backbone.conv1.weight"],
    )
    assert all(value.isfinite().all() for value in task.student.state_dict().values())


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(pool, tmp_path):
    run = settings(tmp_path, optim={"max_nonfinite": 3, "epochs": 4})
    task = a_task(pool, run)
    spoil_step(task, 2, 3, 5, 6, 7)  # two in a row are forgiven

    with pytest.raises(DivergedError, match="3 times in a row, at step 7") as caught:
        trained(task, run)

    assert caught.value.exit_code == 5
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 8))
    assert [row["step"] for row in logged if "ids" in row] == [2, 3, 5, 6, 7]


def test_weight_that_is_not_a_number_ends_the_run(pool, tmp_path):
    run = settings(tmp_path, optim={"max_nonfinite": 2})
    task = a_task(pool, run)
    with torch.no_grad():
        next(task.student.parameters()).fill_(float("nan"))

    with pytest.raises(DivergedError, match="2 times in a row, at step 2"):
        trained(task, run)


def test_averaged_weights_are_what_is_left(pool):
    run = settings(optim={"ema": 0.9})
    task, states = a_task(pool, run), []
    expected = copied(task.student)

    trained(task, run, report=lambda event: states.append(copied(task.student)))

    assert len(states) == 8
    for state in states:
        for name, value in state.items():
            old = expected[name]
            floating = value.is_floating_point()
            expected[name] = 0.9 * old + 0.1 * value if floating else value
    assert not torch.equal(
        states[-1]["tapped.encoder.backbone.conv1.weight"],
        expected["tapped.encoder.backbone.conv1.weight"],
    )
    torch.testing.assert_close(copied(task.student), expected)
    assert not task.student.training


def test_max_steps_ends_in_the_middle_of_an_epoch(pool, tmp_path):
    run = settings(tmp_path, run={"max_steps": 4})

    result = trained(a_task(pool, run), run)

    assert result.steps == 4
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def update_size(pool: Tensor, clip: float) -> tuple[float, float]:
    """Gradient norm and length of the first SGD update at learning rate 1."""
    optim = {"name": "sgd", "lr": 1.0, "momentum": 0, "weight_decay": 0, "clip_norm": clip}
    run = settings(optim={**optim, "schedule": "constant"}, run={"max_steps": 1})
    task, norms = a_task(pool, run), []
    before = flat(task.student)
    trained(task, run, report=lambda event: norms.append(event.metrics["grad_norm"]))
    return norms[0], float((flat(task.student) - before).norm())


def test_gradient_is_clipped_to_the_norm_of_the_settings(pool):
    norm, update = update_size(pool, 0)
    assert update == pytest.approx(norm, rel=1e-4)

    clipped_norm, clipped = update_size(pool, norm / 3)

    assert clipped_norm == pytest.approx(norm)  # what is logged is the norm before clipping
    assert clipped == pytest.approx(norm / 3, rel=1e-4)


def test_stop_saves_the_state_of_the_step_it_came_in(pool, tmp_path):
    run = settings(tmp_path)
    polls: list[None] = []

    def stop() -> bool:
        polls.append(None)
        return len(polls) == 4

    with pytest.raises(StoppedError, match="after step 4") as caught:
        trained(a_task(pool, run), run, stop=stop)

    assert caught.value.exit_code == 6
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_0000004"]

    resumed = run.model_copy(update={"run": run.run.model_copy(update={"resume": "auto"})})
    events: list[Event] = []
    trained(a_task(pool, resumed, seed=2), resumed, report=events.append)
    assert [event.done for event in events] == [5, 6, 7, 8]


def test_state_of_other_work_is_refused(pool, tmp_path):
    run = settings(tmp_path, run={"checkpoint_every": 2, "resume": "auto"})
    task = a_task(pool, run)
    trained(task, run)
    other = Task(
        student=task.student,
        teacher=task.teacher,
        layer_weights=task.layer_weights,
        images=TrainingImages(squares=pool),
        fingerprint={"teacher": "another"},
        out=tmp_path,
    )

    with pytest.raises(UsageError, match="other settings, teacher or images"):
        trained(other, run)


def test_epochs_are_told_once_each(pool):
    run = settings()
    epochs: list[int] = []

    trained(a_task(pool, run), run, on_epoch=lambda epoch, student: epochs.append(epoch))

    assert epochs == [1, 2]


@pytest.fixture
def purification(tmp_path: Path) -> Settings:
    """A purification of one step; the teacher's file and the run directory are still missing."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for number in range(80):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        pixels = nn.functional.interpolate(coarse, size=16, mode="bilinear")[0] * 255
        array = pixels.permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
        Image.fromarray(array).save(tmp_path / "images" / f"{number:02d}.png")
    return settings(
        data={"source": str(tmp_path / "images"), "clean_fraction": 1.0, "allow_budget": True},
        loss={"contrastive": 0.5},
        run={"max_steps": 1},
    )


def teacher_file(folder: Path, seed: int) -> Path:
    encoder = build_encoder(SPEC, seed=seed)
    with torch.no_grad():
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        encoder(images)  # running statistics of its own
    return export_encoder(encoder.eval(), folder, name=f"t{seed}", key_map=None, card={})


def first_state(purification: Settings, teacher: Path, out: Path, seed: int) -> dict[str, Tensor]:
    """Purifies and returns what the student was when training first called it."""
    states: list[dict[str, Tensor]] = []

    def remember(module: nn.Module, _: Any) -> None:
        if isinstance(module, Student):
            states.append(copied(module))

    sections = {
        "seed": seed,
        "encoder": purification.encoder.model_copy(update={"teacher": teacher}),
        "run": purification.run.model_copy(update={"out": out}),
    }
    before = teacher.read_bytes()
    with hook_removed(register_module_forward_pre_hook(remember)):
        result = purify(purification.model_copy(update=sections))
    # All of step A and B behind it, the teacher is still what the file says.
    assert teacher.read_bytes() == before
    held, stored = result.teacher.encoder.state_dict(), load_encoder(teacher).encoder.state_dict()
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in stored)
    assert not any(parameter.requires_grad for parameter in result.teacher.encoder.parameters())
    (state,) = states
    return state


def test_student_starts_from_the_seed_alone_whatever_the_teacher(purification, tmp_path):
    first, second = teacher_file(tmp_path / "teachers", 1), teacher_file(tmp_path / "teachers", 2)

    one = first_state(purification, first, tmp_path / "one", 5)
    two = first_state(purification, second, tmp_path / "two", 5)
    other = first_state(purification, first, tmp_path / "other", 6)

    assert one.keys() == two.keys()
    assert any("running_var" in name for name in one)
    assert any(name.startswith("projection.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    weight = "tapped.encoder.backbone.conv1.weight"
    assert not torch.equal(one[weight], other[weight])
    assert not torch.equal(one[weight], load_encoder(first).encoder.state_dict()[weight[15:]])
