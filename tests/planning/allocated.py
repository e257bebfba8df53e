"""The oracle: what PyTorch's CPU allocator reports over a real training run."""

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data import loader
from mimic_fast.data.loader import TrainingImages
from mimic_fast.distributed import start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.step import Student
from mimic_fast.training import Task, train


def allocated_peak(spec: EncoderSpec, settings: Settings, monkeypatch: Any) -> int:
    """Largest sum of live allocations, bytes: networks, three steps of ``train()``, losses, update.

    The decoded images were there before and do not count; views are made in the step's thread
    (``data.prefetch = 0``), since only that thread is observed.
    """
    # Without a thread of its own the loader would switch gradients off for the step as well.
    monkeypatch.setattr(loader, "_without_gradient", lambda batches: batches, raising=False)
    side = spec.image_size
    pool = torch.randint(0, 256, (2 * settings.optim.batch_size, 3, side, side), dtype=torch.uint8)
    accelerator, processes = start(settings.run, settings.optim, expected_world=1)
    gc.collect()  # what earlier tests left would be freed in between and count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed:
        task = _task(spec, settings, pool)
        train(task, settings=settings, accelerator=accelerator, processes=processes)
        del task
    events: Any = observed.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def _task(spec: EncoderSpec, settings: Settings, pool: torch.Tensor) -> Task:
    teacher, student = build_encoder(spec, seed=7), build_encoder(spec, seed=1)
    taps = default_taps(teacher)
    width = settings.loss.projection if settings.loss.contrastive > 0 else 0
    return Task(
        student=Student(TappedEncoder(student, taps), projection=width, seed=1),
        teacher=TappedEncoder(teacher.requires_grad_(False), taps).eval(),
        layer_weights=(1000.0,) * len(taps),
        images=TrainingImages(squares=pool),
    )
