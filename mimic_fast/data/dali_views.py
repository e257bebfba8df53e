"""Views by NVIDIA DALI: it decodes, crops and resizes; where there is a GPU, on that.

DALI's random operators cannot be seeded for one item, so nothing random is left to it: crops and
flips are drawn by us and fed beside the files, colors are changed afterwards by the code that the
other backend uses. The pipeline has no state, and resuming is a matter of feeding the next step.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimic_fast import ops_views
from mimic_fast.data.stored import StoredFiles, file_boxes
from mimic_fast.data.views import DrawnStep
from mimic_fast.errors import UsageError


def why_not_dali(files: StoredFiles | None) -> str:
    """Why DALI cannot make the views, or empty."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "DALI is not installed (pip install 'mimic_fast[dali]')"
    if files is None:
        return "the images were decoded from no files of a clean set"
    if not files.encoded:
        return f"the items of {files.name} are raw pixels, which DALI does not decode"
    return ""


class DaliViews:
    """A pipeline that decodes every file once a step and resizes each view out of it.

    Args:
        files: The clean set's files.
        side: Side of the stored squares, in whose pixels crops are drawn.
        image_size: Side of the views, pixels.
        channels: 1 or 3.
        channels_last: Memory layout of the views.
        workers: Threads of the pipeline.
        ahead: Steps that are begun before they are asked for.
        device: A CUDA device decodes and resizes there; else the CPU does.

    Raises:
        UsageError: If DALI is missing or cannot read these files.
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
        device: torch.device,
    ) -> None:
        if reason := why_not_dali(files):
            raise UsageError(f"data.backend 'dali' cannot run: {reason}; use 'torch'")
        self.name = f"dali on the {'GPU' if device.type == 'cuda' else 'CPU'}"
        self._files, self._side, self._size = files, side, image_size
        self._gray, self._last = channels == 1, channels_last
        self._workers, self._ahead = workers, max(1, ahead)
        self._device = device
        sizes = [[item.height, item.width] for item in files.items]
        self._sizes = torch.tensor(sizes, dtype=torch.float32)

    def views(self, steps: Iterable[DrawnStep]) -> Iterator[tuple[DrawnStep, list[Tensor]]]:
        """As :meth:`mimic_fast.data.views.Backend.views`."""
        steps = iter(steps)
        first = next(steps, None)
        if first is None:
            return
        fed: deque[DrawnStep] = deque()

        def feed() -> tuple[Any, ...]:
            nonlocal first
            step, first = (first, None) if first is not None else (next(steps), None)
            fed.append(step)
            files = [np.frombuffer(self._files.read(i), np.uint8) for i in step.ids.tolist()]
            edges = [edge for drawn in step.views for edge in self._edges(step, drawn)]
            return (files, *edges)

        pipeline = self._pipeline(feed, batch=len(first.ids), views=len(first.views))
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            step = fed.popleft()
            yield step, [
                ops_views.from_crops(_pixels(crops), drawn, channels_last=self._last)
                for crops, drawn in zip(outputs, step.views, strict=True)
            ]

    def _pipeline(self, feed: Any, *, batch: int, views: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch,
            num_threads=self._workers,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._ahead,
        )
        with pipeline:
            encoded, *edges = fn.external_source(feed, num_outputs=1 + 2 * views, batch=True)
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if self._gray else types.RGB,
                adjust_orientation=False,  # as the other backend, and the usual training pipelines
            )
            crops = [
                fn.resize(
                    images,
                    size=[self._size, self._size],
                    roi_start=edges[2 * view],
                    roi_end=edges[2 * view + 1],
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for view in range(views)
            ]
            pipeline.set_outputs(*crops)
        pipeline.build()
        return pipeline

    def _edges(self, step: DrawnStep, drawn: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where crops start and end, y and x; a crop that ends before it starts is mirrored."""
        box = file_boxes(drawn, self._sizes[step.ids], side=self._side)
        start, end = box[:, :2], box[:, :2] + box[:, 2:]
        end = torch.minimum(end, self._sizes[step.ids])
        flip = torch.stack([torch.zeros_like(drawn.flip), drawn.flip], dim=1)
        return torch.where(flip, end, start).numpy(), torch.where(flip, start, end).numpy()


def _pixels(crops: Any) -> Tensor:
    """DALI's uint8 ``[B, H, W, C]`` as ``[B, C, H, W]``: its memory, until the next run."""
    tensor = (crops.as_cpu() if hasattr(crops, "as_cpu") else crops).as_tensor()
    with warnings.catch_warnings(action="ignore"):  # it may not be written, and is not
        return torch.from_numpy(np.asarray(tensor)).permute(0, 3, 1, 2)
