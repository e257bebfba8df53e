"""The whole student in every process: DistributedDataParallel through Accelerate, or nothing."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimic_fast.config import OptimSettings
from mimic_fast.engines.engine import EngineState, Update
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.engines.update import spoiled, update_locally
from mimic_fast.optim import (
    averaged_state,
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    start_momentum,
    update_average,
)
from mimic_fast.precision import LossScale
from mimic_fast.training_state import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


class DdpEngine:
    """See :class:`mimic_fast.engines.engine.Engine`."""

    name = "ddp"

    def __init__(
        self, student: nn.Module, *, optim: OptimSettings, accelerator: "Accelerator"
    ) -> None:
        self._student, self._optim = student, optim
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(student, optim)
        start_momentum(self._optimizer)
        self._average = averaged_state(student) if optim.ema else None
        self._scale = LossScale(accelerator.device) if optim.precision == "fp16" else None
        self.module: nn.Module = accelerator.prepare_model(student)
        if isinstance(self.module, DistributedDataParallel):
            # Synchronized BatchNorm keeps them alike: sending them in every forward only waits.
            # An option from the start would also leave out the first time, which is needed.
            self.module.broadcast_buffers = False

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def part(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients of all processes are added in the last part only."""
        if not last and isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward, with the loss scaled for float16."""
        loss = spoiled(loss)
        (loss if self._scale is None else loss * self._scale.scale).backward()

    def update(self, rate: float) -> Update:
        """One step of the optimizer; a step that is not finite is skipped on the device."""
        set_learning_rate(self._optimizer, rate)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scale is not None:
            self._scale.unscale(gradients)
        norm = gradient_norm(self._parameters, clip=self._optim.clip_norm)
        update = update_locally(self._optimizer, norm, self._scale)
        if self._average is not None:
            update_average(self._average, self._student, decay=self._optim.ema)
        return update

    def state(self) -> EngineState:
        """All of it is process 0's to write."""
        moments, groups = optimizer_tensors(self._optimizer)
        tensors: dict[str, Mapping[str, Tensor]] = {
            "student": self._student.state_dict(),
            "optimizer": moments,
        }
        if self._average is not None:
            tensors["average"] = self._average
        if self._scale is not None:
            tensors["scale"] = self._scale.tensors()
        return EngineState(tensors=tensors, rest={"optimizer": groups})

    def pieces_to_fill(self, rest: Mapping[str, Any]) -> Mapping[str, FlatPiece]:
        """None: nothing is cut."""
        return {}

    def restore(self, state: EngineState) -> None:
        """Every process takes the same."""
        tensors = state.tensors
        self._student.load_state_dict(dict(tensors["student"]))
        restore_optimizer(self._optimizer, tensors["optimizer"], state.rest["optimizer"])
        if self._average is not None:
            for name, value in self._average.items():
                value.copy_(tensors["average"][name])
        if self._scale is not None:
            self._scale.restore(dict(tensors["scale"]))

    def finish(self) -> None:
        """Puts averaged weights in place."""
        if self._average is not None:
            self._student.load_state_dict(self._average)

    def whole(self) -> dict[str, Tensor]:
        """A copy of what every process has."""
        return {n: v.detach().to("cpu", copy=True) for n, v in self._student.state_dict().items()}

    def loss_scale(self) -> float:
        """Of float16; else 1."""
        return 1.0 if self._scale is None else float(self._scale.scale)
