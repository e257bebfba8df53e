"""All checks in one go: the machine's, and with settings the recipe's.

Checks that need processes of their own are begun first and looked at last.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from mimic_fast.config import Settings
from mimic_fast.deepspeed_config import zero_stage
from mimic_fast.doctor import engines, hardware, inputs, paths, software, storage
from mimic_fast.doctor.finding import Finding
from mimic_fast.doctor.trial import Trial
from mimic_fast.progress import Event, Reporter, silent

SECONDS = 25  # for a trial: on an idle machine all of them together need ten


def examine(
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    world: int = 1,
    seconds: int = SECONDS,
    report: Reporter = silent,
) -> tuple[Finding, ...]:
    """Everything that can be told in half a minute.

    Nothing is trained, and nothing stays behind but the caches a run would fill.

    Args:
        settings: Of a purification; None: the machine alone.
        out: Run directory if the settings name none.
        world: Processes the run would have, as far as a launcher has told.
        seconds: After which what runs in processes of its own is killed.
        report: Told of every check that is done.

    Returns:
        The findings in reading order; a recipe can run if none of them failed.
    """
    found: list[Finding] = []
    with ExitStack() as stack:
        for finding in _findings(settings, out, world, _Trials(stack, seconds)):
            found.append(finding)
            report(Event(phase="doctor", done=len(found), total=len(found) + 1, unit="checks"))
    return tuple(found)


def _findings(
    settings: Settings | None, out: Path | None, world: int, trials: "_Trials"
) -> Iterator[Finding]:
    started = _started(settings, world, trials)
    yield from (software.packages(), software.optional_packages(), software.libraries())
    yield from (hardware.cpu(), hardware.gpus())
    if settings is not None:
        yield from (hardware.device(settings), hardware.precision(settings))
    yield from (software.compiler(), software.ninja(), paths.cpu_kernels())
    yield from paths.op_paths(settings)
    yield engines.backends()
    yield from engines.engines(settings, world=world)
    encoder = None
    if settings is not None:
        finding, encoder = inputs.teacher(settings)
        yield finding
        tracked = inputs.tracker_packages(settings)
        if tracked is not None:
            yield tracked
        out = settings.run.out or out
    yield storage.run_directory(out, resume="auto" if settings is None else settings.run.resume)
    yield storage.disk_space(out, settings, encoder)
    yield software.ffmpeg()
    for conclude in started:
        yield conclude()


class _Trials:
    """Starts trials that are ended with ``stack`` at the latest."""

    def __init__(self, stack: ExitStack, seconds: int) -> None:
        self._stack, self._seconds = stack, seconds

    def __call__(self, function: str, *calls: tuple[object, ...]) -> Trial:
        trial = Trial(function, calls or ((),), seconds=self._seconds)
        self._stack.callback(trial.end)
        return trial

    def pair(self, backend: str) -> Trial:
        """Two processes that meet in a file of a temporary folder."""
        store = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "store"
        return self("all_reduce", *((backend, str(store), rank) for rank in range(2)))


def _started(settings: Settings | None, world: int, trials: _Trials) -> list[Callable[[], Finding]]:
    """Begins what runs in processes of its own; each entry waits for one and tells of it."""
    device = hardware.device_of(settings)
    conclude: list[Callable[[], Finding]] = []
    if settings is not None:
        text = settings.model_dump_json()
        data = trials("data_opens", (text, world)) if inputs.data_opens_at_once(settings) else None
        conclude.append(lambda: inputs.data(settings, data))
        if zero_stage(settings.run.engine) and find_spec("deepspeed") is not None:
            conclude.append(partial(engines.deepspeed_imports, trials("deepspeed_version")))
    needed = settings is None or world > 1 or settings.run.engine != "ddp"
    for backend in _backends():
        pair = trials.pair(backend)
        conclude.append(partial(engines.all_reduce, backend, pair, needed=needed))
    dali = trials("dali_views", (device.type,)) if inputs.has_dali() else None
    asked = settings is not None and settings.data.backend == "dali"
    conclude.append(lambda: inputs.dali(dali, needed=asked, device=device))
    triton = trials("triton_runs") if device.type == "cuda" else None
    conclude.append(lambda: paths.triton(triton))
    return conclude


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    found = ["gloo"] if dist.is_gloo_available() else []
    enough = torch.cuda.is_available() and torch.cuda.device_count() > 1
    return [*found, "nccl"] if enough and dist.is_nccl_available() else found
