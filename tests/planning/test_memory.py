"""Shares and buffers of the engines, on counts that are plain numbers."""

import json
from dataclasses import replace

import pytest
import torch

from mimic_fast.config import Engine
from mimic_fast.planning.counts import Counts, Operations, Parts
from mimic_fast.planning.flops import Flops, Work
from mimic_fast.planning.memory import Spread, largest_images, peak_memory, room_for_tensors
from mimic_fast.planning.timing import LINK_SHARE, Speed, step_time
from mimic_fast.recipe import load_settings

W = 800_000_000
WORK = Work(convolutions=0.0, products=1e9)
COUNTS = Counts(
    numbers=W // 4,
    weights=W,
    buffers=1000,
    teacher=W,
    moments=2 * W,
    average=0,
    student_parts=Parts(largest=60_000_000, rest=80_000_000),
    teacher_parts=Parts(largest=60_000_000, rest=80_000_000),
    view=600,
    ahead=900,
    pair=20.0,
    operations=Operations(
        fixed=torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64),
        per_image=torch.tensor([1e6, 0.4e6, 0.0], dtype=torch.float64),
        gradients=torch.tensor([0.0, W, W], dtype=torch.float64),
        update_from=2,
    ),
    flops=Flops(forward=WORK, backward=WORK),
)


def spread(engine: Engine = "ddp", processes=8, *, teacher_shard=False, on_gpu=True):
    return Spread(engine=engine, processes=processes, teacher_shard=teacher_shard, on_gpu=on_gpu)


def settings(*overrides):
    return load_settings(overrides=["optim.batch_size=4096", *overrides])


def peak(engine, *overrides, images=2000, counts=COUNTS, **options):
    where = spread(engine, **options)
    return peak_memory(replace(counts, pair=0.0), settings(*overrides), where, images=images)


def test_ddp_in_one_process_is_what_was_counted():
    memory = peak("ddp", processes=1)

    assert memory.total == 4 * W + 1000 + 2000 * 1e6
    assert memory.buckets == memory.gathered == memory.master == 0


def test_worst_moment_moves_from_activations_to_gradients():
    assert peak("ddp", processes=1, images=2000).gradients == 0
    assert peak("ddp", processes=1, images=100).gradients == W
    assert peak("ddp", images=100).gradients == 0  # they are views of the buckets
    assert peak("zero2", images=100).gradients < W


@pytest.mark.parametrize(
    ("engine", "weights", "moments", "master", "gradients"),
    [
        ("ddp", 1, 1, 0, 0),
        ("zero1", 1, 1 / 8, 1 / 8, 1 + 1 / 8),
        ("zero2", 1, 1 / 8, 1 / 8, 1 / 8 + 1 / 8),
        ("zero3", 1 / 8, 1 / 8, 1 / 8, 1 / 8),
        ("fsdp2", 1 / 8, 1 / 8, 0, 1 / 8),
    ],
)
def test_engine_keeps_its_share(engine, weights, moments, master, gradients):
    memory = peak(engine, images=1)

    assert memory.weights == weights * W
    assert memory.moments == moments * 2 * W
    assert memory.master == master * W
    assert memory.gradients == gradients * W
    assert memory.teacher == W


def test_what_is_gathered_and_on_its_way():
    fsdp2, zero1, zero3 = (peak(engine) for engine in ("fsdp2", "zero1", "zero3"))

    assert fsdp2.gathered == 80e6 + 2 * 60e6 + 2 * 60e6
    assert peak("ddp").buckets == W
    assert zero1.buckets % 8 == 0
    assert zero1.buckets > 0
    assert zero3.gathered == W + min(W, 5e7 * 4)


def test_users_deepspeed_file_decides_its_stage_alone(tmp_path):
    own = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": own}))
    overrides = ["run.engine=zero1", f"run.deepspeed={tmp_path / 'own.json'}"]

    assert peak("zero1", *overrides).buckets == 2 * 1000 * 4
    assert peak("zero2", *overrides).buckets == peak("zero2").buckets


def test_cut_teacher_is_its_share_and_what_is_gathered_of_it():
    memory = peak("ddp", teacher_shard=True)

    assert memory.teacher == W / 8 + 80e6 + 2 * 60e6


def test_parts_hold_all_images_and_whole_gradients_of_fsdp2():
    memory = peak("fsdp2", "optim.accumulate=2", images=1)

    assert memory.gradients == W
    assert memory.batches == 600


def test_contrast_is_a_table_of_own_images_by_all():
    counts = replace(COUNTS, average=0)

    memory = peak_memory(counts, settings(), spread(processes=4), images=100)

    assert memory.contrast == 20.0 * 200 * 800


def test_cpu_holds_the_batches_made_ahead():
    memory = peak("ddp", "data.prefetch=2", on_gpu=False, images=10)

    assert memory.batches == 3 * 10 * 900


def test_largest_micro_batch_fits_and_one_more_does_not():
    room = room_for_tensors(80_000_000_000, on_gpu=True)

    largest = largest_images(COUNTS, settings(), spread(), room=room)

    fits, too_large = (
        peak_memory(COUNTS, settings(), spread(), images=images).total
        for images in (largest, largest + 1)
    )
    assert fits <= room < too_large
    assert largest_images(COUNTS, settings(), spread(), room=1e9) == 0


def test_communication_is_hidden_as_far_as_work_lasts():
    slow, fast = Speed(tflops=1000.0, bandwidth=1.0), Speed(tflops=1000.0, bandwidth=1000.0)
    run = settings()

    hidden = step_time(COUNTS, run, spread(), fast, images=1000)
    shown = step_time(COUNTS, run, spread(), slow, images=1000)

    assert hidden.exposed == 0
    assert shown.communication == pytest.approx(2 * 7 / 8 * W / (1e9 * LINK_SHARE))
    assert shown.total == pytest.approx(shown.communication + shown.compute / 2)


def test_cut_weights_send_half_as_much_again():
    speed = Speed(tflops=1000.0, bandwidth=100.0)
    whole, cut = (
        step_time(COUNTS, settings(), spread(engine), speed, images=1).communication
        for engine in ("ddp", "fsdp2")
    )

    assert cut == pytest.approx(1.5 * whole)
