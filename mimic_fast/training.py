"""The training loop of step B: one straight loop, exactly resumable, one process or many.

Without a teacher it is plain SimCLR training, which pre-training and the student-only floor use.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimic_fast import checkpoint, ops
from mimic_fast.config import Settings
from mimic_fast.data.loader import Batch, Loader, TrainingImages
from mimic_fast.data.order import check_batch, steps_of
from mimic_fast.distributed import Processes, any_process, broadcast_json, wait_for_all
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.errors import DivergedError, StoppedError, UsageError
from mimic_fast.losses import Losses
from mimic_fast.metrics_log import append_metrics, truncate_metrics
from mimic_fast.optim import (
    averaged_state,
    build_optimizer,
    gradient_norm,
    learning_rate,
    set_learning_rate,
    update_average,
)
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.step import Student, step_losses
from mimic_fast.training_state import (
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

_TERMS = ("loss", "clone", "dense", "attention", "contrastive")
_FLUSH_STEPS = {"cpu": 1, "cuda": 20}  # steps between host reads of losses and flags


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a training run works on.

    Args:
        student: Randomly initialized student, already on its device.
        teacher: Frozen teacher with the same taps, or None.
        layer_weights: lambda_l per tap; 0 for taps without attention loss.
        images: What it trains on.
        fingerprint: What must be equal for a saved state to be continued.
        out: Run directory, or None to keep nothing.
    """

    student: Student
    teacher: TappedEncoder | None
    layer_weights: tuple[float, ...]
    images: TrainingImages
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came of it.

    Args:
        steps: Steps of the run.
        seconds: Wall time of this call.
        images_per_second: Training images (not views) of this call.
        skipped: Steps that were skipped because something was not finite.
        waited: Seconds of this call in which a step waited for its batch.
        waited_first: Of them for the first batch, while decoders and threads started.
    """

    steps: int
    seconds: float
    images_per_second: float
    skipped: int
    waited: float
    waited_first: float


def train(
    task: Task,
    *,
    settings: Settings,
    accelerator: "Accelerator",
    processes: Processes,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str = "distil",
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> Trained:
    """Trains ``task.student`` in place.

    Args:
        task: Student, teacher, images.
        settings: Everything else.
        accelerator: Wraps the student for its processes and precision.
        processes: Where this process stands.
        report: Told of every logged step.
        stop: Polled every step on every process; true on any saves the state and leaves.
        phase: Name in progress reports.
        on_epoch: Called with the epoch's number and the student after each epoch.

    Raises:
        StoppedError: If ``stop`` told so; the state is saved.
        DivergedError: If the loss or gradient was not finite too many times in a row.
        UsageError: If a saved state belongs to another run.
    """
    loop = _Loop(task, settings, accelerator, processes)
    loader = Loader(task.images, settings=settings, image_size=loop.image_size, processes=processes)
    first = loop.resume(loader.name) if settings.run.resume == "auto" else 0
    start = time.perf_counter()
    with loader.batches(first, loop.total_steps) as batches:
        for step, batch in enumerate(batches, start=first):
            loop.step(step, batch, stop=stop())
            last = step + 1 == loop.total_steps
            if last or (step + 1) % loop.flush_steps == 0:
                stopped = loop.flush()
                rate = (step + 1 - first) * loop.batch_size / (time.perf_counter() - start)
                report(_event(phase, step + 1, loop, rate))
                if stopped and not last:
                    loop.save(step + 1, loader.name)
                    raise StoppedError(
                        f"stopped by a signal after step {step + 1}; continue with --resume auto"
                    )
            if not last and (step + 1) % settings.run.checkpoint_every == 0:
                loop.save(step + 1, loader.name)
            if on_epoch is not None:
                for epoch in loop.passes_done(step):
                    on_epoch(epoch, task.student)
    loop.finish()
    seconds = time.perf_counter() - start
    return Trained(
        steps=loop.total_steps,
        seconds=seconds,
        images_per_second=(loop.total_steps - first) * loop.batch_size / seconds,
        skipped=loop.skipped,
        waited=batches.waited,
        waited_first=batches.waited_first or 0.0,
    )


class _Loop:
    """State of one training run between steps."""

    def __init__(
        self, task: Task, settings: Settings, accelerator: "Accelerator", processes: Processes
    ) -> None:
        self.task, self.settings, self.processes = task, settings, processes
        optim = settings.optim
        self.batch_size, images = optim.batch_size, len(task.images)
        check_batch(images, batch_size=self.batch_size, processes=processes)
        self.per_epoch = images / self.batch_size
        self.total_steps = steps_of(optim.epochs, images, batch_size=self.batch_size)
        self.image_size = task.student.tapped.encoder.spec.image_size
        if settings.run.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.run.max_steps)
        self.flush_steps = _FLUSH_STEPS.get(processes.device.type, 1)
        self.accelerator = accelerator
        self.dtype = torch.float64 if optim.precision == "fp64" else torch.float32
        # Convolutions run faster in NHWC; 1-channel and ViT inputs are unaffected.
        self.layout = torch.channels_last if optim.channels_last else torch.contiguous_format
        for module in (task.student, task.teacher):
            if module is not None:
                module.to(self.dtype)
                module.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        task.student.train()
        self.optimizer = build_optimizer(task.student, optim)
        self.average = averaged_state(task.student) if optim.ema else None
        self.wrapped = accelerator.prepare_model(task.student)
        self.parameters = [p for p in task.student.parameters() if p.requires_grad]
        self.buffers = [b for b in task.student.buffers() if b.is_floating_point()]
        self.pending: list[tuple[int, float, Tensor, Tensor, dict[str, int]]] = []
        self.skipped = self.nonfinite_in_a_row = 0
        self.last_row: dict[str, float] = {}

    def passes_done(self, step: int) -> range:
        """Numbers (from 1) of the passes over all images that a step completes."""
        images = len(self.task.images)
        before, after = (count * self.batch_size // images for count in (step, step + 1))
        return range(before + 1, min(after, self.settings.optim.epochs) + 1)

    def step(self, step: int, batch: Batch, *, stop: bool) -> None:
        """Forward, backward, check, update; nothing here waits for the device."""
        settings, task = self.settings, self.task
        student_view = batch.v1 if batch.student is None else batch.student
        batch = Batch(
            v1=self._placed(batch.v1 if batch.plain is None else batch.plain),
            v2=None if batch.v2 is None else self._placed(batch.v2),
            ids=batch.ids,
        )
        rate = learning_rate(
            step,
            total_steps=self.total_steps,
            steps_per_epoch=self.per_epoch,
            settings=settings.optim,
        )
        set_learning_rate(self.optimizer, rate)
        before = [buffer.clone() for buffer in self.buffers]
        self.calls_before = ops.calls()
        with self.accelerator.autocast() if settings.optim.precision == "bf16" else nullcontext():
            losses = step_losses(
                self.wrapped,
                task.teacher,
                batch,
                self._placed(student_view),
                task.layer_weights,
                settings=settings,
                processes=self.processes,
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        flags = self._update(step, rate, losses, batch.ids, stop=stop)
        # A forward pass that was not finite has spoiled BatchNorm's running statistics already.
        for buffer, old in zip(self.buffers, before, strict=True):
            torch.where(flags[0] > 0, old, buffer, out=buffer)
        if self.average is not None:
            update_average(self.average, self.task.student, decay=settings.optim.ema)

    def _update(self, step: int, rate: float, losses: Losses, ids: Tensor, *, stop: bool) -> Tensor:
        norm = gradient_norm(self.parameters, clip=self.settings.optim.clip_norm)
        bad = ~(torch.isfinite(losses.total.detach()) & torch.isfinite(norm))
        flags = torch.stack([bad.float(), bad.new_tensor(stop).float()])
        if self.processes.world > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        # Fused optimizers skip a step whose found_inf is 1: on the device, on all processes alike.
        self.optimizer.found_inf = flags[0]  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        terms = (
            losses.total,
            losses.clone,
            losses.dense,
            losses.attention,
            losses.contrastive,
            norm,
        )
        row = torch.stack([*(term.detach().double() for term in terms), *flags.double()])
        # Views are made ahead in another thread: whose step that was is chance.
        counts = ops.calls() - self.calls_before
        ran = {name: count for name, count in counts.items() if not name.startswith("views")}
        self.pending.append((step + 1, rate, ids, row, ran))
        return flags

    def flush(self) -> bool:
        """Reads the pending rows, logs them and tells whether any process was asked to stop."""
        rows = torch.stack([row for *_, row, _ in self.pending])
        local = rows[:, : len(_TERMS)].clone()
        if self.processes.world > 1:
            dist.all_reduce(local)
            local /= self.processes.world
        stopped = False
        lines = []
        for (step, rate, ids, _, ran), means, row in zip(
            self.pending, local.tolist(), rows.tolist(), strict=True
        ):
            norm, bad, asked = row[len(_TERMS) :]
            self.last_row = dict(zip(_TERMS, means, strict=True)) | {"lr": rate, "grad_norm": norm}
            stopped |= asked > 0
            self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
            self.skipped += int(bad > 0)
            line = {"step": step, **self.last_row, "skipped": bool(bad), "ops": ran}
            lines.append(line | ({"ids": ids.tolist()} if bad else {}))
            if self.nonfinite_in_a_row >= self.settings.optim.max_nonfinite:
                self._log(lines)
                raise DivergedError(
                    f"loss or gradient not finite {self.nonfinite_in_a_row} times in a row, at "
                    f"step {step} (batch ids in metrics.jsonl); lower optim.lr or optim.precision"
                )
        self._log(lines)
        self.pending = []
        return stopped

    def _log(self, lines: list[dict[str, Any]]) -> None:
        if self.task.out is None or not self.processes.is_main:
            return
        for line in lines:
            append_metrics(self.task.out / "metrics.jsonl", line)

    def save(self, step: int, loader: str) -> None:
        """Writes the run state (process 0) and waits for it."""
        if self.task.out is None:
            return
        if self.pending:
            self.flush()
        if self.processes.is_main:
            moments, groups = optimizer_tensors(self.optimizer)
            tensors = {
                "student": self.task.student.state_dict(),
                "optimizer": moments,
                "rng": rng_tensors(),
            }
            if self.average is not None:
                tensors["average"] = self.average
            meta = {
                "optimizer": groups,
                "fingerprint": dict(self.task.fingerprint),
                "loader": loader,
                "skipped": self.skipped,
                "nonfinite_in_a_row": self.nonfinite_in_a_row,
            }
            checkpoint.save_state(
                self.task.out / "state",
                step,
                tensors=tensors,
                meta=meta,
                keep=self.settings.run.keep,
            )
        wait_for_all(self.processes)

    def resume(self, loader: str) -> int:
        """Loads the newest good state, if any, and returns the step to go on with."""
        if self.task.out is None:
            return 0
        state = checkpoint.newest_state(self.task.out / "state")
        step = 0 if state is None else state.step
        if any_process(step != broadcast_json(step, self.processes), self.processes):
            raise UsageError(
                f"the processes find different states in {self.task.out}; "
                "--out must be one folder that all of them see"
            )
        if state is not None:
            checkpoint.refuse_other_run(state.path, state.meta, self.task.fingerprint)
            made_by = state.meta["loader"]
            if made_by != loader:
                raise UsageError(
                    f"the run in {self.task.out} has views by {made_by}, here they are by "
                    f"{loader}; set data.backend and data.decode as they were"
                )
        if self.processes.is_main:
            truncate_metrics(self.task.out / "metrics.jsonl", step)
        if state is None:
            return 0
        self.task.student.load_state_dict(state.tensors["student"])
        restore_optimizer(self.optimizer, state.tensors["optimizer"], state.meta["optimizer"])
        restore_rng(state.tensors["rng"])
        if self.average is not None:
            self.average = {
                name: value.to(self.processes.device)
                for name, value in state.tensors["average"].items()
            }
        self.skipped = state.meta["skipped"]
        self.nonfinite_in_a_row = state.meta["nonfinite_in_a_row"]
        wait_for_all(self.processes)
        return step

    def finish(self) -> None:
        """Puts averaged weights in place and the student in eval mode."""
        if self.average is not None:
            self.task.student.load_state_dict(self.average)
        self.task.student.eval()

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(
            self.processes.device, self.dtype, non_blocking=True, memory_format=self.layout
        )


def _event(phase: str, step: int, loop: _Loop, rate: float) -> Event:
    return Event(
        phase=phase,
        done=step,
        total=loop.total_steps,
        unit="steps",
        metrics={**loop.last_row, "images_per_second": rate},
    )
