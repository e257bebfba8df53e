"""What a data source holds, as a digest: the same wherever it lies, another for other images."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.data.sources import open_source
from mimic_fast.errors import UsageError
from mimic_fast.files import sha256_file
from mimic_fast.progress import Reporter, silent
from mimic_fast.watch import leave_if

Contents = Callable[[str], str]

# Items whose bytes are read: all of CIFAR's or GTSRB's in a second; of ImageNet's every twentieth.
_READ = 2**16
_UNREADABLE = bytes(hashlib.sha256().digest_size)


def contents(*, report: Reporter = silent, stop: Callable[[], bool] = lambda: False) -> Contents:
    """A function from a source's text to its digest that opens every source once.

    Args:
        report: Told about downloads and videos.
        stop: Polled between items; true leaves.
    """

    @cache
    def content(text: str) -> str:
        return source_digest(open_source(text, report=report), stop=stop)

    return content


def source_digest(source: Source, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Hex SHA-256 over keys, labels, classes and stored bytes; nothing is decoded.

    Of more than 65,536 items the bytes of that many at most are read, evenly spread; keys and
    labels of all count.

    Raises:
        StoppedError: If ``stop`` told so.
    """
    named = json.dumps([source.keys, source.labels, source.classes])
    digest = hashlib.sha256(named.encode())
    for index in range(0, len(source), -(-len(source) // _READ)):
        leave_if(stop)
        try:
            item = hashlib.sha256(source.read(index)).digest()
        except CorruptItemError:  # left out of every draw, wherever it lies
            item = _UNREADABLE
        digest.update(item)
    return digest.hexdigest()


def clean_set_digest(path: Path) -> str:
    """Hex SHA-256 of a manifest's bytes.

    Raises:
        UsageError: If it is not there or cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"data.clean_set {path} does not exist; give a clean_set.json")
    try:
        return sha256_file(path)
    except OSError as error:
        raise UsageError(f"data.clean_set {path} cannot be read: {error.strerror}") from None
