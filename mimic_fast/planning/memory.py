"""Peak memory of one process under each engine: shares of what was counted, and its own buffers."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mimic_fast.config import Engine, Settings
from mimic_fast.deepspeed_config import zero_stage
from mimic_fast.planning.counts import Counts
from mimic_fast.planning.engine_buffers import bucket_bytes, gathered_bytes, zero_options

RESERVED = 1.5e9  # bytes of a GPU that no tensor gets: context, cuBLAS, cuDNN and NCCL
FRAGMENTS = 0.05  # of the tensors' peak comes on top: what a caching allocator cannot use
_LARGEST_BATCH = 2**16  # images beyond which no micro-batch is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What one process holds at its worst moment, bytes.

    Args:
        weights: Of the student. ZeRO 3 and FSDP2 keep 1/N between uses (Rajbhandari et al.,
            arXiv:1910.02054, section 5.3; docs of torch.distributed.fsdp.fully_shard).
        master: DeepSpeed updates a copy of 1/N of the weights, also where these are float32
            (stage_1_and_2.py, single_partition_of_fp32_groups; stage3.py,
            fp32_partitioned_groups_flat).
        gathered: Weights of others that ZeRO 3 and FSDP2 have here: see ``gathered_bytes``.
        moments: Optimizer state; ZeRO 1-3 and FSDP2 keep 1/N (arXiv:1910.02054, section 5.1).
        average: Averaged weights (optim.ema); cut as the weights that the optimizer updates are.
        teacher: Its weights, or 1/N and what is gathered of it.
        buffers: BatchNorm's statistics and the like of both networks.
        buckets: Gradients on their way: see ``bucket_bytes``.
        gradients: Of the weights, at this moment; ZeRO 2, 3 and FSDP2 keep 1/N (arXiv:1910.02054,
            section 5.2), ZeRO 3 in a buffer that is always there (stage3.py,
            grad_partitions_flat_buffer).
        activations: Everything else alive, images and losses included: counted, not estimated.
        contrast: The table of the contrastive loss: images of a process by images of all.
        batches: What lies beside the micro-batch: the rest of a share taken in parts and, on a
            CPU, batches made ahead.
    """

    weights: float
    master: float
    gathered: float
    moments: float
    average: float
    teacher: float
    buffers: float
    buckets: float
    gradients: float
    activations: float
    contrast: float
    batches: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a run is spread.

    Args:
        engine: Over processes.
        processes: N.
        teacher_shard: Whether the teacher is cut too.
        on_gpu: Whether batches are made elsewhere.
    """

    engine: Engine
    processes: int
    teacher_shard: bool
    on_gpu: bool


def peak_memory(counts: Counts, settings: Settings, spread: Spread, *, images: int) -> Memory:
    """The worst moment of a step.

    Args:
        counts: One process whose networks are whole.
        settings: Of the run.
        spread: Over what.
        images: Of the micro-batch.

    Raises:
        UsageError: If DeepSpeed's configuration in the settings is not valid.
    """
    engine, cut, parts = spread.engine, 1 / spread.processes, settings.optim.accumulate
    zero = zero_options(engine, settings, spread.processes)
    steady = _steady(counts, settings, spread, zero, images)
    gathered = gathered_bytes(engine, counts.student_parts, counts.weights, zero)
    share = images * parts
    table = counts.pair * (2 * share) * (2 * share * spread.processes)
    step = counts.operations
    activations = step.fixed + images * step.per_image
    always = torch.full_like(step.gradients, counts.weights)
    gradients = _share_kept(spread, parts) * (always if engine == "zero3" else step.gradients)
    alive = activations + gradients
    before = int(alive[: step.update_from].argmax())
    update = step.update_from + int(alive[step.update_from :].argmax())
    # DeepSpeed flattens its gradients into a copy before the step.
    flattened = counts.weights * cut if zero_stage(engine) else 0.0
    moments = [
        replace(
            steady,
            gathered=gathered,
            gradients=float(gradients[before]),
            activations=float(activations[before]),
            contrast=table if parts == 1 else 0.0,
        ),
        replace(
            steady,
            gradients=float(gradients[update]) + flattened,
            activations=float(activations[update]),
        ),
    ]
    if parts > 1:  # the contrast of the whole share comes first, from projections alone
        moments.append(replace(steady, gathered=gathered, contrast=table))
    return max(moments, key=lambda memory: memory.total)


def _steady(
    counts: Counts, settings: Settings, spread: Spread, zero: dict[str, Any], images: int
) -> Memory:
    """What is there all the time."""
    engine, cut = spread.engine, 1 / spread.processes
    own = 1.0 if engine == "ddp" else cut
    return Memory(
        weights=counts.weights * (1.0 if engine in ("ddp", "zero1", "zero2") else cut),
        master=counts.weights * cut if zero_stage(engine) else 0.0,
        gathered=0.0,
        moments=counts.moments * own,
        average=counts.average * own,
        teacher=_teacher(counts, spread.processes if spread.teacher_shard else 1),
        buffers=float(counts.buffers),
        buckets=bucket_bytes(engine, counts.weights, zero, spread.processes),
        gradients=0.0,
        activations=0.0,
        contrast=0.0,
        batches=_batches(counts, settings, images, on_gpu=spread.on_gpu),
    )


def room_for_tensors(memory: int, *, on_gpu: bool) -> float:
    """Bytes that the peak of tensors may reach in a memory."""
    return (memory - RESERVED) / (1 + FRAGMENTS) if on_gpu else float(memory)


def largest_images(counts: Counts, settings: Settings, spread: Spread, *, room: float) -> int:
    """The largest micro-batch whose peak does not exceed ``room`` bytes; 0: none."""

    def fits(images: int) -> bool:
        return peak_memory(counts, settings, spread, images=images).total <= room

    low, high = 0, 1
    while high <= _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _share_kept(spread: Spread, parts: int) -> float:
    if spread.engine == "ddp":  # views of the buckets, which are counted already
        return 0.0 if spread.processes > 1 else 1.0
    if spread.engine == "zero1":
        return 1.0
    # FSDP2 adds whole gradients up until the last part of a share and cuts them then.
    if spread.engine == "fsdp2" and parts > 1:
        return 1.0
    return 1 / spread.processes


def _teacher(counts: Counts, processes: int) -> float:
    if processes == 1:
        return float(counts.teacher)
    parts = counts.teacher_parts
    gathered = min(counts.teacher, parts.rest + 2 * parts.largest)
    return counts.teacher / processes + gathered


def _batches(counts: Counts, settings: Settings, images: int, *, on_gpu: bool) -> float:
    parts = settings.optim.accumulate
    others = float((parts - 1) * images * counts.view)
    if on_gpu or not settings.data.prefetch:
        return others
    # So many wait, and one is being made.
    return others + (settings.data.prefetch + 1) * parts * images * counts.ahead
