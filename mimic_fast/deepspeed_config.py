"""DeepSpeed's configuration: what this project decides, and what a user's file may."""

import json
from pathlib import Path
from typing import Any

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.errors import UsageError

# Batch, precision and clipping are settings of a run and mean the same under every engine.
_OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "fp16", "bf16", "torch_autocast", "amp", "optimizer", "scheduler"),
)


def zero_stage(engine: str) -> int:
    """1, 2 or 3; 0 for an engine that is not DeepSpeed's."""
    return int(engine[-1]) if engine.startswith("zero") else 0


def deepspeed_config(run: RunSettings, optim: OptimSettings, *, world: int) -> dict[str, Any]:
    """What DeepSpeed is started with.

    Precision stays fp32 there: students compute under autocast of their own, with weights, moments
    and reductions in float32.

    Raises:
        UsageError: If the user's file cannot be read, is of another stage, or sets what the recipe
            sets.
    """
    stage = zero_stage(run.engine)
    config = _built_in(stage) if run.deepspeed is None else _read(run.deepspeed, stage)
    share = optim.batch_size // world
    return config | {
        "train_batch_size": share // optim.accumulate * optim.accumulate * world,
        "train_micro_batch_size_per_gpu": share // optim.accumulate,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.clip_norm,
        "steps_per_print": 10**9,
    }


def _built_in(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 25_000_000,  # values; DeepSpeed's own takes 2 GB for any student
    }
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: Path, stage: int) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"run.deepspeed {path} is no JSON file that can be read: {error}"
        ) from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != stage:
        found = zero.get("stage") if isinstance(zero, dict) else None
        raise UsageError(
            f"run.deepspeed {path} is of ZeRO stage {found}, run.engine asks for {stage}; "
            "set zero_optimization.stage and run.engine alike"
        )
    taken = sorted(set(_OURS) & config.keys())
    if taken:
        raise UsageError(
            f"run.deepspeed {path} sets {', '.join(taken)}, which the recipe decides "
            "(optim.batch_size, accumulate, precision, clip_norm, ...); remove them"
        )
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | config
