"""BYOL against float64 oracles: loss, gradient, the target's path; then small real runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mimic_fast.byol import Byol, byol_loss, byol_losses, byol_student, follow, target_of
from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.images import load_images
from mimic_fast.data.loader import Loader, TrainingImages
from mimic_fast.data.sources import open_source
from mimic_fast.distributed import SINGLE, start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import DivergedError, StoppedError, UsageError
from mimic_fast.pretraining import PretrainSettings, pretrain
from mimic_fast.self_supervised import train_byol
from mimic_fast.step import Student
from mimic_fast.step_clock import StepClock

SPEC: dict[str, Any] = {
    "architecture": "timm:resnet18",
    "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    "stem": "small_stride2",
    "image_size": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
CPU = torch.device("cpu")
IMAGES, CLASSES = 48, 3
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Pictures of blobs; where the bright ones lie tells the class."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = generator.integers(0, 110, (3, 3, 3))
        coarse[number % CLASSES] += 140
        picture = Image.fromarray(np.kron(coarse, np.ones((6, 6, 1)))[:16, :16].astype(np.uint8))
        picture.save(root / f"{number:02d}.png")
    return root


@pytest.fixture
def make(images, tmp_path):
    def settings(name: str = "run", **sections: Any) -> PretrainSettings:
        optim = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0, **sections.pop("optim", {})}
        run = {"out": tmp_path / name, "device": "cpu", **sections.pop("run", {})}
        return PretrainSettings.model_validate(
            {
                "method": "byol",
                "spec": SPEC,
                "data": {"source": str(images)},
                "optim": optim,
                "run": run,
                **sections,
            }
        )

    return settings


def a_student(*, hidden: int | None = 6, width: int = 5) -> Student:
    encoder = build_encoder(EncoderSpec.model_validate(SPEC), seed=0)
    tapped = TappedEncoder(encoder, default_taps(encoder))
    return byol_student(tapped, hidden=hidden, width=width, seed=0)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out: Path, step: int, group: str) -> dict[str, Tensor]:
    return load_file(out / "state" / f"step_{step:07d}" / f"{group}.safetensors")


def oracle_momentum(step: int, steps: int, first: float) -> float:
    return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * step / steps))


def test_loss_and_gradient_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    predicted, projected = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    predicted.requires_grad_()
    projected.requires_grad_()

    loss = byol_loss(predicted, projected)
    loss.backward()

    total, gradient = 0.0, np.zeros((6, 5))
    for row, p in enumerate(predicted.detach().numpy()):
        t = projected[(row + 3) % 6].detach().numpy()  # the other view of the same image
        length, unit, aim = np.linalg.norm(p), p / np.linalg.norm(p), t / np.linalg.norm(t)
        total += ((unit - aim) ** 2).sum() / 6
        gradient[row] = -2 * (aim - (unit @ aim) * unit) / length / 6
    torch.testing.assert_close(loss.item(), total, **EXACT)
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad, torch.from_numpy(gradient), **EXACT)
    assert projected.grad is None


def test_target_is_the_average_of_the_students_before():
    student = a_student().double()
    byol = Byol(target=target_of(student), momentum=0.9)
    name = "projection.projector.0.weight"
    parameter, generator = student.get_parameter(name), torch.Generator().manual_seed(0)
    expected, steps, skipped = parameter.detach().clone(), 5, 2
    for step in range(steps):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

        follow(byol, student, done=step / steps, bad=torch.tensor(float(step == skipped)))

        if step != skipped:
            momentum = oracle_momentum(step, steps, 0.9)
            expected = momentum * expected + (1 - momentum) * parameter.detach()
        torch.testing.assert_close(byol.target.get_parameter(name).detach(), expected, **EXACT)


def test_target_has_all_but_the_predictor_and_no_gradient():
    student = a_student()
    target = target_of(student)

    names = {name for name, _ in target.named_parameters()}
    assert names == {n for n, _ in student.named_parameters() if "predictor" not in n}
    assert any("projector" in name for name in names)
    losses = byol_losses(student.train(), target, torch.rand(8, 3, 16, 16), clock=StepClock(CPU))
    losses.total.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert losses.byol.item() == losses.total.item() > 0


@pytest.mark.parametrize(("hidden", "found"), [(None, 256), (24, 24)])
def test_hidden_width_is_four_times_the_features_or_as_set(hidden, found):
    head = a_student(hidden=hidden, width=12).projection

    assert isinstance(head, nn.Sequential)
    shapes = [[tuple(m.weight.shape) for m in part if isinstance(m, nn.Linear)] for part in head]  # pyright: ignore[reportGeneralTypeIssues]
    assert shapes == [[(found, 64), (12, found)], [(found, 12), (12, found)]]


def test_saved_targets_follow_the_saved_students(make, tmp_path):
    run = {"checkpoint_every": 1, "keep": 100}
    settings = make(run=run, byol_momentum=0.8, optim={"precision": "fp64"})
    result = pretrain(settings)
    steps = result.trained.steps
    assert steps == 6

    student = byol_student(
        TappedEncoder(encoder := build_encoder(settings.spec, seed=0), default_taps(encoder)),
        hidden=None,
        width=128,
        seed=0,
    )
    expected = {name: value.detach().double() for name, value in student.named_parameters()}
    online, target = {}, {}
    for step in range(steps):
        online, target = (state(tmp_path / "run", step + 1, g) for g in ("student", "target"))
        momentum = oracle_momentum(step, steps, 0.8)
        for name in expected.keys() & target.keys():
            expected[name] = momentum * expected[name] + (1 - momentum) * online[name]
            torch.testing.assert_close(target[name], expected[name], **EXACT)
    name = "tapped.encoder.backbone.conv1.weight"
    online, target = (state(tmp_path / "run", steps, group) for group in ("student", "target"))
    assert not torch.equal(online[name], target[name])
    torch.testing.assert_close(
        result.encoder.backbone.get_parameter("conv1.weight").detach(), online[name].float()
    )
    assert load_encoder(result.path).encoder.state_dict().keys() == encoder.state_dict().keys()


def test_stopped_run_goes_on_bit_for_bit(make, tmp_path):
    straight = pretrain(make("straight"))
    polls: list[None] = []

    def stop() -> bool:
        polls.append(None)
        return len(polls) == 2  # in mid-epoch, which has 3 steps

    with pytest.raises(StoppedError, match="after step 2"):
        pretrain(make(), stop=stop)
    resumed = pretrain(make(run={"resume": "auto"}))

    assert resumed.path.read_bytes() == straight.path.read_bytes()
    for group in ("student", "target", "optimizer"):
        one, other = (state(tmp_path / name, 6, group) for name in ("run", "straight"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), group
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("run", "straight")]
    assert losses[0] == losses[1]
    for changed in ({"byol_momentum": 0.5}, {"byol_hidden": 8}, {"method": "simclr"}):
        with pytest.raises(UsageError, match="belongs to other settings"):
            pretrain(make(run={"resume": "auto"}, **changed))


def test_metrics_show_the_loss_under_its_name(make, tmp_path):
    pretrain(make())

    for row in rows(tmp_path / "run"):
        assert row["loss"] == row["byol"]
        assert 0 < row["byol"] < 4
        assert row["contrastive"] == row["clone"] == 0


def test_skipped_step_leaves_the_target(make, tmp_path, monkeypatch):
    """A forward of the student that is not finite in step 2, after which nothing may have moved."""
    forward, calls = Student.forward, []

    def spoiled(self: Student, *arguments: Any) -> Any:
        features, projected = forward(self, *arguments)
        if features.requires_grad:
            assert projected is not None
            calls.append(None)
            if len(calls) == 2:
                assert projected is not None
                projected = projected * math.inf
        return features, projected

    monkeypatch.setattr(Student, "forward", spoiled)
    pretrain(make(run={"checkpoint_every": 1, "keep": 9}))

    assert [row["skipped"] for row in rows(tmp_path / "run")] == [False, True, *[False] * 4]
    for group in ("student", "target"):
        one, two, three = (state(tmp_path / "run", step, group) for step in (1, 2, 3))
        floating = [name for name, value in one.items() if value.is_floating_point()]
        assert all(torch.equal(one[name], two[name]) for name in floating), group
        assert not all(torch.equal(two[name], three[name]) for name in floating), group


def test_diverged_run_names_no_dump_that_replay_could_not_read(make, tmp_path, monkeypatch):
    monkeypatch.setattr("mimic_fast.byol.ops.clone_loss", lambda a, _: a.sum() * math.nan)

    with pytest.raises(DivergedError, match="not finite 3 times in a row, at step 3 ") as caught:
        pretrain(make())

    assert "replay" not in str(caught.value)
    assert not (tmp_path / "run" / "diverged").exists()


def test_parts_of_a_batch_add_up_to_the_mean_of_their_losses(make, tmp_path, images):
    optim = {"precision": "fp64", "accumulate": 2, "lr": 1e-3}
    pretrain(make(optim=optim, run={"max_steps": 1}))

    student = a_student(hidden=None, width=128).double().train()
    pool, _ = load_images(
        source := open_source(str(images)), range(len(source)), image_size=16, channels=3
    )
    settings = Settings.model_validate({"loss": {"contrastive": 1}, "optim": {"batch_size": 16}})
    loader = Loader(
        TrainingImages(squares=pool), settings=settings, image_size=16, processes=SINGLE
    )
    with loader.batches(0, 1) as batches:
        batch = next(batches)
    assert batch.v2 is not None
    values: list[float] = []
    for part in (slice(0, 8), slice(8, 16)):
        first, second = batch.v1[part].double(), batch.v2[part].double()
        predictions = F.normalize(student(torch.cat([first, second]))[1], dim=1)
        target = target_of(student)
        aims = F.normalize(target(torch.cat([second, first]))[1], dim=1)
        values.append((predictions - aims).square().sum(1).mean().detach().item())
    expected = sum(values) / 2
    assert rows(tmp_path / "run")[0]["byol"] == pytest.approx(expected, abs=1e-9)


def test_features_do_not_collapse(make, images):
    result = pretrain(make(optim={"epochs": 20, "lr": 2e-2}))

    source = open_source(str(images))
    pool, _ = load_images(source, range(len(source)), image_size=16, channels=3)
    with torch.no_grad():
        features = F.normalize(result.encoder(pool.float() / 255), dim=1)
    # A sphere's own deviation is 1 / sqrt(64) = 0.125 in each direction. Measured: 0.090 and 0.94,
    # untrained 0.033 and 0.63, and 0.009 with a loss that draws all features together.
    deviation = features.std(0).mean()
    likeness = (features @ features.T).fill_diagonal_(-1)
    labels = torch.arange(IMAGES) % CLASSES
    accuracy = (labels[likeness.argmax(1)] == labels).float().mean()
    assert deviation > 0.06, deviation
    assert accuracy > 0.75, accuracy  # chance is 1/3


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        (
            {"loss": {"clone": 0, "attention_weight": 0, "contrastive": 1, "temperature": 0.1}},
            r"method 'byol' ignores loss\.temperature",
        ),
        (
            {"loss": {"clone": 0, "attention_weight": 0, "contrastive": 2}},
            r"method 'byol' ignores loss\.contrastive",
        ),
        (
            {"method": "simclr", "byol_momentum": 0.9, "byol_hidden": 8},
            "method 'simclr' ignores byol_momentum, byol_hidden",
        ),
    ],
)
def test_settings_that_do_not_apply_are_named(make, sections, named):
    with pytest.warns(UserWarning, match=named):
        pretrain(make(run={"max_steps": 1}, **sections))


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_engines_that_cut_the_student_are_refused(make, engine):
    with pytest.raises(UsageError, match=rf"run\.engine '{engine}' cuts .*use run\.engine 'ddp'"):
        pretrain(make(run={"engine": engine}))


def test_vit_with_bfloat16_and_averaged_weights_trains(images):
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8},
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    run = Settings.model_validate(
        {
            "loss": {"contrastive": 1, "projection": 8},
            "optim": {"epochs": 1, "batch_size": 16, "precision": "bf16", "ema": 0.5},
            "run": {"device": "cpu"},
        }
    )
    pool, _ = load_images(
        source := open_source(str(images)), range(len(source)), image_size=16, channels=3
    )

    encoder, trained = train_byol(
        spec,
        pool,
        momentum=0.9,
        hidden=8,
        settings=run,
        started=start(run.run, run.optim, expected_world=1),
        phase="test",
    )

    assert trained.steps == 3
    assert trained.skipped == 0
    assert all(value.isfinite().all() for value in encoder.state_dict().values())
