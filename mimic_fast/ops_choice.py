"""Which implementation an op runs on, why, and how often each one ran."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import torch

from mimic_fast.errors import UsageError
from mimic_fast.files import user_cache
from mimic_fast.kernels.cpu_build import NoCompilerError, load_library
from mimic_fast.kernels.engine import Engine

if TYPE_CHECKING:
    import ctypes

Path = Literal["reference", "compiled", "triton", "cpp"]
Op = Literal["distill", "histogram", "views"]
PATHS: tuple[Path, ...] = get_args(Path)
OPS: tuple[Op, ...] = ("distill", "histogram")  # that are forced together
VIEW_PATHS: tuple[Path, ...] = ("reference", "cpp")

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
_forced: ContextVar[dict[Op, Path]] = ContextVar("forced", default={})  # noqa: B039 (never mutated)
_calls: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What runs, and why."""

    path: Path
    reason: str


class PathError(UsageError, RuntimeError):
    """A path was forced that cannot run here; the message has the reason and the alternative."""


@contextmanager
def force(path: Path | None, *, op: Op | None = None) -> Iterator[None]:
    """Makes ops run on one path, or raise where it cannot.

    Args:
        path: The path; None: as usual.
        op: Which op; None: losses and counts. Views are no part of it: with other roundings in the
            images, paths of the losses could not be compared.

    Raises:
        ValueError: If there is no such path.
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"expected one of {', '.join(PATHS)}, got {path!r}")
    ops: tuple[Op, ...] = OPS if op is None else (op,)
    chosen: dict[Op, Path] = {} if path is None else dict.fromkeys(ops, path)
    token = _forced.set({**_forced.get(), **chosen})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def force_for_run(path: Path | None, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What ``run.force_op`` asks for: ``compiled`` is a form of the losses alone.

    Raises:
        PathError: At once, if the path cannot run on this device.
    """
    with force(path, op="distill" if path == "compiled" else None):
        for op in OPS:
            choose(op, device, dtype)
        yield


def calls() -> Counter[str]:
    """How often each op ran on each path in this process: ``{"distill/cpp": layers}``."""
    return Counter(_calls)


def count_call(op: Op, path: Path, number: int = 1) -> None:
    """Notes that an op ran; a distillation counts its layers."""
    _calls[f"{op}/{path}"] += number


def choose(op: Op, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The path that an op takes for tensors of a device and dtype.

    Raises:
        PathError: If a path was forced that cannot run here.
    """
    return _choose(op, device, dtype, _forced.get().get(op))


@lru_cache(maxsize=256)
def _choose(op: Op, device: torch.device, dtype: torch.dtype | None, forced: Path | None) -> Choice:
    if forced is not None:
        hindrance = _hindrance(forced, op, device, dtype)
        if hindrance is not None:
            raise PathError(f"{forced} was asked for, but {hindrance}")
        return Choice(path=forced, reason="forced")
    path: Path = "triton" if device.type == "cuda" else "cpp"
    if op == "views" and device.type != "cpu":
        return Choice(path="reference", reason="views on a GPU are plain torch")
    hindrance = _hindrance(path, op, device, dtype)
    if hindrance is None:
        return Choice(path=path, reason=f"the fastest for {device.type} tensors")
    if path == "triton" or _cpp_missing() is not None:
        _warn_once(f"{op} runs on plain torch, slower: {hindrance}")
    return Choice(path="reference", reason=hindrance)


def engine(path: Path) -> Engine:
    """The distillation kernels of ``triton`` or ``cpp``, which must be possible here."""
    return _triton_engine() if path == "triton" else _cpp_engine()


def cpu_library(name: str) -> "ctypes.CDLL":
    """The C++ kernels, built now if they have not been."""
    return load_library(name, user_cache() / "kernels")


def _hindrance(path: Path, op: Op, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a path cannot run, with what can be used; None if it can."""
    if op == "views" and (path not in VIEW_PATHS or (path == "cpp" and device.type != "cpu")):
        return f"views are made by cpp on the CPU, or by reference, not by {path} on {device.type}"
    if path == "triton":
        return _no_triton(op, device, dtype)
    if path == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels need CPU tensors, these are on {device.type}; use triton"
        if op == "distill" and dtype not in _FLOATS:
            return f"the C++ kernels take float32, float64 and bfloat16, not {dtype}; use reference"
        return _cpp_missing()
    if path == "compiled" and op == "histogram":
        return "counting has no compiled form; use reference, cpp or triton"
    return None


def _no_triton(op: Op, device: torch.device, dtype: torch.dtype | None) -> str | None:
    other = "cpp or reference" if device.type == "cpu" else "reference"
    if find_spec("triton") is None:
        return f"triton is not installed; use {other}"
    if op == "distill" and dtype == torch.float64:
        return f"the Triton kernels take float32, float16 and bfloat16, not float64; use {other}"
    if device.type != "cuda" and not _interpreted():
        return f"Triton needs a GPU and the tensors are on {device.type}; use {other}"
    return None


def _interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU, as tests do."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _cpp_missing() -> str | None:
    try:
        cpu_library("cpu_loss")
        cpu_library("cpu_histogram")
        cpu_library("cpu_views")
    except NoCompilerError as error:
        return f"{error}; install a C++ compiler, or use reference"
    return None


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


@cache
def _triton_engine() -> Engine:
    from mimic_fast.kernels import distill_loss

    return Engine(
        name="triton",
        power_maps=distill_loss.power_maps,
        forward=distill_loss.forward,
        backward=distill_loss.backward,
    )


@cache
def _cpp_engine() -> Engine:
    from mimic_fast.kernels import cpu_loss

    library = cpu_library("cpu_loss")
    return Engine(
        name="cpp",
        power_maps=partial(cpu_loss.power_maps, library=library),
        forward=partial(cpu_loss.forward, library=library),
        backward=partial(cpu_loss.backward, library=library),
        forward_with_gradient=partial(cpu_loss.forward_with_gradient, library=library),
    )
