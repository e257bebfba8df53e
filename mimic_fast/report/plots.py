"""Charts of the report: SVG as data URIs, legible without color, drawn without global state.

Colors are Okabe and Ito's, told apart by color-blind readers; every role has its own marker too.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Title, color and marker by role, in the order in which encoders are shown.
ROLES: dict[str, tuple[str, str, str]] = {
    "teacher": ("Teacher (suspect)", "#d55e00", "s"),
    "purified": ("Purified", "#0072b2", "o"),
    "student_only": ("Student-only (floor)", "#6b6b6b", "^"),
    "clean": ("Clean encoder (reference)", "#009e73", "D"),
}
_OTHER = ("#cc79a7", "v")
_WIDTH = 5.2  # inches; the text stays legible on a screen of 390 pixels
_MAX_POINTS = 400  # of a curve; longer ones show the mean of equal stretches of steps
_CURVES = (
    ("loss", "Total loss"),
    ("clone", "Clone loss"),
    ("attention", "Attention loss, weighted"),
    ("contrastive", "Contrastive loss"),
    ("lr", "Learning rate"),
)
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.hashsalt": "mimic_fast",  # the same figures give the same bytes
}


def role_title(role: str) -> str:
    """What a role is called in tables and charts."""
    return ROLES[role][0] if role in ROLES else role.replace("_", " ").capitalize()


def by_role(encoders: Mapping[str, Any]) -> list[str]:
    """Roles in the order in which they are shown."""
    return [role for role in ROLES if role in encoders] + [r for r in encoders if r not in ROLES]


def outcome_chart(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    """Accuracy and ASR of every encoder with 95 % intervals.

    Args:
        rows: Role, clean accuracy, ASR or None; in the order shown.

    Returns:
        SVG as a data URI.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        rated = any(rate is not None for _, _, rate in rows)
        figure = new_figure(height=0.75 + 0.3 * len(rows))
        panels = figure.subplots(1, 2 if rated else 1, sharey=True, squeeze=False)[0]
        _dots(panels[0], [(role, accuracy) for role, accuracy, _ in rows], "Clean accuracy, %")
        if rated:
            _dots(panels[1], [(role, rate) for role, _, rate in rows], "ASR, % (lower is better)")
        return _data_uri(figure)


def mutual_information_chart(information: Mapping[str, Any]) -> str:
    """Mutual information per layer with its interval and noise floor, and the layer weights.

    Args:
        information: The ``mutual_information`` of report.json.

    Returns:
        SVG as a data URI.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        return _data_uri(information_figure(information))


def information_figure(information: Mapping[str, Any]) -> "Figure":
    """As :func:`mutual_information_chart`, as a figure to be saved in any format."""
    import matplotlib as mpl

    layers = information["layers"]
    with mpl.rc_context(STYLE):
        figure = new_figure(height=0.85 + 0.26 * max(len(layers), 2))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = list(range(len(layers)))
        values = [layer["value"] for layer in layers]
        left.barh(places, values, height=0.62, color="#0072b2", alpha=0.85)
        for place, layer in enumerate(layers):
            _interval_and_floor(left, place, layer)
        right.barh(places, [layer["weight"] for layer in layers], height=0.62, color="#8c8c8c")
        left.set_yticks(places, [layer["tap"] + "*" * _marked(layer) for layer in layers])
        left.invert_yaxis()
        left.set_title("Mutual information, nats")
        right.set_title("Layer weight")
        right.ticklabel_format(axis="x", style="plain")
        right.locator_params(axis="x", nbins=4)
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.set_xlim(left=0)
    return figure


def loss_chart(metrics: Path) -> str | None:
    """Losses and learning rate over the steps of a run; terms that were never used are left out.

    Args:
        metrics: ``metrics.jsonl``; a torn last line is ignored.

    Returns:
        SVG as a data URI, or None if the file is missing or has fewer than two rows.
    """
    import matplotlib as mpl

    rows = _read_metrics(metrics)
    names = [(key, title) for key, title in _CURVES if any(row.get(key) for row in rows)]
    if len(rows) < 2 or not names:
        return None
    with mpl.rc_context(STYLE):
        height = math.ceil(len(names) / 2)
        figure = new_figure(height=0.5 + 1.45 * height)
        panels = figure.subplots(height, 2, sharex=True, squeeze=False).flat
        for axes, (key, title) in zip(panels, names, strict=False):
            steps, values = _thinned(rows, key)
            axes.plot(steps, values, color="#0072b2", linewidth=1.3)
            axes.set_title(title)
            axes.locator_params(nbins=5)
        for axes in list(panels)[len(names) :]:
            axes.remove()
        figure.supxlabel("Step", fontsize=9.5)
        return _data_uri(figure)


def curve_chart(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Clean accuracy and ASR of the student over the epochs, the teacher's as dashed lines.

    Args:
        rows: Of ``read_curve``.

    Returns:
        SVG as a data URI, or None if the student was measured less than twice.
    """
    import matplotlib as mpl

    student = [row for row in rows if row["role"] == "purified"]
    teacher = next((row for row in rows if row["role"] == "teacher"), None)
    if len(student) < 2:
        return None
    keys = [("clean_accuracy", "Clean accuracy, %"), ("attack_success_rate", "ASR, %")]
    keys = [(key, title) for key, title in keys if student[0].get(key) is not None]
    with mpl.rc_context(STYLE):
        figure = new_figure(height=2.1)
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for axes, (key, title) in zip(panels, keys, strict=False):
            _, color, marker = ROLES["purified"]
            epochs = [row["epoch"] for row in student]
            values = [100 * row[key] for row in student]
            axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, linewidth=1.3)
            if teacher is not None and teacher.get(key) is not None:
                axes.axhline(100 * teacher[key], color=ROLES["teacher"][1], dashes=(4, 2))
            axes.set_title(title)
            axes.set_ylim(-3, 103)
            axes.locator_params(axis="x", integer=True, nbins=5)
        for axes in panels[len(keys) :]:
            axes.remove()
        figure.supxlabel("Epoch", fontsize=9.5)
        return _data_uri(figure)


def new_figure(*, height: float) -> "Figure":
    """An empty figure as wide as the page's, ``height`` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _interval_and_floor(axes: "Axes", place: int, layer: Mapping[str, Any]) -> None:
    if layer.get("low") is not None and layer.get("high") is not None:
        ends = [max(0.0, layer["low"]), max(0.0, layer["high"])]
        axes.plot(ends, [place, place], color="#111111", linewidth=1.4, marker="|")
    if layer.get("noise_floor") is not None:
        floor = max(0.0, layer["noise_floor"])
        axes.plot([floor], [place], color="#d55e00", marker="D", markersize=4, clip_on=False)


def _marked(layer: Mapping[str, Any]) -> bool:
    return bool(layer.get("determines_features"))


def _dots(axes: "Axes", rows: Sequence[tuple[str, Mapping[str, Any] | None]], title: str) -> None:
    for place, (role, measure) in enumerate(rows):
        if measure is None:
            continue
        _, color, marker = ROLES.get(role, (role, *_OTHER))
        value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
        axes.plot([low, high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot([value], [place], color=color, marker=marker, markersize=6)
        side = -1 if value > 70 else 1  # the number stands where there is room
        axes.annotate(
            f"{value:.1f}",
            (value, place),
            xytext=(9 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            color="#222222",
        )
    axes.set_yticks(range(len(rows)), [role_title(role).partition(" (")[0] for role, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(visible=False, axis="y")
    axes.set_title(title)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _thinned(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over equal stretches once there are too many to draw."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    stride = math.ceil(len(pairs) / _MAX_POINTS)
    steps: list[float] = []
    values: list[float] = []
    for start in range(0, len(pairs), max(stride, 1)):
        part = pairs[start : start + stride]
        steps.append(sum(step for step, _ in part) / len(part))
        values.append(sum(value for _, value in part) / len(part))
    return steps, values


def svg_bytes(figure: "Figure") -> bytes:
    """The figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _data_uri(figure: "Figure") -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg_bytes(figure)).decode("ascii")
