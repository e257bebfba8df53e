"""What engines that cut the student have in common: states as ranges, averaged weights.

An engine gives its live ranges of weights and moments; saved as ranges of whole tensors, they come
back in any number of processes and under any engine that cuts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimic_fast.config import OptimSettings
from mimic_fast.engines.engine import EngineState
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.precision import LossScale


class Sharded:
    """Base of the engines that cut; they give the four methods that raise here."""

    def __init__(self, student: nn.Module, *, optim: OptimSettings, device: torch.device) -> None:
        self._student, self._optim = student, optim
        self._scale = LossScale(device) if optim.precision == "fp16" else None
        self._average: dict[str, Tensor] | None = None

    def weights(self) -> dict[str, FlatPiece]:
        """Live ranges of what the optimizer updates, by parameter."""
        raise NotImplementedError

    def moments(self) -> dict[str, dict[str, FlatPiece]]:
        """Live ranges of the optimizer's moments, by name of the moment and parameter."""
        raise NotImplementedError

    def make_moments(self, names: Sequence[str], steps: float) -> None:
        """Gives the optimizer these moments, to be filled, and the number of steps behind them."""
        raise NotImplementedError

    def steps_done(self) -> float:
        """Steps that the optimizer counts."""
        raise NotImplementedError

    def weights_changed(self) -> None:
        """Makes the student compute with what the weights hold now."""

    def state(self) -> EngineState:
        """Ranges of this process; buffers and averages of buffers from process 0."""
        tensors: dict[str, Mapping[str, Tensor]] = {"buffers": self._buffers()}
        pieces = {f"weights/{name}": piece for name, piece in self.weights().items()}
        moments = self.moments()
        for moment, held in moments.items():
            pieces |= {f"{moment}/{name}": piece for name, piece in held.items()}
        if self._average is not None:
            weights = self.weights()
            pieces |= {f"average/{n}": p.like(self._average[n]) for n, p in weights.items()}
            tensors["average"] = {n: self._average[n] for n in self._float_buffers()}
        if self._scale is not None:
            tensors["scale"] = self._scale.tensors()
        rest = {"moments": sorted(moments), "steps": self.steps_done()}
        return EngineState(tensors=tensors, pieces=pieces, cut=True, rest=rest)

    def pieces_to_fill(self, rest: Mapping[str, Any]) -> Mapping[str, FlatPiece]:
        """The live ranges themselves: what is loaded is there without a copy."""
        self.make_moments(rest["moments"], rest["steps"])
        return self.state().pieces

    def restore(self, state: EngineState) -> None:
        """The ranges are filled already."""
        buffers = self._buffers()
        for name, value in state.tensors["buffers"].items():
            buffers[name].copy_(value)
        if self._average is not None:
            for name, value in state.tensors["average"].items():
                self._average[name].copy_(value)
        if self._scale is not None:
            self._scale.restore(dict(state.tensors["scale"]))
        self.weights_changed()

    def loss_scale(self) -> float:
        """Of float16; else 1."""
        return 1.0 if self._scale is None else float(self._scale.scale)

    @torch.no_grad()
    def finish(self) -> None:
        """Puts averaged weights in place."""
        if self._average is not None:
            for name, value in self._averaged().items():
                value.copy_(self._average[name])
            self.weights_changed()

    def _start_average(self) -> None:
        if self._optim.ema:
            self._average = {name: value.clone() for name, value in self._averaged().items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is not None:
            now = self._averaged()
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(self._average.values()), list(now.values()), 1 - self._optim.ema
            )

    def _averaged(self) -> dict[str, Tensor]:
        weights = {name: piece.values for name, piece in self.weights().items()}
        return weights | self._float_buffers()

    def _buffers(self) -> dict[str, Tensor]:
        kept = self._student.state_dict().keys()
        return {name: b for name, b in self._student.named_buffers() if name in kept}

    def _float_buffers(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._buffers().items() if b.is_floating_point()}
