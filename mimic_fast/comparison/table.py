"""Tables of a comparison: every cell as CSV, means over seeds as Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mimic_fast.comparison.figures import Figures, write_results
from mimic_fast.evaluation.metrics import Measure, mean_measure
from mimic_fast.files import write_atomic


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One attack under one defense on one set by one probe, over its seeds.

    Args:
        attack: Its name.
        defense: Its name.
        accuracy: CA: with one seed the Wilson interval over images, else Student's t over seeds.
        success: ASR alike; None where it was not measured.
        seeds: How many.
        cpu_seconds: Mean over seeds.
    """

    attack: str
    defense: str
    accuracy: Measure
    success: Measure | None
    seeds: int
    cpu_seconds: float


def write_table(out: Path, rows: Sequence[Figures]) -> None:
    """``table.csv`` and ``table.md``.

    Raises:
        MachineError: If they cannot be written.
    """
    write_results(out / "table.csv", rows)
    write_atomic(out / "table.md", markdown(rows).encode())


def markdown(rows: Sequence[Figures]) -> str:
    """One table for each downstream set and probe."""
    parts = ["# Comparison\n"]
    for dataset, probe in groups(rows):
        lines = [
            f"## {_cell(dataset)}, {_cell(probe)} probe\n",
            "| attack | defense | CA | ASR | seeds | CPU seconds |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {_cell(entry.attack)} | {_cell(entry.defense)} | {percent(entry.accuracy)} | "
            f"{percent(entry.success)} | {entry.seeds} | {entry.cpu_seconds:.0f} |"
            for entry in entries(rows, dataset=dataset, probe=probe)
        ]
        parts.append("\n".join(lines) + "\n")
    parts.append(
        "CA: clean accuracy. ASR: triggered images, not of the target class, that are called the "
        "target. In brackets the 95 % interval: of one seed over test images, of several over "
        "seeds.\n"
    )
    return "\n".join(parts)


def groups(rows: Iterable[Figures]) -> list[tuple[str, str]]:
    """Downstream sets and probes in the order in which they come."""
    return list(dict.fromkeys((row["dataset"], row["probe"]) for row in rows))


def entries(rows: Iterable[Figures], *, dataset: str, probe: str) -> list[Entry]:
    """Attack after attack, the defenses in their order."""
    cells: dict[tuple[str, str], list[Figures]] = {}
    for row in rows:
        if (row["dataset"], row["probe"]) == (dataset, probe):
            cells.setdefault((row["attack"], row["defense"]), []).append(row)
    found: list[Entry] = []
    for (attack, defense), members in cells.items():
        accuracy = _over_seeds(members, "ca")
        assert accuracy is not None
        found.append(
            Entry(
                attack=attack,
                defense=defense,
                accuracy=accuracy,
                success=_over_seeds(members, "asr"),
                seeds=len(members),
                cpu_seconds=sum(float(row["cpu_seconds"]) for row in members) / len(members),
            )
        )
    return found


def percent(measure: Measure | None) -> str:
    """``61.2 (60.1..62.3)``; a dash where nothing was measured."""
    if measure is None:
        return "-"
    value, low, high = (100 * x for x in (measure.value, measure.low, measure.high))
    return f"{value:.1f} ({low:.1f}..{high:.1f})"


def _over_seeds(rows: Sequence[Figures], name: str) -> Measure | None:
    if not all(row[name] for row in rows):
        return None
    if len(rows) == 1:
        (row,) = rows
        return Measure(
            value=float(row[name]),
            low=float(row[f"{name}_low"]),
            high=float(row[f"{name}_high"]),
            n=1,
        )
    return mean_measure(torch.tensor([float(row[name]) for row in rows], dtype=torch.float64))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
