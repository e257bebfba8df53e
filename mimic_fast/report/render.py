"""report.html: from the content of report.json to a page."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimic_fast.evaluation.curve import read_curve
from mimic_fast.report.examples import Example, first_of
from mimic_fast.report.figures import Figure
from mimic_fast.report.plots import (
    by_role,
    curve_chart,
    loss_chart,
    mutual_information_chart,
    outcome_chart,
    role_title,
)
from mimic_fast.report.verdict import p_value, percent, points


def render_report(
    report: Mapping[str, Any],
    *,
    metrics: Path | None = None,
    examples: Sequence[Example] = (),
    figures: Sequence[Figure] = (),
) -> str:
    """The HTML page, which stands alone: inline style, images as data URIs, no script, no address.

    Args:
        report: Of ``build_report``. Untrusted text in it (names, paths) is escaped.
        metrics: ``metrics.jsonl`` of the run, for the curves; ``curve.jsonl`` lies beside it.
        examples: Of ``load_examples``.
        figures: Of ``load_figures``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mimic_fast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        points=lambda measure: _typeset(points(measure)),
        p_value=p_value,
        typeset=_typeset,
        interval=_interval,
        role=role_title,
        bytes=_bytes,
        duration=_duration,
        flat=_flat,
    )
    information = report.get("mutual_information")
    return environment.get_template("report.html.j2").render(
        report=report,
        roles=by_role(report.get("encoders", {})),
        tables=_tables(report),
        information_chart=None if information is None else mutual_information_chart(information),
        curves=None if metrics is None else loss_chart(metrics),
        outcome_curves=None
        if metrics is None
        else curve_chart(read_curve(metrics.with_name("curve.jsonl"))),
        shown=first_of(report),
        scans=_scans(report),
        examples=examples,
        figures={figure.name: figure for figure in figures},
    )


def _tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One before/after table per downstream set, probe and attack, rows in the order of roles."""
    encoders = report.get("encoders", {})
    names = {facts["name"]: facts for facts in report.get("datasets", ())}
    entries: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for role in by_role(encoders):
        for entry in encoders[role].get("downstream", ()):
            entries.setdefault((entry["dataset"], entry["probe"]), []).append((role, entry))
    tables: list[dict[str, Any]] = []
    for (dataset, probe), found in entries.items():
        attacks = (attack for _, entry in found for attack in entry.get("attacks", ()))
        triggers = list(dict.fromkeys(attack["trigger"] for attack in attacks))
        for trigger in triggers or [None]:
            table = {"dataset": dataset, "probe": probe, "facts": names.get(dataset)}
            table["trigger"] = trigger if len(triggers) > 1 else None
            table["rows"] = [
                {"role": role, "entry": entry, "attack": _attack_of(entry, trigger)}
                for role, entry in found
            ]
            table["attacked"] = trigger is not None
            table["target"] = _target_name(table)
            table["comparisons"] = [
                row
                for row in report.get("comparisons", ())
                if (row["dataset"], row["probe"]) == (dataset, probe)
                and row.get("trigger") in (None, trigger)
            ]
            table["chart"] = _chart(table["rows"])
            tables.append(table)
    return tables


def _attack_of(entry: Mapping[str, Any], trigger: str | None) -> Mapping[str, Any]:
    return next((one for one in entry.get("attacks", ()) if one["trigger"] == trigger), {})


def _chart(rows: Sequence[Mapping[str, Any]]) -> str:
    return outcome_chart(
        [
            (row["role"], row["entry"]["clean_accuracy"], row["attack"].get("attack_success_rate"))
            for row in rows
        ]
    )


def _scans(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a score: what each encoder has, and the clean references' range."""
    scans = report.get("scan", {})
    rows: dict[str, dict[str, Any]] = {}
    for role in by_role(scans):
        verdict = scans[role].get("verdict") or {}
        ranges = {c["name"]: c for c in verdict.get("comparisons", ())}
        for score in scans[role]["scores"]:
            row = rows.setdefault(
                score["name"],
                {"name": score["name"], "unit": score["unit"], "values": {}, "range": None},
            )
            row["suspicious"] = score["suspicious"]
            row["values"][role] = score
            if score["name"] in ranges:
                row["range"] = ranges[score["name"]]
    return list(rows.values())


def _target_name(table: Mapping[str, Any]) -> str | None:
    target = next((row["attack"]["target"] for row in table["rows"] if row["attack"]), None)
    if target is None:
        return None
    classes = (table["facts"] or {}).get("class_names") or []
    return f"{target} ({classes[target]})" if target < len(classes) else str(target)


def _interval(measure: Mapping[str, float]) -> str:
    """Ends of the interval in per cent, without the sign."""
    return f"{100 * measure['low']:.1f}\u2013{100 * measure['high']:.1f}"


def _typeset(text: str) -> str:
    """Arrows, minus signs and no-break spaces for the ASCII of the verdict."""
    arrows = text.replace("->", "\u2192").replace(" %", "\u00a0%")
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", arrows)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as dotted names, in order."""
    rows: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


def _bytes(value: float | int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _duration(seconds: float | int) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
