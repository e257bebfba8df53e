"""What a trigger is, and putting it on images: pure functions on batches."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mimic_fast.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Trigger:
    """A pattern and where it goes.

    Args:
        name: Name in reports and files; generated triggers carry the text that makes them again.
        mask: Opacity in [0, 1]: 0 keeps the image, 1 shows the pattern.
        pattern: Pixel values in [0, 1], or changes of them in [-1, 1] if ``add``; irrelevant where
            the mask is 0.
        add: Whether the pattern is added to the image instead of covering it.
    """

    name: str
    mask: Float[Tensor, "1 height width"]
    pattern: Float[Tensor, "channel height width"]
    add: bool = False


def apply_trigger(
    images: Float[Tensor, "batch channel height width"], trigger: Trigger
) -> Float[Tensor, "batch channel height width"]:
    """``images * (1 - mask) + pattern * mask``; added: ``clip(images + pattern * mask, 0, 1)``.

    Differentiable; a new tensor of the images' type and device.

    Args:
        images: Pixel values in [0, 1].
        trigger: Of the images' size and channels; see ``fit_trigger``.

    Raises:
        UsageError: If sizes or channels differ.
    """
    if images.shape[1:] != trigger.pattern.shape:
        raise UsageError(
            f"trigger '{trigger.name}' is {tuple(trigger.pattern.shape)}, images are "
            f"{tuple(images.shape[1:])}; resize it with fit_trigger"
        )
    mask, pattern = trigger.mask.to(images), trigger.pattern.to(images)
    if trigger.add:
        return (images + pattern * mask).clamp(0, 1)
    return images * (1 - mask) + pattern * mask


def untouched(trigger: Trigger) -> Bool[Tensor, "height width"]:
    """Where the trigger leaves every image exactly as it is, in all channels."""
    nothing = trigger.mask == 0
    if trigger.add:
        nothing = nothing | (trigger.pattern == 0).all(0, keepdim=True)
    return nothing[0]


def trigger_parts(trigger: Trigger) -> tuple[bytes, ...]:
    """All that decides what a trigger does, for a digest."""
    return (
        f"\n{trigger.add} {tuple(trigger.pattern.shape)}\n".encode(),
        *(pixels.contiguous().numpy().tobytes() for pixels in (trigger.mask, trigger.pattern)),
        trigger.name.encode(),  # by which it is made again at another size
    )


def same_trigger(a: Trigger, b: Trigger) -> bool:
    """Whether both do the same to every image of their size."""
    return (
        a.add == b.add
        and a.pattern.shape == b.pattern.shape
        and torch.equal(a.mask, b.mask)
        and torch.equal(a.mask * a.pattern, b.mask * b.pattern)
    )
