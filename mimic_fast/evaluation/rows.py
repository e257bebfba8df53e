"""Rows of a measurement over the passes of a run: one JSON object a line, written whole."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mimic_fast.files import machine_errors, write_atomic


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows in place of the file's.

    Raises:
        MachineError: If the file cannot be written.
    """
    lines = (json.dumps(row, allow_nan=False) for row in rows)
    with machine_errors(path):
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def read_rows(path: Path, needs: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no such file.

    A line that is damaged or lacks a key of ``needs`` is left out.
    """
    if not path.is_file():
        return []
    needs = set(needs)
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and needs <= set(row):
            rows.append(row)
    return rows
