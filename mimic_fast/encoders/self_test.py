"""The start-up self-test: every tap must teach something before hours are spent on it.

A tap that returns the same tensor on both sides gives an attention loss of exactly 0 and nobody
notices (``method.md`` section 7).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast.encoders.taps import TappedEncoder, undisturbed
from mimic_fast.errors import SelfTestError, UsageError

Maps = tuple[Tensor, ...]

# Summed over the images. Rounding of float32 maps leaves about 1e-14, two networks 1e-4 and more.
_NO_LOSS = 1e-12


def self_test(
    student: TappedEncoder,
    teacher: TappedEncoder,
    images: Float[Tensor, "batch channel height width"],
) -> None:
    """Proves on a few images that every tap is alive and different from the others.

    Both run in evaluation mode; modes, buffers, gradients and random states are left as they were.

    Args:
        student: Randomly initialized, with trainable parameters.
        teacher: The suspect encoder with the same taps.
        images: At least two different images in [0, 1], on the encoders' device.

    Raises:
        SelfTestError: If a tap's maps are not finite or do not depend on the image; if its
            attention loss is 0 (taps of one position are exempt) or sends no gradient to the
            student; or if two taps are the same.
        UsageError: If the images cannot show it.
    """
    if images.shape[0] < 2 or bool((images == images[:1]).all()):
        raise UsageError("the self-test needs at least two different images")
    with undisturbed(student), undisturbed(teacher):
        with torch.no_grad():
            expected, teacher_maps = teacher(images)
        with torch.enable_grad():
            features, student_maps = student(images)
            _check_alive("teacher", teacher.taps, teacher_maps)
            _check_alive("student", student.taps, student_maps)
            _check_distinct(teacher.taps, teacher_maps)
            _check_features("teacher", expected)
            _check_features("student", features)
            _check_losses(student, student_maps, teacher_maps)


def _check_alive(role: str, taps: tuple[str, ...], maps: Maps) -> None:
    for tap, feature_map in zip(taps, maps, strict=True):
        values = feature_map.detach()
        if not bool(torch.isfinite(values).all()):
            raise SelfTestError(
                f"tap {tap!r} is dead: the {role}'s feature map is not finite; check the checkpoint"
            )
        if bool((values == values[:1]).all()):
            raise SelfTestError(
                f"tap {tap!r} is dead: the {role}'s feature map is the same for every image; "
                "choose another layer in encoder.taps"
            )


def _check_distinct(taps: tuple[str, ...], maps: Maps) -> None:
    for later in range(len(taps)):
        for earlier in range(later):
            one, two = maps[earlier], maps[later]
            if one.shape == two.shape and torch.equal(one, two):
                raise SelfTestError(
                    f"taps {taps[earlier]!r} and {taps[later]!r} are duplicates: they return the "
                    "same tensor; keep one in encoder.taps"
                )


def _check_features(role: str, features: Tensor) -> None:
    values = features.detach()
    if not bool(torch.isfinite(values).all()) or not bool(values.any(dim=1).all()):
        raise SelfTestError(f"the {role}'s features are zero or not finite; check the checkpoint")


def _check_losses(student: TappedEncoder, student_maps: Maps, teacher_maps: Maps) -> None:
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise SelfTestError("the student has no trainable parameters; it must not be frozen")
    for tap, own, other in zip(student.taps, student_maps, teacher_maps, strict=True):
        if own.shape != other.shape:
            raise SelfTestError(
                f"tap {tap!r} differs in shape: student {list(own.shape)}, teacher "
                f"{list(other.shape)}; both must have the same architecture"
            )
        if own.shape[2] * own.shape[3] == 1:
            loss = own.double().square().sum()  # no attention loss here; does the tap learn at all?
        else:
            loss = (_attention(own) - _attention(other)).square().sum()
            if loss.item() < _NO_LOSS:
                raise SelfTestError(
                    f"tap {tap!r} is dead: its attention loss is 0, both encoders give the same "
                    "attention map; choose a layer behind the first weights"
                )
        if not _reaches(loss, parameters):
            raise SelfTestError(
                f"tap {tap!r} is dead: no gradient of its loss reaches the student; choose a layer "
                "behind the first trainable weights"
            )


def _attention(feature_map: Tensor) -> Tensor:
    # Plain float64 on purpose: this looks for exact zeros, not for the loss of the recipe.
    return F.normalize(feature_map.double().square().sum(1).flatten(1), dim=1)


def _reaches(loss: Tensor, parameters: list[torch.nn.Parameter]) -> bool:
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    present = [gradient for gradient in gradients if gradient is not None]
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in present)
    return finite and any(bool(gradient.any()) for gradient in present)
