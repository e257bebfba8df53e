"""One step of distillation: who sees which view, and what is minimized."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.config import Settings
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import Processes
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.losses import Losses, contrastive_loss, total_loss, weighted_attention_loss


class Student(nn.Module):
    """Tapped student and projection head in one module, so that one wrapper synchronizes both."""

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
        self, images: Float[Tensor, "images channel height width"]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Features, feature maps of the taps, projections."""
        features, maps = self.tapped(images)
        return features, maps, self.projection(features) if self.projection is not None else None


def step_losses(
    student: nn.Module,
    teacher: TappedEncoder | None,
    batch: Batch,
    student_view: Float[Tensor, "batch channel height width"],
    layer_weights: tuple[float, ...],
    *,
    settings: Settings,
    processes: Processes,
) -> Losses:
    """Losses of a batch: the student sees it once (twice with a second view), the teacher once."""
    size = batch.ids.shape[0]
    second = [] if batch.v2 is None else [batch.v2]
    features, maps, projected = student(torch.cat([student_view, *second]))
    zero = features.new_zeros(())
    clone = attention = contrastive = zero
    if teacher is not None:
        with torch.no_grad():
            target, teacher_maps = teacher(batch.v1)
        clone = ops.clone_loss(features[:size], target)
        if any(layer_weights):
            own = [feature_map[:size] for feature_map in maps]
            attention = weighted_attention_loss(
                own, teacher_maps, layer_weights, settings=settings.loss
            )
    if batch.v2 is not None and projected is not None:
        first, other = projected.split(size)
        contrastive = contrastive_loss(
            first,
            other,
            temperature=settings.loss.temperature,
            processes=processes,
        )
    return total_loss(
        clone=clone, attention=attention, contrastive=contrastive, settings=settings.loss
    )
