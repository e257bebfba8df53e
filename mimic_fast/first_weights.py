"""The weights a student begins with: random, or a clean checkpoint of the user's own.

Never the suspect's: a checkpoint that shares a weight matrix with it is refused.
"""

from dataclasses import dataclass

import torch

from mimic_fast.config import EncoderSettings, StudentSettings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder
from mimic_fast.errors import UsageError

_READ = ("architecture", "arguments", "stem", "in_channels", "image_size", "mean", "std")


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstWeights:
    """A student before its first step.

    Args:
        encoder: On the CPU, in training mode.
        sha256: Digest of the checkpoint it begins with; None: random weights.
    """

    encoder: Encoder
    sha256: str | None


def first_weights(teacher: LoadedEncoder, settings: StudentSettings, *, seed: int) -> FirstWeights:
    """Builds the student of a purification.

    Args:
        teacher: The suspect; only its specification is used, and its weights to compare with.
        settings: How the student begins.
        seed: Of the random weights.

    Raises:
        UsageError: If the checkpoint is missing, of another architecture or input, or shares
            weights with the suspect.
        UnsafeInputError: If it is damaged or unsafe.
    """
    spec = teacher.encoder.spec
    if settings.checkpoint is None:
        return FirstWeights(encoder=build_encoder(spec, seed=seed), sha256=None)
    # Read as the suspect is: what the trusted file's own card says does not decide.
    reading = EncoderSettings.model_validate({name: getattr(spec, name) for name in _READ})
    trusted = load_encoder(settings.checkpoint, reading)
    shared = _shared_matrices(trusted.encoder, teacher.encoder)
    if shared:
        raise UsageError(
            f"student.checkpoint {settings.checkpoint} shares {len(shared)} weights with the "
            f"suspect, among them {shared[0]!r}; give one of another training, or none for random "
            "weights"
        )
    encoder = trusted.encoder.float().train().requires_grad_(True)
    return FirstWeights(encoder=encoder, sha256=trusted.sha256)


def _shared_matrices(first: Encoder, second: Encoder) -> list[str]:
    """Names of equal weight matrices and kernels.

    Vectors are often still at their first value, and tokens and position embeddings, ``[1, token,
    width]``, are the same fixed sinusoids in many ViTs: they do not count.
    """
    others = dict(second.backbone.named_parameters())
    return [
        name
        for name, weight in first.backbone.named_parameters()
        if weight.ndim > 1
        and not (weight.ndim == 3 and weight.shape[0] == 1)
        and torch.equal(weight.float(), others[name].float().to(weight.device))
    ]
