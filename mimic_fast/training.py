"""The training loop of step B: one straight loop, exactly resumable, one process or many.

Without a teacher it is plain SimCLR training, which pre-training and the student-only floor use, or
BYOL's.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mimic_fast import checkpoint, ops
from mimic_fast.accumulation import Part, pulled, split
from mimic_fast.byol import Byol, byol_losses, follow
from mimic_fast.config import Settings
from mimic_fast.data.loader import Batch, Loader, TrainingImages, sights_per_image
from mimic_fast.data.order import check_batch, steps_of
from mimic_fast.distributed import Processes, wait_for_all
from mimic_fast.diverged import dump_diverged
from mimic_fast.encoders.blocks import checkpoint_blocks, compile_blocks
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.engines.choose import make_engine
from mimic_fast.engines.engine import EngineState
from mimic_fast.errors import DivergedError, StoppedError, UsageError
from mimic_fast.losses import Losses
from mimic_fast.metrics_log import truncate_metrics
from mimic_fast.optim import learning_rate
from mimic_fast.precision import autocast_dtype
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.saver import Saver
from mimic_fast.sharded_state import newest_for_all, read_pieces
from mimic_fast.step import Student, step_losses
from mimic_fast.step_clock import StepClock
from mimic_fast.stopping import Cooldown
from mimic_fast.teacher_memory import TeacherMemory, remember
from mimic_fast.trackers import finish as finish_trackers
from mimic_fast.trackers import start_trackers
from mimic_fast.training_log import TERMS, TrainingLog
from mimic_fast.training_state import restore_rng_of, rng_of_all, seed_process

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        byol: Train by BYOL, without a teacher and by the engine ddp; the student is its online one.
    """

    student: Student
    teacher: TappedEncoder | None
    layer_weights: tuple[float, ...]
    images: TrainingImages
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    byol: Byol | None = None

    @property
    def trained(self) -> tuple[Student, ...]:
        """All whose weights move: the student and, with BYOL, its average."""
        return (self.student,) if self.byol is None else (self.student, self.byol.target)


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
        whole: The student's state, gathered, where an engine had cut it; None: the student has it.
    """

    steps: int
    seconds: float
    images_per_second: float
    skipped: int
    waited: float
    waited_first: float
    whole: dict[str, Tensor] | None = None


def train(
    task: Task,
    *,
    settings: Settings,
    accelerator: "Accelerator",
    processes: Processes,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str = "distil",
    on_epoch: Callable[[int, nn.Module], bool | None] | None = None,
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
        on_epoch: Called with the epoch's number and the student after each epoch, before the state
            is saved. True, on all processes: enough; what is left is a cooldown.

    Raises:
        StoppedError: If ``stop`` told so; the state is saved.
        DivergedError: If the loss or gradient was not finite too many times in a row.
        UsageError: If a saved state belongs to another run.
    """
    loop = _Loop(task, settings, accelerator, processes)
    loader = Loader(task.images, settings=settings, image_size=loop.image_size, processes=processes)
    first = loop.resume(loader.name) if settings.run.resume == "auto" else 0
    if first < loop.total_steps:
        loop.remember(loader, report=report, stop=stop)
    if task.out is not None:
        start_trackers(
            accelerator,
            settings.run.trackers,
            out=task.out,
            settings=settings,
            resume=settings.run.resume == "auto",
            step=first,
        )
    start = time.perf_counter()
    try:
        with loader.batches(first, loop.total_steps) as batches:
            _run_steps(
                loop,
                loader,
                batches,
                first,
                report=report,
                stop=stop,
                phase=phase,
                on_epoch=on_epoch,
            )
        whole = loop.finish()
    finally:  # of a stopped or diverged run too: what a tracker still holds would be lost
        finish_trackers(accelerator)
    seconds = time.perf_counter() - start
    return Trained(
        steps=loop.total_steps,
        seconds=seconds,
        images_per_second=(loop.total_steps - first) * loop.batch_size / seconds,
        skipped=loop.log.skipped,
        waited=batches.waited,
        waited_first=batches.waited_first or 0.0,
        whole=whole,
    )


def _run_steps(
    loop: "_Loop",
    loader: Loader,
    batches: Iterator[Batch],
    first: int,
    *,
    report: Reporter,
    stop: Callable[[], bool],
    phase: str,
    on_epoch: Callable[[int, nn.Module], bool | None] | None,
) -> None:
    clock, start = loop.clock, time.perf_counter()
    clock.begin()
    step = first
    while step < loop.total_steps:  # which a cooldown lowers
        with clock.section("data"):
            batch = next(batches)
        loop.step(step, batch, stop=stop())
        clock.step_done()
        for epoch in loop.passes_done(step):
            if on_epoch is not None and on_epoch(epoch, loop.task.student):
                loop.cool_down(step + 1)
        last = step + 1 == loop.total_steps
        save = last or (step + 1) % loop.settings.run.checkpoint_every == 0
        if save or (step + 1) % loop.log.flush_steps == 0:
            stopped = loop.flush(loader, last=last)
            rate = (step + 1 - first) * loop.batch_size / (time.perf_counter() - start)
            report(_event(phase, step + 1, loop, rate))
            if save or stopped:
                loop.save(step + 1, loader.name)
            if stopped and not last:
                loop.wait_saved()
                raise StoppedError(
                    f"stopped by a signal after step {step + 1}; continue with --resume auto"
                )
        step += 1


class _Loop:
    """State of one training run between steps."""

    def __init__(
        self, task: Task, settings: Settings, accelerator: "Accelerator", processes: Processes
    ) -> None:
        self.task, self.settings, self.processes = task, settings, processes
        optim = settings.optim
        self.batch_size, images = optim.batch_size, len(task.images)
        check_batch(images, batch_size=self.batch_size, processes=processes, parts=optim.accumulate)
        self.per_epoch = images / self.batch_size
        self.total_steps = steps_of(optim.epochs, images, batch_size=self.batch_size)
        self.image_size = task.student.tapped.encoder.spec.image_size
        if settings.run.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.run.max_steps)
        self.planned_steps = self.total_steps  # what the schedule goes by; a cooldown cuts it short
        self.cooldown: Cooldown | None = None
        self.dtype = torch.float64 if optim.precision == "fp64" else torch.float32
        # Convolutions run faster in NHWC; 1-channel and ViT inputs are unaffected.
        self.layout = torch.channels_last if optim.channels_last else torch.contiguous_format
        self._prepare_modules()
        seed_process(settings.seed, processes)
        self.engine = make_engine(
            task.student, settings=settings, accelerator=accelerator, processes=processes
        )
        buffers = (buffer for one in task.trained for buffer in one.buffers())
        self.buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.clock = processes.clock or StepClock(processes.device)
        self.log = TrainingLog(
            task.out,
            settings=settings,
            accelerator=accelerator,
            processes=processes,
            module=self.engine.module,
            clock=self.clock,
        )
        self.saver = self._saver()
        self.memory: TeacherMemory | None = None

    def remember(self, loader: Loader, *, report: Reporter, stop: Callable[[], bool]) -> None:
        """Asks the teacher once about all images, where its answers stay the same."""
        if self.task.teacher is None or not sights_per_image(self.settings):
            return
        self.memory = remember(
            self.task.teacher,
            loader,
            self.task.layer_weights,
            settings=self.settings,
            processes=self.processes,
            layout=self.layout,
            seen=self.total_steps * self.batch_size,
            report=report,
            stop=stop,
        )
        if self.memory is not None:
            loader.plain = False

    def _prepare_modules(self) -> None:
        """Types, memory order, compilation: before an engine takes the student."""
        task, optim = self.task, self.settings.optim
        cut = self.settings.run.engine != "ddp"
        for student in task.trained:
            student.to(self.dtype)
            if not cut:  # what is cut is flattened, which needs the plain order
                student.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
            student.autocast = autocast_dtype(optim.precision)
            student.train()
        if task.teacher is not None and not isinstance(task.teacher.encoder, FSDPModule):
            task.teacher.to(self.dtype)
            task.teacher.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        if optim.compile:
            for tapped in (*(student.tapped for student in task.trained), task.teacher):
                if tapped is not None:
                    compile_blocks(tapped)
        if optim.activation_checkpointing:
            checkpoint_blocks(task.student.tapped)

    def _saver(self) -> Saver | None:
        run = self.settings.run
        if self.task.out is None:
            return None
        return Saver(
            self.task.out / "state",
            processes=self.processes,
            keep=run.keep,
            background=run.async_save,
        )

    def cool_down(self, done: int) -> None:
        """After ``done`` steps it is enough; the run ends within a share of them."""
        if self.cooldown is None and done < self.total_steps:
            share = self.settings.stop.cooldown
            self._end_by(Cooldown.after(done, share=share, at_most=self.total_steps))

    def _end_by(self, cooldown: Cooldown) -> None:
        self.cooldown, self.total_steps = cooldown, cooldown.end

    def passes_done(self, step: int) -> range:
        """Numbers (from 1) of the passes over all images that a step completes."""
        images = len(self.task.images)
        before, after = (count * self.batch_size // images for count in (step, step + 1))
        return range(before + 1, min(after, self.settings.optim.epochs) + 1)

    def step(self, step: int, batch: Batch, *, stop: bool) -> None:
        """Forward, backward, check, update; nothing here waits for the device."""
        settings = self.settings
        student_view = self._placed(batch.v1 if batch.student is None else batch.student)
        if self.memory is not None:  # nobody else looks
            teacher_view = student_view
        else:
            teacher_view = self._placed(batch.v1 if batch.plain is None else batch.plain)
        batch = Batch(
            v1=teacher_view,
            v2=None if batch.v2 is None else self._placed(batch.v2),
            ids=batch.ids,
            sights=batch.sights,
        )
        rate = learning_rate(
            step,
            total_steps=self.planned_steps,
            steps_per_epoch=self.per_epoch,
            settings=settings.optim,
        )
        if self.cooldown is not None:
            rate *= self.cooldown.factor(step)
        before = [buffer.clone() for buffer in self.buffers]
        calls_before = ops.calls()
        terms = self._gradients(batch, student_view)
        with self.clock.section("optimizer"):
            update = self.engine.update(rate)
            # A forward that was not finite has spoiled BatchNorm's running statistics already.
            for buffer, old in zip(self.buffers, before, strict=True):
                torch.where(update.bad > 0, old, buffer, out=buffer)
            if self.task.byol is not None:
                done = step / self.total_steps
                follow(self.task.byol, self.task.student, done=done, bad=update.bad)
        with self.clock.section("communication"):
            asked = update.bad.new_tensor(float(stop))
            if self.processes.world > 1:
                dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        row = torch.stack([*terms, update.norm.double(), update.bad.double(), asked.double()])
        # Views are made ahead in another thread: whose step that was is chance.
        counts = ops.calls() - calls_before
        ran = {name: count for name, count in counts.items() if not name.startswith("views")}
        self.log.add(step + 1, rate=rate, ids=batch.ids, numbers=row, ran=ran)

    def _gradients(self, batch: Batch, student_view: Tensor) -> list[Tensor]:
        """Forward and backward of all parts of a batch; the terms of its loss."""
        settings, engine = self.settings, self.engine
        engine.clear()
        parts = split(batch, student_view, settings.optim.accumulate)
        contrastive = None
        # BYOL compares no two images: the mean of its parts is the loss of the batch.
        if len(parts) > 1 and settings.loss.contrastive > 0 and self.task.byol is None:
            with self.clock.section("student"):
                contrastive, parts = pulled(
                    engine.module, parts, loss=settings.loss, processes=self.processes
                )
        terms: list[Tensor] = []
        for index, part in enumerate(parts):
            with engine.part(last=index + 1 == len(parts)):
                losses = self._losses(part)
                with self.clock.section("backward"):
                    engine.backward(losses.total / len(parts))
            values = (
                losses.total,
                losses.clone,
                losses.dense,
                losses.attention,
                losses.contrastive,
                losses.byol,
            )
            found = [value.detach().double() / len(parts) for value in values]
            terms = [a + b for a, b in zip(terms, found, strict=True)] if terms else found
        if contrastive is not None:
            # The parts' own term has its gradient, not its value.
            loss, place = settings.loss.contrastive, TERMS.index("contrastive")
            terms[0] = terms[0] + loss * (contrastive.double() - terms[place])
            terms[place] = contrastive.double()
        return terms

    def _losses(self, part: Part) -> Losses:
        known = None
        if self.memory is not None and part.batch.sights is not None:
            known = self.memory.of(part.batch.sights)
        if self.task.byol is not None:
            assert part.batch.v2 is not None
            views = torch.cat([part.student_view, part.batch.v2])
            return byol_losses(self.engine.module, self.task.byol.target, views, clock=self.clock)
        return step_losses(
            self.engine.module,
            self.task.teacher,
            part.batch,
            part.student_view,
            self.task.layer_weights,
            settings=self.settings,
            processes=self.processes,
            clock=self.clock,
            pull=part.pull,
            known=known,
        )

    def flush(self, loader: Loader, *, last: bool) -> bool:
        """Writes the log and tells whether any process was asked to stop.

        Raises:
            DivergedError: With the last bad step kept in ``diverged/``, except BYOL's.
        """
        try:
            return self.log.flush(last=last)
        except DivergedError as error:
            if self.task.out is None or self.task.byol is not None:  # replay knows no target
                raise
            folder = self._dump(self.task.out, self.log.rows[-1]["step"], loader)
            raise DivergedError(f"{error}; mimic-fast replay {folder} runs it again") from None

    def _dump(self, out: Path, step: int, loader: Loader) -> Path:
        student = self.engine.whole()
        tapped, teacher = self.task.student.tapped, self.task.fingerprint.get("teacher")
        loader.plain = True  # for whoever runs the step again with the teacher
        with loader.batches(step - 1, step) as batches:  # made again: it hangs on the step alone
            return dump_diverged(
                out / "diverged",
                step=step,
                student=student if self.processes.is_main else None,
                batch=next(batches),
                rank=self.processes.rank,
                world=self.processes.world,
                meta={
                    "settings": self.settings.model_dump(mode="json"),
                    "spec": tapped.encoder.spec.model_dump(mode="json"),
                    "taps": list(tapped.taps),
                    "layer_weights": list(self.task.layer_weights),
                    "teacher": teacher,
                    "loss_scale": self.engine.loss_scale(),
                    "rows": self.log.rows,
                },
            )

    def save(self, step: int, loader: str) -> None:
        """Copies the run state, which is then written."""
        if self.saver is None:
            return
        state = self.engine.state()
        meta = {
            "engine": {"name": self.engine.name, **state.rest},
            "fingerprint": dict(self.task.fingerprint),
            "loader": loader,
            "world": self.processes.world,
            "log": self.log.counts(),
            "cooldown": None if self.cooldown is None else [self.cooldown.start, self.cooldown.end],
        }
        tensors = {**state.tensors, "rng": rng_of_all(self.processes)}
        if self.task.byol is not None:
            tensors["target"] = self.task.byol.target.state_dict()
        self.saver.save(step, replace(state, tensors=tensors), meta)

    def resume(self, loader: str) -> int:
        """Loads the newest good state, if any, and returns the step to go on with."""
        if self.task.out is None:
            return 0
        state = newest_for_all(self.task.out / "state", self.processes)
        step = 0 if state is None else state.step
        if state is not None:
            checkpoint.refuse_other_run(state.path, state.meta, self.task.fingerprint)
            self._refuse_other_ways(state, loader)
        if self.processes.is_main:
            truncate_metrics(self.task.out / "metrics.jsonl", step)
        if state is not None:
            self._restore(state)
        wait_for_all(self.processes)
        return step

    def _refuse_other_ways(self, state: checkpoint.State, loader: str) -> None:
        made_by, engine = state.meta["loader"], state.meta["engine"]["name"]
        if made_by != loader:
            raise UsageError(
                f"the run in {self.task.out} has views by {made_by}, here they are by {loader}; "
                "set data.backend and data.decode as they were"
            )
        if (engine == "ddp") != (self.engine.name == "ddp"):
            raise UsageError(
                f"the run in {self.task.out} was saved by engine {engine}, which "
                f"{self.engine.name} cannot continue; set run.engine = {engine!r}"
            )

    def _restore(self, state: checkpoint.State) -> None:
        rest = state.meta["engine"]
        if state.sharded is not None:
            read_pieces(state.sharded, self.engine.pieces_to_fill(rest))
        self.engine.restore(EngineState(tensors=state.tensors, rest=rest))
        if self.task.byol is not None:
            self.task.byol.target.load_state_dict(dict(state.tensors["target"]))
        restore_rng_of(state.tensors["rng"], self.processes)
        self.log.restore(state.meta["log"])
        if (cooldown := state.meta.get("cooldown")) is not None:
            self._end_by(Cooldown(*cooldown))

    def wait_saved(self) -> None:
        """Until the last state is on disk."""
        if self.saver is not None:
            self.saver.wait()

    def finish(self) -> dict[str, Tensor] | None:
        """Puts averaged weights in place and the student in eval mode; its weights, if cut."""
        self.wait_saved()
        self.engine.finish()
        self.task.student.eval()
        return None if self.engine.name == "ddp" else self.engine.whole()

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
        metrics={"images_per_second": rate, **loop.log.shown, **loop.log.cost},
    )
