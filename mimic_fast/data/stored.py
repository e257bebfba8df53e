"""The stored files of a clean set, for loaders that decode them again in every pass."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast.data.items import Source
from mimic_fast.data.manifest import CleanItem
from mimic_fast.data.view_parameters import ViewParameters
from mimic_fast.errors import UnsafeInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFiles:
    """The files of a clean set by item id; the bytes are those that were drawn, or it says so.

    Args:
        name: Name of the source.
        items: The items; item id = place.
        read_item: Bytes of an item of the source, by its index there.
        places: Index in the source of each item.
        decode: Bytes to uint8 pixels ``[C, H, W]``.
        encoded: Whether the bytes are an image file that any decoder knows.
    """

    name: str
    items: Sequence[CleanItem]
    read_item: Callable[[int], bytes]
    places: Sequence[int]
    decode: Callable[[bytes], Tensor]
    encoded: bool
    _checked: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, item: int) -> bytes:
        """Bytes of an item, checked against the manifest when they are first read.

        Raises:
            UnsafeInputError: If they are not the bytes that were drawn.
            CorruptItemError: If they cannot be read.
        """
        data = self.read_item(self.places[item])
        if item not in self._checked:
            drawn = self.items[item]
            if hashlib.sha256(data).hexdigest() != drawn.sha256:
                raise UnsafeInputError(f"{drawn.key} of {self.name} has changed since it was drawn")
            self._checked.add(item)
        return data


def stored_files(source: Source, items: Sequence[CleanItem]) -> StoredFiles:
    """The files of ``items``, found by key.

    Raises:
        UnsafeInputError: If the source no longer has one of them.
    """
    index = {key: place for place, key in enumerate(source.keys)}
    missing = next((item.key for item in items if item.key not in index), None)
    if missing is not None:
        raise UnsafeInputError(f"{missing} of the clean set is no longer in {source.name}")
    return StoredFiles(
        name=source.name,
        items=items,
        read_item=source.read,
        places=[index[item.key] for item in items],
        decode=source.decode,
        encoded=source.encoded,
    )


def file_boxes(
    drawn: ViewParameters, sizes: Float[Tensor, "batch 2"], *, side: int
) -> Float[Tensor, "batch 4"]:
    """Crops in whole pixels of the stored files: top, left, height and width.

    Crops are drawn in pixels of the stored square of ``side`` pixels, which is the largest one at
    the center of the file's image, resized. Edges go to the nearest pixel.

    Args:
        drawn: The view's parameters.
        sizes: Height and width of every file's image, pixels.
        side: Height and width of the stored square, pixels.
    """
    height, width = sizes.double().unbind(1)
    square = torch.minimum(height, width)
    scale = (square / side)[:, None]
    margin = ((torch.stack([height, width], dim=1) - square[:, None]) / 2).floor()
    box = drawn.box.double()
    start = (box[:, :2] * scale).round()
    end = ((box[:, :2] + box[:, 2:]) * scale).round()
    length = (end - start).clamp(min=1)  # of a file much smaller than the stored squares
    start = torch.minimum(start, square[:, None] - length)
    return torch.cat([margin + start, length], dim=1).float()
