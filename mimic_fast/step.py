"""One step of distillation: who sees which view, and what is minimized."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.config import Settings
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import Processes
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import Listener, TappedEncoder
from mimic_fast.layer_losses import TeacherOutputs, side_of, summed, teacher_side
from mimic_fast.losses import Losses, contrastive_loss, total_loss
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.step_clock import StepClock, listener_timed


class Student(nn.Module):
    """Tapped student and projection head in one module, so that one wrapper synchronizes both.

    Its forward runs under autocast where ``autocast`` names a type: inside, so that it is the same
    whatever wraps the module.
    """

    autocast: torch.dtype | None = None

    def __init__(self, tapped: TappedEncoder, *, projection: int, seed: int) -> None:
        """``projection`` is the head's output width; 0 builds none."""
        super().__init__()
        self.tapped = tapped
        width = tapped.encoder.feature_dim
        self.projection: nn.Module | None = None
        if projection:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projection = nn.Sequential(
                    nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection)
                )

    def forward(
        self,
        images: Float[Tensor, "images channel height width"],
        listener: Listener | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features and projections; ``listener`` takes part at the taps."""
        with autocast(self.autocast, images.device):
            if listener is None:
                features = self.tapped.encoder(images)
            else:
                features = self.tapped.listened(images, listener)
            if features._is_view():  # FSDP2 hangs its hooks on the outputs, and a view drops them
                features = features.clone()
            return features, self.projection(features) if self.projection is not None else None


def whole_encoder(encoder: Encoder, state: Mapping[str, Tensor] | None, *, seed: int) -> Encoder:
    """A trained student's encoder on the CPU, in eval mode; put together again where it was cut.

    Args:
        encoder: The student's.
        state: The student's whole state, where an engine had cut it; None: the encoder has its own.
        seed: Of the run.
    """
    if state is not None:
        prefix = "tapped.encoder."
        own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        encoder = build_encoder(encoder.spec, seed=seed)
        encoder.load_state_dict(own)
    return encoder.to(device="cpu", dtype=torch.float32).eval()


def step_losses(
    student: nn.Module,
    teacher: TappedEncoder | None,
    batch: Batch,
    student_view: Float[Tensor, "batch channel height width"],
    layer_weights: tuple[float, ...],
    *,
    settings: Settings,
    processes: Processes,
    clock: StepClock | None = None,
    pull: tuple[Tensor, Tensor] | None = None,
    known: TeacherOutputs | None = None,
) -> Losses:
    """Losses of a batch: the student sees it once (twice with a second view), the teacher once.

    Args:
        student: A :class:`Student`, wrapped for its processes.
        teacher: Frozen; None: no clone and attention losses.
        batch: What the teacher sees, and the student's second view.
        student_view: The student's first view.
        layer_weights: lambda_l by tap.
        settings: Weights and forms of the losses.
        processes: The contrastive loss runs over all of them.
        clock: Told what takes the time.
        pull: Gradients of the contrastive loss by the two views' projections, where it was computed
            over a larger batch than this; the loss is then their product, which has them.
        known: What the teacher said of these images earlier; it does not run again.
    """
    clock = clock or StepClock(processes.device)
    loss, size = settings.loss, batch.ids.shape[0]
    side = None
    if known is not None:
        with clock.section("teacher"):
            side = side_of(known, layer_weights, settings=loss)
    elif teacher is not None:
        dtype = autocast_dtype(settings.optim.precision)
        with clock.section("teacher"), autocast(dtype, processes.device):
            side = teacher_side(teacher, batch.v1, layer_weights, settings=loss)
    listener = None if side is None else side.listener
    second = [] if batch.v2 is None else [batch.v2]
    with clock.section("student"):
        heard = None if listener is None else listener_timed(listener, clock)
        features, projected = student(torch.cat([student_view, *second]), heard)
    with clock.section("loss"):
        zero = features.new_zeros(())
        attention, dense = summed(listener, zero=zero)
        clone = contrastive = zero
        if side is not None:
            clone = ops.clone_loss(features[:size], side.features, kind=loss.clone_form)
        if batch.v2 is not None and projected is not None:
            first, other = projected.split(size)
            if pull is None:
                contrastive = contrastive_loss(
                    first, other, temperature=loss.temperature, processes=processes
                )
            else:
                contrastive = (first * pull[0]).sum() + (other * pull[1]).sum()
        return total_loss(
            clone=clone, dense=dense, attention=attention, contrastive=contrastive, settings=loss
        )
