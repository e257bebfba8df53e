"""``plan()``: what a recipe would need and how fast it would be, under every engine."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mimic_fast import ops
from mimic_fast.config import EncoderSpec, Engine, Settings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.recognise import recognise_spec
from mimic_fast.errors import UsageError
from mimic_fast.ops_choice import Path
from mimic_fast.planning.advice import Advice, engines, first_that_fits, teachers
from mimic_fast.planning.assumptions import assumptions
from mimic_fast.planning.counts import Counts, count
from mimic_fast.planning.machines import Machines
from mimic_fast.planning.memory import (
    Memory,
    Spread,
    largest_images,
    peak_memory,
    room_for_tensors,
)
from mimic_fast.planning.timing import StepTime, step_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine.

    Args:
        engine: How the student is spread.
        teacher_shard: Whether the teacher is cut too.
        peak: Of one process with the recipe's micro-batch.
        fits: Whether it does.
        largest: The largest micro-batch that does, images; 0: none.
        time: Of a step; None if nothing is known of the machine's speed.
    """

    engine: Engine
    teacher_shard: bool
    peak: Memory
    fits: bool
    largest: int
    time: StepTime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The forecast.

    Args:
        spec: Of teacher and student.
        settings: Of the run.
        machines: Where it is to run.
        images: The recipe's micro-batch.
        path: What the losses are counted on.
        counts: One process whose networks are whole.
        rows: By engine.
        advice: Settings that fit; None if none was found.
    """

    spec: EncoderSpec
    settings: Settings
    machines: Machines
    images: int
    path: Path
    counts: Counts
    rows: tuple[Row, ...]
    advice: Advice | None


def plan(settings: Settings, machines: Machines) -> Plan:
    """Counts the step of a recipe and spreads it over machines.

    Raises:
        UsageError: If the recipe names no encoder, or its batch cannot be shared.
        UnsafeInputError: If the teacher's file is unsafe or corrupt.
    """
    on_gpu = settings.run.device != "cpu"
    images = _micro_batch(settings, machines.gpus)
    spec = _spec(settings)
    path = _path(settings, on_gpu=on_gpu)
    counts = count(spec, settings, path=path, on_gpu=on_gpu)
    rows = tuple(_rows(counts, settings, machines, images, on_gpu=on_gpu))
    advice = first_that_fits(
        spec, settings, counts, path=path, gpus=machines.gpus, memory=machines.memory, on_gpu=on_gpu
    )
    return Plan(
        spec=spec,
        settings=settings,
        machines=machines,
        images=images,
        path=path,
        counts=counts,
        rows=rows,
        advice=advice,
    )


def plan_json(forecast: Plan) -> dict[str, Any]:
    """The forecast as JSON values; names carry their units."""
    settings, counts, machines = forecast.settings, forecast.counts, forecast.machines
    return {
        "architecture": forecast.spec.architecture,
        "image_size_pixels": forecast.spec.image_size,
        "gpus": machines.gpus,
        "memory_bytes": machines.memory,
        "batch_size_images": settings.optim.batch_size,
        "micro_batch_images": forecast.images,
        "losses_counted_on": forecast.path,
        "counted": {
            "weights": counts.numbers,
            "weights_bytes": counts.weights,
            "teacher_bytes": counts.teacher,
            "buffers_bytes": counts.buffers,
            "optimizer_state_bytes": counts.moments,
            "activations_bytes_per_image": float(counts.operations.per_image.max()),
            "forward_flops_per_image": sum(asdict(counts.flops.forward).values()),
            "backward_flops_per_image": sum(asdict(counts.flops.backward).values()),
        },
        "engines": [_row_json(row, settings) for row in forecast.rows],
        "advice": forecast.advice,
        "assumptions": assumptions(settings, machines.speed, forecast.path),
    }


def _row_json(row: Row, settings: Settings) -> dict[str, Any]:
    time = row.time
    return {
        "engine": row.engine,
        "teacher_shard": row.teacher_shard,
        "peak_bytes": round(row.peak.total),
        "peak_parts_bytes": {name: round(value) for name, value in asdict(row.peak).items()},
        "fits": row.fits,
        "largest_micro_batch_images": row.largest,
        "step_seconds": None if time is None else time.total,
        "step_parts_seconds": None if time is None else asdict(time),
        "images_per_second": None if time is None else settings.optim.batch_size / time.total,
    }


def _spec(settings: Settings) -> EncoderSpec:
    if settings.encoder.teacher is not None:
        return load_encoder(settings.encoder.teacher, settings.encoder).encoder.spec
    if settings.encoder.architecture is None:
        raise UsageError("nothing to plan: give --teacher, or --set encoder.architecture=timm:NAME")
    return recognise_spec({}, settings.encoder, None).spec


def _micro_batch(settings: Settings, gpus: int) -> int:
    batch, parts = settings.optim.batch_size, settings.optim.accumulate
    if batch % (gpus * parts):
        raise UsageError(
            f"optim.batch_size {batch} does not divide by {gpus} GPUs x optim.accumulate {parts}; "
            f"use {math.ceil(batch / (gpus * parts)) * gpus * parts}"
        )
    return batch // (gpus * parts)


def _path(settings: Settings, *, on_gpu: bool) -> Path:
    dtype = torch.float64 if settings.optim.precision == "fp64" else torch.float32
    if settings.run.force_op is not None:
        return settings.run.force_op
    if not on_gpu:
        return ops.choose("distill", torch.device("cpu"), dtype).path
    return "reference" if dtype == torch.float64 else "triton"


def _rows(
    counts: Counts, settings: Settings, machines: Machines, images: int, *, on_gpu: bool
) -> Iterator[Row]:
    gpus, room = machines.gpus, room_for_tensors(machines.memory, on_gpu=on_gpu)
    for teacher_shard in teachers(settings, gpus):
        for engine in engines(settings):
            spread = Spread(
                engine=engine, processes=gpus, teacher_shard=teacher_shard, on_gpu=on_gpu
            )
            largest = largest_images(counts, settings, spread, room=room)
            time = None
            if machines.speed is not None:
                time = step_time(counts, settings, spread, machines.speed, images=images)
            yield Row(
                engine=engine,
                teacher_shard=teacher_shard,
                peak=peak_memory(counts, settings, spread, images=images),
                fits=images <= largest,
                largest=largest,
                time=time,
            )
