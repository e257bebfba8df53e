"""Views from squares decoded once (backend torch, once)."""

from collections.abc import Iterable, Iterator

from jaxtyping import UInt8
from torch import Tensor

from mimic_fast import ops_views
from mimic_fast.data.views import DrawnStep


class SquareViews:
    """Crops from decoded squares, in memory or mapped from a file."""

    def __init__(
        self,
        squares: UInt8[Tensor, "image channel side side"],
        *,
        image_size: int,
        channels_last: bool,
    ) -> None:
        self.name = "torch, decoded once"
        self._squares, self._size, self._last = squares, image_size, channels_last

    def views(self, steps: Iterable[DrawnStep]) -> Iterator[tuple[DrawnStep, list[Tensor]]]:
        """As :meth:`mimic_fast.data.views.Backend.views`."""
        layout = {"image_size": self._size, "channels_last": self._last}
        for step in steps:
            yield (
                step,
                [ops_views.views(self._squares, step.ids, drawn, **layout) for drawn in step.views],
            )
