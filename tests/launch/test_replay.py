"""``mimic-fast replay``: real runs that diverged, dumped, and what the command says of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mimic_fast.config import Settings
from mimic_fast.data.loader import Batch, Loader, TrainingImages
from mimic_fast.distributed import SINGLE, start
from mimic_fast.diverged import dump_diverged
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import DivergedError
from mimic_fast.step import Student
from mimic_fast.training import Task, train

BATCH, BAD_IDS = 8, (3, 6)
Change = Callable[[Student, Batch], Batch]


class Run:
    """A small training run, and the dump of one of its steps."""

    def __init__(self, teacher: Path, out: Path, **sections: dict[str, Any]) -> None:
        optim = {"batch_size": BATCH, "epochs": 2, "max_nonfinite": 2, "warmup_epochs": 0}
        self.settings = Settings.model_validate(
            {
                **sections,
                "encoder": {"teacher": teacher},
                "run": {"out": out, "device": "cpu"},
                "optim": optim | sections.get("optim", {}),
            }
        )
        self.out, self.known = out, load_encoder(teacher)
        generator = torch.Generator().manual_seed(0)
        squares = torch.randint(0, 256, (30, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self.images = TrainingImages(squares=squares)
        self.student = student_of(self.known, self.settings)

    def train(self) -> None:
        task = Task(
            student=self.student,
            teacher=TappedEncoder(self.known.encoder.requires_grad_(False), self.taps).eval(),
            layer_weights=(1000.0,) * len(self.taps),
            images=self.images,
            fingerprint={"teacher": self.known.sha256},
            out=self.out,
        )
        accelerator, processes = start(self.settings.run, self.settings.optim, expected_world=1)
        train(task, settings=self.settings, accelerator=accelerator, processes=processes)

    @property
    def taps(self) -> tuple[str, ...]:
        return default_taps(self.known.encoder)

    def dump(self, step: int = 1, change: Change = lambda _, batch: batch) -> Path:
        loader = Loader(self.images, settings=self.settings, image_size=16, processes=SINGLE)
        with loader.batches(step - 1, step) as batches:
            batch = change(self.student, next(iter(batches)))
        return dump_diverged(
            self.out / "diverged",
            step=step,
            student=self.student.state_dict(),
            batch=batch,
            rank=0,
            world=1,
            meta={
                "settings": self.settings,
                "spec": self.known.encoder.spec,
                "taps": self.taps,
                "layer_weights": (1000.0,) * len(self.taps),
                "teacher": self.known.sha256,
            },
        )


def student_of(known: LoadedEncoder, settings: Settings) -> Student:
    encoder = build_encoder(known.encoder.spec, seed=1)
    width = settings.loss.projection if settings.loss.contrastive > 0 else 0
    return Student(TappedEncoder(encoder, default_taps(encoder)), projection=width, seed=1)


def weight_of(student: Student, name: str) -> nn.Parameter:
    return student.get_parameter(f"tapped.encoder.backbone.{name}")


def spoil(student: Student, batch: Batch) -> Batch:
    with torch.no_grad():
        weight_of(student, "layer2.0.conv1.weight")[0, 0] = float("inf")
    return batch


def too_bright(student: Student, batch: Batch) -> Batch:
    """Two images too large for the first convolution's sums."""
    assert batch.student is not None
    view = batch.student.clone()
    for place, item in enumerate(batch.ids.tolist()):
        if item in BAD_IDS:
            view[place] = 1e38
    return replace(batch, student=view)


@pytest.mark.parametrize("taught", ["resnet", "vit"])
def test_run_that_diverged_is_replayed_and_the_module_named(cli, encoders, tmp_path, taught):
    run = Run(encoders[taught], tmp_path / "run")
    name = {"resnet": "layer2.0.conv1", "vit": "blocks.1.attn.qkv"}[taught]
    with torch.no_grad():
        weight_of(run.student, f"{name}.weight")[0, 0] = float("inf")
    with pytest.raises(DivergedError, match=r"step 2.*mimic-fast replay .*run/diverged"):
        run.train()

    done = cli("replay", "run/diverged")

    assert done.code == 0, done.err
    assert not done.err
    assert "step 2, 8 images of 1 process(es), fp32 on cpu: not finite again" in done.out
    assert f"first output that is not finite: student {name} (" in done.out
    assert f"weights that are not finite: student {name}.weight (" in done.out
    assert "loss nan" in done.out
    assert "every image's own loss is not finite" in done.out


def test_purification_that_diverged_is_replayed(cli, teacher, labeled, quick):
    given = ("--teacher", teacher, "--data", labeled / "train", "--out", "run", *quick)
    hot = ("optim.lr=1e30", "optim.clip_norm=0", "optim.warmup_epochs=0", "optim.max_nonfinite=1")

    run = cli("purify", *given, *(word for item in hot for word in ("--set", item)))
    replayed, wider = cli("replay", "run/diverged"), cli("replay", "run/diverged", "--json")

    assert run.code == 5, run.err
    assert "mimic-fast replay run/diverged" in run.error
    assert "not finite again" in replayed.out, replayed.err
    assert "first output that is not finite: student " in replayed.out
    assert wider.json["reproduced"]
    assert wider.json["batch_size"] == 30


def test_same_step_of_a_healthy_run_is_said_to_be_finite(cli, teacher, tmp_path):
    run = Run(teacher, tmp_path / "run", loss={"contrastive": 0.5})

    facts = cli("replay", run.dump(), "--json").json

    assert not facts["reproduced"]
    assert facts["first"] is None
    assert facts["weights"] == facts["gradients"] == facts["images"] == facts["views"] == []
    run.train()  # its first step logs the very numbers
    row = torch.tensor([facts["terms"]["loss"], facts["gradient_norm"]])
    torch.testing.assert_close(row, first_row(run.out), rtol=1e-5, atol=0.0)


def first_row(out: Path) -> torch.Tensor:
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return torch.tensor([row["loss"], row["grad_norm"]])


def test_images_that_overflow_are_told_from_the_others(cli, teacher, tmp_path):
    run = Run(teacher, tmp_path / "run", loss={"harden": {"probability": 1.0}})
    run.images = TrainingImages(squares=run.images.squares[:BATCH])  # all of them in every batch

    facts = cli("replay", run.dump(change=too_bright), "--json").json

    assert facts["reproduced"]
    assert facts["first"]["role"] == "student"
    assert facts["first"]["name"] == "conv1"
    assert facts["terms"]["loss"] is None
    assert sorted(facts["images"]) == sorted(BAD_IDS)
    assert facts["views"] == []  # the pixels themselves are finite
    assert facts["gradients"]


def test_overflow_of_fp16_is_gone_in_fp32(cli, teacher, tmp_path):
    run = Run(teacher, tmp_path / "run", optim={"precision": "fp16"})

    def enlarge(student: Student, batch: Batch) -> Batch:
        with torch.no_grad():
            weight_of(student, "layer1.0.conv1.weight").mul_(1e6)  # BatchNorm divides it away
        return batch

    folder = run.dump(change=enlarge)
    narrow, wide = cli("replay", folder), cli("replay", folder, "--precision", "fp32")

    assert "fp16 on cpu: not finite again" in narrow.out, narrow.err
    assert "first output that is not finite: student layer1.0.conv1 (" in narrow.out
    assert "fp32 on cpu: finite this time: not reproduced" in wide.out
    assert (narrow.code, wide.code) == (0, 0)


def test_teacher_that_is_another_is_exit_2(cli, encoders, tmp_path):
    folder = Run(encoders["resnet"], tmp_path / "run").dump()

    done = cli("replay", folder, "--teacher", encoders["vit"])

    assert done.code == 2
    assert "not the run's teacher" in done.error


def test_dump_that_is_damaged_is_exit_4_and_a_missing_one_exit_2(cli, teacher, tmp_path):
    folder = Run(teacher, tmp_path / "run").dump()
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    damaged, missing = cli("replay", folder), cli("replay", tmp_path / "run")

    assert damaged.code == 4
    assert "student.safetensors" in damaged.error
    assert missing.code == 2
    assert "diverged.json does not exist" in missing.error


def test_precision_that_does_not_exist_is_exit_2(cli, teacher, tmp_path):
    done = cli("replay", Run(teacher, tmp_path / "run").dump(), "--precision", "int8")

    assert done.code == 2
    assert "precision" in done.error
