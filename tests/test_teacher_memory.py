"""The teacher runs once over all that it will see, where that is little; all else is as it was."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimic_fast import teacher_memory
from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.loader import Loader, TrainingImages
from mimic_fast.distributed import SINGLE, Processes, start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import StoppedError
from mimic_fast.layer_losses import teacher_outputs
from mimic_fast.progress import Event, silent
from mimic_fast.step import Student
from mimic_fast.teacher_memory import TeacherMemory, remember, why_not
from mimic_fast.training import Task, train

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"depth": 3, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "img_size": 16},
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
IMAGES, BATCH = 30, 8
WEIGHTS = (1000.0, 0.0, 2000.0, 3000.0)


def settings(
    precision: str = "fp32", *, epochs: int = 2, view_pool: int = 0, **loss: Any
) -> Settings:
    return Settings.model_validate(
        {
            "data": {"view_pool": view_pool},
            "optim": {"epochs": epochs, "batch_size": BATCH, "precision": precision},
            "run": {"device": "cpu"},
            "loss": {"teacher_view": "plain", "attention_weight": 0.01, **loss},
        }
    )


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, 20, 20), generator=generator, dtype=torch.uint8)


def a_teacher(spec: EncoderSpec = SPEC, dtype: torch.dtype = torch.float32) -> TappedEncoder:
    encoder = build_encoder(spec, seed=7).requires_grad_(False)
    return TappedEncoder(encoder, default_taps(encoder)).eval().to(dtype)


def remembered(
    teacher: TappedEncoder,
    run: Settings,
    *,
    weights: tuple[float, ...] = WEIGHTS,
    processes: Processes = SINGLE,
    **changes: Any,
) -> TeacherMemory | None:
    loader = Loader(
        TrainingImages(squares=pictures()), settings=run, image_size=16, processes=processes
    )
    return remember(
        teacher,
        loader,
        weights,
        settings=run,
        processes=processes,
        layout=torch.contiguous_format,
        **{"seen": 2 * IMAGES, "report": silent, "stop": lambda: False, **changes},
    )


@pytest.mark.parametrize("spec", [SPEC, VIT], ids=["resnet", "vit"])
def test_memory_holds_what_the_teacher_says_of_every_image(spec):
    teacher, run = a_teacher(spec), settings()
    weights = WEIGHTS[: len(teacher.taps)]
    ids = torch.tensor([17, 3, 29, 3])

    memory = remembered(teacher, run, weights=weights)

    assert memory is not None
    found = memory.of(ids)
    view = plain_view(pictures()[ids], image_size=16)
    wanted = teacher_outputs(teacher, view, weights, settings=run.loss)
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-5, atol=1e-6)
    assert [power is None for power in found.power] == [power is None for power in wanted.power]
    for power, other in zip(found.power, wanted.power, strict=True):
        if power is not None:
            torch.testing.assert_close(power, other, rtol=1e-5, atol=1e-6)
    assert (found.positions, found.dtype, found.live) == (
        wanted.positions,
        wanted.dtype,
        wanted.live,
    )


def test_memory_holds_what_the_teacher_says_of_every_view_of_the_pool():
    run = settings(teacher_view="same", view_pool=3, harden={"probability": 1.0})
    teacher = a_teacher()
    memory = remembered(teacher, run, seen=10 * IMAGES)
    assert memory is not None
    assert len(memory.outputs.features) == 3 * IMAGES
    loader = Loader(
        TrainingImages(squares=pictures()), settings=run, image_size=16, processes=SINGLE
    )

    with loader.batches(0, 20) as batches:
        seen = list(batches)

    passes: set[int] = set()
    for batch in seen:
        assert batch.sights is not None
        passes |= set((batch.sights // IMAGES).tolist())
        wanted = teacher_outputs(teacher, batch.v1, WEIGHTS, settings=run.loss)
        found = memory.of(batch.sights)
        torch.testing.assert_close(found.features, wanted.features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.power[3], wanted.power[3], rtol=1e-5, atol=1e-6)
    assert passes == {0, 1, 2}


def one_run(run: Settings) -> tuple[list[int], list[dict[str, float]]]:
    teacher = a_teacher()
    student = Student(
        TappedEncoder(build_encoder(SPEC, seed=1), teacher.taps),
        projection=run.loss.projection if run.loss.contrastive > 0 else 0,
        seed=1,
    )
    images: list[int] = []
    teacher.encoder.backbone.register_forward_pre_hook(
        lambda _, inputs: images.append(len(inputs[0]))
    )
    told: list[dict[str, float]] = []

    def hear(event: Event) -> None:
        if event.phase == "distil" and event.metrics:
            told.append({k: v for k, v in event.metrics.items() if k in ("loss", "grad_norm")})

    task = Task(
        student=student,
        teacher=teacher,
        layer_weights=WEIGHTS,
        images=TrainingImages(squares=pictures()),
    )
    accelerator, processes = start(run.run, run.optim, expected_world=1)
    train(task, settings=run, accelerator=accelerator, processes=processes, report=hear)
    return images, told


@pytest.mark.parametrize("loss", [{}, {"contrastive": 0.5}, {"harden": {"probability": 1.0}}])
def test_training_is_the_same_and_the_teacher_runs_for_one_pass(loss):
    images, losses = one_run(settings("fp64", **loss))
    every_step, wanted = one_run(settings("fp64", teacher_memory=False, **loss))

    assert every_step == [BATCH] * 8
    assert sum(images[1:]) == IMAGES  # the first chunk tells what the answers look like
    assert len(losses) == len(wanted) == 8
    for found, expected in zip(losses, wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_views_taken_in_turn_are_asked_about_once():
    pool: dict[str, Any] = {"teacher_view": "same", "view_pool": 2, "epochs": 5}
    images, losses = one_run(settings("fp64", harden={"probability": 1.0}, **pool))
    run = settings("fp64", harden={"probability": 1.0}, teacher_memory=False, **pool)
    every_step, wanted = one_run(run)

    assert sum(images[1:]) == 2 * IMAGES
    assert sum(every_step) == 19 * BATCH
    assert len(losses) == len(wanted) == 19
    for found, expected in zip(losses, wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_batch_get_their_own_answers():
    run = settings("fp64")
    parts = run.optim.model_copy(update={"accumulate": 4})
    _, losses = one_run(run.model_copy(update={"optim": parts}))
    off = run.loss.model_copy(update={"teacher_memory": False})
    _, wanted = one_run(run.model_copy(update={"optim": parts, "loss": off}))

    for found, expected in zip(losses, wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ({"teacher_memory": False}, "loss.teacher_memory is off"),
        ({"teacher_view": "same"}, "its view is another in every pass (data.view_pool is 0)"),
        ({"dense": 1.0}, "a dense clone loss needs its activations"),
    ],
)
def test_the_teacher_runs_in_every_step_where_it_must_and_that_is_said(loss, says):
    events: list[Event] = []

    assert remembered(a_teacher(), settings(**loss), report=events.append) is None
    assert [event.message for event in events] == [f"the teacher runs in every step: {says}"]


def test_answers_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    # 64 features and the maps of three taps with 8x8, 2x2 and 1 positions: 133 values of 4 bytes.
    values, events = 64 + 64 + 4 + 1, []
    assert why_not(settings(), images=IMAGES, values=values) is None

    monkeypatch.setattr(teacher_memory, "_LARGEST", IMAGES * values * 4)
    assert remembered(a_teacher(), settings()) is not None
    monkeypatch.setattr(teacher_memory, "_LARGEST", IMAGES * values * 4 - 1)
    assert remembered(a_teacher(), settings(), report=events.append) is None
    assert "answers to 30 images would take more than" in events[0].message


def test_a_run_of_one_pass_asks_the_teacher_as_it_goes():
    events: list[Event] = []
    teacher, run = a_teacher(), settings()

    assert remembered(teacher, run, seen=IMAGES, report=events.append) is None
    assert [event.message for event in events] == [
        "the teacher runs in every step: the run takes no image twice"
    ]
    assert remembered(teacher, run, seen=IMAGES + 1) is not None

    pooled = settings(teacher_view="same", view_pool=4)
    assert remembered(teacher, pooled, seen=4 * IMAGES, report=events.append) is None
    assert events[-1].message == "the teacher runs in every step: the run takes no view twice"


def test_a_stop_leaves_before_the_first_step():
    polls = iter([False, True])
    with pytest.raises(StoppedError, match="while the teacher answered"):
        remembered(a_teacher(), settings(), stop=lambda: next(polls))


def worker() -> dict[str, Any]:
    dist.init_process_group("gloo")
    here = Processes(rank=dist.get_rank(), world=dist.get_world_size(), device=torch.device("cpu"))
    memory = remembered(a_teacher(dtype=torch.float64), settings("fp64"), processes=here)
    assert memory is not None
    stopped = ""
    try:
        remembered(a_teacher(), settings(), processes=here, stop=lambda: dist.get_rank() == 1)
    except StoppedError as error:
        stopped = str(error)
    every = memory.outputs
    return {
        "features": every.features,
        "power": [power for power in every.power if power is not None],
        "stopped": stopped,
    }


def test_processes_share_the_work_and_know_the_same(run_processes):
    alone = remembered(a_teacher(dtype=torch.float64), settings("fp64"))
    assert alone is not None
    wanted = [alone.outputs.features, *(p for p in alone.outputs.power if p is not None)]

    first, second = run_processes(worker, world=2)

    for found in (first, second):
        for own, value in zip([found["features"], *found["power"]], wanted, strict=True):
            torch.testing.assert_close(own, value, rtol=1e-12, atol=1e-12)
        assert "while the teacher answered" in found["stopped"]
    assert torch.equal(first["features"], second["features"])
