"""Whether the run directory takes files the way a run writes them, and enough of them."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from mimic_fast.config import Settings
from mimic_fast.doctor.finding import Finding, failed, ok, refused
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import MachineError
from mimic_fast.files import machine_errors, write_atomic

_BYTES = 2**20  # of the file that is written
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}


def run_directory(out: Path | None, *, resume: str) -> Finding:
    """Writes, syncs, renames, reads back and removes a file where the run would.

    Folders that had to be made are removed again.

    Args:
        out: Run directory; None: a temporary one.
        resume: ``run.resume``; what ``never`` finds there is another run.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _written(Path(folder))
    if resume == "never" and (out / "config.json").exists():
        return failed(
            "run directory", f"{out} already holds a run", "use --resume auto or another --out"
        )
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with machine_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        return _written(out)
    except (MachineError, OSError) as error:
        return refused("run directory", error)
    finally:
        for folder in made:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def disk_space(out: Path | None, settings: Settings | None, encoder: Encoder | None) -> Finding:
    """Free space against what the run states of this encoder take.

    Args:
        out: Run directory, not necessarily there; None: the temporary folder's disk.
        settings: How many states are kept, and which optimizer's; None: only what is free.
        encoder: The teacher, which the student's shapes are those of; None: it could not be read.
    """
    folder = Path(tempfile.gettempdir()) if out is None else out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    seen = f"{_size(free)} free at {folder}"
    if settings is None or encoder is None:
        return ok("disk", seen)
    one = state_bytes(settings, encoder)
    # The new state is written before the oldest goes; the encoder itself comes at the end.
    needed = one * (settings.run.keep + 1) + _weights(encoder) * 4
    seen += f"; a run state takes {_size(one)}, run.keep {settings.run.keep}"
    if free < needed:
        todo = f"free {_size(needed - free)}, lower run.keep or choose another --out"
        return failed("disk", seen, todo)
    return ok("disk", seen)


def state_bytes(settings: Settings, encoder: Encoder) -> int:
    """Bytes of one run state: weights, moments of the optimizer, averaged weights."""
    values = _weights(encoder)
    if settings.loss.contrastive > 0:
        width = encoder.feature_dim
        values += width * (width + 1) + (width + 1) * settings.loss.projection
    optim = settings.optim
    moments = _MOMENTS[optim.name] if optim.name != "sgd" or optim.momentum > 0 else 0
    each = 8 if optim.precision == "fp64" else 4
    return values * each * (1 + moments + (optim.ema > 0))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _weights(encoder: Encoder) -> int:
    return sum(value.numel() for value in encoder.state_dict().values())


def _written(folder: Path) -> Finding:
    path = folder / f".doctor-{os.getpid()}"
    content = os.urandom(_BYTES)
    began = time.monotonic()
    try:
        write_atomic(path, content)
        same = path.read_bytes() == content
    except MachineError as error:
        return refused("run directory", error)
    finally:
        path.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if not same:
        seen = f"{folder} gives back other bytes than were written"
        return failed("run directory", seen, "choose another --out")
    return ok("run directory", f"{folder}: 1 MiB written, synced and renamed in {seconds:.2f} s")
