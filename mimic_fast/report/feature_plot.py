"""Two principal components of the features of clean and triggered images, per encoder.

A backdoored encoder sends triggered images to one place; in a purified one they lie among the
clean ones.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mimic_fast.report.figures import Figure
from mimic_fast.report.plots import STYLE, new_figure, role_title, svg_bytes

if TYPE_CHECKING:
    from matplotlib.collections import PathCollection

_MARKS: dict[str, dict[str, Any]] = {
    "clean": {"s": 7, "c": "#8c8c8c", "marker": "o", "lw": 0},
    "clean, of the target class": {"s": 12, "c": "#0072b2", "marker": "^", "lw": 0},
    "with the trigger": {"s": 12, "c": "#d55e00", "marker": "x", "lw": 0.8},
}
Features = Float[Tensor, "image feature"]


def principal_components(features: Features) -> tuple[Float[Tensor, "image 2"], float]:
    """Coordinates on the first two principal components, and the share of variance they hold.

    The sign of each component is fixed: its largest loading is positive.
    """
    centered = features.double() - features.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    total = sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return centered @ axes.T, float(sizes[:2].square().sum() / total)


def feature_figure(
    clean: Mapping[str, Features],
    triggered: Mapping[str, Float[Tensor, "stamped feature"]],
    *,
    labels: Int64[Tensor, "image"],
    target: int | None,
) -> Figure:
    """The figure of the report.

    Args:
        clean: Features of test images by role.
        triggered: Of the same images with the trigger, by role; empty without an attack.
        labels: Their classes.
        target: The attack's class; None without one.
    """
    import matplotlib as mpl

    roles = list(clean)
    columns = min(len(roles), 2)
    rows = -(-len(roles) // columns)
    of_target = torch.zeros_like(labels, dtype=torch.bool) if target is None else labels == target
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = new_figure(height=0.5 + 5.2 / 2 * rows)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        handles: dict[str, PathCollection] = {}
        for axes, role in zip(panels, roles, strict=False):
            both = torch.cat([clean[role], *([triggered[role]] if role in triggered else [])])
            points, share = principal_components(both)
            plain = points[: len(labels)]
            groups = {
                "clean": plain[~of_target],
                "clean, of the target class": plain[of_target],
                "with the trigger": points[len(labels) :],
            }
            for name, group in groups.items():
                if len(group):
                    handles[name] = axes.scatter(*group.T.numpy(), **_MARKS[name])
            axes.set_title(f"{role_title(role)}, {100 * share:.0f} % of variance", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in panels[len(roles) :]:
            axes.remove()
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        svg = svg_bytes(figure)
    return Figure(
        name="features",
        title="Features, clean and triggered" if triggered else "Features of test images",
        caption=f"{len(labels)} test images, first two principal components of each encoder's own "
        "features. A picture, not a measure: what lies apart in other directions does not show.",
        alt="Scatter plots of features by encoder: " + ", ".join(map(role_title, roles)),
        svg=svg,
    )
