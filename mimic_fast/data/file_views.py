"""Views from the stored files, decoded in threads in every pass (backend torch, every_time).

Decoding and resizing do not hold Python's lock, so that threads do what processes would, without
copies of the data set or of the interpreter.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from mimic_fast import ops_views
from mimic_fast.data.images import with_channels
from mimic_fast.data.stored import StoredFiles, file_boxes
from mimic_fast.data.views import DrawnStep


class FileViews:
    """Decodes every file once a step and cuts each view out of it at full resolution.

    Args:
        files: The clean set's files.
        side: Side of the stored squares, in whose pixels crops are drawn.
        image_size: Side of the views, pixels.
        channels: 1 or 3.
        channels_last: Memory layout of the views.
        workers: Threads.
        ahead: Steps that are begun before they are asked for.
    """

    def __init__(
        self,
        files: StoredFiles,
        *,
        side: int,
        image_size: int,
        channels: int,
        channels_last: bool,
        workers: int,
        ahead: int,
    ) -> None:
        self.name = "torch, decoded every time"
        self._files, self._side, self._size = files, side, image_size
        self._channels, self._last = channels, channels_last
        self._workers, self._ahead = workers, max(1, ahead)

    def views(self, steps: Iterable[DrawnStep]) -> Iterator[tuple[DrawnStep, list[Tensor]]]:
        """As :meth:`mimic_fast.data.views.Backend.views`."""
        begun: deque[tuple[DrawnStep, list[Future[list[Tensor]]]]] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            try:
                for step in steps:
                    jobs = [pool.submit(self._crops, step, row) for row in range(len(step.ids))]
                    begun.append((step, jobs))
                    if len(begun) > self._ahead:
                        yield self._finished(*begun.popleft())
                while begun:
                    yield self._finished(*begun.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _finished(
        self, step: DrawnStep, jobs: list[Future[list[Tensor]]]
    ) -> tuple[DrawnStep, list[Tensor]]:
        rows = [job.result() for job in jobs]
        views: list[Tensor] = []
        for number, drawn in enumerate(step.views):
            crops = torch.stack([row[number] for row in rows])
            views.append(ops_views.from_crops(crops, drawn, channels_last=self._last))
        return step, views

    def _crops(self, step: DrawnStep, row: int) -> list[Tensor]:
        item = int(step.ids[row])
        pixels = with_channels(self._files.decode(self._files.read(item)), self._channels)
        sizes = torch.tensor([pixels.shape[1:]]).float()
        crops: list[Tensor] = []
        for drawn in step.views:
            (box,) = file_boxes(drawn.row(row), sizes, side=self._side).long().tolist()
            top, left, height, width = box
            cut = pixels[None, :, top : top + height, left : left + width]
            size = (self._size, self._size)
            (crop,) = F.interpolate(cut, size=size, mode="bilinear", antialias=True)
            crops.append(crop.flip(2) if drawn.flip[row] else crop)
        return crops
