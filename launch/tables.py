"""Results on the terminal: the before/after table, the layers of step A, a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

_ROLES = ("teacher", "purified", "student_only", "clean")


def print_report(report: Mapping[str, Any]) -> None:
    """What report.json says: a row per encoder, set, probe and attack, agreement, the verdict."""
    rows = [
        (role, entry)
        for role in sorted(report["encoders"], key=_in_order)
        for entry in report["encoders"][role].get("downstream", ())
    ]
    if rows:
        most = max(len(entry.get("attacks", ())) for _, entry in rows)
        columns = ("clean accuracy", "ASR", "robust accuracy") if most else ("clean accuracy",)
        several = ("trigger",) if most > 1 else ()
        table = _table("", "encoder", "set", "probe", *several, *columns)
        for role, entry in rows:
            attacks: Sequence[Mapping[str, Any]] = entry.get("attacks") or ({},)
            for attack in attacks:
                measures = (
                    entry["clean_accuracy"],
                    attack.get("attack_success_rate"),
                    attack.get("robust_accuracy"),
                )
                cells = [_percent(measure) for measure in measures[: len(columns)]]
                named = (attack.get("trigger", "-"),) if several else ()
                _add_row(table, role, entry["dataset"], entry["probe"], *named, *cells)
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
        _add_row(
            table,
            layer["tap"],
            f"{layer['value']:.3f}{' *' if layer['determines_features'] else ''}",
            f"{layer['low']:.3f} .. {layer['high']:.3f}",
            "-" if floor is None else f"{floor:.3f}",
            f"{layer['share']:.3f}",
            f"{layer['weight']:.0f}",
        )
    if any(layer["determines_features"] for layer in information["layers"]):
        of = "images" if information.get("bins") is None else "bins"
        table.caption = f"* determines the features: limited by the number of {of}"
    _print(table)


def print_checkpoint(facts: Mapping[str, Any]) -> None:
    """What a checkpoint holds: facts, taps, tensors."""
    from rich.table import Table

    plain = Table(box=None, show_header=False)
    plain.add_column(style="bold", no_wrap=True)
    plain.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in ("taps", "tensors"):
            _add_row(plain, name.replace("_", " "), _one_line(value))
    _print(plain)
    if "taps" in facts:
        taps = _table("", "tap", "channels", "grid", "attention")
        for tap in facts["taps"]:
            grid = " x ".join(map(str, tap["grid"]))
            mark = "yes" if tap["attention"] else "no: one position"
            _add_row(taps, tap["tap"], str(tap["channels"]), grid, mark)
        _print(taps)
    tensors = _table("", "tensor", "shape", "type")
    for tensor in facts["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        _add_row(tensors, tensor["key"], shape, tensor["dtype"])
    _print(tensors)


def printable(text: str) -> str:
    """The text with control characters spelled out: names in files may try to steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _one_line(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title or None)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _add_row(table: "Table", *cells: str) -> None:
    from rich.text import Text  # plain text: square brackets in a name are no markup

    table.add_row(*(Text(printable(cell)) for cell in cells))


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
