"""Weights, gradients and moments cut over the processes by FSDP2 (``fully_shard``), block by block.

Applied directly, on CPU and GPU alike: Accelerate's plugin for it never engages on a CPU, so that
nothing tested there would be what runs on a GPU. The optimizer works on this process's rows as
plain tensors, which keeps its fused kernels and their skipping of a step.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mimic_fast.config import OptimSettings
from mimic_fast.distributed import Processes, whole
from mimic_fast.engines.engine import Update
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.engines.sharded import Sharded
from mimic_fast.engines.update import spoiled, update_locally
from mimic_fast.optim import build_optimizer, set_learning_rate, start_momentum


def shard(module: nn.Module, blocks: Sequence[nn.Module], processes: Processes) -> FSDPModule:
    """Cuts ``module`` in place, each block for itself and the rest together."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


class Fsdp2Engine(Sharded):
    """See :class:`mimic_fast.engines.engine.Engine`."""

    name = "fsdp2"

    def __init__(
        self,
        student: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        optim: OptimSettings,
        processes: Processes,
    ) -> None:
        super().__init__(student, optim=optim, device=processes.device)
        self._processes = processes
        self._sharded = shard(student, blocks, processes)
        self.module: nn.Module = student
        self._cut = dict(student.named_parameters())
        rows = {name: nn.Parameter(_rows(p)) for name, p in self._cut.items()}
        # A process may hold no row of a short parameter.
        self._rows = {name: row for name, row in rows.items() if row.numel()}
        self._optimizer = build_optimizer(student, optim, held=self._rows)
        start_momentum(self._optimizer)
        self._start_average()

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        for parameter in self._cut.values():
            parameter.grad = None

    @contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Gradients stay whole until the last part, then they are added up and cut."""
        self._sharded.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Backward, with the loss scaled for float16."""
        loss = spoiled(loss)
        (loss if self._scale is None else loss * self._scale.scale).backward()

    def update(self, rate: float) -> Update:
        """One step on this process's rows; the norm is that of all."""
        set_learning_rate(self._optimizer, rate)
        for name, row in self._rows.items():
            gradient = self._cut[name].grad
            row.grad = None if gradient is None else _rows(gradient)
        gradients = [row.grad for row in self._rows.values() if row.grad is not None]
        if self._scale is not None:
            self._scale.unscale(gradients)
        squares = torch.nn.utils.get_total_norm(gradients).square().to(self._processes.device)
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if self._optim.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._rows.values(), self._optim.clip_norm, norm)
        update = update_locally(self._optimizer, norm, self._scale)
        for name, row in self._rows.items():
            row.grad = self._cut[name].grad = None
        self._update_average()
        return update

    def weights(self) -> dict[str, FlatPiece]:
        """Rows of every parameter."""
        return {name: self._piece(name, row.data) for name, row in self._rows.items()}

    def moments(self) -> dict[str, dict[str, FlatPiece]]:
        """Rows of every moment."""
        found: dict[str, dict[str, FlatPiece]] = {}
        for name, row in self._rows.items():
            for moment, value in self._optimizer.state[row].items():
                if value.shape == row.shape and moment != "step":
                    found.setdefault(moment, {})[name] = self._piece(name, value)
        return found

    def make_moments(self, names: Sequence[str], steps: float) -> None:
        """Zeros, and the count that fused optimizers keep as a tensor."""
        for row in self._rows.values():
            state = {moment: torch.zeros_like(row.data) for moment in names}
            if not isinstance(self._optimizer, torch.optim.SGD):
                state["step"] = torch.tensor(steps, device=row.device)
            self._optimizer.state[row] = state

    def steps_done(self) -> float:
        """As the first row's state counts them; 0 for an optimizer that does not."""
        for row in self._rows.values():
            return float(self._optimizer.state[row].get("step", 0.0))
        return 0.0

    def whole(self) -> dict[str, Tensor]:
        """Gathers one parameter after the other."""
        return {name: whole(value).cpu() for name, value in self._student.state_dict().items()}

    def _piece(self, name: str, rows: Tensor) -> FlatPiece:
        cut = self._cut[name]
        # As torch.chunk cuts: all processes but the last ones hold equally many rows.
        each = -(-cut.shape[0] // self._processes.world) * math.prod(cut.shape[1:])
        return FlatPiece(rows.view(-1), offset=self._processes.rank * each, total=cut.numel())


def _rows(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
