"""What both modes of bench_e2e.py share: images, encoders, and each loop as a generator of steps.

A loop does one whole step (augmentation, forwards, backward, update) for every ``next()``, so that
loops can be timed in turns. All start from the same student weights, each with its own teacher.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from demo_style import DemoLosses, StudentModel, TwoViews, demo_losses, demo_style_steps
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from mimic_fast import training
from mimic_fast.config import DataSettings, EncoderSpec, JsonScalar, Settings
from mimic_fast.data.augment import augmented_view
from mimic_fast.data.clean_set import draw_clean_set, load_clean_images
from mimic_fast.data.loader import Batch, Loader, TrainingImages
from mimic_fast.data.sources import open_source
from mimic_fast.distributed import SINGLE, start
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.recipe import load_settings
from mimic_fast.step import Student, step_losses

TOLERANCE = 1e-4  # relative and absolute; float32, NHWC against NCHW, weights in the thousands
SYNTHETIC_CLASSES = 10

_RGB = {"image_size": 32, "mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)}
_SMALL: dict[str, JsonScalar | list[int]] = {
    "layers": [1, 1, 1, 1],
    "channels": [32, 64, 128, 256],
}  # 1.2 M parameters
ENCODERS = {
    "resnet18": EncoderSpec(architecture="timm:resnet18", stem="small_stride1", **_RGB),
    "small": EncoderSpec(
        architecture="timm:resnet18", arguments=_SMALL, stem="small_stride2", **_RGB
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One comparison.

    Args:
        teacher: The suspect encoder; copied before use.
        pool: Clean images.
        batch_size: Images per step, two views each where the losses need them.
        epochs: Passes over the clean images.
        seed: Of student weights, order and augmentation.
    """

    teacher: Encoder
    pool: UInt8[Tensor, "image 3 side side"]
    batch_size: int
    epochs: int
    seed: int

    @property
    def layer_weights(self) -> tuple[float, ...]:
        """lambda_l = 1000 + 10000 p_l with equal shares: step A is no part of this comparison."""
        taps = default_taps(self.teacher)
        return (1000 + 10000 / len(taps),) * len(taps)

    def settings(self, preset: str) -> Settings:
        """A preset of mimic_fast, on the CPU."""
        optim = {"batch_size": self.batch_size, "epochs": self.epochs}
        values = {"seed": self.seed, "optim": optim, "run": {"device": "cpu"}}
        return load_settings(preset=preset, values=values)

    def student(self, settings: Settings) -> Student:
        """A new student; the same weights for the same seed."""
        encoder = build_encoder(self.teacher.spec, seed=self.seed)
        projection = settings.loss.projection if settings.loss.contrastive > 0 else 0
        tapped = TappedEncoder(encoder, default_taps(encoder))
        return Student(tapped, projection=projection, seed=self.seed)

    def teacher_taps(self) -> TappedEncoder:
        """A frozen copy of the teacher."""
        teacher = copy.deepcopy(self.teacher).requires_grad_(False).eval()
        return TappedEncoder(teacher, default_taps(teacher))


def clean_images(data: str | None, *, count: int, image_size: int, seed: int) -> Tensor:
    """The clean set of a source as uint8 ``[n, 3, S, S]``; synthetic images if ``data`` is None."""
    if data is None:
        return synthetic_images(count, image_size=image_size, seed=seed)[0]
    source = open_source(data)
    settings = DataSettings(clean_count=count, allow_budget=True, hold_out=0)
    clean_set = draw_clean_set(source, settings, seed=seed)
    return load_clean_images(source, clean_set, image_size=image_size, channels=3)


def synthetic_images(
    count: int, *, image_size: int, seed: int
) -> tuple[UInt8[Tensor, "image 3 side side"], Int64[Tensor, " image"]]:
    """Noise around one color per class, with labels: for trying the benchmark, not for quality."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.rand(SYNTHETIC_CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % SYNTHETIC_CLASSES
    noise = torch.rand(count, 3, image_size, image_size, generator=generator)
    return ((noise + colors[labels]) * 127.5).to(torch.uint8), labels


def mimic_fast_steps(setup: Setup, student: Student, settings: Settings) -> Iterator[float]:
    """Steps of mimic_fast's own training loop, as ``training.train`` runs them; yields the loss."""
    accelerator, processes = start(settings.run, settings.optim, expected_world=1)
    task = training.Task(
        student=student,
        teacher=setup.teacher_taps(),
        layer_weights=setup.layer_weights,
        images=TrainingImages(squares=setup.pool),
    )
    loop = training._Loop(task, settings, accelerator, processes)
    loader = Loader(task.images, settings=settings, image_size=loop.image_size, processes=processes)
    loop.clock.begin()
    with loader.batches(0, loop.total_steps) as batches:
        for step, batch in enumerate(batches):
            loop.step(step, batch, stop=False)
            loop.clock.step_done()
            loop.flush(loader, last=False)
            yield loop.log.shown["loss"]


def demo_steps(setup: Setup, student: Student) -> Iterator[float]:
    """Steps of the demo-style loop on the modules of ``student``; yields the loss."""
    spec = setup.teacher.spec
    dataset = TwoViews(setup.pool, image_size=spec.image_size, mean=spec.mean, std=spec.std)
    teacher = copy.deepcopy(setup.teacher).backbone.requires_grad_(True)
    return demo_style_steps(
        demo_model(student),
        teacher,
        dataset,
        setup.layer_weights,
        batch_size=setup.batch_size,
        epochs=setup.epochs,
        seed=setup.seed,
    )


def demo_model(student: Student) -> StudentModel:
    """The demo-style form of a student: the same modules, without normalization of the input."""
    assert student.projection is not None
    return StudentModel(student.tapped.encoder.backbone, student.projection)


def check_same_losses(setup: Setup) -> None:
    """Proves that both loops minimize the same function, before anything is timed.

    In eval mode with two different views, and in training mode with the same view twice: mimic_fast
    runs both views in one batch, the demo one after the other, so that batch normalization sees
    other statistics where the views differ. That is the one difference between the losses.

    Raises:
        AssertionError: If a term differs.
    """
    settings = setup.settings("official")
    ids = torch.arange(min(8, len(setup.pool)))
    images = setup.pool[ids]
    size = setup.teacher.spec.image_size
    first, other = (
        augmented_view(
            images,
            ids,
            settings=settings.data,
            image_size=size,
            seed=setup.seed,
            epoch=0,
            view=view,
        )
        for view in (1, 2)
    )
    batch = Batch(v1=first, v2=other, ids=ids)
    for training_mode, second in ((False, batch.v2), (True, batch.v1)):
        views = Batch(v1=batch.v1, v2=second, ids=ids)
        ours, theirs = both_losses(setup, views, training_mode=training_mode)
        for name, own, other in zip(DemoLosses._fields, ours, theirs, strict=True):
            torch.testing.assert_close(
                own,
                other,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda text, name=name: f"{name} differs, nothing is timed: {text}",
            )


def both_losses(
    setup: Setup, views: Batch, *, training_mode: bool
) -> tuple[DemoLosses, DemoLosses]:
    """The losses of both implementations on the same views, student and teacher weights."""
    settings = setup.settings("official")
    student, teacher = setup.student(settings), setup.teacher_taps()
    _shake(student, seed=1)
    _shake(teacher, seed=2)
    student.train(training_mode)
    twin, twin_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    for module in (student, teacher):
        module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = step_losses(
            student,
            teacher,
            views,
            views.v1,
            setup.layer_weights,
            settings=settings,
            processes=SINGLE,
        )
        assert views.v2 is not None
        theirs = demo_losses(
            demo_model(twin),
            twin_teacher.encoder.backbone,
            normalized(views.v1, setup.teacher.spec),
            normalized(views.v2, setup.teacher.spec),
            setup.layer_weights,
            settings.loss.temperature,
        )
    return DemoLosses(ours.total, ours.clone, ours.attention, ours.contrastive), theirs


def normalized(
    images: Float[Tensor, "batch 3 height width"], spec: EncoderSpec
) -> Float[Tensor, "batch 3 height width"]:
    """What the demo's transform does last."""
    mean, std = images.new_tensor(spec.mean), images.new_tensor(spec.std)
    return (images - mean[:, None, None]) / std[:, None, None]


def step_function(steps: Iterator[float]) -> Callable[[], float]:
    """One step of a loop per call."""
    return steps.__next__


def take(steps: Iterator[float], count: int) -> list[float]:
    """The losses of the next ``count`` steps."""
    return list(itertools.islice(steps, count))


def _shake(module: nn.Module, *, seed: int) -> None:
    # Random encoders end each block with a scale of zero, which would hide differences.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise / 2)
