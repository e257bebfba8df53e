"""Tar shards in WebDataset form: ``KEY.jpg`` beside ``KEY.cls`` (the label as text), read in place.

Headers are walked once, when a shard is opened; an item is then read by seeking to its offset.
Nothing is ever extracted: a member is only a range of bytes of the shard, so its path, links and
devices cannot reach the file system.
"""

from dataclasses import dataclass
from pathlib import Path

from mimic_fast.data.items import IMAGE_SUFFIXES, Source, decode_image, is_image_name, read_range
from mimic_fast.data.tar_index import DamagedTarError, walk_tar
from mimic_fast.errors import UnsafeInputError, UsageError

_MAX_LABEL_BYTES = 64
_MAX_LABEL_DIGITS = 9
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    key: str
    shard: Path
    offset: int
    size: int
    label: int | None


def open_tar_shards(shards: list[Path], *, name: str) -> Source:
    """Opens one or more uncompressed tar shards; keys are ``SHARD/KEY``, sorted.

    The key of a member is its path up to the first dot of the base name, the rest is its extension
    (WebDataset). Members that are no regular file, or neither image nor ``.cls``, are ignored. A
    ``classes.txt`` beside the first shard names the classes, one a line.

    Args:
        shards: Paths of the shards, in any order.
        name: Recorded as the source's name.

    Raises:
        UsageError: If a shard is missing or compressed, no image is found, or labels are not
            numbers or not given for every image.
        UnsafeInputError: If a shard is damaged.
    """
    items: list[_Item] = []
    prefixes = _prefixes(shards)
    for prefix in sorted(prefixes):
        items += _index_shard(prefixes[prefix], prefix)
    if not items:
        raise UsageError(
            f"data source {name!r}: no image in {len(shards)} tar shards; "
            f"expected members that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    labels = _labels(items)
    return Source(
        name=name,
        keys=tuple(item.key for item in items),
        labels=labels,
        classes=_class_names(prefixes[min(prefixes)].parent / "classes.txt", labels),
        read=lambda index: read_range(items[index].shard, items[index].offset, items[index].size),
        decode=decode_image,
    )


def _prefixes(shards: list[Path]) -> dict[str, Path]:
    """Shards by their names in keys: no ``.tar``, and as many folders as tell them apart."""
    for parts in range(1, max(len(shard.parts) for shard in shards) + 1):
        names = {"/".join(shard.parts[-parts:]).removesuffix(".tar"): shard for shard in shards}
        if len(names) == len(shards):
            return names
    raise UsageError(f"tar shard {shards[0]} is given twice; give every shard once")


def _index_shard(shard: Path, prefix: str) -> list[_Item]:
    """All images of a shard, sorted by key."""
    try:
        images, labels = _members(shard)
    except DamagedTarError as error:
        if _is_compressed(shard):
            raise UsageError(
                f"tar shard {shard} is compressed and cannot be read in place; decompress it"
            ) from None
        raise UnsafeInputError(f"tar shard {shard} {error}") from None
    except OSError as error:
        raise UsageError(f"tar shard {shard} cannot be read: {error.strerror}") from None
    items: list[_Item] = []
    for key in sorted(images):
        offset, size = images[key][min(images[key], key=IMAGE_SUFFIXES.index)]
        items.append(
            _Item(
                key=f"{prefix}/{key}",
                shard=shard,
                offset=offset,
                size=size,
                label=labels.get(key),
            )
        )
    return items


def _members(shard: Path) -> tuple[dict[str, dict[str, tuple[int, int]]], dict[str, int]]:
    """Offset and size of every image by key and extension, and the label of every key."""
    images: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    with shard.open("rb") as file:
        for name, offset, size in walk_tar(shard):
            key, extension = _split_name(name)
            if extension == ".cls":
                file.seek(offset)
                text = file.read(min(size, _MAX_LABEL_BYTES))
                labels[key] = _parse_label(text, shard, name)
            elif extension in IMAGE_SUFFIXES and is_image_name(name):
                images.setdefault(key, {})[extension] = (offset, size)
    return images, labels


def _split_name(name: str) -> tuple[str, str]:
    """A member's path as key and lower-case extension: ``a/7.JPG`` is ``a/7`` and ``.jpg``."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _parse_label(text: bytes, shard: Path, name: str) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > _MAX_LABEL_DIGITS:
        raise UsageError(
            f"{name} of {shard} must hold a class index (0, 1, ...), got {text[:20]!r}"
        )
    return int(digits)


def _labels(items: list[_Item]) -> tuple[int, ...] | None:
    labels = [item.label for item in items if item.label is not None]
    if labels and len(labels) < len(items):
        first = next(item.key for item in items if item.label is None)
        raise UsageError(
            f"{first} has no .cls label although {len(labels)} of {len(items)} images have one; "
            "label every image or none"
        )
    return tuple(labels) or None


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
