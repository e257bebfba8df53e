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
from mimic_fast.data.view_parameters import ViewParameters
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
            cuts = [part for drawn in step.views for part in self._cuts(step, drawn)]
            return (files, *cuts)

        pipeline = self._pipeline(feed, batch=len(first.ids), views=len(first.views))
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            step = fed.popleft()
            yield (
                step,
                [
                    ops_views.from_crops(_pixels(crops), drawn, channels_last=self._last)
                    for crops, drawn in zip(outputs, step.views, strict=True)
                ],
            )

    def _pipeline(self, feed: Any, *, batch: int, views: int) -> Any:
        from nvidia.dali import fn as dali_fn
        from nvidia.dali import types as dali_types
        from nvidia.dali.pipeline import Pipeline

        fn: Any = dali_fn  # generated: no checker knows what is in them
        types: Any = dali_types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch,
            num_threads=self._workers,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._ahead,
        )
        with pipeline:
            encoded, *given = fn.external_source(feed, num_outputs=1 + 4 * views, batch=True)
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if self._gray else types.RGB,
                adjust_orientation=False,  # as the other backend, and the usual training pipelines
            )
            crops: list[Any] = []
            for view in range(views):
                start, length, left, right = given[4 * view : 4 * view + 4]
                # Cut first: resizing a region looks beyond its edge, torchvision does not.
                cut = fn.slice(
                    images,
                    start,
                    length,
                    axes=(0, 1),
                    normalized_anchor=False,
                    normalized_shape=False,
                )
                crops.append(
                    fn.resize(
                        cut,
                        size=[self._size, self._size],
                        roi_start=left,
                        roi_end=right,
                        roi_relative=True,
                        interp_type=types.INTERP_LINEAR,
                        antialias=True,
                    )
                )
            pipeline.set_outputs(*crops)
        pipeline.build()
        return pipeline

    def _cuts(self, step: DrawnStep, drawn: ViewParameters) -> tuple[np.ndarray, ...]:
        """Start and size of crops (y, x), and from where to where each is read: mirrored or not."""
        box = file_boxes(drawn, self._sizes[step.ids], side=self._side)
        left = torch.stack([torch.zeros_like(drawn.flip), drawn.flip], dim=1).float()
        right = torch.stack([torch.ones_like(drawn.flip), ~drawn.flip], dim=1).float()
        parts = (box[:, :2], box[:, 2:], left, right)
        return tuple(part.contiguous().numpy() for part in parts)


def _pixels(crops: Any) -> Tensor:
    """DALI's uint8 ``[B, H, W, C]`` as ``[B, C, H, W]``: its memory, until the next run."""
    tensor = (crops.as_cpu() if hasattr(crops, "as_cpu") else crops).as_tensor()
    with warnings.catch_warnings(action="ignore"):  # it may not be written, and is not
        return torch.from_numpy(np.asarray(tensor)).permute(0, 3, 1, 2)
