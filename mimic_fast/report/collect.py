"""report.json and report.html: everything a run measured, and what it does not show."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mimic_fast.evaluation.metrics import Measure, measure_json
from mimic_fast.files import write_atomic
from mimic_fast.report.examples import Example
from mimic_fast.report.figures import load_figures
from mimic_fast.report.render import render_report
from mimic_fast.report.verdict import limits, verdict
from mimic_fast.version import VERSION

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """How the figures came about; an empty mapping where there is nothing to say.

    Args:
        settings: The effective settings.
        clean_set: ``size``, ``fraction``, ``sha256``, ...
        cost: ``seconds``, ``images_per_second``, ``peak_memory_bytes``, ...
        provenance: Whatever identifies inputs, besides the versions that are added.
    """

    settings: Mapping[str, Any]
    clean_set: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def build_report(
    evaluation: Mapping[str, Any],
    *,
    run: RunFacts,
    agreement: Mapping[str, Measure] | None = None,
    mutual_information: Mapping[str, Any] | None = None,
    scan: Mapping[str, Any] | None = None,
    figures: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """The content of report.json, schema 1. What was not measured is absent.

    Keys were added since without a new number: ``attacks`` (all; ``attack`` is the first of them),
    and in ``comparisons`` the row's ``trigger`` (with several attacks a row for each) and ``p``
    (McNemar's) beside each difference.

    Args:
        evaluation: Result of ``evaluate_encoders``; without labels just
            ``{"encoders": {ROLE: {"sha256": ...}}}``.
        run: Settings, data, cost, provenance.
        agreement: Of teacher and purified encoder on held-out clean images.
        mutual_information: Step A's result as JSON.
        scan: ``scan.json`` by role.
        figures: Of ``save_figures``.
    """
    report: dict[str, Any] = {"schema": SCHEMA, **evaluation}
    if mutual_information is not None:
        report["mutual_information"] = dict(mutual_information)
    if agreement:
        report["agreement"] = {name: measure_json(m) for name, m in agreement.items()}
    if scan:
        report["scan"] = dict(scan)
    if figures:
        report["figures"] = [dict(figure) for figure in figures]
    for name, facts in (("clean_set", run.clean_set), ("cost", run.cost)):
        if facts:
            report[name] = dict(facts)
    report["settings"] = dict(run.settings)
    report["provenance"] = {**_environment(), **run.provenance}
    report["limits"] = limits(report)
    report["verdict"] = verdict(report)
    return report


def write_report(
    out: Path,
    report: Mapping[str, Any],
    *,
    metrics: Path | None = None,
    examples: Sequence[Example] = (),
) -> Path:
    """Writes ``report.json`` and ``report.html`` into ``out``; returns the path of the latter.

    Args:
        out: The run directory.
        report: Of :func:`build_report`.
        metrics: ``metrics.jsonl`` of the run, for the curves; ``curve.jsonl`` lies beside it.
        examples: Of ``load_examples``.

    Raises:
        MachineError: If ``out`` cannot be written.
    """
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomic(out / "report.json", text.encode())
    figures = load_figures(out, report.get("figures", ()))
    page = render_report(report, metrics=metrics, examples=examples, figures=figures)
    write_atomic(out / "report.html", page.encode())
    return out / "report.html"


def _environment() -> dict[str, Any]:
    import torch

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mimic_fast": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
