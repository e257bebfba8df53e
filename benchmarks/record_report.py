"""Appends what a report.json measured to a results table, one row a figure.

    python benchmarks/record_report.py demo_run/report.json --run demo --commit HEAD

The committed tables under ``benchmarks/results`` are made with it, and the README's from them.
"""

import argparse
import csv
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "purification_cpu_202611.csv"
COLUMNS: tuple[str, ...] = (
    "run", "seed", "preset", "encoder", "dataset", "probe", "metric", "value", "low", "high", "n",
    "sha256", "clean_images", "clean_fraction", "threads", "torch", "commit", "date",
)  # fmt: skip
_ATTACK_METRICS = ("attack_success_rate", "attack_success_rate_all", "robust_accuracy")


def main() -> None:
    """Reads the command line and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="report.json of a finished run")
    parser.add_argument("--run", required=True, help="name of the run in the table")
    parser.add_argument("--threads", type=int, required=True, help="threads the run was given")
    parser.add_argument("--commit", default="HEAD", help="commit the run was made at")
    parser.add_argument("--out", type=Path, default=RESULTS, help="table to append to")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    command = ["git", "rev-parse", "--short=12", arguments.commit]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    facts = {
        "run": arguments.run,
        "seed": report["settings"]["seed"],
        "preset": report["settings"]["preset"],
        "clean_images": report["clean_set"]["size"],
        "clean_fraction": report["clean_set"]["fraction"],
        "threads": arguments.threads,
        "torch": report["provenance"].get("torch", ""),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
    }
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(facts | row for row in rows(report))


def rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per measured figure: encoders, paired differences, agreement, cost."""
    for role, encoder in report["encoders"].items():
        for entry in encoder.get("downstream", ()):
            where = {"encoder": role, "sha256": encoder["sha256"][:16]}
            where |= {"dataset": entry["dataset"], "probe": entry["probe"]}
            yield where | _row("clean_accuracy", entry["clean_accuracy"])
            for attack in entry.get("attacks", ()):
                of = f", {attack['trigger']}" if len(entry["attacks"]) > 1 else ""
                for metric in _ATTACK_METRICS:
                    yield where | _row(metric, attack[metric]) | {"metric": metric + of}
    first = report.get("attack", {}).get("trigger")
    for pair in report.get("comparisons", ()):
        if pair.get("trigger", first) != first:  # the clean accuracies are the same
            continue
        where = {"encoder": f"{pair['a']}-{pair['b']}", "dataset": pair["dataset"]}
        yield where | {"probe": pair["probe"]} | _row("clean_accuracy", pair["clean_accuracy"])
    for name, measure in report.get("agreement", {}).items():
        yield {"encoder": "purified"} | _row(name, measure)
    for name in ("seconds", "images_per_second", "peak_memory_bytes"):
        yield {"encoder": "purified", "metric": name, "value": report["cost"][name]}


def _row(metric: str, measure: dict[str, Any]) -> dict[str, Any]:
    return {"metric": metric} | {key: measure[key] for key in ("value", "low", "high", "n")}


if __name__ == "__main__":
    main()
