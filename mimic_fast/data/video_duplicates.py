"""Near-duplicate frames: a difference hash, which small changes of light and noise leave alone."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

_SIDE = 16
_MARGIN = 2  # gray levels; less is noise of a flat area
HASH_BITS = 2 * _SIDE * _SIDE


def difference_hash(image: Image.Image) -> int:
    """HASH_BITS bits: where the image, coarse and gray, gets lighter to the right or down."""
    side = _SIDE + 1
    coarse = image.convert("L").resize((side, side), Image.Resampling.BOX)
    values = np.asarray(coarse, dtype=np.int16)
    right = values[:_SIDE, 1:] - values[:_SIDE, :-1] > _MARGIN
    down = values[1:, :_SIDE] - values[:-1, :_SIDE] > _MARGIN
    return int.from_bytes(np.packbits(np.stack([right, down])).tobytes())


def is_near_duplicate(hashed: int, earlier: Iterable[int], *, share: float) -> bool:
    """Whether a hash differs from an earlier one in at most this share of its bits."""
    return any((hashed ^ other).bit_count() <= share * HASH_BITS for other in earlier)
