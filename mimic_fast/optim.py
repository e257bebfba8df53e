"""Optimizer, learning-rate schedule and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mimic_fast.config import OptimSettings


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings, fused so that a step can be skipped on the device.

    AdamW leaves vectors (biases, normalization) and tokens (class, register, positions) undecayed,
    as is usual; Adam and SGD decay all, as the authors' demo does.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if settings.name == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if settings.momentum > 0:
            # Where the first step is skipped, torch would keep uninitialized memory as momentum.
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if settings.name == "adam":
        return torch.optim.Adam(
            parameters, settings.lr, weight_decay=settings.weight_decay, fused=True
        )
    groups = [
        {"params": [p for p in parameters if _decays(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], settings.lr, fused=True)


def learning_rate(
    step: int, *, total_steps: int, steps_per_epoch: float, settings: OptimSettings
) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then constant or cosine to zero."""
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total_steps - 1)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def averaged_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state to start an exponential moving average from."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, *, decay: float) -> None:
    """Average <- decay * average + (1 - decay) * weights; counters are copied."""
    state = module.state_dict()
    floating = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [average[name] for name in floating], [state[name] for name in floating], 1 - decay
    )
    for name in average.keys() - set(floating):
        average[name].copy_(state[name])


def gradient_norm(parameters: Iterable[Tensor], *, clip: float) -> Tensor:
    """L2 norm of all gradients before clipping to ``clip`` (0: none); stays on the device."""
    limit = clip if clip > 0 else math.inf
    return torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=False)


def _decays(parameter: Tensor) -> bool:
    # Tokens and position embeddings of timm and torchvision are [1, tokens, width].
    return parameter.ndim > 1 and not (parameter.ndim == 3 and parameter.shape[0] == 1)
