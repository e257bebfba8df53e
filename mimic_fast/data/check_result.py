"""What ``mimic-fast data check`` finds, and its JSON form."""

from dataclasses import asdict, dataclass
from typing import Any

from mimic_fast.data.suspicious import SuspiciousGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How many images have one size."""

    width: int
    height: int
    channels: int
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A suspicious image; the fields are those of ``SuspiciousImage``, by key."""

    key: str
    reason: str
    score: float
    group: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCheck:
    """What was found in a source.

    Args:
        source: Its name.
        items: How many it has.
        checked: How many were read, all unless a limit was given.
        good: How many of these are images.
        item_bytes: Stored bytes of the checked items.
        labels: Checked items per class, by name or number; None: the source has no labels.
        sizes: The image sizes, the most frequent first.
        side: Side of the squares that were searched, pixels.
        corrupt: Key and reason of each item that is no good image.
        same_bytes: Keys of items with the very same bytes, in groups.
        same_pixels: Of items with the very same pixels, where the bytes differ.
        near_duplicates: Of items that show nearly the same picture, where the pixels differ.
        groups: What many images share and should not.
        suspicious: Each suspicious image, once.
    """

    source: str
    items: int
    checked: int
    good: int
    item_bytes: int
    labels: dict[str, int] | None
    sizes: tuple[Size, ...]
    side: int
    corrupt: tuple[tuple[str, str], ...]
    same_bytes: tuple[tuple[str, ...], ...]
    same_pixels: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    groups: tuple[SuspiciousGroup, ...]
    suspicious: tuple[Suspect, ...]

    @property
    def suspicious_share(self) -> float:
        """Suspicious images as a share of the good ones."""
        return len(self.suspicious) / max(1, self.good)


def data_check_json(check: DataCheck) -> dict[str, Any]:
    """The result as plain values, corrupt items by name."""
    values = asdict(check)
    values["corrupt"] = [{"key": key, "reason": reason} for key, reason in check.corrupt]
    return {"schema": 1, **values, "suspicious_share": check.suspicious_share}
