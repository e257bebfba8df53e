"""The figures of a finished cell as rows, and the CSV file that keeps them."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimic_fast.comparison.cells import Cell
from mimic_fast.errors import UsageError
from mimic_fast.files import write_atomic

_SHARES = {
    "ca": "clean_accuracy",
    "asr": "attack_success_rate",
    "asr_all": "attack_success_rate_all",
    "base_rate": "base_rate",
    "ra": "robust_accuracy",
}
_WITH_INTERVAL = ("ca", "asr")
_PAIRED = ("ca_minus_teacher", "asr_minus_teacher")  # each with McNemar's p as p_NAME
COLUMNS = (
    *("attack", "defense", "seed", "dataset", "probe"),
    *(f"{name}{end}" for name in _WITH_INTERVAL for end in ("", "_low", "_high")),
    *("asr_all", "base_rate", "ra", "fidelity"),
    *(one for name in _PAIRED for one in (name, f"{name}_low", f"{name}_high", f"p_{name}")),
    *("test_images", "victims", "cpu_seconds", "seconds", "digest"),
)
_WITHOUT_P = tuple(name for name in COLUMNS if not name.startswith("p_"))  # files of before it
Figures = Mapping[str, str]


def cell_rows(
    cell: Cell, measured: Mapping[str, Any], *, role: str, cpu: float, seconds: float
) -> list[dict[str, str]]:
    """One row for each downstream set and probe; what was not measured is empty.

    Args:
        cell: Which.
        measured: Of ``evaluate_encoders``.
        role: The defended encoder's.
        cpu: CPU seconds of the defense and its measurement.
        seconds: The same on the clock.
    """
    rows: list[dict[str, str]] = []
    for entry in measured["encoders"][role]["downstream"]:
        figures = {**entry, **next(iter(entry.get("attacks", ())), {})}
        row: dict[str, Any] = {
            "attack": cell.attack,
            "defense": cell.defense,
            "seed": cell.seed,
            "dataset": entry["dataset"],
            "probe": entry["probe"],
            "fidelity": figures.get("fidelity"),
            "test_images": entry["clean_accuracy"]["n"],
            "victims": figures.get("attack_success_rate", {}).get("n"),
            "cpu_seconds": round(cpu, 1),
            "seconds": round(seconds, 1),
            "digest": cell.digest,
        }
        for name, key in _SHARES.items():
            row |= _measure(name, figures.get(key), interval=name in _WITH_INTERVAL)
        row |= _paired(measured, entry)
        rows.append({column: _text(row.get(column)) for column in COLUMNS})
    return rows


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; none if it is not there.

    A file from before the ``p_`` columns is read too; there they are empty.

    Raises:
        UsageError: If it has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) not in (COLUMNS, _WITHOUT_P):
            raise UsageError(f"{path} is no results file of mimic-fast compare; name another one")
        return [{name: row.get(name, "") for name in COLUMNS} for row in reader]


def write_results(path: Path, rows: Iterable[Figures]) -> None:
    """Writes all rows; the file is whole at any time.

    Raises:
        MachineError: If it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def merged(old: Sequence[Figures], new: Iterable[Figures]) -> list[Figures]:
    """Old rows, each replaced by the new one of the same cell, set and probe; then the others."""
    rows = {_key(row): row for row in old}
    rows |= {_key(row): row for row in new}
    return list(rows.values())


def _key(row: Figures) -> tuple[str, ...]:
    return tuple(row[name] for name in ("attack", "defense", "seed", "dataset", "probe", "digest"))


def _measure(name: str, share: Mapping[str, float] | None, *, interval: bool) -> dict[str, float]:
    if share is None:
        return {}
    row = {name: share["value"]}
    return row | ({f"{name}_{end}": share[end] for end in ("low", "high")} if interval else {})


def _paired(measured: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, float]:
    row: dict[str, float] = {}
    for found in measured.get("comparisons", ()):
        same = all(found[key] == entry[key] for key in ("dataset", "probe"))
        if same and (found["a"], found["b"]) == ("purified", "teacher"):
            for name, key in zip(_PAIRED, ("clean_accuracy", "attack_success_rate"), strict=True):
                if key in found:
                    row |= _measure(name, found[key], interval=True)
                    row[f"p_{name}"] = found[key]["p"]
    return row


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
