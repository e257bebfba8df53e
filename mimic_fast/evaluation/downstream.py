"""Labeled sets on which encoders are measured, and their features under several encoders at once.

Images are read in blocks and every block goes through all encoders before the next one is decoded:
memory does not grow with the set, and each image is decoded once.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.data.images import load_images
from mimic_fast.data.sources import Source, open_source
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.feature_cache import Measurable, cached_features
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.watch import leave_if

_BLOCK = 1024  # images decoded at a time: 154 MB at 224x224


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The part of a source that is used, with its labels."""

    source: Source
    indices: Int64[Tensor, "image"]
    labels: Int64[Tensor, "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DownstreamSet:
    """A downstream task: where probes are fitted and where they are measured."""

    name: str
    num_classes: int
    train: Split
    test: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSplit:
    """Features of one split under every encoder, unreadable images left out.

    Args:
        indices: Places of the images that could be read in their source.
        labels: Their classes.
        clean: Features by role.
        triggered: Features of the same images with each trigger in turn, by role; without a role
            that has none.
        unreadable: Keys of images that could not be decoded.
    """

    indices: Int64[Tensor, "image"]
    labels: Int64[Tensor, "image"]
    clean: Mapping[str, Tensor]
    triggered: Mapping[str, tuple[Tensor, ...]]
    unreadable: tuple[str, ...]


def open_downstream(
    downstream: DownstreamSettings, settings: EvaluationSettings, *, seed: int
) -> DownstreamSet:
    """Opens both splits and draws the labeled subset and the test images.

    The ``probe_labels`` images for fitting are drawn stratified, the ``test_images`` uniformly (as
    Wilson's interval assumes). Both depend on the seed and the set's name only: every encoder gets
    the same images.

    Raises:
        UsageError: If a split has no labels or a single class, the two disagree on the classes, or
            ``probe_labels`` is fewer than one for each class.
    """
    train, test = open_source(downstream.train), open_source(downstream.test)
    train_labels, test_labels = _labels(train), _labels(test)
    if train.classes and test.classes and train.classes != test.classes:
        raise UsageError(
            f"downstream '{downstream.name}': train has classes {_few(train.classes)}, test has "
            f"{_few(test.classes)}; give two splits of one task"
        )
    _check_classes(downstream.name, train_labels, test_labels, settings.probe_labels)
    names = train.classes or test.classes or ()
    num_classes = max(len(names), int(max(train_labels.max(), test_labels.max())) + 1)
    fitted = draw_stratified(
        train_labels, settings.probe_labels, generator=_generator(seed, downstream.name, "train")
    )
    measured = draw_uniform(
        len(test), settings.test_images, generator=_generator(seed, downstream.name, "test")
    )
    return DownstreamSet(
        name=downstream.name,
        num_classes=num_classes,
        train=Split(source=train, indices=fitted, labels=train_labels[fitted]),
        test=Split(source=test, indices=measured, labels=test_labels[measured]),
    )


def draw_stratified(
    labels: Int64[Tensor, "image"], count: int | None, *, generator: torch.Generator
) -> Int64[Tensor, "drawn"]:
    """Sorted indices of ``count`` images, every class in proportion (largest remainders).

    None, or a count not smaller than the set, gives all of it.
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    classes, sizes = labels.unique(return_counts=True)
    shares = sizes * count
    quotas = shares // len(labels)
    by_remainder = (shares % len(labels)).argsort(descending=True, stable=True)
    quotas[by_remainder[: count - int(quotas.sum())]] += 1
    drawn: list[Tensor] = []
    for label, quota in zip(classes.tolist(), quotas.tolist(), strict=True):
        members = (labels == label).nonzero()[:, 0]
        drawn.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(drawn).sort().values


def draw_uniform(
    size: int, count: int | None, *, generator: torch.Generator
) -> Int64[Tensor, "drawn"]:
    """Sorted indices of ``count`` of ``size`` images; all of them for None."""
    if count is None or count >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator)[:count].sort().values


def encode_split(
    split: Split,
    encoders: Mapping[str, Measurable],
    *,
    triggers: Mapping[str, Sequence[Trigger]],
    batch_size: int,
    cache: Path | None = None,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> EncodedSplit:
    """Features of a split under every encoder, clean and with triggers.

    Each image is decoded once, and is encoded once untouched, whatever the number of triggers.

    Args:
        split: Which images.
        encoders: By role.
        triggers: By role, each stamped on a further copy of every image; none for absent roles.
        batch_size: Images per forward.
        cache: Folder of features computed before; see ``feature_cache``.
        report: Told the number of images done and what was left out.
        stop: Polled at every image and batch.

    Raises:
        UnsafeInputError: If no image can be read or an encoder gives features that are not finite.
        MachineError: If the cache cannot be written.
        StoppedError: If ``stop`` told so.
    """
    clean: dict[str, list[Tensor]] = {role: [] for role in encoders}
    triggered: dict[str, list[list[Tensor]]] = {
        role: [[] for _ in stamps] for role, stamps in triggers.items() if stamps
    }
    kept: list[Tensor] = []
    done, total = 0, len(split.indices)
    for positions in torch.arange(total).tensor_split(math.ceil(total / _BLOCK)):
        blocks, readable = _load_each_size(split, positions, encoders, report, stop)
        kept.append(readable)
        for role, loaded in encoders.items():
            images = blocks[_input_size(loaded)]
            features_of = partial(
                cached_features, cache, loaded, images, batch_size=batch_size, stop=stop
            )
            clean[role].append(features_of(trigger=None))
            for parts, trigger in zip(triggered.get(role, ()), triggers.get(role, ()), strict=True):
                parts.append(features_of(trigger=trigger))
        done += len(positions)
        report(Event(phase="evaluate", done=done, total=total, unit="images"))
    positions = torch.cat(kept)
    lost = set(range(total)) - set(positions.tolist())
    return EncodedSplit(
        indices=split.indices[positions],
        labels=split.labels[positions],
        clean={role: torch.cat(parts) for role, parts in clean.items()},
        triggered={role: tuple(map(torch.cat, stamps)) for role, stamps in triggered.items()},
        unreadable=tuple(split.source.keys[int(split.indices[i])] for i in sorted(lost)),
    )


def _load_each_size(
    split: Split,
    positions: Tensor,
    encoders: Mapping[str, Measurable],
    report: Reporter,
    stop: Callable[[], bool],
) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """A block of images for every input size in use, and the positions that could be read."""
    indices = split.indices[positions].tolist()
    blocks: dict[tuple[int, int], Tensor] = {}
    kept: tuple[int, ...] = ()
    for size, channels in sorted({_input_size(loaded) for loaded in encoders.values()}):
        images, kept = load_images(
            _polling(split.source, stop),
            indices,
            image_size=size,
            channels=channels,
            evaluation=True,
            report=_messages_only(report) if not blocks else silent,
        )
        blocks[size, channels] = images
    readable = torch.isin(split.indices[positions], torch.tensor(kept))
    return blocks, positions[readable]


def _polling(source: Source, stop: Callable[[], bool]) -> Source:
    """The source, left where ``stop`` tells so: a thousand photographs take long to decode."""

    def read(index: int) -> bytes:
        leave_if(stop)
        return source.read(index)

    return replace(source, read=read)


def _messages_only(report: Reporter) -> Reporter:
    """Passes what was left out and drops the ticks, which count a block and not the split."""
    return lambda event: report(event) if event.message else None


def _input_size(loaded: Measurable) -> tuple[int, int]:
    return loaded.encoder.spec.image_size, loaded.encoder.spec.in_channels


def _labels(source: Source) -> Tensor:
    if source.labels is None:
        raise UsageError(
            f"{source.name} has no labels; give class subfolders, shards with .cls files, or leave "
            "the downstream set out"
        )
    return torch.tensor(source.labels, dtype=torch.int64)


def _check_classes(name: str, train: Tensor, test: Tensor, probe_labels: int | None) -> None:
    """Refuses sets on which every classifier would be right, or could not know a class."""
    for split, labels in (("train", train), ("test", test)):
        if len(labels.unique()) < 2:
            raise UsageError(
                f"downstream '{name}': all images of {split} are of one class, which tells no "
                "encoder from another; give at least two"
            )
    classes = len(train.unique())
    if probe_labels is not None and probe_labels < classes:
        raise UsageError(
            f"downstream '{name}': evaluation.probe_labels {probe_labels} is fewer than its "
            f"{classes} classes; raise it"
        )


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, ... ({len(names)})" if len(names) > 3 else shown


def _generator(seed: int, *purpose: str) -> torch.Generator:
    digest = hashlib.sha256("/".join((str(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
