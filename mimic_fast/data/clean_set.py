"""The clean set: a seeded draw from a source, every image really decoded.

The draw orders the items by SHA-256 of seed and key, so it depends on nothing else: not on the
order of files on disk, on a library's random generator, or on how many processes run. The same
manifest is the same images in the same order everywhere.
"""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.config import DataSettings, EncoderSpec
from mimic_fast.data.decoded import load_squares
from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.data.manifest import (
    CleanItem,
    CleanSet,
    items_digest,
    read_clean_set,
    write_clean_set,
)
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.data.stored import StoredFiles, stored_files
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.progress import Event, Reporter, silent

__all__ = [
    "CleanImages",
    "CleanItem",
    "CleanSet",
    "clean_images",
    "draw_clean_set",
    "load_clean_images",
    "read_clean_set",
    "write_clean_set",
]

_REPORT_EVERY = 256


def draw_clean_set(
    source: Source, settings: DataSettings, *, seed: int, report: Reporter = silent
) -> CleanSet:
    """Draws the clean set; the next of the draw takes the place of a corrupt item.

    With ``settings.stratified`` every label gives the same share of its images (largest
    remainders), and a corrupt one is replaced within its label. If the good images run out, the
    set is smaller than requested, which is reported.

    Args:
        source: Where the images come from.
        settings: Count or fraction, budget, hold-out.
        seed: Seed of the draw.
        report: Told how many images are drawn, and of each quarantined item.

    Raises:
        UsageError: If the request exceeds the budget or the source, is below 2 images, or asks for
            strata where there are no labels.
        UnsafeInputError: If fewer than 2 images can be decoded.
    """
    requested = requested_count(source, settings)
    check_budget(settings.pretraining_size or len(source), settings, requested, name=source.name)
    order = sorted(range(len(source)), key=lambda index: _rank(seed, source.keys[index]))
    drawn = _Drawn(source=source, total=requested, report=report)
    strata = _strata(source, order, requested) if settings.stratified else [(order, requested)]
    for members, quota in strata:
        drawn.take(iter(members), quota)
    # Strata come label by label; the hold-out, which is the end of the list, must be random.
    items = tuple(sorted(drawn.items, key=lambda item: _rank(seed, item.key)))
    if len(items) < 2:
        key, reason = drawn.quarantined[0]
        raise UnsafeInputError(
            f"{source.name}: {len(items)} of {len(source)} images can be decoded, expected at "
            f"least 2; the first that cannot: {key} {reason}"
        )
    if len(items) < requested:
        message = f"only {len(items)} of {requested} requested images are good; going on with them"
        report(Event(phase="clean set", message=message))
    return CleanSet(
        source=source.name,
        seed=seed,
        requested=requested,
        fraction=len(items) / (settings.pretraining_size or len(source)),
        items=items,
        quarantined=tuple(drawn.quarantined),
        sha256=items_digest(items),
        hold_out=round(settings.hold_out * len(items)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanImages:
    """A clean set with its images.

    Args:
        clean_set: Which images.
        squares: Decoded, uint8, in the set's order.
        files: As they are stored, in the set's order.
    """

    clean_set: CleanSet
    squares: UInt8[Tensor, "image channel side side"]
    files: StoredFiles


def load_clean_images(
    source: Source,
    clean_set: CleanSet,
    *,
    image_size: int,
    channels: int,
    report: Reporter = silent,
) -> UInt8[Tensor, "image channel side side"]:
    """The pixels of a clean set in its order, in memory; side and channels as in ``load_images``.

    Raises:
        UnsafeInputError: If the source no longer holds the very bytes that were drawn.
    """
    files = stored_files(source, clean_set.items)
    return load_squares(files, image_size=image_size, channels=channels, report=report)


def clean_images(
    settings: DataSettings,
    spec: EncoderSpec,
    *,
    seed: int,
    world: int = 1,
    report: Reporter = silent,
) -> CleanImages:
    """The clean set of ``settings.source`` and its images; warns of corrupt ones left out.

    With ``settings.clean_set`` the images of that manifest, in its order, and nothing is drawn.

    Raises:
        UsageError: If there is no source, or as in :func:`draw_clean_set`.
        UnsafeInputError: As in :func:`draw_clean_set` and :func:`load_squares`.
    """
    if settings.source is None:
        raise UsageError("no clean images given; use --data or data.source in the recipe")
    source = open_source(settings.source, limits=limits_of(settings), report=report)
    if settings.clean_set is None:
        clean_set = draw_clean_set(source, settings, seed=seed, report=report)
    else:
        clean_set = _given(settings.clean_set, settings)
    if clean_set.quarantined:
        keys = ", ".join(key for key, _ in clean_set.quarantined[:3])
        warnings.warn(
            f"{len(clean_set.quarantined)} corrupt images left out ({keys}); see quarantine.json",
            stacklevel=3,
        )
    files = stored_files(source, clean_set.items)
    squares = load_squares(
        files,
        image_size=spec.image_size,
        channels=spec.in_channels,
        cache=settings.cache,
        cache_dir=settings.cache_dir,
        world=world,
        report=report,
    )
    # Whoever reads the files again checks them again.
    files = stored_files(source, clean_set.items)
    return CleanImages(clean_set=clean_set, squares=squares, files=files)


def _given(path: Path, settings: DataSettings) -> CleanSet:
    """The set of a manifest, held to today's budget and hold-out."""
    clean_set = read_clean_set(path)
    size = settings.pretraining_size
    if size is not None:
        check_budget(size, settings, len(clean_set), name=str(path))
        clean_set = replace(clean_set, fraction=len(clean_set) / size)
    return replace(clean_set, hold_out=round(settings.hold_out * len(clean_set)))


@dataclass(kw_only=True, slots=True)
class _Drawn:
    """What has been drawn so far."""

    source: Source
    total: int
    report: Reporter
    items: list[CleanItem] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)

    def take(self, order: Iterator[int], count: int) -> None:
        """Adds the first ``count`` good items of ``order``, or all it has."""
        wanted = len(self.items) + count
        while len(self.items) < wanted and (index := next(order, None)) is not None:
            key = self.source.keys[index]
            try:
                data = self.source.read(index)
                _, height, width = self.source.decode(data).shape
            except CorruptItemError as error:
                self.quarantined.append((key, str(error)))
                self.report(Event(phase="clean set", message=f"quarantined {key}: {error}"))
                continue
            label = None if self.source.labels is None else self.source.labels[index]
            digest = hashlib.sha256(data).hexdigest()
            self.items.append(
                CleanItem(
                    index=index, key=key, sha256=digest, label=label, height=height, width=width
                )
            )
            done = len(self.items)
            if done % _REPORT_EVERY == 0 or done == self.total:
                self.report(Event(phase="clean set", done=done, total=self.total, unit="images"))


def requested_count(source: Source, settings: DataSettings) -> int:
    """How many images the settings ask for.

    Raises:
        UsageError: If the source has fewer, or the fraction of it is less than two.
    """
    if settings.clean_count is not None:
        if settings.clean_count > len(source):
            raise UsageError(
                f"data.clean_count asks for {settings.clean_count} images; "
                f"{source.name} has {len(source)}"
            )
        return settings.clean_count
    # The small term keeps 0.29 of 100 at 29, although the product is 28.999999999999996.
    requested = int(settings.clean_fraction * len(source) + 1e-9)
    if requested < 2:
        raise UsageError(
            f"data.clean_fraction {settings.clean_fraction:g} of the {len(source)} images of "
            f"{source.name} draws {requested}, expected at least 2; set data.clean_count"
        )
    return requested


def check_budget(size: int, settings: DataSettings, requested: int, *, name: str) -> None:
    """Refuses more clean images than ``data.budget`` allows.

    Args:
        size: Images the teacher saw in pre-training.
        settings: The budget, and whether it may be passed.
        requested: Images drawn.
        name: Of their source, for the message.

    Raises:
        UsageError: If there are too many.
    """
    if settings.allow_budget or requested <= settings.budget * size + 1e-9:
        return
    raise UsageError(
        f"{name}: {requested} clean images are {requested / size:.3%} of {size} pre-training "
        f"images, over the budget of {settings.budget:.3%}; draw fewer, set "
        "data.pretraining_size if the teacher saw more images, or pass --allow-budget"
    )


def _strata(source: Source, order: list[int], requested: int) -> list[tuple[list[int], int]]:
    """Per label its members in draw order and how many to take of them."""
    if source.labels is None:
        raise UsageError(f"data.stratified needs labels, and {source.name} has none")
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(source.labels[index], []).append(index)
    labels = sorted(members)
    shares = [requested * len(members[label]) for label in labels]
    quotas = [share // len(source) for share in shares]
    by_remainder = sorted(range(len(labels)), key=lambda at: -(shares[at] % len(source)))
    for position in by_remainder[: requested - sum(quotas)]:
        quotas[position] += 1
    return [(members[label], quota) for label, quota in zip(labels, quotas, strict=True)]


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()
