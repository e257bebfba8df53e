"""One cell, which runs in a process of its own: defend, measure, write ``cell.json``."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimic_fast.comparison.cells import Cell
from mimic_fast.comparison.defenses import Call, defense_of, options_of
from mimic_fast.comparison.figures import cell_rows
from mimic_fast.comparison.settings import AS_IT_IS
from mimic_fast.config import Settings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.feature_cache import Measurable
from mimic_fast.evaluation.features import place
from mimic_fast.files import write_atomic
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import settings_json, validated

TASK, DONE, _SPENT = "task.json", "cell.json", "spent.json"


def write_task(cell: Cell) -> Path:
    """Leaves in the cell's folder what its process needs to know."""
    path = cell.folder / TASK
    content = {
        "attack": cell.attack,
        "defense": cell.defense,
        "seed": cell.seed,
        "kind": cell.kind,
        "settings": json.loads(settings_json(cell.settings)),
        "options": cell.options,
        "clean": None if cell.clean is None else str(cell.clean),
        "evaluation_seed": cell.evaluation_seed,
        "digest": cell.digest,
    }
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def read_task(path: Path) -> Cell:
    """The cell of a task file."""
    content = json.loads(path.read_bytes())
    clean = content.pop("clean")
    settings = validated(Settings, content.pop("settings"))
    return Cell(**content, settings=settings, clean=None if clean is None else Path(clean))


def run_cell(
    cell: Cell, *, report: Reporter = silent, stop: Callable[[], bool] = lambda: False
) -> None:
    """Defends, measures, writes ``cell.json`` last.

    Raises:
        MimicError: Whatever the defense or the measurement raises.
    """
    clock = _Clock(cell.folder / _SPENT)
    try:
        path = defense_of(cell.kind)(
            Call(
                settings=cell.settings,
                options=options_of(cell.kind, cell.options),
                clean=cell.clean,
                report=report,
                stop=stop,
            )
        )
        encoders = _loaded(cell, path)
        place((one.encoder for one in encoders.values()), cell.settings.run)
        measured = evaluate_encoders(
            encoders,
            cell.settings.evaluation,
            seed=cell.evaluation_seed,
            report=report,
            stop=stop,
        )
    except StoppedError:
        clock.keep()
        raise
    cpu, seconds = clock.spent()
    rows = cell_rows(cell, measured, role="purified", cpu=cpu, seconds=seconds)
    content = {"digest": cell.digest, "rows": rows, "encoder": measured["encoders"]["purified"]}
    write_atomic(cell.folder / DONE, (json.dumps(content, indent=2) + "\n").encode())


def _loaded(cell: Cell, defended: Path) -> dict[str, Measurable]:
    """The cell's encoders by role; one file is read in one way, whatever its role."""
    loading = cell.settings.encoder
    assert loading.teacher is not None
    files = {"teacher": loading.teacher, "purified": defended}
    files |= {} if cell.clean is None else {"clean": cell.clean}
    # What a defense made carries a card; anything else is as the attack says.
    made = () if cell.kind in AS_IT_IS else ("purified",)
    return {
        role: load_encoder(file) if role in made else load_encoder(file, loading)
        for role, file in files.items()
    }


def finished(cell: Cell) -> list[dict[str, str]] | None:
    """Rows of a cell that was finished with the same digest; None: it has still to run."""
    try:
        content = json.loads((cell.folder / DONE).read_bytes())
        return content["rows"] if content["digest"] == cell.digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Clock:
    """Seconds of this process, and of earlier ones that were stopped (not of killed ones)."""

    def __init__(self, path: Path) -> None:
        self._path, self._began = path, time.perf_counter()
        self._before: Any = {"cpu": 0.0, "seconds": 0.0}
        if path.is_file():
            self._before = json.loads(path.read_bytes())

    def spent(self) -> tuple[float, float]:
        """CPU and wall seconds."""
        return (
            self._before["cpu"] + time.process_time(),
            self._before["seconds"] + time.perf_counter() - self._began,
        )

    def keep(self) -> None:
        """For the process that goes on."""
        cpu, seconds = self.spent()
        write_atomic(self._path, json.dumps({"cpu": cpu, "seconds": seconds}).encode())
