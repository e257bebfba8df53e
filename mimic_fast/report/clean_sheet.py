"""A sample of the clean set, and the trigger a scan recovered, as pictures."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.report.figures import Figure
from mimic_fast.report.plots import STYLE, new_figure, role_title, svg_bytes

_SAMPLE = 24
_COLUMNS = 8


def clean_sample_figure(pool: UInt8[Tensor, "image channel side side"]) -> Figure:
    """The first images of the clean set (it is in drawn, that is random, order)."""
    import matplotlib as mpl

    shown = pool[:_SAMPLE]
    rows = math.ceil(len(shown) / _COLUMNS)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = new_figure(height=5.2 * rows / _COLUMNS)
        grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        for axes in grid:
            axes.set_axis_off()
        for axes, image in zip(grid, shown, strict=False):
            pixels = image.permute(1, 2, 0).numpy()
            axes.imshow(pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmax=255)
        svg = svg_bytes(figure)
    return Figure(
        name="clean_set",
        title="Sample of the clean set",
        caption=f"The first {len(shown)} of {len(pool):,} images, as they are cropped and scaled "
        "for the encoder. They alone taught the purified encoder: look for what does not belong.",
        alt=f"{len(shown)} images of the clean set",
        svg=svg,
    )


def recovered_figure(triggers: Mapping[str, Trigger]) -> Figure:
    """Triggers that scans recovered, by role: mask, and pattern where the mask lets it through."""
    import matplotlib as mpl

    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 8}):
        figure = new_figure(height=1.5)
        grid = list(figure.subplots(1, 4, squeeze=False).flat)
        for axes in grid:
            axes.set_axis_off()
        for place, (role, trigger) in enumerate(list(triggers.items())[:2]):
            mask, pattern = grid[2 * place], grid[2 * place + 1]
            title = role_title(role).partition(" (")[0]
            mask.imshow(trigger.mask[0].numpy(), cmap="viridis", vmin=0, vmax=1)
            mask.set_title(f"{title}: mask", loc="center")
            gray = torch.full_like(trigger.pattern, 0.5)
            seen = gray + trigger.mask * (
                trigger.pattern if trigger.add else trigger.pattern - gray
            )
            pixels = seen.clamp(0, 1).permute(1, 2, 0).numpy()
            pattern.imshow(
                pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1
            )
            pattern.set_title("on gray", loc="center")
        svg = svg_bytes(figure)
    return Figure(
        name="recovered_trigger",
        title="Triggers recovered by the scan",
        caption="The smallest change found that sends all clean images to one place. It is one "
        "that works, not necessarily the attacker's; a clean encoder has one too, but a larger.",
        alt="Mask and pattern of the recovered trigger of " + ", ".join(map(role_title, triggers)),
        svg=svg,
    )
