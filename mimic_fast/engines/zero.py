"""Optimizer (ZeRO 1), gradients (2) and weights (3) cut over the processes by DeepSpeed.

Accelerate prepares it; forward, backward and step are DeepSpeed's own. It looks at the gradient's
norm on the host anyway, so its decision to skip a step is taken as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mimic_fast.config import OptimSettings
from mimic_fast.distributed import Processes
from mimic_fast.engines.engine import Update
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.engines.sharded import Sharded
from mimic_fast.engines.update import spoiled
from mimic_fast.optim import build_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Range(NamedTuple):
    """Where a parameter's values lie in this process's flat group of float32 weights."""

    group: int
    start: int
    length: int
    offset: int  # of its first value in the parameter
    total: int


class ZeroEngine(Sharded):
    """See :class:`mimic_fast.engines.engine.Engine`."""

    def __init__(
        self,
        student: nn.Module,
        *,
        stage: int,
        optim: OptimSettings,
        accelerator: "Accelerator",
        processes: Processes,
    ) -> None:
        super().__init__(student, optim=optim, device=processes.device)
        self.name, self._stage, self._processes = f"zero{stage}", stage, processes
        optimizer = build_optimizer(student, optim)
        self._engine: Any
        self._engine, _ = accelerator.prepare(student, optimizer)
        self.module: nn.Module = self._engine
        self._zero = self._engine.optimizer
        self._ranges = self._third() if stage == 3 else self._first_or_second()
        self._start_average()

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        # DeepSpeed clears them with its step, be it skipped or not.

    @contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """DeepSpeed counts the parts itself: a step before the last one only counts."""
        yield
        if not last:
            self._engine.step()

    def backward(self, loss: Tensor) -> None:
        """Backward; float16's factor is handed to DeepSpeed, which divides by it."""
        if self._scale is not None:
            self._zero.custom_loss_scaler = True
            self._zero.external_loss_scale = float(self._scale.scale)
        self._engine.backward(spoiled(loss), scale_wrt_gas=False)

    def update(self, rate: float) -> Update:
        """Clipping, skipping and the step are DeepSpeed's."""
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        bad = torch.tensor(float(self._zero.overflow), device=self._processes.device)
        norm = torch.as_tensor(self._zero._global_grad_norm, device=self._processes.device)
        if self._scale is not None:
            self._scale.update(bad)
        self._update_average()
        return Update(norm=norm.detach().float(), bad=bad)

    def weights(self) -> dict[str, FlatPiece]:
        """Ranges of the float32 weights that the optimizer updates."""
        return {name: self._piece(r, self._flat[r.group].data) for name, r in self._ranges.items()}

    def moments(self) -> dict[str, dict[str, FlatPiece]]:
        """Ranges of every moment."""
        found: dict[str, dict[str, FlatPiece]] = {}
        for name, place in self._ranges.items():
            flat = self._flat[place.group]
            for moment, value in self._zero.optimizer.state.get(flat, {}).items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    found.setdefault(moment, {})[name] = self._piece(place, value)
        return found

    def make_moments(self, names: Sequence[str], steps: float) -> None:
        """Zeros, and the count that fused optimizers keep as a tensor."""
        for flat in self._flat:
            state = {moment: torch.zeros_like(flat.data) for moment in names}
            if not isinstance(self._zero.optimizer, torch.optim.SGD):
                state["step"] = torch.tensor(steps, device=flat.device)
            self._zero.optimizer.state[flat] = state

    def steps_done(self) -> float:
        """As the first group's state counts them; 0 for an optimizer that does not."""
        states = (self._zero.optimizer.state.get(flat, {}) for flat in self._flat)
        return next((float(state["step"]) for state in states if "step" in state), 0.0)

    def weights_changed(self) -> None:
        """Spreads the float32 weights to what the student computes with."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for index in range(len(self._flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        kept = self._zero.persistent_parameters
        if kept:
            kept[0].all_gather(kept)

    def whole(self) -> dict[str, Tensor]:
        """Gathers one parameter after the other."""
        from deepspeed.runtime.zero import GatheredParameters

        whole = {name: buffer.detach().cpu().clone() for name, buffer in self._buffers().items()}
        for name, parameter in self._student.named_parameters():
            with GatheredParameters(parameter, enabled=self._stage == 3):
                whole[name] = parameter.detach().cpu().clone()
        return whole

    @property
    def _flat(self) -> Sequence[Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _piece(self, place: _Range, flat: Tensor) -> FlatPiece:
        values = flat.narrow(0, place.start, place.length)
        return FlatPiece(values, offset=place.offset, total=place.total)

    def _first_or_second(self) -> dict[str, _Range]:
        """Of the parameters that this process's range of every flattened group touches."""
        found: dict[str, _Range] = {}
        for name, parameter in self._student.named_parameters():
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is not None:
                inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
                found[name] = _Range(
                    mapping.param_group_index,
                    inner.start,
                    inner.numel,
                    outer.start,
                    parameter.numel(),
                )
        return found

    def _third(self) -> dict[str, _Range]:
        """Every parameter is cut into equal ranges, the last one padded."""
        found: dict[str, _Range] = {}
        for name, parameter in self._student.named_parameters():
            total: int = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
            group, start, each = self._zero.grad_position[self._zero.get_param_id(parameter)]
            offset = self._processes.rank * each
            if offset < total:
                found[name] = _Range(group, start, min(each, total - offset), offset, total)
        return found
