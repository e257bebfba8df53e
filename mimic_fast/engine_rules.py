"""What an engine needs before it is started: asked by a run that begins, and by the doctor."""

from importlib.util import find_spec

import torch.distributed as dist

from mimic_fast.config import Engine, OptimSettings, RunSettings
from mimic_fast.deepspeed_config import zero_stage


def why_not(engine: Engine, run: RunSettings, optim: OptimSettings) -> tuple[str, str] | None:
    """Why an engine cannot run with these settings, and what to do about it; None if it can.

    ``run.engine`` itself is not read: the doctor asks about all of them.
    """
    if engine != "ddp" and not dist.is_available():
        return "needs torch.distributed, which this PyTorch lacks", "install another build"
    if not zero_stage(engine):
        if run.deepspeed is not None:
            return (
                "does not take run.deepspeed, which is for zero1, zero2 and zero3",
                "leave it out",
            )
        return None
    if find_spec("deepspeed") is None:
        return "needs the package deepspeed", "pip install 'mimic_fast[deepspeed]'"
    if optim.precision == "fp64":
        return "keeps its weights in float32", "use ddp or fsdp2 for fp64, or another precision"
    return None
