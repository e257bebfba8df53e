"""What each engine would do here, and how its processes are started and talk to each other."""

import os
from typing import get_args

import torch
import torch.distributed as dist

from mimic_fast.config import Engine, Settings
from mimic_fast.deepspeed_config import deepspeed_config, zero_stage
from mimic_fast.doctor.finding import Finding, failed, ok, refused, warning
from mimic_fast.doctor.hardware import device_of, usable_cores
from mimic_fast.doctor.software import compiler_path, ninja_path
from mimic_fast.doctor.trial import Trial
from mimic_fast.engine_rules import why_not
from mimic_fast.errors import UsageError

_CUT = {
    "zero1": "optimizer cut over the processes",
    "zero2": "optimizer and gradients cut over the processes",
    "zero3": "optimizer, gradients and weights cut over the processes",
    "fsdp2": "optimizer, gradients and weights cut over the processes by torch",
}


def backends() -> Finding:
    """What processes can talk through."""
    if not dist.is_available():
        return warning(
            "backends", "this PyTorch has no torch.distributed", "one process and engine ddp only"
        )
    there = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    names = ", ".join(name for name, is_there in there.items() if is_there)
    if not there["gloo"]:
        return warning("backends", names, "gloo is missing: no runs of several CPU processes")
    if torch.cuda.is_available() and not there["nccl"]:
        return warning("backends", names, "nccl is missing: no runs of several GPUs")
    return ok("backends", names)


def engines(settings: Settings | None, *, world: int) -> tuple[Finding, ...]:
    """A line for every engine; the recipe's own fails where it cannot run."""
    chosen = None if settings is None else settings.run.engine
    device = device_of(settings)
    found = []
    for engine in get_args(Engine):
        name = f"engine {engine}" + (" (chosen)" if engine == chosen else "")
        hindrance = _hindrance(engine, settings, device, world)
        if hindrance is None:
            found.append(ok(name, _runs(engine, device)))
        elif engine == chosen:
            found.append(failed(name, *hindrance))
        else:
            found.append(warning(name, *hindrance))
    return tuple(found)


def deepspeed_imports(trial: Trial) -> Finding:
    """Whether DeepSpeed can be imported, which takes long and fails in its own ways."""
    outcome = trial.outcome()
    if outcome.worked:
        return ok("deepspeed", f"{outcome.said}, imported in {outcome.seconds:.0f} s")
    if outcome.late:
        return warning(
            "deepspeed", f"import {outcome.said}", "try it: python -m deepspeed.env_report"
        )
    return failed("deepspeed", f"import fails: {outcome.said}", "use engine fsdp2 or reinstall it")


def all_reduce(backend: str, trial: Trial, *, needed: bool) -> Finding:
    """How two processes that met on this machine got on."""
    outcome = trial.outcome()
    if outcome.worked:
        return ok(
            f"all-reduce {backend}", f"{outcome.said} in {outcome.seconds:.1f} s, start included"
        )
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    todo = f"check that this host's name resolves, or set {variable} (lo on one machine)"
    if outcome.late and os.getloadavg()[0] > 2 * usable_cores():
        todo = "the machine is busy: give it a longer --timeout, or " + todo
    make = failed if needed else warning
    return make(f"all-reduce {backend}", outcome.said, todo)


def _hindrance(
    engine: Engine, settings: Settings | None, device: torch.device, world: int
) -> tuple[str, str] | None:
    """Why an engine cannot run, and what to do; None if it can."""
    given = Settings() if settings is None else settings
    run = given.run
    if run.engine != engine:  # its file belongs to the engine it was written for
        run = run.model_copy(update={"deepspeed": None})
    found = why_not(engine, run, given.optim)
    if found is not None or not zero_stage(engine):
        return found
    if device.type == "cpu" and (ninja_path() is None or compiler_path() is None):
        return "needs ninja and a C++ compiler on a CPU", "pip install ninja; install g++"
    try:
        deepspeed_config(run.model_copy(update={"engine": engine}), given.optim, world=world)
    except UsageError as error:
        finding = refused("", error)
        return finding.seen, finding.todo
    return None


def _runs(engine: Engine, device: torch.device) -> str:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if engine == "ddp":
        several = "several by torchrun"
        if device.type == "cpu":
            several += " (on a CPU Accelerate's own launcher runs one)"
        elif torch.cuda.device_count() > 1:
            several = f"{torch.cuda.device_count()} by torchrun or accelerate launch"
        return f"runs over {backend}: one process directly, {several}"
    return f"runs over {backend} under torchrun, even in one process: {_CUT[engine]}"
