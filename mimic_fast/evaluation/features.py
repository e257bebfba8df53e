"""Features of many images, batch by batch, with or without a trigger."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mimic_fast.config import RunSettings
from mimic_fast.distributed import device_of
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.triggers import Trigger, apply_trigger, fit_trigger
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.watch import leave_if


def encode(
    encoder: nn.Module,
    images: Shaped[Tensor, "image channel height width"],
    *,
    batch_size: int = 256,
    trigger: Trigger | None = None,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Float[Tensor, "image feature"]:
    """Features in float32 on the CPU, in eval mode, without gradient.

    The encoder's mode, module by module, is restored. Images go to the encoder's device and type.

    Args:
        encoder: Maps images in [0, 1] to features ``[B, D]``; normalizes by itself.
        images: uint8 in 0..255, or floating point in [0, 1].
        batch_size: Images per forward.
        trigger: Stamped on every image if given, resized to fit.
        report: Told the number of images done.
        stop: Polled every batch; true leaves.

    Raises:
        UsageError: If there are no images.
        UnsafeInputError: If a feature is not finite.
        StoppedError: If ``stop`` told so.
    """
    if not len(images):
        raise UsageError("no images to encode; give at least one")
    if trigger is not None:
        _, channels, size, _ = images.shape
        trigger = fit_trigger(trigger, image_size=size, channels=channels)
    weight = next(encoder.parameters())
    chunks: list[Tensor] = []
    with eval_mode(encoder), torch.no_grad():
        for start in range(0, len(images), batch_size):
            leave_if(stop)
            batch = _as_float(images[start : start + batch_size]).to(weight)
            if trigger is not None:
                batch = apply_trigger(batch, trigger)
            chunks.append(encoder(batch).float().cpu())
            done = min(start + batch_size, len(images))
            report(Event(phase="encode", done=done, total=len(images), unit="images"))
    features = torch.cat(chunks)
    if not bool(features.isfinite().all()):
        raise UnsafeInputError(
            "the encoder gives features that are not finite; its weights are damaged"
        )
    return features


def place(encoders: Iterable[nn.Module], run: RunSettings) -> None:
    """Moves encoders that will be measured to where ``run.device`` says.

    On a GPU float32 is then float32: convolutions in TF32, PyTorch's default, would give features
    that depend on the machine, and they are compared and kept across machines. Weights go into the
    order that convolutions run fastest in (NHWC); the values are the same.

    Raises:
        UsageError: If a GPU was asked for and none is visible.
    """
    device = device_of(run)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    for encoder in encoders:
        encoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every submodule's own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _as_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float() / 255
