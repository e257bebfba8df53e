"""What a training run tells: rows of ``metrics.jsonl``, trackers, cost, and when it has diverged.

Numbers of a step stay on the device until a flush reads those of several steps at once.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimic_fast import trackers
from mimic_fast.config import Settings
from mimic_fast.distributed import Processes, all_gather_rows
from mimic_fast.divergence import Divergence
from mimic_fast.metrics_log import append_metrics
from mimic_fast.performance import WINDOW_STEPS, ddp_communication, shown, summary, watch_ddp
from mimic_fast.step_clock import StepClock

if TYPE_CHECKING:
    from accelerate import Accelerator

TERMS = ("loss", "clone", "dense", "attention", "contrastive", "byol")
_FLUSH_STEPS = {"cpu": 1, "cuda": 20}  # steps between host reads of losses and flags


class TrainingLog:
    """Keeps the numbers of steps and writes them.

    Args:
        out: Run directory; None writes nothing.
        settings: Batch size, precision, limits.
        accelerator: Its trackers get every row.
        processes: All of them call the same methods at the same steps.
        module: What the engine made of the student.
        clock: Of the steps.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        settings: Settings,
        accelerator: "Accelerator",
        processes: Processes,
        module: nn.Module,
        clock: StepClock,
    ) -> None:
        self._out, self._accelerator, self._processes = out, accelerator, processes
        self._module, self._clock = module, clock
        self._images = settings.optim.batch_size
        self.flush_steps = _FLUSH_STEPS.get(processes.device.type, 1)
        self.divergence = Divergence(settings.optim)
        self.skipped = 0
        self.rows: list[dict[str, Any]] = []  # the last ones, for a dump
        self.shown: dict[str, float] = {}
        self.cost: dict[str, float] = {}  # of the last window
        self._pending: list[tuple[int, float, Tensor, Tensor, dict[str, int]]] = []
        self._times: list[dict[str, float]] = []
        self._communication: list[dict[str, float]] = []
        watch_ddp(module, every=self.flush_steps)

    def add(
        self, step: int, *, rate: float, ids: Tensor, numbers: Tensor, ran: dict[str, int]
    ) -> None:
        """Takes note of a step (from 1).

        Args:
            step: The step.
            rate: Learning rate.
            ids: Items of this process.
            numbers: ``TERMS``, gradient norm, whether it was skipped, whether a process was asked
                to stop; on the device.
            ran: Which ops ran how often.
        """
        self._pending.append((step, rate, ids, numbers, ran))

    def flush(self, *, last: bool = False) -> bool:
        """Reads and writes what is pending; whether any process was asked to stop.

        Raises:
            DivergedError: On all processes alike.
        """
        if not self._pending:
            return False
        rows = torch.stack([row for *_, row, _ in self._pending])
        local = rows[:, : len(TERMS)].clone()
        if self._processes.world > 1:
            dist.all_reduce(local)
            local /= self._processes.world
        stopped, diverged_at = False, 0
        lines: list[dict[str, Any]] = []
        for (step, rate, ids, _, ran), means, row, time in zip(
            self._pending, local.tolist(), rows.tolist(), self._clock.read(), strict=True
        ):
            norm, bad, asked = row[len(TERMS) :]
            self.shown = dict(zip(TERMS, means, strict=True)) | {"lr": rate, "grad_norm": norm}
            stopped |= asked > 0
            self.skipped += int(bad > 0)
            line = {"step": step, **self.shown, "skipped": bool(bad), "ops": ran, "time": time}
            if bad:  # on all processes alike
                line["ids"] = all_gather_rows(ids.to(rows.device), self._processes).tolist()
            lines.append(line)
            self._times.append(time)
            if self.divergence.after(bad=bad > 0, finite_loss=math.isfinite(means[0])):
                diverged_at = step
                break
        self._pending = []
        lines[-1] |= self._performance(lines[-1]["step"], last=last)
        self._write(lines)
        if diverged_at:
            raise self.divergence.error(diverged_at)
        return stopped

    def counts(self) -> dict[str, Any]:
        """What a run state keeps."""
        return {"skipped": self.skipped, "in_a_row": self.divergence.counts()}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`counts` gave."""
        self.skipped = counts["skipped"]
        self.divergence.restore(counts["in_a_row"])

    def _performance(self, step: int, *, last: bool) -> dict[str, Any]:
        """The summary of a window, where one ends; collective."""
        communication = ddp_communication(self._module)
        if communication is not None:
            self._communication.append(communication)
        if not last and step % WINDOW_STEPS:
            return {}
        found = summary(
            self._times,
            processes=self._processes,
            images_per_step=self._images,
            communication=self._communication or None,
        )
        self._times, self._communication = [], []
        self.cost = shown(found)
        return {"performance": found}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self.rows = [*self.rows, *lines][-WINDOW_STEPS:]
        if self._out is None:
            return
        for line in lines:
            if self._processes.is_main:
                append_metrics(self._out / "metrics.jsonl", line)
            trackers.log(self._accelerator, line, line["step"])
