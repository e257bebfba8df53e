"""Which implementation every op would take here, and why."""

import warnings

import torch

from mimic_fast import ops
from mimic_fast.config import Settings
from mimic_fast.doctor.finding import Finding, failed, ok, warning
from mimic_fast.doctor.hardware import device_of
from mimic_fast.doctor.software import compiler_path
from mimic_fast.doctor.trial import Trial

_DOES = {"distill": "losses", "histogram": "joint histograms", "views": "augmented views"}


def op_paths(settings: Settings | None) -> tuple[Finding, ...]:
    """A line for each op; the C++ kernels are built if they have not been."""
    device = device_of(settings)
    forced = None if settings is None else settings.run.force_op
    wide = settings is not None and settings.optim.precision == "fp64"
    dtype = torch.float64 if wide else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what it warns of is the finding
        try:
            with ops.force_for_run(forced, device, dtype):
                pass
        except ops.PathError as error:
            seen, _, todo = str(error).partition("; ")
            return (failed("ops", f"run.force_op: {seen}", todo),)
        with ops.force_for_run(forced, device, dtype):
            return tuple(_path(op, device, dtype) for op in (*ops.OPS, "views"))


def cpu_kernels() -> Finding:
    """Whether this project's C++ extension builds and loads here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        choice = ops.choose("histogram", torch.device("cpu"), torch.float32)
    if choice.path == "cpp":
        return ok("C++ kernels", "built for this processor and loaded")
    todo = "install g++" if compiler_path() is None else "see the compiler's message"
    return warning("C++ kernels", choice.reason, f"{todo}; plain PyTorch runs in their place")


def triton(trial: Trial | None) -> Finding:
    """Whether Triton compiles and runs on the GPU; without one there is nothing to run on."""
    if trial is None:
        return ok("triton", "not tried: no GPU; what it would compile: mimic-fast aot")
    outcome = trial.outcome()
    if outcome.worked:
        return ok("triton", f"{outcome.said}, in {outcome.seconds:.0f} s")
    if outcome.late:
        return warning("triton", outcome.said, "its first compilation is slow; run doctor again")
    return failed("triton", outcome.said, "set run.force_op 'reference', or repair Triton")


def _path(op: ops.Op, device: torch.device, dtype: torch.dtype) -> Finding:
    # Views are made on the CPU wherever training is.
    choice = ops.choose(op, torch.device("cpu") if op == "views" else device, dtype)
    seen = f"{_DOES[op]} run on {choice.path}: {choice.reason}"
    if choice.path == "reference" and choice.reason != "forced":
        return warning(f"op {op}", seen, "it is plain PyTorch, exact and slower")
    return ok(f"op {op}", seen)
