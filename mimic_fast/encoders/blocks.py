"""The blocks of an encoder, ViT blocks or CNN stages: what is cut, compiled or computed again.

Their ``forward`` is replaced, not the module: names, hooks and states stay as they are, and taps,
which are hooks on blocks, see what the new forward returns, once.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError


def blocks(tapped: TappedEncoder) -> list[nn.Module]:
    """ViT blocks or CNN stages, shallow to deep; the taps where the architecture has neither."""
    encoder = tapped.encoder
    try:
        names = default_taps(encoder)
    except UsageError:
        names = tapped.taps
    return [encoder.backbone.get_submodule(name) for name in names]


def checkpoint_blocks(tapped: TappedEncoder) -> None:
    """Makes every block keep its input only and compute the rest again in backward.

    Raises:
        UsageError: If a tap lies inside a block: it would be heard twice.
    """
    units = blocks(tapped)
    _refuse_inner_taps(tapped, units, "optim.activation_checkpointing")
    for block in units:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=functools.partial(_contexts, block),
        )


def compile_blocks(tapped: TappedEncoder) -> None:
    """Compiles the forward of every block; equal blocks share their code.

    Raises:
        UsageError: If a tap lies inside a block, which compiles to one function.
    """
    units = blocks(tapped)
    _refuse_inner_taps(tapped, units, "optim.compile")
    for block in units:
        block.forward = torch.compile(block.forward)


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), _running_statistics_kept(block)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second forward of a block sees the same batch: it must not count in BatchNorm again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [
        (norm, norm.momentum, norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.momentum = 0.0  # it must save as many tensors as the first forward did
    try:
        yield
    finally:
        for norm, momentum, count, old in before:
            norm.momentum = momentum
            count.copy_(old)


def _refuse_inner_taps(tapped: TappedEncoder, units: list[nn.Module], setting: str) -> None:
    inner = {part for unit in units for part in unit.modules()} - set(units)
    for tap in tapped.taps:
        if tapped.encoder.backbone.get_submodule(tap) in inner:
            raise UsageError(
                f"tap {tap!r} lies inside a block and {setting} takes blocks whole; "
                "choose blocks as encoder.taps or leave it off"
            )
