"""Trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases and MLflow through Accelerate.

Process 0 alone opens runs, and a resumed purification goes on with them: ``trackers.json`` in the
run directory keeps their ids. All of it stays there unless the user's own environment
(``WANDB_MODE``, ``MLFLOW_TRACKING_URI``) says otherwise.
"""

import contextlib
import importlib.util
import json
import math
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimic_fast.config import Settings
from mimic_fast.errors import UsageError
from mimic_fast.files import write_atomic
from mimic_fast.recipe import settings_record
from mimic_fast.tracker_kinds import PACKAGES, make_tracker, run_id, tracker_errors

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_trackers(
    accelerator: "Accelerator",
    names: Sequence[str],
    *,
    out: Path,
    settings: Settings,
    resume: bool,
    step: int = 0,
) -> None:
    """Opens one run per tracker. Every process calls it.

    Args:
        accelerator: Takes the trackers; made without ``log_with``.
        names: Of ``settings.run.trackers``; empty: nothing happens.
        out: Run directory.
        settings: Recorded with the run, without folders of this machine.
        resume: Whether earlier runs of ``out`` go on.
        step: Steps done before; what a killed run told TensorBoard of later ones is hidden.

    Raises:
        UsageError: If a package is missing or a tracker does not start.
        MachineError: If the run directory cannot be written.
    """
    if not names:
        return
    check_packages(names)
    problem = ""
    if accelerator.is_main_process:
        problem = _open(accelerator, names, out, settings, resume, step)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        problem = broadcast_object_list([problem])[0]
    if problem:
        raise UsageError(problem)


def log(accelerator: "Accelerator", row: Mapping[str, Any], step: int) -> None:
    """Sends the numbers of a row of ``metrics.jsonl``; inner ones are named like ``time/data``.

    A tracker that fails is left out from then on, with a warning: it is no reason to end a run.
    """
    values = _numbers(row)
    for tracker in list(accelerator.trackers):
        errors = tracker_errors(tracker.name)
        try:
            tracker.log(values, step=step)
        except errors as error:
            warnings.warn(
                f"{tracker.name} failed at step {step} and gets no more metrics (metrics.jsonl has "
                f"them all): {_line(error)}",
                stacklevel=2,
            )
            accelerator.trackers.remove(tracker)
            with contextlib.suppress(*errors):
                tracker.finish()


def finish(accelerator: "Accelerator") -> None:
    """Closes the runs. The process group stays, unlike with ``Accelerator.end_training``."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except tracker_errors(tracker.name) as error:
            warnings.warn(f"{tracker.name} did not close its run: {_line(error)}", stacklevel=2)


def check_packages(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        UsageError: With the packages that are missing.
    """
    for name in names:
        missing = [part for part in PACKAGES[name] if not _importable(part)]
        if missing:
            raise UsageError(
                f"run.trackers has {name!r}, which needs {', '.join(missing)}; "
                "pip install 'mimic_fast[trackers]' or leave it out"
            )


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # blocked in sys.modules
        return False


def _open(
    accelerator: "Accelerator",
    names: Sequence[str],
    out: Path,
    settings: Settings,
    resume: bool,
    step: int,
) -> str:
    """Starts the trackers; returns what went wrong, or an empty string.

    One after another rather than by ``Accelerator.init_trackers``, so that an error names its
    tracker and those that run already are closed.
    """
    ids = _read_ids(out) if resume else {}
    config = _flat(settings_record(settings), separator=".")
    for name in names:
        known, new = ids.get(name), uuid.uuid4().hex[:8]
        try:
            # What they deprecate in each other is not the user's to mend.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                tracker = make_tracker(name, out, known=known, new=new, step=step)
                tracker.start()
            accelerator.trackers.append(tracker)
            if known is None:
                _record(tracker, config)
        except tracker_errors(name) as error:
            finish(accelerator)
            return f"run.trackers has {name!r}, which cannot start: {_line(error)}"
        ids[name] = run_id(tracker)
    write_atomic(out / "trackers.json", (json.dumps(ids, indent=2) + "\n").encode())
    return ""


def _record(tracker: Any, config: Mapping[str, Any]) -> None:
    """Leaves the settings with a new run."""
    if tracker.name == "tensorboard":
        # As text: TensorBoard would keep parameters as a run of their own.
        lines = [f"    {name} = {json.dumps(value)}" for name, value in config.items()]
        tracker.log({"settings": "\n".join(lines)}, step=0)
    else:
        tracker.store_init_configuration(dict(config))


def _read_ids(out: Path) -> dict[str, str]:
    path = out / "trackers.json"
    if not path.exists():
        return {}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}); delete it to begin new runs") from None
    return {name: value for name, value in ids.items() if isinstance(value, str)}


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    flat = _flat(row, separator="/")
    return {
        name: value
        for name, value in flat.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(values: Mapping[str, Any], *, separator: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            flat |= _flat(value, separator=separator, prefix=name + separator)
        else:
            flat[name] = value
    return flat
