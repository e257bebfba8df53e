"""Optimizer, learning-rate schedule and averaged weights."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mimic_fast.config import OptimSettings


def build_optimizer(
    module: nn.Module,
    settings: OptimSettings,
    *,
    held: Mapping[str, nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the settings, fused so that a step can be skipped on the device.

    AdamW leaves vectors (biases, normalization) and tokens (class, register, positions) undecayed,
    as is usual; Adam and SGD decay all, as the authors' demo does.

    Args:
        module: What is trained; its shapes tell what decays.
        settings: Which optimizer.
        held: By name, what to update in place of the module's own parameters: the part of each that
            this process holds. None: the parameters.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    pairs = [(p if held is None else held[n], p) for n, p in named if held is None or n in held]
    parameters = [held for held, _ in pairs]
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    if settings.name == "adam":
        return torch.optim.Adam(
            parameters, settings.lr, weight_decay=settings.weight_decay, fused=True
        )
    groups = [
        {
            "params": [p for p, like in pairs if _decays(like)],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p, like in pairs if not _decays(like)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], settings.lr, fused=True)


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives SGD its momentum from the start.

    Where the first step is skipped on the device, torch would keep uninitialized memory as such.
    """
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] > 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


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
