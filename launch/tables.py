"""Results on the terminal: the before/after table, the layers of step A."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

_ROLES = ("teacher", "purified", "student_only", "clean")


def print_report(report: Mapping[str, Any]) -> None:
    """What report.json says: one row per encoder, set and probe, agreement, the verdict."""
    rows = [
        (role, entry)
        for role in sorted(report["encoders"], key=_in_order)
        for entry in report["encoders"][role].get("downstream", ())
    ]
    if rows:
        table = _table("", "encoder", "set", "probe", "clean accuracy", "ASR", "robust accuracy")
        for role, entry in rows:
            attack: Mapping[str, Any] = next(iter(entry.get("attacks", ())), {})
            measures = (
                entry["clean_accuracy"],
                attack.get("attack_success_rate"),
                attack.get("robust_accuracy"),
            )
            table.add_row(role, entry["dataset"], entry["probe"], *map(_percent, measures))
        _print(table)
    if "agreement" in report:
        named = (f"{name} {_interval(m)}" for name, m in report["agreement"].items())
        typer.echo(f"agreement on held-out clean images: {', '.join(named)}")
    typer.echo(report["verdict"]["text"])


def print_information(information: Mapping[str, Any]) -> None:
    """What mutual_information.json says of every layer."""
    table = _table(
        f"Mutual information with the features, nats ({information['estimator']}, "
        f"{information['source']}, {information['images']} images)",
        "tap",
        "nats",
        "95 % interval",
        "noise floor",
        "share",
        "weight",
    )
    for layer in information["layers"]:
        floor = layer.get("noise_floor")
        table.add_row(
            layer["tap"],
            f"{layer['value']:.3f}{' *' if layer['determines_features'] else ''}",
            f"{layer['low']:.3f} .. {layer['high']:.3f}",
            "-" if floor is None else f"{floor:.3f}",
            f"{layer['share']:.3f}",
            f"{layer['weight']:.0f}",
        )
    if any(layer["determines_features"] for layer in information["layers"]):
        table.caption = "* determines the features: limited by the number of bins"
    _print(table)


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title or None)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def _in_order(role: str) -> tuple[int, str]:
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES), role)


def _percent(measure: Mapping[str, float] | None) -> str:
    if measure is None:
        return "-"
    value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}..{high:.1f})"


def _interval(measure: Mapping[str, float]) -> str:
    return f"{measure['value']:.3f} ({measure['low']:.3f}..{measure['high']:.3f})"
