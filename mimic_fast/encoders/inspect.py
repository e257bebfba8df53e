"""What is in a checkpoint: ``mimic-fast inspect``. Nothing in the file is executed."""

from collections import Counter
from pathlib import Path
from typing import Any

from mimic_fast.config import EncoderSettings
from mimic_fast.encoders.ingest import LoadedEncoder, fill_encoder, read_checkpoint
from mimic_fast.encoders.taps import TappedEncoder, default_taps, tap_shapes
from mimic_fast.errors import UsageError

_RECOGNISE = EncoderSettings()


def inspect_checkpoint(path: Path, settings: EncoderSettings = _RECOGNISE) -> dict[str, Any]:
    """Describes a checkpoint in JSON values.

    Args:
        path: Checkpoint file.
        settings: As in ``load_encoder``; its taps replace the default ones.

    Returns:
        Always ``path``, ``format``, ``sha256``, ``bytes``, ``card`` and ``tensors`` (key, shape,
        dtype). Where the architecture is known: ``architecture``, ``spec``, ``assumed``,
        ``feature_dim``, ``parameters``, ``taps`` and ``unused``; otherwise ``problem`` says what is
        wrong and which setting to give.

    Raises:
        UsageError: If there is no such file.
        UnsafeInputError: If the file is unsafe or damaged.
    """
    checkpoint = read_checkpoint(path)
    facts: dict[str, Any] = {
        "path": str(path),
        "format": checkpoint.format,
        "sha256": checkpoint.sha256,
        "bytes": path.stat().st_size,
        "card": checkpoint.card,
        "dtypes": dict(Counter(_dtype(tensor.dtype) for tensor in checkpoint.tensors.values())),
    }
    try:
        loaded = fill_encoder(checkpoint, settings)
        facts |= _encoder_facts(loaded) | {"taps": _tap_facts(loaded, settings.taps)}
    except UsageError as error:
        facts["problem"] = str(error)
    facts["tensors"] = [
        {"key": key, "shape": list(tensor.shape), "dtype": _dtype(tensor.dtype)}
        for key, tensor in checkpoint.tensors.items()
    ]
    return facts


def _encoder_facts(loaded: LoadedEncoder) -> dict[str, Any]:
    encoder = loaded.encoder
    return {
        "architecture": encoder.spec.architecture,
        "spec": encoder.spec.model_dump(mode="json"),
        "assumed": list(loaded.assumed),
        "feature_dim": encoder.feature_dim,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "unused": list(loaded.unused),
    }


def _tap_facts(loaded: LoadedEncoder, taps: tuple[str, ...]) -> list[dict[str, Any]]:
    tapped = TappedEncoder(loaded.encoder, taps or default_taps(loaded.encoder))
    return [
        {"tap": tap, "channels": channels, "grid": [height, width], "attention": height * width > 1}
        for tap, (channels, height, width) in tap_shapes(tapped).items()
    ]


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
