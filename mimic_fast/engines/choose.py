"""From ``run.engine`` to an engine."""

from typing import TYPE_CHECKING

from mimic_fast.config import Settings
from mimic_fast.deepspeed_config import zero_stage
from mimic_fast.distributed import Processes
from mimic_fast.encoders.blocks import blocks
from mimic_fast.engines.ddp import DdpEngine
from mimic_fast.engines.engine import Engine
from mimic_fast.engines.fsdp2 import Fsdp2Engine
from mimic_fast.engines.zero import ZeroEngine
from mimic_fast.step import Student

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_engine(
    student: Student, *, settings: Settings, accelerator: "Accelerator", processes: Processes
) -> Engine:
    """Wraps ``student``, which is on its device and of its final type."""
    name, optim = settings.run.engine, settings.optim
    if name == "ddp":
        return DdpEngine(student, optim=optim, accelerator=accelerator)
    if name == "fsdp2":
        units = blocks(student.tapped)
        return Fsdp2Engine(student, blocks=units, optim=optim, processes=processes)
    return ZeroEngine(
        student,
        stage=zero_stage(name),
        optim=optim,
        accelerator=accelerator,
        processes=processes,
    )
