"""What the figures of a report allow to be said, in one line, and what they do not."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["purified", "reduced", "not_purified", "not_shown", "not_measured"]

# The bar a purified encoder must clear: that of the demo's acceptance.
_RATE_LIMIT = 0.10
_ABOVE_CLEAN = 0.05
_ACCURACY_COST = 0.04

_HEADLINE: dict[Level, str] = {
    "purified": "Purified",
    "reduced": "Reduced, not removed",
    "not_purified": "Not purified",
    "not_shown": "No backdoor shown by this trigger",
    "not_measured": "ASR not measured",
}
# A trigger that a scan made works on clean encoders too: it shows no backdoor, so none is removed.
_RECOVERED = {
    "purified": ("recovered_gone", "The trigger that the scan recovered no longer works"),
    "reduced": ("recovered_reduced", "The trigger that the scan recovered works less often"),
    "not_purified": ("recovered_works", "The trigger that the scan recovered still works"),
}
_WORST_FIRST: tuple[Level, ...] = ("not_purified", "reduced", "purified", "not_shown")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One attack on one downstream set under one probe: the measures of report.json by role."""

    dataset: str
    probe: str
    trigger: str | None  # which attack; None where none was measured
    rates: Mapping[str, Mapping[str, float]]
    accuracies: Mapping[str, Mapping[str, float]]
    differences: Mapping[str, Mapping[str, Any]]  # purified minus ROLE


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """The headline of a report.

    A teacher's backdoor is *shown* where its ASR interval lies above the clean encoder's and the
    ASR more than 5 points above (without a clean encoder: where the interval lies above 10 %). It
    is *purified* where the purified ASR is at most 10 % and at most 5 points above the clean
    encoder's, *reduced* where the paired difference to the teacher lies below 0, else *not
    purified*. Of several attacks, sets and probes the worst decides. Of a trigger that a scan
    recovered it is only said what became of it: ``recovered_gone``, ``recovered_reduced`` or
    ``recovered_works``.

    Returns:
        ``level``, ``text`` (one ASCII line, for terminals too), ``details`` (sentences), ``rule``.
    """
    cases = [case for case in _cases(report) if {"teacher", "purified"} <= set(case.rates)]
    if not cases:
        return _without_rates(report)
    worst = min(cases, key=_severity)
    details = _details(worst)
    if len(cases) > 1:
        details.insert(0, f"The worst of {len(cases)} measurements: {_place(worst, cases)}.")
        hidden = [case for case in cases if _level(case) == "not_shown" != _level(worst)]
        if hidden and _several(cases):
            named = "; ".join(_place(case, cases) for case in hidden)
            details.append(f"No backdoor shown in the teacher: {named}.")
    level, head = _level(worst), _HEADLINE[_level(worst)]
    reached = "Purified"
    if worst.trigger in _recovered(report):
        level, head = _RECOVERED.get(level, (level, head))
        reached = "No longer works"
    if _several(cases):
        head = head.replace("this trigger", "these triggers")
    return {
        "level": level,
        "text": f"{head}{_cost(cases)}: {_figures(worst)}",
        "details": details,
        "rule": f"{reached} means: ASR at most {percent(_RATE_LIMIT)} and at most "
        f"{100 * _ABOVE_CLEAN:.0f} points above the clean encoder's.",
    }


def limits(report: Mapping[str, Any]) -> list[str]:
    """What the report does not show, sentence by sentence."""
    cases = list(_cases(report))
    found = _limits_of_measurement(report, cases)
    if _recovered(report):
        found.insert(
            0,
            "The trigger was recovered by a scan: it need not be the attacker's, and one can be "
            "found for a clean encoder too. It shows no backdoor, and its loss removes none.",
        )
    if "mutual_information" in report:
        estimator = report["mutual_information"].get("estimator", "unknown")
        found.append(
            f"Mutual information is the reading of the '{estimator}' estimator. For a network "
            "without noise the true value has no upper bound: compare layers, not numbers."
        )
    lost = sum(len(dataset.get("unreadable", ())) for dataset in report.get("datasets", ()))
    if lost:
        found.append(f"Left out, because they could not be decoded: {lost} downstream images.")
    return found


def percent(value: float | int) -> str:
    """A share as per cent with one decimal, e.g. ``3.1 %``."""
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    """``p = 0.034``, two digits; ``p < 0.001`` below that."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.{max(2, 1 - math.floor(math.log10(p)))}f}"


def points(measure: Mapping[str, float]) -> str:
    """A difference of shares in percentage points with its interval."""
    # Adding 0.0 turns the -0.0 that rounding may leave into 0.0.
    value, low, high = (round(100 * measure[key], 1) + 0.0 for key in ("value", "low", "high"))
    return f"{value:+.1f} points (95 %: {low:+.1f} to {high:+.1f})"


def _cases(report: Mapping[str, Any]) -> Iterator[_Case]:
    """Every attack measured; where none was, the set with accuracies only."""
    entries = [
        (role, entry)
        for role, encoder in report.get("encoders", {}).items()
        for entry in encoder.get("downstream", ())
    ]
    keys = dict.fromkeys(
        (entry["dataset"], entry["probe"], attack.get("trigger"))
        for _, entry in entries
        for attack in entry.get("attacks") or ({},)
    )
    for dataset, probe, trigger in keys:
        same = {r: e for r, e in entries if (e["dataset"], e["probe"]) == (dataset, probe)}
        yield _Case(
            dataset=dataset,
            probe=probe,
            trigger=trigger,
            rates={
                role: attack["attack_success_rate"]
                for role, entry in same.items()
                for attack in entry.get("attacks", ())
                if attack["trigger"] == trigger and "attack_success_rate" in attack
            },
            accuracies={role: entry["clean_accuracy"] for role, entry in same.items()},
            differences={
                row["b"]: row
                for row in report.get("comparisons", ())
                if (row["a"], row["dataset"], row["probe"]) == ("purified", dataset, probe)
                and row.get("trigger") in (None, trigger)
            },
        )


def _several(cases: Sequence[_Case]) -> bool:
    return len({case.trigger for case in cases}) > 1


def _place(case: _Case, cases: Sequence[_Case]) -> str:
    where = f"{case.dataset}, {case.probe}"
    return f"{where}, trigger {case.trigger}" if _several(cases) else where


def _severity(case: _Case) -> tuple[int, float]:
    return _WORST_FIRST.index(_level(case)), -case.rates["purified"]["value"]


def _level(case: _Case) -> Level:
    teacher, purified, clean = (case.rates.get(r) for r in ("teacher", "purified", "clean"))
    assert teacher is not None
    assert purified is not None
    limit = _RATE_LIMIT
    shown = teacher["low"] > limit
    if clean is not None:
        floor = clean["value"] + _ABOVE_CLEAN
        shown = teacher["low"] > clean["high"] and teacher["value"] > floor
        limit = min(limit, floor)
    if not shown:
        return "not_shown"
    if purified["value"] <= limit:
        return "purified"
    difference = case.differences.get("teacher", {}).get("attack_success_rate")
    return "reduced" if difference is not None and difference["high"] < 0 else "not_purified"


def _cost(cases: Sequence[_Case]) -> str:
    costly = any(
        case.accuracies["teacher"]["value"] - case.accuracies["purified"]["value"] > _ACCURACY_COST
        for case in cases
    )
    return ", at a cost in accuracy" if costly else ""


def _recovered(report: Mapping[str, Any]) -> set[str]:
    """Names of the triggers that a scan found, not an attacker's."""
    listed = report.get("attacks") or [report.get("attack") or {}]
    return {one["trigger"] for one in listed if one.get("kind") == "recovered"}


def _figures(case: _Case) -> str:
    rates, accuracies = case.rates, case.accuracies
    clean = f" (clean encoder {percent(rates['clean']['value'])})" if "clean" in rates else ""
    before, after = percent(rates["teacher"]["value"]), percent(rates["purified"]["value"])
    return (
        f"ASR {before} -> {after}{clean}, accuracy {percent(accuracies['teacher']['value'])} -> "
        f"{percent(accuracies['purified']['value'])}"
    )


def _details(case: _Case) -> list[str]:
    details: list[str] = []
    names = {"teacher": "the teacher", "student_only": "student-only", "clean": "the clean encoder"}
    for role, name in names.items():
        row = case.differences.get(role)
        if row is not None:
            details.append(f"Accuracy against {name}: {points(row['clean_accuracy'])}.")
    floor = case.differences.get("student_only")
    if floor is not None and floor["clean_accuracy"]["low"] <= 0:
        details.append(
            "Not shown to be above student-only: the distillation may have transferred nothing."
        )
    return details


def _limits_of_measurement(report: Mapping[str, Any], cases: Sequence[_Case]) -> list[str]:
    encoders = report.get("encoders", {})
    found: list[str] = []
    if any(case.rates for case in cases):
        found.append(
            f"No proof of absence: the figures hold for the trigger{'s' * _several(cases)} and the "
            "downstream sets measured. Another trigger may still work."
        )
    else:
        found.append(
            "ASR not measured: no trigger was given. Agreement and accuracy on clean images say "
            "nothing about a backdoor; a backdoored encoder scores well on both."
        )
    if not cases:
        found.append("Accuracy not measured: no labeled downstream set was given.")
        return found
    if "clean" not in encoders and any(case.rates for case in cases):
        found.append("No clean encoder was measured: the ASR that chance alone gives is not known.")
    if "purified" in encoders and "student_only" not in encoders:
        found.append(
            "No student-only floor was measured: how much accuracy the clean images give without "
            "the teacher is not known."
        )
    found.append("Intervals cover the choice of test images, not the randomness of training.")
    return found


def _without_rates(report: Mapping[str, Any]) -> dict[str, Any]:
    """The headline where teacher and purified have no ASR to compare."""
    cases = list(_cases(report))
    parts: list[str] = []
    for case in cases:
        for role, accuracy in case.accuracies.items():
            rate = case.rates.get(role)
            asr = "" if rate is None else f", ASR {percent(rate['value'])}"
            name = role.replace("_", "-")
            place = case.dataset + (f", trigger {case.trigger}" if _several(cases) else "")
            parts.append(f"{name} accuracy {percent(accuracy['value'])}{asr} ({place})")
    if any(case.rates for case in cases):
        return {"level": "not_measured", "text": f"Measured: {'; '.join(parts)}", "details": []}
    things = [name for name in ("agreement",) if name in report] + ["accuracy"] * bool(parts)
    head = f"{' and '.join(things).capitalize()} measured; " if things else ""
    return {"level": "not_measured", "text": f"{head}ASR not measured", "details": parts}
