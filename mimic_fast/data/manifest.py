"""The manifest of a clean set: which images, by key and SHA-256, written to the run and read back.

The set itself is drawn in ``clean_set.py``.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mimic_fast.data.items import check_unique
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import write_atomic

CLEAN_SET_FILE = "clean_set.json"
QUARANTINE_FILE = "quarantine.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanItem:
    """One image of the clean set.

    Args:
        index: Its place in the source when it was drawn.
        key: Its name in the source.
        sha256: Hex digest of its stored bytes.
        label: Its class, where the source has labels; never used for training.
        height: Of the decoded image, pixels.
        width: Of the decoded image, pixels.
    """

    index: int
    key: str
    sha256: str
    label: int | None
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanSet:
    """The images a purification may use.

    Args:
        source: Name of the source.
        seed: Seed of the draw.
        requested: Images asked for.
        fraction: Images drawn as a share of the teacher's pre-training images.
        items: The images, in random order.
        quarantined: Key and reason of each corrupt item met while drawing.
        sha256: :func:`items_digest` of the items.
        hold_out: How many of the last items are kept for agreement and never trained on.
    """

    source: str
    seed: int
    requested: int
    fraction: float
    items: tuple[CleanItem, ...]
    quarantined: tuple[tuple[str, str], ...]
    sha256: str
    hold_out: int

    def __len__(self) -> int:
        return len(self.items)


def items_digest(items: tuple[CleanItem, ...]) -> str:
    """Hex SHA-256 over the keys and digests of items, in order."""
    rows = [[item.key, item.sha256] for item in items]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def write_clean_set(clean_set: CleanSet, out: Path) -> Path:
    """Writes ``clean_set.json``, and ``quarantine.json`` if anything was quarantined.

    Returns:
        Path of ``clean_set.json``.

    Raises:
        MachineError: If ``out`` cannot be written.
    """
    if clean_set.quarantined:
        rows = [{"key": key, "reason": reason} for key, reason in clean_set.quarantined]
        content = {"schema": 1, "source": clean_set.source, "items": rows}
        write_atomic(out / QUARANTINE_FILE, _json(content))
    path = out / CLEAN_SET_FILE
    write_atomic(path, _json({"schema": 2, **asdict(clean_set)}))
    return path


def read_clean_set(path: Path) -> CleanSet:
    """Reads what :func:`write_clean_set` wrote.

    Raises:
        UsageError: If the file cannot be read.
        UnsafeInputError: If it is no clean set, or its digest does not fit its items.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"clean set {path} cannot be read: {error.strerror}") from None
    try:
        clean_set = TypeAdapter(CleanSet).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = " ".join([*(str(part) for part in first["loc"]), first["msg"]])
        raise UnsafeInputError(f"clean set {path} is damaged: {where}") from None
    if clean_set.sha256 != items_digest(clean_set.items):
        raise UnsafeInputError(f"clean set {path} is damaged: its items do not fit its sha256")
    check_unique([item.key for item in clean_set.items], f"clean set {path}")
    return clean_set


def _json(content: dict[str, object]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
