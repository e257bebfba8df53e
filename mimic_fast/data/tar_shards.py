"""Tar shards in WebDataset form: ``KEY.jpg`` beside ``KEY.cls`` (the label as text), read in place.

Headers are walked once, when a shard is first opened, and the index is kept in the user's cache; an
item is then read by seeking to its offset. Nothing is ever extracted: a member is only a range of
bytes of the shard, so its path, links and devices cannot reach the file system.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from mimic_fast.data.items import (
    DEFAULT_LIMITS,
    IMAGE_SUFFIXES,
    Limits,
    Source,
    check_unique,
    decode_image,
    is_image_name,
    printable,
    read_range,
    shortened,
)
from mimic_fast.data.tar_cache import (
    NO_LABEL,
    ShardIndex,
    ShardStamp,
    load_index,
    shard_stamp,
    store_index,
)
from mimic_fast.data.tar_index import DamagedTarError, walk_tar
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError

_MAX_LABEL_BYTES = 64
_MAX_LABEL_DIGITS = 9
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def open_tar_shards(
    shards: list[Path], *, name: str, cache: Path | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """Opens one or more uncompressed tar shards; keys are ``SHARD/KEY``, sorted.

    The key of a member is its path up to the first dot of the base name, the rest is its extension
    (WebDataset). Members that are no regular file, or neither image nor ``.cls``, are ignored. An
    item may have images of several extensions; the first of IMAGE_SUFFIXES counts. A
    ``classes.txt`` beside the first shard names the classes, one a line.

    Args:
        shards: Paths of the shards, in any order.
        name: Recorded as the source's name.
        cache: Where the indexes are kept; None: the user's cache.
        limits: What one image may take.

    Raises:
        UsageError: If a shard is missing or compressed, no image is found, or labels are not
            numbers or not given for every image.
        UnsafeInputError: If a shard is damaged, or holds two members of one key and extension.
    """
    prefixes = _prefixes(shards)
    ordered = sorted(prefixes)
    paths = [prefixes[prefix] for prefix in ordered]
    indexes = _indexes(paths, cache)
    keys = tuple(
        f"{prefix}/{key}"
        for prefix, index in zip(ordered, indexes, strict=True)
        for key in index.keys
    )
    if not keys:
        raise UsageError(
            f"data source {name!r}: no image in {len(shards)} tar shards; "
            f"expected members that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    check_unique(keys, f"data source {name!r}")
    labels = _labels(keys, [label for index in indexes for label in index.labels])
    return Source(
        name=name,
        keys=keys,
        labels=labels,
        classes=_class_names(paths[0].parent / "classes.txt", labels),
        read=_reader(paths, indexes, limits),
        decode=partial(decode_image, limits=limits),
    )


def _prefixes(shards: list[Path]) -> dict[str, Path]:
    """Shards by their names in keys: no ``.tar``, and as many folders as tell them apart."""
    for parts in range(1, max(len(shard.parts) for shard in shards) + 1):
        names = {"/".join(shard.parts[-parts:]).removesuffix(".tar"): shard for shard in shards}
        if len(names) == len(shards):
            return names
    raise UsageError(f"tar shard {shards[0]} is given twice; give every shard once")


def _indexes(shards: Sequence[Path], cache: Path | None) -> list[ShardIndex]:
    """The index of every shard, from the cache where it has one."""
    indexes: list[ShardIndex] = []
    failure = ""
    for shard in shards:
        try:
            stamp = shard_stamp(shard)
            index = load_index(stamp, cache)
            if index is None:
                index = _index_shard(shard)
                if not failure and stamp == shard_stamp(shard):
                    failure = _stored(index, stamp, cache)
        except OSError as error:
            raise UsageError(f"tar shard {shard} cannot be read: {error.strerror}") from None
        indexes.append(index)
    if failure:
        warnings.warn(f"tar shards are indexed anew at every start: {failure}", stacklevel=4)
    return indexes


def _stored(index: ShardIndex, stamp: ShardStamp, cache: Path | None) -> str:
    """Stores an index; what kept it from being stored, or nothing."""
    try:
        store_index(index, stamp, cache)
    except MachineError as error:
        return str(error).partition(";")[0]
    except OSError as error:
        return f"cannot write {error.filename}: {error.strerror}"
    return ""


def _index_shard(shard: Path) -> ShardIndex:
    """The images of a shard, sorted by key."""
    try:
        images, labels = _members(shard)
    except DamagedTarError as error:
        if _is_compressed(shard):
            raise UsageError(
                f"tar shard {shard} is compressed and cannot be read in place; decompress it"
            ) from None
        raise UnsafeInputError(f"tar shard {shard} {error}") from None
    keys = tuple(sorted(images))
    ranges = [images[key][min(images[key], key=IMAGE_SUFFIXES.index)] for key in keys]
    return ShardIndex(
        keys=keys,
        offsets=tuple(offset for offset, _ in ranges),
        sizes=tuple(size for _, size in ranges),
        labels=tuple(labels.get(key, NO_LABEL) for key in keys),
    )


def _members(shard: Path) -> tuple[dict[str, dict[str, tuple[int, int]]], dict[str, int]]:
    """Offset and size of every image by key and extension, and the label of every key."""
    images: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    with shard.open("rb") as file:
        for name, offset, size in walk_tar(shard):
            key, extension = _split_name(name)
            if extension == ".cls":
                if key in labels:
                    raise _twice(shard, name)
                file.seek(offset)
                text = file.read(min(size, _MAX_LABEL_BYTES))
                labels[key] = _parse_label(text, shard, name)
            elif extension in IMAGE_SUFFIXES and is_image_name(name):
                forms = images.setdefault(key, {})
                if extension in forms:
                    raise _twice(shard, name)
                forms[extension] = (offset, size)
    return images, labels


def _twice(shard: Path, name: str) -> UnsafeInputError:
    return UnsafeInputError(
        f"tar shard {shard} holds {shortened(name)!r} twice, so its key does not name one item; "
        "pack it anew"
    )


def _split_name(name: str) -> tuple[str, str]:
    """A member's path as key and lower-case extension: ``a/7.JPG`` is ``a/7`` and ``.jpg``."""
    folder, slash, base = printable(name).removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _parse_label(text: bytes, shard: Path, name: str) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > _MAX_LABEL_DIGITS:
        raise UsageError(
            f"{shortened(name)} of {shard} must hold a class index (0, 1, ...), got {text[:20]!r}"
        )
    return int(digits)


def _reader(
    shards: Sequence[Path], indexes: Sequence[ShardIndex], limits: Limits
) -> Callable[[int], bytes]:
    """Reads an item by its place in the row of all shards' images."""
    starts = list(accumulate((len(index.keys) for index in indexes), initial=0))

    def read(item: int) -> bytes:
        at = range(starts[-1])[item]  # as a sequence does: negative from the end, or IndexError
        shard = bisect_right(starts, at) - 1
        index, at = indexes[shard], at - starts[shard]
        return read_range(shards[shard], index.offsets[at], index.sizes[at], limits)

    return read


def _labels(keys: tuple[str, ...], labels: Sequence[int]) -> tuple[int, ...] | None:
    missing = labels.count(NO_LABEL)
    if 0 < missing < len(keys):
        raise UsageError(
            f"{shortened(keys[labels.index(NO_LABEL)])} has no .cls label although "
            f"{len(keys) - missing} of {len(keys)} images have one; label every image or none"
        )
    return None if missing else tuple(labels)


def _class_names(path: Path, labels: tuple[int, ...] | None) -> tuple[str, ...] | None:
    """One name per line, if the file is there."""
    if labels is None or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"class names {path} cannot be read: {error}") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) <= max(labels):
        raise UsageError(
            f"class names {path} has {len(names)} lines but the labels go up to {max(labels)}; "
            "give one name per class or remove it"
        )
    return names


def _is_compressed(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(6).startswith(_COMPRESSED)
