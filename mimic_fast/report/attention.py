"""Attention maps of teacher and purified encoder side by side, clean and triggered.

A map is sum_c |F_c|^p at one tap, as in the attention loss (arXiv:2406.03508, after
arXiv:1612.03928): where the encoder looks. A backdoored one looks at the trigger.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.evaluation.features import eval_mode
from mimic_fast.ops import power_maps
from mimic_fast.report.figures import Figure
from mimic_fast.report.plots import STYLE, new_figure, role_title, svg_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALLEST = 4  # positions a side below which a map shows no place
_IMAGES = 4
Images = UInt8[Tensor, "image channel side side"]


def attention_maps(
    encoder: Encoder, images: Images, *, tap: str, power: float = 2.0
) -> Float[Tensor, "image row column"]:
    """Attention maps of one tap, each scaled to sum 1; float32 on the CPU."""
    tapped = TappedEncoder(encoder, (tap,))
    weight = next(encoder.parameters())
    with eval_mode(tapped), torch.no_grad():
        _, (feature_map,) = tapped((images.float() / 255).to(weight))
        (flat,) = power_maps([feature_map.contiguous()], power=power)
    maps = flat.float().cpu().unflatten(1, feature_map.shape[2:])
    return maps / maps.sum((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def attention_tap(encoder: Encoder, taps: tuple[str, ...]) -> str | None:
    """The deepest tap whose map has at least 4x4 positions; None if there is none."""
    tapped = TappedEncoder(encoder, taps)
    spec, weight = encoder.spec, next(encoder.parameters())
    side = spec.image_size
    blank = torch.zeros(1, spec.in_channels, side, side, dtype=weight.dtype, device=weight.device)
    with eval_mode(tapped), torch.no_grad():
        _, maps = tapped(blank)
    sides = zip(taps, (feature_map.shape[-1] for feature_map in maps), strict=True)
    return next((tap for tap, side in reversed(list(sides)) if side >= _SMALLEST), None)


def attention_figure(
    encoders: Mapping[str, Encoder],
    taps: tuple[str, ...],
    clean: Images,
    triggered: Images | None,
    *,
    power: float = 2.0,
) -> Figure | None:
    """The figure of the report; None where no tap has places to show.

    Args:
        encoders: By role; all of one architecture.
        taps: Of the run.
        clean: Images as the encoders see them; the first four are shown.
        triggered: The same with the trigger; None without an attack.
        power: p of the attention loss.
    """
    import matplotlib as mpl

    tap = attention_tap(next(iter(encoders.values())), taps)
    if tap is None:
        return None
    shown = [clean[:_IMAGES]] + ([] if triggered is None else [triggered[:_IMAGES]])
    columns: list[tuple[str, Tensor]] = []
    for kind, images in zip(("Clean", "Triggered"), shown, strict=False):
        columns.append((kind, images))
        for role, encoder in encoders.items():
            maps = attention_maps(encoder, images, tap=tap, power=power)
            columns.append((role_title(role).partition(" (")[0], maps))
    rows = len(shown[0])
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 8}):
        figure = new_figure(height=0.3 + 5.2 * rows / max(len(columns), 4))
        grid = figure.subplots(rows, max(len(columns), 4), squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for column, (title, pictures) in enumerate(columns):
            grid[0, column].set_title(title, loc="center")
            for row, picture in enumerate(pictures):
                _show(grid[row, column], picture)
        svg = svg_bytes(figure)
    kinds = "clean" if triggered is None else "clean and with the trigger"
    return Figure(
        name="attention",
        title="Where the encoders look",
        caption=f"Attention maps of {tap}, sum of |activation| to the power {power:g} over "
        "channels, each scaled by itself: dark is low, yellow high. A backdoored encoder looks at "
        "the trigger; a purified one should look at what it looks at without it.",
        alt=f"Test images, {kinds}, each beside the attention maps of "
        + " and ".join(role_title(role) for role in encoders),
        svg=svg,
    )


def _show(axes: "Axes", picture: Tensor) -> None:
    if picture.ndim == 2:
        axes.imshow(picture.numpy(), cmap="viridis", interpolation="nearest")
        return
    pixels = picture.permute(1, 2, 0).numpy()
    gray = pixels.shape[2] == 1
    axes.imshow(pixels[..., 0] if gray else pixels, cmap="gray", vmin=0, vmax=255)
