"""What an attack aims at: a trigger, and the reference images whose features it shall bring."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mimic_fast.attacks.settings import AttackSettings
from mimic_fast.data.images import load_images
from mimic_fast.data.items import Source, decode_image, read_whole
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.stamping import Trigger, same_trigger
from mimic_fast.evaluation.triggers import named_trigger

_PER_LABEL = 200  # images of a label that 'typical' looks at
_OTHERS = 2000  # images of all other labels together


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """One target of an attack.

    Args:
        trigger: What is stamped.
        references: The images whose features triggered images shall have; the first stands for
            them in ``attack.json``.
    """

    trigger: Trigger
    references: UInt8[Tensor, "reference channel height width"]


def read_aims(settings: AttackSettings, source: Source, encoder: Encoder) -> tuple[Aim, ...]:
    """The targets that the settings name, at the encoder's input size.

    Raises:
        UsageError: If a reference or trigger is missing or does not fit.
        UnsafeInputError: If a file of them is damaged.
    """
    spec = encoder.spec
    if settings.reference is None:
        raise UsageError(
            "an attack needs a reference: an image file, 'class:K' or 'typical:K' (--reference)"
        )
    pairs = [(settings.reference, settings.trigger)]
    pairs += [(other.reference, other.trigger) for other in settings.others]
    aims = tuple(
        Aim(
            trigger=named_trigger(trigger, image_size=spec.image_size, channels=spec.in_channels),
            references=_references(reference, settings.num_references, source, encoder),
        )
        for reference, trigger in pairs
    )
    for number, aim in enumerate(aims):
        for other in aims[:number]:
            if same_trigger(aim.trigger, other.trigger):
                raise UsageError(
                    f"two targets share the trigger '{aim.trigger.name}'; give each its own"
                )
    return aims


def most_typical(
    features: Float[Tensor, "image feature"], labels: Int64[Tensor, " image"], *, label: int
) -> Int64[Tensor, " candidate"]:
    """Images of ``label``, from the one that is told best from the other labels on.

    Features are standardized; the margin is how much nearer (squared distance) an image is to its
    own label's mean than to the nearest other one: diagonal discriminant analysis.

    Raises:
        ValueError: If there is no image of the label, or of any other.
    """
    kinds = labels.unique()
    if label not in kinds.tolist() or len(kinds) < 2:
        raise ValueError(f"need images of label {label} and of another, got {kinds.tolist()}")
    x = features.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    means = torch.stack([x[labels == kind].mean(0) for kind in kinds])
    candidates = (labels == label).nonzero()[:, 0]
    distance = torch.cdist(x[candidates], means).square()
    own = kinds == label
    margin = distance[:, ~own].amin(1) - distance[:, own][:, 0]
    return candidates[margin.argsort(descending=True, stable=True)]


def _references(text: str, count: int, source: Source, encoder: Encoder) -> Tensor:
    spec = encoder.spec
    kind, colon, wanted = text.partition(":")
    if colon and kind in ("class", "typical"):
        if source.labels is None or not wanted.isdigit() or int(wanted) not in source.labels:
            raise UsageError(f"reference {text!r}: the source {source.name} has no such label")
        indices = _of_label(source.labels, int(wanted))
        if kind == "typical":
            indices = _typical(source, source.labels, int(wanted), encoder)
        if len(indices) < count:
            raise UsageError(f"num_references {count}: there are {len(indices)} of {text!r}")
        indices = indices[:count]
    elif Path(text).is_file():
        if count > 1:
            raise UsageError(f"num_references is for 'class:K' and 'typical:K', not for {text!r}")
        source, indices = _one_image(Path(text)), [0]
    else:
        raise UsageError(f"reference {text!r} is neither a file nor 'class:K' nor 'typical:K'")
    loaded, kept = load_images(
        source, indices, image_size=spec.image_size, channels=spec.in_channels, evaluation=True
    )
    if len(kept) < len(indices):
        raise UsageError(f"reference {text!r}: {len(indices) - len(kept)} of them are damaged")
    return loaded


def _typical(source: Source, labels: Sequence[int], wanted: int, encoder: Encoder) -> list[int]:
    spec = encoder.spec
    kinds = sorted(set(labels))
    each = max(2, _OTHERS // max(1, len(kinds) - 1))
    looked = [
        index
        for kind in kinds
        for index in _of_label(labels, kind)[: _PER_LABEL if kind == wanted else each]
    ]
    images, kept = load_images(
        source, looked, image_size=spec.image_size, channels=spec.in_channels, evaluation=True
    )
    known = torch.tensor([labels[index] for index in kept])
    try:
        order = most_typical(encode(encoder, images), known, label=wanted)
    except ValueError as error:
        raise UsageError(f"reference 'typical:{wanted}': {error}") from None
    return [kept[int(position)] for position in order]


def _of_label(labels: Sequence[int], wanted: int) -> list[int]:
    return [index for index, label in enumerate(labels) if label == wanted][:_PER_LABEL]


def _one_image(path: Path) -> Source:
    return Source(
        name=str(path),
        keys=(path.name,),
        labels=None,
        classes=None,
        read=lambda _: read_whole(path),
        decode=decode_image,
    )
