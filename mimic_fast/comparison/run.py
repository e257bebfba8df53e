"""Runs what is missing of a matrix, some cells at a time, each in a process of its own."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mimic_fast.comparison.cell import finished, write_task
from mimic_fast.comparison.cells import Cell, cells_of, check_files, without_target
from mimic_fast.comparison.figures import Figures, merged, read_results, write_results
from mimic_fast.comparison.heat_map import write_heat_map
from mimic_fast.comparison.settings import MatrixSettings
from mimic_fast.comparison.table import write_table
from mimic_fast.config import RunSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import attack_path
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.features import place
from mimic_fast.progress import Event, Reporter, silent

_POLL = 0.1  # seconds between two looks at the processes
_STOPPED = StoppedError.exit_code


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What came of a comparison.

    Args:
        out: The run directory with the tables.
        rows: Figures of all finished cells, in the order of the matrix.
        skipped: Cells that were finished before.
        ran: Cells that were finished now.
        failed: Reason by cell that was not.
    """

    out: Path
    rows: tuple[Figures, ...]
    skipped: int
    ran: int
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    matrix: MatrixSettings,
    out: Path,
    *,
    jobs: int = 1,
    resume: bool = True,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Compared:
    """Runs every cell that is not finished; writes the tables after each.

    Args:
        matrix: What to compare.
        out: Run directory.
        jobs: Cells at a time; with more than one each has one thread.
        resume: Whether ``out`` may hold cells of an earlier call.
        report: Told of every cell.
        stop: Polled; true stops the cells, which keep their state.

    Raises:
        UsageError: If the matrix names what does not exist or fit, or ``out`` holds a comparison
            and is not to be resumed.
        StoppedError: If ``stop`` told so; finished cells are in the tables.
    """
    check_files(matrix)
    if not resume and (out / "cells").exists():
        raise UsageError(f"{out} already holds a comparison; use --resume auto or another --out")
    _settle_targets(matrix, report, stop)
    cells = list(cells_of(matrix, out, report=report, stop=stop))
    results = [] if matrix.results is None else read_results(matrix.results)
    book = _Book(matrix, out, cells, results)
    waiting: list[Cell] = []
    for cell in cells:
        rows = _known(cell, results) or finished(cell)
        if rows is None:
            _refuse_other(cell)
            waiting.append(cell)
        else:
            book.add(cell, rows)
    skipped = len(cells) - len(waiting)
    if skipped:
        report(Event(phase="compare", message=f"{skipped} of {len(cells)} cells were done before"))
    failed = _run_all(waiting, book, jobs=jobs, report=report, stop=stop)
    book.write()
    if stop():
        left = len(waiting) - len(failed) - (len(book.done) - skipped)
        raise StoppedError(
            f"stopped by a signal with {left} cells to go; continue with --resume auto"
        )
    return Compared(
        out=out,
        rows=tuple(book.rows()),
        skipped=skipped,
        ran=len(waiting) - len(failed),
        failed=failed,
    )


class _Book:
    """Figures of the finished cells, and the files that show them."""

    def __init__(
        self, matrix: MatrixSettings, out: Path, cells: list[Cell], results: Iterable[Figures]
    ) -> None:
        self._matrix, self._out, self._cells = matrix, out, cells
        self._results = list(results)
        self.done: dict[str, list[Figures]] = {}

    def add(self, cell: Cell, rows: Iterable[Figures]) -> None:
        """Takes in a finished cell."""
        self.done[cell.title] = list(rows)

    def rows(self) -> list[Figures]:
        """In the order of the matrix."""
        return [row for cell in self._cells for row in self.done.get(cell.title, ())]

    def write(self) -> None:
        """Tables of what is there, and the results file."""
        rows = self.rows()
        if self._matrix.results is not None:
            self._results = merged(self._results, rows)
            write_results(self._matrix.results, self._results)
        write_table(self._out, rows)
        write_heat_map(self._out / "table.html", rows)


@dataclass(frozen=True, slots=True)
class _Running:
    cell: Cell
    process: "subprocess.Popen[bytes]"
    log: Path


def _run_all(
    cells: list[Cell],
    book: _Book,
    *,
    jobs: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> dict[str, str]:
    """Reasons of the cells that failed; none of those that were stopped."""
    queue, running, failed, done = list(cells), list[_Running](), dict[str, str](), 0
    told = False
    try:
        while running or (queue and not stop()):
            if stop() and not told:
                told = True
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
            while queue and len(running) < jobs and not stop():
                running.append(_start(queue.pop(0), alone=jobs == 1))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                rows = finished(one.cell)  # whatever came after it was written
                if rows is not None:
                    done += 1
                    book.add(one.cell, rows)
                    book.write()
                    message = f"{one.cell.title} done"
                elif one.process.returncode == _STOPPED and stop():
                    continue
                else:
                    failed[one.cell.title] = _reason(one)
                    message = f"{one.cell.title} failed: {failed[one.cell.title]}"
                report(
                    Event(
                        phase="compare",
                        done=done + len(failed),
                        total=len(cells),
                        unit="cells",
                        message=message,
                    )
                )
            time.sleep(_POLL)
    finally:  # after an error or a second Ctrl-C: no process is left behind
        for one in running:
            one.process.terminate()
            one.process.wait()
    return failed


def _start(cell: Cell, *, alone: bool) -> _Running:
    threads = [] if alone else ["--threads", "1"]
    command = [sys.executable, "-m", "mimic_fast", "cell", str(write_task(cell)), *threads]
    log = cell.folder / "log.txt"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
    return _Running(cell, process, log)


def _reason(one: _Running) -> str:
    lines = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("error: ") if lines else "no output"
    code = one.process.returncode
    return f"{last[:300]} (exit {code}; {one.log})"


def _settle_targets(matrix: MatrixSettings, report: Reporter, stop: Callable[[], bool]) -> None:
    """Fixes every target class once, on the attacked encoder, before cells ask for it at once."""
    for name in without_target(matrix):
        report(Event(phase="compare", message=f"attacks.{name}: working out the target classes"))
        attack = matrix.attacks[name]
        settings = matrix.evaluation.model_copy(
            update={"attack": attack_path(attack.attack_file), "probe": ("linear",)}
        )
        teacher = load_encoder(attack.encoder, attack.loading)
        place([teacher.encoder], RunSettings())  # as cells have it
        evaluate_encoders(
            {"teacher": teacher}, settings, seed=matrix.evaluation_seed, report=report, stop=stop
        )
    if left := without_target(matrix):
        raise UsageError(
            f"attacks.{left[0]}: the target class cannot be written into "
            f"{matrix.attacks[left[0]].attack_file}; make it writable or copy it"
        )


def _refuse_other(cell: Cell) -> None:
    """A folder that holds another cell's state would be continued with the wrong settings."""
    path = cell.folder / "cell.json"
    if path.exists():
        raise UsageError(
            f"cell {cell.title}: {path} was made with other settings or files; use another --out, "
            "or remove the cell's folder"
        )


def _known(cell: Cell, results: Iterable[Figures]) -> list[Figures]:
    """Rows of the results file, under the names that attack and defense have in this matrix."""
    rows: dict[tuple[str, str], list[Figures]] = {}
    for row in results:
        if row["digest"] == cell.digest:
            rows.setdefault((row["attack"], row["defense"]), []).append(row)
    own = rows.get((cell.attack, cell.defense)) or next(iter(rows.values()), [])
    return [{**row, "attack": cell.attack, "defense": cell.defense} for row in own]
