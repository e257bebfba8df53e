"""``mimic-fast locate``: mutual information of every layer with the encoder's features (step A)."""

from typing import TYPE_CHECKING

from mimic_fast.launch.arguments import (
    Data,
    Device,
    Json,
    Out,
    Overrides,
    Preset,
    Recipe,
    Seed,
    Teacher,
    given,
    print_json,
)

if TYPE_CHECKING:
    from mimic_fast.mutual_information.locate import MutualInformation


def locate(
    recipe: Recipe = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    preset: Preset = None,
    seed: Seed = None,
    overrides: Overrides = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure where the benign knowledge lies: mutual information per layer, with intervals."""
    from mimic_fast.mutual_information.locate import locate as run
    from mimic_fast.mutual_information.locate import mutual_information_json

    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.recipe import load_settings

    values = {
        **given(seed=seed),
        "encoder": given(teacher=teacher),
        "data": given(source=data),
        "run": given(out=out, device=device),
    }
    settings = load_settings(recipe, preset=preset, overrides=overrides or (), values=values)
    with progress_bars() as report:
        result = run(settings, report=report)
    if as_json:
        print_json(mutual_information_json(result))
    else:
        print_information(result)


def print_information(information: "MutualInformation") -> None:
    """A table of layers on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Mutual information with the features, nats "
        f"({information.estimator}, {information.source}, {information.images} images)"
    )
    table.add_column("tap")
    for name in ("nats", "95 % interval", "noise floor", "share", "weight"):
        table.add_column(name, justify="right")
    for layer in information.layers:
        table.add_row(
            layer.tap,
            f"{layer.value:.3f}" + (" *" if layer.determines_features else ""),
            f"{layer.low:.3f} .. {layer.high:.3f}",
            f"{layer.noise_floor:.3f}",
            f"{layer.share:.3f}",
            f"{layer.weight:.0f}",
        )
    if any(layer.determines_features for layer in information.layers):
        table.caption = "* determines the features: limited by the number of bins"
    Console().print(table)
