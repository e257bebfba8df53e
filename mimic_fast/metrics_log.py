"""``metrics.jsonl``: one JSON object a line; cut back to the step that a run resumes from."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimic_fast.files import machine_errors, write_atomic


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one row, which must hold ``step``; numbers that are not finite become null.

    Raises:
        MachineError: If the file cannot be written.
    """
    if not isinstance(row.get("step"), int):
        raise ValueError(f"a row of metrics needs an integer 'step', got {row.get('step')!r}")
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the rows after ``step``, and a last line that a killed process left torn.

    Raises:
        MachineError: If the file cannot be written.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            row_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                warnings.warn(f"{path}:{number} is not a row of metrics; dropped", stacklevel=2)
            continue
        if row_step <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())
