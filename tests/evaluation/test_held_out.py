"""Figures of the student on held-out images against a loop in float64, and their file."""

import json

import numpy as np
import pytest
import torch

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.evaluation.held_out import HeldOut, figures, read_held_out

SPEC = EncoderSpec(
    architecture="timm:test_resnet", image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


def cosine(a, b) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def test_figures_are_those_of_a_loop_in_float64():
    draw = np.random.default_rng(0)
    s, sp, t, tp = draw.normal(size=(4, 9, 5))

    found = figures(*(torch.from_numpy(x) for x in (s, sp, t, tp)))

    rows = range(len(s))
    assert found["clone"] == pytest.approx(np.mean([1 - cosine(s[i], t[i]) for i in rows]))
    assert found["shift"] == pytest.approx(np.mean([1 - cosine(sp[i], s[i]) for i in rows]))
    assert found["teacher_shift"] == pytest.approx(np.mean([1 - cosine(tp[i], t[i]) for i in rows]))
    assert found["follow"] == pytest.approx(
        np.mean([cosine(sp[i] - s[i], tp[i] - t[i]) for i in rows])
    )


def test_a_copy_follows_its_teacher_and_a_stranger_does_not():
    draw = torch.Generator().manual_seed(0)
    s, sp, t, tp = torch.randn(4, 200, 64, generator=draw)

    copied, own = figures(t, tp, t, tp), figures(s, sp, t, tp)

    assert copied["clone"] == pytest.approx(0, abs=1e-6)
    assert copied["shift"] == copied["teacher_shift"]
    assert copied["follow"] == pytest.approx(1)
    assert abs(own["follow"]) < 0.05


def test_a_pass_that_comes_again_replaces_its_row_and_those_after_it(tmp_path):
    squares = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    teacher, student = build_encoder(SPEC, seed=0), build_encoder(SPEC, seed=1)
    path = tmp_path / "held_out.jsonl"
    held_out = HeldOut(path, squares, teacher=teacher, seed=0)
    modes = [module.training for module in student.modules()]

    for epoch in (1, 2, 3):
        losses = held_out.measure(epoch, student)
    assert len(losses) == 3
    text = path.read_text()
    again = HeldOut(path, squares, teacher=teacher, seed=0).measure(2, student)

    assert again == losses[:2]
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:2])
    assert [module.training for module in student.modules()] == modes
    assert [row["epoch"] for row in read_held_out(path)] == [1, 2]
    path.write_text(text + json.dumps({"epoch": 4}) + "\n{torn")
    assert [row["epoch"] for row in read_held_out(path)] == [1, 2, 3]
