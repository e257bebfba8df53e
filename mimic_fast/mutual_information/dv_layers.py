"""Trained critics, dv or infonce, for all layers: one each, the layers dealt to processes.

A layer's result depends on its own seed alone, so it is the same whichever process trains it.
"""

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.distributed import all_gather_rows
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.mutual_information.activations import StepA, flattened_maps
from mimic_fast.mutual_information.dv import LAST_EPOCHS, dv_bound, dv_value, train_critic
from mimic_fast.mutual_information.infonce import infonce_bound
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.progress import Event

_SEED_STRIDE = 1_000_003  # keeps the layers' seeds apart from those of the next run seed


def estimate_critics(
    tapped: TappedEncoder,
    images: UInt8[Tensor, "image channel side side"],
    settings: MutualInformationSettings,
    *,
    names: tuple[str, ...],
    seed: int,
    step: StepA,
) -> list[LayerEstimate]:
    """Value of the bound that ``settings.estimator`` names, for every layer.

    Raises:
        StoppedError: If a process was told to stop; finished layers are kept.
        MachineError: If a finished layer cannot be written.
    """
    rank, world = step.processes.rank, step.processes.world
    epochs = torch.empty(0, min(LAST_EPOCHS, settings.dv_epochs), dtype=torch.float64)
    for turn in range(-(-len(names) // world)):
        tap = turn * world + rank
        if tap < len(names):
            own = _layer_epochs(tapped, images, settings, tap=tap, seed=seed, step=step)
            epochs = torch.cat([epochs, own[None]])
        else:
            _idle(len(images), settings, step)
        done = min(len(names), (turn + 1) * world)
        step.report(Event(phase=settings.estimator, done=done, total=len(names), unit="layers"))
    taps = torch.arange(rank, len(names), world)
    device = step.processes.device
    order = all_gather_rows(taps.to(device), step.processes).cpu().argsort()
    by_layer = all_gather_rows(epochs.to(device), step.processes).cpu()[order]
    return [_estimate(name, values) for name, values in zip(names, by_layer, strict=True)]


def _layer_epochs(
    tapped: TappedEncoder,
    images: Tensor,
    settings: MutualInformationSettings,
    *,
    tap: int,
    seed: int,
    step: StepA,
) -> Float64[Tensor, " epoch"]:
    name = f"{settings.estimator}_{tap:03d}"
    found = step.parts.find(name, images)
    if found is not None:
        _idle(len(images), settings, step)
        return found["epochs"]
    features, maps = flattened_maps(tapped, images, tap=tap, chunk=settings.chunk, poll=step.poll)
    epochs = train_critic(
        maps,
        features,
        epochs=settings.dv_epochs,
        batch=settings.dv_batch,
        seed=seed * _SEED_STRIDE + tap,
        device=step.processes.device,
        poll=step.poll,
        bound=infonce_bound if settings.estimator == "infonce" else dv_bound,
    )
    step.parts.keep(name, images, {"epochs": epochs})
    return epochs


def _idle(images: int, settings: MutualInformationSettings, step: StepA) -> None:
    """Polls as often as a process that trains a critic, so that all can leave together."""
    if step.processes.world > 1:
        for _ in range(-(-images // settings.chunk) + settings.dv_epochs):
            step.poll()


def _estimate(name: str, epochs: Float64[Tensor, " epoch"]) -> LayerEstimate:
    found = dv_value(epochs)
    return LayerEstimate(
        tap=name,
        raw=found.value,
        low=found.low,
        high=found.high,
        noise_floor=None,
        pairs=None,
        bins=None,
        determines_features=False,
    )
