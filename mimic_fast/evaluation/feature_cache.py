"""Features kept on disk, so that evaluating again, or with another probe, costs no forward.

An entry is named by the digest of all that decides it: the encoder's file and how it is read, the
pixels themselves, the trigger. So it can be stale never, shared by runs, and deleted at any time.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mimic_fast.encoders.build import Encoder
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.stamping import trigger_parts
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.files import machine_errors, write_atomic

_FORM = "mimic_fast features 1"  # changes with what an entry holds


@runtime_checkable
class Measurable(Protocol):
    """An encoder and the digest of the file it came from; ``ingest.LoadedEncoder`` is one."""

    @property
    def encoder(self) -> Encoder:
        """Maps images in [0, 1] to features."""
        ...

    @property
    def sha256(self) -> str:
        """Of the checkpoint file; empty for what lies in no file."""
        ...


def cached_features(
    cache: Path | None,
    loaded: Measurable,
    images: Shaped[Tensor, "image channel height width"],
    *,
    trigger: Trigger | None,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> Float[Tensor, "image feature"]:
    """``encode``, or what it gave before for the same file, images and trigger.

    An entry that cannot be read is computed again and replaced.

    Args:
        cache: Folder, made when it is not there; None computes.
        loaded: The encoder; without a digest nothing is kept.
        images: uint8 in 0..255, or floating point in [0, 1].
        trigger: Stamped on every image if given.
        batch_size: Images per forward; does not name the entry.
        stop: Polled every batch; true leaves.

    Raises:
        MachineError: If the cache cannot be written.
        UsageError, UnsafeInputError, StoppedError: As ``encode``.
    """
    compute = partial(
        encode, loaded.encoder, images, trigger=trigger, batch_size=batch_size, stop=stop
    )
    if cache is None or not loaded.sha256:
        return compute()
    path = cache / f"{_name(loaded, images, trigger)}.safetensors"
    if (features := _read(path, len(images))) is not None:
        return features
    features = compute()
    with machine_errors(path):
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"features": features.contiguous()}))
    return features


def _name(loaded: Measurable, images: Tensor, trigger: Trigger | None) -> str:
    digest = hashlib.sha256()
    spec = loaded.encoder.spec.model_dump_json()
    for text in (_FORM, loaded.sha256, spec, str(images.dtype), str(tuple(images.shape))):
        digest.update(f"{text}\n".encode())
    digest.update(images.contiguous().numpy().data)
    if trigger is not None:
        for part in trigger_parts(trigger):
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path, images: int) -> Tensor | None:
    try:
        features = load(path.read_bytes())["features"]
    except (OSError, SafetensorError, KeyError, ValueError):  # absent or damaged: made again
        return None
    fits = features.ndim == 2 and len(features) == images and features.dtype == torch.float32
    return features if fits and bool(features.isfinite().all()) else None
