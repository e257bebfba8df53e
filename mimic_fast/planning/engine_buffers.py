"""What engines hold beyond their shares: weights gathered for use, gradients on their way."""

from typing import Any

from mimic_fast.config import Engine, Settings
from mimic_fast.deepspeed_config import deepspeed_config, zero_stage
from mimic_fast.planning.counts import Parts

_FLOAT = 4  # bytes of a weight or gradient in every buffer


def gathered_bytes(engine: Engine, parts: Parts, weights: int, zero: dict[str, Any]) -> float:
    """What is gathered of cut weights at the end of the forward pass.

    FSDP2: what belongs to no block stays gathered from forward to backward, one block computes
    while the next one arrives, and in backward a block's whole gradient and its copy that is
    scattered come on top (docs of fully_shard; its memory is deterministic by design). ZeRO 3
    keeps what will be used again within ``stage3_max_reuse_distance`` numbers: the last half of
    that distance, since backward comes back over it; what it gathers ahead arrives in a buffer of
    its own (partitioned_param_coordinator.py).
    """
    if engine == "fsdp2":
        return float(min(weights, parts.rest + 2 * parts.largest) + 2 * parts.largest)
    if engine == "zero3":
        reused = float(zero.get("stage3_max_reuse_distance", 1e9)) / 2
        ahead = float(zero.get("stage3_prefetch_bucket_size", 5e7))
        blocks = parts.rest + 2 * parts.largest
        kept = min(float(weights), max(blocks, reused * _FLOAT))
        return kept + min(float(weights), ahead * _FLOAT)
    return 0.0


def bucket_bytes(engine: Engine, weights: int, zero: dict[str, Any], processes: int) -> float:
    """Buffers for communication.

    DDP's buckets are as large together as the gradients, which are views of them (Li et al.,
    arXiv:2006.15704, section 4.2; ``gradient_as_bucket_view``). DeepSpeed allocates
    ``reduce_bucket_size`` numbers whatever the model's size, in stages 1 and 2 twice with
    ``overlap_comm``.
    """
    if engine == "ddp":
        return float(weights) if processes > 1 else 0.0
    if not zero_stage(engine) or not zero.get("contiguous_gradients", True):
        return 0.0
    twice = engine != "zero3" and zero.get("overlap_comm", False)
    return float(zero.get("reduce_bucket_size", 5e8)) * _FLOAT * (2 if twice else 1)


def zero_options(engine: Engine, settings: Settings, processes: int) -> dict[str, Any]:
    """The ``zero_optimization`` that DeepSpeed would be started with; empty for other engines."""
    if not zero_stage(engine):
        return {}
    # The user's file is of one stage: the others are planned with the built-in one.
    own = settings.run.deepspeed if settings.run.engine == engine else None
    run = settings.run.model_copy(update={"engine": engine, "deepspeed": own})
    config = deepspeed_config(run, settings.optim, world=processes)
    return config["zero_optimization"]
