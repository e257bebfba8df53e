"""Processors, memory and GPUs, and what a run would compute on."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from mimic_fast.config import Settings
from mimic_fast.doctor.finding import Finding, failed, ok, refused, warning
from mimic_fast.errors import UsageError
from mimic_fast.precision import check_precision

_GIB = 2**30
_NARROW = ("amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16", "bf16", "fphp")  # of /proc/cpuinfo


def cpu() -> Finding:
    """Cores this process may use, threads PyTorch takes, memory."""
    cores, threads = usable_cores(), torch.get_num_threads()
    model = _field(Path("/proc/cpuinfo"), "model name") or platform.processor()
    seen = (
        f"{model or platform.machine()}, {cores} cores usable, {threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {_memory()}"
    )
    if threads > cores:
        return warning(
            "cpu", seen, f"set OMP_NUM_THREADS={cores}: more threads than cores are slow"
        )
    return ok("cpu", seen)


def gpus() -> Finding:
    """Names, memory and driver of the GPUs that PyTorch sees."""
    smi = shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        if smi is not None and _driver(smi):
            return warning(
                "gpu",
                f"driver {_driver(smi)} is there, but PyTorch {torch.__version__} sees no GPU",
                "check CUDA_VISIBLE_DEVICES, and that this PyTorch is built for the driver",
            )
        return ok("gpu", "none visible: runs compute on the CPU")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in found]
    return ok("gpu", f"{', '.join(names)}; driver {_driver(smi) if smi else 'unknown'}")


def device_of(settings: Settings | None) -> torch.device:
    """What a run would compute on."""
    asked = "auto" if settings is None else settings.run.device
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def device(settings: Settings) -> Finding:
    """Whether the device asked for is there."""
    found = device_of(settings)
    if settings.run.device == "cuda" and found.type != "cuda":
        return failed(
            "device",
            "run.device is 'cuda' but no CUDA device is visible",
            "use run.device 'auto' or 'cpu'",
        )
    return ok("device", f"run.device {settings.run.device!r} computes on {found.type}")


def precision(settings: Settings) -> Finding:
    """Whether products really run in the type asked for, and at what price."""
    asked, found = settings.optim.precision, device_of(settings)
    try:
        check_precision(asked, found)
    except UsageError as error:
        return refused("precision", error)
    seen = f"{asked} on {found.type}"
    if asked in ("bf16", "fp16") and found.type == "cpu" and not _narrow_instructions():
        todo = "use optim.precision fp32 on this CPU, except to try things out"
        return warning("precision", f"{seen}: it has no instructions for that, slower", todo)
    if asked == "bf16" and found.type == "cuda" and not _native_bf16():
        return warning("precision", f"{seen} is emulated", "use optim.precision fp16 or fp32")
    if settings.optim.tf32 and found.type == "cpu":
        return warning("precision", f"{seen}; optim.tf32 is ignored", "a CPU has no TF32")
    return ok("precision", seen)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _native_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _narrow_instructions() -> bool:
    flags = set((_field(Path("/proc/cpuinfo"), "flags") or "").split())
    flags |= set((_field(Path("/proc/cpuinfo"), "Features") or "").split())
    return bool(flags & set(_NARROW))


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    free = f", {int(available.split()[0]) / 2**20:.1f} free" if available else ""
    return f"{total / _GIB:.1f} GiB of memory{free}"


def _driver(smi: str) -> str:
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""


def _field(path: Path, name: str) -> str | None:
    """The first value of ``NAME: VALUE`` in one of Linux's tables."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), None)
