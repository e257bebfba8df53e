"""From a clean set to batches: one contract, whatever decodes and crops.

Which items a step takes (``order.py``) and how each is seen (``view_parameters.py``) are functions
of (seed, step) and (seed, epoch, item, view). So there is no state to save, any number of processes
sees the same global batch, and a resumed run gets the identical next one. Backends differ in who
decodes and resizes only. Batches are made ahead in a thread, student-only perturbation included.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mimic_fast import ops_views
from mimic_fast.config import Settings
from mimic_fast.data.dali_views import DaliViews, why_not_dali
from mimic_fast.data.file_views import FileViews
from mimic_fast.data.harden import hardened
from mimic_fast.data.order import step_items
from mimic_fast.data.prefetch import Prefetched
from mimic_fast.data.square_views import SquareViews
from mimic_fast.data.stored import StoredFiles
from mimic_fast.data.view_parameters import draw_view
from mimic_fast.data.views import Backend, DrawnStep
from mimic_fast.distributed import Processes
from mimic_fast.errors import UsageError

_BIG = 2**33  # bytes of squares: beyond, they would rather be read by DALI than through the CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This process's share of one global batch; images in [0, 1], ``[B, C, H, W]``.

    Args:
        v1: First augmented view.
        v2: Second, or None where no loss needs it.
        ids: Item ids, ``[B]``.
        plain: The whole images, or None where nobody looks at them.
        student: What the student sees of the first view, or None: the view itself.
        sights: What the teacher sees, ``[B]``, as :meth:`Loader.sights` counts; None: another view
            in every pass.
    """

    v1: Tensor
    v2: Tensor | None
    ids: Tensor
    plain: Tensor | None = None
    student: Tensor | None = None
    sights: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingImages:
    """What a loader serves.

    Args:
        squares: Decoded images, uint8; item id = row.
        files: The same images as they are stored, for backends that decode; None: there are none.
    """

    squares: UInt8[Tensor, "image channel side side"]
    files: StoredFiles | None = None

    def __len__(self) -> int:
        return len(self.squares)


def sights_per_image(settings: Settings) -> int:
    """Different views of an image that the teacher gets in all passes; 0: another in every one."""
    return 1 if settings.loss.teacher_view == "plain" else settings.data.view_pool


class Loader:
    """Batches of a run, from any step on.

    Args:
        images: What to serve.
        settings: Seed, augmentation, backend, batch size, which views the losses need.
        image_size: Height and width of the views, pixels.
        processes: Where this process stands.

    Attributes:
        plain: Whether batches hold the whole images, for a teacher that looks at them.

    Raises:
        UsageError: If the backend asked for cannot run.
    """

    def __init__(
        self,
        images: TrainingImages,
        *,
        settings: Settings,
        image_size: int,
        processes: Processes,
    ) -> None:
        self._images, self._settings, self._size = images, settings, image_size
        self._processes = processes
        self.plain = settings.loss.teacher_view == "plain"
        self._backend, _ = choose_backend(
            images, settings=settings, image_size=image_size, device=processes.device
        )

    @property
    def name(self) -> str:
        """What makes the views."""
        return self._backend.name

    @property
    def images(self) -> int:
        """How many it serves."""
        return len(self._images)

    def sights(self, chunks: Iterable[Int64[Tensor, " view"]]) -> Generator[Tensor]:
        """Views that the teacher sees over all passes, in [0, 1], on the CPU.

        Args:
            chunks: Their numbers: item id + ``images`` times the place in ``data.view_pool``, which
                is 0 for a teacher that looks at the whole images.
        """
        if self._settings.loss.teacher_view == "plain":
            for ids in chunks:
                yield ops_views.plain(self._images.squares, ids, image_size=self._size)
            return
        steps = (self._seen(rows % self.images, rows // self.images, (1,)) for rows in chunks)
        for _, views in self._backend.views(steps):
            yield views[0]

    def batches(self, first: int, last: int) -> Prefetched[Batch]:
        """The batches of steps ``first`` to ``last - 1``; close it when done."""
        steps = (self._drawn(step) for step in range(first, last))
        batches = map(self._finished, self._backend.views(steps))
        return Prefetched(_without_gradient(batches), depth=self._settings.data.prefetch)

    def _drawn(self, step: int) -> DrawnStep:
        settings = self._settings
        ids, epochs = step_items(
            step,
            images=len(self._images),
            batch_size=settings.optim.batch_size,
            seed=settings.seed,
            processes=self._processes,
        )
        both = settings.loss.contrastive > 0
        return self._seen(ids, epochs, (1, 2) if both else (1,))

    def _seen(
        self, ids: Int64[Tensor, " batch"], epochs: Int64[Tensor, " batch"], views: tuple[int, ...]
    ) -> DrawnStep:
        settings, pool = self._settings, self._settings.data.view_pool
        drawn = (
            draw_view(
                ids,
                side=self._images.squares.shape[-1],
                settings=settings.data,
                seed=settings.seed,
                epoch=epochs % pool if pool else epochs,
                view=view,
            )
            for view in views
        )
        return DrawnStep(ids=ids, epochs=epochs, views=tuple(drawn))

    def _finished(self, made: tuple[DrawnStep, list[Tensor]]) -> Batch:
        step, views = made
        loss, squares = self._settings.loss, self._images.squares
        student = plain = None
        if loss.harden.probability > 0:
            student = hardened(
                views[0],
                step.ids,
                squares,
                settings=loss.harden,
                seed=self._settings.seed,
                epoch=step.epochs,
            )
        if self.plain:
            plain = ops_views.plain(squares, step.ids, image_size=self._size)
        per_image, sights = sights_per_image(self._settings), None
        if per_image:
            sights = step.ids + step.epochs % per_image * self.images
        return Batch(
            v1=views[0],
            v2=views[1] if len(views) > 1 else None,
            ids=step.ids,
            plain=plain,
            student=student,
            sights=sights,
        )


def choose_backend(
    images: TrainingImages, *, settings: Settings, image_size: int, device: torch.device
) -> tuple[Backend, str]:
    """What makes the views, and why it was chosen.

    Raises:
        UsageError: If the backend asked for cannot run.
    """
    data, squares, files = settings.data, images.squares, images.files
    name, reason = data.backend, "as data.backend says"
    if name == "auto":
        name, reason = _automatic(images, decode=data.decode, device=device)
    last = settings.optim.channels_last and squares.shape[1] > 1
    if name == "torch" and data.decode != "every_time":
        return SquareViews(squares, image_size=image_size, channels_last=last), reason
    if files is None:
        raise UsageError(
            "these images are decoded once; leave data.backend and data.decode at 'auto'"
        )
    shape = {"side": squares.shape[-1], "image_size": image_size, "channels": squares.shape[1]}
    work = {"workers": data.workers, "ahead": data.prefetch, "channels_last": last}
    if name == "torch":
        return FileViews(files, **shape, **work), reason
    return DaliViews(files, **shape, **work, device=device), reason


def _automatic(images: TrainingImages, *, decode: str, device: torch.device) -> tuple[str, str]:
    """Squares decoded once are fastest while they fit in memory; beyond that a GPU decodes."""
    if decode == "once":
        return "torch", "data.decode is 'once'"
    if images.squares.nbytes <= _BIG and decode == "auto":
        return "torch", "the decoded images are small enough to be kept"
    if why_not := why_not_dali(images.files):
        return "torch", why_not
    if device.type != "cuda":
        return "torch", "there is no GPU that could decode"
    return "dali", "the decoded images are many and a GPU can decode"


def _without_gradient(batches: Iterator[Batch]) -> Iterator[Batch]:
    # Not around a yield: without prefetching, the step between two batches would run inside.
    while True:
        with torch.no_grad():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
