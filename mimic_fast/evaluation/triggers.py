"""Triggers by name or from a file, at any input size; see ``stamping`` for what a trigger does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.patterns import (
    blended,
    frequency,
    random_patch,
    sinusoid,
    white_patch,
)
from mimic_fast.evaluation.stamping import Trigger, apply_trigger, same_trigger, untouched
from mimic_fast.evaluation.trigger_files import load_trigger, save_trigger

__all__ = [
    "TRIGGER_NAMES",
    "Trigger",
    "apply_trigger",
    "blended",
    "fit_trigger",
    "frequency",
    "load_trigger",
    "named_trigger",
    "random_patch",
    "save_trigger",
    "sinusoid",
    "untouched",
    "white_patch",
]

TRIGGER_NAMES = "white_patch, random_patch[:SEED], blended[:FILE], frequency[:MAGNITUDE], sinusoid"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MAX_SEED = 2**31
_SMALLEST = 8  # pixels; no trigger is made for smaller images


def named_trigger(text: str, *, image_size: int, channels: int) -> Trigger:
    """The trigger that ``text`` names, of the given size.

    Args:
        text: ``white_patch``, ``random_patch``, ``random_patch:SEED``, ``blended``,
            ``blended:SEED``, ``blended:FILE`` (a picture or trigger file whose pattern is blended
            over the image), ``frequency``, ``frequency:MAGNITUDE``, ``sinusoid``, or a trigger file
            (see :func:`load_trigger`).
        image_size: Side of the image, pixels.
        channels: Of the image.

    Raises:
        UsageError: If it names neither, or does not fit the images.
        UnsafeInputError: If the file is unsafe or damaged.
    """
    made = _generated(text, image_size=image_size, channels=channels)
    if made is not None:
        return made
    name, _, argument = text.partition(":")
    if name == "blended" and argument:
        whole = fit_trigger(load_trigger(Path(argument)), image_size=image_size, channels=channels)
        if whole.add:
            raise UsageError(f"trigger {text!r} is added to images, not blended; name the file")
        picture = blended(whole.pattern, image_size=image_size, channels=channels)
        return replace(picture, name=Path(argument).stem)
    if not Path(text).is_file():
        raise UsageError(f"trigger {text!r} is neither a file nor one of {TRIGGER_NAMES}")
    return fit_trigger(load_trigger(Path(text)), image_size=image_size, channels=channels)


def fit_trigger(trigger: Trigger, *, image_size: int, channels: int) -> Trigger:
    """The trigger for another input size or channel count.

    What was made by a formula is made again; anything else is interpolated bilinearly
    (antialiased); color becomes gray by ITU-R BT.601 luma, as Pillow does it.

    Raises:
        UsageError: If the channel counts cannot be converted.
    """
    own, height, width = trigger.pattern.shape
    if (own, height, width) == (channels, image_size, image_size):
        return trigger
    if height == width >= _SMALLEST:
        for name in (trigger.name, "white_patch"):
            made = _generated(name, image_size=height, channels=own)
            if made is not None and same_trigger(made, trigger):
                again = _generated(name, image_size=image_size, channels=channels)
                assert again is not None
                return replace(again, name=trigger.name)
    mask, pattern = trigger.mask, _convert_channels(trigger.pattern, channels, trigger.name)
    if (height, width) != (image_size, image_size):
        mask, pattern = _resize(mask, image_size), _resize(pattern, image_size)
        mask, pattern = mask.clamp(0, 1), pattern.clamp(-1 if trigger.add else 0, 1)
    return replace(trigger, mask=mask, pattern=pattern)


def _generated(text: str, *, image_size: int, channels: int) -> Trigger | None:
    """What a formula makes of this name; None if it is none. The name may come from a file."""
    name, colon, argument = text.partition(":")
    shape = {"image_size": image_size, "channels": channels}
    plain: dict[str, Callable[..., Trigger]] = {"white_patch": white_patch, "sinusoid": sinusoid}
    if name in plain and not colon:
        return plain[name](**shape)
    if name in ("random_patch", "blended"):
        if colon and not (argument.isascii() and argument.isdigit() and len(argument) < 11):
            return None
        seed = int(argument or 0)
        if seed >= _MAX_SEED:
            return None
        if name == "blended":
            return blended(None, **shape, seed=seed)
        return random_patch(**shape, seed=seed)
    if name == "frequency" and channels in (1, 3):
        magnitude = _number(argument) if colon else 100.0
        return None if magnitude is None else frequency(**shape, magnitude=magnitude)
    return None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 1000 else None


def _convert_channels(pixels: Tensor, channels: int, name: str) -> Tensor:
    own = pixels.shape[0]
    if own == channels:
        return pixels
    if own == 1:
        return pixels.repeat(channels, 1, 1)
    if own == 3 and channels == 1:
        return (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    raise UsageError(
        f"{name} has {own} channels and the encoder takes {channels}; give one that fits"
    )


def _resize(pixels: Tensor, image_size: int) -> Tensor:
    size = (image_size, image_size)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
