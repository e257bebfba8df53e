"""Which settings of a recipe fit where it is to run: the first of a few, cheapest changes first."""

from collections.abc import Iterator
from functools import cache
from typing import get_args

from mimic_fast.config import EncoderSpec, Engine, Settings
from mimic_fast.ops_choice import Path
from mimic_fast.planning.counts import Counts, count
from mimic_fast.planning.memory import Spread, peak_memory, room_for_tensors

Advice = dict[str, str | int | bool]

# What sends least and asks for least comes first.
_PREFERRED: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "fsdp2", "zero3")


def engines(settings: Settings) -> list[Engine]:
    """Those that can run the recipe: DeepSpeed keeps its weights in float32."""
    known: tuple[Engine, ...] = get_args(Engine)
    fp64 = settings.optim.precision == "fp64"
    return [engine for engine in known if not (fp64 and engine.startswith("zero"))]


def teachers(settings: Settings, gpus: int) -> tuple[bool, ...]:
    """Whether the teacher may be whole, and cut."""
    if settings.encoder.teacher_shard:
        return (True,)
    return (False, True) if gpus > 1 else (False,)


def first_that_fits(
    spec: EncoderSpec,
    settings: Settings,
    counts: Counts,
    *,
    path: Path,
    gpus: int,
    memory: int,
    on_gpu: bool,
) -> Advice | None:
    """Another engine, then more parts, then a cut teacher, then activations computed again.

    Args:
        spec: Of teacher and student.
        settings: The recipe's; its global batch stays.
        counts: Of these settings.
        path: What the losses will run on.
        gpus: Processes.
        memory: Of each, bytes.
        on_gpu: Whether batches are made elsewhere.
    """

    @cache
    def counted(*, in_parts: bool, recomputed: bool) -> Counts:
        optim = settings.optim
        if (in_parts, recomputed) == (optim.accumulate > 1, optim.activation_checkpointing):
            return counts
        changed = _changed(settings, 2 if in_parts else 1, recomputed=recomputed)
        return count(spec, changed, path=path, on_gpu=on_gpu)

    room = room_for_tensors(memory, on_gpu=on_gpu)
    for parts, recomputed, teacher_shard, engine in _choices(settings, gpus):
        spread = Spread(engine=engine, processes=gpus, teacher_shard=teacher_shard, on_gpu=on_gpu)
        found = peak_memory(
            counted(in_parts=parts > 1, recomputed=recomputed),
            _changed(settings, parts, recomputed=recomputed),
            spread,
            images=settings.optim.batch_size // gpus // parts,
        )
        if found.total <= room:
            return {
                "run.engine": engine,
                "optim.accumulate": parts,
                "optim.activation_checkpointing": recomputed,
                "encoder.teacher_shard": teacher_shard,
            }
    return None


def _choices(settings: Settings, gpus: int) -> Iterator[tuple[int, bool, bool, Engine]]:
    share = settings.optim.batch_size // gpus
    possible = engines(settings)
    for recomputed in sorted({settings.optim.activation_checkpointing, True}):
        for teacher_shard in teachers(settings, gpus):
            for parts in range(settings.optim.accumulate, share + 1):
                if share % parts == 0:
                    for engine in _PREFERRED:
                        if engine in possible:
                            yield parts, recomputed, teacher_shard, engine


def _changed(settings: Settings, parts: int, *, recomputed: bool) -> Settings:
    optim = {"accumulate": parts, "activation_checkpointing": recomputed}
    return settings.model_copy(update={"optim": settings.optim.model_copy(update=optim)})
