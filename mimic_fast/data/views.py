"""What the backends of a loader have in common: items with drawn parameters in, views out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from mimic_fast.data.view_parameters import ViewParameters


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnStep:
    """What one process makes in one step.

    Args:
        ids: Item ids, ``[B]``.
        epochs: The pass that each item belongs to, ``[B]``.
        views: Parameters of the first view, and of the second where one is needed.
    """

    ids: Int[Tensor, " batch"]
    epochs: Int[Tensor, " batch"]
    views: tuple[ViewParameters, ...]


@runtime_checkable
class Backend(Protocol):
    """Makes the views of steps, in their order."""

    name: str

    def views(
        self, steps: Iterable[DrawnStep]
    ) -> Iterator[tuple[DrawnStep, list[Float[Tensor, "batch channel height width"]]]]:
        """Each step with its views in [0, 1], on the CPU; steps may be read ahead."""
        ...
