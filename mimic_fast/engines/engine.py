"""What a training loop needs of an engine."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mimic_fast.engines.flat_piece import FlatPiece


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """What an engine keeps of a run.

    Args:
        tensors: Groups of named tensors that process 0 writes.
        pieces: This process's ranges of what is cut.
        cut: Whether anything is, in whatever process.
        rest: Plain values.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    pieces: Mapping[str, FlatPiece] = field(default_factory=dict)
    cut: bool = False
    rest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What came of an optimizer step; both scalars stay on the device.

    Args:
        norm: L2 norm of the whole gradient before clipping.
        bad: 1 if it was not finite, on all processes alike, and nothing was updated; else 0.
    """

    norm: Tensor
    bad: Tensor


@runtime_checkable
class Engine(Protocol):
    """Wraps a student, computes its gradients over all processes and updates it."""

    name: str
    module: nn.Module

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        ...

    def part(self, *, last: bool) -> AbstractContextManager[object]:
        """Surrounds forward and backward of one part of a batch; gradients add up to the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``; a loss that is not finite spoils all of them."""
        ...

    def update(self, rate: float) -> Update:
        """Clips, updates all weights with this learning rate unless something is not finite."""
        ...

    def state(self) -> EngineState:
        """Weights, buffers, moments: live tensors, collective."""
        ...

    def restore(self, state: EngineState) -> None:
        """Goes on from saved values: ``pieces`` are those of :meth:`state`, filled; collective."""
        ...

    def pieces_to_fill(self, rest: Mapping[str, Any]) -> Mapping[str, FlatPiece]:
        """Where the ranges of a saved state go, its moments made if need be."""
        ...

    def loss_scale(self) -> float:
        """What float16's losses are multiplied by before backward; else 1."""
        ...

    def finish(self) -> None:
        """Puts averaged weights in place, where an average was kept; collective."""
        ...

    def whole(self) -> dict[str, Tensor]:
        """The student's whole state on the CPU of every process; collective."""
        ...
