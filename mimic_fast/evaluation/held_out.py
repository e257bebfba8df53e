"""The student on held-out clean images while it is trained, without labels: ``held_out.jsonl``.

``clone`` says how well it imitates images that it never saw. The other figures ask what foreign
patches do to it, as a trigger would be one: how far they move its features, how far the teacher's,
and whether in the same direction.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mimic_fast.config import HardenSettings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.harden import hardened
from mimic_fast.encoders.build import Encoder
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.rows import read_rows, write_rows

ENOUGH = 16  # images below which the figures are noise
_MOST = 512  # both copies of all are kept, as floats: 0.6 GB of 224 pixels
_PATCHES = HardenSettings(probability=1.0)


class HeldOut:
    """Measures the student after passes and writes a row for each.

    Args:
        path: ``held_out.jsonl``. Rows of a run that is resumed stay; a pass that comes again
            replaces its row and what came after it.
        squares: The held-out images, uint8; the first 512 are used.
        teacher: Run once over them, plain and patched.
        seed: Decides the patches, the same in every pass.
    """

    def __init__(
        self,
        path: Path,
        squares: UInt8[Tensor, "image channel side side"],
        *,
        teacher: Encoder,
        seed: int,
    ) -> None:
        self._path, squares = path, squares[:_MOST]
        self._views = plain_view(squares, image_size=teacher.spec.image_size)
        ids = torch.arange(len(squares))
        self._patched = hardened(self._views, ids, squares, settings=_PATCHES, seed=seed, epoch=0)
        self._expected = encode(teacher, self._views), encode(teacher, self._patched)

    def measure(self, epoch: int, student: Encoder) -> list[float]:
        """Adds the row of a pass (from 1) and returns ``clone`` of all passes up to it.

        Raises:
            MachineError: If the file cannot be written.
            UnsafeInputError: If a feature is not finite.
        """
        row = figures(encode(student, self._views), encode(student, self._patched), *self._expected)
        rows = [one for one in read_held_out(self._path) if one["epoch"] < epoch]
        rows.append({"epoch": epoch, **row})
        write_rows(self._path, rows)
        return [one["clone"] for one in rows]


def figures(
    student: Float[Tensor, "image feature"],
    student_patched: Float[Tensor, "image feature"],
    teacher: Float[Tensor, "image feature"],
    teacher_patched: Float[Tensor, "image feature"],
) -> dict[str, float]:
    """Means over images of what a row holds.

    ``clone`` is 1 - cos(student, teacher) of the whole images; ``shift`` and ``teacher_shift`` are
    1 - cos of an image and its patched copy; ``follow`` is the cosine between the two encoders'
    ways from one to the other, 0 for a student whose answer to patches is its own.
    """

    def distance(a: Tensor, b: Tensor) -> float:
        return float(1 - F.cosine_similarity(a, b).double().mean())

    return {
        "clone": distance(student, teacher),
        "shift": distance(student_patched, student),
        "teacher_shift": distance(teacher_patched, teacher),
        "follow": 1 - distance(student_patched - student, teacher_patched - teacher),
    }


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """Rows of ``held_out.jsonl``; none if there is no such file. A damaged line is left out."""
    return read_rows(path, ("epoch", "clone"))
