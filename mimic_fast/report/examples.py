"""A row of test images, clean and triggered, with what each encoder's probe makes of them."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.data.images import load_images
from mimic_fast.data.sources import open_source
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.triggers import apply_trigger, fit_trigger


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One test image.

    Args:
        label: Name of its class.
        clean: PNG as a data URI.
        triggered: The same with the trigger; None without an attack.
        said: What each role's probe calls them, clean and triggered, by role.
        fooled: Roles that call the triggered image the target.
    """

    label: str
    clean: str
    triggered: str | None
    said: Mapping[str, tuple[str, str | None]]
    fooled: tuple[str, ...]


def load_examples(
    evaluation: Mapping[str, Any],
    settings: EvaluationSettings,
    *,
    image_size: int,
    channels: int,
) -> tuple[Example, ...]:
    """The example images of the first downstream set, as encoders see them.

    Of several attacks the first is shown.

    Args:
        evaluation: Result of ``evaluate_encoders``.
        settings: The settings it was called with.
        image_size: Input size of the encoders, pixels.
        channels: Input channels of the encoders.

    Raises:
        UsageError: If the data or the attack has gone since.
    """
    if not evaluation.get("examples") or not evaluation["examples"][0]["images"]:
        return ()
    rows = evaluation["examples"][0]["images"]
    facts = evaluation["datasets"][0]
    source = open_source(settings.downstream[0].test)
    indices = [row["index"] for row in rows]
    images, kept = load_images(
        source, indices, image_size=image_size, channels=channels, evaluation=True
    )
    stamped = _stamped(images, settings)
    target = target_of(evaluation, facts["name"])
    examples: list[Example] = []
    for position, index in enumerate(kept):
        row = rows[indices.index(index)]
        pixels = None if stamped is None else stamped[position]
        examples.append(_example(row, facts["class_names"], target, images[position], pixels))
    return tuple(examples)


def png_uri(image: Tensor) -> str:
    """A uint8 image ``[1 or 3, H, W]`` as a PNG data URI."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _example(
    row: Mapping[str, Any],
    names: list[str],
    target: int | None,
    clean: Tensor,
    triggered: Tensor | None,
) -> Example:
    def name(index: int | None) -> str | None:
        return None if index is None else _name(names, index)

    predicted: Mapping[str, Mapping[str, int]] = row["predicted"]
    return Example(
        label=_name(names, row["label"]),
        clean=png_uri(clean),
        triggered=None if triggered is None else png_uri(triggered),
        said={
            role: (_name(names, said["clean"]), name(said.get("triggered")))
            for role, said in predicted.items()
        },
        fooled=tuple(
            role
            for role, said in predicted.items()
            if target is not None and said.get("triggered") == target
        ),
    )


def _stamped(images: Tensor, settings: EvaluationSettings) -> Tensor | None:
    if not settings.attacks:
        return None
    trigger = read_attack(settings.attacks[0]).trigger
    trigger = fit_trigger(trigger, image_size=images.shape[-1], channels=images.shape[1])
    return (apply_trigger(images.float() / 255, trigger) * 255).round().to(torch.uint8)


def target_of(evaluation: Mapping[str, Any], dataset: str) -> int | None:
    """The class of the first attack on a downstream set; None without an attack."""
    for encoder in evaluation["encoders"].values():
        for entry in encoder.get("downstream", ()):
            for attack in entry.get("attacks", ()):
                if entry["dataset"] == dataset:
                    return attack["target"]
    return None


def first_of(evaluation: Mapping[str, Any]) -> str:
    """A sentence, after a space, that of several triggers the first is shown; else nothing."""
    attacks = evaluation.get("attacks", ())
    if len(attacks) < 2:
        return ""
    return f" Of the {len(attacks)} triggers the first, {attacks[0]['trigger']}, is shown."


def _name(names: list[str], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"
