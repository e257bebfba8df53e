"""Packages, compiler and FFmpeg: what is installed, in which version."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mimic_fast.doctor.finding import Finding, failed, ok, warning
from mimic_fast.errors import UsageError
from mimic_fast.version import VERSION

REQUIRED = (
    *("torch", "torchvision", "numpy", "timm", "safetensors", "accelerate", "pydantic"),
    *("typer", "rich", "matplotlib", "jinja2", "pillow", "jaxtyping"),
)
OPTIONAL = (
    *("triton", "deepspeed", "ninja", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("av", "ffmpeg-python", "imageio-ffmpeg", "datasets"),
    *("tensorboard", "wandb", "mlflow", "mlflow-skinny"),
)


def packages() -> Finding:
    """What everything needs."""
    versions = {name: installed(name) for name in REQUIRED}
    missing = [name for name, text in versions.items() if text is None]
    seen = f"mimic_fast {VERSION}, python {platform.python_version()}, {_listed(versions)}"
    if missing:
        return failed("packages", f"missing: {', '.join(missing)}", f"pip install {missing[0]}")
    return ok("packages", seen)


def optional_packages() -> Finding:
    """What some settings need; missing ones are a finding of the check that needs them."""
    versions = {name: installed(name) for name in OPTIONAL}
    return ok("extras", _listed(versions) or "none installed")


def libraries() -> Finding:
    """What PyTorch was built with."""
    import torch

    cudnn = torch.backends.cudnn.version()
    nccl = _nccl_version()
    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "cuDNN": cudnn, "NCCL": nccl}
    facts = [f"{name} {value}" for name, value in built.items() if value]
    return ok("torch", ", ".join([torch.__version__, *facts]))


def compiler() -> Finding:
    """The C++ compiler, which the CPU kernels, torch.compile and DeepSpeed use."""
    found = compiler_path()
    if found is None:
        return warning(
            "compiler",
            "no c++, g++ or clang++ on PATH",
            "install g++: without it the CPU runs plain PyTorch, slower, and DeepSpeed not at all",
        )
    return ok("compiler", f"{found}: {_first_line([found, '--version'])}")


def compiler_path() -> str | None:
    """The compiler that ``kernels/cpu_build.py`` would take."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def ninja_path() -> str | None:
    """Ninja as DeepSpeed finds it: on PATH, or beside this Python."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def ninja() -> Finding:
    """Ninja, with which DeepSpeed builds its C++ parts on first use."""
    found = ninja_path()
    if found is None:
        return warning("ninja", "not on PATH", "pip install ninja, if DeepSpeed is to run")
    return ok("ninja", found)


def ffmpeg() -> Finding:
    """The FFmpeg that videos are decoded with, and the packages around it."""
    from mimic_fast.data.video_ffmpeg import ffmpeg_binary

    missing = [name for name in ("av", "ffmpeg") if find_spec(name) is None]
    todo = "pip install 'mimic_fast[video]', if clean images come from videos"
    if missing:
        return warning("ffmpeg", f"package {' and '.join(missing)} not installed", todo)
    try:
        binary = ffmpeg_binary()
    except UsageError as error:
        return warning("ffmpeg", str(error), todo)
    return ok("ffmpeg", f"{binary}: {_first_line([binary, '-version'])}")


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nccl_version() -> str:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available():
        return ""
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {text}" for name, text in versions.items() if text is not None)


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return next(iter(done.stdout.splitlines()), "")
