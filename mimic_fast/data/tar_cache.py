"""The index of a tar shard, kept between runs: walking the headers of a large shard takes a while.

One file per shard in the user's cache, named by the shard's path. An entry is only believed if it
is whole (it holds its own digest), was made of a shard of the same path, size and time, and all its
ranges lie inside that shard; anything else is as good as no entry.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from mimic_fast.errors import MachineError
from mimic_fast.files import user_cache, write_atomic

NO_LABEL = -1
_SCHEMA = 1
# A file that is written twice within a tick of the clock has one time for two contents.
_SETTLED_NS = 2_000_000_000
_DIGEST = b'{"sha256": "%s", "index": '


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """The images of one tar shard, by key.

    Args:
        keys: Keys within the shard, ascending, each once.
        offsets: Where the bytes of each image begin.
        sizes: How many they are.
        labels: The class index of each image, NO_LABEL where the shard gives none.
    """

    keys: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    labels: tuple[int, ...]


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStamp:
    """What tells one state of a shard from another."""

    path: str
    size: int
    mtime_ns: int


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    schema: int
    shard: ShardStamp
    images: ShardIndex


_ENTRY = TypeAdapter(_Entry)


def shard_stamp(shard: Path) -> ShardStamp:
    """The present state of a shard.

    Raises:
        OSError: If there is none.
    """
    status = shard.stat()
    path = os.fsencode(shard.resolve()).decode(errors="backslashreplace")
    return ShardStamp(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


def load_index(stamp: ShardStamp, cache: Path | None) -> ShardIndex | None:
    """The stored index of a shard in this state, or None.

    Args:
        stamp: State of the shard.
        cache: The folder where it was stored; None: the user's cache.
    """
    try:
        content = _file(stamp, cache).read_bytes()
    except (OSError, MachineError):
        return None
    head = len(_DIGEST % bytes(64))
    body = content[head:-1]
    if content[:head] != _DIGEST % hashlib.sha256(body).hexdigest().encode():
        return None
    try:
        entry = _ENTRY.validate_json(body)
    except ValidationError:
        return None
    if entry.schema != _SCHEMA or entry.shard != stamp or not _is_sound(entry.images, stamp.size):
        return None
    return entry.images


def store_index(index: ShardIndex, stamp: ShardStamp, cache: Path | None) -> None:
    """Stores the index of a shard, unless the shard was written to just now.

    Args:
        index: What :func:`load_index` will give.
        stamp: State of the shard before it was indexed.
        cache: As in :func:`load_index`.

    Raises:
        MachineError: If the cache cannot be written.
    """
    if time.time_ns() - stamp.mtime_ns < _SETTLED_NS:
        return
    body = json.dumps(asdict(_Entry(schema=_SCHEMA, shard=stamp, images=index))).encode()
    head = _DIGEST % hashlib.sha256(body).hexdigest().encode()
    write_atomic(_file(stamp, cache), head + body + b"}")


def _is_sound(index: ShardIndex, size: int) -> bool:
    """Whether the columns are of one length, the keys ascend and the ranges lie in the shard."""
    columns = (index.offsets, index.sizes, index.labels)
    return (
        all(len(column) == len(index.keys) for column in columns)
        and all(first < second for first, second in pairwise(index.keys))
        and all(label >= NO_LABEL for label in index.labels)
        and all(
            offset > 0 and 0 <= length <= size - offset
            for offset, length in zip(index.offsets, index.sizes, strict=True)
        )
    )


def _file(stamp: ShardStamp, cache: Path | None) -> Path:
    """By path alone: the entry of a shard that changed is replaced, not left behind."""
    try:
        folder = user_cache() if cache is None else cache
    except RuntimeError:  # a user without a home folder
        raise MachineError("there is no home folder to keep a cache in") from None
    return folder / "tar_index" / f"{hashlib.sha256(stamp.path.encode()).hexdigest()}.json"
