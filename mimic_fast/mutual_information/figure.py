"""The picture of step A: mutual information of every layer with its interval and noise floor."""

from typing import TYPE_CHECKING

from mimic_fast.mutual_information.result import MutualInformation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any color vision.
_BAR = "#0072B2"
_FLOOR = "#D55E00"


def mutual_information_figure(result: MutualInformation) -> "Figure":
    """Bars with 95 % intervals, shallow to deep, and what shuffled pairings reach."""
    from matplotlib.figure import Figure

    layers = result.layers
    width = max(5.0, 1.6 + 0.62 * len(layers))
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    below = [max(0.0, layer.raw - layer.low) for layer in layers]
    above = [max(0.0, layer.high - layer.raw) for layer in layers]
    axes.bar(places, [layer.value for layer in layers], width=0.66, color=_BAR, zorder=2)
    axes.errorbar(
        places,
        [layer.raw for layer in layers],
        yerr=[below, above],
        fmt="none",
        ecolor="black",
        capsize=3,
        zorder=3,
    )
    floors = [(place, layer.noise_floor) for place, layer in enumerate(layers)]
    known = [(place, floor) for place, floor in floors if floor is not None]
    if known:
        ends = ([p - 0.42 for p, _ in known], [p + 0.42 for p, _ in known])
        heights = [floor for _, floor in known]
        axes.hlines(heights, *ends, colors=_FLOOR, label="reached by shuffled pairings", zorder=4)
        axes.legend(frameon=False, loc="best")
    names = [layer.tap + "*" * layer.determines_features for layer in layers]
    axes.set_xticks(places, names, rotation=0 if len(layers) <= 5 else 45, ha="center")
    axes.set_ylabel("mutual information, nats")
    starred = any(layer.determines_features for layer in layers)
    if starred:
        limit = "number of images" if result.bins is None else "bins"
        axes.set_xlabel(f"* determines the features: limited by the {limit}", size=9)
    axes.set_title(f"{result.source}, {result.estimator}, {result.images} images", size=9)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
